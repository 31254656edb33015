from __future__ import annotations

import csv
import gzip
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from bitrans_hf.data import DataError, class_names, load_folder
from bitrans_hf.data.common import folded_name, is_background, tidy_name
from bitrans_hf.data.label_cells import (
    SEPARATORS,
    UnclearCellError,
    is_missing,
    literal_names,
    plain_text,
    readings_with,
    separators_in,
    split_text,
)
from bitrans_hf.data.tables import Problem, labels_of_rows, read_rows


@pytest.mark.parametrize(
    ("cell", "names"),
    [
        ("['dog', 'person']", ["dog", "person"]),
        ('["dog", "person"]', ["dog", "person"]),
        ("['dog' 'person']", ["dog", "person"]),  # numpy's repr, which Python would read as one text
        ("['dog'\n 'person']", ["dog", "person"]),
        ("array(['dog', 'person'], dtype=object)", ["dog", "person"]),
        ("array(['dog', 'person'], dtype='<U6')", ["dog", "person"]),
        ("('dog', 'person')", ["dog", "person"]),
        ("('dog',)", ["dog"]),
        ("(dog, hot dog)", ["dog", "hot dog"]),
        ("[np.str_('dog'), np.str_('person')]", ["dog", "person"]),
        ("{'person', 'dog'}", ["dog", "person"]),
        ("frozenset({'dog'})", ["dog"]),
        ("set()", []),
        ("[]", []),
        ("[dog, hot dog]", ["dog", "hot dog"]),
        ("{dog,person}", ["dog", "person"]),
        ("['dog', nan]", ["dog"]),
        ("[\"dog's bowl\", 'cat']", ["dog's bowl", "cat"]),
        ("\"['dog']\"", ["dog"]),
        ('"[""dog""]"', ["dog"]),
        ('{"choices": ["dog", "person"]}', ["dog", "person"]),
        ('{"choices": "dog"}', ["dog"]),
        ('[{"x": 1.5, "rectanglelabels": ["dog"]}, {"x": 2, "rectanglelabels": ["person"]}]', ["dog", "person"]),
        ('[{"value": {"choices": ["dog"]}, "from_name": "tag", "type": "choices"}]', ["dog"]),
        ('{"shapes": [{"label": "dog", "points": [[1, 2]]}], "version": "5"}', ["dog"]),
        ('{"type": "dog"}', ["dog"]),
        ('{"type": {"dog": true, "person": false}}', ["dog"]),
        ('{"dog": true, "person": true, "cat": false}', ["dog", "person"]),
        ('{"dog": 1, "cat": 0}', ["dog"]),
        ('{"dog": "1", "cat": "0"}', ["dog"]),
        ("{}", []),
        ("[2, 0]", [2, 0]),
        ("[2 0]", [2, 0]),
        (["dog", " hot  dog "], ["dog", "hot dog"]),
        ({"choices": ["dog"]}, ["dog"]),
        ("dog", None),
        ("bear (brown)", None),
        ("(unknown)", None),
        ("bear [brown]", None),
        ("dog's", None),
    ],
)
def test_a_list_or_an_object_is_read_as_what_it_holds(cell: Any, names: list[Any] | None) -> None:
    assert literal_names(cell) == names


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ("['dog'", "no complete list"),
        (" 'person']", "no complete list"),
        ("['dog' 'cat' ... 'cow']", "no complete list"),
        ("[dog];[cat]", "no complete list"),
        ("[0.9, 0.1]", "0.9 is no class name"),
        ("['dog', 1]", "mixes names and numbers"),
        ('{"type": "dog", "color": "brown"}', "which of type, color holds the class is not clear"),
        (True, "True is no class name|single number"),
        (3, "single number"),
    ],
)
def test_what_is_no_list_of_names_is_refused_with_a_reason(cell: Any, reason: str) -> None:
    with pytest.raises(UnclearCellError, match=reason):
        literal_names(cell)


@pytest.mark.parametrize("cell", [None, "", " \u00a0", "nan", "None", "<NA>", float("nan")])
def test_what_pandas_writes_for_nothing_is_nothing(cell: Any) -> None:
    assert is_missing(cell)


def test_names_are_split_outside_of_quotes() -> None:
    assert split_text('"salt, coarse", bread,', ",") == ["salt, coarse", "bread"]
    assert split_text("'dog'; cat's", ";") == ["dog", "cat's"]
    assert separators_in('"salt, coarse"; bread') == [";"]
    assert separators_in("dog's, cat's") == [","]


def test_known_names_decide_where_a_text_is_cut() -> None:
    known = {folded_name(name): name for name in ("salt, coarse", "Bread", "a", "b", "a,b")}
    assert readings_with("salt, coarse;bread", known, SEPARATORS) == [["salt, coarse", "Bread"]]
    assert readings_with("a,b,a", known, SEPARATORS) == [["a,b", "a"], ["a", "b", "a"]]
    assert readings_with("a;c", known, SEPARATORS) == []


# ---- Round trips: what a table says comes back, in every form that people write.

# Letters of several scripts, marks, signs that mean something in tables, in lists and in shells.
NAMES = st.text(st.sampled_from("abÉß中한ñ'()-+&/.#%_ 9"), min_size=1, max_size=12).map(tidy_name)


