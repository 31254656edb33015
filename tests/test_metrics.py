from __future__ import annotations

import math
import time
import warnings

import numpy as np
import pytest
import torch

from bitrans_hf import metrics
from bitrans_hf.metrics import MeanIoU, ThresholdSweep, confusion_counts, iou_from_counts, mean_iou, threshold_sweep
from bitrans_hf.pseudo_labels import seeds_to_label_map
from bitrans_hf.seeds import Seeds

# --- confusion counts and IoU ---------------------------------------------------------------------------------------


def slow_counts(prediction, target, num_labels, ignore_index):
    counts = np.zeros((num_labels, num_labels), dtype=np.int64)
    for predicted, true in zip(prediction.ravel().tolist(), target.ravel().tolist(), strict=True):
        if true != ignore_index:
            counts[true, predicted] += 1
    return counts


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64])
@pytest.mark.parametrize(("num_labels", "ignore_index"), [(1, 255), (5, 255), (5, 0), (5, 3), (21, 255)])
def test_confusion_counts_equal_a_loop_over_pixels(num_labels, ignore_index, dtype):
    rng = np.random.default_rng(num_labels)
    target = rng.integers(0, num_labels, (13, 17)).astype(dtype)
    prediction = rng.integers(0, num_labels, (13, 17)).astype(dtype)
    ignored = rng.random(target.shape) < 0.2
    target[ignored] = ignore_index
    counts = confusion_counts(prediction, target, num_labels, ignore_index)
    assert counts.dtype == np.int64
    np.testing.assert_array_equal(counts, slow_counts(prediction, target, num_labels, ignore_index))


def test_predictions_on_ignored_pixels_may_be_anything():
    counts = confusion_counts([[0, 200]], [[0, 255]], num_labels=2)
    np.testing.assert_array_equal(counts, [[1, 0], [0, 0]])


def test_iou_of_a_case_counted_by_hand():
    # Targets: 0 0 0 1 1 255; predictions: 0 0 1 1 2 2. Label 2 is only predicted, label 3 is nowhere.
    counts = confusion_counts([0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 255], num_labels=4)
    np.testing.assert_allclose(iou_from_counts(counts), [2 / 3, 1 / 3, 0.0, np.nan])
    assert mean_iou(counts) == pytest.approx(1 / 3)
    assert mean_iou(counts, absent="zero") == pytest.approx(1 / 4)


def test_counts_do_not_overflow_where_the_reference_does():
    # A COCO-sized set has 1.5e10 background pixels; 32-bit counters wrap around.
    counts = np.array([[15_000_000_000, 1], [0, 2]], dtype=np.int64)
    assert iou_from_counts(counts)[0] == 15_000_000_000 / 15_000_000_001


@pytest.mark.parametrize(
    ("prediction", "target", "message"),
    [
        ([[0, 1]], [[0, 1, 1]], r"shape \(1, 2\) and target \(1, 3\)"),
        ([[0, 1]], [[0, 2]], r"target holds label id 2; expected ids in \[0, 2\) or 255 \(ignored\)"),
        ([[0, 1]], [[0, -1]], "target holds label id -1"),
        ([[0, 2]], [[0, 1]], r"prediction holds label id 2; expected ids in \[0, 2\)"),
        ([[0.0, 1.0]], [[0, 1]], "prediction has dtype float64; label maps hold integers"),
    ],
)
def test_maps_that_cannot_be_compared_are_named(prediction, target, message):
    with pytest.raises(ValueError, match=message):
        confusion_counts(prediction, target, num_labels=2)


def community_mean_iou(predictions, references, num_labels, ignore_index):
    """The arithmetic of the community metric, by three histograms for each picture."""
    intersect, predicted, labelled = (np.zeros(num_labels) for _ in range(3))
    bins = np.arange(num_labels + 1) - 0.5
    for prediction, reference in zip(predictions, references, strict=True):
        keep = reference != ignore_index
        prediction, reference = prediction[keep], reference[keep]
        intersect += np.histogram(prediction[prediction == reference], bins=bins)[0]
        predicted += np.histogram(prediction, bins=bins)[0]
        labelled += np.histogram(reference, bins=bins)[0]
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        iou = intersect / (predicted + labelled - intersect)
        accuracy = intersect / labelled
        return {
            "mean_iou": np.nanmean(iou),
            "mean_accuracy": np.nanmean(accuracy),
            "overall_accuracy": intersect.sum() / labelled.sum(),
            "per_category_iou": iou,
            "per_category_accuracy": accuracy,
        }


