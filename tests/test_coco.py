from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Image
from PIL import Image as PILImage
from PIL import ImageOps
from pycocotools.coco import COCO

from bitrans_hf.data import (
    CocoMaskRule,
    DataError,
    class_names,
    load_coco,
    mask_rule,
    open_image,
    open_mask,
    write_coco_masks,
)
from bitrans_hf.data.coco_painting import CROWDS, OVERLAPS
from bitrans_hf.data.label_files import read_label_file
from bitrans_hf.hub.labels import COCO_CLASSES
from bitrans_hf.stages.build import check_later_splits, load_images
from bitrans_hf.stages.prepare_coco import main as prepare_coco_main
from bitrans_hf.stages.recipe import DataRecipe, Recipe, ReportRecipe, SeedsRecipe

RULES = [CocoMaskRule(overlap, crowd) for overlap, crowd in product(OVERLAPS, CROWDS)]


def rectangle(top: int, left: int, bottom: int, right: int) -> list[list[float]]:
    """A polygon around whole pixels."""
    return [[left, top, right, top, right, bottom, left, bottom]]


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """Uncompressed run lengths, column by column, as COCO writes crowds."""
    flat = mask.T.reshape(-1).astype(int)
    ends = np.flatnonzero(np.diff(flat, prepend=1 - flat[0], append=1 - flat[-1]))
    counts = np.diff(ends).tolist()
    return {"counts": counts if flat[0] == 0 else [0, *counts], "size": list(mask.shape)}


CROWD_REGION = np.zeros((6, 8), dtype=bool)
CROWD_REGION[3:, :5] = True


