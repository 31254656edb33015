"""Mean IoU over a stream of label maps, an `evaluate.Metric` that keeps counts instead of images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import zip_longest
from typing import Any

import datasets
import evaluate
import numpy as np
import numpy.typing as npt

from .confusion import AbsentRule, Counts, LabelRules, OutOfRangeRule, PairCounts, Scores, scores_from_counts

_DESCRIPTION = """\
IoU is the intersection of the predicted and the true pixels of a label over their union, summed over all images; mean
IoU averages it over the labels (PASCAL VOC's definition). This metric has the keywords and keys of the community's
`mean_iou` and gives the same numbers. It counts each batch when it comes, in 512 KiB, and keeps no image.
"""

_INPUTS = """

    Settings:
        num_labels (int): label ids with background, 21 for VOC; `num_classes` of the constructor.
        ignore_index (int): pixels with this reference are left out.
        label_map (dict): reference id -> reference id.
        reduce_labels (bool): reference 0 becomes 255 and all others one less.
        nan_to_num (float): replaces nan, the score of a label that does not occur.
        absent ("skip" or "zero"): whether such a label is left out of the mean or counts as 0.
        out_of_range ("error" or "miss"): whether an id outside [0, num_labels) is refused or counts as a miss.

    Keys: mean_iou, mean_accuracy, overall_accuracy, frequency_weighted_iou, per_category_iou, per_category_accuracy.
"""

_CITATION = """\
@article{everingham2015pascal,
  title = {The {PASCAL} Visual Object Classes Challenge: A Retrospective},
  author = {Everingham, Mark and Eslami, S. M. Ali and Van Gool, Luc and Williams, Christopher K. I. and Winn, John
            and Zisserman, Andrew},
  journal = {International Journal of Computer Vision},
  volume = {111},
  pages = {98--136},
  year = {2015}
}
"""

LabelMap = npt.ArrayLike


class MeanIoU(evaluate.Metric):  # type: ignore[misc]  # evaluate ships no types
    """Mean IoU over a stream of label maps, with the keywords and result keys of the community `mean_iou`.

    Counts pairs of ids, whatever the number of images. Rules about ids are applied when the scores are computed, so
    that settings may be given to the constructor or, as with the community metric, to `compute`.

    Each process counts its own images; `gathered` adds the counts up. Let no sampler pad the last batch, because a
    image that two processes count is counted twice: `Accelerator(dataloader_config=
    DataLoaderConfiguration(even_batches=False))`, or give each process `range(index, n, num_processes)`.

    Unlike in the community metric, an id out of range is an error and not a silent miss (`out_of_range="miss"` gives
    its behavior), `label_map` works, and there is one more key, `frequency_weighted_iou`.

    Attributes:
        rules: Which ids are labels; None while the number of labels is not known.
        num_images: Images counted since the last `compute`.

    Example:
        >>> metric = MeanIoU(num_classes=2)
        >>> metric.add_batch(predictions=[[[0, 1]]], references=[[[0, 1]]])
        >>> metric.compute()["mean_iou"]
        1.0
    """

    def __init__(
        self,
        num_classes: int | None = None,
        ignore_index: int = 255,
        *,
        num_labels: int | None = None,
        label_map: Mapping[int, int] | None = None,
        reduce_labels: bool = False,
        out_of_range: OutOfRangeRule = "error",
        absent: AbsentRule = "skip",
        **evaluate_options: Any,
    ) -> None:
        """Start from zero.

        Args:
            num_classes: Number of label ids **with background**: 21 for VOC, `1 + len(class_names(images))` for any
                data set of this package. (`ThresholdSweep` takes the number of object classes, without background,
                because seeds have no map of it.) None if `compute` will be given `num_labels`.
            ignore_index: Pixels with this reference are left out.
            num_labels: Another name of `num_classes`, the community metric's.
            label_map: Reference id -> reference id, all replaced at once.
            reduce_labels: Whether reference 0 becomes 255 and every other reference one less.
            out_of_range: "error" or "miss", see `LabelRules`.
            absent: "skip" or "zero": how `mean_iou` treats a label found in no map.
            evaluate_options: What `evaluate.load` passes on; `num_process` must be 1.

        Raises:
            ValueError: the number of labels is below 1 or given twice, or `num_process` is not 1.
        """
        if num_classes is not None and num_labels is not None:
            raise ValueError(
                f"got num_classes={num_classes} and num_labels={num_labels}; they mean the same, give one of them."
            )
        if evaluate_options.get("num_process", 1) != 1:
            raise ValueError(
                f"num_process must be 1, got {evaluate_options['num_process']}; make one metric in each process and "
                "add them up by metric.gathered(accelerate.utils.gather_object)."
            )
        super().__init__(**evaluate_options)
        self.info.module_name = "mean_iou"  # evaluate makes "mean_io_u" of the class name
        num_labels = num_classes if num_labels is None else num_labels
        self._settings: dict[str, Any] = {
            "num_labels": num_labels,
            "ignore_index": ignore_index,
            "label_map": label_map,
            "reduce_labels": reduce_labels,
            "out_of_range": out_of_range,
        }
        self.rules: LabelRules | None = None if num_labels is None else LabelRules(**self._settings)
        self.absent: AbsentRule = absent
        self.num_images = 0
        self._pairs = PairCounts()

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Image(), "references": datasets.Image()}),
            reference_urls=["https://huggingface.co/spaces/evaluate-metric/mean_iou"],
        )

    def _build_data_dir(self) -> str:
        # evaluate would make a folder for images here; this metric writes no file.
        return str(self._data_dir_root)

    def __len__(self) -> int:
        return self.num_images

    @property
    def counts(self) -> Counts:
        """Confusion counts (num_labels, num_labels) int64 so far, rows are references; see `confusion`."""
        return self.confusion[:-1, :-1]

    @property
    def confusion(self) -> Counts:
        """Confusion counts (num_labels + 1, num_labels + 1) so far; the last row and column hold ids out of range.

        Raises:
            ValueError: the number of labels is not known, or an id is out of range and that is an error.
        """
        if self.rules is None:
            raise ValueError("counts need the number of labels; make the metric with num_classes.")
        return self.rules.confusion(self._pairs)

    def add(self, *, prediction: LabelMap, reference: LabelMap, **unknown: Any) -> None:
        """Count one pair of label maps (H, W): integer arrays, CPU tensors or PIL index images.

        Raises:
            ValueError: see `add_batch`.
        """
        self.add_batch(predictions=[prediction], references=[reference], **unknown)

    def add_batch(self, *, predictions: Iterable[LabelMap], references: Iterable[LabelMap], **unknown: Any) -> None:
        """Count pairs of label maps: (B, H, W) arrays or CPU tensors, or iterables of (H, W) maps of any sizes.

        Nothing of the batch is counted if one of its pairs is wrong.

        Raises:
            ValueError: the numbers of maps differ, a map is not (H, W) of integers, the two of a pair differ in size,
                or an id is out of range, if that is an error and the number of labels is known by now.
        """
        if unknown:
            raise ValueError(f"unknown arguments {sorted(unknown)}; give predictions and references.")
        batch, num_images = _counted(predictions, references)
        if self.rules is not None and self.rules.out_of_range == "error":
            try:
                self.rules.confusion(batch)
            except ValueError as error:
                raise ValueError(
                    f"{error} Settings for compute (ignore_index, label_map, reduce_labels, out_of_range) must be "
                    "given where num_labels was, when the metric was made."
                ) from error
        self._pairs.merge(batch)
        self.num_images += num_images

    def merge(self, other: MeanIoU) -> None:
        """Add the counts of another metric with the same settings.

        Raises:
            ValueError: the settings differ.
        """
        if other._settings != self._settings:
            theirs, ours = (
                ", ".join(f"{name}={value}" for name, value in metric._settings.items()) for metric in (other, self)
            )
            raise ValueError(
                f"cannot merge a metric with {theirs} into one with {ours}; make both metrics the same way."
            )
        self._pairs.merge(other._pairs)
        self.num_images += other.num_images

    def gathered(self, gather: Callable[[list[Any]], list[Any]], *, num_images: int | None = None) -> MeanIoU:
        """Return a new metric with the counts of all processes, on every process; this one stays as it is.

        Calling it twice gives the same twice, so that nothing is counted double. The counts of this metric go on
        growing until `reset`.

        Args:
            gather: Joins a list from each process into one list, on every process: `accelerate.utils.gather_object`.
            num_images: Number of images in the set; given, it must be the number counted by all processes together.

        Raises:
            ValueError: another number of images was counted, as when a data loader fills up its last batch.

        Example:
            >>> from accelerate.utils import gather_object
            >>> metric = MeanIoU(num_classes=2)
            >>> metric.add(prediction=[[0, 1]], reference=[[0, 0]])
            >>> metric.gathered(gather_object, num_images=1).compute()["overall_accuracy"]
            0.5
        """
        total = MeanIoU(absent=self.absent)
        total._settings, total.rules = self._settings, self.rules
        for targets, predictions, counts, images in gather([(*self._pairs.pairs(), self.num_images)]):
            total._pairs.add_pairs(targets, predictions, counts)
            total.num_images += images
        if num_images is not None and total.num_images != num_images:
            raise ValueError(
                f"all processes together counted {total.num_images} images, expected {num_images}; a loader that "
                "fills up the last batch counts images twice (accelerate: even_batches=False), one that drops it "
                "leaves some out."
            )
        return total

    def reset(self) -> None:
        """Forget all counts."""
        self._pairs = PairCounts()
        self.num_images = 0

    def compute(
        self,
        *,
        predictions: Iterable[LabelMap] | None = None,
        references: Iterable[LabelMap] | None = None,
        nan_to_num: float | None = None,
        absent: AbsentRule | None = None,
        **settings: Any,
    ) -> dict[str, Any]:
        """Return the scores of everything counted so far and start afresh, as `evaluate` metrics do.

        Args:
            predictions: Label maps to count first, as in `add_batch`; give both or neither.
            references: Their true label maps.
            nan_to_num: Replaces nan in the results. As in the community metric, the means are taken before that.
            absent: How `mean_iou` treats a label found in no map; None for the constructor's rule.
            settings: num_labels, ignore_index, label_map, reduce_labels or out_of_range, where they are not the
                constructor's.

        Returns:
            The keys of `scores_from_counts`: floats in [0, 1] or nan, and arrays (num_labels,).

        Raises:
            ValueError: nothing was counted, the number of labels is not known, an id is out of range, or only one of
                `predictions` and `references` was given. The counts stay as they were before.
        """
        unknown = sorted(settings.keys() - self._settings.keys())
        if unknown:
            raise ValueError(f"unknown settings {unknown}; known are {sorted(self._settings)}, nan_to_num and absent.")
        if (predictions is None) != (references is None):
            raise ValueError("compute got only one of predictions and references; give both, or neither.")
        merged = {**self._settings, **settings}
        if merged["num_labels"] is None:
            raise ValueError("compute needs num_labels, the number of label ids with background (21 for VOC).")
        rules = LabelRules(**merged)
        pairs, num_images = PairCounts(), self.num_images
        pairs.merge(self._pairs)
        if predictions is not None and references is not None:
            batch, more = _counted(predictions, references)  # by the settings given here, not the constructor's
            pairs.merge(batch)
            num_images += more
        if not num_images:
            raise ValueError("compute found no counted image; call add_batch first (compute empties the metric).")
        scores: dict[str, Any] = dict(scores_from_counts(rules.confusion(pairs), absent or self.absent))
        self.reset()
        if nan_to_num is not None:
            scores = {name: _without_nan(value, nan_to_num) for name, value in scores.items()}
        return scores


def _counted(predictions: Iterable[LabelMap], references: Iterable[LabelMap]) -> tuple[PairCounts, int]:
    """Count pairs of label maps; return the counts and the number of pairs.

    Raises:
        ValueError: the numbers of maps differ, or a pair is wrong.
    """
    for name, maps in (("predictions", predictions), ("references", references)):
        if not isinstance(maps, Iterable) or getattr(maps, "ndim", None) == 2:
            raise ValueError(f"{name} is one label map ({type(maps).__name__}), expected several; put it in a list.")
    batch, num_pairs, absent = PairCounts(), 0, object()
    for prediction, reference in zip_longest(predictions, references, fillvalue=absent):
        if prediction is absent or reference is absent:
            more, fewer = ("references", "predictions") if prediction is absent else ("predictions", "references")
            raise ValueError(f"there are more {more} than {fewer}, of which there are {num_pairs}; give one for each.")
        batch.add_maps(_label_map(prediction, "prediction"), _label_map(reference, "target"))
        num_pairs += 1
    return batch, num_pairs


def _label_map(values: Any, name: str) -> npt.NDArray[Any]:
    # A tensor may be on a GPU, or scores with gradients, about which the message is below.
    array = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
    if array.ndim != 2:
        raise ValueError(
            f"{name} has shape {array.shape}; a label map is (H, W), one id for each pixel. Open palette PNGs without "
            "converting them to RGB, and give batches to add_batch."
        )
    return array


def _without_nan(value: float | Scores, replacement: float) -> float | Scores:
    replaced = np.nan_to_num(value, nan=replacement)
    return replaced if isinstance(value, np.ndarray) else float(replaced)