@pytest.mark.parametrize("ignore_index", [255, 0, 3])
def test_mean_iou_equals_the_community_arithmetic(ignore_index):
    rng = np.random.default_rng(ignore_index)
    for _ in range(60):
        num_labels = int(rng.integers(2, 26))
        # Drawing from part of the labels leaves some absent.
        present = rng.choice(num_labels, size=int(rng.integers(1, num_labels + 1)), replace=False)
        sizes = rng.integers(3, 12, (4, 2))
        references = [rng.choice(present, size) for size in sizes]
        predictions = [rng.choice(present[: max(1, present.size - 1)], size) for size in sizes]
        for reference in references:
            reference[0, 0] = ignore_index
        if all((reference == ignore_index).all() for reference in references):
            continue
        metric = MeanIoU(num_labels, ignore_index)
        metric.add_batch(predictions=predictions[:3], references=references[:3])
        metric.add(prediction=predictions[3], reference=references[3])
        scores = metric.compute()
        expected = community_mean_iou(predictions, references, num_labels, ignore_index)
        assert scores.keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_array_equal(scores[key], value, err_msg=key)


def test_scores_do_not_depend_on_how_the_set_is_cut():
    rng = np.random.default_rng(0)
    predictions, references = rng.integers(0, 5, (2, 13, 6, 7))
    whole, left, right = MeanIoU(5), MeanIoU(5), MeanIoU(5)
    whole.add_batch(predictions=torch.from_numpy(predictions), references=torch.from_numpy(references))
    left.add_batch(predictions=predictions[:4], references=references[:4])
    right.add_batch(predictions=list(predictions[4:]), references=list(references[4:]))
    left.merge(right)
    np.testing.assert_array_equal(left.counts, whole.counts)
    assert left.compute()["mean_iou"] == whole.compute()["mean_iou"]


def test_compute_empties_the_metric_as_evaluate_does():
    metric = MeanIoU(2)
    first = metric.compute(predictions=[[[0, 1]]], references=[[[0, 0]]])
    assert first["overall_accuracy"] == 0.5
    with pytest.raises(ValueError, match="no counted pixel; call add_batch first"):
        metric.compute()
    np.testing.assert_array_equal(first["per_category_iou"], [0.5, 0.0])


def test_a_batch_with_a_wrong_pair_counts_nothing():
    metric = MeanIoU(2)
    with pytest.raises(ValueError, match="label id 7"):
        metric.add_batch(predictions=[[[0, 1]], [[0, 7]]], references=[[[0, 0]], [[0, 0]]])
    assert not metric.counts.any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MeanIoU(0), "num_classes must be at least 1, got 0"),
        (lambda: MeanIoU(2).merge(MeanIoU(3)), "cannot merge a metric with num_classes=3"),
        (lambda: MeanIoU(2).compute(predictions=[[[0]]]), "only one of predictions and references"),
        (lambda: MeanIoU(2).add_batch(predictions=[[[0]]], references=[]), "argument 2 is shorter"),
        (lambda: mean_iou(np.eye(2, dtype=np.int64), absent="drop"), 'absent must be "skip" or "zero"'),
    ],
)
def test_wrong_use_of_the_metric_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- threshold sweep ------------------------------------------------------------------------------------------------