def fit_for_a_name(name: str) -> bool:
    """Neither empty, background or what pandas writes for nothing, nor like a list."""
    plain = bool(name) and not is_missing(name) and not is_background(name)
    return plain and not name.startswith(("'", "(")) and literal_or_none(name) is None


def literal_or_none(name: str) -> Any:
    try:
        return literal_names(name)
    except UnclearCellError:
        return "unclear"


CLASS_LISTS = st.lists(NAMES.filter(fit_for_a_name), min_size=2, max_size=4, unique_by=folded_name)
FORMS = ("semicolons", "bars", "commas", "python", "json", "numpy", "tuple", "choices", "flags", "columns", "lists")


@settings(max_examples=60, deadline=None, database=None)
@given(classes=CLASS_LISTS, data=st.data(), form=st.sampled_from(FORMS), kind=st.sampled_from(["csv", "tsv", "jsonl"]))
def test_every_form_of_a_table_gives_back_the_labels_that_it_was_written_from(
    classes: list[str], data: st.DataObject, form: str, kind: str
) -> None:
    expected = [
        data.draw(st.lists(st.sampled_from(classes), min_size=1, unique=True).map(sorted), label="row")
        for _ in range(3)
    ]
    assume(form not in ("semicolons", "bars", "commas") or not any(set(name) & set(";|,") for name in classes))
    assume(form != "numpy" or not any("'" in name for name in classes))  # numpy's repr needs no more than one quote
    rows = [{"file_name": f"{index}.png", **cells(names, classes, form)} for index, names in enumerate(expected)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"labels.{kind}"
        write_table(path, rows)
        problems: list[Problem] = []
        found = labels_of_rows(read_rows(path, problems), classes, None, "the table", problems)
    assert problems == []
    assert [sorted(names) for names in found.names] == expected


def cells(names: list[str], classes: list[str], form: str) -> dict[str, Any]:
    """The labels of a row in one of `FORMS`."""
    if form == "columns":
        return {name: int(name in names) for name in classes}
    texts: dict[str, Any] = {
        "semicolons": "; ".join(names),
        "bars": "|".join(names),
        "commas": ", ".join(names),
        "python": str(names),
        "json": json.dumps(names, ensure_ascii=False),
        "numpy": str(np.array(names)),
        "tuple": str(tuple(names)),
        "choices": json.dumps({"choices": names}),
        "flags": json.dumps({name: name in names for name in classes}),
        "lists": names,
    }
    return {"labels": texts[form]}


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)


@settings(max_examples=100, deadline=None, database=None)
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text("ab'\"[]{},;", max_size=6),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3),
        max_leaves=6,
    )
)
def test_no_cell_gives_anything_but_names_ids_or_a_reason(value: Any) -> None:
    for cell in (value, str(value), json.dumps(value)):
        try:
            found = literal_names(cell)
        except UnclearCellError:
            continue
        assert found is None or all(isinstance(name, str | int) and not isinstance(name, bool) for name in found)
        assert found is not None or isinstance(cell, str)
        assert found is None or not any(isinstance(name, float) and math.isnan(name) for name in found)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("salt &amp; pepper;dog", "salt & pepper;dog"),
        ("rock &#38; roll", "rock & roll"),
        ("A&B;C", "A&B;C"),  # no entity: the separator stays one
        ("\u201cdog\u201d;\u201ccat\u201d", '"dog";"cat"'),
        ("\u2018dog\u2019, \u2018cat\u2019", "'dog', 'cat'"),
        ("cow\u2019s milk;shepherd\u2019s dog", "cow\u2019s milk;shepherd\u2019s dog"),  # apostrophes
        ("3.0", "3"),
        (" 12.00 ", "12"),
        ("v3.0", "v3.0"),
        ("3.5", "3.5"),
    ],
)
def test_what_other_programs_make_of_a_text_is_undone(written: str, meant: str):
    assert plain_text(written) == meant


@pytest.mark.parametrize(
    ("table", "labels"),
    [
        ("a.png,salt &amp; pepper;dog", ["dog", "salt & pepper"]),
        ("a.png,\u201cdog\u201d;\u201ccat\u201d", ["cat", "dog"]),
        ("a.png,3.0", ["3"]),
    ],
)
def test_such_texts_are_read_in_a_table(table: str, labels: list[str], tmp_path: Path):
    (tmp_path / "images").mkdir()
    for name in "ab":
        Image.new("RGB", (20, 20), "red").save(tmp_path / "images" / f"{name}.png")
    (tmp_path / "labels.csv").write_text(f"file_name,labels\n{table}\nb.png,zebra\n", encoding="utf-8")
    rows = load_folder(tmp_path)
    names = class_names(rows)
    assert sorted(names[label] for label in rows[0]["labels"]) == labels


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            gzip.compress(b"file_name,labels\na.png,dog\n", mtime=0),
            r"is a gzip archive, expected text; unpack it first",
        ),
        (b"PK\x03\x04 and so on", r"is an Excel or OpenDocument workbook.*; save the sheet as CSV UTF-8"),
        (b"PAR1 and so on", r"is a Parquet file, expected text; give it the suffix \.parquet"),
    ],
)
def test_a_table_that_is_no_text_is_called_what_it_is(content: bytes, words: str, tmp_path: Path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (20, 20), "red").save(tmp_path / "images" / "a.png")
    (tmp_path / "labels.csv").write_bytes(content)
    with pytest.raises(DataError, match=words):
        load_folder(tmp_path)
