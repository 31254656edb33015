from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import DatasetCard
from PIL import Image

from bitrans_hf import Seeds
from bitrans_hf.hub.labels import palette
from bitrans_hf.hub.par import pixel_adaptive_refinement
from bitrans_hf.hub.refiners import REFINERS
from bitrans_hf.publishing.pseudo_labels import pseudo_label_card, pseudo_label_dataset
from bitrans_hf.refine.crf import CrfNotInstalledError, check_crf_installed, dense_crf
from bitrans_hf.refine.pseudo_labels import (
    confident_label_map,
    label_map_with_ignore_band,
    scores_to_label_map,
    seeds_to_label_map,
    with_background,
    write_label_png,
)


def random_seeds(num_maps: int, seed: int = 0) -> Seeds:
    """Values on a coarse scale, so that ties occur between classes and with the threshold."""
    rng = np.random.default_rng(seed)
    class_ids = np.sort(rng.choice(20, num_maps, replace=False)).astype(np.int64)
    return Seeds(class_ids, (rng.integers(0, 9, (num_maps, 13, 17)) / 8).astype(np.float32))


@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.4, 1.0])
@pytest.mark.parametrize("num_maps", [0, 1, 2, 5])
def test_each_pixel_takes_the_first_class_above_the_background_score(num_maps: int, threshold: float):
    seeds = random_seeds(num_maps)
    label_map = seeds_to_label_map(seeds, threshold)
    expected = np.zeros((13, 17), dtype=np.uint8)
    for row in range(13):
        for column in range(17):
            best = threshold
            for class_id, class_map in zip(seeds.class_ids, seeds.maps, strict=True):
                if class_map[row, column] > best:
                    best, expected[row, column] = class_map[row, column], class_id + 1
    assert label_map.dtype == np.uint8
    np.testing.assert_array_equal(label_map, expected)


def test_class_ids_up_to_254_fit():
    assert seeds_to_label_map(Seeds(np.array([253]), np.ones((1, 1, 1), dtype=np.float32)), 0.5).item() == 254


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_a_threshold_outside_its_range_is_refused(threshold: float):
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\], got"):
        seeds_to_label_map(random_seeds(1), threshold)


def test_a_label_png_holds_ids_and_the_voc_colors(tmp_path: Path):
    label_map = np.array([[0, 1, 2], [15, 20, 255]], dtype=np.uint8)
    path = tmp_path / "labels" / "a.png"
    write_label_png(path, label_map)
    with Image.open(path) as image:
        assert (image.mode, image.size) == ("P", (3, 2))
        np.testing.assert_array_equal(np.asarray(image), label_map)
        colors = np.asarray(image.convert("RGB"))
    assert colors[0].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0]]
    assert colors[1].tolist() == [[192, 128, 128], [0, 64, 128], [224, 224, 192]]
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    "label_map",
    [np.zeros((3, 4), dtype=np.int64), np.zeros((3, 4, 1), dtype=np.uint8), np.zeros((3, 4), dtype=np.float32)],
)
def test_only_label_maps_are_written(tmp_path: Path, label_map: np.ndarray):
    with pytest.raises(ValueError, match=r"a label map is \(H, W\) uint8, got \(3, 4"):
        write_label_png(tmp_path / "a.png", label_map)
    assert list(tmp_path.iterdir()) == []


# ---- Background score.


def random_maps(num_maps: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((num_maps, 6, 7), dtype=np.float32)


@pytest.mark.parametrize("alpha", [1, 4, 12, 32, 0.5])
def test_the_background_score_falls_with_the_best_class(alpha: float):
    maps = random_maps(3)
    scores = with_background(maps, alpha=alpha)
    assert (scores.shape, scores.dtype) == ((4, 6, 7), np.float32)
    np.testing.assert_array_equal(scores[1:], maps)
    for row in range(6):
        for column in range(7):
            expected = (1 - max(float(value) for value in maps[:, row, column])) ** alpha
            assert scores[0, row, column] == pytest.approx(expected, abs=1e-6)


def test_a_constant_background_score():
    scores = with_background(random_maps(2), threshold=0.39)
    assert (scores[0] == np.float32(0.39)).all()
    np.testing.assert_array_equal(scores[1:], random_maps(2))


@pytest.mark.parametrize(("rule", "expected"), [({"threshold": 0.3}, 0.3), ({"alpha": 4.0}, 1.0)])
def test_without_classes_there_is_background_alone(rule: dict[str, float], expected: float):
    scores = with_background(np.zeros((0, 6, 7), dtype=np.float32), **rule)
    np.testing.assert_array_equal(scores, np.full((1, 6, 7), np.float32(expected)))


def test_a_map_that_rounding_lifted_above_one_gives_no_nan():
    assert (with_background(np.full((1, 2, 2), 1.0000001, dtype=np.float32), alpha=0.5)[0] == 0).all()


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({}, "give either a threshold or alpha, got threshold None and alpha None"),
        ({"threshold": 0.4, "alpha": 4}, "give either a threshold or alpha, got threshold 0.4 and alpha 4"),
        ({"threshold": 1.5}, r"threshold must be in \[0, 1\], got 1.5"),
        ({"alpha": 0.0}, "alpha must be a positive number, got 0.0"),
        ({"alpha": float("nan")}, "alpha must be a positive number, got nan"),
    ],
)
def test_a_wrong_background_rule_is_refused(rule: dict[str, float], words: str):
    with pytest.raises(ValueError, match=words):
        with_background(random_maps(1), **rule)


