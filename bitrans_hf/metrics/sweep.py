"""Mean IoU of seeds at every background threshold, from one pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..hub.errors import InputError
from ..hub.labels import BACKGROUND, IGNORE_INDEX
from .mean_iou.confusion import AbsentRule, Counts, Scores, integer_map, iou_from_counts, miou_from_counts

if TYPE_CHECKING:
    from ..hub.seeds import Seeds

DEFAULT_THRESHOLDS: tuple[float, ...] = tuple(step / 100 for step in range(101))
"""Background thresholds 0.00, 0.01 ... 1.00."""

_MIN_THRESHOLD_GAP = 1e-5


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
    """Mean IoU of seeds at every background threshold, each image looked at once.

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
            num_classes: Number of object classes, **without background**: 20 for VOC, `len(class_names(images))` for
                any data set of this package. (`MeanIoU` takes one more, because background is a label of a map.)
            thresholds: Background scores in [0, 1], increasing, at least 1e-5 apart. They are compared with the maps
                in float32, as everywhere else a threshold meets a float32 map.

        Raises:
            ValueError: `num_classes` is not in [1, 254] or the thresholds are not as described.
        """
        if not 1 <= num_classes < IGNORE_INDEX:
            raise InputError(
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
            raise InputError(
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
        """Count one image.

        Args:
            seeds: `class_ids` (K,) without repeats and `maps` (K, H, W) in [0, 1]; with K = 0 all is background.
            target: True label ids (H, W): 0 background, class id + 1, 255 ignored.

        Raises:
            ValueError: sizes differ, a class id, a label id or a map value is out of range. Nothing is counted then.
        """
        true = integer_map(target, "target")
        class_ids = np.asarray(seeds.class_ids, dtype=np.intp)
        maps = np.asarray(seeds.maps, dtype=np.float32)
        if maps.shape != (class_ids.size, *true.shape) and not (class_ids.size == 0 == maps.size):
            raise InputError(
                f"seeds have maps of shape {maps.shape} for {class_ids.size} classes and a target of shape "
                f"{true.shape}; expected ({class_ids.size}, {', '.join(map(str, true.shape))}), resize the maps first."
            )
        counted = true != IGNORE_INDEX
        true = true[counted]
        _check_label_range(true, self.num_classes)
        if class_ids.size == 0:
            self.counts[:, 0, 0] += np.bincount(true.astype(np.intp), minlength=1 + self.num_classes)
            return
        if class_ids.min() < 0 or class_ids.max() >= self.num_classes or np.unique(class_ids).size < class_ids.size:
            raise InputError(
                f"seeds have class ids {class_ids.tolist()}; they must differ and lie in [0, {self.num_classes}), "
                "background is not one of them."
            )
        # Written so that nan fails too.
        if maps.size and not (maps.min() >= 0 and maps.max() <= 1):
            raise InputError(
                f"seeds have map values in [{maps.min():g}, {maps.max():g}]; expected [0, 1], normalize the maps of "
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
            raise InputError(
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
            absent: How the mean treats a label found in no map, see `miou_from_counts`.

        Raises:
            ValueError: nothing was counted.
        """
        if not self.counts.any():
            raise InputError("the sweep has counted no pixel; add images with known masks first.")
        confusions = [self.confusion(index) for index in range(self.thresholds.size)]
        miou = np.array([100.0 * miou_from_counts(counts, absent) for counts in confusions])
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
        seeds: One `Seeds` for each image; a generator is fine, one image is held at a time.
        masks: Their true label maps (H, W), in the same order.
        thresholds: As in `ThresholdSweep`.
        num_classes: Number of object classes, without background.
        absent: How the mean treats a label found in no map, see `miou_from_counts`.

    Raises:
        ValueError: the numbers of seeds and masks differ, there are none, or a pair does not fit.
    """
    sweep = ThresholdSweep(num_classes, thresholds)
    for number, (picture_seeds, mask) in enumerate(zip_longest(seeds, masks)):
        if picture_seeds is None or mask is None:
            more, fewer = ("masks", "seeds") if picture_seeds is None else ("seeds", "masks")
            raise InputError(f"there are more {more} than {fewer}, of which there are {number}; give one for each.")
        sweep.add(picture_seeds, mask)
    return sweep.compute(absent)


def _check_label_range(target: npt.NDArray[np.integer], num_classes: int) -> None:
    """Refuse label ids (P,) outside [0, 1 + num_classes)."""
    if target.size and (target.min() < BACKGROUND or target.max() > num_classes):
        wrong = target.min() if target.min() < BACKGROUND else target.max()
        raise InputError(
            f"target holds label id {int(wrong)}; expected ids in [0, {1 + num_classes}) or {IGNORE_INDEX} (ignored) "
            f"for {num_classes} object classes, background is 0 and object class c is c + 1. Check the number of "
            "classes and the mask."
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
