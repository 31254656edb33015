from __future__ import annotations

import csv
import io
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel, Features, Image, Value, load_dataset
from datasets import Sequence as List
from PIL import Image as PILImage

from bitrans_hf.data import (
    DataError,
    UnreadableImageError,
    check_folder,
    class_names,
    colors_to_ids,
    load_folder,
    open_image,
    open_mask,
)
from bitrans_hf.data.folder import note_on_contrast

MakeFolder = Callable[..., Path]

EVERY_IMAGE_SHOWS_THE_CAT = (
    "every image shows 'cat', so that training cannot tell it from what surrounds it; add images that do not show it."
)


def save_picture(path: Path, size: tuple[int, int] = (24, 18)) -> None:
    """Write an image of (height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((*size, 3), 100, dtype=np.uint8)
    pixels[:, -1] = 200  # a constant image would be remarked upon
    PILImage.fromarray(pixels).save(path)


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Write `images/` with the named images, a table and `classes.txt`; return the folder."""

    def make(
        table: str | bytes | None = "file_name,labels\na.png,cat\nb.png,cat;dog\n",
        name: str = "labels.csv",
        pictures: tuple[str, ...] = ("a.png", "b.png"),
        classes: str | None = None,
    ) -> Path:
        (tmp_path / "images").mkdir()
        for picture in pictures:
            save_picture(tmp_path / "images" / picture)
        if table is not None:
            (tmp_path / name).write_bytes(table.encode() if isinstance(table, str) else table)
        if classes is not None:
            (tmp_path / "classes.txt").write_text(classes)
        return tmp_path

    return make


def names_of(dataset: Any) -> list[list[str]]:
    names = class_names(dataset)
    return [[names[class_id] for class_id in ids] for ids in dataset["labels"]]


# ---- Tables.


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("labels.csv", "file_name,labels\na.png,cat\nb.png,dog;cat\n"),
        ("labels.csv", "\ufefffile_name,labels\r\na.png,cat\r\n\r\nb.png, dog | cat \r\n"),
        ("metadata.csv", 'labels,file_name\ncat,a.png\n"dog,cat",b.png\n'),
        ("labels.csv", "file_name;labels\na.png;cat\nb.png;dog,cat\n"),
        ("labels.csv", "file_name\tlabels\na.png\tcat\nb.png\tdog;cat;dog\n"),
        ("labels.csv", "file_name,cat,dog\na.png,1,0\nb.png,1.0,true\n"),
        ("labels.jsonl", '{"file_name": "a.png", "labels": ["cat"]}\n\n{"file_name": "b.png", "labels": "dog;cat"}\n'),
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "cat": 1, "dog": 0}\n{"file_name": "b.png", "cat": true, "dog": 1}',
        ),
    ],
)
def test_every_way_of_writing_the_table_gives_the_same_rows(make_folder: MakeFolder, name: str, table: str) -> None:
    dataset = load_folder(make_folder(table, name))
    assert class_names(dataset) == ["cat", "dog"]
    assert dataset["image_id"][:] == ["a", "b"]
    assert dataset["labels"][:] == [[0], [0, 1]]
    assert dataset["mask"][:] == [None, None]


@pytest.mark.parametrize("columns", [{"labels": [["cat"], ["dog", "cat"]]}, {"cat": [1, 1], "dog": [0, 1]}])
def test_parquet_tables_are_read(make_folder: MakeFolder, columns: dict[str, Any]) -> None:
    root = make_folder(table=None)
    pd.DataFrame({"file_name": ["a.png", "b.png"], **columns}).to_parquet(root / "labels.parquet")
    assert load_folder(root)["labels"][:] == [[0], [0, 1]]


def test_the_columns_have_the_types_every_loader_gives(make_folder: MakeFolder) -> None:
    features = load_folder(make_folder()).features
    assert features["image"] == Image(decode=False)
    assert features["mask"] == Image()
    assert isinstance(features["labels"], List)


@pytest.mark.parametrize(
    ("classes_txt", "argument", "expected"),
    [
        (None, None, ["cat", "dog"]),
        ("dog\n\n cat \n", None, ["dog", "cat"]),
        (None, ["dog", "cow", "cat"], ["dog", "cow", "cat"]),
        ("cat\ncow\ndog\n", ["dog", "cat"], ["dog", "cat"]),
    ],
)
def test_class_order_comes_from_the_argument_then_the_file_then_the_alphabet(
    make_folder: MakeFolder, classes_txt: str | None, argument: list[str] | None, expected: list[str]
) -> None:
    dataset = load_folder(make_folder(classes=classes_txt), classes=argument)
    assert class_names(dataset) == expected
    assert [sorted(names) for names in names_of(dataset)] == [["cat"], ["cat", "dog"]]


def test_class_names_that_hold_a_separator_are_not_cut(make_folder: MakeFolder) -> None:
    table = 'file_name,labels\na.png,"cat, black"\nb.png,"cat, black;dog"\n'
    root = make_folder(table)
    assert names_of(load_folder(root, separator=";")) == [["cat, black"], ["cat, black", "dog"]]
    (root / "labels.csv").write_text('file_name,labels\na.png,"cat, black"\nb.png,dog\n')
    assert names_of(load_folder(root, classes=["cat, black", "dog"])) == [["cat, black"], ["dog"]]


def test_splits_share_their_class_ids(make_folder: MakeFolder) -> None:
    root = make_folder("file_name,labels,split\na.png,dog,train\nb.png,cat,val\n")
    train, val = load_folder(root, split="train"), load_folder(root, split="val")
    assert train["image_id"][:] == ["a"]
    assert val["image_id"][:] == ["b"]
    assert class_names(train) == class_names(val) == ["cat", "dog"]
    assert train["labels"][:] == [[1]]


def test_pictures_in_subfolders_and_beside_the_table_are_found(tmp_path: Path) -> None:
    save_picture(tmp_path / "north" / "a.b.png")
    save_picture(tmp_path / "south" / "a.b.png")
    table = "file_name,labels\nnorth/a.b.png,cat\nsouth\\a.b.png,dog\n"
    (tmp_path / "metadata.csv").write_text(table)
    dataset = load_folder(tmp_path)
    assert dataset["image_id"][:] == ["north/a.b", "south/a.b"]
    assert open_image(dataset[1]["image"]).size == (18, 24)


def test_pictures_without_a_row_are_counted_in_the_log(
    make_folder: MakeFolder, caplog: pytest.LogCaptureFixture
) -> None:
    root = make_folder(pictures=("a.png", "b.png", "c.png", "d.JPG"))
    (root / "images" / "notes.txt").write_text("no image")
    with caplog.at_level(logging.WARNING):
        assert len(load_folder(root)) == 2
    assert "2 images in" in caplog.text
    assert "c.png, d.JPG" in caplog.text


