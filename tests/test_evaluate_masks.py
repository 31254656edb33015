"""Scoring a folder: the numbers, what is written, what is refused, and the same score from two processes."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bitrans_hf.data import DataError, load_coco, make_shapes, open_mask, write_coco_masks
from bitrans_hf.hub.seeds import SEED_VARIANTS
from bitrans_hf.metrics import threshold_sweep
from bitrans_hf.refine.pseudo_labels import write_label_png
from bitrans_hf.stages.evaluate import main as evaluate_main
from bitrans_hf.stages.records import write_json
from bitrans_hf.stages.run import StageError
from bitrans_hf.store import SeedStore

REPOSITORY = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

CLASSES = ("cat", "dog", "cow")


def slow_iou(predictions: list[np.ndarray], targets: list[np.ndarray]) -> list[float]:
    """IoU in percent of background and classes by sets of pixels; nan where absent."""
    predicted, true = np.concatenate([p.ravel() for p in predictions]), np.concatenate([t.ravel() for t in targets])
    predicted, true = predicted[true != 255], true[true != 255]
    scores = []
    for label in range(1 + len(CLASSES)):
        union = ((predicted == label) | (true == label)).sum()
        scores.append(100 * ((predicted == label) & (true == label)).sum() / union if union else np.nan)
    return scores


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, list[np.ndarray], list[np.ndarray]]:
    """13 true label maps of various sizes, one in a subfolder, without class 3, and predictions with some 255."""
    rng = np.random.default_rng(0)
    predictions, targets = [], []
    for index in range(13):
        target = np.kron(rng.integers(0, 3, (3, 4)), np.ones((4 + index, 5), dtype=int)).astype(np.uint8)
        target[:, ::7] = 255
        prediction = np.where(rng.random(target.shape) < 0.03 * index, rng.integers(0, 3, target.shape), target)
        prediction[prediction == 255] = 0
        prediction[0, 1] = 255
        name = f"more/b_{index:02}" if index == 12 else f"a_{index:02}"
        predictions.append(prediction.astype(np.uint8))
        targets.append(target)
        write_label_png(tmp_path / "predictions" / f"{name}.png", predictions[-1])
        write_label_png(tmp_path / "targets" / f"{name}.png", target)
    return tmp_path / "predictions", tmp_path / "targets", predictions, targets


def evaluate(predictions: Path, targets: Path | None, *more: str) -> dict[str, Any]:
    command = ["--predictions", str(predictions), "--cpu", "true", "--quiet", "true"]
    if targets is not None:
        command += ["--targets", str(targets), "--classes", ",".join(CLASSES)]
    evaluate_main([*command, *more])
    return json.loads((Path(f"{predictions}_scores") / "metrics.json").read_text())


def test_a_folder_is_scored_and_its_worst_images_come_first(folders, capsys: pytest.CaptureFixture[str]):
    predictions, targets, predicted, true = folders
    record = evaluate(predictions, targets, "--quiet", "false", "--num_worst", "3")
    expected = slow_iou(predicted, true)
    assert record["miou"] == round(np.nanmean(expected), 2)
    assert [scores["iou"] for scores in record["per_class"].values()] == [
        None if np.isnan(iou) else round(iou, 2) for iou in expected
    ]
    assert list(record["per_class"]) == ["background", *CLASSES]
    assert record["per_class"]["cat"]["target_pixels"] == sum(int((target == 1).sum()) for target in true)
    assert (record["images"], record["labels_in_mean"], record["missing"]) == (13, 3, 0)
    assert record["unsure_pixels"] == round(100 * 13 / sum(target.size for target in true), 2)
    assert record["made_with"]["commit"]
    said = capsys.readouterr().out
    assert f"masks: mIoU {record['miou']:.2f} % over 3 of 4 labels, 13 images" in said
    assert "labels in no map are left out of the mean; a predicted 255 is a miss" in said
    assert any(line.split() == ["cow", "-", "-", "0.00"] for line in said.splitlines())

    output = Path(f"{predictions}_scores")
    with (output / "images.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    scores = [float(row["miou"]) for row in rows]
    assert scores == sorted(scores)
    assert {row["image_id"] for row in rows} == {*(f"a_{index:02}" for index in range(12)), "more/b_12"}
    by_id = {row["image_id"]: float(row["miou"]) for row in rows}
    assert by_id["a_05"] == pytest.approx(np.nanmean(slow_iou(predicted[5:6], true[5:6])), abs=0.006)
    page = (output / "index.html").read_text()
    assert page.index(f"<h3>{rows[0]['image_id']}") < page.index(f"<h3>{rows[2]['image_id']}")
    assert f"<h3>{rows[3]['image_id']}" not in page
    with Image.open(output / "confusion.png") as picture:
        assert min(picture.size) > 300


def test_absent_labels_and_unsure_pixels_follow_the_rule_that_is_written_down(folders):
    predictions, targets, predicted, true = folders
    zero = evaluate(predictions, targets, "--absent", "zero")
    assert zero["miou"] == round(np.nansum(slow_iou(predicted, true)) / 4, 2)
    assert zero["rules"]["absent"] == "labels in no map count as IoU 0"
    background = evaluate(predictions, targets, "--unsure", "background")
    filled = [np.where(prediction == 255, 0, prediction) for prediction in predicted]
    assert background["miou"] == round(np.nanmean(slow_iou(filled, true)), 2)
    ignore = evaluate(predictions, targets, "--unsure", "ignore")
    pairs = list(zip(predicted, true, strict=True))
    left = [np.where(prediction == 255, 255, target) for prediction, target in pairs]
    assert ignore["miou"] == round(np.nanmean(slow_iou(predicted, left)), 2)
    assert ignore["rules"]["unsure"] == "pixels predicted as 255 are left out"


def test_two_processes_score_13_images_exactly_as_one(folders):
    predictions, targets, _, _ = folders
    one = evaluate(predictions, targets)
    page = (Path(f"{predictions}_scores") / "images.csv").read_text()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(REPOSITORY / "training" / "evaluate_masks.py"), "--predictions", str(predictions)]
    command += ["--targets", str(targets), "--classes", ",".join(CLASSES), "--cpu", "true", "--quiet", "true"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command += ["--output", str(predictions.parent / "by_two"), "--num_worst", "1"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("masks: mIoU") == 1
    two = json.loads((predictions.parent / "by_two" / "metrics.json").read_text())
    for record in (one, two):
        del record["seconds"], record["made_with"]
    assert two == one
    assert (predictions.parent / "by_two" / "images.csv").read_text() == page


def test_a_list_of_ids_restricts_the_score(folders):
    predictions, targets, predicted, true = folders
    ids = predictions.parent / "val.txt"
    ids.write_text("a_03\n\nmore/b_12\n")
    record = evaluate(predictions, targets, "--ids", str(ids))
    assert record["images"] == 2
    assert record["not_in_ground_truth"] == 11
    chosen = slow_iou([predicted[3], predicted[12]], [true[3], true[12]])
    assert record["miou"] == round(np.nanmean(chosen), 2)
    ids.write_text("a_03\nnobody\n")
    with pytest.raises(StageError, match=r"1 of 2 ids in .*val.txt have no mask .* the first is 'nobody'"):
        evaluate(predictions, targets, "--ids", str(ids))


def test_seeds_are_scored_at_the_best_background_score_or_a_given_one(tmp_path: Path):
    scenes = make_shapes(6, 1, image_size=32)
    store = SeedStore(tmp_path / "seeds")
    generator = torch.Generator().manual_seed(0)
    for scene in scenes:
        shape = (len(scene["labels"]), 4, 4)
        maps = {variant: torch.rand(shape, generator=generator) for variant in SEED_VARIANTS}
        store.write(scene["image_id"], np.array(scene["labels"]), maps, (32, 32))
    classes = scenes.features["labels"].feature.names
    shapes = ["--data.num_val", "6", "--data.image_size", "32", "--split", "val", "--variant", "fused"]
    record = evaluate(store.folder, None, *shapes)
    seeds = [store.read(scene["image_id"], "fused") for scene in scenes]
    targets = [open_mask(scene["mask"]) for scene in scenes]
    swept = threshold_sweep(seeds, targets, num_classes=len(classes))
    assert record["miou"] == round(swept.best_miou, 2)
    assert record["rules"]["threshold"] == (
        f"seeds fused cut at {swept.best_threshold:.2f}, the best of 101 on these same masks"
    )
    given = evaluate(store.folder, None, *shapes, "--threshold", "0.7")
    assert given["miou"] == round(swept.miou[70], 2)
    assert given["rules"]["threshold"] == "seeds fused cut at 0.70, as given"
    assert given["ground_truth"] == "shapes, split val"


def test_the_rule_of_the_masks_is_written_beside_a_voc_score(tmp_path: Path):
    root = tmp_path / "VOC2012"
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text("x_1\n")
    (root / "JPEGImages").mkdir()
    Image.new("RGB", (8, 6)).save(root / "JPEGImages" / "x_1.jpg")
    target = np.zeros((6, 8), dtype=np.uint8)
    target[2:, 3:] = 8  # cat
    write_label_png(root / "SegmentationClass" / "x_1.png", target)
    write_label_png(tmp_path / "predictions" / "x_1.png", np.full((6, 8), 8, dtype=np.uint8))
    voc = ["--data.source", "voc", "--data.root", str(root), "--split", "val"]
    record = evaluate(tmp_path / "predictions", None, *voc)
    assert "SegmentationClass" in record["rules"]["masks"]
    assert record["miou"] == round(100 * (0 + 20 / 48) / 2, 2)
    with pytest.raises(StageError, match=r"x_1.png is the ground truth's own file"):
        evaluate(root / "SegmentationClass", None, *voc)


def test_the_painting_rule_is_written_beside_a_coco_score_and_changes_it(shared_data: Path, tmp_path: Path):
    root = shared_data / "tiny_coco"
    images = load_coco(root, "val2017").select(range(8))
    predicted = [open_mask(row["mask"]) for row in images]  # by the rule "later"
    for row, label_map in zip(images, predicted, strict=True):
        write_label_png(tmp_path / "predictions" / f"{row['image_id']}.png", label_map)
    ids = tmp_path / "ids.txt"
    ids.write_text("\n".join(images["image_id"]))
    command = ["--data.source", "coco", "--data.root", str(root), "--split", "val2017"]
    command += ["--ids", str(ids), "--num_worst", "1"]
    with pytest.raises(StageError, match=r"all 8 label maps in .* equal the ground truth"):
        evaluate(tmp_path / "predictions", None, *command)
    record = evaluate(tmp_path / "predictions", None, *command, "--data.mask_overlap", "smaller")
    assert "smaller" in record["rules"]["masks"]
    assert 0 < record["miou"] < 100
    assert len(record["per_class"]) == 81
    write_coco_masks(root, "val2017", tmp_path / "masks", overlap="smaller")
    command = ["--targets", str(tmp_path / "masks"), "--classes", "coco", "--ids", str(ids), "--num_worst", "1"]
    written = evaluate(tmp_path / "predictions", None, *command)
    assert written["rules"] == record["rules"]
    assert written["per_class"] == record["per_class"]


def test_a_record_never_holds_nan_which_other_readers_of_json_refuse(tmp_path: Path):
    write_json(tmp_path / "metrics.json", {"per_class": {"cat": np.float64("nan"), "dog": (1.5, float("nan"))}})
    text = (tmp_path / "metrics.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"per_class": {"cat": None, "dog": [1.5, None]}}


# ---- What is refused.


def linked_folder(predictions: Path, targets: Path) -> Path:
    folder = predictions.parent / "link"
    folder.symlink_to(targets, target_is_directory=True)
    return folder


def hard_links(predictions: Path, targets: Path) -> Path:
    (predictions / "a_07.png").unlink()
    os.link(targets / "a_07.png", predictions / "a_07.png")
    return predictions


def copies(predictions: Path, targets: Path) -> Path:
    for path in targets.rglob("*.png"):  # other bytes, the same pixels
        with Image.open(path) as image:
            image.save(predictions / path.relative_to(targets), compress_level=0)
    return predictions


def copies_without_border(predictions: Path, targets: Path) -> Path:
    for path in copies(predictions, targets).rglob("*.png"):
        with Image.open(path) as image:
            label_map = np.array(image)
        label_map[label_map == 255] = 0
        write_label_png(path, label_map)
    return predictions


def without_two(predictions: Path, targets: Path) -> Path:
    (predictions / "a_04.png").unlink()
    (predictions / "more" / "b_12.png").unlink()
    return predictions


def replaced(pixels: np.ndarray) -> Callable[[Path, Path], Path]:
    def replace(predictions: Path, targets: Path) -> Path:
        Image.fromarray(pixels).save(predictions / "a_02.png")
        return predictions

    return replace


def truncated(predictions: Path, targets: Path) -> Path:
    path = predictions / "a_02.png"
    path.write_bytes(path.read_bytes()[:60])
    return predictions


def empty_folder(predictions: Path, targets: Path) -> Path:
    (predictions.parent / "empty").mkdir()
    return predictions.parent / "empty"


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda predictions, targets: targets, "is the ground truth's own file"),
        (linked_folder, "is the ground truth's own file"),
        (hard_links, "a_07.png is the ground truth's own file"),
        (copies, "all 13 label maps in .* equal the ground truth in every counted pixel"),
        (copies_without_border, "all 13 label maps in .* equal the ground truth in every counted pixel"),
        (without_two, r"2 of 13 images have no prediction in .*, the first is 'a_04' \(a_04.png\)"),
        (replaced(np.zeros((3, 3), np.uint8)), "1 of 13 images cannot be scored; the first: a_02: .* is 3x3"),
        (replaced(np.full((18, 20), 4, np.uint8)), "a_02.png holds the id 4, expected 0 for background"),
        (replaced(np.full((18, 20, 3), (128, 0, 0), np.uint8)), "a_02.png is a RGB image with the colors 128/0/0"),
        (truncated, "a_02.png cannot be read"),
        (empty_folder, "holds no predictions, expected <image_id>.png label maps or .npz seeds"),
    ],
)
def test_predictions_that_cannot_be_scored_are_refused_by_name(folders, prepare, message):
    with pytest.raises(StageError, match=message):
        evaluate(prepare(*folders[:2]), folders[1])


def test_missing_predictions_are_left_out_on_request(folders):
    predictions, targets, predicted, true = folders
    record = evaluate(without_two(predictions, targets), targets, "--allow_missing", "true")
    assert (record["images"], record["missing"]) == (11, 2)
    kept = [index for index in range(13) if index not in (4, 12)]
    expected = slow_iou([predicted[index] for index in kept], [true[index] for index in kept])
    assert record["miou"] == round(np.nanmean(expected), 2)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--targets", "{targets}"), "--targets needs --classes: voc, coco, or the names"),
        (("--targets", "{empty}", "--classes", "voc"), "there is no mask to score against in .*empty"),
        (("--classes", "voc", "--split", "val"), "--classes goes with --targets"),
    ],
)
def test_ground_truth_that_is_not_clear_is_refused(folders, more, message):
    predictions, targets, _, _ = folders
    empty = empty_folder(predictions, targets)
    with pytest.raises(StageError, match=message):
        evaluate(predictions, None, *(part.format(targets=targets, empty=empty) for part in more))


# ---- Masks as people have them.


@pytest.fixture
def binary(tmp_path: Path) -> tuple[Path, Path]:
    """Masks of 0 and 255: three truths with an object, and predictions that find the left half of it."""
    for name in "abc":
        mask = np.zeros((8, 12), np.uint8)
        mask[2:6, 2:10] = 255
        for folder, found in (("predictions", 6), ("targets", 10)):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(np.where(np.arange(12) < found, mask, 0).astype(np.uint8)).save(
                tmp_path / folder / f"{name}.png"
            )
    return tmp_path / "predictions", tmp_path / "targets"


def test_masks_of_0_and_255_are_refused_until_their_meaning_is_said(binary, capsys: pytest.CaptureFixture[str]):
    predictions, targets = binary
    dog = ("--classes", "dog")
    with pytest.raises(StageError, match=r"true masks of 3 images hold only 0 .* --mask_values binary"):
        evaluate(predictions, targets, *dog)
    with pytest.raises(StageError, match=r"predictions of 3 images hold only 0 .* --prediction_values binary"):
        evaluate(predictions, targets, *dog, "--mask_values", "binary")
    record = evaluate(predictions, targets, *dog, "--mask_values", "binary", "--prediction_values", "0=0,255=1")
    assert (record["per_class"]["dog"]["iou"], record["per_class"]["background"]["iou"]) == (50.0, 80.0)
    assert record["notes"] == []
    for folder, option in ((predictions, "--prediction_values"), (targets, "--mask_values")):
        kept = (folder / "c.png").read_bytes()
        Image.fromarray(np.full((8, 12), 38, np.uint8)).save(folder / "c.png")
        other = "--mask_values" if folder == predictions else "--prediction_values"
        with pytest.raises(StageError, match=rf"c\.png holds the id 38.* is the object, give {option} binary"):
            evaluate(predictions, targets, *dog, other, "binary")
        (folder / "c.png").write_bytes(kept)
    record = evaluate(predictions, targets, *dog, "--mask_values", "binary", "--prediction_values", "ids")
    assert record["notes"] == ["no prediction holds a pixel of a class"]
    assert "note: no prediction holds a pixel of a class" in capsys.readouterr().out


def test_names_that_all_differ_in_one_way_are_matched_and_this_is_said(folders, capsys: pytest.CaptureFixture[str]):
    predictions, targets, *_ = folders
    before = evaluate(predictions, targets)
    for path in predictions.rglob("*.png"):
        path.rename(path.with_name(f"{path.stem}_seg.PNG"))
    after = evaluate(predictions, targets)
    assert (after["miou"], after["images"], after["not_in_ground_truth"]) == (before["miou"], 13, 0)
    assert "predictions have '_seg' after the name" in capsys.readouterr().out
    for path in predictions.rglob("*.PNG"):
        path.rename(path.with_name(f"x{path.name}"))
    with pytest.raises(
        StageError, match=r"13 of 13 .*, and 13 files there belong to no image, such as more/xb_12_seg"
    ):
        evaluate(predictions, targets)


def test_images_left_out_are_counted_where_the_score_is_said(folders, capsys: pytest.CaptureFixture[str]):
    predictions, targets, *_ = folders
    (predictions / "a_03.png").unlink()
    evaluate(predictions, targets, "--allow_missing", "true")
    assert "12 images, 1 without a prediction left out" in capsys.readouterr().out


def test_background_at_the_head_of_the_classes_is_none_and_no_name_stands_twice(folders, tmp_path: Path):
    predictions, targets, *_ = folders
    plain = evaluate(predictions, targets)
    (tmp_path / "classes.txt").write_text("background\ncat\ndog\ncow\n")
    for given in ("background,cat,dog,cow", str(tmp_path / "classes.txt")):
        assert evaluate(predictions, targets, "--classes", given)["per_class"] == plain["per_class"]
    for given, message in (
        ("cat,cat", "more than once"),
        ("cat,background,dog", "background has the label"),
        ("cat,Cat", "alike"),
    ):
        with pytest.raises(DataError, match=message):
            evaluate(predictions, targets, "--classes", given)
