"""Masks as people have them: other names, other values, other views; what is read, what is said, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bitrans_hf.data import DataError, MaskValues, check_folder, check_masks, load_folder, open_mask
from bitrans_hf.data.mask_names import match_masks
from bitrans_hf.hub.errors import InputError

SQUARE = np.zeros((6, 8), np.uint8)
SQUARE[2:4, 3:6] = 1


def save(path: Path, pixels: np.ndarray, mode: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path)
    return path


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Two images `a.png` and `b.png` of a dog, and masks with the given names and pixels."""

    def make(names: tuple[str, str] = ("a.png", "b.png"), pixels: np.ndarray = SQUARE, labels: str = "dog") -> Path:
        for number, name in enumerate("ab"):
            picture = np.random.default_rng(number).integers(0, 255, (6, 8, 3), dtype=np.uint8)
            save(tmp_path / f"images/{name}.png", picture)
        for name in names:
            save(tmp_path / "masks" / name, pixels)
        (tmp_path / "labels.csv").write_text(f"file_name,labels\na.png,{labels}\nb.png,{labels}\n")
        return tmp_path

    return make


# ---- Values.


@pytest.mark.parametrize(
    ("pixels", "form"),
    [
        (SQUARE * 255, "binary"),
        (SQUARE * 77, "binary"),
        (SQUARE.astype(np.uint16) * 65535, "binary"),
        (SQUARE.astype(bool), "binary"),
        (SQUARE.astype(bool), None),
        (SQUARE.astype(np.int32), None),
        (SQUARE.astype(np.uint16), None),
        (np.repeat(SQUARE[..., None], 3, axis=2), None),
        (SQUARE * 200 + 20, "0-127=0,128-255=1"),
        (np.array([[128, 0, 0]], np.uint8)[SQUARE * 0] * SQUARE[..., None], "voc_colors"),
        (np.array([[9, 8, 7]], np.uint8)[SQUARE * 0] * SQUARE[..., None], "9/8/7=1"),
    ],
)
def test_usual_forms_are_read_to_the_same_label_ids(tmp_path: Path, pixels: np.ndarray, form: str | None) -> None:
    path = save(tmp_path / "mask.png" if pixels.dtype != np.int32 else tmp_path / "mask.tif", pixels)
    np.testing.assert_array_equal(open_mask(path, num_classes=1, values=MaskValues.parse(form)), SQUARE)


def test_whole_numbers_stored_as_floats_are_ids_and_others_are_refused(tmp_path: Path) -> None:
    np.testing.assert_array_equal(open_mask(save(tmp_path / "m.tif", SQUARE.astype(np.float32))), SQUARE)
    for wrong, said in ((0.5, "0.5"), (np.nan, "nan"), (np.inf, "inf")):
        with pytest.raises(DataError, match=f"holds {said}, expected label ids"):
            open_mask(save(tmp_path / "m.tif", SQUARE.astype(np.float32) * wrong if wrong == 0.5 else SQUARE + wrong))


def test_255_may_be_the_object_and_another_value_ignored(tmp_path: Path) -> None:
    path = save(tmp_path / "m.png", np.array([[0, 128, 255]], np.uint8))
    assert open_mask(path, values=MaskValues.parse("0=0,128=255,255=1")).tolist() == [[0, 255, 1]]


def test_a_jpeg_is_no_mask_of_ids_and_can_be_a_binary_one(tmp_path: Path) -> None:
    path = tmp_path / "m.jpg"
    Image.fromarray(np.kron(SQUARE, np.ones((8, 8), np.uint8)) * 255).save(path, quality=60)
    with pytest.raises(DataError, match=r"is a JPEG, which alters pixel values.*mask_values=\"binary\"\.$"):
        open_mask(path, num_classes=1)
    expected = np.kron(SQUARE, np.ones((8, 8), np.uint8))
    np.testing.assert_array_equal(open_mask(path, num_classes=1, values=MaskValues.parse("binary")), expected)


@pytest.mark.parametrize(
    ("pixels", "form", "message"),
    [
        (SQUARE * 38, None, 'holds the id 38, expected .* if 38 is the object, give mask_values="binary"'),
        (np.arange(48, dtype=np.uint8).reshape(6, 8), None, "holds 48 different values: was it resized"),
        (np.arange(48, dtype=np.uint8).reshape(6, 8), "binary", r"values 0, 1, .*\(48 of them\), expected 0 and one"),
        (
            SQUARE + np.eye(6, 8, 5, dtype=np.uint8) * 3,
            None,
            r"values 0, 1, 3(, 4)?: if each but 0 is the object, give mask_values=\"1-3=1\"",
        ),
        (SQUARE * 7, "0=0,9=1", "holds the values 7, which have no meaning in mask values 0=0,9=1"),
        (np.full((2, 2, 3), (1, 2, 3), np.uint8), "9/8/7=1", "holds the colors 1/2/3, which have no meaning"),
    ],
)
def test_values_without_a_meaning_are_refused_by_name(
    tmp_path: Path, pixels: np.ndarray, form: str | None, message: str
) -> None:
    with pytest.raises(DataError, match=rf"mask .*m\.png .*{message}"):
        open_mask(save(tmp_path / "m.png", pixels), num_classes=1, values=MaskValues.parse(form))


