"""Confusion counts of label maps, and the scores divided from them.

Everything here counts integers first and divides last. Counts add up over images and processes, so that a score never
depends on how a set was cut into batches. This file needs NumPy alone: it goes to the Hub beside `mean_iou.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Counts: TypeAlias = npt.NDArray[np.int64]
Ids: TypeAlias = npt.NDArray[np.int64]
Scores: TypeAlias = npt.NDArray[np.float64]
AbsentRule: TypeAlias = Literal["skip", "zero"]
OutOfRangeRule: TypeAlias = Literal["error", "miss"]

_NUM_BYTES = 256
_IGNORED = -1
# Below one run in this many pixels, adding run lengths beats a histogram of all pixels. Label maps have one in 50.
_PIXELS_PER_RUN = 12


# ---------------------------------------------------------------------------------------------------------------------
# Counting


class PairCounts:
    """Pixel counts of pairs (target id, predicted id), before any rule about ids is applied.

    Ids from 0 to 255 have a table of 512 KiB, whatever the number of images. Others, which only maps wider than a
    byte can hold, are counted in a dictionary with one entry for each pair that occurs.
    """

    def __init__(self) -> None:
        self._table: Counts = np.zeros(_NUM_BYTES**2, dtype=np.int64)
        self._others: Counter[tuple[int, int]] = Counter()

    def add_maps(self, prediction: npt.ArrayLike, target: npt.ArrayLike) -> None:
        """Count every pixel of two label maps of the same shape.

        Label maps are made of areas, so that along a row a pair of ids repeats some fifty times: finding where it
        changes and adding run lengths takes a quarter of the time of a histogram over pixels.

        Raises:
            ValueError: the shapes differ, or a map does not hold integers.
        """
        predicted, true = integer_map(prediction, "prediction"), integer_map(target, "target")
        if predicted.shape != true.shape:
            raise ValueError(
                f"prediction has shape {predicted.shape} and target {true.shape}; both must have the same shape, "
                "bring the prediction to the size of the target first."
            )
        predicted, true = _as_bytes(predicted.ravel()), _as_bytes(true.ravel())
        if not true.size:
            return
        changes = predicted[1:] != predicted[:-1]
        changes |= true[1:] != true[:-1]
        in_table = predicted.dtype == true.dtype == np.uint8
        if in_table and np.count_nonzero(changes) * _PIXELS_PER_RUN > true.size:
            codes = true.astype(np.uint16) << 8 | predicted
            self._table += np.bincount(codes, minlength=_NUM_BYTES**2)
            return
        starts = np.concatenate(([0], np.flatnonzero(changes) + 1))
        lengths = np.diff(starts, append=true.size)
        self.add_pairs(true[starts].astype(np.int64), predicted[starts].astype(np.int64), lengths)

    def add_pairs(self, targets: Ids, predictions: Ids, counts: Counts) -> None:
        """Add counts (P,) of pairs of ids (P,), in any order and with repeats."""
        in_table = (targets >= 0) & (targets < _NUM_BYTES) & (predictions >= 0) & (predictions < _NUM_BYTES)
        if not in_table.all():
            rest = ~in_table
            pairs, which = np.unique(np.stack((targets[rest], predictions[rest])), axis=1, return_inverse=True)
            totals = np.zeros(pairs.shape[1], dtype=np.int64)
            np.add.at(totals, which.ravel(), counts[rest])
            for target, prediction, total in zip(*pairs.tolist(), totals.tolist(), strict=True):
                self._others[target, prediction] += total
            targets, predictions, counts = targets[in_table], predictions[in_table], counts[in_table]
        np.add.at(self._table, targets * _NUM_BYTES + predictions, counts)

    def pairs(self) -> tuple[Ids, Ids, Counts]:
        """Return the target ids (P,), predicted ids (P,) and counts (P,) of all pairs that occur, each pair once."""
        codes = np.flatnonzero(self._table)
        others = np.array([(*pair, count) for pair, count in self._others.items()], dtype=np.int64).reshape(-1, 3)
        return (
            np.concatenate((codes // _NUM_BYTES, others[:, 0])),
            np.concatenate((codes % _NUM_BYTES, others[:, 1])),
            np.concatenate((self._table[codes], others[:, 2])),
        )

    def merge(self, other: PairCounts) -> None:
        """Add the counts of `other`."""
        self._table += other._table
        self._others.update(other._others)


@dataclass(frozen=True)
class LabelRules:
    """Which ids are labels, and what happens to the others.

    Attributes:
        num_labels: Number of label ids L, background included: 21 for VOC.
        ignore_index: Pixels with this target are left out, also when it is the id of a label.
        label_map: Target id -> target id, applied to targets only, all at once and before anything else.
        reduce_labels: Whether target 0 becomes 255 and every other target one less, for data sets that count from 1;
            predictions stay. 255 stays 255.
        out_of_range: What becomes of an id outside [0, L) in a counted pixel: "error", or "miss" as in the community
            `mean_iou`, where such a prediction is a miss of the true label and such a target a false alarm of the
            predicted one.
    """

    num_labels: int
    ignore_index: int = 255
    label_map: Mapping[int, int] | None = None
    reduce_labels: bool = False
    out_of_range: OutOfRangeRule = "error"

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: `num_labels` is below 1 or no integer, `label_map` holds something else than integers, or
                `out_of_range` is no rule.
        """
        if not _is_id(self.num_labels):
            raise ValueError(f"num_labels must be an integer such as 21, got {self.num_labels!r}.")
        if self.num_labels < 1:
            raise ValueError(
                f"num_labels must be at least 1, got {self.num_labels}; count the label ids, background included."
            )
        wrong = [label for pair in (self.label_map or {}).items() for label in pair if not _is_id(label)]
        if wrong:
            raise ValueError(f"label_map must give ids for ids, such as {{0: 255}}, got {wrong[0]!r}; use integers.")
        if self.out_of_range not in ("error", "miss"):
            raise ValueError(f'out_of_range must be "error" or "miss", got {self.out_of_range!r}.')

    def confusion(self, pairs: PairCounts) -> Counts:
        """Sort pair counts into a confusion matrix.

        Returns:
            Pixel counts (L + 1, L + 1) int64; rows are targets, columns are predictions. The last row and column hold
            ids out of range, 0 unless `out_of_range` is "miss".

        Raises:
            ValueError: an id is out of range and `out_of_range` is "error".
        """
        targets, predictions, counts = pairs.pairs()
        rows = self._rows(targets)
        counted = rows != _IGNORED
        rows, targets, predictions, counts = (part[counted] for part in (rows, targets, predictions, counts))
        columns = np.where((predictions >= 0) & (predictions < self.num_labels), predictions, self.num_labels)
        if self.out_of_range == "error":
            self._refuse("target", targets[rows == self.num_labels], f" or {self.ignore_index} (ignored)")
            self._refuse("prediction", predictions[columns == self.num_labels], "")
        matrix = np.zeros((self.num_labels + 1, self.num_labels + 1), dtype=np.int64)
        np.add.at(matrix, (rows, columns), counts)
        return matrix

    def _rows(self, targets: Ids) -> Ids:
        """Give the row (P,) of each target id (P,): L out of range, -1 ignored."""
        labels = targets.copy()
        for old, new in (self.label_map or {}).items():
            labels[targets == old] = new
        if self.reduce_labels:
            labels[labels == 0] = 255
            labels -= 1
            labels[labels == 254] = 255
        in_range = (labels >= 0) & (labels < self.num_labels)
        return np.where(labels == self.ignore_index, _IGNORED, np.where(in_range, labels, self.num_labels))

    def _refuse(self, name: str, wrong: Ids, ignored: str) -> None:
        if wrong.size:
            found = int(wrong.min()) if wrong.min() < 0 else int(wrong.max())
            raise ValueError(
                f"{name} holds label id {found}; expected ids in [0, {self.num_labels}){ignored}, background is 0 and "
                "object class c is c + 1. The number of labels counts background too. Check it and the mask."
            )


