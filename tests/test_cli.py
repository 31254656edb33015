from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from stopping import stop
from tiny_models import picture, tiny_model

from bitrans_hf import BiTransImageProcessor, PseudoMaskPipeline, cli
from bitrans_hf.cli import main
from bitrans_hf.hub import refiners
from bitrans_hf.hub.labels import palette

CLASSES = ["cat", "dog", "horse"]
REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    BiTransImageProcessor().save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Seven images, one of them in a folder and one without labels, and their table."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    rows = ["file_name,labels"]
    for index, labels in enumerate(["cat", "dog;horse", "horse", "", "cat;dog", "dog"]):
        picture(32 + 4 * (index % 2), 44, seed=index).save(folder / f"p{index}.png")
        rows.append(f"p{index}.png,{labels}")
    picture(40, 40, seed=9).save(folder / "more" / "p9.png")
    (folder / "labels.csv").write_text("\n".join([*rows, "more/p9.png,horse"]))
    return folder


def masks_command(model: Path, photos: Path, out: Path, *more: str) -> list[str]:
    return ["masks", "--model", str(model), "--images", str(photos), "--out", str(out), "--device", "cpu", *more]


def label_map_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "P"
        assert image.getpalette() == palette()
        return np.asarray(image)


def expected_label_map(path: Path, labels: list[str] | None, **options: Any) -> np.ndarray:
    """What the pipeline says of one image."""
    pipe = PseudoMaskPipeline(model=tiny_model(), image_processor=BiTransImageProcessor(), task="", device="cpu")
    with Image.open(path) as image:
        label_map = np.zeros((image.height, image.width), dtype=np.uint8)
    for entry in pipe({"image": path, "candidate_labels": labels}, **options):
        label_map[np.asarray(entry["mask"]) > 0] = CLASSES.index(entry["label"]) + 1
    return label_map


# ---- Masks.


@pytest.mark.parametrize("workers", ["0", "2"])
def test_every_row_of_the_table_gets_the_pipelines_mask(
    model_folder: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: str
):
    out = tmp_path / "masks"
    main(masks_command(model_folder, photos, out, "--labels", "labels.csv", "--workers", workers, "--batch-size", "3"))
    assert {path.relative_to(out).as_posix() for path in out.rglob("*.png")} == {
        *(f"p{index}.png" for index in range(6)),
        "more/p9.png",
    }
    labels = [["cat"], ["dog", "horse"], ["horse"], [], ["cat", "dog"], ["dog"]]
    for index, names in enumerate(labels):
        expected = expected_label_map(photos / f"p{index}.png", names)
        np.testing.assert_array_equal(label_map_of(out / f"p{index}.png"), expected)
    assert label_map_of(out / "p3.png").max() == 0
    assert set(np.unique(label_map_of(out / "more" / "p9.png"))) == {0, 3}
    assert json.loads((out / "masks.json").read_text())["label_ids"] == {
        "background": 0, "cat": 1, "dog": 2, "horse": 3,
    }  # fmt: skip
    assert f"masks: 7 images, 7 written, 0 there before, 0 left out -> {out}" in capsys.readouterr().out

    sure = json.loads((out / "masks.json").read_text())["confidence"]
    assert {image_id: list(found) for image_id, found in sure.items()} == {
        **{f"p{index}": names for index, names in enumerate(labels)},
        "more/p9": ["horse"],
    }
    (dog, horse) = PseudoMaskPipeline.from_pretrained(model_folder, "cpu")(
        str(photos / "p1.png"), candidate_labels=labels[1]
    )
    assert sure["p1"] == {"dog": round(dog["confidence"], 3), "horse": round(horse["confidence"], 3)}
    least = [min(found.values(), default=1.0) for found in sure.values()]
    assert least == sorted(least)
    assert len(set(least)) > 3

    # Masks that are there keep what was found of them.
    (out / "p0.png").unlink()
    main(masks_command(model_folder, photos, out, "--labels", "labels.csv"))
    assert json.loads((out / "masks.json").read_text())["confidence"] == sure


