from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from datasets import Image, List
from PIL import Image as PILImage

from bitrans_hf.data import DataError, UnreadableImageError, class_names, load_folder, open_image, open_mask

MakeFolder = Callable[..., Path]


def save_picture(path: Path, size: tuple[int, int] = (8, 6)) -> None:
    """Write a picture of (height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    PILImage.fromarray(np.full((*size, 3), 100, dtype=np.uint8)).save(path)


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Write `images/` with the named pictures, a table and `classes.txt`; return the folder."""

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
    assert open_image(dataset[1]["image"]).size == (6, 8)


def test_pictures_without_a_row_are_counted_in_the_log(
    make_folder: MakeFolder, caplog: pytest.LogCaptureFixture
) -> None:
    root = make_folder(pictures=("a.png", "b.png", "c.png", "d.JPG"))
    (root / "images" / "notes.txt").write_text("no picture")
    with caplog.at_level(logging.WARNING):
        assert len(load_folder(root)) == 2
    assert "2 images in" in caplog.text
    assert "c.png, d.JPG" in caplog.text


def test_pictures_are_not_opened_while_loading(make_folder: MakeFolder) -> None:
    root = make_folder()
    (root / "images" / "b.png").write_bytes(b"no picture at all")
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
        (np.zeros((2, 2, 3), np.uint8), {}, "is a RGB image, expected a palette or gray"),
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


# ---- Pictures.


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
        ({"table": "file_name,cat,dog\na.png,1,0\nb.png,0,0\n"}, {}, r"line 3 \(b\.png\) names no class"),
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
        ({}, {"split": "val"}, "has no column split"),
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
