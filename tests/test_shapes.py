from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Image, Value
from datasets import Sequence as List
from PIL import Image as PILImage
from safetensors.numpy import load_file
from sources import ROOT

from bitrans_hf.data import class_names, make_shapes, open_image, open_mask
from bitrans_hf.data.shapes import SHAPE_CLASSES, DrawnShape, Scene, draw_scene
from bitrans_hf.hub.labels import palette


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(3, index) for index in range(1500)]


def outline(shape: DrawnShape) -> np.ndarray:
    """Vertices (V, 2) as (x, y) of the shape, laid out by hand and sized so that the shoelace area is the disc's."""
    rays: list[tuple[float, float]]  # (angle in degrees, radius)
    match SHAPE_CLASSES[shape.class_id]:
        case "disc":
            rays = [(angle, 1.0) for angle in range(360)]
        case "square":
            rays = [(0, 1), (90, 1), (180, 1), (270, 1)]
        case "triangle":
            rays = [(0, 1), (120, 1), (240, 1)]
        case "star":
            rays = [(36 * k, 1.0 if k % 2 == 0 else 0.5) for k in range(10)]
        case "cross":
            corner = math.degrees(0.4)
            notch = math.sqrt(2) * math.sin(0.4)
            rays = [
                (90 * arm + angle, radius)
                for arm in range(4)
                for angle, radius in [(-corner, 1), (corner, 1), (45, notch)]
            ]
    angles, radii = np.radians([ray[0] for ray in rays]), np.array([ray[1] for ray in rays])
    x, y = radii * np.cos(angles), radii * np.sin(angles)
    area = 0.5 * abs(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1)))
    size = shape.diameter / 2 * math.sqrt(math.pi / area)
    row, column = shape.center
    angles = angles + shape.rotation
    return np.stack([column + size * radii * np.cos(angles), row + size * radii * np.sin(angles)], axis=1)


def silhouette(shape: DrawnShape, image_size: int) -> np.ndarray:
    """Pixels (H, W) whose middle lies in the outline, by the even-odd rule."""
    row, column = np.mgrid[:image_size, :image_size].astype(float)
    inside = np.zeros((image_size, image_size), dtype=bool)
    vertices = outline(shape)
    for (x0, y0), (x1, y1) in zip(vertices, np.roll(vertices, -1, axis=0), strict=True):
        if y0 != y1:
            inside ^= ((y0 <= row) != (y1 <= row)) & (column < x0 + (row - y0) / (y1 - y0) * (x1 - x0))
    return inside


def visible_and_full(scene: Scene) -> Iterator[tuple[DrawnShape, np.ndarray, np.ndarray]]:
    """Each object with the pixels that show it and with its whole silhouette."""
    full = [silhouette(shape, len(scene.mask)) for shape in scene.objects]
    for position, shape in enumerate(scene.objects):
        visible = full[position].copy()
        for later in full[position + 1 :]:
            visible &= ~later
        yield shape, visible, full[position]


@pytest.mark.parametrize("image_size", [32, 64, 101])
def test_masks_are_the_outlines_painted_in_order(image_size: int):
    for index in range(60):
        scene = draw_scene(1, index, image_size=image_size)
        expected = np.zeros_like(scene.mask)
        for shape in scene.objects:
            expected[silhouette(shape, image_size)] = shape.class_id + 1
        # Single precision may decide otherwise on a pixel whose middle is on the line; a disc here is a 360-gon.
        assert (scene.mask != expected).sum() <= 2


@pytest.mark.parametrize("image_size", [64, 128])
def test_objects_are_18_to_36_pixels_wide_at_64_and_scale_with_the_picture(image_size: int):
    areas = [
        full.sum()
        for index in range(150)
        for _, _, full in visible_and_full(draw_scene(5, index, image_size=image_size))
    ]
    diameters = np.sqrt(4 / math.pi * np.array(areas)) * 64 / image_size
    assert 17.5 < diameters.min() < 19.0
    assert 33.0 < diameters.max() < 36.5


def test_every_object_keeps_most_of_its_silhouette_in_sight_and_in_the_picture(scenes: list[Scene]):
    covered = 0
    for scene in scenes[:300]:
        for shape, visible, full in visible_and_full(scene):
            assert visible.sum() >= 0.6 * full.sum() - 2
            covered += int(visible.sum() < full.sum())
            vertices = outline(shape)
            assert vertices.min() > -0.5001
            assert vertices.max() < 63.5001
    assert covered > 30, "some objects must be covered in part"


