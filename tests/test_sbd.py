"""SBD's MATLAB files, and a VOC devkit made complete with them."""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import scipy.sparse
from PIL import Image as PILImage

from bitrans_hf.data import DataError, load_voc, mask_rule, open_mask, prepare_voc, require_labels
from bitrans_hf.data.label_files import read_label_file
from bitrans_hf.data.sbd import read_sbd_mask, sbd_folder, sbd_ids
from bitrans_hf.data.transforms import TrainingImages, training_transform
from bitrans_hf.data.voc import SBD_COUNTS, VOC_COUNTS, train_aug_ids
from bitrans_hf.hub.labels import VOC_CLASSES
from bitrans_hf.stages.prepare_voc import main as prepare_voc_main

SIZE = (5, 7)
CAT, DOG = VOC_CLASSES.index("cat") + 1, VOC_CLASSES.index("dog") + 1


def save_mat(path: Path, mask: np.ndarray) -> None:
    """Write a mask as SBD does: one structure GTcls, with a sparse boundary map for each of the 20 classes."""
    boundaries = np.empty((20, 1), dtype=object)
    for class_id in range(20):
        edges = np.zeros(mask.shape, dtype=bool)
        edges[:, 1:] = (mask[:, 1:] == class_id + 1) != (mask[:, :-1] == class_id + 1)
        boundaries[class_id, 0] = scipy.sparse.csc_matrix(edges)
    present = np.setdiff1d(mask, [0]).astype(np.uint8)[:, None]
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"Boundaries": boundaries, "Segmentation": mask, "CategoriesPresent": present}
    scipy.io.savemat(path, {"GTcls": content}, do_compression=True)


