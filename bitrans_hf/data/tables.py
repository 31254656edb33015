"""Tables of image labels: CSV, JSONL and Parquet, and the class names that their rows give."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from .common import DataError, first_alike, folded_name, inner_path, is_background, read_text, suggest, tidy_name
from .image_files import image_suffixes, suffix_of
from .label_cells import (
    SEPARATORS,
    UnclearCellError,
    is_missing,
    literal_names,
    plain_text,
    readings_with,
    separators_in,
    split_text,
)

OWN_COLUMNS = ("file_name", "labels", "split", "image_id", "mask_file_name")
"""Columns with a fixed meaning; without a column `labels`, every other one is a class."""

# What pandas calls the column of row numbers that nobody named.
_INDEX_COLUMN = re.compile(r"|Unnamed: \d+(?:\.\d+)?|__index_level_\d+__")

_YES_NO = {
    **dict.fromkeys(("1", "1.0", "true", "t", "yes", "y"), True),
    **dict.fromkeys(("0", "0.0", "false", "f", "no", "n"), False),
}

# Before the header of a CSV file, for Excel: what separates its cells.
_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?\r?\n', re.IGNORECASE)

Caller: TypeAlias = Literal["python", "check", "masks", "recipe"]
"""Who gets the advice: a caller of `load_folder`, `bitrans check`, `bitrans masks`, or a stage with a recipe."""

_OPTIONS: Mapping[str, Mapping[Caller, str]] = {
    "separator": {
        "python": 'separator="{}"', "check": '--separator "{}"', "masks": '--separator "{}"',
        "recipe": '--data.separator "{}"',
    },
    "allow_empty": {
        "python": "allow_empty=True", "check": "--allow-empty", "recipe": "--data.allow_empty true",
    },
    "mask_values": {
        "python": 'mask_values="{}"', "check": "--mask-values {}", "recipe": "--data.mask_values {}",
    },
    "no split": {"python": "split=None", "recipe": "null in place of its name in the recipe"},
    "table": {"python": "table=", "check": "--labels", "masks": "--labels", "recipe": "--data.table"},
    "every problem": {
        "python": "check_folder lists all", "check": "bitrans check lists all", "masks": "bitrans check lists all",
        "recipe": "bitrans check lists all",
    },
}  # fmt: skip


def option(caller: Caller, name: str, value: str = "") -> str:
    """Return an option of `load_folder` as the caller writes it: `separator=";"` or `--separator ";"`."""
    return _OPTIONS[name][caller].replace("{}", "\\n" if value == "\n" else value)


@dataclass(frozen=True)
class Problem:
    """A problem with a folder.

    Attributes:
        kind: "table" (a row that cannot be read, or names a file outside), "missing" (image), "duplicate" (two rows
            for one image), "labels", "unlabeled", "unlisted" (an image without a row), "unreadable", "copy" (the
            same file twice), "mask missing", "mask unreadable", "mask colors", "mask size", "mask ids", "mask values"
            (they may mean something else than they do here), "mask names" (which belongs to which image is not clear),
            "mask labels" (it shows a class that the labels do not).
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
        file_name: Of the image, with forward slashes, inside its folder.
        cells: Column -> value.
    """

    where: str
    file_name: str
    cells: Mapping[str, Any]

    def text(self, column: str) -> str:
        """Return a cell as text without surrounding whitespace, "" if there is none."""
        cell = self.cells.get(column)
        return "" if cell is None else str(cell).strip()


# ---- Rows.


def read_rows(path: Path, problems: list[Problem]) -> list[Row]:
    """Read the rows of a table; add those that cannot be read to `problems`.

    Raises:
        DataError: the table as a whole cannot be read, has no column file_name, or is of an unknown kind.
    """
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix.lower() not in readers:
        raise DataError(f"table {path} ends in {path.suffix!r}, expected one of {', '.join(readers)}; convert it.")
    rows: list[Row] = []
    columns: dict[tuple[str, ...], dict[str, str]] = {}
    for where, written in readers[path.suffix.lower()](path, problems):
        keys = tuple(written)
        if keys not in columns:
            columns[keys] = _tidy_columns(keys, path)
        cells = {column: written[name] for column, name in columns[keys].items()}
        name = cells.get("file_name")
        if not isinstance(name, str) or not name.strip():
            has = "an empty file_name" if "file_name" in cells else f"the columns {', '.join(map(str, cells))}"
            message = f"{where} has {has}, expected the name of an image in the column file_name."
            if "file_name" not in cells and not rows:  # not one bad row, but another kind of table
                raise DataError(f"{message[:-1]}; {_advice_on_header(written)}")
            problems.append(Problem("table", where, message))
            continue
        try:
            rows.append(Row(where, inner_path(_without_quotes(name.strip()), where), cells))
        except DataError as error:
            problems.append(Problem("table", where, str(error)))
    return rows


def _tidy_columns(written: Sequence[str], path: Path) -> dict[str, str]:
    """Return the columns of a row and their spelling, without columns of row numbers.

    Raises:
        DataError: a column occurs twice, or two look alike.
    """
    own = {folded_name(name): name for name in OWN_COLUMNS}
    loose = {_letters(name): name for name in OWN_COLUMNS if not any(folded_name(str(key)) == name for key in written)}
    columns = [
        (own.get(folded_name(str(name))) or loose.get(_letters(str(name))) or tidy_name(str(name)), name)
        for name in written
    ]
    columns = [(column, name) for column, name in columns if not _INDEX_COLUMN.fullmatch(column)]
    names = [column for column, _ in columns]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise DataError(f"{path} has the column {repeated[0]!r} more than once; rename one of them.")
    if pair := first_alike(names):
        raise DataError(f"{path} has the columns {pair[0]!r} and {pair[1]!r}, which look alike; rename one of them.")
    return dict(columns)


def _without_quotes(name: str) -> str:
    return name[1:-1] if len(name) > 2 and name[0] == name[-1] and name[0] in "\"'" else name


def _letters(column: str) -> str:
    """Return a form that is equal for `File Name`, `file-name` and `filename`."""
    return re.sub(r"[\W_]+", "", folded_name(column))


def _advice_on_header(cells: Mapping[str, Any]) -> str:
    """Say which column of a row without `file_name` contains the name of its image, if any."""
    if any(suffix_of(str(column).strip()) in image_suffixes() for column in cells):
        return "put a line with the names of the columns before the first row, such as file_name,labels."
    for column, cell in cells.items():
        if isinstance(cell, str) and suffix_of(cell.strip()) in image_suffixes():
            nameless = _INDEX_COLUMN.fullmatch(tidy_name(str(column)))
            shown = "the column without a name" if nameless else f"the column {column!r}"
            return f"{shown} holds {cell.strip()!r}: call it file_name, and that of the class names labels."
    return "call the columns of image names and of class names file_name and labels, in the first line of a CSV file."


Cells: TypeAlias = Mapping[str, Any]
"""Column -> cell of one row."""


def _read_csv(path: Path, problems: list[Problem]) -> Iterator[tuple[str, Cells]]:
    try:
        yield from _csv_rows(path, problems)
    except csv.Error as error:
        raise DataError(f"{path} cannot be read as CSV ({error}); is a quote not closed?") from error


def _csv_rows(path: Path, problems: list[Problem]) -> Iterator[tuple[str, Cells]]:
    text = read_text(path)
    header = re.sub(r'"[^"]*"', "", text.partition("\n")[0])
    said = _SEPARATOR_LINE.match(text)
    # Spreadsheets write semicolons or tabs in many countries; the header tells, since column names hold neither.
    delimiter = said[1] if said else max(",;\t|", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    if said:
        next(reader)
    header_cells = next(reader, [])
    columns = [f"Unnamed: {place}" if not tidy_name(name) else name for place, name in enumerate(header_cells)]
    if len(set(columns)) < len(columns):
        repeated = [name.strip() for name, count in Counter(columns).items() if count > 1]
        raise DataError(f"{path} has the column {repeated[0]!r} more than once; rename one of them.")
    # The first column without a name may hold row numbers; the others come from separators at the ends of lines.
    nameless = [place for place, name in enumerate(header_cells) if place and not tidy_name(name)]
    last_line = reader.line_num
    for cells in reader:
        where = f"{path.name} line {reader.line_num}"
        lines, last_line = reader.line_num - last_line, reader.line_num
        if not any(cell.strip() for cell in cells):
            continue
        if lines > 1 and text.count('"') % 2:
            message = f"{path.name} line {last_line - lines + 1} has a quote that is not closed; close or remove it."
            problems.append(Problem("table", where, message))
            continue
        if len(cells) != len(columns):
            message = (
                f"{where} has {len(cells)} cells for {len(columns)} columns; quote cells that hold {delimiter!r}."
            )
            problems.append(Problem("table", where, message))
            continue
        if lost := [cells[place] for place in nameless if cells[place].strip()]:
            message = (
                f"{where} has {lost[0]!r} in a column without a name; name the column, or quote cells that hold "
                f"{delimiter!r}."
            )
            problems.append(Problem("table", where, message))
            continue
        yield where, dict(zip(columns, cells, strict=True))


def _read_jsonl(path: Path, problems: list[Problem]) -> Iterator[tuple[str, Cells]]:
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


def _read_parquet(path: Path, problems: list[Problem]) -> Iterator[tuple[str, Cells]]:
    import pyarrow as pa  # type: ignore[import-untyped]  # here: only this kind of table needs it
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet ({error}); write it again.") from error
    for number, cells in enumerate(rows, start=1):
        yield f"{path.name} row {number}", cells


# ---- Labels.


@dataclass
class RowLabels:
    """The labels of the rows of a table, in their order.

    Attributes:
        names: Class names of each row, in its own order.
        stated: Whether a row without classes says so explicitly: by zeros, an empty list or background, not by an
            empty cell.
        notes: Findings that are not problems, in sentences.
        columns: 0/1 columns of classes; empty if a column `labels` gives them.
    """

    names: list[list[str]] = field(default_factory=list)
    stated: list[bool] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)


def labels_of_rows(
    rows: Sequence[Row],
    known: Sequence[str] | None,
    separator: str | None,
    source: str,
    problems: list[Problem],
    caller: Caller = "python",
) -> RowLabels:
    """Return the class names of each row; add cells without a name to `problems`.

    Names are normalized (`tidy_name`), and spelled as in `known` if given. Background, which is not a class, is left
    out.

    Args:
        rows: One or more.
        known: Classes in the order of their ids, if given; required where cells hold class ids instead of names.
        separator: Separator between the names in a text; None to detect it.
        source: The table in words.
        problems: Receives the problems found.
        caller: Whose options the advice names.

    Raises:
        DataError: the separator is unclear, or the columns match neither form of labels.
    """
    found = RowLabels()
    if any("labels" in row.cells for row in rows):
        _read_cells(found, rows, known, separator, source, problems, caller)
    else:
        _read_columns(found, rows, known, source, problems)
    background = 0
    for position, names in enumerate(found.names):
        objects = [name for name in names if not is_background(name)]
        if len(objects) < len(names):
            background += 1
            found.names[position], found.stated[position] = objects, True
    _report_alike(found.names, rows, problems)
    if background:
        found.notes.append(
            f"{background:,} rows name background, which is no class; a row that names nothing else shows no class."
        )
    return found


def _read_columns(
    found: RowLabels, rows: Sequence[Row], known: Sequence[str] | None, source: str, problems: list[Problem]
) -> None:
    """Read one 0/1 column for each class."""
    columns = [name for name in dict.fromkeys(name for row in rows for name in row.cells) if name not in OWN_COLUMNS]
    if backgrounds := [name for name in columns if is_background(name)]:
        columns = [name for name in columns if name not in backgrounds]
        found.notes.append(f"the column {backgrounds[0]!r} is left out: background is no class.")
    by_fold = {folded_name(name): name for name in columns}
    wanted = columns if known is None else known
    absent = [name for name in wanted if folded_name(name) not in by_fold]
    if absent or not wanted:
        raise DataError(
            f"{source} has the columns {', '.join(rows[0].cells)}, expected a column labels or a 0/1 column for each "
            "class" + (f"; the class {absent[0]!r} has none." if absent else "; add one.")
        )
    column_of = {name: by_fold[folded_name(name)] for name in wanted}
    unknown = [name for name in columns if name not in column_of.values()]
    if unknown:
        raise DataError(
            f"{source} has the column {unknown[0]!r} ({len(unknown)} such columns), which is neither a class nor "
            f"one of {', '.join(OWN_COLUMNS)}: {suggest(unknown[0], [*wanted, *OWN_COLUMNS])}"
        )
    for column in column_of.values():  # before all rows are refused for one column that means something else
        if _is_yes(rows[0], column) is None:
            raise DataError(_no_yes_or_no(rows[0], column))
    found.columns = list(column_of.values())
    for row in rows:
        answers = {name: _is_yes(row, column) for name, column in column_of.items()}
        problems += [
            Problem("labels", row.file_name, _no_yes_or_no(row, column_of[name]))
            for name, yes in answers.items()
            if yes is None
        ]
        found.names.append([name for name, yes in answers.items() if yes])
        found.stated.append(True)


def _read_cells(
    found: RowLabels,
    rows: Sequence[Row],
    known: Sequence[str] | None,
    separator: str | None,
    source: str,
    problems: list[Problem],
    caller: Caller,
) -> None:
    """Read a column of names: texts, lists and objects."""
    by_fold = {folded_name(name): name for name in known or ()}
    texts: list[tuple[int, Row, str]] = []
    for position, row in enumerate(rows):
        cell = row.cells.get("labels")
        cell = plain_text(cell) if isinstance(cell, str) else cell
        names: list[str] = []
        if isinstance(cell, str) and folded_name(cell) in by_fold:
            names = [by_fold[folded_name(cell)]]
        elif not is_missing(cell):
            try:
                values = literal_names(cell)
            except UnclearCellError as error:
                message = (
                    f"{row.where} ({row.file_name}) has the labels {_shown(cell)}, expected class names as text or "
                    f'as a list of texts, but {error}; write names with a separator ("dog;person"), or a list '
                    '(["dog", "person"]).'
                )
                problems.append(Problem("labels", row.file_name, message))
            else:
                if values is None:
                    texts.append((position, row, str(cell)))
                else:
                    names = _names_of_values(values, row, known, by_fold, problems)
        found.names.append(names)
        found.stated.append(not is_missing(cell) and cell != {} and cell != "{}")
    if by_fold:
        read = _texts_of_known(texts, by_fold, separator, source, problems, caller)
    else:
        read = _texts_of_unknown(texts, separator, source, found, caller)
    for (position, _, _), names in zip(texts, read, strict=True):
        found.names[position] = names


def _shown(cell: Any) -> str:
    shown = repr(cell)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def _names_of_values(
    values: Sequence[str | int],
    row: Row,
    known: Sequence[str] | None,
    by_fold: Mapping[str, str],
    problems: list[Problem],
) -> list[str]:
    """Return the names of a list, as written or as `known` spells them, or the names of class ids."""
    ids = [value for value in values if isinstance(value, int)]
    if not ids:
        return [by_fold.get(folded_name(name), name) for name in map(str, values)]
    has = f"{row.where} ({row.file_name}) has the labels {_shown(row.cells['labels'])}, expected "
    if known is None:
        what = "class names as text or as a list of texts; write names, or say with classes.txt what the numbers mean."
    elif not all(0 <= class_id < len(known) for class_id in ids):
        what = f"class ids from 0 to {len(known) - 1}; background has none."
    elif len(ids) == len(known) and set(ids) <= {0, 1} and (len(ids) > len(set(ids)) or ids == [1, 0]):
        what = "class ids, each once and in order, but it looks like a 0/1 vector; write class names."
    else:
        return [known[class_id] for class_id in ids]
    problems.append(Problem("labels", row.file_name, has + what))
    return []


_Texts: TypeAlias = Sequence[tuple[int, Row, str]]


def _texts_of_known(
    texts: _Texts,
    known: Mapping[str, str],
    separator: str | None,
    source: str,
    problems: list[Problem],
    caller: Caller,
) -> list[list[str]]:
    """Return the names in texts made of known classes and separators; `known` maps folded names to names."""
    if separator is not None:
        return [_spelled(split_text(text, separator), known) for _, _, text in texts]
    whole: dict[str, list[list[str]]] = {}
    for candidate in (*SEPARATORS, " "):
        read = [split_text(text, candidate) for _, _, text in texts]
        if all(folded_name(name) in known or is_background(name) for names in read for name in names):
            whole[candidate] = [_spelled(names, known) for names in read]
    if whole:
        (first, read), *others = whole.items()
        for second, other in others:
            if read != other:
                place = next(place for place in range(len(read)) if read[place] != other[place])
                _, row, text = texts[place]
                raise DataError(
                    f"{row.where} of {source} has the labels {text!r}, which may be read as "
                    f"{' and '.join(map(repr, read[place]))} or as {' and '.join(map(repr, other[place]))}; say what "
                    f"separates names: {option(caller, 'separator', first)} or "
                    f"{option(caller, 'separator', second)}."
                )
        return read
    usual = max(SEPARATORS, key=lambda sign: sum(sign in text for _, _, text in texts))
    names_of_texts = []
    for _, row, text in texts:
        readings = readings_with(text, known, SEPARATORS) or readings_with(text, known, (*SEPARATORS, " "))
        if len(readings) > 1:
            message = (
                f"{row.where} ({row.file_name}) has the labels {text!r}, which may be read as "
                f"{' and '.join(map(repr, readings[0]))} or as {' and '.join(map(repr, readings[1]))}; separate names "
                "by semicolons, or write a list."
            )
            problems.append(Problem("labels", row.file_name, message))
        names_of_texts.append(readings[0] if readings else _spelled(split_text(text, usual), known))
    return names_of_texts


def _spelled(names: Sequence[str], known: Mapping[str, str]) -> list[str]:
    return [known.get(folded_name(name), name) for name in names]


def _texts_of_unknown(
    texts: _Texts, separator: str | None, source: str, found: RowLabels, caller: Caller
) -> list[list[str]]:
    """Return the names in texts where only the separator tells names apart; `found` receives notes."""
    used: dict[str, Row] = {}
    if separator is None:
        for _, row, text in texts:
            for candidate in separators_in(text):
                used.setdefault(candidate, row)
    if len(used) > 1:
        (first, first_row), (second, second_row) = list(used.items())[:2]
        surest = min(used, key=SEPARATORS.index)
        raise DataError(
            f"the labels of {source} hold both {first!r} ({first_row.where}) and {second!r} ({second_row.where}); say "
            f"which one stands between class names with {option(caller, 'separator', surest)}, or list the classes in "
            "classes.txt, one on each line."
        )
    chosen = separator or next(iter(used), ";")
    read = [split_text(text, chosen) for _, _, text in texts]
    if separator is None and not used:
        _refuse_unclear_blanks(found, read, texts, source, caller)
    if separator is None and chosen == ",":
        _refuse_unclear_commas(found, read, texts, source, caller)
    return read


def _refuse_unclear_blanks(
    found: RowLabels, read: Sequence[Sequence[str]], texts: _Texts, source: str, caller: Caller
) -> None:
    """Refuse texts such as "haze primary" beside "haze": the space, or "/", may separate names or be part of one."""
    places: dict[str, Row] = {}
    for (_, row, _), names in zip(texts, read, strict=True):
        for name in names:
            places.setdefault(name, row)
    single = {folded_name(name) for name in places}
    for sign in (" ", "/", "+", "&"):
        parts_of = {name: [part for part in map(folded_name, name.split(sign)) if part] for name in places}
        uses = Counter(part for parts in parts_of.values() for part in set(parts))
        for name, row in places.items():
            parts = parts_of[name]
            alone = [part for part in parts if part in single]
            recombined = all(uses[part] > 1 for part in parts)
            if len(parts) > 1 and (recombined or alone if sign == " " else len(alone) == len(parts)):
                beside = f" and elsewhere {alone[0]!r} alone" if alone else " and elsewhere each of its words"
                ways = f"{option(caller, 'separator', sign)} or {option(caller, 'separator', ';')}"
                raise DataError(
                    f"{row.where} of {source} has the labels {name!r}{beside}, so that {sign!r} may separate class "
                    f"names or belong to them; say which: {ways}, or list the classes in classes.txt, one on each "
                    "line."
                )
        uses = Counter(part for parts in parts_of.values() if len(parts) > 1 for part in set(parts))
        if sign == " " and (shared := [part for part, count in uses.items() if count > 1]):
            found.notes.append(
                f"several classes hold the word {shared[0]!r}; if blanks separate class names, give "
                f"{option(caller, 'separator', ' ')}."
            )


def _refuse_unclear_commas(
    found: RowLabels, read: Sequence[Sequence[str]], texts: _Texts, source: str, caller: Caller
) -> None:
    """Refuse texts such as "salt, coarse" whose pieces do not recombine: the commas may be part of a name."""
    row_of: dict[tuple[str, ...], Row] = {}
    for (_, row, _), names in zip(texts, read, strict=True):
        row_of.setdefault(tuple(names), row)
    uses = Counter(name for names in row_of for name in set(names))
    several = [names for names in row_of if len(set(names)) > 1]
    bound = [names for names in several if any(uses[name] == 1 for name in names)]
    always = [names for names in several if all(uses[name] == 1 for name in names)]
    if always or len(bound) == len(several) > 1:
        first = (always or bound)[0]
        ways = f"{option(caller, 'separator', ',')} or {option(caller, 'separator', ';')}"
        raise DataError(
            f"{row_of[first].where} of {source} has the labels {', '.join(first)!r}, whose parts do not occur in "
            f"other combinations, so that the comma may belong to a name; say which: {ways}, or list the classes in "
            "classes.txt, one on each line."
        )
    if bound:
        found.notes.append(
            f"labels are cut at commas, as in {', '.join(bound[0])!r}; if a comma belongs to a name, list the classes "
            "in classes.txt, one on each line."
        )


def _report_alike(names_of_rows: Sequence[Sequence[str]], rows: Sequence[Row], problems: list[Problem]) -> None:
    """Note class names that look alike but differ, once per spelling."""
    first_of: dict[str, tuple[str, Row]] = {}
    seen: set[str] = set()
    for names, row in zip(names_of_rows, rows, strict=True):
        for name in names:
            if name in seen:
                continue
            seen.add(name)
            other, other_row = first_of.setdefault(folded_name(name), (name, row))
            if other != name:
                message = (
                    f"{other_row.where} names the class {other!r} and {row.where} names {name!r}, which look alike; "
                    "write one spelling everywhere, or list the classes in classes.txt, one on each line."
                )
                problems.append(Problem("labels", row.file_name, message))


def _is_yes(row: Row, column: str) -> bool | None:
    return _YES_NO.get(row.text(column).lower())


def _no_yes_or_no(row: Row, column: str) -> str:
    return (
        f"{row.where} ({row.file_name}) has {row.cells.get(column)!r} in the column {column!r}, expected 0 or 1; call "
        "a column of class names labels, and take out one that is no class."
    )
