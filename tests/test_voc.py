from __future__ import annotations

import logging
import os
import pickle
import pickletools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from bitrans_hf.data import DataError, class_names, load_voc, open_image, open_mask
from bitrans_hf.data.label_files import read_label_file
from bitrans_hf.hub.labels import VOC_CLASSES

CAT, DOG, PERSON = (VOC_CLASSES.index(name) for name in ("cat", "dog", "person"))

# image id -> names of its objects
OBJECTS: dict[str, list[str]] = {
    "2007_000001": ["dog", "person", "dog"],
    "2007_000002": ["cat"],
    "2007_000003": ["person"],
}


def annotation(objects: Sequence[str]) -> str:
    """An annotation as VOC writes it: parts of a body are named too, and some objects are marked difficult."""
    things = "".join(
        f"<object><name>{name}</name><difficult>{number % 2}</difficult>"
        "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part></object>"
        for number, name in enumerate(objects, start=1)
    )
    return f"<annotation><folder>VOC2012</folder><source><name>x</name></source>{things}</annotation>"


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    """A devkit folder with three images, annotations, and a mask for two of them."""
    root = tmp_path / "VOC2012"
    for name in ("JPEGImages", "Annotations", "ImageSets/Segmentation", "SegmentationClass", "SegmentationClassAug"):
        (root / name).mkdir(parents=True)
    for image_id, objects in OBJECTS.items():
        PILImage.new("RGB", (6, 4)).save(root / "JPEGImages" / f"{image_id}.jpg")
        (root / "Annotations" / f"{image_id}.xml").write_text(annotation(objects))
    (root / "ImageSets/Segmentation/train.txt").write_text("\n".join(OBJECTS) + "\n")
    save_mask(root / "SegmentationClass/2007_000001.png", [0, DOG + 1, PERSON + 1, 255])
    save_mask(root / "SegmentationClassAug/2007_000001.png", [0, DOG + 1, PERSON + 1, 0])
    save_mask(root / "SegmentationClassAug/2007_000002.png", [CAT + 1, 0, 0, 0])
    return root


def save_mask(path: Path, row: list[int]) -> None:
    image = PILImage.fromarray(np.array([row], dtype=np.uint8))
    image.putpalette([1, 2, 3] * 256)
    image.save(path)


# ---- Labels, masks, classes.


@pytest.mark.parametrize("above", [False, True])
def test_image_labels_are_the_classes_of_all_objects(devkit: Path, above: bool) -> None:
    dataset = load_voc(devkit.parent if above else devkit, "train")
    assert class_names(dataset) == list(VOC_CLASSES)
    assert dataset["image_id"][:] == list(OBJECTS)
    assert dataset["labels"][:] == [[DOG, PERSON], [CAT], [PERSON]]
    assert open_image(dataset[0]["image"]).size == (6, 4)


def test_names_in_another_case_or_name_space_are_vocs_classes(devkit: Path) -> None:
    other = annotation([" Dog ", "PERSON"]).replace("<annotation>", '<annotation xmlns="http://example.org/voc">')
    (devkit / "Annotations/2007_000002.xml").write_text(other, encoding="utf-8-sig")
    assert load_voc(devkit, "train")["labels"][1] == [DOG, PERSON]


def test_vocs_own_masks_come_before_merged_ones(devkit: Path) -> None:
    dataset = load_voc(devkit, "train")
    assert open_mask(dataset[0]["mask"]).tolist() == [[0, DOG + 1, PERSON + 1, 255]]
    assert open_mask(dataset[1]["mask"]).tolist() == [[CAT + 1, 0, 0, 0]]
    assert dataset[2]["mask"] is None


def test_chosen_classes_get_new_ids_in_labels_and_masks(devkit: Path) -> None:
    dataset = load_voc(devkit, "train", classes=["dog", "cat"])
    assert class_names(dataset) == ["dog", "cat"]
    assert dataset["labels"][:] == [[0], [1], []]
    assert np.array(dataset[0]["mask"]).tolist() == [[0, 1, 0, 255]]
    assert open_mask(dataset[1]["mask"]).tolist() == [[2, 0, 0, 0]]
    assert dataset[2]["mask"] is None


def test_masks_stay_paths_while_their_ids_stay(devkit: Path) -> None:
    cells = load_voc(devkit, "train", classes=list(VOC_CLASSES)).with_format("arrow")["mask"][:].to_pylist()
    assert cells[0] == {"bytes": None, "path": str(devkit / "SegmentationClass/2007_000001.png")}


