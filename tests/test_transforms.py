from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image as PILImage
from timm.data.auto_augment import RandAugment
from timm.data.random_erasing import RandomErasing

from bitrans_hf.data import DataError, UnreadableImageError, load_folder, make_shapes
from bitrans_hf.data.transforms import TrainingImages, training_transform

MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])


def noise(height: int, width: int, seed: int = 0) -> PILImage.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PILImage.fromarray(pixels)


def normalized(image: PILImage.Image) -> np.ndarray:
    return ((np.asarray(image) / 255 - MEAN) / STD).transpose(2, 0, 1)


def pixels(tensor: torch.Tensor) -> np.ndarray:
    """Undo the normalization: (H, W, 3) in [0, 255]."""
    return (tensor.numpy().transpose(1, 2, 0) * STD + MEAN) * 255


@pytest.fixture(autouse=True)
def fixed_draws() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the augmentations draw from it
    torch.manual_seed(0)


# ---- Presets.


def test_the_reference_preset_has_the_published_settings() -> None:
    crop, flip, augment, _, normalize, erase = training_transform(224).transforms  # type: ignore[attr-defined]
    assert (crop.size, crop.scale, crop.ratio) == ((224, 224), (0.08, 1.0), (3 / 4, 4 / 3))
    assert str(crop.interpolation).endswith("BICUBIC")
    assert flip.p == 0.5
    assert isinstance(augment, RandAugment)
    assert (augment.num_layers, len(augment.ops)) == (2, 15)
    assert {op.magnitude for op in augment.ops} == {9}
    assert {op.magnitude_std for op in augment.ops} == {0.5}
    np.testing.assert_allclose(normalize.mean, MEAN, rtol=1e-6)
    np.testing.assert_allclose(normalize.std, STD, rtol=1e-6)
    assert isinstance(erase, RandomErasing)
    assert (erase.probability, erase.per_pixel, erase.min_count, erase.max_count) == (0.25, True, 1, 1)


@pytest.mark.parametrize("preset", ["reference", "crop_flip", "flip", "rescale_crop"])
@pytest.mark.parametrize("size", [(50, 70), (1, 1), (300, 3)])
def test_every_preset_gives_a_finite_square(preset: str, size: tuple[int, int]) -> None:
    transform = training_transform(32, preset)
    for _ in range(5):
        result = transform(noise(*size))
        assert result.shape == (3, 32, 32)
        assert result.dtype == torch.float32
        assert result.isfinite().all()


def test_crop_flip_keeps_the_share_of_the_picture_it_promises() -> None:
    """On ramps the corners of a crop can be read off its colors."""
    ramp = np.linspace(0, 255, 256)
    red, green = np.meshgrid(ramp, ramp)
    image = PILImage.fromarray(np.stack([red, green, 0 * red], axis=2).astype(np.uint8))
    shares, flipped = [], 0
    transform = training_transform(64, "crop_flip", scale=(0.5, 0.8))
    for _ in range(100):
        crop = pixels(transform(image))
        # The first and last pixel centers of the crop are one sixty-fourth of it less apart than its edges.
        width, height = (np.ptp(crop[..., channel]) / 255 * 64 / 63 for channel in (0, 1))
        shares.append(width * height)
        flipped += crop[0, 0, 0] > crop[0, -1, 0]
        assert crop[0, 0, 1] < crop[-1, 0, 1]
    assert 0.48 < min(shares) < 0.55
    assert 0.75 < max(shares) < 0.83
    assert 30 < flipped < 70


def test_flip_shows_the_whole_picture_or_its_mirror_image() -> None:
    image = noise(32, 32)
    straight = normalized(image)
    seen = set()
    transform = training_transform(32, "flip")
    for _ in range(20):
        result = transform(image).numpy()
        mirrored = not np.allclose(result, straight, atol=1e-5)
        seen.add(mirrored)
        np.testing.assert_allclose(result, straight[:, :, ::-1] if mirrored else straight, atol=1e-5)
    assert seen == {False, True}