def slow_sweep(pictures, thresholds, num_classes):
    """One pass over all pictures for each threshold, as wsss.md A4 writes it (but to the end)."""
    miou, per_class = [], []
    for threshold in thresholds:
        counts = np.zeros((1 + num_classes, 1 + num_classes), dtype=np.int64)
        for seeds, target in pictures:
            scores = np.zeros((1 + num_classes, *target.shape), dtype=np.float32)
            scores[0] = threshold
            for class_id, values in zip(seeds.class_ids, seeds.maps, strict=True):
                scores[1 + class_id] = values
            counts += confusion_counts(scores.argmax(axis=0), target, 1 + num_classes)
        miou.append(100.0 * mean_iou(counts))
        per_class.append(100.0 * iou_from_counts(counts))
    return np.array(miou), per_class


def made_up_picture(rng, num_classes, size=(11, 14), *, grid=None):
    class_ids = rng.permutation(num_classes)[: rng.integers(0, min(num_classes, 4) + 1)]
    maps = rng.random((class_ids.size, *size), dtype=np.float32)
    if grid is not None:  # values on the thresholds themselves, and many ties between classes
        maps = (np.round(maps * grid) / np.float32(grid)).astype(np.float32)
    target = rng.choice([0, *(class_ids + 1).tolist(), 255], size).astype(np.uint8)
    return Seeds(class_ids, maps), target


@pytest.mark.parametrize("grid", [None, 10, 100, 255])
@pytest.mark.parametrize("num_classes", [1, 5, 20])
def test_sweep_equals_a_pass_for_each_threshold_to_the_last_digit(num_classes, grid):
    rng = np.random.default_rng(num_classes)
    pictures = [made_up_picture(rng, num_classes, grid=grid) for _ in range(12)]
    result = threshold_sweep(*zip(*pictures, strict=True), num_classes=num_classes)
    miou, per_class = slow_sweep(pictures, metrics.DEFAULT_THRESHOLDS, num_classes)
    np.testing.assert_array_equal(result.miou, miou)
    np.testing.assert_array_equal(result.thresholds, np.arange(101) / 100)
    best = int(miou.argmax())
    assert (result.best_threshold, result.best_miou) == (best / 100, miou[best])
    np.testing.assert_array_equal(result.per_class_iou, per_class[best])


@pytest.mark.parametrize(
    "thresholds", [[0.4], [0.0], [1.0], [0.0, 1.0], [0.25, 0.5, 0.75], [0.1, 0.10002, 0.7], np.linspace(0, 1, 997)]
)
def test_any_increasing_thresholds_are_exact(thresholds):
    rng = np.random.default_rng(7)
    pictures = [made_up_picture(rng, 3, grid=grid) for grid in (None, 4, 8)]
    edge = np.float32(thresholds[0])
    # The nearest float32 values on both sides of a threshold.
    near = np.array([[[edge, np.nextafter(edge, np.float32(0)), np.nextafter(edge, np.float32(1))]]], dtype=np.float32)
    pictures.append((Seeds(np.array([2]), near), np.array([[3, 3, 0]], dtype=np.uint8)))
    result = threshold_sweep(*zip(*pictures, strict=True), thresholds, num_classes=3)
    np.testing.assert_array_equal(result.miou, slow_sweep(pictures, thresholds, 3)[0])


def test_the_sweep_scores_the_masks_that_are_written_at_that_threshold():
    rng = np.random.default_rng(2)
    pictures = []
    for _ in range(6):
        seeds, target = made_up_picture(rng, 6, grid=100)
        order = seeds.class_ids.argsort()
        pictures.append((Seeds(seeds.class_ids[order], seeds.maps[order]), target))
    result = threshold_sweep(*zip(*pictures, strict=True), num_classes=6)
    for threshold, miou in zip(result.thresholds, result.miou, strict=True):
        metric = MeanIoU(7)
        for seeds, target in pictures:
            metric.add(prediction=seeds_to_label_map(seeds, float(threshold)), reference=target)
        assert 100.0 * metric.compute()["mean_iou"] == miou


