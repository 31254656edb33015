"""Your own pictures: a folder of images and a table that says which classes each of them shows."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from datasets import Dataset

from .common import (
    DataError,
    build_dataset,
    check_classes,
    chosen_classes,
    inner_path,
    masks_in_order,
    read_class_file,
    read_text,
    suggest,
)

logger = logging.getLogger(__name__)

TABLE_NAMES = tuple(f"{stem}{suffix}" for stem in ("labels", "metadata") for suffix in (".csv", ".jsonl", ".parquet"))
"""Names under which a table is found by itself, in the folder or in its images folder."""

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})
"""What counts as a picture when looking for pictures without a row; a row may name a file with any suffix."""

_SEPARATORS = (";", "|", ",")
_YES_NO = {"1": True, "0": False, "1.0": True, "0.0": False, "true": True, "false": False}


@dataclass(frozen=True)
class _Row:
    """A row of the table, `where` being its place in words: "labels.csv line 3"."""

    where: str
    file_name: str
    cells: Mapping[str, Any]


def load_folder(
    root: str | Path,
    table: str | Path | None = None,
    *,
    split: str | None = None,
    images: str | Path | None = None,
    masks: str | Path | bool | None = None,
    classes: Sequence[str] | None = None,
    separator: str | None = None,
    allow_empty: bool = False,
) -> Dataset:
    """Load a folder of pictures with image labels from a table.

    The table has a column `file_name` (relative to the images folder) and either a column `labels`, a list of class
    names or text with a separator, or one 0/1 column for each class; a column `split` is optional. Pictures are not
    opened here. Pictures without a row are counted in a log message and left out.

    Args:
        root: The folder.
        table: CSV (comma, semicolon or tab), JSONL or Parquet; default: `labels` or `metadata` with such a suffix, in
            `root` or in the images folder.
        split: Keep only rows whose column `split` says this; None keeps all.
        images: Folder of the pictures, relative to `root`; default: `images` if there, else `root` itself.
        masks: Folder of masks, relative to `root`, with the same names as the pictures but ending in `.png`, label ids
            as pixels (0 background, 1 for the first class, 255 ignored); default: `masks` if there. False: no masks.
        classes: Class names in the order of their ids; default: `classes.txt` in `root`, else all names of the table
            in alphabetical order. With a `classes.txt` this may be a part of it in any order: labels of other
            classes are dropped and the masks, drawn in the order of the file, are given the new ids.
        separator: What separates names in a text of `labels`; default: found out among `;`, `|` and `,`.
        allow_empty: Accept rows without any class (true negatives) instead of refusing them.

    Returns:
        A dataset in the order of the table: `image_id` (the file name without suffix), `image` (undecoded), `labels`
        (ascending class ids), `mask` (None where there is no file).

    Raises:
        DataError: something is missing, ambiguous or does not fit; the message names the row and the file.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; give the folder that holds the images and the table of labels.")
    images_folder = _images_folder(root, images)
    table_path = _find_table(root, images_folder, table)
    rows = list(_read_rows(table_path))
    if not rows:
        raise DataError(f"{table_path} has no rows, expected one for each image with file_name and labels.")
    mask_folder = _mask_folder(root, masks)
    paths = _picture_paths(rows, images_folder, mask_folder, table_path)

    class_file = root / "classes.txt"
    known = read_class_file(class_file) if class_file.is_file() else None
    if known is None and classes is not None:
        known = check_classes(classes, "classes")
    named = _class_names_of_rows(rows, known, separator, table_path)
    if known is None:
        known = sorted({name for names in named for name in names})
        check_classes(known, f"{table_path}")
    chosen = chosen_classes(classes, known, str(class_file))
    ids = {name: class_id for class_id, name in enumerate(chosen)}

    for row, names in zip(rows, named, strict=True):
        for name in names:
            if name not in known:
                raise DataError(
                    f"{row.where} ({row.file_name}) names the class {name!r}, which is not in "
                    f"{class_file if class_file.is_file() else 'classes'}: {suggest(name, known)}"
                )
    kept = _rows_of_split(rows, split, table_path)
    empty = [position for position in kept if not named[position]]
    if empty and not allow_empty:
        row = rows[empty[0]]
        raise DataError(
            f"{row.where} ({row.file_name}) names no class, expected one or more ({len(empty)} such rows); fill it "
            "in, take the row out, or pass allow_empty=True if the picture really shows none of the classes."
        )
    labels = [[ids[name] for name in named[position] if name in ids] for position in kept]
    image_ids = [str(PurePosixPath(rows[position].file_name).with_suffix("")) for position in kept]
    mask_paths = _mask_paths(image_ids, mask_folder)
    return build_dataset(
        image_ids,
        [paths[position] for position in kept],
        labels,
        masks_in_order(mask_paths, known, chosen),
        chosen,
    )


