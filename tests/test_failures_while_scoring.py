"""A score never covers fewer images than it says: what fails stops the stage, and what is left out is counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator

from bitrans_hf.data import make_shapes
from bitrans_hf.metrics.scores import StepScores
from bitrans_hf.pool import Outcome
from bitrans_hf.stages import predictions as predict_masks
from bitrans_hf.stages.label_maps import num_workers, result_of
from bitrans_hf.stages.recipe import PredictionRecipe, Recipe, RunOptions
from bitrans_hf.stages.run import Run, StageError

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def test_a_failed_refinement_stops_the_prediction_with_the_image_and_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pydensecrf", reason="the dense CRF is an extra")
    images = make_shapes(3, 0, image_size=32)
    broken = images["image_id"][1]

    def predict(run, model, processor, row, folder, settings):
        scores = np.full((2, 32, 32), np.nan if row["image_id"] == broken else 0.5, np.float32)
        return predict_masks.Prediction((32, 32), np.array([0, 1], np.uint8), np.zeros((32, 32, 3), np.uint8), scores)

    monkeypatch.setattr(predict_masks, "predict_image", predict)
    settings = PredictionRecipe(refiner="crf")
    options = RunOptions(workers=1, quiet=True, cpu=True)
    run = Run(Recipe(), options, Accelerator(cpu=True))
    with pytest.raises(StageError, match=rf"image {broken}: .*NaN.* rerun the same command"):
        predict_masks.predict_split(run, None, None, images, tmp_path, settings)
    assert [path.stem for path in (tmp_path / "crf").iterdir()] == [images["image_id"][0]]


def test_a_result_is_handed_on_also_where_it_is_false() -> None:
    assert result_of(Outcome("a", False)) is False
    with pytest.raises(StageError, match="image b: it died"):
        result_of(Outcome("b", None, "it died."))


def test_the_number_of_scored_images_is_said_where_it_is_smaller() -> None:
    assert StepScores(images=5, scored=3).shown_images() == "5 images (3 of them scored)"
    assert StepScores(images=5, scored=5).shown_images() == StepScores(images=5).shown_images() == "5 images"


def test_workers_are_as_many_as_asked_for_and_no_more_than_images() -> None:
    run = Run(Recipe(), RunOptions(workers=3), Accelerator(cpu=True))
    assert [num_workers(run, total) for total in (10, 2, 0)] == [3, 2, 1]