def test_without_a_table_the_model_decides_and_the_unused_table_is_named(
    model_folder: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "masks"
    main(masks_command(model_folder, photos, out, "--label-threshold", "0.3"))
    for index in range(6):
        expected = expected_label_map(photos / f"p{index}.png", None, label_threshold=0.3)
        np.testing.assert_array_equal(label_map_of(out / f"p{index}.png"), expected)
    assert "labels.csv is not used; --labels labels.csv uses its labels" in capsys.readouterr().err


def test_options_reach_the_pipeline(model_folder: Path, photos: Path, tmp_path: Path):
    out = tmp_path / "masks"
    words = ["--threshold", "0.6", "--scales", "1.0", "0.75", "--no-flip", "--no-refine", "--refiner", "par"]
    main(masks_command(model_folder, photos, out, "--labels", "labels.csv", *words, "--max-side", "30"))
    options = {"threshold": 0.6, "scales": (1.0, 0.75), "flip": False, "refine": False, "refiner": "par"}
    expected = expected_label_map(photos / "p1.png", ["dog", "horse"], **options, max_side=30)
    np.testing.assert_array_equal(label_map_of(out / "p1.png"), expected)


def test_masks_are_upright_or_for_the_stored_pixels(model_folder: Path, tmp_path: Path):
    folder, exif = tmp_path / "photos", Image.Exif()
    folder.mkdir()
    exif[0x0112] = 6
    picture(32, 48).save(folder / "turned.jpg", exif=exif)
    main(masks_command(model_folder, folder, tmp_path / "upright"))
    main(masks_command(model_folder, folder, tmp_path / "stored", "--stored-pixels"))
    assert label_map_of(tmp_path / "upright" / "turned.png").shape == (48, 32)
    assert label_map_of(tmp_path / "stored" / "turned.png").shape == (32, 48)


# ---- Runs that stop.


def test_broken_and_tiny_pictures_are_named_at_the_end_and_stop_nothing(
    model_folder: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (photos / "p2.png").write_bytes((photos / "p2.png").read_bytes()[:60])
    Image.new("RGB", (1, 1)).save(photos / "p4.png")
    (photos / "p5.png").unlink()
    out = tmp_path / "masks"
    main(masks_command(model_folder, photos, out, "--batch-size", "2"))
    captured = capsys.readouterr()
    assert "6 images, 4 written, 0 there before, 2 left out" in captured.out
    assert re.search(r"left out: image \S*p2\.png cannot be read", captured.err)
    assert re.search(r"left out: image \S*p4\.png is smaller than a patch: 1 x 1", captured.err)
    assert sorted(path.name for path in out.glob("*.png")) == ["p0.png", "p1.png", "p3.png"]


def test_strict_stops_at_the_first_broken_picture(model_folder: Path, photos: Path, tmp_path: Path):
    (photos / "p2.png").write_bytes(b"")
    with pytest.raises(SystemExit, match=r"error: image \S*p2\.png cannot be read"):
        main(masks_command(model_folder, photos, tmp_path / "masks", "--strict"))


def test_ctrl_c_ends_a_run_with_its_workers_and_keeps_the_masks(model_folder: Path, tmp_path: Path):
    folder, out = tmp_path / "photos", tmp_path / "masks"
    folder.mkdir()
    for index in range(24):
        picture(40, 48, seed=index).save(folder / f"{index:03}.png")
    command = masks_command(model_folder, folder, out, "--batch-size", "1", "--scales", "1.0", "2.0", "--workers", "2")
    ended = stop(["-m", "bitrans_hf", *command], lambda _: len(list(out.glob("[!.]*.png"))) >= 2, tmp_path / "said")
    assert ended.status == 130
    assert [line for line in ended.err.splitlines() if not line.endswith("so far")] == [
        "bitrans masks: loading PyTorch and its libraries ...",
        f"masks: loading the model {model_folder} ...",
        f"masks: reading the list of images in {folder} ...",
        "masks: 24 of 24 images to do, 4 view(s) of each; batch size 1, device cpu",
        "stopped before all 24 masks were made; masks that are written are kept; to go on, rerun the same command.",
    ]
    masks = list(out.glob("[!.]*.png"))
    assert 2 <= len(masks) < 24
    for path in masks:
        label_map_of(path)  # whole files alone


def test_a_killed_run_goes_on_and_ends_with_the_same_masks(model_folder: Path, tmp_path: Path):
    folder, out = tmp_path / "photos", tmp_path / "masks"
    folder.mkdir()
    for index in range(24):
        picture(40, 48, seed=index).save(folder / f"{index:03}.png")
    command = masks_command(model_folder, folder, out, "--batch-size", "1", "--scales", "1.0", "2.0")
    process = subprocess.Popen(
        [sys.executable, "-m", "bitrans_hf", *command], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while len(list(out.glob("[!.]*.png"))) < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    _, errors = process.communicate()
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("[!.]*.png")}
    assert 5 <= len(before) < 24, errors
    for path in out.glob("[!.]*.png"):
        label_map_of(path)  # whole files alone

    main(command)
    main(masks_command(model_folder, folder, tmp_path / "once", *command[9:]))
    after = {path.name: path for path in out.glob("[!.]*.png")}
    assert len(after) == 24
    assert {name: after[name].stat().st_mtime_ns for name in before} == before
    for name, path in after.items():
        assert path.read_bytes() == (tmp_path / "once" / name).read_bytes()


def test_masks_of_other_settings_are_not_mixed(
    model_folder: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "masks"
    main(masks_command(model_folder, photos, out))
    small = label_map_of(out / "p0.png")
    with pytest.raises(SystemExit, match=r"holds masks made with threshold 0.4, now it is 0.1; give another --out"):
        main(masks_command(model_folder, photos, out, "--threshold", "0.1"))
    np.testing.assert_array_equal(label_map_of(out / "p0.png"), small)
    main(masks_command(model_folder, photos, out, "--threshold", "0.1", "--overwrite"))
    assert (label_map_of(out / "p0.png") > 0).sum() > (small > 0).sum()
    capsys.readouterr()
    main(masks_command(model_folder, photos, out, "--threshold", "0.1"))
    assert "0 written, 7 there before" in capsys.readouterr().out


# ---- A look over a folder.


def test_check_reports_a_good_folder(photos: Path, capsys: pytest.CaptureFixture[str]):
    lines = (photos / "labels.csv").read_text().splitlines()
    (photos / "labels.csv").write_text("\n".join(line for line in lines if not line.endswith(",")))
    (photos / "p3.png").unlink()
    main(["check", str(photos)])
    printed = capsys.readouterr().out
    assert "6 images, 3 classes" in printed
    assert "cat 2, dog 3, horse 3" in printed
    assert "no problems found" in printed


def test_check_names_what_is_wrong_and_ends_with_status_1(photos: Path, capsys: pytest.CaptureFixture[str]):
    (photos / "p1.png").write_bytes(b"no image")
    (photos / "tags.csv").write_text("file_name,labels\np0.png,cat\np1.png,dog\nnone.png,dog\n")
    (photos / "labels.csv").unlink()
    with pytest.raises(SystemExit, match=r"^1$"):
        main(["check", str(photos), "--labels", "tags.csv"])
    printed = capsys.readouterr().out
    assert re.search(r"p1\.png cannot be read", printed)
    assert "none.png" in printed
    with pytest.raises(SystemExit, match=r"error: \S*nowhere is not a folder"):
        main(["check", str(photos / "nowhere")])


# ---- What is refused, and what is explained.


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--images", "nowhere"], "error: nowhere is not a folder"),
        (["--model", "nowhere/model"], "error: .*nowhere/model"),
        (["--labels", "tags.csv"], "error: table .*tags.csv is not there"),
        (["--threshold", "2"], r"error: threshold must be in \[0, 1\], got 2.0"),
        (["--scales", "0"], "error: scales must be one or more factors above 0"),
        (["--max-side", "0"], "error: max_side must be at least 1 pixel"),
    ],
)
def test_wrong_options_end_with_one_sentence(
    model_folder: Path, photos: Path, tmp_path: Path, change: list[str], words: str
):
    with pytest.raises(SystemExit, match=words):
        main(masks_command(model_folder, photos, tmp_path / "masks", *change))


def test_a_label_that_the_model_does_not_know_is_named_with_its_row(model_folder: Path, photos: Path, tmp_path: Path):
    (photos / "labels.csv").write_text("file_name,labels\np0.png,cat\np1.png,hrose\n")
    with pytest.raises(
        SystemExit, match=r"labels.csv line 3 \(p1.png\) names the class 'hrose'.*did you mean 'horse'"
    ):
        main(masks_command(model_folder, photos, tmp_path / "masks", "--labels", "labels.csv"))


def test_two_pictures_of_one_name_are_refused(model_folder: Path, photos: Path, tmp_path: Path):
    picture(32, 32).save(photos / "p0.jpg")
    with pytest.raises(SystemExit, match=r"p0.jpg and .*p0.png would get the same mask; rename one"):
        main(masks_command(model_folder, photos, tmp_path / "masks"))


def test_an_empty_folder_is_refused(model_folder: Path, tmp_path: Path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(SystemExit, match=r"photos holds no images, expected files such as"):
        main(masks_command(model_folder, tmp_path / "photos", tmp_path / "masks"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["bitrans check photos", "bitrans masks --model runs/photos/train/model"]),
        (["masks", "--help"], ["file_name,labels", "0 is background", "--threshold", "--refiner par"]),
        (["check", "--help"], ["bitrans check photos"]),
        (["app", "--help"], ["bitrans app --model"]),
    ],
)
def test_help_shows_commands_to_copy(capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]):
    with pytest.raises(SystemExit, match="0"):
        main(arguments)
    text = capsys.readouterr().out
    for word in words:
        assert word in text
    assert max(map(len, text.splitlines())) <= 120


def test_the_installed_command_is_this_one():
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["bitrans"].partition(":")
    assert getattr(importlib.import_module(module), function) is main


def test_the_command_offers_the_refiners_of_the_pipeline():
    assert list(cli.REFINERS) == sorted(refiners.REFINERS)