def test_pictures_are_not_opened_while_loading(make_folder: MakeFolder) -> None:
    root = make_folder()
    (root / "images" / "b.png").write_bytes(b"no image at all")
    dataset = load_folder(root)
    with pytest.raises(UnreadableImageError, match=r"image .*b\.png cannot be read"):
        open_image(dataset[1]["image"])


def test_rows_without_a_class_are_kept_when_asked_for(make_folder: MakeFolder) -> None:
    root = make_folder("file_name,labels\na.png,\nb.png,dog\n")
    assert load_folder(root, allow_empty=True)["labels"][:] == [[], [0]]


# ---- Masks.


def test_masks_are_found_by_the_name_of_the_picture(make_folder: MakeFolder, caplog: pytest.LogCaptureFixture) -> None:
    root = make_folder()
    (root / "masks").mkdir()
    label_map = np.array([[0, 1, 2], [255, 0, 1]], dtype=np.uint8)
    PILImage.fromarray(label_map).save(root / "masks" / "b.png")
    with caplog.at_level(logging.WARNING):
        dataset = load_folder(root)
    assert "1 of 2 images have no mask" in caplog.text
    assert dataset[0]["mask"] is None
    np.testing.assert_array_equal(open_mask(dataset[1]["mask"]), label_map)
    assert load_folder(root, masks=False)["mask"][:] == [None, None]


def test_masks_follow_classes_in_another_order(make_folder: MakeFolder) -> None:
    root = make_folder(classes="cat\ncow\ndog\n")
    (root / "masks").mkdir()
    PILImage.fromarray(np.array([[0, 1, 2, 3, 255]], dtype=np.uint8)).save(root / "masks" / "b.png")
    dataset = load_folder(root, classes=["dog", "cat"])
    np.testing.assert_array_equal(open_mask(dataset[1]["mask"]), [[0, 2, 0, 1, 255]])
    np.testing.assert_array_equal(np.array(dataset[1]["mask"]), [[0, 2, 0, 1, 255]])


@pytest.mark.parametrize("mode", ["P", "L", "I;16", "1"])
def test_masks_of_every_index_mode_open_as_label_ids(tmp_path: Path, mode: str) -> None:
    ids = np.array([[0, 1, 1], [1, 0, 0]])
    if mode == "1":
        image = PILImage.fromarray(ids.astype(bool))
    else:
        image = PILImage.fromarray(ids.astype(np.uint16 if mode == "I;16" else np.uint8))
    if mode == "P":
        image.putpalette([7, 8, 9] * 256)
    image.save(tmp_path / "mask.png")
    opened = open_mask({"path": str(tmp_path / "mask.png"), "bytes": None})
    assert opened.dtype == np.uint8
    np.testing.assert_array_equal(opened, ids)


@pytest.mark.parametrize(
    ("pixels", "options", "message"),
    [
        (np.zeros((4, 6), np.uint8), {"image_size": (6, 4)}, r"mask .*m\.png is 4x6 .* and its image 6x4"),
        (np.full((2, 2), 3, np.uint8), {"num_classes": 2}, r"mask .*m\.png holds the id 3, expected .* 1 to 2"),
        (np.full((2, 2), 300, np.uint16), {}, "holds the id 300"),
        (np.eye(3, dtype=np.uint8)[None] * 9, {}, "is a RGB image .* 0/0/9, 0/9/0, .* expected a palette or gray"),
    ],
)
def test_masks_that_do_not_fit_are_refused(
    tmp_path: Path, pixels: np.ndarray, options: dict[str, Any], message: str
) -> None:
    PILImage.fromarray(pixels).save(tmp_path / "m.png")
    with pytest.raises(DataError, match=message):
        open_mask(tmp_path / "m.png", **options)


def test_border_pixels_are_no_ids_out_of_range(tmp_path: Path) -> None:
    PILImage.fromarray(np.array([[0, 2, 255]], np.uint8)).save(tmp_path / "m.png")
    assert open_mask(tmp_path / "m.png", image_size=(1, 3), num_classes=2).tolist() == [[0, 2, 255]]


def test_a_mask_with_ids_beyond_the_class_file_is_refused_before_it_is_renumbered(make_folder: MakeFolder) -> None:
    root = make_folder(classes="cat\ncow\ndog\n")
    (root / "masks").mkdir()
    PILImage.fromarray(np.array([[4]], dtype=np.uint8)).save(root / "masks" / "b.png")
    with pytest.raises(DataError, match=r"b\.png holds the id 4"):
        load_folder(root, classes=["dog", "cat"])


# ---- Images.


def test_stored_pixels_are_opened_without_exif_rotation(tmp_path: Path) -> None:
    image = PILImage.new("RGB", (30, 20))
    exif = image.getexif()
    exif[0x0112] = 6  # turn by 90 degrees for display
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image({"path": str(tmp_path / "turned.jpg"), "bytes": None}).size == (30, 20)


@pytest.mark.parametrize("mode", ["RGB", "1", "L", "P", "RGBA", "CMYK", "I;16"])
def test_pictures_of_every_mode_open_as_rgb_and_outlive_their_file(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "picture.tif"
    PILImage.new(mode, (5, 4)).save(path)
    image = open_image({"path": str(path), "bytes": None})
    path.unlink()
    assert (image.mode, np.asarray(image).shape) == ("RGB", (4, 5, 3))


@pytest.mark.parametrize("form", ["path", "cell", "bytes"])
def test_truncated_pictures_are_named(tmp_path: Path, form: str) -> None:
    path = tmp_path / "cut.jpg"
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    PILImage.fromarray(pixels).save(path)
    content = path.read_bytes()[:-500]
    path.write_bytes(content)
    cell = {
        "path": path,
        "cell": {"path": str(path), "bytes": None},
        "bytes": {"path": "cut.jpg", "bytes": content},
    }[form]
    with pytest.raises(UnreadableImageError, match=r"cut\.jpg cannot be read .*truncated"):
        open_image(cell)


def test_a_pil_image_that_turns_out_truncated_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    PILImage.new("RGB", (64, 64)).save(path)
    path.write_bytes(path.read_bytes()[:60])
    with PILImage.open(path) as image, pytest.raises(UnreadableImageError, match=r"cut\.png cannot be read"):
        open_image(image)


def test_a_picture_that_has_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImageError, match=r"image .*gone\.jpg is not there"):
        open_image({"path": str(tmp_path / "gone.jpg"), "bytes": None})


