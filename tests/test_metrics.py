from __future__ import annotations

import ast
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from bitrans_hf import metrics
from bitrans_hf.hub.labels import palette
from bitrans_hf.hub.seeds import Seeds
from bitrans_hf.metrics import (
    METRIC_FOLDER,
    MeanIoU,
    ThresholdSweep,
    confusion_counts,
    iou_from_counts,
    miou_from_counts,
    threshold_sweep,
)
from bitrans_hf.metrics.mean_iou.app import score_files
from bitrans_hf.refine.pseudo_labels import seeds_to_label_map

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
    assert miou_from_counts(counts) == pytest.approx(1 / 3)
    assert miou_from_counts(counts, absent="zero") == pytest.approx(1 / 4)


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


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("dtypes", [(np.uint8, np.uint8), (np.int64, np.uint8), (np.int16, np.int32)])
def test_areas_noise_and_any_integers_are_counted_alike(noise, dtypes):
    # Maps of areas are counted by runs, noisy ones by pixels.
    rng = np.random.default_rng(0)
    prediction, target = (np.kron(rng.integers(0, 9, (2, 3)), np.ones((20, 31), dtype=np.int64)) for _ in range(2))
    for values in (prediction, target):
        where = rng.random(values.shape) < noise
        values[where] = rng.integers(0, 9, int(where.sum()))
    target[3:9, 5:40] = 255
    expected = slow_counts(prediction, target, 9, 255)
    prediction, target = prediction.astype(dtypes[0]), target.astype(dtypes[1])
    np.testing.assert_array_equal(confusion_counts(prediction, target, 9), expected)
    # Views that are not contiguous.
    np.testing.assert_array_equal(confusion_counts(prediction.T[::-1], target.T[::-1], 9), expected)


def community_mean_iou(predictions, references, num_labels, ignore_index, nan_to_num=None, reduce_labels=False):
    """The arithmetic of the community metric in NumPy, by three histograms for each image."""
    intersect, predicted, labelled = (np.zeros(num_labels) for _ in range(3))
    for prediction, reference in zip(predictions, references, strict=True):
        if reduce_labels:
            reference = np.where(reference == 0, 255, reference) - 1
            reference = np.where(reference == 254, 255, reference)
        keep = reference != ignore_index
        prediction, reference = prediction[keep], reference[keep]
        for total, labels in (
            (intersect, prediction[prediction == reference]),
            (predicted, prediction),
            (labelled, reference),
        ):
            total += np.histogram(labels, bins=num_labels, range=(0, num_labels - 1))[0]
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        iou = intersect / (predicted + labelled - intersect)
        accuracy = intersect / labelled
        scores = {
            "mean_iou": np.nanmean(iou),
            "mean_accuracy": np.nanmean(accuracy),
            "overall_accuracy": intersect.sum() / labelled.sum(),
            "per_category_iou": iou,
            "per_category_accuracy": accuracy,
        }
    return scores if nan_to_num is None else {key: np.nan_to_num(s, nan=nan_to_num) for key, s in scores.items()}


def community_case(seed):
    """Label maps, some ids out of range and some labels absent, with settings for the community metric."""
    rng = np.random.default_rng(seed)
    num_labels = int(rng.integers(1, 26))
    settings = {
        "num_labels": num_labels,
        "ignore_index": int(rng.choice([0, 3, 255])),
        "reduce_labels": bool(rng.integers(2)),
        "nan_to_num": [None, 0.0, -1.0][rng.integers(3)],
    }
    dtype = [np.uint8, np.int16, np.int64][rng.integers(3)]
    beyond = [255, 254, num_labels, num_labels + 1] + ([] if dtype == np.uint8 else [-1, -7, 256, 300])
    present = rng.choice(num_labels, size=int(rng.integers(1, num_labels + 1)), replace=False)
    ids = np.concatenate([present, rng.choice(beyond, size=int(rng.integers(0, 4)))])
    sizes = rng.integers(1, 12, (4, 2))
    grain = int(rng.integers(1, 6))  # areas and noise
    maps = [
        [
            np.kron(rng.choice(ids[: int(rng.integers(1, ids.size + 1))], size), np.ones((grain, grain)))
            for size in sizes
        ]
        for _ in range(2)
    ]
    predictions, references = ([values.astype(dtype) for values in part] for part in maps)
    return predictions, references, settings