def test_scenes_hold_one_to_three_objects_and_all_classes_about_equally_often(scenes: list[Scene]):
    counts = np.bincount([len(scene.objects) for scene in scenes], minlength=4)
    assert counts[0] == 0
    assert len(counts) == 4
    assert counts[1:].min() > 0.2 * len(scenes)
    assert len(SHAPE_CLASSES) >= 5
    per_class = np.bincount([shape.class_id for scene in scenes for shape in scene.objects])
    assert len(per_class) == len(SHAPE_CLASSES)
    assert per_class.max() < 1.3 * per_class.min()


def test_objects_stand_out_from_what_is_around_them(scenes: list[Scene]):
    contrasts = []
    for scene in scenes[:200]:
        if len(scene.objects) > 1:
            continue
        inside = scene.mask > 0
        row, column = np.mgrid[:64, :64]
        center = scene.objects[0].center
        near = np.hypot(row - center[0], column - center[1]) < scene.objects[0].radius + 3
        colors = scene.image.astype(float)
        contrasts.append(np.linalg.norm(colors[inside].mean(axis=0) - colors[near & ~inside].mean(axis=0)))
    assert min(contrasts) > 50
    assert np.median(contrasts) > 90


def linear_accuracy(features: np.ndarray, classes: np.ndarray) -> float:
    """Held-out accuracy of ridge regression onto one-hot classes: the first half teaches, the second is scored."""
    half = len(features) // 2
    features = (features - features[:half].mean(axis=0)) / (features[:half].std(axis=0) + 1e-9)
    features = np.concatenate([features, np.ones((len(features), 1))], axis=1)
    train, test = features[:half], features[half:]
    gram = train.T @ train + 10.0 * np.eye(train.shape[1])
    weights = np.linalg.solve(gram, train.T @ np.eye(len(SHAPE_CLASSES))[classes[:half]])
    return float(((test @ weights).argmax(axis=1) == classes[half:]).mean())


