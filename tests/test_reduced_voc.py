"""A copy of a devkit with smaller images: its sizes, its pixels, and what is done about damage and kills."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bitrans_hf.data import DataError, load_voc, open_mask, write_reduced_voc
from bitrans_hf.stages.prepare_voc import main as prepare_voc_main

TRAINING = Path(__file__).resolve().parents[1] / "training"

SIZES = {"2007_000001": (100, 75), "2007_000002": (33, 64), "2007_000003": (32, 20)}
"""(width, height) of the images; the last is small enough for a longest side of 32."""
PALETTE = [number * factor % 256 for number in range(256) for factor in (3, 5, 7)]


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    root = tmp_path / "VOC2012"
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    (root / "ImageSets" / "Segmentation" / "train.txt").write_text("".join(f"{image_id}\n" for image_id in SIZES))
    for folder in ("JPEGImages", "Annotations", "SegmentationClass", "SegmentationClassAug"):
        (root / folder).mkdir()
    for number, (image_id, (width, height)) in enumerate(SIZES.items()):
        generator = np.random.default_rng(number)
        ramp = np.linspace(0, 255, width * height * 3).reshape(height, width, 3).astype(np.uint8)
        Image.fromarray(ramp).save(root / "JPEGImages" / f"{image_id}.jpg", quality=80)
        mask = Image.fromarray(generator.choice([0, 3, 15, 255], (height, width)).astype(np.uint8))
        mask.putpalette(PALETTE)
        mask.save(root / "SegmentationClassAug" / f"{image_id}.png")
        (root / "Annotations" / f"{image_id}.xml").write_text(
            "<annotation><object><name>cat</name></object></annotation>"
        )
    # Both folders of masks exist in a whole devkit, the first for fewer images.
    (root / "SegmentationClass" / "2007_000001.png").write_bytes(
        (root / "SegmentationClassAug" / "2007_000001.png").read_bytes()
    )
    return root


def files_of(root: Path) -> dict[str, str]:
    """Relative path -> hash of every file."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("above", [False, True])
def test_the_longest_side_is_as_asked_and_masks_keep_ids_and_palette(devkit: Path, tmp_path: Path, above: bool):
    target = tmp_path / "small"
    report = write_reduced_voc(devkit.parent if above else devkit, target, 32)
    assert (report.written, report.there) == (3 + 4, 0)
    assert set(files_of(target)) == set(files_of(devkit))
    # 33 x 64 halves to 16.5, which Python rounds to the even 16.
    wanted = {"2007_000001": (32, 24), "2007_000002": (16, 32), "2007_000003": (32, 20)}
    for image_id, size in wanted.items():
        with Image.open(target / "JPEGImages" / f"{image_id}.jpg") as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", size)
        with Image.open(target / "SegmentationClassAug" / f"{image_id}.png") as mask:
            assert (mask.format, mask.mode, mask.size) == ("PNG", "P", size)
            assert mask.getpalette()[: 3 * 16] == PALETTE[: 3 * 16]
    # The nearest pixel to a small one's center, by a loop.
    large = open_mask(devkit / "SegmentationClassAug" / "2007_000001.png")
    small = open_mask(target / "SegmentationClassAug" / "2007_000001.png")
    for y, x in np.ndindex(24, 32):
        assert small[y, x] == large[int((y + 0.5) * 75 / 24), int((x + 0.5) * 100 / 32)]
    # A bicubic ramp stays a ramp.
    with Image.open(target / "JPEGImages" / "2007_000001.jpg") as image:
        rows = np.asarray(image).mean((1, 2))
    np.testing.assert_allclose(rows, 255 * (np.arange(24) + 0.5) / 24, atol=3)


def test_small_images_lists_and_annotations_are_copied(devkit: Path, tmp_path: Path):
    write_reduced_voc(devkit, tmp_path / "small", 32)
    before, after = files_of(devkit), files_of(tmp_path / "small")
    same = {name for name in before if before[name] == after[name]}
    assert same == {name for name in before if name.startswith(("ImageSets", "Annotations"))} | {
        "JPEGImages/2007_000003.jpg", "SegmentationClassAug/2007_000003.png",
    }  # fmt: skip
    assert load_voc(tmp_path / "small", "train", classes=["cat"])["labels"][:] == [[0], [0], [0]]


