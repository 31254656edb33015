from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bitrans_hf import Seeds
from bitrans_hf.pseudo_labels import seeds_to_label_map, write_label_png


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


def test_a_label_png_holds_ids_and_the_voc_colours(tmp_path: Path):
    label_map = np.array([[0, 1, 2], [15, 20, 255]], dtype=np.uint8)
    path = tmp_path / "labels" / "a.png"
    write_label_png(path, label_map)
    with Image.open(path) as image:
        assert (image.mode, image.size) == ("P", (3, 2))
        np.testing.assert_array_equal(np.asarray(image), label_map)
        colours = np.asarray(image.convert("RGB"))
    assert colours[0].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0]]
    assert colours[1].tolist() == [[192, 128, 128], [0, 64, 128], [224, 224, 192]]
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]