def content() -> dict[str, Any]:
    """Categories with gaps and out of order; an image with two overlapping objects and a crowd, one with none."""
    return {
        "categories": [{"id": 7, "name": "train"}, {"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
        "images": [
            {"id": 9, "file_name": "COCO_val2014_000000000009.jpg", "height": 6, "width": 8},
            {"id": 5, "file_name": "COCO_val2014_000000000005.jpg", "height": 4, "width": 3},
            {"id": 6, "file_name": "COCO_val2014_000000000006.jpg", "height": 4, "width": 3},
        ],
        "annotations": [
            {"id": 1, "image_id": 9, "category_id": 18, "iscrowd": 0, "segmentation": rectangle(0, 0, 2, 3)},
            {"id": 2, "image_id": 6, "category_id": 7, "iscrowd": 0, "segmentation": rectangle(0, 0, 4, 3)},
            {"id": 3, "image_id": 9, "category_id": 1, "iscrowd": 0, "segmentation": rectangle(0, 2, 5, 6)},
            {"id": 4, "image_id": 9, "category_id": 7, "iscrowd": 1, "segmentation": run_lengths(CROWD_REGION)},
        ],
    }


@pytest.fixture
def make_coco(tmp_path: Path) -> Callable[..., Path]:
    def make(change: Callable[[dict[str, Any]], object] = lambda content: None, split: str = "val2014") -> Path:
        made = content()
        for name in ("annotations", split):
            (tmp_path / name).mkdir(exist_ok=True)
        for image in made["images"]:
            PILImage.new("RGB", (image["width"], image["height"])).save(tmp_path / split / image["file_name"])
        change(made)
        (tmp_path / f"annotations/instances_{split}.json").write_text(json.dumps(made))
        return tmp_path

    return make


PERSON, TRAIN, DOG = 1, 2, 3  # label ids


# ---- Labels and rows.


@pytest.mark.parametrize("split", ["val2014", "val"])
def test_labels_follow_the_order_of_category_ids_and_count_crowds(make_coco: Callable[..., Path], split: str) -> None:
    dataset = load_coco(make_coco(), split)
    assert class_names(dataset) == ["person", "train", "dog"]
    assert dataset["image_id"][:] == [f"COCO_val2014_00000000000{number}" for number in (9, 5, 6)]
    assert dataset["labels"][:] == [[0, 1, 2], [], [1]]
    assert open_image(dataset[0]["image"]).size == (8, 6)


def test_images_without_an_object_can_be_left_out(make_coco: Callable[..., Path]) -> None:
    root = make_coco()
    assert load_coco(root, "val2014", drop_empty=True)["labels"][:] == [[0, 1, 2], [1]]
    assert load_coco(root, "val2014", classes=["dog"], drop_empty=True)["labels"][:] == [[0]]
    with pytest.raises(DataError, match="class 'cat' is not in the categories of"):
        load_coco(root, "val2014", classes=["cat"])


def test_without_masks_no_segmentation_is_read(make_coco: Callable[..., Path]) -> None:
    def break_all(made: dict[str, Any]) -> None:
        for annotation in made["annotations"]:
            annotation["segmentation"] = "none"

    dataset = load_coco(make_coco(break_all), "val2014", masks=False)
    assert dataset["mask"][:] == [None] * 3
    assert dataset.features["mask"] == Image()
    assert mask_rule(dataset) is None


def test_pictures_may_lie_in_a_folder_images(make_coco: Callable[..., Path]) -> None:
    root = make_coco()
    (root / "images").mkdir()
    (root / "val2014").rename(root / "images/val2014")
    assert len(load_coco(root, "val2014")) == 3


# ---- Masks.


def test_masks_are_painted_by_the_rule_that_the_data_set_names(make_coco: Callable[..., Path]) -> None:
    root = make_coco()
    expected = np.zeros((6, 8), dtype=np.uint8)
    expected[:2, :3], expected[:5, 2:6] = DOG, PERSON
    dataset = load_coco(root, "val2014")
    assert mask_rule(dataset) == (
        "COCO instances, later objects over earlier ones, in the order of the file; crowd regions are background"
    )
    np.testing.assert_array_equal(open_mask(dataset[0]["mask"], image_size=(6, 8), num_classes=3), expected)
    np.testing.assert_array_equal(open_mask(dataset[1]["mask"]), np.zeros((4, 3)))

    expected[:2, :3] = DOG  # the dog has 6 pixels, the person 20
    smaller = load_coco(root, "val2014", overlap="smaller", crowd="object")
    np.testing.assert_array_equal(
        open_mask(smaller[0]["mask"]), np.where((expected == 0) & CROWD_REGION, TRAIN, expected)
    )

    expected[:2, 2] = 255
    ignore = load_coco(root, "val2014", overlap="ignore", crowd="ignore")
    np.testing.assert_array_equal(
        open_mask(ignore[0]["mask"]), np.where((expected == 0) & CROWD_REGION, 255, expected)
    )


def test_a_third_object_does_not_win_back_a_pixel_that_two_classes_claim(make_coco: Callable[..., Path]) -> None:
    def claim_again(made: dict[str, Any]) -> None:
        again = {"id": 9, "image_id": 9, "category_id": 18, "iscrowd": 0, "segmentation": rectangle(0, 0, 2, 4)}
        made["annotations"].append(again)

    label_map = open_mask(load_coco(make_coco(claim_again), "val2014", overlap="ignore")[0]["mask"])
    assert label_map[0].tolist() == [DOG, DOG, 255, 255, PERSON, PERSON, 0, 0]


@pytest.mark.parametrize("written", [False, True])
def test_chosen_classes_get_new_ids_in_labels_and_masks(make_coco: Callable[..., Path], written: bool) -> None:
    root = make_coco()
    if written:
        write_coco_masks(root, "val2014", root / "masks")
    dataset = load_coco(root, "val2014", classes=["dog", "person"], masks=root / "masks" if written else True)
    assert dataset["labels"][:] == [[0, 1], [], []]
    assert open_mask(dataset[0]["mask"], num_classes=2)[0].tolist() == [1, 1, 2, 2, 2, 2, 0, 0]
    assert not open_mask(dataset[2]["mask"]).any()


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_masks_written_once_equal_those_painted_on_demand(make_coco: Callable[..., Path], rule: CocoMaskRule) -> None:
    root = make_coco()
    assert write_coco_masks(root, "val", root / "m", overlap=rule.overlap, crowd=rule.crowd) == rule
    written = load_coco(root, "val", masks=root / "m")
    demanded = load_coco(root, "val", overlap=rule.overlap, crowd=rule.crowd)
    assert mask_rule(written) == mask_rule(demanded) == str(rule)
    for one, other in zip(written, demanded, strict=True):
        assert one["mask"].mode == "P"
        np.testing.assert_array_equal(open_mask(one["mask"]), open_mask(other["mask"]))


def test_killed_writing_goes_on_and_keeps_what_is_there(make_coco: Callable[..., Path]) -> None:
    root = make_coco()

    class Killed(BaseException):
        pass

    def die(images: Sequence[Any]) -> Iterable[Any]:
        yield images[0]
        raise Killed

    with pytest.raises(Killed):
        write_coco_masks(root, "val", root / "m", progress=die)
    first = root / "m/COCO_val2014_000000000009.png"
    written = first.stat().st_mtime_ns
    with pytest.raises(DataError, match=r"lacks the mask .*0005\.png \(2 of 3 are missing\)"):
        load_coco(root, "val", masks=root / "m")
    write_coco_masks(root, "val", root / "m")
    assert first.stat().st_mtime_ns == written
    assert len(load_coco(root, "val", masks=root / "m")) == 3


def test_masks_of_one_rule_are_never_taken_for_those_of_another(make_coco: Callable[..., Path]) -> None:
    root = make_coco()
    write_coco_masks(root, "val", root / "m", crowd="ignore")
    with pytest.raises(DataError, match=r"asked for instances_val2014\.json by .*crowd regions are background"):
        load_coco(root, "val", masks=root / "m", crowd="background")
    with pytest.raises(DataError, match=r"rule\.json says .*'crowd': 'ignore'.*choose another folder"):
        write_coco_masks(root, "val", root / "m")
    make_coco(split="train2014")
    with pytest.raises(DataError, match=r"are of instances_val2014\.json .* asked for instances_train2014\.json"):
        load_coco(root, "train2014", masks=root / "m")
    (root / "m/rule.json").unlink()
    with pytest.raises(DataError, match=r"no rule\.json, expected masks that write_coco_masks wrote"):
        load_coco(root, "val2014", masks=root / "m")
    with pytest.raises(DataError, match=r"holds masks, but no rule\.json"):
        write_coco_masks(root, "val2014", root / "m")


def test_masks_on_demand_follow_their_file(make_coco: Callable[..., Path]) -> None:
    root = make_coco()
    cell = load_coco(root, "val")[2]["mask"]
    assert open_mask(cell).all()
    make_coco(lambda made: (made["images"].pop(), made["annotations"].pop(1)))
    with pytest.raises(DataError, match="has no image 6 any more"):
        open_mask(cell)
    (root / "annotations/instances_val2014.json").unlink()
    with pytest.raises(DataError, match=r"instances_val2014\.json is not there, from which masks are painted"):
        open_mask(cell)


def test_the_script_writes_masks_that_recipes_use(
    make_coco: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_coco()
    prepare_coco_main(
        [
            "--coco",
            str(root),
            "--split",
            "val2014",
            "--masks",
            str(root / "m/val2014"),
            "--overlap",
            "smaller",
            "--quiet",
        ]
    )
    make_coco(split="train2014")
    assert "smaller objects over larger ones; crowd regions are background" in capsys.readouterr().out
    recipe = DataRecipe(source="coco", root=str(root), mask_folder=str(root / "m"), drop_empty=True)
    images = load_images(recipe, "val2014", masks=True)
    assert len(images) == 2
    assert "smaller" in str(mask_rule(images))
    assert images.features["mask"].decode
    assert load_images(recipe, "val2014", masks=False)["mask"][:] == [None, None]
    assert not load_images(recipe, "train2014", masks=True).features["mask"].decode  # not written: painted
    painted = DataRecipe(source="coco", root=str(root), mask_crowd="ignore")
    assert "crowd regions are 255" in str(mask_rule(load_images(painted, "val2014", masks=True)))
    with pytest.raises(ValueError, match="COCO has no images without a split"):
        load_images(recipe, None, masks=False)


def test_splits_that_later_stages_use_are_looked_at_before_a_training(
    make_coco: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    root = make_coco(first_annotation(segmentation=[]))

    def recipe(splits: list[str | None]) -> Recipe:
        data = DataRecipe(source="coco", root=str(root), train_split="val2014", val_split=None)
        return Recipe(data=data, seeds=SeedsRecipe(splits=splits), report=ReportRecipe(split="val2014"))

    check_later_splits(recipe(["val2014"]))
    assert "the masks of 1 of 3 images are not known" in caplog.text
    with pytest.raises(DataError, match=r"no instances_test2014\.json, found val2014"):
        check_later_splits(recipe(["val2014", "test2014"]))
    with pytest.raises(ValueError, match="COCO has no images without a split"):
        check_later_splits(recipe(["val2014", None]))


# ---- Bad input.


def first_annotation(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda made: made["annotations"][0].update(values)


def second_image(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda made: made["images"][1].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda made: made.pop("categories"), "has no list 'categories'"),
        (lambda made: made.pop("annotations"), "has no list 'annotations'"),
        (lambda made: made["images"][0].pop("id"), r"images\[0\], has no 'id'"),
        (lambda made: made["images"][1].pop("file_name"), r"images\[1\], has no 'file_name'"),
        (second_image(file_name=3), "image 5, has the file_name 3, expected the name"),
        (second_image(id=True), r"images\[1\], the id is True, expected a number or text"),
        (lambda made: made["annotations"][0].pop("image_id"), "annotation 1, has no 'image_id'"),
        (first_annotation(image_id=[9]), "annotation 1, has an image_id or category_id that is no id"),
        (first_annotation(category_id=None), "annotation 1, the category_id is None, expected a number or text"),
        (lambda made: made["annotations"].append(7), r"annotations\[4\], is 7, expected an object"),
        (
            lambda made: made["annotations"][1].pop("id") and made["annotations"][1].pop("category_id"),
            r"annotations\[1\], has no 'category_id'",
        ),
        (lambda made: made["annotations"].append({"image_id": 9, "segments_info": []}), "is a panoptic file"),
        (lambda made: made.update(images=[], annotations=[]), "names no image"),
        (lambda made: made.update(categories=[]), "names no category"),
        (
            lambda made: made["categories"][0].update(name="Dog"),
            "names the categories 'Dog' and 'dog', which look alike",
        ),
        (lambda made: made["categories"][0].update(name=" "), "category 7, has no name"),
        (lambda made: made["categories"][0].update(id=18), "category 18, has the names 'train' and 'dog'"),
        (lambda made: made["categories"][1].pop("name"), r"categories\[1\], has no 'name'"),
        (first_annotation(category_id=2), "annotation 1, has the category 2, which is not in its categories"),
        (first_annotation(image_id=8), "annotation 1, is of image 8, which is not there"),
        (second_image(id=9), "holds the image 9 .* twice"),
        (second_image(file_name="COCO_val2014_000000000009.jpg"), "images 9 .* and 5 .* have one file"),
        (second_image(file_name="../secret.jpg"), r"image 5, names '\.\./secret\.jpg', which leads out"),
        (second_image(file_name="gone.jpg"), r"names gone\.jpg, which is not in .*val2014 \(1 of 3 images"),
    ],
)
def test_bad_files_are_refused_with_a_reason(
    make_coco: Callable[..., Path], change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load_coco(make_coco(change), "val2014")


def test_two_files_that_differ_in_their_suffix_alone_are_refused(make_coco: Callable[..., Path]) -> None:
    root = make_coco(second_image(file_name="COCO_val2014_000000000009.png"))
    PILImage.new("RGB", (3, 4)).save(root / "val2014/COCO_val2014_000000000009.png")
    with pytest.raises(DataError, match=r"images 9 \(.*jpg\) and 5 \(.*png\) have names that differ in their suffix"):
        load_coco(root, "val2014")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (first_annotation(segmentation=""), "annotation 1, it has no segmentation"),
        (first_annotation(segmentation=None), "annotation 1, it has no segmentation"),
        (first_annotation(segmentation=[[]]), "annotation 1, it has no segmentation"),
        (first_annotation(segmentation=float("nan")), "annotation 1, it has no segmentation"),
        (lambda made: made["annotations"][0].pop("segmentation"), "annotation 1, it has no segmentation"),
        (first_annotation(segmentation=[[1, 2]]), "annotation 1, its segmentation has a polygon of 2 numbers"),
        (first_annotation(segmentation=[[1, 2, 3, 4]]), "annotation 1, its segmentation has a polygon of 4 numbers"),
        (first_annotation(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "a polygon of 7 numbers, expected an x and a y"),
        (first_annotation(segmentation=[[1, 2, 3, 4, 5, "x"]]), "a polygon that holds 'x', expected numbers"),
        (first_annotation(segmentation=[[1, 2, 3, 4, 5, float("inf")]]), "that holds inf, expected numbers"),
        (first_annotation(segmentation={"counts": ["a"], "size": [6, 8]}), "run lengths that holds 'a'"),
        (
            first_annotation(segmentation={"counts": [0, 48], "size": [8, 6]}),
            r"of size \[8, 6\], its image is \[6, 8\]",
        ),
        (first_annotation(segmentation={"counts": [0, 47], "size": [6, 8]}), "sum to 47, expected 48 = 6 x 8"),
        (
            first_annotation(segmentation={"counts": [50, -2], "size": [6, 8]}),
            "the run length -2, expected none below",
        ),
        (first_annotation(segmentation={"counts": [0.5, 47.5], "size": [6, 8]}), "0.5, expected whole numbers"),
        (first_annotation(segmentation={"counts": [48]}), r"of size None, expected \[height, width\]"),
        (first_annotation(segmentation={"counts": "not a run", "size": [6, 8]}), "'not a run', expected a list"),
        (first_annotation(iscrowd="maybe"), "annotation 1, its iscrowd is 'maybe', expected 0 or 1"),
        (lambda made: made["images"][0].update(height=7), r"image 9 .* is 7 x 8 .* in the JSON and 6 x 8 in the file"),
    ],
)
def test_an_image_whose_mask_is_not_known_is_told_and_keeps_its_labels(
    make_coco: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
    change: Callable[[dict[str, Any]], object],
    message: str,
) -> None:
    root = make_coco(change)
    dataset = load_coco(root, "val2014")
    assert dataset["labels"][:] == [[0, 1, 2], [], [1]]
    assert [cell is None for cell in dataset["mask"]] == [True, False, False]
    assert open_mask(dataset[2]["mask"]).all()
    assert "the masks of 1 of 3 images are not known, so these are not scored: 1 with" in caplog.text or (
        "so these are not scored: 1 whose size in the JSON is not that of the file" in caplog.text
    )
    assert re.search(message, caplog.text)
    with pytest.raises(DataError, match="the mask of this image is not known"):
        open_mask(dataset[0]["mask"])

    write_coco_masks(root, "val2014", root / "m")  # the same where they are painted once
    written = load_coco(root, "val2014", masks=root / "m")
    assert [cell is None for cell in written["mask"]] == [True, False, False]
    assert sorted(path.stem[-1] for path in (root / "m").glob("*.png")) == ["5", "6"]


def test_what_is_said_of_a_file_is_said_once(make_coco: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    root = make_coco(first_annotation(segmentation=[]))
    for _ in range(3):
        load_coco(root, "val2014")
    assert len(caplog.messages) == 2
    assert "1 with objects that have no outline (boxes suffice for labels)" in caplog.messages[1]
    assert "1 of 3 images have no annotation of the classes" in caplog.messages[0]
    assert "drop_empty (--data.drop_empty true) leaves them out" in caplog.messages[0]


def test_a_crowd_without_an_outline_matters_only_where_crowds_are_painted(make_coco: Callable[..., Path]) -> None:
    root = make_coco(lambda made: made["annotations"][3].update(segmentation=[]))
    assert load_coco(root, "val2014")[0]["mask"] is not None
    assert load_coco(root, "val2014", crowd="ignore")[0]["mask"] is None


# ---- Liberties that label tools take.


def every_image(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda made: [image.update(values) for image in made["images"]]


def renamed(change: Callable[[str], str]) -> Callable[[dict[str, Any]], object]:
    return lambda made: [image.update(file_name=change(image["file_name"])) for image in made["images"]]


def text_ids(made: dict[str, Any]) -> None:
    for image in made["images"]:
        image["id"] = f"65f{image['id']}ab"
    for annotation in made["annotations"]:
        annotation["image_id"] = f"65f{annotation['image_id']}ab"


def mixed_ids(made: dict[str, Any]) -> None:
    for category in made["categories"]:
        category["id"] = str(category["id"])
    for place, annotation in enumerate(made["annotations"]):
        annotation["image_id"] = str(annotation["image_id"]) if place % 2 else float(annotation["image_id"])
        annotation["category_id"] = float(annotation["category_id"]) if place % 2 else f" {annotation['category_id']} "


def huge_ids(made: dict[str, Any]) -> None:
    for image in made["images"]:
        image["id"] += 10**20
    for annotation in made["annotations"]:
        annotation["image_id"] += 10**20


def text_sizes(made: dict[str, Any]) -> None:
    for image in made["images"]:
        image.update(width=f"{image['width']}", height=float(image["height"]))


def without_ids(made: dict[str, Any]) -> None:
    for annotation in made["annotations"]:
        del annotation["id"]
        if not annotation["iscrowd"]:
            del annotation["iscrowd"]


def other_form(made: dict[str, Any]) -> None:
    flat = made["annotations"][0]["segmentation"][0]
    made["annotations"][0]["segmentation"] = flat  # a polygon without the list around it
    numbers = made["annotations"][2]["segmentation"][0]
    made["annotations"][2]["segmentation"] = [[[f"{x}", y] for x, y in zip(numbers[::2], numbers[1::2], strict=True)]]
    numbers = made["annotations"][1]["segmentation"][0]
    made["annotations"][1]["segmentation"] = [*zip(numbers[::2], numbers[1::2], strict=True)]


def same_keys_elsewhere(made: dict[str, Any]) -> None:
    made["info"] = {"file_name": "result.json", "category_id": 3, "image_id": 1}
    made["categories"][0]["file_name"] = "icon.png"
    for annotation in made["annotations"]:
        annotation["attributes"] = {"category_id": 3, "image_id": 77, "file_name": "x"}
        annotation["file_name"] = "x.jpg"
    for image in made["images"]:
        image["category_ids"] = []


LIBERTIES = {
    "ids are text": text_ids,
    "ids are mixed": mixed_ids,
    "ids are huge": huge_ids,
    "annotation ids repeat": lambda made: [annotation.update(id=1) for annotation in made["annotations"]],
    "annotations have no ids": without_ids,
    "sizes are missing": lambda made: [image.pop("height") for image in made["images"]],
    "sizes are null": every_image(height=None, width=None),
    "sizes are 0": every_image(height=0, width=0),
    "sizes are -1": every_image(height=-1, width=-1),
    "sizes are text": text_sizes,
    "iscrowd is text": lambda made: [each.update(iscrowd=str(each["iscrowd"])) for each in made["annotations"]],
    "iscrowd is a bool": lambda made: [each.update(iscrowd=bool(each["iscrowd"])) for each in made["annotations"]],
    "iscrowd is null": lambda made: [each.update(iscrowd=None) for each in made["annotations"] if not each["iscrowd"]],
    "polygons in other forms": other_form,
    "a part of two corners": lambda made: made["annotations"][0]["segmentation"].append([1, 1, 5, 5]),
    "keys stand elsewhere too": same_keys_elsewhere,
    "names are of another machine": renamed(lambda name: f"/data/photos/{name}"),
    "names are of Windows": renamed(lambda name: f"..\\..\\media\\{name}"),
    "names have a drive": renamed(lambda name: f"C:\\photos\\{name}"),
    "names have the split": renamed(lambda name: f"./val2014/{name}"),
    "names are URLs": renamed(lambda name: f"https://example.org/data/{name.replace('_', '%5F')}?d=1"),
    "names are in another case": renamed(str.upper),
}


@pytest.mark.parametrize("liberty", LIBERTIES.values(), ids=LIBERTIES)
def test_liberties_of_label_tools_change_neither_labels_nor_masks(
    make_coco: Callable[..., Path], liberty: Callable[[dict[str, Any]], object]
) -> None:
    expected = [open_mask(row["mask"]) for row in load_coco(make_coco(), "val2014", crowd="ignore")]
    dataset = load_coco(make_coco(liberty), "val2014", crowd="ignore")
    assert class_names(dataset) == ["person", "train", "dog"]
    assert dataset["image_id"][:] == [f"COCO_val2014_00000000000{number}" for number in (9, 5, 6)]
    assert dataset["labels"][:] == [[0, 1, 2], [], [1]]
    for row, label_map in zip(dataset, expected, strict=True):
        np.testing.assert_array_equal(open_mask(row["mask"]), label_map)
        assert open_image(row["image"]).size == label_map.shape[::-1]


def test_file_names_are_found_in_either_unicode_form_and_in_subfolders(make_coco: Callable[..., Path]) -> None:
    root = make_coco(second_image(file_name="cafe\u0301.jpg"))
    (root / "val2014/day 1").mkdir()
    (root / "val2014/COCO_val2014_000000000005.jpg").rename(root / "val2014/day 1/caf\u00e9.jpg")
    assert load_coco(root, "val2014")["image_id"][1] == "day 1/caf\u00e9"


def test_a_name_that_fits_several_files_is_not_guessed(make_coco: Callable[..., Path]) -> None:
    root = make_coco(second_image(file_name="0005.jpg"))
    for folder in ("a", "b"):
        (root / "val2014" / folder).mkdir()
        PILImage.new("RGB", (3, 4)).save(root / "val2014" / folder / "0005.jpg")
    with pytest.raises(DataError, match=r"names 0005\.jpg, which is not in"):
        load_coco(root, "val2014")


def test_masks_drawn_on_the_upright_view_are_turned_to_the_stored_pixels(make_coco: Callable[..., Path]) -> None:
    for orientation in (5, 6, 7, 8):
        root = make_coco()
        upright = open_mask(load_coco(root, "val2014", overlap="smaller")[0]["mask"])
        stored = PILImage.new("RGB", (6, 8))
        exif = PILImage.Exif()
        exif[0x0112] = orientation
        stored.save(root / "val2014/COCO_val2014_000000000009.jpg", exif=exif)
        turned = PILImage.fromarray(open_mask(load_coco(root, "val2014", overlap="smaller")[0]["mask"]))
        assert turned.size == (6, 8)
        turned.getexif()[0x0112] = orientation
        np.testing.assert_array_equal(np.asarray(ImageOps.exif_transpose(turned)), upright)


def test_a_root_category_background_and_repeated_names_are_no_classes_of_their_own(
    make_coco: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    def as_roboflow(made: dict[str, Any]) -> None:
        for category in made["categories"]:
            category["supercategory"] = "things"
        made["categories"].append({"id": 0, "name": "things", "supercategory": "none"})

    root = make_coco(as_roboflow)
    dataset = load_coco(root, "val2014")
    assert class_names(dataset) == ["person", "train", "dog"]
    assert "the category 'things' is the one above all others and has no annotation" in caplog.text
    np.testing.assert_array_equal(open_mask(dataset[2]["mask"]), TRAIN)

    def with_background(made: dict[str, Any]) -> None:
        made["categories"] += [{"id": 0, "name": "_background_"}, {"id": 30, "name": "dog "}]
        everywhere = {"image_id": 5, "category_id": 0, "segmentation": rectangle(0, 0, 4, 3)}
        made["annotations"] += [everywhere, {"image_id": 6, "category_id": 30, "segmentation": rectangle(0, 0, 1, 3)}]

    dataset = load_coco(make_coco(with_background), "val2014")
    assert class_names(dataset) == ["person", "train", "dog"]
    assert dataset["labels"][:] == [[0, 1, 2], [], [1, 2]]
    assert not open_mask(dataset[1]["mask"]).any()
    assert open_mask(dataset[2]["mask"]).tolist() == [[DOG] * 3, *[[TRAIN] * 3] * 3]
    assert "the category '_background_' is no object; it is left out of the classes" in caplog.text
    assert "the categories named 'dog' are one class" in caplog.text


def test_of_more_than_254_categories_some_are_chosen(make_coco: Callable[..., Path]) -> None:
    def many(made: dict[str, Any]) -> None:
        made["categories"] += [{"id": number, "name": f"thing {number}"} for number in range(100, 400)]
        made["annotations"][1]["category_id"] = 351  # its label would be 255

    root = make_coco(many)
    with pytest.raises(DataError, match=r"has 303 categories, expected at most 254; choose some .*--data\.classes"):
        load_coco(root, "val2014")
    dataset = load_coco(root, "val2014", classes=["thing 351", "dog"], overlap="ignore")
    assert dataset["labels"][:] == [[1], [], [0]]
    np.testing.assert_array_equal(open_mask(dataset[2]["mask"]), 1)
    assert open_mask(dataset[0]["mask"])[0].tolist() == [2, 2, 255, 0, 0, 0, 0, 0]
    with pytest.raises(DataError, match="has 303 categories, expected at most 254"):
        write_coco_masks(root, "val2014", root / "m")


def test_the_export_of_roboflow_is_a_split(make_coco: Callable[..., Path]) -> None:
    root = make_coco()
    (root / "val2014").rename(root / "valid")
    (root / "annotations/instances_val2014.json").rename(root / "valid/_annotations.coco.json")
    (root / "valid/_annotations.coco.json").write_bytes(
        b"\xef\xbb\xbf" + (root / "valid/_annotations.coco.json").read_bytes()
    )
    assert load_coco(root, "valid")["labels"][:] == [[0, 1, 2], [], [1]]
    write_coco_masks(root, "valid", root / "m")
    assert open_mask(load_coco(root, "valid", masks=root / "m")[2]["mask"]).all()
    with pytest.raises(DataError, match=r"no instances_train\.json, found valid; give the folder"):
        load_coco(root, "train")


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (lambda root: 0, {"split": "train2014"}, r"no instances_train2014\.json, found val2014"),
        (lambda root: 0, {"split": "../val2014"}, "found val2014"),
        (lambda root: 0, {"overlap": "random"}, "overlap must be one of later, smaller, ignore, got 'random'"),
        (lambda root: 0, {"crowd": "255"}, "crowd must be one of background, ignore, object, got '255'"),
        (lambda root: (root / "val2014").rename(root / "x"), {}, "no folder val2014 or images/val2014"),
        (lambda root: (root / "annotations").rename(root / "x"), {}, "found none"),
        (lambda root: (root / "annotations/instances_val2014.json").write_text("{"), {}, "is no valid JSON"),
        (
            lambda root: (root / "annotations/instances_val2014.json").write_text("[]"),
            {},
            "is a list, expected an object with",
        ),
        (lambda root: (root / "annotations/instances_val2014.json").write_bytes(b'{"\xe9'), {}, "is not UTF-8"),
        (
            lambda root: (root / "annotations/instances_val2017.json").write_text("{}"),
            {"split": "val"},
            "holds val2014 and val2017; name the split with its year",
        ),
    ],
)
def test_bad_folders_and_options_are_refused_with_a_reason(
    make_coco: Callable[..., Path], damage: Callable[[Path], object], options: dict[str, Any], message: str
) -> None:
    root = make_coco()
    damage(root)
    with pytest.raises(ValueError, match=message):
        load_coco(root, **{"split": "val2014", **options})


# ---- Real COCO.


def by_pixels(regions: np.ndarray, labels: np.ndarray, is_crowd: np.ndarray, rule: CocoMaskRule) -> np.ndarray:
    """The rule said for each pixel on its own. regions (A, H, W)."""
    objects, crowds = np.flatnonzero(~is_crowd), np.flatnonzero(is_crowd)
    result = np.zeros(regions.shape[1:], dtype=np.uint8)
    if rule.crowd != "background":
        for crowd in crowds:
            result[regions[crowd]] = 255 if rule.crowd == "ignore" else labels[crowd]
    if not len(objects):
        return result
    covered = regions[objects].any(axis=0)
    if rule.overlap == "ignore":
        classes = sorted(set(labels[objects]))
        claims = np.stack([regions[objects[labels[objects] == label]].any(axis=0) for label in classes])
        winner = np.where(claims.sum(axis=0) > 1, 255, np.array(classes)[claims.argmax(axis=0)])
    else:
        rank = objects if rule.overlap == "later" else sorted(objects, key=lambda i: (-regions[i].sum(), i))
        top = len(rank) - 1 - regions[rank][::-1].argmax(axis=0)
        winner = labels[rank][top]
    return np.where(covered, winner, result).astype(np.uint8)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools itself
@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_real_masks_equal_those_of_ann_to_mask_painted_by_the_rule(shared_data: Path, split: str) -> None:
    root = shared_data / "tiny_coco"
    oracle = COCO(root / f"annotations/instances_{split}.json")
    category_ids = sorted(oracle.getCatIds())
    datasets = {rule: load_coco(root, split, overlap=rule.overlap, crowd=rule.crowd) for rule in RULES}
    assert len(datasets[RULES[0]]) == 50
    for index, image_id in enumerate(datasets[RULES[0]]["image_id"]):
        annotations = oracle.loadAnns(oracle.getAnnIds([int(image_id)]))
        size = (oracle.imgs[int(image_id)]["height"], oracle.imgs[int(image_id)]["width"])
        regions = np.array([oracle.annToMask(annotation) == 1 for annotation in annotations]).reshape(-1, *size)
        labels = np.array([category_ids.index(annotation["category_id"]) + 1 for annotation in annotations])
        is_crowd = np.array([annotation["iscrowd"] == 1 for annotation in annotations], dtype=bool)
        for rule in RULES if index % 25 == 0 or is_crowd.any() else RULES[:1]:
            row = datasets[rule][index]
            painted = open_mask(row["mask"], image_size=open_image(row["image"]).size[::-1], num_classes=80)
            np.testing.assert_array_equal(painted, by_pixels(regions, labels, is_crowd, rule))
        assert row["labels"] == sorted({int(label) - 1 for label in labels})


# The annotations of 2017 are a revision of those of 2014: these images have one class more.
REVISED = {574769: {"spoon"}, 60623: {"bowl"}}


@pytest.fixture(scope="module")
def published(shared_data: Path) -> dict[int, list[int]]:
    """Image number -> class ids, of all 122,218 images of 2014 that have a label."""
    labels = read_label_file(shared_data / "lists/cls_labels_coco14.npz", 80)
    return {int(image_id.rpartition("_")[2]): class_ids for image_id, class_ids in labels.items()}


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_real_labels_equal_the_label_matrix_of_2014(
    shared_data: Path, published: dict[int, list[int]], split: str
) -> None:
    assert len(published) == 82_081 + 40_137
    dataset = load_coco(shared_data / "tiny_coco", split, masks=False)
    assert class_names(dataset) == list(COCO_CLASSES)
    for image_id, labels in zip(dataset["image_id"], dataset["labels"], strict=True):
        if not labels:
            assert int(image_id) not in published  # the matrix has the 82,081 + 40,137 images with a label
            continue
        added = {COCO_CLASSES.index(name) for name in REVISED.get(int(image_id), ())}
        assert set(labels) - added == set(published[int(image_id)])
    empty = dataset["labels"][:].count([])
    assert len(load_coco(shared_data / "tiny_coco", split, drop_empty=True)) == 50 - empty