def test_files_that_are_there_stay_and_missing_ones_are_added(devkit: Path, tmp_path: Path):
    target = tmp_path / "small"
    write_reduced_voc(devkit, target, 32)
    first = files_of(target)
    lost = target / "SegmentationClassAug" / "2007_000002.png"
    lost.unlink()
    times = {path: path.stat().st_mtime_ns for path in target.rglob("*.*")}
    report = write_reduced_voc(devkit, target, 32)
    assert (report.written, report.there) == (1, 6)
    assert files_of(target) == first
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


def test_damaged_files_are_named_after_the_others_are_written(devkit: Path, tmp_path: Path):
    picture = devkit / "JPEGImages" / "2007_000001.jpg"
    picture.write_bytes(picture.read_bytes()[:-200])
    (devkit / "SegmentationClassAug" / "2007_000002.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"2007_000001.jpg cannot be read .*\(2 such problems in 3 images\)"):
        write_reduced_voc(devkit, tmp_path / "small", 32)
    made = files_of(tmp_path / "small")
    assert "JPEGImages/2007_000003.jpg" in made
    assert not [name for name in made if "tmp" in name]


def test_a_mask_of_another_size_than_its_image_is_refused(devkit: Path, tmp_path: Path):
    mask = Image.new("P", (99, 75))
    mask.save(devkit / "SegmentationClassAug" / "2007_000001.png")
    with pytest.raises(DataError, match=r"is 75x99 \(height x width\) and its image 75x100"):
        write_reduced_voc(devkit, tmp_path / "small", 32)


def test_a_copy_of_another_size_is_not_mixed_in(devkit: Path, tmp_path: Path):
    write_reduced_voc(devkit, tmp_path / "small", 32)
    with pytest.raises(
        DataError, match=r"2007_000001.jpg has 32 x 24 pixels, expected 48 x 36 for a longest side of 48"
    ):
        write_reduced_voc(devkit, tmp_path / "small", 48)


@pytest.mark.parametrize(("max_side", "folder", "words"), [(0, "small", "at least 1 pixel"), (9, ".", "lie over")])
def test_wrong_requests_are_refused(devkit: Path, max_side: int, folder: str, words: str):
    with pytest.raises(ValueError, match=words):
        write_reduced_voc(devkit, devkit / folder, max_side)


def test_the_command_writes_the_copy_alone(devkit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    # Of a part of VOC, which the check of all counts would refuse.
    target = tmp_path / "small"
    prepare_voc_main(["--voc", str(devkit), "--reduced", str(target), "--max_side", "32", "--quiet"])
    assert capsys.readouterr().out == (
        f"{target}: images and masks of at most 32 pixels a side, 7 written, 0 there already\n"
    )


def test_real_images_come_out_as_plain_pillow_makes_them(shared_data: Path, tmp_path: Path):
    real, root = shared_data / "voc12_animals", tmp_path / "VOC2012"
    image_ids = (real / "ImageSets" / "Segmentation" / "val.txt").read_text().split()[:6]
    for folder, suffix in (("JPEGImages", "jpg"), ("SegmentationClassAug", "png")):
        (root / folder).mkdir(parents=True)
        for image_id in image_ids:
            (root / folder / f"{image_id}.{suffix}").symlink_to(real / folder / f"{image_id}.{suffix}")
    write_reduced_voc(root, tmp_path / "small")
    kinds = {
        "JPEGImages": ("jpg", Image.Resampling.BICUBIC),
        "SegmentationClassAug": ("png", Image.Resampling.NEAREST),
    }
    for folder, (suffix, how) in kinds.items():
        for image_id in image_ids:
            with Image.open(real / folder / f"{image_id}.{suffix}") as image:
                scale = 256 / max(image.size)
                wanted = image.resize((round(image.width * scale), round(image.height * scale)), how)
            wanted.save(tmp_path / f"wanted.{suffix}", **({"quality": 95} if suffix == "jpg" else {}))
            made = tmp_path / "small" / folder / f"{image_id}.{suffix}"
            assert made.read_bytes() == (tmp_path / f"wanted.{suffix}").read_bytes()