@pytest.mark.parametrize("block", range(5))
def test_mean_iou_equals_the_community_arithmetic_on_500_random_cases(block):
    for seed in range(100 * block, 100 * block + 100):
        predictions, references, settings = community_case(seed)
        expected = community_mean_iou(predictions, references, **settings)
        from_compute = MeanIoU(out_of_range="miss").compute(predictions=predictions, references=references, **settings)
        nan_to_num = settings.pop("nan_to_num")
        metric = MeanIoU(out_of_range="miss", **settings)
        metric.add_batch(predictions=predictions[:3], references=references[:3])
        metric.add(prediction=predictions[3], reference=references[3])
        for scores in (from_compute, metric.compute(nan_to_num=nan_to_num)):
            assert scores.keys() - {"frequency_weighted_iou"} == expected.keys()
            for key, value in expected.items():
                np.testing.assert_array_equal(scores[key], value, err_msg=f"case {seed}, {key}")


def test_the_random_cases_hold_what_they_should():
    cases = [community_case(seed) for seed in range(500)]
    settings = [case[2] for case in cases]
    assert {case["num_labels"] for case in settings} == set(range(1, 26))
    assert {case["ignore_index"] for case in settings} == {0, 3, 255}
    assert sum(case["reduce_labels"] for case in settings) > 200
    beyond = [
        any((values >= case["num_labels"]).any() or (values < 0).any() for part in maps for values in part)
        for *maps, case in cases
    ]
    assert 200 < sum(beyond) < 490
    scores = [community_mean_iou(*case[:2], **{**case[2], "nan_to_num": None}) for case in cases]
    assert sum(np.isnan(score["per_category_iou"]).any() for score in scores) > 100
    assert sum(0 < score["mean_iou"] < 1 for score in scores) > 300


