from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from PIL import Image, features

from bitrans_hf.data import check_folder, class_names, load_folder
from bitrans_hf.data.image_files import ImageFinder, image_suffixes, list_images


def save_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path, format="PNG")


def test_only_the_users_own_images_are_listed(tmp_path: Path) -> None:
    for name in (
        "b.jpg", "a/c.JFIF", "a/d.jpe", "e.tif", ".hidden.png", "._b.jpg", ".ipynb_checkpoints/b-checkpoint.jpg",
        "__MACOSX/a/._c.jpg", "__MACOSX/x.jpg", "@eaDir/y.jpg", "masks/b.png", "out/b.png", "runs/x/seeds/s.png",
    ):  # fmt: skip
        save_image(tmp_path / name)
    for name in ("d.heic", "a/e.CR2", "Thumbs.db", "notes.txt", "film.mpg", "table.h5", "out/masks.json",
                 "runs/x/seeds/recipe.json"):  # fmt: skip
        (tmp_path / name).write_bytes(b"\0")
    listing = list_images(tmp_path, excluded=(tmp_path / "masks",))
    assert listing.names == ["a/c.JFIF", "a/d.jpe", "b.jpg", "e.tif"]
    assert listing.unreadable_types == ["a/e.CR2", "d.heic"]
    assert sorted(listing.results) == ["out", "runs/x/seeds"]
    assert listing.left_out()[0] == (
        "1 .cr2, 1 .heic: images of types that cannot be read here are left out, first a/e.CR2; convert them to JPEG "
        "or PNG."
    )


@pytest.mark.parametrize(("suffix", "feature"), [(".avif", "avif"), (".webp", "webp"), (".jp2", "jpg_2000")])
def test_a_type_counts_as_an_image_if_this_pillow_reads_it(tmp_path: Path, suffix: str, feature: str) -> None:
    with warnings.catch_warnings(action="ignore"):  # Pillow 10 does not know AVIF by name
        assert (suffix in image_suffixes()) == bool(features.check(feature))
    save_image(tmp_path / f"a{suffix}")
    listing = list_images(tmp_path)
    assert len(listing.names) + len(listing.unreadable_types) == 1


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    save_image(tmp_path / "elsewhere/cat/a.png")
    save_image(tmp_path / "photos/dog/b.png")
    (tmp_path / "elsewhere/cat/back").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos/a_loop").symlink_to(tmp_path / "photos/dog")
    (tmp_path / "photos/dog/up").symlink_to(tmp_path)
    (tmp_path / "photos/cat").symlink_to(tmp_path / "elsewhere/cat")
    names = list_images(tmp_path / "photos").names
    assert [name for name in names if "back" not in name] == ["cat/a.png", "dog/b.png"]
    assert len(names) <= 3


def test_a_name_means_the_one_image_that_it_fits() -> None:
    images = ImageFinder(["x/cafe\u0301.png", "a.jpg", "a.png", "b.v2.jpg", "two  blanks.png"])
    assert images.found("x/caf\u00e9.png") == "x/cafe\u0301.png"
    assert images.found("b.v2") == "b.v2.jpg"
    assert images.found("two blanks.png") == "two  blanks.png"
    assert images.found("a") is None
    assert images.found("b.v2.png") is None
    assert images.advice("b.v2.png") == "did you mean 'b.v2.jpg'?"
    assert images.advice("B.V2.jpg") == "did you mean 'b.v2.jpg'?"
    assert images.advice("c.png") == "add the file or take out the row."


def test_class_folders_hold_no_foreign_folders_and_say_what_they_leave_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("cat/a.jpg", "cat/b.jfif", "dog/c.png", "__MACOSX/cat/._a.jpg", "masks/cat/a.png"):
        save_image(tmp_path / name)
    (tmp_path / "dog/d.heic").write_bytes(b"\0")
    dataset = load_folder(tmp_path, masks=False)
    assert class_names(dataset) == ["cat", "dog"]
    assert dataset["image_id"][:] == ["cat/a", "cat/b", "dog/c"]
    assert "1 .heic: images of types that cannot be read here" in caplog.text
    assert any(".heic" in note for note in check_folder(tmp_path).notes)