# ---- Folders and the table.


def _images_folder(root: Path, images: str | Path | None) -> Path:
    if images is None:
        return root / "images" if (root / "images").is_dir() else root
    if not (root / images).is_dir():
        raise DataError(f"images folder {root / images} is not there; give images= relative to {root}.")
    return root / images


def _mask_folder(root: Path, masks: str | Path | bool | None) -> Path | None:
    if masks is False:
        return None
    folder = root / ("masks" if masks is None or masks is True else masks)
    if folder.is_dir():
        return folder
    if masks is None:
        return None
    raise DataError(f"mask folder {folder} is not there; give masks= relative to {root}, or False for no masks.")


def _find_table(root: Path, images_folder: Path, table: str | Path | None) -> Path:
    if table is not None:
        path = root / table
        if not path.is_file() and Path(table).is_file():
            path = Path(table)
        if not path.is_file():
            raise DataError(f"table {path} is not there; give table= relative to {root}.")
        return path
    for folder in dict.fromkeys((root, images_folder)):
        found = [folder / name for name in TABLE_NAMES if (folder / name).is_file()]
        if len(found) > 1:
            names = " and ".join(path.name for path in found)
            raise DataError(f"{folder} holds {names}; say which one has the labels with table=.")
        if found:
            return found[0]
    raise DataError(
        f"{root} holds no table of labels, looked for {', '.join(TABLE_NAMES)}; write one with the columns file_name "
        "and labels, or pass table=."
    )


def _read_rows(path: Path) -> Iterator[_Row]:
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix.lower() not in readers:
        raise DataError(f"table {path} ends in {path.suffix!r}, expected one of {', '.join(readers)}; convert it.")
    for where, cells in readers[path.suffix.lower()](path):
        name = cells.get("file_name")
        if not isinstance(name, str) or not name.strip():
            has = "an empty file_name" if "file_name" in cells else f"the columns {', '.join(map(str, cells))}"
            raise DataError(f"{where} has {has}, expected the name of an image in the column file_name.")
        yield _Row(where, inner_path(name.strip(), where), cells)


def _read_csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    text = read_text(path)
    header = text.partition("\n")[0]
    # Spreadsheets write semicolons or tabs in many countries; the header tells, since column names hold neither.
    delimiter = max(",;\t", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    columns = [name.strip() for name in next(reader, [])]
    repeated = [name for name, count in Counter(columns).items() if count > 1]
    if repeated:
        raise DataError(f"{path} has the column {repeated[0]!r} more than once; rename one of them.")
    for cells in reader:
        where = f"{path.name} line {reader.line_num}"
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(columns):
            raise DataError(
                f"{where} has {len(cells)} cells for {len(columns)} columns; quote cells that hold {delimiter!r}."
            )
        yield where, dict(zip(columns, cells, strict=True))


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path.name} line {number}"
        try:
            cells = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where} is no JSON ({error.msg}); write one object on each line.") from error
        if not isinstance(cells, dict):
            raise DataError(f'{where} holds {line.strip()[:40]!r}, expected an object such as {{"file_name": ...}}.')
        yield where, cells


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet ({error}); write it again.") from error
    for number, cells in enumerate(rows, start=1):
        yield f"{path.name} row {number}", cells


def _picture_paths(rows: Sequence[_Row], folder: Path, mask_folder: Path | None, table: Path) -> list[Path]:
    """Return the path of each row's picture after checking that all are there and none comes twice."""
    first_row: dict[str, _Row] = {}
    for row in rows:
        image_id = str(PurePosixPath(row.file_name).with_suffix(""))
        earlier = first_row.setdefault(image_id, row)
        if earlier is not row:
            raise DataError(
                f"{earlier.where} names {earlier.file_name} and {row.where} names {row.file_name}; expected one row "
                "for each image and different names before the suffix: join the rows or rename a file."
            )
    present = set(_pictures_in(folder, mask_folder))
    missing = [row for row in rows if row.file_name not in present and not (folder / row.file_name).is_file()]
    if missing:
        row = missing[0]
        by_lower_case = {name.lower(): name for name in present}
        hint = by_lower_case.get(row.file_name.lower())
        raise DataError(
            f"{row.where} names {row.file_name}, which is not in {folder} ({len(missing)} of {len(rows)} rows name a "
            f"missing image); {f'did you mean {hint!r}?' if hint else 'add the file or take out the row.'}"
        )
    unnamed = sorted(present - {row.file_name for row in rows})
    if unnamed:
        shown = ", ".join(unnamed[:3]) + (", ..." if len(unnamed) > 3 else "")
        logger.warning("%d images in %s have no row in %s and are left out: %s", len(unnamed), folder, table, shown)
    return [folder / row.file_name for row in rows]