def test_frequency_weighted_iou_and_accuracies_of_a_case_counted_by_hand():
    # Label 0: 3 pixels, 2 right, IoU 2/3; label 1: 1 pixel, 1 right, IoU 1/2; label 2 is nowhere.
    prediction, reference = [[0, 0, 1, 1, 0]], [[0, 0, 0, 1, 255]]
    scores = MeanIoU(3).compute(predictions=[prediction], references=[reference])
    assert scores["frequency_weighted_iou"] == pytest.approx(3 / 4 * 2 / 3 + 1 / 4 * 1 / 2)
    assert scores["mean_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert scores["overall_accuracy"] == 3 / 4
    assert scores["mean_iou"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    with_absent = MeanIoU(3, absent="zero").compute(predictions=[prediction], references=[reference])
    assert with_absent["mean_iou"] == pytest.approx((2 / 3 + 1 / 2) / 3)
    assert {type(score) for score in scores.values()} == {float, np.ndarray}  # a JSON file wants floats


def test_a_label_map_replaces_all_ids_at_once_and_before_reduce_labels():
    metric = MeanIoU(3, label_map={0: 1, 1: 0, 7: 2})
    assert metric.compute(predictions=[[[1, 0, 2]]], references=[[[0, 1, 7]]])["overall_accuracy"] == 1.0
    scores = MeanIoU(2, label_map={9: 1}, reduce_labels=True).compute(
        predictions=[[[0, 1, 1]]], references=[[[9, 2, 0]]]
    )
    assert scores["overall_accuracy"] == 1.0  # 9 -> 1 -> 0; 2 -> 1; 0 -> 255, ignored


def test_where_everything_is_ignored_the_scores_are_nan():
    scores = MeanIoU(2).compute(predictions=[[[0, 1]]], references=[[[255, 255]]])
    assert all(np.isnan(score).all() for score in scores.values())
    assert MeanIoU(2).compute(predictions=[[[0]]], references=[[[255]]], nan_to_num=0.0)["mean_iou"] == 0.0


def test_scores_do_not_depend_on_how_the_set_is_cut():
    rng = np.random.default_rng(0)
    predictions, references = rng.integers(0, 5, (2, 13, 6, 7))
    whole, left, right = MeanIoU(5), MeanIoU(5), MeanIoU(5)
    whole.add_batch(predictions=torch.from_numpy(predictions), references=torch.from_numpy(references))
    left.add_batch(predictions=predictions[:4], references=references[:4])
    right.add_batch(predictions=list(predictions[4:]), references=iter(references[4:]))
    left.merge(right)
    assert len(left) == len(whole) == 13
    np.testing.assert_array_equal(left.counts, whole.counts)
    assert left.compute()["mean_iou"] == whole.compute()["mean_iou"]


def test_gathering_adds_the_processes_up_however_often_it_is_called():
    rng = np.random.default_rng(1)
    predictions, references = rng.integers(-1, 5, (2, 13, 6, 7))
    whole = MeanIoU(4, out_of_range="miss")
    processes = [MeanIoU(4, out_of_range="miss") for _ in range(2)]
    for index, pair in enumerate(zip(predictions, references, strict=True)):
        for metric in (whole, processes[index % 2]):
            metric.add(prediction=pair[0], reference=pair[1])

    def gather(own):  # what `gather_object` gives to every process
        states = [(*metric._pairs.pairs(), metric.num_images) for metric in processes]
        assert any(own[0][3] == state[3] for state in states)
        return states

    expected = whole.compute()
    for _ in range(2):
        scores = processes[0].gathered(gather, num_images=13).compute()
        for key, value in expected.items():
            np.testing.assert_array_equal(scores[key], value)
    with pytest.raises(ValueError, match="counted 13 images, expected 12; a loader that fills up"):
        processes[1].gathered(gather, num_images=12)


def test_compute_empties_the_metric_as_evaluate_does():
    metric = MeanIoU(2)
    first = metric.compute(predictions=[[[0, 1]]], references=[[[0, 0]]])
    assert first["overall_accuracy"] == 0.5
    with pytest.raises(ValueError, match="no counted image; call add_batch first"):
        metric.compute()
    np.testing.assert_array_equal(first["per_category_iou"], [0.5, 0.0])


def test_a_batch_with_a_wrong_pair_counts_nothing():
    metric = MeanIoU(2)
    with pytest.raises(ValueError, match="label id 7"):
        metric.add_batch(predictions=[[[0, 1]], [[0, 7]]], references=[[[0, 0]], [[0, 0]]])
    assert not metric.counts.any()
    assert len(metric) == 0


def test_settings_given_to_compute_apply_to_what_was_counted_before():
    metric = MeanIoU()
    metric.add(prediction=[[0, 1, 1, 9]], reference=[[0, 1, 3, 1]])
    with pytest.raises(ValueError, match="compute needs num_labels"):
        metric.compute()
    with pytest.raises(ValueError, match="prediction holds label id 9"):
        metric.compute(num_labels=4)
    assert metric.compute(num_labels=4, ignore_index=3, out_of_range="miss")["overall_accuracy"] == 2 / 3


def test_index_images_are_counted_without_conversion():
    image = Image.fromarray(np.array([[0, 3, 255]], dtype=np.uint8))
    image.putpalette(palette())
    assert MeanIoU(4).compute(predictions=[image], references=[image])["overall_accuracy"] == 1.0
    with pytest.raises(ValueError, match=r"prediction has shape \(1, 3, 3\); a label map is \(H, W\)"):
        MeanIoU(4).add(prediction=image.convert("RGB"), reference=image)


def test_a_million_pixels_of_counts_take_no_more_memory_than_ten():
    metric = MeanIoU(21)
    sizes = []
    for index in range(40):
        values = np.random.default_rng(index).integers(0, 21, (160, 160)).astype(np.uint8)
        metric.add(prediction=values, reference=values.T)
        sizes.append(len(pickle.dumps(metric._pairs)))
    assert sizes[-1] == sizes[0] < 600_000


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MeanIoU(0), "num_labels must be at least 1, got 0"),
        (lambda: MeanIoU(2, num_labels=2), "num_classes=2 and num_labels=2; they mean the same"),
        (lambda: MeanIoU(2, num_process=2), r"num_process must be 1, got 2; .*gathered\("),
        (lambda: MeanIoU(2, out_of_range="skip"), 'out_of_range must be "error" or "miss"'),
        (lambda: MeanIoU(2).merge(MeanIoU(3)), "cannot merge a metric with num_labels=3"),
        (lambda: MeanIoU(2).merge(MeanIoU(2, ignore_index=0)), "ignore_index=0"),
        (lambda: MeanIoU(2).compute(predictions=[[[0]]]), "only one of predictions and references"),
        (lambda: MeanIoU(2).compute(labels=[[[0]]]), r"unknown settings \['labels'\]"),
        (
            lambda: MeanIoU(2).add_batch(predictions=[[[0]]], references=[]),
            "more predictions than references, of which there are 0",
        ),
        (lambda: MeanIoU(2).add(prediction=[[0]], reference=[[0]], mask=1), r"unknown arguments \['mask'\]"),
        (lambda: MeanIoU(2).add(prediction=[[0]], reference=[[2]]), "counts background too"),
        (lambda: MeanIoU().counts, "counts need the number of labels"),
        (lambda: miou_from_counts(np.eye(2, dtype=np.int64), absent="drop"), 'absent must be "skip" or "zero"'),
    ],
)
def test_wrong_use_of_the_metric_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- evaluate -------------------------------------------------------------------------------------------------------