@pytest.mark.parametrize(
    ("pixels", "labels", "form"),
    [
        (SQUARE * 38, "dog", "binary"),
        (SQUARE * 38, "dog;cat", "0=0,38=1"),
        (np.repeat(SQUARE[..., None], 3, axis=2) * np.array([9, 8, 7], np.uint8), "dog", "9/8/7=1"),
        (np.arange(48, dtype=np.uint8).reshape(6, 8) * 5, "dog", "0-127=0,128-255=1"),
    ],
)
def test_the_form_that_a_message_advises_is_written_as_the_caller_writes_it_and_reads_the_mask(
    make_folder: Callable[..., Path], pixels: np.ndarray, labels: str, form: str
) -> None:
    root = make_folder(pixels=pixels, labels=labels)
    written = {"python": 'mask_values="{}"', "check": "--mask-values {}", "recipe": "--data.mask_values {}"}
    for caller, option in written.items():
        messages = [problem.message for problem in check_folder(root, caller=caller).problems]
        assert [option.replace("{}", form) in message for message in messages] == [True, True]
    assert not [each for each in check_folder(root, mask_values=form).problems if each.kind != "mask labels"]


@pytest.mark.parametrize("text", ["bin", "0:0,255:1", "0=0,1/2/3=1", "0=300", "300/0/0=1", ""])
def test_an_unknown_form_is_refused_with_those_that_are_known(text: str) -> None:
    with pytest.raises(InputError, match=r"expected ids|mix numbers and colors"):
        MaskValues.parse(text)


def test_binary_masks_cannot_say_which_of_two_classes_they_show(make_folder: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="mean one class, and there are 2"):
        load_folder(make_folder(labels="dog;cat"), mask_values="binary")
    with pytest.raises(InputError, match="give the label id 3, expected 0 for background, 1 to 2"):
        load_folder(make_folder(labels="dog;cat"), mask_values="0=0,9=3")


# ---- A folder: check, load, and the look before a run agree.


def test_check_says_that_255_means_ignored_and_reads_it_as_the_object_when_told(
    make_folder: Callable[..., Path],
) -> None:
    root = make_folder(pixels=SQUARE * 255)
    (problem,) = check_folder(root).problems
    assert problem.kind == "mask values"
    assert "all 2 masks hold only 0 (background) and 255 (ignored)" in problem.message
    for caller, option in (("python", 'mask_values="binary"'), ("recipe", "--data.mask_values binary")):
        with pytest.raises(DataError, match=f"if 255 is the object, give {option}; if it is not"):
            check_masks(root, caller=caller)
    assert check_folder(root, mask_values="binary").ok
    assert check_folder(root, mask_values="ids").ok
    assert check_masks(root, mask_values="binary") == (2, [])
    for row in load_folder(root, mask_values="binary"):
        np.testing.assert_array_equal(open_mask(row["mask"], num_classes=1), SQUARE)


def test_masks_of_background_alone_are_a_problem(make_folder: Callable[..., Path]) -> None:
    (problem,) = check_folder(make_folder(pixels=SQUARE * 0)).problems
    assert "all 2 masks are background (0) in every pixel" in problem.message


def test_palettes_that_differ_from_mask_to_mask_are_noted(make_folder: Callable[..., Path]) -> None:
    root = make_folder()
    for name, color in (("a", (128, 0, 0)), ("b", (0, 128, 0))):
        image = Image.fromarray(SQUARE)
        image.putpalette([0, 0, 0, *color])
        image.save(root / f"masks/{name}.png")
    said = "label id 1 has the color 128/0/0 in the mask of a.png and 0/128/0 in that of b.png"
    assert [said in note for note in check_folder(root).notes].count(True) == 1


@pytest.mark.parametrize(
    ("names", "rule"),
    [
        (("A.PNG", "B.PNG"), ""),
        (("a.tif", "b.tif"), ""),
        (("a.png.png", "b.png.png"), ""),
        (("a_mask.png", "b_mask.png"), "masks have '_mask' after the name"),
        (("mask-a.png", "mask-b.png"), "masks have 'mask-' before the name"),
        (("a_gt_labelIds.png", "b_gt_labelIds.png"), "masks have '_gt_labelIds' after the name"),
        (("train/a.png", "val/b.png"), "their subfolders differ"),
    ],
)
def test_masks_with_other_names_are_found_and_this_is_said(
    make_folder: Callable[..., Path], names: tuple[str, str], rule: str, caplog: pytest.LogCaptureFixture
) -> None:
    root = make_folder(names)
    dataset = load_folder(root)
    assert [Path(row["path"]).name for row in dataset.with_format("arrow")[:]["mask"].to_pylist()] == [
        Path(name).name for name in names
    ]
    report = check_folder(root)
    assert report.masks == 2
    assert report.ok
    assert all(rule in said for said in (caplog.text, str(report)))