def save_png(path: Path, mask: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = PILImage.fromarray(mask)
    image.putpalette([1, 2, 3] * 256)
    image.save(path)


def save_annotation(path: Path, names: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    things = "".join(f"<object><name>{name}</name><difficult>0</difficult></object>" for name in names)
    path.write_text(f"<annotation>{things}</annotation>")


def write_lists(folder: Path, lists: dict[str, Sequence[str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, image_ids in lists.items():
        (folder / f"{name}.txt").write_text("".join(f"{image_id}\n" for image_id in image_ids))


def random_mask(image_id: str) -> np.ndarray:
    return np.random.default_rng(int(image_id)).integers(0, 21, SIZE, dtype=np.uint8)


# VOC: train 1 2, val 3 4, test 9. SBD: train 1 3 5 6, val 4 7. So train_aug is 1 2 5 6 7.
VOC_LISTS = {"train": ["1", "2"], "val": ["3", "4"], "test": ["9"]}
SBD_LISTS = {"train": ["6", "1", "5", "3"], "val": ["7", "4"]}
TRAIN_AUG = ["1", "2", "5", "6", "7"]


@pytest.fixture
def trees(tmp_path: Path) -> tuple[Path, Path]:
    """A devkit and SBD's folder, both as small as they can be, every file in its real format."""
    voc, sbd = tmp_path / "VOCdevkit" / "VOC2012", tmp_path / "benchmark_RELEASE"
    write_lists(voc / "ImageSets/Segmentation", VOC_LISTS)
    write_lists(sbd / "dataset", SBD_LISTS)
    (voc / "JPEGImages").mkdir()
    for image_id in "12345679":
        PILImage.new("RGB", SIZE[::-1]).save(voc / "JPEGImages" / f"{image_id}.jpg")
        if image_id != "9":
            save_annotation(voc / "Annotations" / f"{image_id}.xml", ["dog", "cat", "dog"])
    for image_id in "1234":
        border = random_mask(image_id)
        border[0] = 255
        save_png(voc / "SegmentationClass" / f"{image_id}.png", border)
    for image_id in "134567":
        save_mat(sbd / "dataset/cls" / f"{image_id}.mat", random_mask(image_id))
    return voc, sbd


# ---- SBD alone.


@pytest.mark.parametrize("place", ["", "dataset", ".."])
def test_sbds_lists_and_masks_are_read_from_any_of_its_folders(trees: tuple[Path, Path], place: str) -> None:
    sbd = trees[1] / place
    assert sbd_ids(sbd, "train") == SBD_LISTS["train"]
    np.testing.assert_array_equal(read_sbd_mask(sbd_folder(sbd) / "cls/5.mat"), random_mask("5"))


def mat_bytes(tmp_path: Path, content: dict[str, Any]) -> bytes:
    scipy.io.savemat(tmp_path / "x", content, appendmat=False)
    return (tmp_path / "x").read_bytes()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: b"no MATLAB file", "cannot be read"),
        (lambda folder: mat_bytes(folder, {"GTcls": {"Segmentation": np.eye(3)}})[:200], "cannot be read"),
        (lambda folder: mat_bytes(folder, {"other": 1}), "cannot be read .*structure GTcls"),
        (lambda folder: mat_bytes(folder, {"GTcls": {"Segmentation": np.ones(3)[None, None]}}), r"no GTcls\.Segm"),
        (lambda folder: mat_bytes(folder, {"GTcls": {"Segmentation": "text"}}), r"no GTcls\.Segmentation"),
        (lambda folder: mat_bytes(folder, {"GTcls": {"Segmentation": np.full((2, 2), 21)}}), "holds the id 21"),
        (lambda folder: mat_bytes(folder, {"GTcls": {"Segmentation": np.full((2, 2), 0.5)}}), r"holds the id 0\.5"),
    ],
)
def test_damaged_mat_files_are_refused_by_name(tmp_path: Path, make: Callable[[Path], bytes], message: str) -> None:
    (tmp_path / "5.mat").write_bytes(make(tmp_path))
    with pytest.raises(DataError, match=rf"SBD mask .*5\.mat.*{message}"):
        read_sbd_mask(tmp_path / "5.mat")


def test_a_missing_mat_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"5\.mat is not there"):
        read_sbd_mask(tmp_path / "5.mat")


def test_without_scipy_one_sentence_says_what_to_install(
    trees: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(DataError, match=r"need scipy; run pip install 'bitrans-hf\[sbd\]'"):
        read_sbd_mask(trees[1] / "dataset/cls/5.mat")


# ---- VOC and SBD together.


def test_train_aug_loads_from_the_two_folders_alone(trees: tuple[Path, Path]) -> None:
    voc, sbd = trees
    dataset = load_voc(voc, "train_aug", sbd=sbd, masks=False)
    assert dataset["image_id"][:] == TRAIN_AUG
    assert dataset["labels"][:] == [[CAT - 1, DOG - 1]] * 5
    with pytest.raises(DataError, match="the splits in that folder are: test, train, val; prepare_voc writes"):
        load_voc(voc, "train_aug")


def test_the_test_split_has_neither_labels_nor_masks(trees: tuple[Path, Path]) -> None:
    save_annotation(trees[0] / "Annotations/9.xml", ["person"])  # VOC's person layout task annotates some
    dataset = load_voc(trees[0], "test", drop_empty=True)
    assert dataset[:] == {**dataset[:], "image_id": ["9"], "labels": [None], "mask": [None]}
    with pytest.raises(DataError, match="image labels of 1 of 1 images are not known"):
        require_labels(dataset)
    with pytest.raises(DataError, match="VOC's test split has none"):
        TrainingImages(dataset, training_transform(32, "flip"))


def test_prepared_masks_are_vocs_own_then_sbds(trees: tuple[Path, Path]) -> None:
    voc, sbd = trees
    report = prepare_voc(voc, sbd, partial=True)
    assert (report.masks_written, report.masks_there) == (7, 0)
    assert report.counts == {"train": 2, "val": 2, "test": 1, "sbd_train": 4, "sbd_val": 2, "train_aug": 5}
    assert report.pictures_per_class["dog"] == report.pictures_per_class["cat"] == 7
    assert report.pictures_per_class["person"] == 0
    assert (voc / "ImageSets/Segmentation/train_aug.txt").read_text().split() == TRAIN_AUG
    for image_id in "1234":
        name = f"{image_id}.png"
        assert (voc / "SegmentationClassAug" / name).read_bytes() == (voc / "SegmentationClass" / name).read_bytes()
    dataset = load_voc(voc, "train_aug")
    assert dataset["image_id"][:] == TRAIN_AUG
    for row in dataset:
        expected = random_mask(row["image_id"])
        if row["image_id"] in "12":
            expected[0] = 255
        assert row["mask"].mode == "P"
        np.testing.assert_array_equal(open_mask(row["mask"], image_size=SIZE, num_classes=20), expected)
    assert "SegmentationClassAug" in (mask_rule(dataset) or "")


def test_a_killed_preparation_goes_on_and_keeps_what_is_there(trees: tuple[Path, Path]) -> None:
    voc, sbd = trees

    class Killed(BaseException):
        pass

    def die_after_three(image_ids: Sequence[str], what: str) -> Iterable[str]:
        for number, image_id in enumerate(image_ids):
            if what == "masks" and number == 3:
                raise Killed
            yield image_id

    with pytest.raises(Killed):
        prepare_voc(voc, sbd, partial=True, progress=die_after_three)
    assert not (voc / "ImageSets/Segmentation/train_aug.txt").exists()
    written = {path.name: path.stat().st_mtime_ns for path in (voc / "SegmentationClassAug").iterdir()}
    assert sorted(written) == ["1.png", "2.png", "3.png"]
    report = prepare_voc(voc, sbd, partial=True)
    assert (report.masks_written, report.masks_there) == (4, 3)
    after = {path.name: path.stat().st_mtime_ns for path in (voc / "SegmentationClassAug").iterdir()}
    assert written.items() < after.items()


def test_a_ready_folder_is_only_checked_and_needs_neither_sbd_nor_scipy(
    trees: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    voc, sbd = trees
    prepare_voc(voc, sbd, partial=True)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    report = prepare_voc(voc, partial=True)
    assert (report.masks_written, report.masks_there) == (0, 7)


def test_partial_trees_go_without_the_pictures_that_are_not_there_and_say_so(trees: tuple[Path, Path]) -> None:
    voc, sbd = trees
    (voc / "JPEGImages/6.jpg").unlink()
    text = str(prepare_voc(voc, sbd, partial=True))
    assert load_voc(voc, "train_aug")["image_id"][:] == ["1", "2", "5", "7"]
    assert "PARTIAL: scores on it are not VOC's" in text
    assert "1 images that SBD names are not in" in text
    assert re.search(r"train_aug +4 images of 10,582", text)


def remove(name: str) -> Callable[[Path, Path], object]:
    return lambda voc, sbd: (voc.parent.parent / name).rename(voc.parent / "elsewhere")


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (
            lambda voc, sbd: 0,
            {"partial": False},
            "train has 2 of 1,464, val has 2 of 1,449, test has 1 of 1,456",
        ),
        (lambda voc, sbd: 0, {"sbd": None}, "train_aug.txt is not there and no SBD folder was given"),
        (lambda voc, sbd: 0, {"sbd": "nowhere"}, "nowhere is not a folder; give SBD's folder benchmark_RELEASE"),
        (remove("benchmark_RELEASE/dataset/cls"), {}, "has no folder dataset/cls"),
        (remove("benchmark_RELEASE/dataset/val.txt"), {}, r"val\.txt is not there, expected SBD's lists"),
        (remove("benchmark_RELEASE/dataset/cls/6.mat"), {}, r"SBD mask .*6\.mat is not there"),
        (remove("VOCdevkit/VOC2012/JPEGImages/4.jpg"), {}, r"list val names 4, but .*4\.jpg is not there"),
        (
            remove("VOCdevkit/VOC2012/JPEGImages/6.jpg"),
            {"partial": False},
            "1 images that SBD names .* first 6",
        ),
        (remove("VOCdevkit/VOC2012/Annotations/6.xml"), {}, r"annotation .*6\.xml is not there"),
        (
            lambda voc, sbd: [(voc / f"Annotations/{name}.xml").write_text("<an") for name in "56"],
            {},
            r"annotation .*5\.xml is no valid XML .* \(2 such problems in 7 images\)",
        ),
        (
            lambda voc, sbd: save_mat(sbd / "dataset/cls/6.mat", np.zeros((7, 5), np.uint8)),
            {},
            r"6\.mat is \(7, 5\), its image \(5, 7\)",
        ),
        (
            lambda voc, sbd: save_png(voc / "SegmentationClassAug/6.png", np.zeros((7, 5), np.uint8)),
            {},
            r"mask .*6\.png is 7x5 .* and its image 5x7",
        ),
        (
            lambda voc, sbd: save_png(voc / "SegmentationClass/4.png", np.full(SIZE, 21, np.uint8)),
            {},
            r"mask .*4\.png holds the id 21",
        ),
        (
            lambda voc, sbd: write_lists(voc / "ImageSets/Segmentation", {"train_aug": ["1", "2", "4"]}),
            {},
            "it has 1 other images and lacks 3; delete it",
        ),
    ],
)
def test_bad_trees_are_refused_with_a_reason(
    trees: tuple[Path, Path], damage: Callable[[Path, Path], object], options: dict[str, Any], message: str
) -> None:
    voc, sbd = trees
    damage(voc, sbd)
    with pytest.raises(DataError, match=message):
        prepare_voc(voc, **{"sbd": sbd, "partial": True, **options})


def test_one_bad_file_does_not_cost_the_others(trees: tuple[Path, Path]) -> None:
    voc, sbd = trees
    (sbd / "dataset/cls/5.mat").write_bytes(b"")
    with pytest.raises(DataError, match=r"5\.mat cannot be read"):
        prepare_voc(voc, sbd, partial=True)
    written = sorted(path.stem for path in (voc / "SegmentationClassAug").iterdir())
    assert written == ["1", "2", "3", "4", "6", "7"]
    assert not (voc / "ImageSets/Segmentation/train_aug.txt").exists()


def test_the_script_prints_every_count(trees: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    voc, sbd = trees
    prepare_voc_main(["--voc", str(voc), "--sbd", str(sbd), "--partial", "--quiet"])
    said = capsys.readouterr().out
    assert re.search(r"sbd_train +4 images of 8,498", said)
    assert re.search(r"masks +7 written, 0 there already", said)


# ---- The real lists.


@pytest.fixture(scope="module")
def real_lists(shared_data: Path) -> dict[str, list[str]]:
    names = ("train", "val", "test", "train_aug")
    return {name: (shared_data / "lists" / f"{name}_id.txt").read_text().split() for name in names}


@pytest.fixture(scope="module")
def real_trees(
    real_lists: dict[str, list[str]], shared_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A devkit with the real ids and image labels and no pixels; SBD's lists have their real sizes and overlaps."""
    voc, sbd = (tmp_path_factory.mktemp("real") / name for name in ("VOC2012", "benchmark_RELEASE"))
    write_lists(voc / "ImageSets/Segmentation", {name: real_lists[name] for name in ("train", "val", "test")})
    more = sorted(set(real_lists["train_aug"]) - set(real_lists["train"]))
    overlap = sum(SBD_COUNTS.values()) - len(more)  # SBD's lists share these with VOC's train and val
    pool = [*more, *real_lists["train"][:1200], *real_lists["val"][: overlap - 1200]]
    random.Random(0).shuffle(pool)
    write_lists(sbd / "dataset", {"train": pool[: SBD_COUNTS["train"]], "val": pool[SBD_COUNTS["train"] :]})
    (sbd / "dataset/cls").mkdir()
    for name in ("JPEGImages", "Annotations"):
        (voc / name).mkdir()
    labels = np.load(shared_data / "lists/cls_labels.npy", allow_pickle=True).item()  # an oracle that we trust
    for image_id, row in labels.items():
        (voc / "JPEGImages" / f"{image_id}.jpg").touch()
        save_annotation(voc / "Annotations" / f"{image_id}.xml", [VOC_CLASSES[c] for c in np.flatnonzero(row)[::-1]])
    return voc, sbd


def test_the_rule_gives_exactly_the_list_of_train_aug(
    real_lists: dict[str, list[str]], real_trees: tuple[Path, Path]
) -> None:
    assert {name: len(image_ids) for name, image_ids in real_lists.items()} == VOC_COUNTS
    assert train_aug_ids(*real_trees) == real_lists["train_aug"]


@pytest.mark.parametrize("split", ["train", "val", "train_aug"])
def test_ids_and_labels_of_whole_splits_are_exactly_the_published_ones(
    split: str, real_lists: dict[str, list[str]], real_trees: tuple[Path, Path], shared_data: Path
) -> None:
    voc, sbd = real_trees
    dataset = load_voc(voc, split, sbd=sbd, masks=False)
    assert dataset["image_id"][:] == real_lists[split]
    published = read_label_file(shared_data / "lists/cls_labels.npy", 20)
    assert dataset["labels"][:] == [published[image_id] for image_id in real_lists[split]]


def test_real_masks_survive_the_way_through_a_mat_file(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "voc12_animals" / "SegmentationClassAug"
    for path in sorted(source.iterdir())[::400]:
        mask = open_mask(path)
        mask[mask == 255] = 0
        save_mat(tmp_path / "x.mat", mask)
        np.testing.assert_array_equal(read_sbd_mask(tmp_path / "x.mat"), mask)