# ---- Bad input.


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ({"table": None}, {}, "holds no table of labels, looked for labels.csv"),
        ({}, {"table": "other.csv"}, r"table .*other\.csv is not there"),
        ({"name": "labels.txt"}, {"table": "labels.txt"}, r"ends in '\.txt', expected one of \.csv"),
        ({"table": ""}, {}, "has no rows"),
        ({"table": "file_name,labels\n"}, {}, "has no rows"),
        ({"table": "image,labels\na.png,cat\n"}, {}, "line 2 has the columns image, labels, expected .* file_name"),
        ({"table": "file_name,labels\n ,cat\n"}, {}, "line 2 has an empty file_name"),
        ({"table": "file_name,labels,labels\na.png,cat,dog\n"}, {}, "column 'labels' more than once"),
        ({"table": "file_name,labels\na.png,cat,dog\n"}, {}, "line 2 has 3 cells for 2 columns"),
        ({"table": "file_name,labels\na.png,cat\nz.png,dog\n"}, {}, r"line 3 names z\.png, which is not in .*images"),
        ({"table": "file_name,labels\nA.PNG,cat\n"}, {}, r"line 2 names A\.PNG.* did you mean 'a\.png'"),
        ({"table": "file_name,labels\na.png,cat\na.png,dog\n"}, {}, r"line 2 names a\.png and .*line 3 names a\.png"),
        (
            {"table": "file_name,labels\na.png,cat\na.jpg,dog\n", "pictures": ("a.png", "a.jpg")},
            {},
            r"names a\.png and .* names a\.jpg",
        ),
        ({"table": "file_name,labels\n../secret.png,cat\n"}, {}, r"'\.\./secret\.png', which leads out of the images"),
        ({"table": "file_name,labels\nx\\..\\..\\a.png,cat\n"}, {}, "which leads out of the images folder"),
        ({"table": "file_name,labels\n/etc/a.png,cat\n"}, {}, "which leads out of the images folder"),
        ({"table": "file_name,labels\na.png,cat\nb.png,\n"}, {}, r"line 3 \(b\.png\) names no class"),
        ({"table": "file_name,cat,dog\na.png,0,0\nb.png,0,0\n"}, {}, "no row of .* names a class"),
        ({"table": "file_name,labels\na.png,cat;dgo\n"}, {"classes": ["cat", "dog"]}, "class 'dgo'.* mean 'dog'"),
        ({"classes": "cat\ncow\n"}, {}, r"line 3 \(b\.png\) names the class 'dog', which is not in .*classes\.txt"),
        ({"classes": "cat\ndog\n"}, {"classes": ["cat", "cow"]}, r"class 'cow' is not in .*classes\.txt"),
        ({"classes": "cat\ndog\ncat\n"}, {}, r"classes\.txt names 'cat' more than once"),
        ({"classes": "\n"}, {}, r"classes\.txt names no class"),
        ({}, {"classes": "cat"}, "classes is the text 'cat', expected a list"),
        ({"table": 'file_name,labels\na.png,"cat,dog"\nb.png,cat;dog\n'}, {}, r"hold both ',' .* and ';'"),
        ({"table": "file_name,label\na.png,cat\n"}, {}, r"'cat' in the column 'label', expected 0 or 1; .* labels"),
        ({"table": "file_name,cat\na.png,1\n"}, {"classes": ["cat", "dog"]}, "the class 'dog' has none"),
        ({"table": "file_name\na.png\n"}, {}, "expected a column labels or a 0/1 column"),
        ({}, {"split": "val"}, "has no column split.*or give split=None for all images"),
        ({}, {"split": "val", "caller": "recipe"}, "or give null in place of its name in the recipe for all images"),
        (
            {"table": "file_name,labels,split\na.png,cat,train\n"},
            {"split": "val"},
            "no row with split 'val', found train",
        ),
        ({}, {"images": "photos"}, r"images folder .*photos is not there"),
        ({}, {"masks": "truth"}, r"mask folder .*truth is not there"),
        ({"table": "file_name,labels\na.png,caf\u00e9\n".encode("latin1")}, {}, r"not UTF-8 text \(byte 0xe9"),
        ({"table": "{'file_name': 1}", "name": "labels.jsonl"}, {}, r"labels\.jsonl line 1 is no JSON"),
        ({"table": "[1]", "name": "labels.jsonl"}, {}, r"line 1 holds '\[1\]', expected an object"),
        (
            {"table": json.dumps({"file_name": "a.png", "labels": [3]}), "name": "labels.jsonl"},
            {},
            r"has the labels \[3\], expected class names",
        ),
        ({"table": "no parquet", "name": "labels.parquet"}, {}, "cannot be read as Parquet"),
    ],
)
def test_bad_input_is_refused_with_a_reason(
    make_folder: MakeFolder, arguments: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    root = make_folder(**arguments)
    with pytest.raises(DataError, match=message):
        load_folder(root, **options)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere is not a folder"):
        load_folder(tmp_path / "nowhere")


def test_two_tables_are_not_chosen_between(make_folder: MakeFolder) -> None:
    root = make_folder()
    (root / "metadata.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"holds labels\.csv and metadata\.jsonl; say which"):
        load_folder(root)
    assert len(load_folder(root, "labels.csv")) == 2
    assert len(load_folder(root, root / "labels.csv")) == 2


# ---- Somebody's own folder.


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_real_folder_loads_as_it_is(shared_data: Path, split: str) -> None:
    root = shared_data / "msrc_things"
    order = (root / "classes.txt").read_text().split()
    rows = list(csv.DictReader(io.StringIO((root / "labels.csv").read_text())))
    expected = [row for row in rows if row["split"] == split]
    dataset = load_folder(root, split=split)
    assert class_names(dataset) == order
    assert dataset["image_id"][:] == [Path(row["file_name"]).stem for row in expected]
    assert names_of(dataset) == [sorted(row["labels"].split(";"), key=order.index) for row in expected]
    for index in range(0, len(dataset), 20):
        image = open_image(dataset[index]["image"])
        mask = open_mask(dataset[index]["mask"], image_size=(image.height, image.width), num_classes=len(order))
        assert set(np.unique(mask)) - {0, 255} <= {class_id + 1 for class_id in dataset[index]["labels"]}


# ---- Tables that imagefolder reads, and folders named by class.


def write_lines(path: Path, *rows: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("place", ["", "train"])
def test_a_metadata_file_gives_what_imagefolder_gives(tmp_path: Path, place: str) -> None:
    folder = tmp_path / "data" / place
    for name, value in (("a.png", 1), ("sub/b.png", 2)):
        save_picture(folder / "images" / name)
        (folder / "truth/sub").mkdir(parents=True, exist_ok=True)
        PILImage.fromarray(np.full((24, 18), value, dtype=np.uint8)).save(folder / "truth" / name)
    write_lines(
        folder / "metadata.jsonl",
        {"file_name": "images/sub/b.png", "mask_file_name": "truth/sub/b.png", "labels": [1], "image_id": "second"},
        {"file_name": "images/a.png", "mask_file_name": "truth/a.png", "labels": [0, 1], "image_id": "first"},
    )
    features = Features(
        {
            "image": Image(decode=False),
            "mask": Image(),
            "labels": List(ClassLabel(names=["cat", "dog"])),
            "image_id": Value("string"),
        }
    )
    theirs = load_dataset(
        "imagefolder",
        data_files={"train": str(folder / "metadata.jsonl")},
        features=features,
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    ours = load_folder(tmp_path / "data", classes=["cat", "dog"], split=place or None)
    assert ours["image_id"][:] == theirs["image_id"][:] == ["second", "first"]
    assert ours["labels"][:] == theirs["labels"][:] == [[1], [0, 1]]
    for our_row, their_row in zip(ours, theirs, strict=True):
        assert open_image(our_row["image"]) == open_image(their_row["image"])
        np.testing.assert_array_equal(open_mask(our_row["mask"]), open_mask(their_row["mask"]))
    assert load_folder(tmp_path / "data", classes=["cat", "dog"], masks=False)["mask"][:] == [None, None]


def test_tables_in_subfolders_are_splits(tmp_path: Path) -> None:
    for split in ("north", "south"):
        save_picture(tmp_path / split / "a.png")
        write_lines(tmp_path / split / "metadata.jsonl", {"file_name": "a.png", "labels": [f"{split}ern cat"]})
    assert load_folder(tmp_path)["image_id"][:] == ["north/a", "south/a"]
    assert names_of(load_folder(tmp_path, split="south")) == [["southern cat"]]


@pytest.mark.parametrize(
    ("labels", "message"),
    [([2], r"has the labels \[2\], expected class ids from 0 to 1"), ([-1], "expected class ids"), (1, "class names")],
)
def test_class_ids_must_be_those_of_the_class_list(make_folder: MakeFolder, labels: Any, message: str) -> None:
    root = make_folder(json.dumps({"file_name": "a.png", "labels": labels}), "labels.jsonl", classes="cat\ndog\n")
    with pytest.raises(DataError, match=message):
        load_folder(root)


@pytest.mark.parametrize("images", ["", "images"])
def test_folders_name_the_class_of_their_pictures(tmp_path: Path, images: str) -> None:
    for name in ("dog/2.png", "cat/1.png", "dog/puppies/3.jpeg", ".cache/4.png"):
        save_picture(tmp_path / images / name)
    save_picture(tmp_path / "masks/cat/1.png")
    (tmp_path / images / "cat/notes.txt").write_text("no image")
    dataset = load_folder(tmp_path)
    assert class_names(dataset) == ["cat", "dog"]
    assert dataset["image_id"][:] == ["cat/1", "dog/2", "dog/puppies/3"]
    assert names_of(dataset) == [["cat"], ["dog"], ["dog"]]
    assert [mask is not None for mask in dataset["mask"]] == [True, False, False]


def test_class_folders_may_lie_in_folders_of_splits(tmp_path: Path) -> None:
    for name in ("train/n01/a.JPEG", "train/n02/b.JPEG", "val/n01/c.JPEG"):
        save_picture(tmp_path / name)
    assert class_names(load_folder(tmp_path)) == ["n01", "n02"]
    val = load_folder(tmp_path, split="val")
    assert class_names(val) == ["n01", "n02"]
    assert val["image_id"][:] == ["val/n01/c"]
    with pytest.raises(DataError, match="no row with split 'test', found train, val"):
        load_folder(tmp_path, split="test")


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        ("file_name,cat,dgo\na.png,1,0\n", {"classes": ["cat"]}, r"the column 'dgo' \(1 such .* neither a class nor"),
        ("file_name,cat,file-name\na.png,1,0\n", {"classes": ["cat"]}, "column 'file-name'.* mean 'file_name'"),
        ("file_name,cat,width\na.png,1,640\n", {}, "has '640' in the column 'width', expected 0 or 1"),
        ("file_name,cat\na.png,1\nb.png,maybe\n", {}, r"line 3 \(b\.png\) has 'maybe' in the column 'cat'"),
        ("file_name,labels,mask_file_name\na.png,cat,m.png\n", {}, r"names the mask m\.png, which is not in"),
        ("file_name,labels,mask_file_name\na.png,cat,../m.png\n", {}, r"'\.\./m\.png', which leads out"),
        ("file_name,labels,image_id\na.png,cat,1\nb.png,cat,1\n", {}, "both with the id '1'"),
        (
            "file_name,labels\nc.png,cat\nd.png,cat\n",
            {},
            r"c\.png, which .* \(2 such problems in 2 rows; check_folder",
        ),
    ],
)
def test_bad_columns_are_refused_with_a_reason(
    make_folder: MakeFolder, table: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load_folder(make_folder(table), **options)


# ---- The report.


def test_a_sound_folder_is_counted(make_folder: MakeFolder) -> None:
    root = make_folder(
        "file_name,labels,split,who\na.png,cat,train,me\nb.png,cat;dog,val,me\n", classes="dog\ncat\ncow\n"
    )
    save_picture(root / "images/b.png", (16, 16))
    (root / "masks").mkdir()
    PILImage.fromarray(np.array([[0, 1, 2, 255] * 4] * 16, dtype=np.uint8)).save(root / "masks/b.png")
    report = check_folder(root)
    assert report.ok
    assert (report.images, report.classes, report.masks) == (2, ("dog", "cat", "cow"), 1)
    assert report.images_per_class == {"dog": 1, "cat": 2, "cow": 0}
    assert report.labels_per_image == {1: 1, 2: 1}
    assert report.splits == {"train": 1, "val": 1}
    assert report.unused_columns == ("who",)
    assert check_folder(root, split="val").images_per_class == {"dog": 1, "cat": 1, "cow": 0}
    assert str(report).splitlines()[1:] == [
        "  splits: train 1, val 1",
        "  images of each class: dog 1, cat 2, cow 0",
        "  labels for each image: 1 in 1, 2 in 1",
        "  columns without use: who",
        "  note: no image shows 'cow'.",
        f"  note: {EVERY_IMAGE_SHOWS_THE_CAT}",
        "  no problems found",
    ]


def test_images_that_show_nothing_or_whose_bits_are_guessed_are_named_and_no_fault(make_folder: MakeFolder) -> None:
    root = make_folder("file_name,labels\na.png,cat\nb.png,cat\ndeep.png,cat\n", pictures=("a.png",))
    PILImage.new("RGB", (24, 18)).save(root / "images/b.png")
    PILImage.fromarray(np.array([[0, 4095] * 8] * 16, dtype=np.uint16)).save(root / "images/deep.png")
    report = check_folder(root)
    assert report.ok
    assert [remark.name for remark in report.remarks] == ["b.png", "deep.png"]
    printed = str(report)
    assert "  look at: 2\n    b.png: it is nearly constant, its values lie in [0, 0]" in printed
    assert "    deep.png: its values are taken to lie in [0, 4095], which is guessed" in printed
    assert printed.endswith("  no problems found")
    assert check_folder(root, decode=False).remarks == ()


@pytest.mark.parametrize("size", [(10, 10), (1, 3000), (15, 400)])
def test_an_image_smaller_than_a_patch_is_named(make_folder: MakeFolder, size: tuple[int, int]) -> None:
    root = make_folder()
    save_picture(root / "images/b.png", size)
    report = check_folder(root)
    assert report.ok  # which patches the model will have is not known here
    (remark,) = report.remarks
    assert remark.message == (
        f"b.png: it is {size[0]} x {size[1]} pixels (height x width), and models with patches of 16 leave it out; "
        "give a larger copy, or take it out."
    )


@pytest.fixture
def bad_folder(tmp_path: Path) -> Path:
    """One image for each thing that can be wrong with a row, its image or its mask."""
    names = ["sound", "cut", "text", "other_size", "wrong_id", "colors", "unnamed", "no_mask_file", "twin", "extra"]
    for number, name in enumerate(names):
        pixels = np.random.default_rng(number).integers(0, 255, (24, 18, 3), dtype=np.uint8)
        (tmp_path / "images").mkdir(exist_ok=True)
        PILImage.fromarray(pixels).save(tmp_path / f"images/{name}.png")
    jpeg = io.BytesIO()
    PILImage.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(
        jpeg, format="JPEG"
    )
    (tmp_path / "images/cut.png").write_bytes(jpeg.getvalue()[:-600])
    (tmp_path / "images/text.png").write_text("no image")
    (tmp_path / "images/twin.png").write_bytes((tmp_path / "images/sound.png").read_bytes())
    masks = {
        "sound": np.full((24, 18), 1, np.uint8),
        "other_size": np.zeros((18, 24), np.uint8),
        "wrong_id": np.full((24, 18), 3, np.uint8),
        "colors": np.full((24, 18, 3), (128, 0, 0), np.uint8),
        "unnamed": np.full((24, 18), 2, np.uint8),
    }
    (tmp_path / "masks").mkdir()
    for name, mask in masks.items():
        PILImage.fromarray(mask).save(tmp_path / f"masks/{name}.png")
    (tmp_path / "masks/no_mask_file.png").write_text("no image")
    rows = [f"{name}.png,cat" for name in names if name != "extra"]
    rows += ["sound.jpg,dog", "gone.png,cat", "../out.png,cat", "a,b,c", "cut.bmp,", "gone2.png,dgo"]
    (tmp_path / "labels.csv").write_text("\n".join(["file_name,labels", *rows]))
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    return tmp_path


def test_every_problem_is_reported_by_name_and_none_hides_another(bad_folder: Path) -> None:
    report = check_folder(bad_folder)
    found = {}
    for problem in report.problems:
        found.setdefault(problem.kind, []).append(problem.name)
    assert found == {
        "table": ["labels.csv line 13", "labels.csv line 14"],
        "duplicate": ["sound.jpg", "cut.bmp"],
        "missing": ["sound.jpg", "gone.png", "cut.bmp", "gone2.png"],
        "unlabeled": ["cut.bmp"],
        "labels": ["gone2.png"],
        "unlisted": ["extra.png"],
        "unreadable": ["cut.png", "text.png"],
        "mask size": ["other_size.png"],
        "mask ids": ["wrong_id.png"],
        "mask colors": ["colors.png"],
        "mask labels": ["unnamed.png"],
        "mask unreadable": ["no_mask_file.png"],
        "copy": ["twin.png"],
    }
    text = str(report)
    for problem in report.problems:
        assert problem.message in text
    for words in (
        r"cut\.png cannot be read .*truncated",
        r"mask .*other_size\.png is 18x24 .* and its image 24x18",
        r"mask .*wrong_id\.png holds the id 3, expected .* 1 to 2",
        r"mask .*colors\.png is a RGB image with the colors 128/0/0, .* as in mask_values=\"128/0/0=1\"",
        r"mask .*unnamed\.png shows dog, which the labels of unnamed\.png do not name",
        r"twin\.png is the same file as sound\.png",
        r"names the class 'dgo', which is not in .*classes\.txt: did you mean 'dog'",
    ):
        assert re.search(words, text), words
    assert "missing: 4, sound.jpg, gone.png, ..." in report.summary(names=2)
    with pytest.raises(
        DataError, match=r"line 13 .* leads out .*\(2 such problems in 13 rows; check_folder lists all"
    ):
        load_folder(bad_folder)


def test_a_quick_look_reads_headers_and_no_mask(bad_folder: Path) -> None:
    kinds = {problem.kind for problem in check_folder(bad_folder, decode=False).problems}
    assert "unreadable" in kinds
    assert not any(kind.startswith("mask") for kind in kinds)


def test_a_real_folder_has_no_problems(shared_data: Path) -> None:
    report = check_folder(shared_data / "msrc_things", split="val")
    rows = list(csv.DictReader(io.StringIO((shared_data / "msrc_things/labels.csv").read_text())))
    expected = [row["labels"].split(";") for row in rows if row["split"] == "val"]
    assert report.images == report.masks == len(expected)
    assert report.images_per_class == {name: sum(name in each for each in expected) for name in report.classes}
    assert sum(report.splits.values()) == 497
    assert report.problems == ()


# ---- Color masks.


@pytest.mark.parametrize("ignore", [None, (1, 2, 3)])
def test_colors_become_ids(tmp_path: Path, ignore: tuple[int, int, int] | None) -> None:
    ids = np.array([[0, 1, 2], [2, 255 if ignore else 0, 1]], dtype=np.uint8)
    colors = [(0, 0, 0), (255, 0, 0), (0, 128, 255)]
    PILImage.fromarray(np.array([*colors, *[(1, 2, 3)] * 253], dtype=np.uint8)[ids]).save(tmp_path / "colors.png")
    colors_to_ids(tmp_path / "colors.png", colors, ignore=ignore).save(tmp_path / "ids.png")
    np.testing.assert_array_equal(open_mask(tmp_path / "ids.png"), ids)


def test_a_mask_saved_in_the_colors_of_voc_is_turned_back(shared_data: Path) -> None:
    path = sorted((shared_data / "voc12_animals/SegmentationClassAug").iterdir())[0]
    with PILImage.open(path) as mask:
        np.testing.assert_array_equal(np.array(colors_to_ids(mask.convert("RGB"))), np.array(mask))


def test_colors_between_classes_are_refused_with_their_place(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4, 3), dtype=np.uint8)
    pixels[2, 1] = (9, 9, 9)
    PILImage.fromarray(pixels).save(tmp_path / "m.png")
    with pytest.raises(DataError, match=r"m\.png has the color \(9, 9, 9\) at row 2, column 1, expected one of 2"):
        colors_to_ids(tmp_path / "m.png", [(0, 0, 0), (255, 255, 255)])


# ---- What people's tables and folders look like.


@pytest.mark.parametrize(
    ("cells", "classes", "expected"),
    [
        (("\"['dog', 'person']\"", "['cat']"), None, [["dog", "person"], ["cat"]]),
        (('"{""choices"": [""dog"", ""person""]}"', "cat"), None, [["dog", "person"], ["cat"]]),
        (
            ('"salt, coarse;bread"', '"salt, coarse"'),
            "bread\nsalt, coarse\n",
            [["bread", "salt, coarse"], ["salt, coarse"]],
        ),
        (('"salt, coarse,bread"', "bread"), "bread\nsalt, coarse\n", [["bread", "salt, coarse"], ["bread"]]),
        (
            ("haze primary", "traffic light haze"),
            "haze\nprimary\ntraffic light\n",
            [["haze", "primary"], ["haze", "traffic light"]],
        ),
        (("'cat';'dog'", '"""cat"""'), None, [["cat", "dog"], ["cat"]]),
        (("polar\u00a0 bear ", "polar bear;cafe\u0301"), None, [["polar bear"], ["caf\u00e9", "polar bear"]]),
        (("Cat;DOG", "cat"), "cat\ndog\n", [["cat", "dog"], ["cat"]]),
        (("Background", "cat;background"), None, [[], ["cat"]]),
    ],
)
def test_labels_are_read_as_their_writer_meant_them(
    make_folder: MakeFolder, cells: tuple[str, str], classes: str | None, expected: list[list[str]]
) -> None:
    root = make_folder(f"file_name,labels\na.png,{cells[0]}\nb.png,{cells[1]}\n", classes=classes)
    assert [sorted(names) for names in names_of(load_folder(root))] == expected


@pytest.mark.parametrize(
    ("cells", "classes", "message"),
    [
        (
            ("haze primary", "haze"),
            None,
            r"'haze primary' and elsewhere 'haze' alone, .*separator=\" \" or separator=\";\"",
        ),
        (
            ('"salt, coarse"', "bread"),
            None,
            r"do not occur in other combinations, .*separator=\",\" or separator=\";\", or list the classes",
        ),
        (("Dog", "dog"), None, r"line 2 names the class 'Dog' and labels.csv line 3 names 'dog', which look alike"),
        (("['dog'", "cat"), None, "but it is no complete list or object"),
        (('"a,b"', "a;b"), None, r"hold both ',' .* and ';' .* with separator=\";\""),
        (('"a,b"', "c"), "a\nb\nc\na,b\n", None),
        (('"a,b,a"', "c"), "a\nb\nc\na,b\n", None),
        (("nan", "cat"), None, r"line 2 \(a.png\) names no class, .* allow_empty=True"),
    ],
)
def test_labels_that_may_mean_two_things_are_a_named_problem(
    make_folder: MakeFolder, cells: tuple[str, str], classes: str | None, message: str | None
) -> None:
    root = make_folder(f"file_name,labels\na.png,{cells[0]}\nb.png,{cells[1]}\n", classes=classes)
    if message is None:  # the whole cell is a class: there is one reading
        assert names_of(load_folder(root))[0] == (["a,b"] if cells[0] == '"a,b"' else ["a", "b"])
        return
    with pytest.raises(DataError, match=message):
        load_folder(root)


@pytest.mark.parametrize(
    ("caller", "advice"),
    [("check", '--separator ";"'), ("masks", '--separator ";"'), ("recipe", '--data.separator ";"')],
)
def test_advice_names_an_option_that_the_caller_has(make_folder: MakeFolder, caller: Any, advice: str) -> None:
    root = make_folder('file_name,labels\na.png,"cat,dog"\nb.png,cat;dog\n')
    with pytest.raises(DataError, match=re.escape(advice)):
        check_folder(root, caller=caller)


@pytest.mark.parametrize(
    "table",
    [
        ",file_name,labels\n0,a.png,cat\n1,b.png,cat;dog\n",
        "Unnamed: 0,File_Name,Labels\n0,a.png,cat\n1,b.png,cat;dog\n",
        "file_name,cat,dog,,\na.png,1,0,,\nb.png,1,1,,\n",
        ",file_name,background,cat,dog\n0,a.png,1,1,0\n1,b.png,0,1,1\n",
        'file_name;"cat";dog\na.png;1;0\nb.png;1;1\n',
        "file_name,labels\na,cat\nB.PNG,cat;dog\n".replace("B.PNG", "b"),
        "file_name|labels\na.png|cat\nb.png|cat;dog\n",
    ],
)
def test_columns_and_names_that_tools_add_or_leave_out_change_nothing(make_folder: MakeFolder, table: str) -> None:
    dataset = load_folder(make_folder(table))
    assert class_names(dataset) == ["cat", "dog"]
    assert dataset["image_id"][:] == ["a", "b"]
    assert dataset["labels"][:] == [[0], [0, 1]]


def test_file_names_in_two_unicode_forms_are_one_file(tmp_path: Path) -> None:
    save_picture(tmp_path / "images" / "cafe\u0301.png")
    (tmp_path / "labels.csv").write_text("file_name,labels\ncaf\u00e9.png,cup\n", encoding="utf-8")
    assert load_folder(tmp_path)["image"][0]["path"].endswith("cafe\u0301.png")


def test_a_name_without_suffix_that_fits_two_images_is_a_named_problem(make_folder: MakeFolder) -> None:
    root = make_folder("file_name,labels\na,cat\n", pictures=("a.png", "a.jpg"))
    with pytest.raises(DataError, match=r"names a, .* there are a\.jpg and a\.png; write which one is meant"):
        load_folder(root)


def test_a_row_of_zeros_is_a_statement_and_an_empty_cell_an_omission(make_folder: MakeFolder) -> None:
    root = make_folder("file_name,crack\na.png,1\nb.png,0\n")
    assert load_folder(root)["labels"][:] == [[0], []]
    assert check_folder(root).labels_per_image == {0: 1, 1: 1}
    (root / "labels.csv").write_text("file_name,labels\na.png,crack\nb.png,[]\n")
    assert load_folder(root)["labels"][:] == [[0], []]
    (root / "labels.csv").write_text("file_name,labels\na.png,crack\nb.png,\n")
    save_picture(root / "images/b.png", (4, 4))  # another file than a.png
    assert [problem.kind for problem in check_folder(root, caller="check").problems] == ["unlabeled"]
    assert "--allow-empty" in str(check_folder(root, caller="check"))
    assert check_folder(root, allow_empty=True).ok


def test_class_ids_are_refused_where_the_list_begins_with_background(make_folder: MakeFolder) -> None:
    row = json.dumps({"file_name": "a.png", "labels": [1]})
    root = make_folder(row, "labels.jsonl", classes="background\ncat\ndog\n")
    with pytest.raises(DataError, match="begins with background, so that 1 may mean its first or its second class"):
        load_folder(root)
    (root / "labels.jsonl").write_text(row.replace("[1]", '["dog"]'))
    dataset = load_folder(root)
    assert class_names(dataset) == ["cat", "dog"]
    assert names_of(dataset) == [["dog"]]
    assert any("begins with background" in note for note in check_folder(root).notes)


@pytest.mark.parametrize(
    ("files", "split", "expected"),
    [
        (
            ("Train/dog/a.png", "Train/cat/b.png", "Test/dog/c.png"),
            "train",
            {"Train/dog/a": "dog", "Train/cat/b": "cat"},
        ),
        (("train/dog/a.png", "unlabeled/dog/c.png"), None, {"train/dog/a": "dog", "unlabeled/dog/c": "dog"}),
        (("train/dog/a.png", "pool/Dog/c.png"), None, {"train/dog/a": "dog", "pool/Dog/c": "Dog"}),
        (("train/dog/a.png", "val/cat/b.png", "rest/c.png"), None, {"train/dog/a": "dog", "val/cat/b": "cat"}),
        (("train/a.png", "bus/b.png"), None, {"train/a": "train", "bus/b": "bus"}),
    ],
)
def test_folders_of_splits_are_no_classes(
    tmp_path: Path, files: tuple[str, ...], split: str | None, expected: dict[str, str]
) -> None:
    for name in files:
        save_picture(tmp_path / name)
    if "pool/Dog/c" in expected:  # one class in two spellings
        with pytest.raises(DataError, match="look alike"):
            load_folder(tmp_path, split=split)
        return
    dataset = load_folder(tmp_path, split=split)
    assert dict(zip(dataset["image_id"], (names[0] for names in names_of(dataset)), strict=True)) == expected


def test_a_folder_that_may_be_a_split_or_a_class_is_refused(tmp_path: Path) -> None:
    for name in ("train/steam/a.png", "bus/b.png"):
        save_picture(tmp_path / name)
    with pytest.raises(DataError, match="the folder train holds folders as a split does, and bus beside it does not"):
        load_folder(tmp_path)


def test_an_unclosed_quote_is_named_with_its_line(make_folder: MakeFolder) -> None:
    root = make_folder('file_name,labels\na.png,"cat\nb.png,dog\n')
    with pytest.raises(DataError, match=r"labels\.csv line 2 has a quote that is not closed"):
        load_folder(root)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("haze primary", "clear primary", "clear water"), "'clear primary' and elsewhere each of its words"),
        (("salt, coarse", "salt, fine", "bread"), "'salt, coarse', whose parts do not occur in other combinations"),
        (("dog/cat", "dog", "cat"), "'dog/cat' and elsewhere 'dog' alone, so that '/' may separate"),
        (("polar bear", "brown bear", "cat"), None),
        (("dog, cat", "cat, cow", "cow, dog"), None),
        (("dog, cat", "cat", "cow"), None),
    ],
)
def test_the_words_of_a_table_show_whether_its_separator_is_clear(
    make_folder: MakeFolder, labels: tuple[str, ...], message: str | None
) -> None:
    table = "".join(f'{name}.png,"{cell}"\n' for name, cell in zip("abc", labels, strict=True))
    root = make_folder(f"file_name,labels\n{table}", pictures=("a.png", "b.png", "c.png"))
    if message is None:
        assert len(class_names(load_folder(root))) == 3
    else:
        with pytest.raises(DataError, match=message):
            load_folder(root)


