"""Scores: confusion counts, mean IoU, the threshold sweep, average precision, model size.

Two classes count pixels, and they count labels differently. `MeanIoU` compares label maps, which have background as a
label: it takes the number of label ids, 21 for VOC. `ThresholdSweep` compares seeds, one map for each object class and
none for background: it takes the number of object classes, 20 for VOC.

`evaluate.load` reads the folder `mean_iou` beside this file:

    >>> import evaluate
    >>> from bitrans_hf.metrics import METRIC_FOLDER
    >>> metric = evaluate.load(str(METRIC_FOLDER))
    >>> metric.compute(predictions=[[[0, 1]]], references=[[[0, 1]]], num_labels=2)["mean_iou"]
    1.0
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .image_level import image_average_precision, mean_average_precision, parameter_count
from .mean_iou.confusion import (
    LabelRules,
    confusion_counts,
    iou_from_counts,
    miou_from_counts,
    scores_from_counts,
)
from .sweep import DEFAULT_THRESHOLDS, SweepResult, ThresholdSweep, threshold_sweep

if TYPE_CHECKING:
    from .mean_iou.mean_iou import MeanIoU

METRIC_FOLDER = Path(__file__).parent / "mean_iou"
"""The folder for `evaluate.load`, complete in itself."""

__all__ = [
    "DEFAULT_THRESHOLDS",
    "METRIC_FOLDER",
    "LabelRules",
    "MeanIoU",
    "SweepResult",
    "ThresholdSweep",
    "confusion_counts",
    "image_average_precision",
    "iou_from_counts",
    "mean_average_precision",
    "miou_from_counts",
    "parameter_count",
    "scores_from_counts",
    "threshold_sweep",
]


def __getattr__(name: str) -> Any:
    # `evaluate` takes most of a second to import, and only this class needs it.
    if name == "MeanIoU":
        from .mean_iou.mean_iou import MeanIoU

        return MeanIoU
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