def test_images_without_any_chosen_class_can_be_left_out(devkit: Path) -> None:
    dataset = load_voc(devkit, "train", classes=["dog", "cat"], drop_empty=True)
    assert dataset["image_id"][:] == ["2007_000001", "2007_000002"]
    with pytest.raises(DataError, match="no image of train shows any of boat"):
        load_voc(devkit, "train", classes=["boat"], drop_empty=True)


def test_without_masks_no_mask_file_is_touched(devkit: Path) -> None:
    for folder in ("SegmentationClass", "SegmentationClassAug"):
        for file in (devkit / folder).iterdir():
            file.write_bytes(b"reading this would fail")
    dataset = load_voc(devkit, "train", classes=["dog"], masks=False)
    assert dataset["mask"][:] == [None, None, None]


def test_labels_from_masks_are_said_aloud(devkit: Path, caplog: pytest.LogCaptureFixture) -> None:
    (devkit / "Annotations").rename(devkit / "elsewhere")
    (devkit / "ImageSets/Segmentation/two.txt").write_text("2007_000002\n2007_000001\n")
    with caplog.at_level(logging.WARNING):
        dataset = load_voc(devkit, "two")
    assert dataset["labels"][:] == [[CAT], [DOG, PERSON]]
    assert "labels of 2 images are taken from their masks" in caplog.text


def test_a_given_label_file_comes_before_annotations(devkit: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = {image_id: np.eye(20, dtype=np.float32)[number] for number, image_id in enumerate(OBJECTS)}
    np.save(devkit / "labels.npy", rows)
    assert load_voc(devkit, "train", label_file=devkit / "labels.npy")["labels"][:] == [[0], [1], [2]]
    assert not caplog.records


# ---- Bad input.


def remove(name: str) -> Callable[[Path], object]:
    return lambda root: (root / name).rename(root / "elsewhere")


def write(name: str, content: str) -> Callable[[Path], object]:
    return lambda root: (root / name).write_text(content)


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (remove("JPEGImages"), {}, "VOC2012 has no folder JPEGImages"),
        (remove("ImageSets"), {}, r"list .*train\.txt is not there; the splits in that folder are: none"),
        (write("x", ""), {"split": "val"}, r"val\.txt is not there; .* are: train"),
        (write("ImageSets/Segmentation/train.txt", "\n"), {}, r"train\.txt is empty"),
        (write("ImageSets/Segmentation/train.txt", "a\na\n"), {}, "'a' twice"),
        (write("ImageSets/Segmentation/train.txt", "2007_000001 1\n"), {}, "'2007_000001 1' which is no id"),
        (write("ImageSets/Segmentation/train.txt", "../../x\n"), {}, "'../../x' which is no id"),
        (remove("JPEGImages/2007_000002.jpg"), {}, r"2007_000002\.jpg is not there \(1 of 3 images are missing\)"),
        (remove("Annotations/2007_000003.xml"), {}, r"annotation .*2007_000003\.xml is not there"),
        (write("Annotations/2007_000003.xml", "<annotation><obj"), {}, r"2007_000003\.xml is no valid XML"),
        (write("Annotations/2007_000003.xml", annotation(["dgo"])), {}, r"000003\.xml names the class 'dgo'.*'dog'"),
        (write("Annotations/2007_000003.xml", annotation([" "])), {}, r"000003\.xml has an object without a name"),
        (remove("Annotations"), {}, "image 2007_000003 has neither an annotation nor a mask"),
        (remove("Annotations"), {"masks": False}, "masks=False forbids .* pass label_file="),
        (write("x", ""), {"classes": ["dog", "unicorn"]}, "class 'unicorn' is not in the VOC classes"),
        (write("x", ""), {"classes": ["dog", "dog"]}, "names 'dog' more than once"),
        (write("SegmentationClass/2007_000001.png", "no png"), {"classes": ["dog"]}, r"mask .*000001\.png cannot be"),
        (
            lambda root: save_mask(root / "SegmentationClass/2007_000001.png", [0, 21]),
            {"classes": ["dog"]},
            r"000001\.png holds the id 21, expected .* 1 to 20",
        ),
        (write("x", ""), {"label_file": "nowhere.npy"}, r"label file nowhere\.npy is not there"),
    ],
)
def test_bad_input_is_refused_with_a_reason(
    devkit: Path, damage: Callable[[Path], object], options: dict[str, Any], message: str
) -> None:
    damage(devkit)
    with pytest.raises(DataError, match=message):
        load_voc(devkit, **{"split": "train", **options})


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere is not a folder"):
        load_voc(tmp_path / "nowhere", "train")