def test_a_class_that_may_mean_nothing_is_noted(make_folder: MakeFolder) -> None:
    root = make_folder("file_name,labels\na.png,none\nb.png,cat\n", classes='"cat"\nnone\n')
    report = check_folder(root)
    assert report.classes == ("cat", "none")
    assert "'none' is a class like any other" in " ".join(report.notes)


# ---- Tables and folders as people have them.


@pytest.mark.parametrize(
    "table",
    [
        "sep=;\r\nfile_name;labels\r\na.png;cat\r\nb.png;dog,cat\r\n",
        "file_name\tlabels\r\na.png\tcat\r\nb.png\tdog;cat\r\n".encode("utf-16"),
        "File Name;LABELS;;\r\na.png;cat;;\r\nb.png;cat,dog;;\r\n",
        "filename,Labels\na.png,cat\nb.png,cat|dog\n",
        "file-name,cat,dog\na.png,yes,no\nb.png,T,Y\n",
    ],
)
def test_tables_of_spreadsheets_give_the_same_rows(make_folder: MakeFolder, table: str | bytes) -> None:
    assert names_of(load_folder(make_folder(table))) == [["cat"], ["cat", "dog"]]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("a.png,cat\nb.png,dog\n", "put a line with the names of the columns before the first row"),
        ("image,tags\na.png,cat\n", r"the column 'image' holds 'a\.png': call it file_name"),
        (",labels\na.png,cat\n", r"the column without a name holds 'a\.png': call it file_name"),
        ("file_name,labels,\na.png,cat,dog\n", "line 2 has 'dog' in a column without a name"),
        ("file_name,labels\nhttps://host.org/a.png?w=6,cat\n", "which is an address on the web; download"),
        ("file_name,labels\nphotos/images/a.png,cat\n", r"which is not in .*; did you mean 'a\.png'\?"),
        ("file_name,labels\na.png,cat\n".encode("utf-16-le"), "holds zero bytes, as text in UTF-16 does"),
    ],
)
def test_a_table_that_cannot_be_read_says_what_to_change(
    make_folder: MakeFolder, table: str | bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load_folder(make_folder(table))


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("train.csv", r"if train\.csv has the labels, name it with --labels\."),
        ("labels.xlsx", r"if labels\.xlsx has the labels, save them as labels\.csv"),
        ("images.zip", r"unpack images\.zip there\."),
        ("a.png", "write a table with the columns file_name and labels"),
    ],
)
def test_a_folder_without_labels_says_which_file_may_have_them(tmp_path: Path, name: str, advice: str) -> None:
    (tmp_path / name).write_bytes(b"content")
    with pytest.raises(DataError, match=advice):
        check_folder(tmp_path, caller="check")


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (("Training set/cat/a.png", "val2/dog/b.png"), {"Training set": 1, "val2": 1}),
        (("train/images/cat/a.png", "test/images/dog/b.png"), {"test": 1, "train": 1}),
        (("cat/train/a.png", "dog/test_images/b.png"), {"test_images": 1, "train": 1}),
        (("cat/images/a.png", "dog/images/b.png"), {}),
        (("test tube/a.png", "validation stamp/b.png"), {}),
    ],
)
def test_folders_around_class_folders_and_in_them_are_told_from_classes(
    tmp_path: Path, files: tuple[str, ...], splits: dict[str, int]
) -> None:
    for name in files:
        save_picture(tmp_path / name)
    classes = ("test tube", "validation stamp") if "tube" in files[0] else ("cat", "dog")
    report = check_folder(tmp_path, decode=False)
    assert report.splits == splits
    assert report.images_per_class == dict.fromkeys(classes, 1)
    assert report.notes == ()


