from __future__ import annotations

import colorsys
import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from tiny_models import picture

from bitrans_hf.data import DataError, UnreadableImageError, make_shapes
from bitrans_hf.data.segmentation import (
    LABEL_MAP,
    PairAugmentation,
    TrainingPairs,
    augment_pair,
    pair_augmentation,
    with_label_maps,
)

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def png(label_map: np.ndarray) -> dict[str, Any]:
    stream = io.BytesIO()
    Image.fromarray(label_map).save(stream, format="PNG")
    return {"path": None, "bytes": stream.getvalue()}


def pairs(count: int = 6, **changes: Any) -> Dataset:
    scenes = make_shapes(count, 3)
    cells = [png(np.asarray(row["mask"])) for row in scenes]
    return with_label_maps(scenes, [changes.get(f"cell_{number}", cell) for number, cell in enumerate(cells)])


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# ---- The geometry, against slow loops.


def slow_bilinear(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """OpenCV's bilinear resizing: centers of pixels, no smoothing."""
    result = np.zeros((height, width, values.shape[2]))
    for y in range(height):
        for x in range(width):
            v = min(max((y + 0.5) * values.shape[0] / height - 0.5, 0), values.shape[0] - 1)
            u = min(max((x + 0.5) * values.shape[1] / width - 0.5, 0), values.shape[1] - 1)
            top, left = int(v), int(u)
            bottom, right = min(top + 1, values.shape[0] - 1), min(left + 1, values.shape[1] - 1)
            b, a = v - top, u - left
            result[y, x] = (1 - b) * ((1 - a) * values[top, left] + a * values[top, right]) + b * (
                (1 - a) * values[bottom, left] + a * values[bottom, right]
            )
    return result


def slow_nearest(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """OpenCV's nearest resizing: the pixel at floor(x * old / new)."""
    rows = [y * values.shape[0] // height for y in range(height)]
    columns = [x * values.shape[1] // width for x in range(width)]
    return values[rows][:, columns]


@pytest.mark.parametrize("scale", [0.7, 1.0, 1.3])
def test_scaling_and_padding_are_the_references(scale: float):
    image = picture(19, 14)
    label_map = generator(1).integers(0, 5, (19, 14), dtype=np.uint8)
    augmentation = PairAugmentation(crop_size=32, scale=(scale, scale), hflip=0.0, padding_label=0)
    pixel_values, labels = augment_pair(image, label_map, augmentation, scale, generator())
    height, width = int(19 * scale), int(14 * scale)
    expected = np.zeros((32, 32, 3))
    expected[:height, :width] = (slow_bilinear(np.asarray(image, dtype=float), height, width) / 255 - MEAN) / STD
    np.testing.assert_allclose(pixel_values.permute(1, 2, 0), expected, atol=2e-5)
    expected_labels = np.zeros((32, 32))
    expected_labels[:height, :width] = slow_nearest(label_map, height, width)
    np.testing.assert_array_equal(labels, expected_labels)
    assert labels.dtype == torch.int64


def numbered_pair(height: int, width: int) -> tuple[Image.Image, np.ndarray]:
    """An image whose red and green say where a pixel is from, and a label map that repeats its column."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    return Image.fromarray(np.stack([rows, columns, columns], axis=-1)), columns


def test_picture_and_label_map_are_cut_and_flipped_together():
    image, label_map = numbered_pair(40, 50)
    augmentation = PairAugmentation(crop_size=16, scale=(1.0, 1.0))
    places, flips = set(), 0
    for seed in range(60):
        pixel_values, labels = augment_pair(image, label_map, augmentation, 1.0, generator(seed))
        pixels = np.rint((pixel_values.permute(1, 2, 0).numpy() * STD + MEAN) * 255).astype(int)
        np.testing.assert_array_equal(pixels[..., 1], labels)
        places.add((pixels[0, 0, 0], min(labels[0, 0], labels[0, -1]).item()))
        flips += int(labels[0, 0] > labels[0, -1])
        assert abs(int(labels[0, 0] - labels[0, -1])) == 15
    assert 15 < flips < 45
    assert len(places) > 40
    assert all(0 <= top <= 24 and 0 <= left <= 34 for top, left in places)
    assert {top for top, _ in places} >= {0, 24} or len({top for top, _ in places}) > 15


@pytest.mark.parametrize(("preset", "padding"), [("mctformer", 0), ("deeplab-v1", 255)])
def test_padding_is_mean_color_in_the_picture_and_the_presets_label(preset: str, padding: int):
    augmentation = pair_augmentation(preset, crop_size=32, scale=(1.0, 1.0))
    label_map = np.full((20, 12), 3, dtype=np.uint8)
    pixel_values, labels = augment_pair(picture(20, 12), label_map, augmentation, 1.0, generator())
    assert (labels[:20, :12] == 3).all()
    assert (labels[20:] == padding).all()
    assert (labels[:, 12:] == padding).all()
    assert (pixel_values[:, 20:] == 0).all()
    assert (pixel_values[:, :, 12:] == 0).all()
    assert (pixel_values[:, :20, :12] != 0).all()


def test_the_jitter_shifts_hue_round_the_circle_and_leaves_labels_alone():
    color = (200, 60, 90)
    image, label_map = Image.new("RGB", (8, 8), color), np.ones((8, 8), dtype=np.uint8)
    hues, values = [], []
    for seed in range(40):
        augmentation = PairAugmentation(crop_size=8, hsv_jitter=10)
        pixel_values, labels = augment_pair(image, label_map, augmentation, 1.0, generator(seed))
        red, green, blue = pixel_values[:, 0, 0].numpy() * STD + MEAN
        hue, _, value = colorsys.rgb_to_hsv(red, green, blue)
        hues.append((hue - colorsys.rgb_to_hsv(*(c / 255 for c in color))[0] + 0.5) % 1 - 0.5)
        values.append(255 * value - 200)
        assert (labels == 1).all()
    assert max(abs(hue) for hue in hues) <= 10 / 180 + 0.01
    assert max(hues) > 0.02
    assert min(hues) < -0.02
    assert max(abs(value) for value in values) <= 11
    assert len({round(value) for value in values}) > 8


# ---- A function of (seed, epoch, index).


def items(dataset: TrainingPairs, indices: list[int]) -> list[dict[str, Any]]:
    return dataset.__getitems__(indices)


def assert_equal_items(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert torch.equal(first["pixel_values"], second["pixel_values"])
    assert torch.equal(first["labels"], second["labels"])


@pytest.mark.parametrize("preset", ["mctformer", "deeplab-v1"])
def test_a_pair_depends_on_seed_epoch_and_index_alone(preset: str):
    augmentation = pair_augmentation(preset, crop_size=48)

    def made(epoch: int = 0, seed: int = 0, index: int = 2) -> dict[str, Any]:
        dataset = TrainingPairs(pairs(), augmentation, seed=seed)
        dataset.set_epoch(epoch)
        return dataset[index]

    random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), torch.get_rng_state()
    first = made()
    random.seed(2)
    torch.manual_seed(2)
    assert_equal_items(made(), first)
    random.setstate(before[0])
    torch.set_rng_state(before[1])
    for other in (made(epoch=1), made(seed=1), made(index=3)):
        assert not torch.equal(other["pixel_values"], first["pixel_values"])
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def padded_height(item: dict[str, Any]) -> int:
    return int((item["pixel_values"] != 0).any(dim=0).any(dim=1).sum())


def test_a_batch_shares_its_scale_in_the_reference_preset_only():
    dataset = TrainingPairs(pairs(), pair_augmentation("mctformer", crop_size=96))
    shared = [{padded_height(item) for item in items(dataset, [number, 4, 5, 0])} for number in range(4)]
    assert all(len(heights) == 1 for heights in shared)
    assert len(set.union(*shared)) > 1, "another batch, another scale"
    dataset = TrainingPairs(pairs(), pair_augmentation("deeplab-v1", crop_size=96))
    own = [padded_height(item) for item in items(dataset, [0, 1, 2, 3])]
    assert len(set(own)) > 1
    assert_equal_items(items(dataset, [3, 1])[1], dataset[1])


def test_worker_processes_and_a_resumed_epoch_see_the_same_batches():
    dataset = TrainingPairs(pairs(), pair_augmentation("mctformer", crop_size=40), seed=5)
    batches = [[0, 3], [1, 2], [5, 4]]

    def load(wanted: list[list[int]], workers: int) -> list[dict[str, Any]]:
        loader = torch.utils.data.DataLoader(dataset, batch_sampler=wanted, num_workers=workers)  # type: ignore[arg-type]
        return list(loader)

    whole = load(batches, 0)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)  # a worker has one
        again = load(batches, 0)
    finally:
        torch.set_num_threads(threads)
    for others in (again, load(batches, 2)):
        for first, second in zip(whole, others, strict=True):
            assert_equal_items(first, second)
    assert_equal_items(load(batches[1:], 0)[0], whole[1])


# ---- Bad input, by its message.


def test_a_label_map_that_cannot_be_read_is_replaced_and_named():
    dataset = TrainingPairs(pairs(cell_1={"path": None, "bytes": b"torn"}), pair_augmentation("deeplab-v1"))
    item = dataset[1]
    assert (item["index"], item["unreadable"]) == (2, dataset.image_ids[1])
    strict = TrainingPairs(
        pairs(cell_1={"path": None, "bytes": b"torn"}), pair_augmentation("deeplab-v1"), strict=True
    )
    with pytest.raises(UnreadableImageError, match="mask held in memory cannot be read"):
        strict[1]


@pytest.mark.parametrize(
    ("label_map", "words"),
    [
        (np.full((64, 64), 6, np.uint8), "holds the id 6, expected 0 for background, 1 to 5"),
        (np.zeros((64, 60), np.uint8), r"is 64x60 \(height x width\) and its image 64x64"),
        (np.full((64, 64, 3), (128, 0, 0), np.uint8), "is a RGB image .*expected a palette or gray image"),
    ],
)
def test_a_label_map_that_does_not_fit_stops(label_map: np.ndarray, words: str):
    dataset = TrainingPairs(pairs(cell_0=png(label_map)), pair_augmentation("deeplab-v1"))
    with pytest.raises(DataError, match=words):
        dataset[0]


def test_label_maps_given_as_paths_are_read_from_there(tmp_path: Path):
    scenes = make_shapes(1, 3)
    Image.fromarray(np.full((64, 64), 4, np.uint8)).save(tmp_path / "a.png")
    dataset = with_label_maps(scenes, [tmp_path / "a.png"])
    assert "mask" not in dataset.column_names, "ground truth stays behind"
    item = TrainingPairs(dataset, pair_augmentation("deeplab-v1", crop_size=64, scale=(1.0, 1.0)))[0]
    assert (item["labels"] == 4).all()
    assert dataset.column_names == ["image_id", "image", "labels", LABEL_MAP]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"preset": "deeplab-v9"}, "'deeplab-v9' is unknown, expected one of mctformer, deeplab-v1"),
        ({"crop": 3}, r"\['crop'\] hold an unknown one, expected some of crop_size"),
        ({"crop_size": 0}, "at least 1 pixel, got 0"),
        ({"scale": (1.5, 0.5)}, "the smaller one first"),
        ({"hflip": 2.0}, r"probability in \[0, 1\], got 2.0"),
        ({"hsv_jitter": 91}, r"in \[0, 90\]"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], words: str):
    with pytest.raises(DataError, match=words):
        pair_augmentation(**{"preset": "deeplab-v1", **options})


def test_data_without_label_maps_is_refused():
    with pytest.raises(DataError, match="no column 'label_map'"):
        TrainingPairs(make_shapes(1, 0), pair_augmentation("mctformer"))
    with pytest.raises(DataError, match="seed must be 0 or greater"):
        TrainingPairs(pairs(1), pair_augmentation("mctformer"), seed=-1)
    with pytest.raises(DataError, match="the data set is empty"):
        TrainingPairs(pairs(1).select([]), pair_augmentation("mctformer"))
