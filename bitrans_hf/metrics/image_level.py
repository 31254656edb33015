"""Scores of image-level labels, and the size of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..hub.errors import InputError
from .mean_iou.confusion import Scores, mean_over_labels

if TYPE_CHECKING:
    from torch import nn


def mean_average_precision(scores: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[float, Scores]:
    """Average precision of each class over the images, and its mean over classes.

    AP is the sum of precision times gain in recall over all distinct scores, without interpolation, as
    scikit-learn's `average_precision_score`; equal scores are one step, so the order of images never matters.

    Args:
        scores: Class scores (n, C), any monotone scale (logits or probabilities).
        labels: True labels (n, C), 0 or 1.

    Returns:
        The mean in [0, 1] over classes with a positive image (nan if there is none), and the AP of each class (C,),
        nan for a class without a positive image.

    Raises:
        ValueError: shapes differ or are not (n, C), a score is nan, or a label is neither 0 nor 1.
    """
    score_table, label_table = _check_image_scores(scores, labels)
    per_class = np.array(
        [_average_precision(score_table[:, c], label_table[:, c]) for c in range(score_table.shape[1])]
    )
    return mean_over_labels(per_class, "skip"), per_class


def image_average_precision(scores: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Average precision of each image over its classes, averaged over images: MCTformer's validation score.

    It asks whether an image's own classes come first in the image's ranking, so that scores need not be comparable
    between images. Arguments and errors as in `mean_average_precision`.

    Returns:
        The mean in [0, 1] over images with a label; nan if there is none.
    """
    score_table, label_table = _check_image_scores(scores, labels)
    per_image = [_average_precision(*row) for row in zip(score_table, label_table, strict=True)]
    return mean_over_labels(np.array(per_image), "skip")


def parameter_count(model: nn.Module) -> float:
    """Count the parameters of a model in millions, frozen ones included, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def _check_image_scores(
    scores: npt.ArrayLike, labels: npt.ArrayLike
) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.bool_]]:
    score_table, label_table = np.asarray(scores), np.asarray(labels)
    if score_table.dtype.kind != "f":
        score_table = score_table.astype(np.float64)
    if score_table.ndim != 2 or score_table.shape != label_table.shape:
        raise InputError(
            f"scores have shape {score_table.shape} and labels {label_table.shape}; both must be (images, classes)."
        )
    if np.isnan(score_table).any():
        raise InputError("scores hold nan, which has no rank; look for a training run that has diverged.")
    if not np.isin(label_table, (0, 1)).all():
        raise InputError(f"labels must be 0 or 1, got values up to {label_table.max():g}; use multi-hot rows.")
    return score_table, label_table.astype(np.bool_)


def _average_precision(scores: npt.NDArray[np.floating], positive: npt.NDArray[np.bool_]) -> float:
    """Average precision of one ranking: scores (n,), positive (n,); nan without a positive."""
    num_positive = int(positive.sum())
    if num_positive == 0:
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    # Positions after which the score changes: items with equal scores are ranked together.
    ends = np.append(np.flatnonzero(np.diff(scores[order])), scores.size - 1)
    hits = np.cumsum(positive[order])[ends]
    return float(np.sum(np.diff(hits, prepend=0) * hits / (ends + 1)) / num_positive)