def test_rescale_crop_draws_the_longer_side_and_puts_a_small_picture_anywhere() -> None:
    white = PILImage.new("RGB", (60, 30), (255, 255, 255))
    transform = training_transform(64, "rescale_crop", longer_side=(20, 40))
    widths, lefts, tops = set(), set(), set()
    for _ in range(200):
        result = transform(white)
        rows, columns = (
            (result[0] != 0).any(dim=1).nonzero().flatten(),
            (result[0] != 0).any(dim=0).nonzero().flatten(),
        )
        assert rows.numel() == round(columns.numel() / 2)  # proportions stay, and nothing is cut off
        assert (result[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] > 2).all()  # white, the rest is 0
        widths.add(columns.numel())
        lefts.add(int(columns[0]))
        tops.add(int(rows[0]))
    assert (min(widths), max(widths)) == (20, 40)
    assert min(lefts) < 4
    assert max(lefts) > 30
    assert min(tops) < 5
    assert max(tops) > 40


def test_rescale_crop_cuts_a_large_picture_without_stretching_it() -> None:
    image = noise(48, 96)
    straight = normalized(image)
    transform = training_transform(32, "rescale_crop", longer_side=(96, 96), hflip=0.0)
    corners = set()
    for _ in range(30):
        result = transform(image).numpy()
        match = np.argwhere(np.isclose(straight[0, :17, :65], result[0, 0, 0], atol=1e-6))
        found = [(y, x) for y, x in match if np.allclose(straight[:, y : y + 32, x : x + 32], result, atol=1e-5)]
        assert len(found) == 1
        corners.add(found[0])
    assert len(corners) > 20


def test_unknown_presets_and_options_are_refused() -> None:
    with pytest.raises(
        DataError, match="preset 'heavy' is unknown, expected one of reference, crop_flip, flip, rescale"
    ):
        training_transform(224, "heavy")
    with pytest.raises(TypeError, match="erasing"):
        training_transform(224, "flip", erasing=0.5)
    with pytest.raises(DataError, match=r"longer_side must be two rising numbers of pixels, got \(64, 32\)"):
        training_transform(224, "rescale_crop", longer_side=(64, 32))


# ---- Items.


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return torch.equal(first["pixel_values"], second["pixel_values"]) and first["index"] == second["index"]


@pytest.fixture(scope="module")
def shapes() -> Dataset:
    return make_shapes(8, seed=0)


def test_items_hold_multi_hot_labels_of_their_row(shapes: Dataset) -> None:
    images = TrainingImages(shapes, training_transform(32, "flip"))
    for index in range(len(shapes)):
        item = images[index]
        expected = [1.0 if class_id in shapes[index]["labels"] else 0.0 for class_id in range(len(images.classes))]
        assert item["labels"].dtype == torch.float32
        assert item["labels"].tolist() == expected
        assert (item["index"], item["unreadable"]) == (index, "")
        assert item["pixel_values"].shape == (3, 32, 32)


def test_an_item_depends_on_seed_epoch_and_index_alone(shapes: Dataset) -> None:
    images = TrainingImages(shapes, training_transform(32), seed=1)
    first = [images[index] for index in range(8)]
    random.seed(99)
    np.random.seed(99)  # noqa: NPY002
    torch.manual_seed(99)
    assert all(same(images[index], first[index]) for index in reversed(range(8)))
    assert same(images[-1], first[7])

    images.set_epoch(1)
    second = [images[index] for index in range(8)]
    other_seed = TrainingImages(shapes, training_transform(32), seed=2)
    assert not any(same(one, other) for one, other in zip(first, second, strict=True))
    assert not any(same(first[index], other_seed[index]) for index in range(8))
    images.set_epoch(0)
    assert same(images[3], first[3])


def test_equal_pictures_look_different_at_different_indices(shapes: Dataset) -> None:
    images = TrainingImages(shapes.select([0] * 6), training_transform(32))
    looks = {images[index]["pixel_values"].numpy().tobytes() for index in range(6)}
    assert len(looks) == 6


