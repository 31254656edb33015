"""Tables of image labels: CSV, JSONL and Parquet, and the class names that their rows give."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .common import DataError, inner_path, read_text, suggest

OWN_COLUMNS = ("file_name", "labels", "split", "image_id", "mask_file_name")
"""Columns with a meaning of their own; where there is no column `labels`, every other one is a class."""

_SEPARATORS = (";", "|", ",")
_YES_NO = {"1": True, "0": False, "1.0": True, "0.0": False, "true": True, "false": False}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a folder.

    Attributes:
        kind: "table" (a row that cannot be read, or names a file outside), "missing" (picture), "duplicate" (two rows
            for one image), "labels", "unlabelled", "unlisted" (a picture without a row), "unreadable", "copy" (the
            same file twice), "mask missing", "mask unreadable", "mask colours", "mask size", "mask ids", "mask labels"
            (it shows a class that the labels do not).
        name: File or row that it is about.
        message: What was found, what was expected, what to do.
    """

    kind: str
    name: str
    message: str


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table.

    Attributes:
        where: Its place in words: "labels.csv line 3".
        file_name: Of the picture, with forward slashes, inside its folder.
        cells: Column -> value.
    """

    where: str
    file_name: str
    cells: Mapping[str, Any]

    def text(self, column: str) -> str:
        """Return a cell as text without blanks around it, "" where there is none."""
        cell = self.cells.get(column)
        return "" if cell is None else str(cell).strip()


# ---- Rows.


def read_rows(path: Path, problems: list[Problem]) -> list[Row]:
    """Read the rows of a table; those that cannot be read are added to `problems`.

    Raises:
        DataError: the table as a whole cannot be read, has no column file_name, or is of an unknown kind.
    """
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix.lower() not in readers:
        raise DataError(f"table {path} ends in {path.suffix!r}, expected one of {', '.join(readers)}; convert it.")
    rows: list[Row] = []
    for where, cells in readers[path.suffix.lower()](path, problems):
        name = cells.get("file_name")
        if not isinstance(name, str) or not name.strip():
            has = "an empty file_name" if "file_name" in cells else f"the columns {', '.join(map(str, cells))}"
            message = f"{where} has {has}, expected the name of an image in the column file_name."
            if "file_name" not in cells and not rows:  # not one bad row, but another kind of table
                raise DataError(message)
            problems.append(Problem("table", where, message))
            continue
        try:
            rows.append(Row(where, inner_path(name.strip(), where), cells))
        except DataError as error:
            problems.append(Problem("table", where, str(error)))
    return rows


def _read_csv(path: Path, problems: list[Problem]) -> Iterator[tuple[str, dict[str, Any]]]:
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
            message = (
                f"{where} has {len(cells)} cells for {len(columns)} columns; quote cells that hold {delimiter!r}."
            )
            problems.append(Problem("table", where, message))
            continue
        yield where, dict(zip(columns, cells, strict=True))


def _read_jsonl(path: Path, problems: list[Problem]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path.name} line {number}"
        try:
            cells = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(
                Problem("table", where, f"{where} is no JSON ({error.msg}); write one object on each line.")
            )
            continue
        if not isinstance(cells, dict):
            message = f'{where} holds {line.strip()[:40]!r}, expected an object such as {{"file_name": ...}}.'
            problems.append(Problem("table", where, message))
            continue
        yield where, cells


def _read_parquet(path: Path, problems: list[Problem]) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa  # type: ignore[import-untyped]  # here: only this kind of table needs it
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet ({error}); write it again.") from error
    for number, cells in enumerate(rows, start=1):
        yield f"{path.name} row {number}", cells


# ---- Labels.


def class_names_of_rows(
    rows: Sequence[Row], known: Sequence[str] | None, separator: str | None, source: str, problems: list[Problem]
) -> list[list[str]]:
    """Return the class names that each row gives, in its own order; cells that give none are added to `problems`.

    Args:
        rows: One or more.
        known: Classes in the order of their ids, where they are given; class ids in place of names need it.
        separator: Between the names in a text; None to find it out.
        source: The table in words.
        problems: Is added to.

    Raises:
        DataError: separators contradict each other, or columns fit neither way of giving labels.
    """
    if any("labels" in row.cells for row in rows):
        texts = [row for row in rows if isinstance(row.cells.get("labels"), str)]
        separator = separator or _find_separator(texts, known or (), source)
        return [_names_in_cell(row, separator, known, problems) for row in rows]
    columns = [name for name in rows[0].cells if name not in OWN_COLUMNS]
    if known is None:
        known = columns
    absent = [name for name in known if name not in columns]
    if absent or not known:
        raise DataError(
            f"{source} has the columns {', '.join(rows[0].cells)}, expected a column labels or a 0/1 column for each "
            "class" + (f"; the class {absent[0]!r} has none." if absent else "; add one.")
        )
    unknown = [name for name in columns if name not in known]
    if unknown:
        raise DataError(
            f"{source} has the column {unknown[0]!r} ({len(unknown)} such columns), which is neither a class nor "
            f"one of {', '.join(OWN_COLUMNS)}: {suggest(unknown[0], [*known, *OWN_COLUMNS])}"
        )
    for name in known:  # before all rows are refused for one column that means something else
        if _is_yes(rows[0], name) is None:
            raise DataError(_no_yes_or_no(rows[0], name))
    return [_names_in_columns(row, known, problems) for row in rows]


def _find_separator(rows: Sequence[Row], known: Sequence[str], source: str) -> str:
    """Return the separator that the texts use; a text that is a known class as a whole says nothing."""
    used: dict[str, Row] = {}
    for row in rows:
        text = row.cells["labels"]
        if text.strip() not in known:
            for candidate in _SEPARATORS:
                if candidate in text:
                    used.setdefault(candidate, row)
    if len(used) > 1:
        (first, first_row), (second, second_row) = list(used.items())[:2]
        raise DataError(
            f"the labels of {source} hold both {first!r} ({first_row.where}) and {second!r} ({second_row.where}); "
            "say with separator= which one stands between class names."
        )
    return next(iter(used), ";")


def _names_in_cell(row: Row, separator: str, known: Sequence[str] | None, problems: list[Problem]) -> list[str]:
    cell = row.cells.get("labels")
    if cell is None:
        return []
    if isinstance(cell, str):
        return [name.strip() for name in cell.split(separator) if name.strip()]
    if isinstance(cell, list) and all(isinstance(name, str) for name in cell):
        return [name.strip() for name in cell if name.strip()]
    has = f"{row.where} ({row.file_name}) has the labels {cell!r}, expected "
    if not isinstance(cell, list) or not all(isinstance(class_id, int) for class_id in cell) or known is None:
        what = "class names as text or as a list of texts; write names, or say with classes.txt what the numbers mean."
        problems.append(Problem("labels", row.file_name, has + what))
        return []
    if not all(0 <= class_id < len(known) for class_id in cell):
        what = f"class ids from 0 to {len(known) - 1}; background has none."
        problems.append(Problem("labels", row.file_name, has + what))
        return []
    return [known[class_id] for class_id in cell]


def _names_in_columns(row: Row, known: Sequence[str], problems: list[Problem]) -> list[str]:
    answers = {name: _is_yes(row, name) for name in known}
    problems += [
        Problem("labels", row.file_name, _no_yes_or_no(row, name)) for name, yes in answers.items() if yes is None
    ]
    return [name for name, yes in answers.items() if yes]


def _is_yes(row: Row, column: str) -> bool | None:
    return _YES_NO.get(row.text(column).lower())


def _no_yes_or_no(row: Row, column: str) -> str:
    return (
        f"{row.where} ({row.file_name}) has {row.cells.get(column)!r} in the column {column!r}, expected 0 or 1; a "
        "column of class names must be called labels."
    )
