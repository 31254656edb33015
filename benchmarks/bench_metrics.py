"""The threshold sweep against a pass for each threshold, and `MeanIoU` against the community's `mean_iou`."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
import torch.nn.functional as F

from bitrans_hf.hub.labels import IGNORE_INDEX
from bitrans_hf.hub.seeds import Seeds
from bitrans_hf.metrics import (
    DEFAULT_THRESHOLDS,
    MeanIoU,
    SweepResult,
    confusion_counts,
    miou_from_counts,
    threshold_sweep,
)

from .harness import Options, Row, can_measure_memory, extra_peak_memory, median_times

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
    """Return mean IoU in percent (T,): for each threshold, label every image and count."""
    scores = []
    for threshold in DEFAULT_THRESHOLDS:
        counts = np.zeros((1 + NUM_CLASSES, 1 + NUM_CLASSES), dtype=np.int64)
        for picture, mask in zip(seeds, masks, strict=True):
            background = np.full((1, HEIGHT, WIDTH), threshold, dtype=np.float32)
            winner = np.concatenate([background, picture.maps]).argmax(axis=0)
            counts += confusion_counts(np.append(0, picture.class_ids + 1)[winner], mask, 1 + NUM_CLASSES)
        scores.append(100.0 * miou_from_counts(counts))
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


def community_arithmetic(predictions: list[np.ndarray], references: list[np.ndarray], num_labels: int) -> float:
    """Do as the community metric does with arrays: float64 histograms of three masked copies per image."""
    intersection, predicted, true = (np.zeros(num_labels, dtype=np.float64) for _ in range(3))
    for prediction, reference in zip(predictions, references, strict=True):
        prediction, reference = np.array(prediction), np.array(reference)
        counted = np.not_equal(reference, IGNORE_INDEX)
        prediction, reference = prediction[counted], reference[counted]
        both = prediction[prediction == reference]
        for total, labels in ((intersection, both), (predicted, prediction), (true, reference)):
            total += np.histogram(labels, bins=num_labels, range=(0, num_labels - 1))[0]
    with np.errstate(invalid="ignore"):
        return float(np.nanmean(intersection / (predicted + true - intersection)))


class CommunityMeanIoU(evaluate.Metric):  # type: ignore[misc]  # evaluate ships no types
    """What a user of the community metric pays for: `evaluate` writes each map as a PNG and reads all back at once."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Image(), "references": datasets.Image()})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions: list[Any], references: list[Any], num_labels: int) -> dict[str, float]:
        return {"mean_iou": community_arithmetic(predictions, references, num_labels)}


def make_label_maps(count: int, dtype: type[np.integer] = np.uint8) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Make predictions, which are the references moved by some pixels, and references."""
    _, references = make_seeds_and_masks(count)
    predictions = [np.where(mask == IGNORE_INDEX, 0, np.roll(mask, 20, axis=1)) % IGNORE_INDEX for mask in references]
    return [prediction.astype(dtype) for prediction in predictions], references


def our_mean_iou(predictions: list[np.ndarray], references: list[np.ndarray]) -> float:
    """Score label maps by `MeanIoU`."""
    metric = MeanIoU(num_classes=1 + NUM_CLASSES)
    metric.add_batch(predictions=predictions, references=references)
    return float(metric.compute()["mean_iou"])


def community_mean_iou(predictions: list[np.ndarray], references: list[np.ndarray]) -> float:
    """Score label maps by the community metric, with its temporary files."""
    with tempfile.TemporaryDirectory() as cache:
        metric = CommunityMeanIoU(cache_dir=cache)
        metric.add_batch(predictions=predictions, references=references)
        return float(metric.compute(num_labels=1 + NUM_CLASSES)["mean_iou"])


def mean_iou_of_a_stream(options: Options) -> list[Row]:
    """Mean IoU of 100 label maps at VOC's size: bytes as masks are stored, and int64 predictions as argmax gives."""
    rows = []
    for kind, dtype in (("uint8", np.uint8), ("int64 predictions", np.int64)):
        predictions, references = make_label_maps(100, dtype)
        candidates: dict[str, Callable[[], float]] = {
            "ours": partial(our_mean_iou, predictions, references),
            "compute": partial(community_mean_iou, predictions, references),
            "arithmetic": partial(community_arithmetic, predictions, references, 1 + NUM_CLASSES),
        }
        if dtype is not np.uint8:
            del candidates["compute"]
        results = {name: candidate() for name, candidate in candidates.items()}
        if max(results.values()) - min(results.values()) > 1e-12:
            raise RuntimeError(f"all metrics must agree, got {results}.")
        times = median_times({**candidates}, replace(options, repeats=min(options.repeats, 5)))
        name = f"MeanIoU of {len(references)} label maps, {kind}"
        if "compute" in times:
            community = "the community metric, its PNG files included"
            rows.append(Row(name, times["ours"], times["compute"], community, "ms", 0.1))
        rows.append(
            Row(name, times["ours"], times["arithmetic"], "the community metric's arithmetic alone", "ms", 0.1)
        )
    return rows


def memory_of_mean_iou(community: bool, count: int, options: Options) -> tuple[int, float]:
    """Return the extra bytes at the peak of scoring `count` label maps, and their mean IoU."""
    predictions, references = make_label_maps(10)
    score = community_mean_iou if community else our_mean_iou
    score(predictions[:1], references[:1])
    scores: list[float] = []
    repeats = count // len(predictions)
    peak = extra_peak_memory(lambda: scores.append(score(predictions * repeats, references * repeats)), options)
    return peak, scores[0]


def memory_of_a_stream(options: Options) -> list[Row]:
    """Memory of `MeanIoU` with 100 and 1,000 label maps against the community metric with 100."""
    if not can_measure_memory(options):
        return []
    options = replace(options, device="cpu")
    results = []
    for community, count in ((False, 100), (False, 1000), (True, 100)):
        # A fresh process each: the high-water mark counts memory that an earlier run left with the allocator.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            results.append(pool.submit(memory_of_mean_iou, community, count, options).result())
    if len({score for _, score in results}) != 1:
        raise RuntimeError(f"all ways must give one score, got {results}.")
    hundred, thousand, community_hundred = (peak / 2**20 for peak, _ in results)
    baseline = "the community metric with 100"
    return [
        Row("MeanIoU of 100 label maps, peak memory", hundred, community_hundred, baseline, "MiB"),
        Row("MeanIoU of 1000 label maps, peak memory", thousand, community_hundred, baseline, "MiB", 0.1),
    ]