def test_masks_that_match_no_image_are_a_problem_everywhere(make_folder: Callable[..., Path]) -> None:
    root = make_folder(("x.png", "y.png"))
    message = r"2 masks in .*masks belong to no image \(x\.png, y\.png\) and 0 of 2 .*a\.png for a\.png"
    (problem,) = check_folder(root).problems
    assert problem.kind == "mask names"
    for look in (load_folder, check_masks):
        with pytest.raises(DataError, match=message):
            look(root)


def test_names_that_allow_two_readings_are_not_guessed(tmp_path: Path) -> None:
    for name in ("a_mask.png", "a_overlay.png", "b.tif", "b.bmp", ".c.png", "__MACOSX/c.png"):
        save(tmp_path / name, SQUARE)
    match = match_masks(["a.jpg", "b.jpg", "c.jpg"], tmp_path)
    assert match.paths == {}
    assert match.ambiguous == {"b.jpg": ["b.bmp", "b.tif"]}
    assert match.unmatched == ["a_mask.png", "a_overlay.png"]


def test_both_sides_may_have_a_word_of_their_own_when_several_agree(tmp_path: Path) -> None:
    for number in (1, 12, 3):
        save(tmp_path / f"{number}_mask.png", SQUARE)
    match = match_masks(["1_sat.jpg", "12_sat.jpg", "3_sat.jpg"], tmp_path)
    assert {name: path.name for name, path in match.paths.items()} == {
        "1_sat.jpg": "1_mask.png",
        "12_sat.jpg": "12_mask.png",
        "3_sat.jpg": "3_mask.png",
    }
    assert match_masks(["1_cat.jpg"], tmp_path).paths == {}


@pytest.mark.parametrize(("orientation", "noted"), [(1, False), (2, True), (3, True), (4, True), (6, False)])
def test_exif_turns_that_sizes_cannot_tell_are_noted(
    make_folder: Callable[..., Path], orientation: int, noted: bool
) -> None:
    root = make_folder()
    image = Image.open(root / "images/a.png")
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(root / "images/a.png", exif=exif)
    report = check_folder(root)
    assert report.ok
    assert any("by their EXIF tag" in note and "a.png" in note for note in report.notes) is noted
    save(root / "masks/a.png", SQUARE.T)
    (problem,) = check_folder(root).problems
    assert problem.kind == "mask size"
    assert ("EXIF tag turns it upright (orientation 6)" in problem.message) is (orientation == 6)


def test_one_mask_of_255_among_masks_of_ids_is_a_problem_where_its_labels_name_a_class(
    make_folder: Callable[..., Path],
) -> None:
    root = make_folder()
    save(root / "masks/b.png", SQUARE * 255)
    (problem,) = check_folder(root, caller="check").problems
    assert problem.name == "b.png"
    assert "if 255 is an object, give --mask-values 0=0,1=1,255=1; if it is not" in problem.message
    with pytest.raises(DataError, match=r"the mask of b\.png holds only 0 \(background\) and 255"):
        check_masks(root)
    assert check_folder(root, mask_values="0=0,1=1,255=1").ok
    assert check_folder(root, mask_values="ids").ok


def test_masks_that_name_other_classes_than_the_labels_point_to_the_order(make_folder: Callable[..., Path]) -> None:
    root = make_folder(labels="dog")
    (root / "classes.txt").write_text("cat\ndog\n")
    (note,) = [note for note in check_folder(root).notes if "another order" in note]
    assert note.startswith("2 of 2 masks show classes that the labels do not name.")
    assert note.endswith("in that order in classes.txt; here 1 is 'cat'.")


def test_a_folder_of_masks_without_an_image_is_a_problem(make_folder: Callable[..., Path]) -> None:
    root = make_folder()
    for name in ("a", "b"):
        (root / f"masks/{name}.png").rename(root / f"masks/{name}.npy")
    (problem,) = check_folder(root).problems
    assert problem.message == (
        f"{root}/masks holds 2 .npy and no image; save masks as PNG, with label ids as pixel values."
    )


def test_a_mask_in_the_alpha_channel_alone_is_read_from_there(tmp_path: Path) -> None:
    pixels = np.dstack([np.full((*SQUARE.shape, 3), 255, np.uint8), SQUARE * 255])
    mask = open_mask(save(tmp_path / "m.png", pixels), num_classes=1, values=MaskValues.parse("binary"))
    np.testing.assert_array_equal(mask, SQUARE)


def test_a_trimap_is_called_one(tmp_path: Path):
    Image.fromarray(np.array([[1, 2], [3, 2]], np.uint8)).save(tmp_path / "m.png")
    with pytest.raises(DataError, match=r"of a trimap \(object, background, border\) they are 1=1,2=0,3=255\."):
        open_mask(tmp_path / "m.png", num_classes=1)
    meant = open_mask(tmp_path / "m.png", num_classes=1, values=MaskValues.parse("1=1,2=0,3=255"))
    np.testing.assert_array_equal(meant, [[1, 0], [255, 0]])