def test_folders_that_make_no_class_are_said(tmp_path: Path) -> None:
    for name in ("animals/cat/a.png", "plants/b.png"):
        save_picture(tmp_path / name)
    (tmp_path / "horse").mkdir()
    deeper, empty = check_folder(tmp_path).notes
    assert "animals/cat belongs to 'animals'. If cat are the classes" in deeper
    assert empty == "1 folders hold no image and make no class: horse"


def test_masks_beside_their_images_are_no_images(tmp_path: Path) -> None:
    for name in ("cat/a (1).png", "cat/a (1)_mask.png", "cat/a (1)_mask_1.png", "dog/b.png", "dog/lone_mask.png"):
        save_picture(tmp_path / name)
    report = check_folder(tmp_path, decode=False)
    assert report.ok
    assert report.images_per_class == {"cat": 1, "dog": 2}
    assert "2 images are named like masks of other images and are left out: cat/a (1)_mask.png" in report.notes[0]


def test_a_link_to_no_file_is_missing_and_an_image_beside_class_folders_is_unlisted(tmp_path: Path) -> None:
    for name in ("cat/a.png", "dog/b.png", "loose.png"):
        save_picture(tmp_path / name)
    (tmp_path / "dog/gone.png").symlink_to(tmp_path / "nowhere.png")
    problems = {problem.kind: problem.message for problem in check_folder(tmp_path, decode=False).problems}
    assert problems == {
        "missing": "dog/gone.png is a link to a file that is not there; fix the link or take it out.",
        "unlisted": "loose.png lies in no class folder and is left out; move it into one or take it out.",
    }


