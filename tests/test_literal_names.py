"""Names of classes that some format reads as something else are shown as they are, everywhere they are written."""

from __future__ import annotations

import ast
import copy
import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from test_report import make_row
from tiny_run import write_run

from bitrans_hf.publishing.cards import RunRecord, render_card
from bitrans_hf.publishing.markdown import literal
from bitrans_hf.report.charts import confusion_picture
from bitrans_hf.report.drawing import drawable, figure_grid
from bitrans_hf.report.tables import Table
from bitrans_hf.stages.evaluate import columns_of, text_table

REPOSITORY = Path(__file__).resolve().parents[1]

NAMES = [
    "no", "null", "1.0", "a|b", "<b>x</b>", "yes: maybe", '#1 "q"', "- dash", "back`tick", "``` fence", "it's {x}",
    "**bold**", "_x_", "%s", "$a$b$", "[l](u)", "日本 🐶", "{{ x }}", "a\\", "snake_case", "'''", "&amp;",
]  # fmt: skip


def shown(markdown: str) -> str:
    """What a reader sees of escaped Markdown text."""
    return html.unescape(re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", markdown))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text("ab_*`|<>&;\\$~[]()#+-=1. \n", max_size=12))
def test_markdown_shows_an_escaped_text_as_it_is(text: str) -> None:
    escaped = literal(text)
    assert shown(escaped) == " ".join(text.split())
    assert not re.search(r"(?<!\\)(?:\\\\)*[`*\[\]|~$]", re.sub(r"\\.", "", escaped))
    assert not re.search(r"[<>]", escaped)


def test_plain_names_stay_as_they_are() -> None:
    assert [literal(name) for name in ("hot dog", "snake_case", "train_aug", "it's {x}", "t-shirt")] == [
        "hot dog", "snake_case", "train_aug", "it's {x}", "t-shirt",
    ]  # fmt: skip
    assert [literal(name) for name in ("- a", "1. b", "# c")] == ["\\- a", "1\\. b", "\\# c"]


@pytest.mark.parametrize("first", NAMES)
def test_a_card_shows_every_name_and_its_code_is_python(tmp_path: Path, first: str) -> None:
    run = RunRecord.from_folder(write_run(tmp_path / "a"))
    stages, names = copy.deepcopy(dict(run.stages)), [first, *(name for name in NAMES if name != first)]
    for stage in stages.values():
        stage["recipe"].get("data", {})["classes"] = names
    card = render_card(
        RunRecord(run.name, names, stages),
        "bitrans",
        repo="org/a",
        version="v1",
        package_version="1",
    )
    (code,) = re.findall(r"^```python\n(.*?)\n```$", card, re.DOTALL | re.MULTILINE)
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.keyword)]
    given_labels = [ast.literal_eval(call.value) for call in calls if call.arg == "candidate_labels"]
    assert given_labels == [[first]]
    (classes,) = re.findall(r"^Classes: (.*)\.$", card, re.MULTILINE)
    assert shown(classes) == ", ".join(names)
    (settings_shown,) = re.findall(r"^```yaml\n(.*?)\n```$", card, re.DOTALL | re.MULTILINE)
    assert yaml.safe_load(settings_shown)["data"]["classes"] == names
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "transformers"


def test_pictures_write_what_their_font_lacks_by_number_and_formulas_as_text() -> None:
    assert drawable("日本 🐶 é") == "\\u65e5\\u672c \\U0001f436 é"
    picture = confusion_picture(np.eye(len(NAMES), dtype=int), NAMES, NAMES)
    assert picture.width > 400
    row = make_row()
    assert figure_grid([type(row)(**{**vars(row), "class_names": NAMES[-6:]})]).width > 100


def test_a_table_on_the_terminal_keeps_its_columns_under_wide_characters() -> None:
    lines = text_table(Table("", ["label", "IoU"], [["日本 🐶", "1.00"], ["e\N{COMBINING ACUTE ACCENT}", "22.00"]]))
    assert len({columns_of(line) for line in lines.splitlines()}) == 1
    assert json.dumps(lines)
