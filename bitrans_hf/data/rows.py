"""The rows of every loader: their columns, and how they become a `datasets.Dataset`.

The only file that builds data sets, so that checking a folder does not import `datasets`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
from datasets import ClassLabel, Dataset, DatasetInfo, Features, Image, Value
from datasets import Sequence as List  # the name that every version knows; a `List` since datasets 4
from datasets.table import InMemoryTable

from .common import DataError, collector_paused

_MASK_RULE = "masks: "


def row_features(classes: Sequence[str], *, decode_masks: bool = True) -> Features:
    """Return the columns of every loader, for object classes named in the order of their ids.

    Images stay undecoded: `datasets` would rotate them by their EXIF tag, while masks are drawn on the stored pixels,
    see `open_image`. Only `open_mask` can open masks that are painted on demand.
    """
    return Features(
        {
            "image_id": Value("string"),
            "image": Image(decode=False),
            "labels": List(ClassLabel(names=list(classes))),
            "mask": Image(decode=decode_masks),
        }
    )


@collector_paused()
def build_dataset(
    image_ids: Sequence[str],
    images: Sequence[Path | str],
    labels: Sequence[Iterable[int] | None],
    masks: Sequence[Path | bytes | str | None],
    classes: Sequence[str],
    *,
    mask_rule: str | None = None,
) -> Dataset:
    """Build a data set; images and masks given as paths are not opened.

    Args:
        image_ids: One id per row.
        images: Path of each image.
        labels: Ids of the object classes in each image, in any order, repeats allowed; stored sorted and unique. None
            if unknown, which is not the same as none.
        masks: For each row the path of an index image, the bytes of a PNG, a reference (text) to what is painted on
            demand, or None where no mask is known.
        classes: Names of the object classes, in the order of their ids.
        mask_rule: How the masks were made, for `mask_rule` to give back.
    """
    features = row_features(classes, decode_masks=not any(isinstance(mask, str) for mask in masks))
    in_memory = [mask if isinstance(mask, bytes) else None for mask in masks]
    paths = [None if mask is None or isinstance(mask, bytes) else str(mask) for mask in masks]
    columns = {
        "image_id": pa.array(image_ids, pa.string()),
        "image": _image_cells([None] * len(images), [str(image) for image in images]),
        "labels": pa.array([None if ids is None else sorted(set(ids)) for ids in labels], pa.list_(pa.int64())),
        "mask": _image_cells(in_memory, paths),
    }
    # Not `Dataset.from_dict`, which looks at every cell in Python: 5 s for COCO's 122,218 rows, this takes 0.3 s.
    table = pa.table(columns, schema=features.arrow_schema)
    del columns, in_memory, paths
    pa.default_memory_pool().release_unused()  # what Arrow keeps of it for later is more than the table
    info = DatasetInfo(description="" if mask_rule is None else f"{_MASK_RULE}{mask_rule}", features=features)
    return Dataset(InMemoryTable(table), info=info)


def _image_cells(contents: Sequence[bytes | None], paths: Sequence[str | None]) -> pa.StructArray:
    """Return cells as the feature `Image` stores them; a cell without both is null."""
    absent = [content is None and path is None for content, path in zip(contents, paths, strict=True)]
    arrays = [pa.array(contents, pa.binary()), pa.array(paths, pa.string())]
    return pa.StructArray.from_arrays(arrays, names=["bytes", "path"], mask=pa.array(absent, pa.bool_()))


def mask_rule(dataset: Dataset) -> str | None:
    """Return how the masks of `dataset` were made, to be written beside every score; None if unknown.

    It survives `select`, `filter`, `map` and `save_to_disk`, but not Parquet files and the Hub.
    """
    description = dataset.info.description or ""
    return description.removeprefix(_MASK_RULE) if description.startswith(_MASK_RULE) else None


def require_labels(dataset: Dataset) -> None:
    """Check that the image labels of all rows are known.

    Raises:
        DataError: some are not, as in VOC's test split.
    """
    unknown = dataset.select_columns("labels").with_format("arrow")[:]["labels"].null_count
    if unknown:
        raise DataError(
            f"the image labels of {unknown} of {len(dataset)} images are not known, expected those of all; VOC's test "
            "split has none: choose another split, or pass label_file= (data.label_file in a recipe)."
        )


def class_names(dataset: Dataset) -> list[str]:
    """Return the names of the object classes of `dataset`, in the order of their ids, without background.

    Raises:
        DataError: `dataset` has no column `labels` that holds lists of `ClassLabel`.
    """
    feature = dataset.features.get("labels")
    names = getattr(getattr(feature, "feature", None), "names", None)
    if names is None:
        raise DataError(
            f"the data set's column 'labels' is {feature!r}, expected Sequence(ClassLabel(names=...)); "
            "load it with a loader of bitrans_hf.data or cast the column."
        )
    return list(names)