def test_two_classes_that_every_image_shows_are_named_together() -> None:
    note = note_on_contrast(["cat", "dog", "owl"], {"cat": 3, "dog": 3, "owl": 2}, 3)
    assert note == (
        "every image shows 'cat', 'dog', so that training cannot tell each of them from what surrounds it; add images "
        "that do not show them."
    )
    assert note_on_contrast(["owl"], {"owl": 2}, 3) is None
    assert note_on_contrast(["cat", "dog"], {"cat": 3, "dog": 2}, 3) == EVERY_IMAGE_SHOWS_THE_CAT


@pytest.mark.parametrize(
    ("file", "written", "meant"),
    [
        ("b c.png", "b%20c.png", "did you mean 'b c.png'"),
        ("0001.png", "1", "did you mean '0001.png'"),
        ("0012.png", "12.png", "did you mean '0012.png'"),
        ("c.jpg.png", "c.jpg", "did you mean 'c.jpg.png'"),
        ("cam/d.png", "D.png", "did you mean 'cam/d.png'"),
    ],
)
def test_the_image_that_a_name_may_mean_is_said(tmp_path: Path, file: str, written: str, meant: str) -> None:
    save_picture(tmp_path / "images" / file)
    (tmp_path / "labels.csv").write_text(f"file_name,labels\n{written},cat\n")
    with pytest.raises(DataError, match=re.escape(meant)):
        load_folder(tmp_path)


