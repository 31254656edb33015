"""Scores: confusion counts, mean IoU, the threshold sweep, average precision, model size.

Everything here counts integers first and divides last. Counts add up over images and processes, so that a score never
depends on how a set was cut into batches. No picture is kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypedDict

import numpy as np
import numpy.typing as npt

from .labels import BACKGROUND, IGNORE_INDEX

if TYPE_CHECKING:
    from torch import nn

    from .seeds import Seeds

Counts = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float64]
AbsentRule = Literal["skip", "zero"]

DEFAULT_THRESHOLDS: tuple[float, ...] = tuple(step / 100 for step in range(101))
"""Background thresholds 0.00, 0.01 ... 1.00."""

_MIN_THRESHOLD_GAP = 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Confusion counts and IoU


def confusion_counts(
    prediction: npt.ArrayLike, target: npt.ArrayLike, num_labels: int, ignore_index: int = IGNORE_INDEX
) -> Counts:
    """Count the pixels of each pair (target label, predicted label).

    Args:
        prediction: Predicted label ids, any integer array; its values where `target` is ignored do not matter.
        target: True label ids, shape of `prediction`, values in [0, num_labels) or `ignore_index`.
        num_labels: Number of label ids, background included.
        ignore_index: Pixels with this target are left out, also when it is the id of a label.

    Returns:
        Pixel counts (num_labels, num_labels) int64; rows are targets, columns are predictions.

    Raises:
        ValueError: the shapes differ, a value is not an integer, or a counted label id is out of range.

    Example:
        >>> confusion_counts([0, 1, 1, 0], [0, 1, 0, 255], num_labels=2)
        array([[1, 1],
               [0, 1]])
    """
    if num_labels < 1:
        raise ValueError(f"num_labels must be at least 1, got {num_labels}; count the label ids, background included.")
    predicted, true = _integer_map(prediction, "prediction"), _integer_map(target, "target")
    if predicted.shape != true.shape:
        raise ValueError(
            f"prediction has shape {predicted.shape} and target {true.shape}; both must have the same shape, "
            "bring the prediction to the size of the target first."
        )
    counted = true != ignore_index
    predicted, true = predicted[counted], true[counted]
    _check_label_range(true, "target", num_labels, ignore_index)
    _check_label_range(predicted, "prediction", num_labels, None)
    pairs = true.astype(np.intp) * num_labels + predicted.astype(np.intp)
    return np.bincount(pairs, minlength=num_labels**2).reshape(num_labels, num_labels).astype(np.int64, copy=False)


def iou_from_counts(counts: Counts) -> Scores:
    """Divide intersection by union for each label.

    Args:
        counts: Confusion counts (L, L), rows are targets.

    Returns:
        IoU (L,) float64 in [0, 1]; nan for a label that is neither in the targets nor in the predictions.
    """
    intersection = np.diagonal(counts)
    return _ratio(intersection, counts.sum(axis=1) + counts.sum(axis=0) - intersection)


def mean_iou(counts: Counts, absent: AbsentRule = "skip") -> float:
    """Average the IoU over labels.

    Args:
        counts: Confusion counts (L, L), rows are targets.
        absent: What a label does that is neither in the targets nor in the predictions: "skip" leaves it out of the
            mean, as the community `mean_iou` does; "zero" counts it as IoU 0, as MCTformer's evaluation does. On all
            of VOC both are the same; on a small subset "zero" is lower.

    Returns:
        Mean IoU in [0, 1]; nan if there is nothing to average.
    """
    return _mean(iou_from_counts(counts), absent)


class MeanIoUScores(TypedDict):
    """Result of `MeanIoU.compute`, with the keys of the community `mean_iou`; all values are in [0, 1] or nan."""

    mean_iou: float
    mean_accuracy: float
    overall_accuracy: float
    per_category_iou: Scores
    per_category_accuracy: Scores


class MeanIoU:
    """Mean IoU over a stream of label maps, with the method names and result keys of the community `mean_iou`.

    Holds one confusion matrix, whatever the number of images. Several processes each count their own images; add up
    `counts` over processes (or `merge` the objects) before `compute`. Let no sampler pad the last batch: a picture
    that two processes count is counted twice.

    Unlike the community metric, a label id out of range is an error and not a silent miss.

    Attributes:
        counts: Confusion counts (num_classes, num_classes) int64, rows are targets.

    Example:
        >>> metric = MeanIoU(num_classes=2)
        >>> metric.add_batch(predictions=[[[0, 1]]], references=[[[0, 1]]])
        >>> metric.compute()["mean_iou"]
        1.0
    """

    def __init__(self, num_classes: int, ignore_index: int = IGNORE_INDEX) -> None:
        """Start from zero.

        Args:
            num_classes: Number of label ids **with background**, `num_labels` of the community metric: 21 for VOC.
            ignore_index: Pixels with this reference are left out.

        Raises:
            ValueError: `num_classes` is below 1.
        """
        if num_classes < 1:
            raise ValueError(
                f"num_classes must be at least 1, got {num_classes}; it counts the label ids, background included."
            )
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.counts: Counts = np.zeros((num_classes, num_classes), dtype=np.int64)

    def add(self, *, prediction: npt.ArrayLike, reference: npt.ArrayLike) -> None:
        """Count one pair of label maps (H, W); see `confusion_counts` for what is raised."""
        self.counts += confusion_counts(prediction, reference, self.num_classes, self.ignore_index)

    def add_batch(self, *, predictions: Iterable[npt.ArrayLike], references: Iterable[npt.ArrayLike]) -> None:
        """Count pairs of label maps: (B, H, W) arrays or CPU tensors, or lists of (H, W) maps of any sizes.

        Nothing of the batch is counted if one of its pairs is wrong.

        Raises:
            ValueError: the numbers of maps differ, or a pair does not fit (see `confusion_counts`).
        """
        total = np.zeros_like(self.counts)
        for prediction, reference in zip(predictions, references, strict=True):
            total += confusion_counts(prediction, reference, self.num_classes, self.ignore_index)
        self.counts += total

    def merge(self, other: MeanIoU) -> None:
        """Add the counts of another metric with the same labels.

        Raises:
            ValueError: the two count different labels or ignore different ids.
        """
        if (other.num_classes, other.ignore_index) != (self.num_classes, self.ignore_index):
            raise ValueError(
                f"cannot merge a metric with num_classes={other.num_classes}, ignore_index={other.ignore_index} into "
                f"one with num_classes={self.num_classes}, ignore_index={self.ignore_index}; make both the same way."
            )
        self.counts += other.counts

    def reset(self) -> None:
        """Forget all counts."""
        self.counts[...] = 0

    def compute(
        self,
        *,
        predictions: Iterable[npt.ArrayLike] | None = None,
        references: Iterable[npt.ArrayLike] | None = None,
        absent: AbsentRule = "skip",
    ) -> MeanIoUScores:
        """Return the scores of everything counted so far and start afresh, as `evaluate` metrics do.

        Args:
            predictions: Label maps to count first, as in `add_batch`; give both or neither.
            references: Their true label maps.
            absent: How `mean_iou` treats a label found in no map, see the function `mean_iou`.

        Raises:
            ValueError: nothing was counted, or only one of `predictions` and `references` was given.
        """
        if predictions is not None and references is not None:
            self.add_batch(predictions=predictions, references=references)
        elif predictions is not None or references is not None:
            raise ValueError("compute got only one of predictions and references; give both, or neither.")
        counts = self.counts.copy()
        if not counts.any():
            raise ValueError("compute found no counted pixel; call add_batch first (compute empties the metric).")
        self.reset()
        accuracy = _ratio(np.diagonal(counts), counts.sum(axis=1))
        return {
            "mean_iou": mean_iou(counts, absent),
            "mean_accuracy": _mean(accuracy, "skip"),
            "overall_accuracy": float(np.trace(counts) / counts.sum()),
            "per_category_iou": iou_from_counts(counts),
            "per_category_accuracy": accuracy,
        }


# ---------------------------------------------------------------------------------------------------------------------
# Every background threshold from one pass


@dataclass(frozen=True)
class SweepResult:
    """Mean IoU at every background threshold.

    Attributes:
        thresholds: Background thresholds (T,), increasing.
        miou: Mean IoU (T,) in percent.
        best_threshold: The lowest threshold that reaches `best_miou`.
        best_miou: Highest mean IoU, in percent.
        per_class_iou: IoU (1 + num_classes,) in percent at `best_threshold`, background first; nan where absent.
    """

    thresholds: Scores
    miou: Scores
    best_threshold: float
    best_miou: float
    per_class_iou: Scores


class ThresholdSweep:
    """Mean IoU of seeds at every background threshold, each picture looked at once.

    At threshold t a pixel is background unless a map exceeds t there; then it is the class with the highest map, the
    lower class id on a tie. That is `argmax([t, v_1, v_2 ...])`. Which class can win does not depend on t, and whether
    it wins depends only on how many thresholds lie below its value. So a histogram over (target, strongest class,
    number of thresholds below) holds the confusion counts of all thresholds.

    Use one sweep for each subset or variant to be scored on its own.

    Attributes:
        counts: Histogram (1 + num_classes, num_classes, T + 1) int64. Plain sums: add it up over processes, then
            assign the total back.
    """

    def __init__(self, num_classes: int, thresholds: Iterable[float] = DEFAULT_THRESHOLDS) -> None:
        """Start from zero.

        Args:
            num_classes: Number of object classes, **without background**: 20 for VOC.
            thresholds: Background scores in [0, 1], increasing, at least 1e-5 apart. They are compared with the maps
                in float32, as everywhere else a threshold meets a float32 map.

        Raises:
            ValueError: `num_classes` is not in [1, 254] or the thresholds are not as described.
        """
        if not 1 <= num_classes < IGNORE_INDEX:
            raise ValueError(
                f"num_classes must be in [1, {IGNORE_INDEX - 1}], got {num_classes}; it counts object classes, "
                "without background."
            )
        self.num_classes = num_classes
        self.thresholds: Scores = np.array(list(thresholds), dtype=np.float64)
        levels = self.thresholds.astype(np.float32)
        gaps = np.diff(levels.astype(np.float64))
        # Nine tenths, because float32 rounds the gaps.
        spaced = bool((gaps >= 0.9 * _MIN_THRESHOLD_GAP).all())
        if not (levels.size and spaced and levels[0] >= 0 and levels[-1] <= 1):
            raise ValueError(
                f"thresholds must be numbers in [0, 1] that increase by at least {_MIN_THRESHOLD_GAP:g}, got "
                f"{self.thresholds.tolist()}; sort them and drop repeated ones."
            )
        self.counts: Counts = np.zeros((1 + num_classes, num_classes, levels.size + 1), dtype=np.int64)
        # A table of bins so narrow that none holds two thresholds answers "how many thresholds are below v" by one
        # look-up and one comparison; several times faster than a binary search for each pixel. The number of bins
        # is a power of two, so that v * bins is exact in float32.
        self._num_bins = 1 << int(np.ceil(-np.log2(gaps.min(initial=1.0))))
        edges = np.arange(self._num_bins + 1, dtype=np.float32) / np.float32(self._num_bins)
        self._below_edge = np.searchsorted(levels, edges, side="left").astype(np.int32)
        self._levels = np.append(levels, np.float32(np.inf))

    def add(self, seeds: Seeds, target: npt.ArrayLike) -> None:
        """Count one picture.

        Args:
            seeds: `class_ids` (K,) without repeats and `maps` (K, H, W) in [0, 1]; with K = 0 all is background.
            target: True label ids (H, W): 0 background, class id + 1, 255 ignored.

        Raises:
            ValueError: sizes differ, a class id, a label id or a map value is out of range. Nothing is counted then.
        """
        true = _integer_map(target, "target")
        class_ids = np.asarray(seeds.class_ids, dtype=np.intp)
        maps = np.asarray(seeds.maps, dtype=np.float32)
        if maps.shape != (class_ids.size, *true.shape) and not (class_ids.size == 0 == maps.size):
            raise ValueError(
                f"seeds have maps of shape {maps.shape} for {class_ids.size} classes and a target of shape "
                f"{true.shape}; expected ({class_ids.size}, {', '.join(map(str, true.shape))}), resize the maps first."
            )
        counted = true != IGNORE_INDEX
        true = true[counted]
        _check_label_range(true, "target", 1 + self.num_classes, IGNORE_INDEX)
        if class_ids.size == 0:
            self.counts[:, 0, 0] += np.bincount(true.astype(np.intp), minlength=1 + self.num_classes)
            return
        if class_ids.min() < 0 or class_ids.max() >= self.num_classes or np.unique(class_ids).size < class_ids.size:
            raise ValueError(
                f"seeds have class ids {class_ids.tolist()}; they must differ and lie in [0, {self.num_classes}), "
                "background is not one of them."
            )
        # Written so that nan fails too.
        if maps.size and not (maps.min() >= 0 and maps.max() <= 1):
            raise ValueError(
                f"seeds have map values in [{maps.min():g}, {maps.max():g}]; expected [0, 1], normalise the maps of "
                "each class first."
            )
        class_ids, strongest, value = _strongest_class(class_ids, maps)
        num_below = self._num_thresholds_below(value[counted])
        num_levels = self.counts.shape[2]
        cell = (true.astype(np.intp) * class_ids.size + strongest[counted]) * num_levels + num_below
        shape = (1 + self.num_classes, class_ids.size, num_levels)
        self.counts[:, class_ids, :] += np.bincount(cell, minlength=int(np.prod(shape))).reshape(shape)

    def merge(self, other: ThresholdSweep) -> None:
        """Add the counts of another sweep over the same classes and thresholds.

        Raises:
            ValueError: the two sweeps differ in classes or thresholds.
        """
        if other.num_classes != self.num_classes or not np.array_equal(other.thresholds, self.thresholds):
            raise ValueError(
                f"cannot merge a sweep over {other.num_classes} classes and {other.thresholds.size} thresholds into "
                f"one over {self.num_classes} classes and {self.thresholds.size} thresholds; make both the same way."
            )
        self.counts += other.counts

    def confusion(self, index: int) -> Counts:
        """Return the confusion counts (1 + num_classes, 1 + num_classes) at `thresholds[index]`, rows are targets."""
        index = range(self.thresholds.size)[index]
        objects = self.counts[:, :, index + 1 :].sum(axis=2)
        background = self.counts.sum(axis=(1, 2)) - objects.sum(axis=1)
        return np.column_stack((background, objects))

    def compute(self, absent: AbsentRule = "skip") -> SweepResult:
        """Score every threshold; the counts stay.

        Args:
            absent: How the mean treats a label found in no map, see `mean_iou`.

        Raises:
            ValueError: nothing was counted.
        """
        if not self.counts.any():
            raise ValueError("the sweep has counted no pixel; add pictures with known masks first.")
        confusions = [self.confusion(index) for index in range(self.thresholds.size)]
        miou = np.array([100.0 * mean_iou(counts, absent) for counts in confusions])
        best = int(miou.argmax())
        return SweepResult(
            thresholds=self.thresholds.copy(),
            miou=miou,
            best_threshold=float(self.thresholds[best]),
            best_miou=float(miou[best]),
            per_class_iou=100.0 * iou_from_counts(confusions[best]),
        )

    def _num_thresholds_below(self, value: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
        """Count for each value (P,) in [0, 1] the thresholds strictly below it, (P,) int32."""
        num_below = self._below_edge[(value * np.float32(self._num_bins)).astype(np.int32)]
        return num_below + (self._levels[num_below] < value)


def threshold_sweep(
    seeds: Iterable[Seeds],
    masks: Iterable[npt.ArrayLike],
    thresholds: Iterable[float] = DEFAULT_THRESHOLDS,
    *,
    num_classes: int,
    absent: AbsentRule = "skip",
) -> SweepResult:
    """Score seeds against masks at every background threshold, in one pass.

    Args:
        seeds: One `Seeds` for each picture; a generator is fine, one picture is held at a time.
        masks: Their true label maps (H, W), in the same order.
        thresholds: As in `ThresholdSweep`.
        num_classes: Number of object classes, without background.
        absent: How the mean treats a label found in no map, see `mean_iou`.

    Raises:
        ValueError: the numbers of seeds and masks differ, there are none, or a pair does not fit.
    """
    sweep = ThresholdSweep(num_classes, thresholds)
    for picture_seeds, mask in zip(seeds, masks, strict=True):
        sweep.add(picture_seeds, mask)
    return sweep.compute(absent)


# ---------------------------------------------------------------------------------------------------------------------
# Image-level scores and model size


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
    return _mean(per_class, "skip"), per_class


def image_average_precision(scores: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Average precision of each image over its classes, averaged over images: MCTformer's validation score.

    It asks whether an image's own classes come first in the image's ranking, so that scores need not be comparable
    between images. Arguments and errors as in `mean_average_precision`.

    Returns:
        The mean in [0, 1] over images with a label; nan if there is none.
    """
    score_table, label_table = _check_image_scores(scores, labels)
    per_image = [_average_precision(*row) for row in zip(score_table, label_table, strict=True)]
    return _mean(np.array(per_image), "skip")