def test_background_wins_ties_and_then_the_lower_class_id():
    # Class ids out of order: on a tie id 0 must win although it comes second.
    seeds = Seeds(np.array([1, 0]), np.full((2, 1, 2), 0.5, dtype=np.float32))
    sweep = ThresholdSweep(2, [0.4, 0.5])
    sweep.add(seeds, np.array([[0, 1]], dtype=np.uint8))
    np.testing.assert_array_equal(sweep.confusion(0), [[0, 1, 0], [0, 1, 0], [0, 0, 0]])
    np.testing.assert_array_equal(sweep.confusion(-1), [[1, 0, 0], [1, 0, 0], [0, 0, 0]])


def test_a_picture_without_classes_is_background_at_every_threshold():
    seeds = Seeds(np.zeros(0, dtype=np.int64), np.zeros((0, 2, 2), dtype=np.float32))
    sweep = ThresholdSweep(3)
    sweep.add(seeds, np.array([[0, 0], [2, 255]], dtype=np.uint8))
    for index in range(101):
        assert sweep.confusion(index)[:, 0].tolist() == [2, 0, 1, 0]
    assert sweep.compute().best_miou == pytest.approx(100 * (2 / 3 + 0) / 2)
    assert sweep.compute(absent="zero").best_miou == pytest.approx(100 * (2 / 3) / 4)


def test_sweeps_over_parts_merge_to_the_sweep_over_the_whole():
    rng = np.random.default_rng(3)
    pictures = [made_up_picture(rng, 4) for _ in range(13)]
    whole, first, second = ThresholdSweep(4), ThresholdSweep(4), ThresholdSweep(4)
    for index, picture in enumerate(pictures):
        whole.add(*picture)
        (first if index % 3 else second).add(*picture)
    reduced = ThresholdSweep(4)
    reduced.counts = first.counts + second.counts  # what an all-reduce gives
    first.merge(second)
    for merged in (first, reduced):
        np.testing.assert_array_equal(merged.compute().miou, whole.compute().miou)


def test_one_pass_takes_a_twentieth_of_a_pass_for_each_threshold():
    rng = np.random.default_rng(5)
    y, x = np.mgrid[0:375, 0:500].astype(np.float32)
    maps = np.stack([np.exp(-((x - cx) ** 2 + (y - 180) ** 2) / 9e3) for cx in (150, 350)]).astype(np.float32)
    maps = np.clip(maps + rng.normal(0, 0.02, maps.shape).astype(np.float32), 0, 1)
    pictures = [(Seeds(np.array([3, 7]), maps), rng.choice([0, 4, 8, 255], (375, 500)).astype(np.uint8))]
    start = time.perf_counter()
    miou, _ = slow_sweep(pictures, metrics.DEFAULT_THRESHOLDS, 20)
    slow_s = time.perf_counter() - start
    fast_s = math.inf
    for _ in range(3):
        start = time.perf_counter()
        result = threshold_sweep(*zip(*pictures, strict=True), num_classes=20)
        fast_s = min(fast_s, time.perf_counter() - start)
    np.testing.assert_array_equal(result.miou, miou)
    assert fast_s <= 0.05 * slow_s


ONE = Seeds(np.array([0]), np.full((1, 2, 2), 0.5, dtype=np.float32))
TARGET = np.zeros((2, 2), dtype=np.uint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ThresholdSweep(0), r"num_classes must be in \[1, 254\], got 0"),
        (lambda: ThresholdSweep(2, []), "thresholds must be numbers in"),
        (lambda: ThresholdSweep(2, [0.5, 0.4]), "sort them"),
        (lambda: ThresholdSweep(2, [0.4, 0.4]), "drop repeated ones"),
        (lambda: ThresholdSweep(2, [0.4, 1.1]), "thresholds must be numbers in"),
        (lambda: ThresholdSweep(2, [math.nan]), "thresholds must be numbers in"),
        (lambda: ThresholdSweep(2).add(ONE, np.zeros((2, 3), np.uint8)), r"maps of shape \(1, 2, 2\) .* \(2, 3\)"),
        (lambda: ThresholdSweep(2).add(ONE, TARGET + 3), r"target holds label id 3; expected ids in \[0, 3\)"),
        (lambda: ThresholdSweep(2).add(Seeds(np.array([2]), ONE.maps), TARGET), r"class ids \[2\]"),
        (
            lambda: ThresholdSweep(2).add(Seeds(np.array([1, 1]), np.zeros((2, 2, 2), np.float32)), TARGET),
            r"class ids \[1, 1\]; they must differ",
        ),
        (lambda: ThresholdSweep(2).add(Seeds(np.array([0]), ONE.maps * 3), TARGET), r"values in \[1.5, 1.5\]"),
        (lambda: ThresholdSweep(2).add(Seeds(np.array([0]), ONE.maps * np.nan), TARGET), "normalise the maps"),
        (lambda: ThresholdSweep(2).compute(), "counted no pixel"),
        (lambda: ThresholdSweep(2).merge(ThresholdSweep(3)), "cannot merge a sweep over 3 classes"),
        (lambda: threshold_sweep([ONE], [], num_classes=2), "argument 2 is shorter"),
    ],
)
def test_wrong_input_to_the_sweep_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- average precision ----------------------------------------------------------------------------------------------