def test_generators_of_the_caller_stay_as_they_were(shapes: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(seed: int) -> None:
        pytest.fail(f"the GPU generators were seeded with {seed}")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    images = TrainingImages(shapes, training_transform(32))
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    images[0]
    assert random.getstate() == state[0]
    assert np.random.get_state()[1].tolist() == state[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), state[2])


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_worker_processes_change_nothing_and_hear_of_new_epochs(shapes: Dataset, context: str) -> None:
    images = TrainingImages(shapes, training_transform(32))
    loader = torch.utils.data.DataLoader(
        images, batch_size=3, num_workers=2, persistent_workers=True, multiprocessing_context=context
    )
    for epoch in range(2):
        images.set_epoch(epoch)
        expected = torch.stack([images[index]["pixel_values"] for index in range(8)])
        batches = list(loader)
        assert torch.equal(torch.cat([batch["pixel_values"] for batch in batches]), expected)
        assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(8))


def test_masks_are_never_decoded(shapes: Dataset) -> None:
    rows = [{**row, "mask": {"path": None, "bytes": b"no mask"}} for row in shapes]
    broken = Dataset.from_list(rows, features=shapes.features)
    assert TrainingImages(broken, training_transform(32, "flip"))[0]["index"] == 0


# ---- Images that cannot be read.


@pytest.fixture
def damaged_folder(tmp_path: Path) -> Callable[..., Dataset]:
    def load(*broken: str) -> Dataset:
        rows = ["file_name,labels"]
        for number, name in enumerate("abcd"):
            rows.append(f"{name}.png,{'cat' if number % 2 else 'dog'}")
            noise(8, 8, seed=number).save(tmp_path / f"{name}.png")
        (tmp_path / "labels.csv").write_text("\n".join(rows))
        for name in broken:
            (tmp_path / f"{name}.png").write_bytes(b"broken")
        return load_folder(tmp_path)

    return load


def test_an_unreadable_picture_is_replaced_by_the_next_and_named(
    damaged_folder: Callable[..., Dataset], caplog: pytest.LogCaptureFixture
) -> None:
    images = TrainingImages(damaged_folder("c", "d"), training_transform(8, "flip", hflip=0.0))
    with caplog.at_level(logging.WARNING):
        items = [images[index] for index in range(4)]
    assert [item["unreadable"] for item in items] == ["", "", "c", "d"]
    assert [item["index"] for item in items] == [0, 1, 0, 0]
    assert [item["labels"].tolist() for item in items] == [[0, 1], [1, 0], [0, 1], [0, 1]]
    np.testing.assert_allclose(items[2]["pixel_values"].numpy(), normalized(noise(8, 8, seed=0)), atol=1e-5)
    assert "image c is left out" in caplog.text


def test_the_name_of_an_unreadable_picture_arrives_from_a_worker(damaged_folder: Callable[..., Dataset]) -> None:
    images = TrainingImages(damaged_folder("b"), training_transform(8, "flip"))
    loader = torch.utils.data.DataLoader(images, batch_size=4, num_workers=1)
    (batch,) = loader
    assert batch["unreadable"] == ["", "b", "", ""]


def test_strict_raises_on_the_first_unreadable_picture(damaged_folder: Callable[..., Dataset]) -> None:
    images = TrainingImages(damaged_folder("b"), training_transform(8, "flip"), strict=True)
    assert images[0]["index"] == 0
    with pytest.raises(UnreadableImageError, match=r"b\.png cannot be read"):
        images[1]


def test_nothing_readable_at_all_is_an_error(damaged_folder: Callable[..., Dataset]) -> None:
    images = TrainingImages(damaged_folder(*"abcd"), training_transform(8, "flip"))
    with pytest.raises(UnreadableImageError, match="none of the 4 images can be read"):
        images[0]


def test_a_dataset_that_cannot_be_trained_on_is_refused(shapes: Dataset) -> None:
    transform = training_transform(32, "flip")
    with pytest.raises(DataError, match="data set is empty"):
        TrainingImages(shapes.select([]), transform)
    with pytest.raises(DataError, match="seed must be 0 or greater, got -1"):
        TrainingImages(shapes, transform, seed=-1)
    with pytest.raises(DataError, match="column 'labels' is None"):
        TrainingImages(shapes.remove_columns("labels"), transform)