def object_texture(scene: Scene, visible: np.ndarray, shape: DrawnShape) -> np.ndarray:
    """Color mean, spread and roughness of a window that every shape holds, and a histogram of the object's pixels."""
    row, column = (round(value) for value in shape.center)
    window = scene.image[row - 2 : row + 3, column - 2 : column + 3].astype(float)
    roughness = [np.abs(np.diff(window, axis=axis)).mean(axis=(0, 1)) for axis in (0, 1)]
    bins = (scene.image[visible] // 64).astype(int) @ np.array([16, 4, 1])
    histogram = np.bincount(bins, minlength=64) / len(bins)
    return np.concatenate([window.mean(axis=(0, 1)), window.std(axis=(0, 1)), *roughness, histogram])


def radial_profile(visible: np.ndarray) -> np.ndarray:
    """How the pixels of a silhouette spread around their middle, whatever its size and rotation."""
    rows, columns = np.nonzero(visible)
    radii = np.hypot(rows - rows.mean(), columns - columns.mean()) / math.sqrt(len(rows))
    return np.histogram(radii, bins=12, range=(0.0, 1.2))[0] / len(rows)


def test_a_class_shows_in_the_silhouette_and_not_in_color_texture_or_area(scenes: list[Scene]):
    rows = [
        (object_texture(scene, visible, shape), radial_profile(visible), [full.sum()], shape.class_id)
        for scene in scenes[:1000]
        for shape, visible, full in visible_and_full(scene)
    ]
    texture, profile, area, classes = (np.array(column) for column in zip(*rows, strict=True))
    chance = np.bincount(classes).max() / len(classes)
    assert linear_accuracy(texture, classes) < chance + 0.05
    assert linear_accuracy(area, classes) < chance + 0.05
    assert linear_accuracy(profile, classes) > 0.7, "the same classifier must see the shape, or the above says nothing"


def test_the_colors_of_a_whole_scene_do_not_tell_its_class(scenes: list[Scene]):
    single = [scene for scene in scenes if len(scene.objects) == 1]
    bins = [(scene.image.reshape(-1, 3) // 64).astype(int) @ np.array([16, 4, 1]) for scene in single]
    histograms = np.array([np.bincount(scene_bins, minlength=64) / 4096 for scene_bins in bins])
    classes = np.array([scene.objects[0].class_id for scene in single])
    assert linear_accuracy(histograms, classes) < np.bincount(classes).max() / len(classes) + 0.08


def test_the_data_set_has_the_columns_of_every_loader():
    dataset = make_shapes(3, seed=0)
    assert dataset.features == {
        "image_id": Value("string"),
        "image": Image(decode=False),
        "labels": List(ClassLabel(names=list(SHAPE_CLASSES))),
        "mask": Image(),
    }
    assert class_names(dataset) == list(SHAPE_CLASSES)
    assert dataset["image_id"][:] == ["shapes-0-0", "shapes-0-1", "shapes-0-2"]


def test_rows_hold_the_scenes_and_labels_are_the_ids_in_the_mask():
    dataset = make_shapes(40, seed=2, image_size=48)
    for index, row in enumerate(dataset):
        scene = draw_scene(2, index, image_size=48)
        mask = open_mask(row["mask"], image_size=(48, 48), num_classes=len(SHAPE_CLASSES))
        np.testing.assert_array_equal(np.asarray(open_image(row["image"])), scene.image)
        np.testing.assert_array_equal(mask, scene.mask)
        assert row["labels"] == [label - 1 for label in np.unique(mask).tolist() if label != 0]


def test_masks_are_palette_pngs_and_images_are_rgb_pngs():
    row = make_shapes(1, seed=0)[0]
    assert row["mask"].mode == "P"
    assert row["mask"].getpalette()[: 3 * 6] == palette()[: 3 * 6]
    image = PILImage.open(io.BytesIO(row["image"]["bytes"]))
    assert (image.format, image.mode, image.size) == ("PNG", "RGB", (64, 64))


def test_a_shorter_data_set_is_the_start_of_a_longer_one():
    short, long = make_shapes(4, seed=9), make_shapes(11, seed=9)
    assert short.with_format("arrow")[:].equals(long.select(range(4)).with_format("arrow")[:])


def test_scenes_of_different_seeds_have_nothing_in_common():
    # 9 + 2**32 has the words (9, 1): a generator seeded with the list [seed, index] would draw its scene 0 as scene 1
    # of seed 9.
    datasets = [make_shapes(20, seed=seed) for seed in (0, 1, 9, 9 + 2**32)]
    for column in ("image_id", "image"):
        cells = [cell["bytes"] if column == "image" else cell for dataset in datasets for cell in dataset[column]]
        assert len(set(cells)) == 80


def test_scenes_of_single_objects_come_from_streams_of_their_own():
    single = [draw_scene(3, index, objects=(1, 1)) for index in range(100)]
    assert {len(scene.objects) for scene in single} == {1}
    assert np.bincount([scene.objects[0].class_id for scene in single], minlength=5).min() > 8
    usual, alone = make_shapes(20, seed=3), make_shapes(20, seed=3, objects=(1, 1))
    assert alone["image_id"][:2] == ["shapes-1-1-3-0", "shapes-1-1-3-1"]
    assert len({cell["bytes"] for dataset in (usual, alone) for cell in dataset["image"]}) == 40


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"n": 0, "seed": 0}, "n must be at least 1 scene, got 0"),
        ({"n": -3, "seed": 0}, "n must be at least 1 scene, got -3"),
        ({"n": 1, "seed": -1}, "seed must be 0 or greater, got -1"),
        ({"n": 1, "seed": 0, "image_size": 31}, "image_size must be at least 32 pixels, got 31"),
        ({"n": 1, "seed": 0, "objects": (0, 2)}, r"1 <= fewest <= most, got \(0, 2\)"),
        ({"n": 1, "seed": 0, "objects": (3, 2)}, r"1 <= fewest <= most, got \(3, 2\)"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        make_shapes(**arguments)


def test_a_negative_index_is_named():
    with pytest.raises(ValueError, match="index must be 0 or greater, got -1"):
        draw_scene(0, -1)


def test_the_encoder_of_the_demo_can_be_trained_again(tmp_path: Path):
    """Its script, with few images and steps: every other test has the encoder that was trained once."""
    out = tmp_path / "encoder.safetensors"
    words = ["--images", "40", "--steps", "2", "--layers", "1", "--output", str(out)]
    subprocess.run([sys.executable, "training/pretrain_shapes.py", *words], cwd=ROOT, check=True, capture_output=True)
    tensors = load_file(out)
    assert tensors["patch_embed.proj.weight"].shape == (96, 3, 8, 8)
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())
    record = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    assert (record["images"], record["steps"], record["layers"]) == (40, 2, 1)
    assert 0 <= record["fresh_pictures_of_collages_named_right_percent"] <= 100