def slow_average_precision(scores, positive):
    """Area under the step curve, from the definition: precision and recall at every distinct cut."""
    area, last_recall = 0.0, 0.0
    for cut in sorted(set(scores), reverse=True):
        chosen = [p for s, p in zip(scores, positive, strict=True) if s >= cut]
        recall = sum(chosen) / sum(positive)
        area += (recall - last_recall) * sum(chosen) / len(chosen)
        last_recall = recall
    return area


@pytest.mark.parametrize("levels", [3, 1000])
def test_average_precision_equals_its_definition_with_and_without_ties(levels):
    rng = np.random.default_rng(levels)
    scores = rng.integers(0, levels, (40, 6)) / levels
    labels = rng.integers(0, 2, (40, 6))
    mean, per_class = metrics.mean_average_precision(scores, labels)
    expected = [slow_average_precision(scores[:, c].tolist(), labels[:, c].tolist()) for c in range(6)]
    np.testing.assert_allclose(per_class, expected, rtol=1e-12)
    assert mean == pytest.approx(sum(expected) / 6)
    per_image = [slow_average_precision(scores[i].tolist(), labels[i].tolist()) for i in range(40) if labels[i].any()]
    assert metrics.image_average_precision(scores, labels) == pytest.approx(sum(per_image) / len(per_image))


def test_average_precision_ignores_the_order_of_images_and_the_scale_of_scores():
    rng = np.random.default_rng(1)
    logits = rng.integers(-4, 5, (30, 3)).astype(np.float32)
    labels = rng.integers(0, 2, (30, 3))
    order = rng.permutation(30)
    mean, _ = metrics.mean_average_precision(logits, labels)
    assert metrics.mean_average_precision(logits[order], labels[order])[0] == mean
    assert metrics.mean_average_precision(torch.sigmoid(torch.from_numpy(logits)), labels)[0] == mean


def test_classes_without_a_positive_image_are_left_out():
    mean, per_class = metrics.mean_average_precision([[0.9, 0.3], [0.1, 0.2]], [[1, 0], [0, 0]])
    assert mean == 1.0
    np.testing.assert_array_equal(per_class, [1.0, np.nan])
    assert math.isnan(metrics.mean_average_precision([[0.5]], [[0]])[0])
    assert math.isnan(metrics.image_average_precision([[0.5]], [[0]]))


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([[0.5, 0.5]], [[1]], r"shape \(1, 2\) and labels \(1, 1\)"),
        ([0.5], [1], r"must be \(images, classes\)"),
        ([[math.nan]], [[1]], "scores hold nan"),
        ([[0.5]], [[3]], "labels must be 0 or 1"),
    ],
)
def test_wrong_image_scores_are_named(scores, labels, message):
    for function in (metrics.mean_average_precision, metrics.image_average_precision):
        with pytest.raises(ValueError, match=message):
            function(scores, labels)


def test_parameters_are_counted_in_millions_and_shared_ones_once():
    layer = torch.nn.Linear(999, 1000)
    model = torch.nn.Sequential(layer, torch.nn.ReLU(), layer)
    assert metrics.parameter_count(model) == 1.0