def test_a_label_file_must_know_every_image(devkit: Path) -> None:
    np.save(devkit / "labels.npy", {"2007_000001": np.zeros(20)})
    with pytest.raises(DataError, match=r"no labels for 2007_000002 \(2 of 3 images\)"):
        load_voc(devkit, "train", label_file=devkit / "labels.npy")


# ---- Label files: what others pickle, and what nobody should run.


def as_npy(content: bytes) -> bytes:
    """Put a pickle behind the header that np.save writes for an object."""
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (), }"
    header += b" " * (117 - len(header)) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("dtype", ["<f4", ">f8", "u1", "<i8", "?", "<f2"])
def test_numbers_survive_every_protocol_and_type(tmp_path: Path, protocol: int, dtype: str) -> None:
    rows = {"b": np.array([0, 1, 1], dtype=dtype), "a": np.array([0, 0, 0], dtype=dtype), "list": [1, 0, 0]}
    (tmp_path / "labels.npy").write_bytes(as_npy(pickle.dumps(np.array(rows, dtype=object), protocol)))
    assert read_label_file(tmp_path / "labels.npy", 3) == {"b": [1, 2], "a": [], "list": [0]}


def test_a_dict_that_was_pickled_without_numpy_is_read_too(tmp_path: Path) -> None:
    rows = {"a": np.array([0, 1, 1], dtype=np.float32), "b": [1, 0, 0]}
    (tmp_path / "labels.pkl").write_bytes(pickle.dumps(rows))
    assert read_label_file(tmp_path / "labels.pkl", 3) == {"a": [1, 2], "b": [0]}


def test_fortran_order_is_undone(tmp_path: Path) -> None:
    rows = {"a": np.asfortranarray([[0, 1], [1, 1]])}
    np.save(tmp_path / "labels.npy", rows)
    with pytest.raises(DataError, match=r"int64 of shape \(2, 2\) for image 'a', expected 3 numbers"):
        read_label_file(tmp_path / "labels.npy", 3)


@pytest.mark.parametrize("name", ["labels.npy", "labels.pkl"])
@pytest.mark.parametrize(
    "hostile",
    [
        lambda mark: Calls(os.mkdir, mark),
        lambda mark: Calls(eval, f"__import__('os').mkdir({mark!r})"),
        lambda mark: {"2007_000001": Calls(os.mkdir, mark)},
        lambda mark: Calls(getattr, dict, "fromkeys"),
        lambda mark: np.array({"a": Calls(os.mkdir, mark)}, dtype=object),
        lambda mark: Calls(np.dtype, "V8"),
        lambda mark: Calls(Path, mark),
    ],
    ids=["call", "eval", "in a dict", "getattr", "in an array", "dtype of no number", "class"],
)
def test_a_hostile_pickle_is_refused_and_not_run(tmp_path: Path, name: str, hostile: Callable[[str], object]) -> None:
    mark = tmp_path / "it ran"
    content = pickle.dumps(hostile(str(mark)))
    (tmp_path / name).write_bytes(as_npy(content) if name.endswith(".npy") else content)
    with pytest.raises(DataError, match=rf"{name} was refused"):
        read_label_file(tmp_path / name, 20)
    assert not mark.exists()


def test_a_pickle_cannot_change_the_unpickler(tmp_path: Path) -> None:
    """BUILD with (None, {name: value}) sets attributes of whatever lies on the stack, classes too."""
    content = b"cnumpy\ndtype\n(N}X\x04\x00\x00\x00evilK\x01stb."
    assert any(opcode.name == "BUILD" for opcode, _, _ in pickletools.genops(content))
    (tmp_path / "labels.npy").write_bytes(as_npy(content))
    with pytest.raises(DataError, match=r"labels\.npy was refused"):
        read_label_file(tmp_path / "labels.npy", 20)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no npy", "was refused"),
        (as_npy(b""), "was refused"),
        (as_npy(pickle.dumps({"a": np.zeros(20)})[:-30]), "was refused"),
        (as_npy(pickle.dumps([1, 2])), "holds a list, expected a dict"),
        (as_npy(pickle.dumps({3: np.zeros(20)})), "holds a dict, expected a dict from image id"),
        (as_npy(pickle.dumps({"a": np.full(20, 0.5)})), "expected 20 numbers that are 0 or 1"),
        (as_npy(pickle.dumps({"a": np.zeros(80)})), r"shape \(80,\) for image 'a'.* label file of another data set"),
        (as_npy(pickle.dumps({"a": np.array(["x", 1], dtype=object)})), "array of objects"),
    ],
)
def test_label_files_that_are_none_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "labels.npy").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_label_file(tmp_path / "labels.npy", 20)