def confusion_counts(
    prediction: npt.ArrayLike, target: npt.ArrayLike, num_labels: int, ignore_index: int = 255
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
    rules = LabelRules(num_labels, ignore_index)
    pairs = PairCounts()
    pairs.add_maps(prediction, target)
    return rules.confusion(pairs)[:-1, :-1]


def integer_map(values: npt.ArrayLike, name: str) -> npt.NDArray[np.integer]:
    """Return a label map as an integer array.

    Raises:
        ValueError: it holds something else; `name` says which map it is.
    """
    array = np.asarray(values)
    if array.dtype.kind not in "iub":
        raise ValueError(
            f"{name} has dtype {array.dtype}; label maps hold integers: take the argmax of scores, cast whole "
            "numbers to integers, and open palette PNGs without converting them to RGB."
        )
    return array.astype(np.uint8) if array.dtype.kind == "b" else array


def _is_id(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _as_bytes(ids: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
    """Narrow ids (P,) to uint8 where all fit."""
    if ids.dtype == np.uint8 or not ids.size or ids.min() < 0 or ids.max() >= _NUM_BYTES:
        return ids
    return ids.astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Dividing


def iou_from_counts(counts: Counts) -> Scores:
    """Divide intersection by union for each label.

    Args:
        counts: Confusion counts (L, L), rows are targets.

    Returns:
        IoU (L,) float64 in [0, 1]; nan for a label that is neither in the targets nor in the predictions.
    """
    intersection = np.diagonal(counts)
    return _ratio(intersection, counts.sum(axis=1) + counts.sum(axis=0) - intersection)


def miou_from_counts(counts: Counts, absent: AbsentRule = "skip") -> float:
    """Average the IoU over labels.

    Args:
        counts: Confusion counts (L, L), rows are targets.
        absent: What a label does that is neither in the targets nor in the predictions: "skip" leaves it out of the
            mean, as the community `mean_iou` does; "zero" counts it as IoU 0, as MCTformer's evaluation does. On all
            of VOC both are the same; on a small subset "zero" is lower.

    Returns:
        Mean IoU in [0, 1]; nan if there is nothing to average.
    """
    return mean_over_labels(iou_from_counts(counts), absent)


def scores_from_counts(counts: Counts, absent: AbsentRule = "skip") -> dict[str, float | Scores]:
    """Return every score of a confusion matrix.

    Args:
        counts: Confusion counts (L + 1, L + 1), rows are targets; the last row and column hold ids out of range, which
            are no labels but belong to the unions.
        absent: How `mean_iou` treats a label found in no map, see `miou_from_counts`.

    Returns:
        "mean_iou", "mean_accuracy" (recall averaged over the labels in the targets), "overall_accuracy" (pixels that
        are right), "frequency_weighted_iou" (IoU weighted by the pixels of each target label), in [0, 1] or nan;
        "per_category_iou" and "per_category_accuracy" (L,), nan for labels that do not occur.
    """
    iou = iou_from_counts(counts)[:-1]
    area = counts.sum(axis=1)[:-1]
    correct = np.diagonal(counts)[:-1]
    accuracy = _ratio(correct, area)
    total = int(area.sum())
    return {
        "mean_iou": mean_over_labels(iou, absent),
        "mean_accuracy": mean_over_labels(accuracy, "skip"),
        "overall_accuracy": float(correct.sum() / total) if total else float("nan"),
        "frequency_weighted_iou": float(np.nansum(iou * area) / total) if total else float("nan"),
        "per_category_iou": iou,
        "per_category_accuracy": accuracy,
    }


def mean_over_labels(values: Scores, absent: AbsentRule) -> float:
    """Average values (L,), leaving nan out ("skip") or as 0 ("zero"); nan if there is nothing to average."""
    if absent == "zero":
        return float(np.nan_to_num(values, nan=0.0).mean())
    if absent != "skip":
        raise ValueError(f'absent must be "skip" or "zero", got {absent!r}.')
    # nanmean of nothing warns; nan is the honest answer.
    return float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")


def _ratio(part: Counts, whole: Counts) -> Scores:
    """Divide counts; nan where `whole` is 0."""
    result = np.full(whole.shape, np.nan)
    np.divide(part, whole, out=result, where=whole > 0)
    return result
