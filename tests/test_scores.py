"""The records behind every metrics.json."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from bitrans_hf.metrics.scores import (
    LabelScores,
    MaskScores,
    Record,
    RunScores,
    SeedScores,
    SeedsRecord,
    StepScores,
    StepsRecord,
    percent,
)
from bitrans_hf.stages.records import read_json, write_json

SEEDS = SeedScores(
    images=5, scored=4, mask_rule=None, miou={"refined": 66.2}, threshold={"refined": 0.4},
    per_class={"refined": {"background": 80.0, "dog": 52.4}}, miou_at_recipe_threshold={"refined": 66.0},
    several_classes=SeedScores(images=2, miou={"refined": 60.0}, threshold={"refined": 0.45}),
)  # fmt: skip
STEPS = StepScores(
    images=5, scored=5, mask_rule="drawn", steps={"seed": 60.0, "walk": 65.0}, sure={"walk": 99.0},
    several_classes=StepScores(images=2, steps={"seed": 50.0, "walk": 55.0}), without_classes=0,
)  # fmt: skip
RUN = RunScores(
    splits={"val": SEEDS}, made_with={"commit": "abc"}, trained_in="a/seed0", seconds={"train": None}, device={}
)


@pytest.mark.parametrize(
    "record",
    [SEEDS, STEPS, SeedsRecord.of({"train": SEEDS}, 640, 0.4), StepsRecord(miou=65.0, splits={"train": STEPS}), RUN],
)
def test_a_record_is_read_as_it_was_written(tmp_path: Path, record: Record):
    write_json(tmp_path / "metrics.json", record)
    assert type(record).from_json(read_json(tmp_path / "metrics.json")) == record


def test_what_was_not_measured_is_not_written(tmp_path: Path):
    write_json(tmp_path / "a.json", {"splits": {"train": SeedScores(images=3), "val": StepScores(scored=0)}})
    assert read_json(tmp_path / "a.json") == {"splits": {"train": {"images": 3}, "val": {"scored": 0}}}
    write_json(tmp_path / "b.json", SEEDS)
    written = read_json(tmp_path / "b.json")
    assert written["mask_rule"] is None  # scored against masks of which nobody says how they were made
    assert "reduced" not in written
    assert "miou_at_given_threshold" not in written


def test_a_record_passes_over_what_it_does_not_know():
    content = {"images": 3, "miou": {"fused": 50.0}, "of_a_later_version": 1, "several_classes": None}
    assert SeedScores.from_json(content) == SeedScores(images=3, miou={"fused": 50.0})


def test_an_absent_label_is_null_in_the_file(tmp_path: Path):
    label = LabelScores(iou=percent(math.nan), accuracy=percent(0.1234), target_pixels=0, predicted_pixels=7)
    scores = MaskScores(
        miou=1.0, mean_accuracy=1.0, pixel_accuracy=1.0, frequency_weighted_iou=1.0, images=1, labels_in_mean=1,
        unsure_pixels=0.0, per_class={"cat": label}, confusion=[[0, 7]],
    )  # fmt: skip
    write_json(tmp_path / "metrics.json", scores)
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["per_class"]["cat"] == {"iou": None, "accuracy": 12.34, "target_pixels": 0, "predicted_pixels": 7}
    assert written["unsure_pixels"] == 0.0


def test_scores_are_said_in_a_line():
    assert SEEDS.shown() == "mIoU refined 66.2 (at 0.40)"
    assert STEPS.shown() == "mIoU seed 60.0, walk 65.0"
    assert SeedScores(images=3).shown() == StepScores(scored=0).shown() == "no masks to score against"