def parameter_count(model: nn.Module) -> float:
    """Count the parameters of a model in millions, frozen ones included, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


# ---------------------------------------------------------------------------------------------------------------------


def _integer_map(values: npt.ArrayLike, name: str) -> npt.NDArray[np.integer]:
    array = np.asarray(values)
    if array.dtype.kind not in "iub":
        raise ValueError(
            f"{name} has dtype {array.dtype}; label maps hold integers, take the argmax of scores and open palette "
            "PNGs without converting them to RGB."
        )
    return array.astype(np.uint8) if array.dtype.kind == "b" else array


def _check_label_range(values: npt.NDArray[np.integer], name: str, num_labels: int, ignore_index: int | None) -> None:
    if values.size == 0:
        return
    lowest, highest = int(values.min()), int(values.max())
    if lowest < 0 or highest >= num_labels:
        wrong = lowest if lowest < BACKGROUND else highest
        ignored = "" if ignore_index is None else f" or {ignore_index} (ignored)"
        raise ValueError(
            f"{name} holds label id {wrong}; expected ids in [0, {num_labels}){ignored}, background is 0 and "
            "object class c is c + 1. Check the number of classes and the mask."
        )


def _strongest_class(
    class_ids: npt.NDArray[np.intp], maps: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.float32]]:
    """Sort the classes (K,) and find, at each pixel, the position (H, W) and value (H, W) of the highest map.

    A loop over the few present classes; `maps.argmax(axis=0)` gives the same and takes ten times longer.
    """
    order = np.argsort(class_ids)
    value = maps[order[0]].copy()
    strongest = np.zeros(value.shape, dtype=np.intp)
    for position, row in enumerate(order[1:], start=1):
        strongest[maps[row] > value] = position
        np.maximum(value, maps[row], out=value)
    return class_ids[order], strongest, value


def _check_image_scores(
    scores: npt.ArrayLike, labels: npt.ArrayLike
) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.bool_]]:
    score_table, label_table = np.asarray(scores), np.asarray(labels)
    if score_table.dtype.kind != "f":
        score_table = score_table.astype(np.float64)
    if score_table.ndim != 2 or score_table.shape != label_table.shape:
        raise ValueError(
            f"scores have shape {score_table.shape} and labels {label_table.shape}; both must be (images, classes)."
        )
    if np.isnan(score_table).any():
        raise ValueError("scores hold nan, which has no rank; look for a training run that has diverged.")
    if not np.isin(label_table, (0, 1)).all():
        raise ValueError(f"labels must be 0 or 1, got values up to {label_table.max():g}; use multi-hot rows.")
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


def _ratio(part: Counts, whole: Counts) -> Scores:
    """Divide counts; nan where `whole` is 0."""
    result = np.full(whole.shape, np.nan)
    np.divide(part, whole, out=result, where=whole > 0)
    return result


def _mean(values: Scores, absent: AbsentRule) -> float:
    if absent == "zero":
        return float(np.nan_to_num(values, nan=0.0).mean())
    if absent != "skip":
        raise ValueError(f'absent must be "skip" or "zero", got {absent!r}.')
    # nanmean of nothing warns; nan is the honest answer.
    return float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")
