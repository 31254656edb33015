"""The threshold sweep against a pass for each threshold, and `MeanIoU` against the community's algorithm."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from bitrans_hf.labels import IGNORE_INDEX
from bitrans_hf.metrics import DEFAULT_THRESHOLDS, MeanIoU, SweepResult, confusion_counts, mean_iou, threshold_sweep
from bitrans_hf.seeds import Seeds

from .harness import Options, Row, median_times

NUM_CLASSES = 20
HEIGHT, WIDTH = 375, 500


def make_seeds_and_masks(count: int) -> tuple[list[Seeds], list[np.ndarray]]:
    """Make smooth random maps of one to three classes, and masks of rectangles with an ignored rim."""
    generator = np.random.default_rng(0)
    seeds, masks = [], []
    for index in range(count):
        class_ids = np.sort(generator.choice(NUM_CLASSES, size=1 + index % 3, replace=False)).astype(np.int64)
        coarse = torch.from_numpy(generator.random((1, class_ids.size, 23, 31), dtype=np.float32))
        maps = F.interpolate(coarse, size=(HEIGHT, WIDTH), mode="bilinear")[0]
        low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
        seeds.append(Seeds(class_ids, ((maps - low) / (high - low)).numpy()))
        mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
        for class_id in class_ids:
            top, left = generator.integers(0, HEIGHT // 2), generator.integers(0, WIDTH // 2)
            mask[top : top + 150, left : left + 200] = IGNORE_INDEX
            mask[top + 4 : top + 146, left + 4 : left + 196] = class_id + 1
        masks.append(mask)
    return seeds, masks


def sweep_by_passes(seeds: list[Seeds], masks: list[np.ndarray]) -> np.ndarray:
    """Return mean IoU in percent (T,): for each threshold, label every picture and count."""
    scores = []
    for threshold in DEFAULT_THRESHOLDS:
        counts = np.zeros((1 + NUM_CLASSES, 1 + NUM_CLASSES), dtype=np.int64)
        for picture, mask in zip(seeds, masks, strict=True):
            background = np.full((1, HEIGHT, WIDTH), threshold, dtype=np.float32)
            winner = np.concatenate([background, picture.maps]).argmax(axis=0)
            counts += confusion_counts(np.append(0, picture.class_ids + 1)[winner], mask, 1 + NUM_CLASSES)
        scores.append(100.0 * mean_iou(counts))
    return np.array(scores)


def sweep_of_thresholds(options: Options) -> list[Row]:
    """Every threshold from 0 to 1 in steps of 0.01."""
    seeds, masks = make_seeds_and_masks(6)
    ours: list[SweepResult] = []
    passes: list[np.ndarray] = []
    candidates: dict[str, Callable[[], object]] = {
        "ours": lambda: ours.append(threshold_sweep(seeds, masks, num_classes=NUM_CLASSES)),
        "passes": lambda: passes.append(sweep_by_passes(seeds, masks)),
    }
    times = median_times(candidates, options)
    if not np.array_equal(ours[0].miou, passes[0]):
        raise RuntimeError("the sweep and the single passes must give equal scores, and differ.")
    name = f"sweep over {len(DEFAULT_THRESHOLDS)} thresholds, {len(seeds)} images"
    return [Row(name, times["ours"], times["passes"], "a pass for each threshold", "ms", 0.05)]


def community_mean_iou(predictions: list[np.ndarray], references: list[np.ndarray], num_labels: int) -> float:
    """Do as `evaluate`'s community metric `mean_iou` does: float64 histograms of three masked copies per picture."""
    intersection, predicted, true = (np.zeros(num_labels, dtype=np.float64) for _ in range(3))
    for prediction, reference in zip(predictions, references, strict=True):
        counted = np.not_equal(reference, IGNORE_INDEX)
        prediction, reference = prediction[counted], np.array(reference)[counted]
        both = prediction[prediction == reference]
        for total, labels in ((intersection, both), (predicted, prediction), (true, reference)):
            total += np.histogram(labels, bins=num_labels, range=(0, num_labels - 1))[0]
    with np.errstate(invalid="ignore"):
        return float(np.nanmean(intersection / (predicted + true - intersection)))


def mean_iou_of_a_stream(options: Options) -> list[Row]:
    """Mean IoU of label maps at VOC's size."""
    _, references = make_seeds_and_masks(20)
    predictions = [np.where(mask == IGNORE_INDEX, 0, np.roll(mask, 20, axis=1)) % 255 for mask in references]
    results: dict[str, float] = {}

    def ours() -> None:
        metric = MeanIoU(num_classes=1 + NUM_CLASSES)
        metric.add_batch(predictions=predictions, references=references)
        results["ours"] = metric.compute()["mean_iou"]

    def community() -> None:
        results["community"] = community_mean_iou(predictions, references, 1 + NUM_CLASSES)

    times = median_times({"ours": ours, "community": community}, options)
    if abs(results["ours"] - results["community"]) > 1e-12:
        raise RuntimeError(f"both metrics must agree, got {results}.")
    name = f"MeanIoU of {len(references)} label maps"
    return [Row(name, times["ours"], times["community"], "the community algorithm", "ms", 0.1)]