# ---- Label maps.

CLASS_IDS = np.array([2, 7])


def label_of(scores: list[float]) -> int:
    """Label id of one pixel by the argmax over background and the classes of CLASS_IDS."""
    return [0, 3, 8][max(range(3), key=lambda row: (scores[row], -row))]


def test_scores_become_the_best_label_of_each_pixel():
    scores = np.random.default_rng(0).integers(0, 5, (3, 20, 30)).astype(np.float32)  # with ties
    label_map = scores_to_label_map(CLASS_IDS, scores)
    expected = [[label_of(scores[:, y, x].tolist()) for x in range(30)] for y in range(20)]
    np.testing.assert_array_equal(label_map, expected)
    assert label_map.dtype == np.uint8


def test_only_what_both_alphas_agree_on_is_sure():
    rng = np.random.default_rng(0)
    low, high = (rng.random((3, 20, 30), dtype=np.float32) for _ in range(2))
    low[:, :4, :5] = high[:, :4, :5] = 1e-6  # padding
    label_map = confident_label_map(CLASS_IDS, low, high)
    counts = dict.fromkeys((0, 3, 8, 255), 0)
    for y in range(20):
        for x in range(30):
            expected = label_of(low[:, y, x].tolist())
            if expected == 0:
                expected = 255
            if label_of(high[:, y, x].tolist()) == 0:
                expected = 0
            if y < 4 and x < 5:
                expected = 255
            counts[expected] += 1
            assert label_map[y, x] == expected
    assert min(counts.values()) > 20


def test_alphas_of_one_stack_of_maps_leave_a_band_of_unsure_pixels():
    maps = np.linspace(0, 1, 101, dtype=np.float32).reshape(1, 1, 101)
    low, high = with_background(maps, alpha=1), with_background(maps, alpha=12)
    label_map = confident_label_map(np.array([4]), low, high)[0]
    # (1 - v)^12 = v at 0.148, 1 - v = v at 0.5
    assert set(label_map[:15]) == {0}
    assert set(label_map[15:51]) == {255}
    assert set(label_map[51:]) == {5}


def test_without_classes_all_is_background():
    alone = np.ones((1, 3, 4), dtype=np.float32)
    none = np.zeros(0, dtype=np.int64)
    for label_map in (
        scores_to_label_map(none, alone),
        confident_label_map(none, alone, alone),
        label_map_with_ignore_band(none, alone[:0], low=0.3, high=0.6),
    ):
        np.testing.assert_array_equal(label_map, np.zeros((3, 4)))


@pytest.mark.parametrize(("low", "high"), [(0.25, 0.5), (0.5, 0.5), (0.0, 1.0), (0.0, 0.0)])
def test_scores_between_two_thresholds_are_ignored(low: float, high: float):
    maps = (np.random.default_rng(0).integers(0, 9, (2, 20, 30)) / 8).astype(np.float32)  # with ties
    label_map = label_map_with_ignore_band(CLASS_IDS, maps, low=low, high=high)
    for y in range(20):
        for x in range(30):
            first, second = maps[:, y, x].tolist()
            best = max(first, second)
            expected = (3 if first >= second else 8) if best > high else 0 if best <= low else 255
            assert label_map[y, x] == expected


ONES = np.ones((3, 2, 2), dtype=np.float32)


@pytest.mark.parametrize(
    ("class_ids", "scores", "words"),
    [
        (CLASS_IDS, ONES[:2], r"of 2 classes and background must be \(3, H, W\), got \(2, 2, 2\)"),
        (CLASS_IDS, ONES[0], r"must be \(3, H, W\), got \(2, 2\)"),
        (np.array([0, 254]), ONES, "class ids 0 to 253, got 254"),
        (CLASS_IDS, ONES * np.nan, "hold NaN"),
    ],
)
def test_scores_that_make_no_label_map_are_refused(class_ids: np.ndarray, scores: np.ndarray, words: str):
    with pytest.raises(ValueError, match=words):
        scores_to_label_map(class_ids, scores)