def _pictures_in(folder: Path, excluded: Path | None) -> Iterator[str]:
    for place, folders, files in os.walk(folder):
        here = Path(place)
        folders[:] = [name for name in folders if here / name != excluded]
        for name in files:
            if Path(name).suffix.lower() in IMAGE_SUFFIXES:
                yield (here / name).relative_to(folder).as_posix()


def _rows_of_split(rows: Sequence[_Row], split: str | None, table: Path) -> list[int]:
    """Return the positions of the rows of `split`."""
    if split is None:
        return list(range(len(rows)))
    if not all("split" in row.cells for row in rows):
        raise DataError(f"{table} has no column split to look for {split!r} in; add it or pass split=None.")
    kept = [position for position, row in enumerate(rows) if str(row.cells["split"]).strip() == split]
    if not kept:
        found = sorted({str(row.cells["split"]).strip() for row in rows})
        raise DataError(f"{table} has no row with split {split!r}, found {', '.join(found)}; choose one of them.")
    return kept


def _mask_paths(image_ids: Sequence[str], folder: Path | None) -> list[Path | None]:
    if folder is None:
        return [None] * len(image_ids)
    paths = [folder / f"{image_id}.png" for image_id in image_ids]
    found = [path if path.is_file() else None for path in paths]
    if missing := found.count(None):
        first = paths[found.index(None)]
        logger.warning("%d of %d images have no mask in %s, first %s", missing, len(found), folder, first.name)
    return found


# ---- Labels.


def _class_names_of_rows(
    rows: Sequence[_Row], known: Sequence[str] | None, separator: str | None, table: Path
) -> list[list[str]]:
    """Return the class names that each row gives, in its own order."""
    if any("labels" in row.cells for row in rows):
        texts = [row for row in rows if isinstance(row.cells.get("labels"), str)]
        separator = separator or _find_separator(texts, known or (), table)
        return [_names_in_cell(row, separator) for row in rows]
    columns = list(rows[0].cells)
    if known is None:
        known = [name for name in columns if name not in ("file_name", "split")]
    absent = [name for name in known if name not in columns]
    if absent or not known:
        raise DataError(
            f"{table} has the columns {', '.join(columns)}, expected a column labels or a 0/1 column for each class"
            + (f"; the class {absent[0]!r} has none." if absent else "; add one.")
        )
    return [[name for name in known if _is_yes(row, name)] for row in rows]


def _find_separator(rows: Sequence[_Row], known: Sequence[str], table: Path) -> str:
    """Return the separator that the texts use; a text that is a known class as a whole says nothing."""
    used: dict[str, _Row] = {}
    for row in rows:
        text = row.cells["labels"]
        if text.strip() not in known:
            for candidate in _SEPARATORS:
                if candidate in text:
                    used.setdefault(candidate, row)
    if len(used) > 1:
        (first, first_row), (second, second_row) = list(used.items())[:2]
        raise DataError(
            f"the labels of {table} hold both {first!r} ({first_row.where}) and {second!r} ({second_row.where}); "
            "say with separator= which one stands between class names."
        )
    return next(iter(used), ";")


def _names_in_cell(row: _Row, separator: str) -> list[str]:
    cell = row.cells.get("labels")
    if cell is None:
        return []
    if isinstance(cell, str):
        return [name.strip() for name in cell.split(separator) if name.strip()]
    if isinstance(cell, list) and all(isinstance(name, str) for name in cell):
        return [name.strip() for name in cell if name.strip()]
    raise DataError(
        f"{row.where} ({row.file_name}) has the labels {cell!r}, expected class names as text or as a list of texts; "
        "write names instead of numbers."
    )


def _is_yes(row: _Row, column: str) -> bool:
    cell = row.cells.get(column)
    answer = _YES_NO.get(str(cell).strip().lower())
    if answer is None:
        raise DataError(
            f"{row.where} ({row.file_name}) has {cell!r} in the column {column!r}, expected 0 or 1; a column of class "
            "names must be called labels."
        )
    return answer
