"""Data sets for other machines: Parquet files that contain the images and masks themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from datasets import Dataset, Features, Image

from ..files import atomic_write
from ..hub.errors import InputError
from .coco_painting import COCO_REFERENCE
from .common import DataError, UnreadableImageError
from .masks import index_png, open_mask

_ROWS_AT_ONCE = 100
"""Rows held in memory, and rows in a row group, which a reader of single rows has to load."""


def write_parquet(
    dataset: Dataset,
    folder: str | Path,
    *,
    split: str = "train",
    rows_per_file: int = 2000,
    progress: Callable[[Sequence[int]], Iterable[int]] = lambda starts: starts,
) -> list[Path]:
    """Write a data set as `<folder>/data/<split>-00000-of-00001.parquet`, ..., with the bytes of its files inside.

    `Dataset.to_parquet` writes only the paths of local files. `datasets.load_dataset(folder)` reads the result
    anywhere; publish it by its `push_to_hub` or by uploading the folder. Images and masks keep their bytes, masks that
    are painted on demand are painted, and only the names of local files are kept. All files appear together once they
    are complete. A hundred rows are in memory at a time.

    Args:
        dataset: From a loader of this package.
        folder: Created if necessary; may already hold other splits.
        split: Name of the split.
        rows_per_file: Rows in each file.
        progress: Wraps the start positions of the batches, for example in a progress bar.

    Returns:
        The files.

    Raises:
        UnreadableImageError: a file is missing or cannot be read.
        DataError: the folder holds this split already, or the data set is empty.
    """
    folder = Path(folder) / "data"
    if len(dataset) == 0:
        raise DataError("the data set is empty, expected one image or more to write.")
    if rows_per_file < 1:
        raise InputError(f"rows_per_file must be 1 or greater, got {rows_per_file}.")
    if there := sorted(folder.glob(f"{split}-*.parquet")):
        raise DataError(
            f"{folder} holds the split {split!r} already ({there[0].name}); delete it or choose another name."
        )
    images = [name for name, feature in dataset.features.items() if isinstance(feature, Image)]
    # Painted masks are files like others from here on.
    features = Features({**dataset.features, **({"mask": Image()} if "mask" in images else {})})
    rows = dataset.with_format("arrow")
    count = -(-len(dataset) // rows_per_file)
    files = [folder / f"{split}-{number:05d}-of-{count:05d}.parquet" for number in range(count)]
    with ExitStack() as stack:
        temporary = [stack.enter_context(atomic_write(path)) for path in files]
        writers = [stack.enter_context(pq.ParquetWriter(path, features.arrow_schema)) for path in temporary]
        for start in progress([*_batch_starts(len(dataset), rows_per_file)]):
            number = start // rows_per_file
            stop = min(start + _ROWS_AT_ONCE, (number + 1) * rows_per_file, len(dataset))
            columns = dict(zip(rows.column_names, rows[start:stop].columns, strict=True))
            for name in images:
                cells = [_with_bytes(cell, name) for cell in columns[name].to_pylist()]
                columns[name] = pa.array(cells, features.arrow_schema.field(name).type)
            writers[number].write_table(pa.table(columns).cast(features.arrow_schema))
    return files


def _batch_starts(num_rows: int, rows_per_file: int) -> Iterable[int]:
    for first in range(0, num_rows, rows_per_file):
        yield from range(first, min(first + rows_per_file, num_rows), _ROWS_AT_ONCE)


def _with_bytes(cell: Mapping[str, Any] | None, column: str) -> Mapping[str, Any] | None:
    """Return an image cell with the bytes of its file and the file's name."""
    if cell is None:
        return None
    path = cell["path"]
    if cell["bytes"] is not None:
        return {"bytes": cell["bytes"], "path": None if path is None else PurePosixPath(path).name}
    if path.startswith(COCO_REFERENCE):
        return {"bytes": index_png(open_mask(cell)), "path": None}
    try:
        return {"bytes": Path(path).read_bytes(), "path": PurePosixPath(path).name}
    except OSError as error:
        raise UnreadableImageError(f"{column} {path} cannot be read ({error}); was it moved or deleted?") from error
