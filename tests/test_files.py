"""No command writes over what it reads, or reads what it wrote before."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny_models import picture, tiny_model

from bitrans_hf import BiTransImageProcessor, InputError
from bitrans_hf.cli import main
from bitrans_hf.data import check_folder, load_folder
from bitrans_hf.files import OUTPUT_MARK, lies_in, mark_output, refuse_overwriting


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    BiTransImageProcessor().save_pretrained(folder)
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(2):
        picture(32, 44, seed=index).save(folder / f"p{index}.png")
    return folder


def write_masks(model: Path, images: Path, out: Path, *more: str) -> None:
    words = ["--images", str(images), "--out", str(out), "--device", "cpu", "--quiet", "--label-threshold", "0"]
    main(["masks", "--model", str(model), *words, *more])


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_masks_inside_the_folder_of_images_are_not_read_as_images(
    model_folder: Path, images: Path, capsys: pytest.CaptureFixture[str]
):
    write_masks(model_folder, images, images / "masks")
    before = content(images)
    assert sorted(before) == ["masks/.bitrans_output", "masks/masks.json", "masks/p0.png", "masks/p1.png", *(
        f"p{index}.png" for index in range(2)
    )]  # fmt: skip
    capsys.readouterr()
    write_masks(model_folder, images, images / "masks")
    assert "masks: 2 images, 0 written, 2 there before" in capsys.readouterr().out
    assert content(images) == before
    write_masks(model_folder, images, images / "others")  # nor those of an earlier run
    assert sorted(path.name for path in (images / "others").rglob("*.png")) == ["p0.png", "p1.png"]


@pytest.mark.parametrize("more", [(), ("--overwrite",)], ids=["plain", "overwrite"])
@pytest.mark.parametrize("spelling", ["same", "relative", "link"])
def test_masks_are_not_written_into_the_folder_of_images_itself(
    model_folder: Path, images: Path, spelling: str, more: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
):
    out = {"same": images, "relative": Path("images") / ".." / "images", "link": images.parent / "link"}[spelling]
    if spelling == "link":
        out.symlink_to(images, target_is_directory=True)
    monkeypatch.chdir(images.parent)
    before = content(images)
    with pytest.raises(SystemExit, match=r"error: --out .* is the folder that is read"):
        write_masks(model_folder, images, out, *more)
    assert content(images) == before


def test_a_mask_never_replaces_an_image_of_the_table_or_a_file_of_somebody_else(model_folder: Path, images: Path):
    (images / "masks").mkdir()
    (images / "p1.png").rename(images / "masks" / "p0.png")
    (images / "labels.csv").write_text("file_name,labels\np0.png,cat\nmasks/p0.png,dog\n")
    before = content(images)
    with pytest.raises(SystemExit, match=r"--out would replace .*p0.png, which is one of the files to be read"):
        write_masks(model_folder, images, images / "masks", "--labels", "labels.csv", "--overwrite")
    (images.parent / "drawn").mkdir()
    Image.new("L", (44, 32)).save(images.parent / "drawn" / "p0.png")
    with pytest.raises(SystemExit, match=r"p0.png is there and is no mask that bitrans wrote; give another --out"):
        write_masks(model_folder, images, images.parent / "drawn", "--overwrite")
    assert content(images) == before


def test_masks_are_no_images_for_masks(model_folder: Path, images: Path):
    write_masks(model_folder, images, images / "masks")
    with pytest.raises(SystemExit, match="holds masks that bitrans wrote; give the folder that holds the images"):
        write_masks(model_folder, images / "masks", images / "again")


def test_what_we_wrote_is_neither_a_class_nor_an_image_without_a_row(tmp_path: Path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        picture(32, 32, seed=len(name) + ord(name[0])).save(tmp_path / name / f"{name}.png")
    mark_output(tmp_path / "runs" / "photos")
    (tmp_path / "runs" / "photos" / "report").mkdir()
    picture(32, 32).save(tmp_path / "runs" / "photos" / "report" / "gallery.png")
    assert check_folder(tmp_path).classes == ("cat", "dog")
    (tmp_path / "labels.csv").write_text("file_name,labels\ncat/cat.png,cat\ndog/dog.png,dog\n")
    assert check_folder(tmp_path).ok
    assert load_folder(tmp_path)["image_id"] == ["cat/cat", "dog/dog"]
    assert (tmp_path / "runs" / "photos" / OUTPUT_MARK).is_file()


def test_a_path_lies_in_a_folder_however_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    assert all(lies_in(Path(path), tmp_path / "a") for path in ("a", "a/new/b", "link", "link/new", "x/../a"))
    assert not any(lies_in(Path(path), tmp_path / "a") for path in (".", "ab", "x/a", "a/..", "link/.."))
    assert lies_in(tmp_path / "link" / "b", Path("link"))


def test_a_second_name_of_an_input_is_the_input(tmp_path: Path):
    (tmp_path / "a.png").write_text("image")
    (tmp_path / "b.png").hardlink_to(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"--out would replace .*b.png"):
        refuse_overwriting([tmp_path / "new.png", tmp_path / "b.png"], [tmp_path / "a.png"], "--out")
    refuse_overwriting([tmp_path / "new.png"], [tmp_path / "a.png", tmp_path / "gone.png"], "--out")


@pytest.mark.skipif(sys.platform == "linux", reason="needs a disk that takes two spellings for one name")
def test_letter_case_does_not_make_another_folder(tmp_path: Path):
    (tmp_path / "Images").mkdir()
    assert lies_in(tmp_path / "images" / "masks", tmp_path / "IMAGES")