def test_names_in_single_quotes_are_read(make_folder: MakeFolder) -> None:
    assert load_folder(make_folder("file_name,labels\n'a.png','cat'\n"))["image_id"][:] == ["a"]


def test_0_1_vectors_of_two_classes_are_no_ids(make_folder: MakeFolder) -> None:
    root = make_folder('file_name,labels\na.png,"[1, 0]"\nb.png,"[0, 1]"\n', classes="cat\ndog\n")
    with pytest.raises(DataError, match="but it looks like a 0/1 vector; write class names"):
        load_folder(root)


def test_class_names_in_two_cases_say_nothing_about_blanks(make_folder: MakeFolder) -> None:
    report = check_folder(make_folder("file_name,labels\na.png,Cat\nb.png,cat\n"), decode=False)
    assert [problem.kind for problem in report.problems] == ["labels"]
    assert report.notes == ()


def test_a_folder_around_all_class_folders_is_no_class(tmp_path: Path) -> None:
    for name in ("data/train/cat/a.png", "data/val/dog/b.png"):
        save_picture(tmp_path / name)
    report = check_folder(tmp_path, decode=False)
    assert report.images_per_class == {"cat": 1, "dog": 1}
    assert report.splits == {"train": 1, "val": 1}
    assert report.notes == ("all class folders lie in data, which names no class itself.",)


def test_folders_of_masks_are_no_classes_and_a_name_in_capitals_is_read(tmp_path: Path) -> None:
    for name in ("Images/train/cat/a.png", "Images/val/dog/b.png", "Ground Truth/cat/a.png"):
        save_picture(tmp_path / name)
    report = check_folder(tmp_path, decode=False)
    assert report.images_per_class == {"cat": 1, "dog": 1}
    assert report.notes[0].endswith(f"if {tmp_path / 'Ground Truth'} holds the masks, rename it to masks.")
    (tmp_path / "Ground Truth").rename(tmp_path / "MASKS")
    (tmp_path / "MASKS/train").mkdir()
    (tmp_path / "MASKS/cat").rename(tmp_path / "MASKS/train/cat")
    assert check_folder(tmp_path, decode=False).masks == 1


def test_a_class_that_denies_another_is_noted(tmp_path: Path) -> None:
    for name in ("cat/a.png", "no_cat/b.png", "notebook/c.png"):
        save_picture(tmp_path / name)
    (note,) = check_folder(tmp_path, decode=False).notes
    assert note.startswith("'no_cat' is a class like any other; if it means that an image does not show 'cat', write")