@pytest.mark.parametrize(
    ("thresholds", "words"),
    [((0.5, 0.4), "must not exceed the high one, got 0.5 and 0.4"), ((-0.1, 0.4), "low must be in"), ((0, 2), "high")],
)
def test_thresholds_out_of_order_are_refused(thresholds: tuple[float, float], words: str):
    with pytest.raises(ValueError, match=words):
        label_map_with_ignore_band(CLASS_IDS, ONES[1:], low=thresholds[0], high=thresholds[1])


def test_stacks_of_two_sizes_are_refused():
    with pytest.raises(ValueError, match=r"one shape, got \(3, 2, 2\) and \(3, 2, 1\)"):
        confident_label_map(CLASS_IDS, ONES, ONES[:, :, :1])


# ---- Refiners.


@pytest.mark.parametrize("name", REFINERS)
def test_refiners_share_one_interface(name: str):
    if name == "crf":
        try:
            check_crf_installed()
        except CrfNotInstalledError as absent:
            pytest.skip(str(absent))
    image = np.random.default_rng(0).integers(0, 256, (11, 13, 3), dtype=np.uint8)
    scores = np.random.default_rng(1).random((3, 11, 13), dtype=np.float32)
    image.setflags(write=False)
    scores.setflags(write=False)
    refined = REFINERS[name](image, scores)
    expected = {
        "none": lambda: scores,
        "crf": lambda: dense_crf(image, scores, preset="psa"),
        "par": lambda: pixel_adaptive_refinement(
            torch.from_numpy(image.copy()).permute(2, 0, 1)[None], torch.from_numpy(scores.copy())[None]
        )[0].numpy(),
    }[name]()
    assert refined.dtype == np.float32
    np.testing.assert_array_equal(refined, expected)


# ---- The published set.


def write_labels(folder: Path, ids: list[str]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    maps = {name: rng.choice([0, 1, 15, 255], (9, 12)).astype(np.uint8) for name in ids}
    for name, label_map in maps.items():
        write_label_png(folder / f"{name}.png", label_map)
    return maps


def test_a_folder_becomes_a_data_set_whose_palette_survives_saving(tmp_path: Path):
    maps = write_labels(tmp_path / "labels", ["b", "a", "sub/c", "2007.x"])
    (tmp_path / "labels" / ".d.123.tmp.png").write_bytes(b"half")
    dataset = pseudo_label_dataset(tmp_path / "labels")
    dataset.save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "labels").rglob("*.png"):
        path.unlink()  # the saved copy must stand alone
    loaded = datasets.load_from_disk(str(tmp_path / "saved"))
    assert loaded["image_id"] == sorted(maps)
    for row in loaded:
        label = row["pseudo_label"]
        assert label.mode == "P"
        assert label.getpalette() == palette()
        np.testing.assert_array_equal(np.asarray(label), maps[row["image_id"]])


def test_the_data_set_can_follow_a_list_of_ids(tmp_path: Path):
    write_labels(tmp_path, ["a", "b", "c"])
    assert pseudo_label_dataset(tmp_path, image_ids=["c", "a"])["image_id"] == ["c", "a"]
    with pytest.raises(FileNotFoundError, match=r"2 of 3 images have no pseudo label in .*: x, y"):
        pseudo_label_dataset(tmp_path, image_ids=["a", "x", "y"])
    with pytest.raises(FileNotFoundError, match="no pseudo labels"):
        pseudo_label_dataset(tmp_path / "absent")


def test_the_card_states_recipe_score_and_ids_and_can_be_read_back(tmp_path: Path):
    write_labels(tmp_path, ["a", "b"])
    dataset = pseudo_label_dataset(tmp_path)
    recipe: dict[str, Any] = {"pseudo_labels": {"refiner": "crf", "beta": 8.0}, "seed": 3}
    metrics = {"miou": 61.234, "scored": 437, "made_with": {"commit": "0123abc", "torch": "2.15"}}
    text = pseudo_label_card(dataset, ["cat", "dog"], recipe, metrics)
    card = DatasetCard(text)
    assert card.data.task_categories == ["image-segmentation"]
    assert card.data.size_categories == ["n<1K"]
    for words in (
        "\n2 segmentation masks",
        "**61.23 %** over 437 images with known masks",
        '"beta": 8.0',
        '"seed": 3',
        "- commit: `0123abc`",
        "| 0 | background |\n| 1 | cat |\n| 2 | dog |\n| 255 | unsure, to be ignored |",
    ):
        assert words in text
    assert "They were not scored" in pseudo_label_card(dataset, ["cat"], recipe, {})