def test_plain_arrays_and_other_files_are_no_label_files(tmp_path: Path) -> None:
    np.save(tmp_path / "labels.npy", np.zeros((2, 20)))
    with pytest.raises(DataError, match=r"float64 of shape \(2, 20\), expected one dict"):
        read_label_file(tmp_path / "labels.npy", 20)
    (tmp_path / "labels.txt").touch()
    with pytest.raises(DataError, match=r"ends in '\.txt', expected \.npy, \.pkl or \.npz"):
        read_label_file(tmp_path / "labels.txt", 20)


@pytest.mark.parametrize("packed", [False, True])
def test_npz_label_files_hold_rows_of_zeros_and_ones(tmp_path: Path, packed: bool) -> None:
    rows = np.random.default_rng(0).integers(0, 2, (5, 20)).astype(np.uint8)
    labels = np.packbits(rows, axis=1) if packed else rows
    np.savez(tmp_path / "labels.npz", ids=np.array(list("abcde")), labels=labels)
    expected = {name: [c for c in range(20) if row[c]] for name, row in zip("abcde", rows, strict=True)}
    assert read_label_file(tmp_path / "labels.npz", 20) == expected


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"ids": np.array(["a"])}, r"cannot be read .*expected a \.npz with 'ids' and 'labels'"),
        ({"ids": np.array(["a"]), "labels": np.zeros((2, 20))}, "1 ids for 2 rows"),
        ({"ids": np.array(["a"]), "labels": np.array([{}], dtype=object)}, "cannot be read"),
    ],
)
def test_npz_files_that_do_not_fit_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "labels.npz", **arrays)
    with pytest.raises(DataError, match=message):
        read_label_file(tmp_path / "labels.npz", 20)


# ---- Real VOC.


def test_the_restricted_reader_agrees_with_numpys_own(shared_data: Path) -> None:
    path = shared_data / "lists" / "cls_labels.npy"
    oracle = np.load(path, allow_pickle=True).item()
    labels = read_label_file(path, 20)
    assert len(labels) == len(oracle) == 12031
    for image_id, row in oracle.items():
        assert labels[image_id] == [class_id for class_id in range(20) if row[class_id] == 1]


@pytest.mark.parametrize(("split", "size"), [("train", 437), ("val", 222), ("train_aug", 3131)])
def test_real_voc_splits_load_in_the_order_of_their_lists(shared_data: Path, split: str, size: int) -> None:
    root = shared_data / "voc12_animals"
    dataset = load_voc(root, split, label_file=shared_data / "lists" / "cls_labels.npy")
    assert dataset["image_id"][:] == (root / f"ImageSets/Segmentation/{split}.txt").read_text().split()
    assert len(dataset) == size


def test_real_masks_are_renumbered_as_a_slow_loop_does(shared_data: Path) -> None:
    root = shared_data / "voc12_animals"
    chosen = ["horse", "cat", "dog"]
    label_file = shared_data / "lists" / "cls_labels.npy"
    oracle = np.load(label_file, allow_pickle=True).item()
    dataset = load_voc(root, "val", classes=chosen, label_file=label_file)
    for row in dataset:
        present = [VOC_CLASSES[class_id] for class_id in np.flatnonzero(oracle[row["image_id"]])]
        assert row["labels"] == sorted(chosen.index(name) for name in present if name in chosen)
    for index in range(0, len(dataset), 25):
        row = dataset[index]
        with PILImage.open(root / "SegmentationClassAug" / f"{row['image_id']}.png") as image:
            before = np.array(image)
        expected = np.zeros_like(before)
        for label in np.unique(before):
            if label == 255:
                expected[before == label] = 255
            elif label > 0 and VOC_CLASSES[label - 1] in chosen:
                expected[before == label] = chosen.index(VOC_CLASSES[label - 1]) + 1
        np.testing.assert_array_equal(open_mask(row["mask"], num_classes=3), expected)


def test_labels_from_real_masks_agree_with_the_annotations(
    shared_data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = load_voc(shared_data / "voc12_animals", "val")
    assert "taken from their masks" in caplog.text
    oracle = np.load(shared_data / "lists" / "cls_labels.npy", allow_pickle=True).item()
    for image_id, labels in zip(dataset["image_id"], dataset["labels"], strict=True):
        assert labels == np.flatnonzero(oracle[image_id]).tolist()
