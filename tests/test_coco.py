from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Image
from PIL import Image as PILImage
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
from bitrans_hf.data.coco import CROWDS, OVERLAPS
from bitrans_hf.data.label_files import read_label_file
from bitrans_hf.labels import COCO_CLASSES

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from prepare_coco import main as prepare_coco_main
from recipe import DataRecipe, load_images

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


# ---- Bad input.


def first_annotation(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda made: made["annotations"][0].update(values)


def second_image(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda made: made["images"][1].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda made: made.pop("categories"), "lacks a part .*categories"),
        (lambda made: made.pop("annotations"), "lacks a part .*annotations"),
        (lambda made: made["images"][0].pop("height"), "lacks a part .*height"),
        (lambda made: made["annotations"][0].pop("image_id"), "lacks a part .*image_id"),
        (lambda made: made.update(images=[], annotations=[]), "names no image"),
        (lambda made: made.update(categories=[]), "names no category"),
        (lambda made: made["categories"][0].update(name="dog"), "names no category, or one twice"),
        (first_annotation(category_id=2), "annotation 1, has the category 2, which is not in its categories"),
        (first_annotation(image_id=8), "annotation 1, is of image 8, which is not there"),
        (second_image(id=9), "holds the image 9 .* twice"),
        (second_image(file_name="COCO_val2014_000000000009.png"), "twice, expected each once"),
        (second_image(file_name="../secret.jpg"), r"image 5, names '\.\./secret\.jpg', which leads out"),
        (second_image(file_name="gone.jpg"), r"names gone\.jpg, which is not in .*val2014 \(1 of 3 images"),
    ],
)
def test_bad_files_are_refused_with_a_reason(
    make_coco: Callable[..., Path], change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load_coco(make_coco(change), "val2014")


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ("", "annotation 1, has a segmentation that cannot be read"),
        (None, "annotation 1, has a segmentation that cannot be read"),
        ([], "annotation 1, has a segmentation that cannot be read"),
        ([[1, 2]], "annotation 1, has a segmentation that cannot be read"),
        ({"counts": ["a"], "size": [6, 8]}, "annotation 1, has a segmentation that cannot be read"),
        (
            {"counts": [0, 48], "size": [8, 6]},
            r"annotation 1, is \(8, 6\), its image \(6, 8\)",
        ),
    ],
)
def test_damaged_segmentations_are_refused_when_they_are_painted(
    make_coco: Callable[..., Path], segmentation: Any, message: str
) -> None:
    dataset = load_coco(make_coco(first_annotation(segmentation=segmentation)), "val2014")
    with pytest.raises(DataError, match=message):
        open_mask(dataset[0]["mask"])


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
        (lambda root: (root / "annotations/instances_val2014.json").write_text("[]"), {}, "lacks a part"),
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


def test_without_pycocotools_labels_load_and_masks_say_what_to_install(
    make_coco: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    dataset = load_coco(make_coco(), "val2014")
    assert dataset["labels"][:] == [[0, 1, 2], [], [1]]
    with pytest.raises(DataError, match=r"need pycocotools; run pip install 'bitrans-hf\[coco\]'"):
        open_mask(dataset[0]["mask"])


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
