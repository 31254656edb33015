"""Tables of docs/results.md: each is what its grid's numbers give, and says where they are missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from render_results import main, markdown, rendered

from bitrans_hf.stages.run import StageError

TRAINING = Path(__file__).resolve().parents[1] / "training"
DOCS = TRAINING.parent / "docs"


def scores(*values: float) -> dict[str, Any]:
    """One variant's scores of two seeds."""
    mean = sum(values) / 2
    return {"mean": mean, "std": abs(values[0] - values[1]) / 2**0.5, "values": list(values),
            "difference_mean": None, "difference_std": None}  # fmt: skip


def grid() -> dict[str, Any]:
    """Two rows, of which the second has no attention and another chosen variant."""
    a = {"fused": scores(50.0, 52.0), "refined": scores(60.0, 61.0), "chosen": scores(60.0, 61.0)}
    b = {"coarse_cam": scores(40.0, 45.0), "chosen": scores(40.0, 45.0)}
    lower = {"fused": scores(49.0, 51.0), "refined": scores(59.0, 60.5), "chosen": scores(59.0, 60.5)}
    return {
        "tables": {"Table 1": {"one view": "a", "CNN": "b"}, "Others": {"a": "a"}},
        "chosen": {"a": "refined", "b": "coarse_cam"},
        "summary": {
            "train": {"a": {"best threshold": a}, "b": {"best threshold": b}},
            "val": {
                "a": {"best threshold": a, "first split's threshold": lower},
                "b": {"best threshold": b, "first split's threshold": b},
            },
        },
        "seeds": [0, 1],
        "runs": {
            "a/seed0": {"threshold": {"train": {"refined": 0.3, "fused": 0.1}}},
            "a/seed1": {"threshold": {"train": {"refined": 0.25, "fused": 0.1}}},
            "b/seed0": {"threshold": {"train": {"coarse_cam": 0.4}}},
            "b/seed1": {"threshold": {"train": {"coarse_cam": 0.4}}},
        },
    }


def test_a_table_holds_both_splits_the_papers_numbers_and_paired_differences():
    head, _, first, second = markdown(grid(), "Table 1").splitlines()
    assert head == (
        "|  | paper | train: product | train: refined seed | train: chosen | val: product | val: refined seed "
        "| val: chosen | threshold of train | val at its own | val, difference |"
    )
    assert first == (
        "| one view | 56.9 / 60.6 | 51.0 ± 1.4 | 60.5 ± 0.7 | 60.5 ± 0.7 | 50.0 ± 1.4 | 59.8 ± 1.1 | 59.8 ± 1.1 "
        "| 0.25 - 0.30 | 60.5 ± 0.7 |  |"
    )
    # 40.0 - 59.0 and 45.0 - 60.5: seed by seed, at the threshold that train chose.
    assert second == ("| CNN |  | - | - | 42.5 ± 3.5 | - | - | 42.5 ± 3.5 | 0.40 | 42.5 ± 3.5 | -17.2 ± 2.5 |")
    assert "chosen" not in markdown(grid(), "Others")


def test_a_page_gets_its_tables_and_keeps_the_rest(tmp_path: Path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "small.json").write_text(json.dumps(grid()))
    page = "Before.\n\n<!-- results: small, Others -->\nold\n<!-- end -->\n\nAfter.\n"
    (tmp_path / "results.md").write_text(page)
    main(["--docs", str(tmp_path)])
    text = (tmp_path / "results.md").read_text()
    assert text == page.replace("old\n", markdown(grid(), "Others"))
    assert rendered(text, tmp_path / "results") == text


@pytest.mark.parametrize(
    ("block", "words"), [("other, Table 1", "no numbers at .*other.json"), ("small, Table 9", "no table 'Table 9'")]
)
def test_a_table_without_numbers_is_named(block: str, words: str, tmp_path: Path):
    (tmp_path / "small.json").write_text(json.dumps(grid()))
    with pytest.raises(StageError, match=words):
        rendered(f"<!-- results: {block} -->\n<!-- end -->\n", tmp_path)


def test_the_published_tables_are_those_of_the_kept_numbers():
    text = (DOCS / "results.md").read_text(encoding="utf-8")
    assert text.count("<!-- results: ") == text.count("<!-- end -->") > 3
    assert rendered(text, DOCS / "results") == text
