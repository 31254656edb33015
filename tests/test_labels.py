from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bitrans_hf.hub.labels import BACKGROUND, COCO_CLASSES, IGNORE_INDEX, VOC_CLASSES, class_ids_to_multi_hot, palette

# The devkit's colors of background and the twenty classes.
VOC_COLOURS = [
    (0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128), (128, 128, 128),
    (64, 0, 0), (192, 0, 0), (64, 128, 0), (192, 128, 0), (64, 0, 128), (192, 0, 128), (64, 128, 128), (192, 128, 128),
    (0, 64, 0), (128, 64, 0), (0, 192, 0), (128, 192, 0), (0, 64, 128),
]  # fmt: skip


def test_the_palette_is_that_of_voc():
    colors = palette()
    assert len(colors) == 768
    triples = [tuple(colors[start : start + 3]) for start in range(0, 768, 3)]
    assert triples[:21] == VOC_COLOURS
    assert triples[IGNORE_INDEX] == (224, 224, 192)
    assert len(set(triples)) == 256


def test_the_palette_is_that_of_the_real_masks(shared_data: Path):
    mask = sorted((shared_data / "voc12_animals" / "SegmentationClassAug").glob("*.png"))[0]
    with Image.open(mask) as image:
        theirs = image.getpalette()
    if image.mode != "P" or theirs is None:
        pytest.skip(f"{mask.name} has no palette")
    assert palette()[: len(theirs)] == theirs


def test_the_class_lists_are_complete_and_without_background():
    assert (len(VOC_CLASSES), len(COCO_CLASSES)) == (20, 80)
    assert list(VOC_CLASSES) == sorted(set(VOC_CLASSES))  # VOC's order is alphabetical
    assert len(set(COCO_CLASSES)) == 80
    assert "background" not in VOC_CLASSES + COCO_CLASSES
    assert (BACKGROUND, VOC_CLASSES.index("person") + 1) == (0, 15)


def test_the_coco_names_are_in_the_order_of_their_category_ids(shared_data: Path):
    path = shared_data / "tiny_coco" / "annotations" / "instances_val2017.json"
    categories = json.loads(path.read_text(encoding="utf-8"))["categories"]
    in_order = [category["name"] for category in sorted(categories, key=lambda category: category["id"])]
    positions = [COCO_CLASSES.index(name) for name in in_order]
    assert positions == sorted(positions)
    assert len(in_order) <= 80


def test_class_ids_become_a_multi_hot_vector():
    multi_hot = class_ids_to_multi_hot([3, 0, 3], 5)
    assert multi_hot.dtype == np.float32
    assert multi_hot.tolist() == [1, 0, 0, 1, 0]
    assert class_ids_to_multi_hot([], 2).tolist() == [0, 0]


@pytest.mark.parametrize("class_id", [5, -1, 255])
def test_a_class_id_out_of_range_is_named(class_id: int):
    with pytest.raises(ValueError, match=rf"class id {class_id} is outside \[0, 5\); class ids count object classes"):
        class_ids_to_multi_hot([0, class_id], 5)