def test_the_metric_folder_alone_is_what_evaluate_loads(tmp_path):
    # As a Space has it: the folder under its own name, in a process that cannot import this package.
    folder = shutil.copytree(METRIC_FOLDER, tmp_path / "mean_iou", ignore=shutil.ignore_patterns("__pycache__"))
    predictions, references, settings = community_case(7)
    np.savez(tmp_path / "maps.npz", *predictions, *references)
    code = f"""
import json, sys
sys.modules["bitrans_hf"] = None
import evaluate, numpy as np
maps = list(np.load({str(tmp_path / "maps.npz")!r}).values())
metric = evaluate.load({str(folder)!r}, out_of_range="miss")
assert isinstance(metric, evaluate.Metric) and "nan_to_num" in metric.compute.__doc__
metric.add_batch(predictions=maps[:4], references=maps[4:])
print(json.dumps({{key: np.asarray(value).tolist() for key, value in metric.compute(**{settings!r}).items()}}))
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    scores = json.loads(result.stdout)
    for key, value in community_mean_iou(predictions, references, **settings).items():
        np.testing.assert_array_equal(scores[key], value)
    assert not (tmp_path / "home" / "evaluate").exists() or not any((tmp_path / "home" / "evaluate").rglob("*.arrow"))


def test_the_metric_folder_imports_nothing_that_a_space_lacks():
    requirements = {"numpy", "evaluate", "datasets"} | sys.stdlib_module_names
    files = sorted(METRIC_FOLDER.glob("*.py"))
    assert {"mean_iou.py", "confusion.py"} <= {file.name for file in files}
    for file in files:
        allowed = requirements | ({"gradio", "PIL"} if file.name == "app.py" else set())
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1
                assert (METRIC_FOLDER / f"{node.module}.py").is_file()
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                assert {name.split(".")[0] for name in names} <= allowed, f"{file.name} line {node.lineno}"


def test_the_page_of_the_space_scores_two_files_and_says_what_is_wrong(tmp_path):
    for name, ids in (("prediction", [[0, 1, 1, 0]]), ("reference", [[0, 1, 0, 255]]), ("small", [[0]])):
        Image.fromarray(np.array(ids, dtype=np.uint8)).save(tmp_path / f"{name}.png")
    prediction, reference, small = (str(tmp_path / f"{name}.png") for name in ("prediction", "reference", "small"))
    sentence, rows = score_files(prediction, reference, 21)
    assert sentence == "Mean IoU 50.00 % over the labels that occur."
    assert rows == [[0, 50.0, 50.0], [1, 50.0, 100.0]]
    assert "both must have the same shape" in score_files(prediction, small, 21)[0]
    assert "label id 1" in score_files(prediction, reference, 1)[0]
    assert score_files(prediction, None, 21) == ("Choose two index images, for instance palette PNGs.", [])


# --- threshold sweep ------------------------------------------------------------------------------------------------


def slow_sweep(pictures, thresholds, num_classes):
    """One pass over all images for each threshold, as wsss.md A4 writes it (but to the end)."""
    miou, per_class = [], []
    for threshold in thresholds:
        counts = np.zeros((1 + num_classes, 1 + num_classes), dtype=np.int64)
        for seeds, target in pictures:
            scores = np.zeros((1 + num_classes, *target.shape), dtype=np.float32)
            scores[0] = threshold
            for class_id, values in zip(seeds.class_ids, seeds.maps, strict=True):
                scores[1 + class_id] = values
            counts += confusion_counts(scores.argmax(axis=0), target, 1 + num_classes)
        miou.append(100.0 * miou_from_counts(counts))
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
        (lambda: ThresholdSweep(2).add(Seeds(np.array([0]), ONE.maps * np.nan), TARGET), "normalize the maps"),
        (lambda: ThresholdSweep(2).compute(), "counted no pixel"),
        (lambda: ThresholdSweep(2).merge(ThresholdSweep(3)), "cannot merge a sweep over 3 classes"),
        (lambda: threshold_sweep([ONE], [], num_classes=2), "more seeds than masks, of which there are 0"),
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
