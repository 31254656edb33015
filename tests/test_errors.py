"""An error that a person can fix ends a command with one sentence; a bug of ours keeps its traceback."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image
from tiny_models import picture, tiny_model

from bitrans_hf import BiTransConfig, BiTransImageProcessor, InputError, cli
from bitrans_hf.commands import run_command
from bitrans_hf.data import folder_report
from bitrans_hf.hub.errors import MissingExtraError, MissingFileError, ends_with_a_sentence, sentence_of
from bitrans_hf.pool import ImagePool
from bitrans_hf.stages.recipe import Recipe, RunOptions
from bitrans_hf.stages.run import Run, StageError
from bitrans_hf.stages.train import validate


def raising(error: BaseException):
    def function(*_: object, **__: object) -> None:
        raise error

    return function


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        picture(32, 32, seed=ord(name[0])).save(tmp_path / name / "a.png")
    return tmp_path


BUGS = [ValueError("bug"), TypeError("bug"), KeyError("bug"), OSError("bug"), ImportError("bug"), RuntimeError("bug")]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: type(bug).__name__)
def test_a_bug_keeps_its_traceback_in_commands_and_stages(
    bug: Exception, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    assert sentence_of(bug) is None
    monkeypatch.setattr(folder_report, "look_through", raising(bug))
    with pytest.raises(type(bug)) as caught:
        cli.main(["check", str(folder)])
    assert caught.value is bug
    with pytest.raises(type(bug)) as caught:
        run_command(raising(bug))
    assert caught.value is bug


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "make room on the disk and rerun the same command."),
        (errno.EDQUOT, "make room in your quota and rerun the same command."),
        (errno.EROFS, "give a place on a disk that can be written to."),
        (errno.EACCES, "change its permissions or give another place."),
        (errno.ENAMETOOLONG, "shorten the name."),
        (errno.ENOENT, "check the name."),
        (errno.ENOTDIR, "check the name: a part of it is a file, not a folder."),
    ],
    ids=lambda part: errno.errorcode[part] if isinstance(part, int) else "",
)
def test_what_the_disk_refuses_ends_with_one_sentence(number: int, remedy: str):
    refused = raising(OSError(number, os.strerror(number), "masks/a.png"))
    for run in (lambda: run_command(refused), ends_with_a_sentence()(refused)):
        with pytest.raises(SystemExit) as ended:
            run()
        assert ended.value.code == f"error: masks/a.png: {os.strerror(number)}; {remedy}"  # printed, with status 1


@pytest.mark.parametrize("kind", [InputError, StageError, MissingFileError, MissingExtraError])
def test_an_error_of_ours_ends_with_its_own_sentence(kind: type[InputError]):
    with pytest.raises(SystemExit, match=r"^error: no model here; train one\.$"):
        run_command(raising(kind("no model here; train one.")))
    assert isinstance(MissingFileError(), FileNotFoundError)
    assert isinstance(MissingExtraError(), ImportError)


def test_a_wrong_value_of_a_configuration_ends_with_its_reason_alone():
    with pytest.raises(SystemExit, match=r"^error: hidden_size 10 must be a multiple of num_attention_heads, got 3"):
        run_command(lambda: BiTransConfig(hidden_size=10, num_attention_heads=3))
    with pytest.raises(SystemExit, match=r"^error: Field 'image_size' expected int, got str \(value: 'abc'\)$"):
        run_command(lambda: BiTransConfig(image_size="abc"))


def test_the_app_without_gradio_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "bitrans_hf.app", raising=False)
    with pytest.raises(SystemExit, match=r"error: the app needs gradio; install it with pip install"):
        cli.main(["app", "--model", "somewhere"])


def broken_or_buggy(job: str) -> int:
    raise InputError("it is too small.") if job == "small" else TypeError("a bug")


def test_an_image_that_a_person_can_mend_is_left_out_of_a_set_and_a_bug_stops_it():
    with ImagePool(1) as pool:
        assert [each.error for each in pool.run(broken_or_buggy, [("a", "small")])] == ["it is too small."]
        with pytest.raises(TypeError, match="a bug") as caught:
            list(pool.run(broken_or_buggy, [("a", "small"), ("b", "")]))
    assert caught.value.__notes__ == ["while working on the image b"]


def test_validation_images_of_which_none_can_be_read_are_one_sentence(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"no image")
    images = [{"image": {"path": str(tmp_path / "a.png"), "bytes": None}, "labels": [0]}]
    run = Run(Recipe(), RunOptions(), Accelerator(cpu=True))
    with pytest.raises(StageError, match=r"^none of the 1 images of data\.val_split can be read, so the model"):
        validate(run, tiny_model(), BiTransImageProcessor(), images)
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "a.png")
    assert set(validate(run, tiny_model(), BiTransImageProcessor(), images)) == {
        "map_class",
        "map_patch",
        "image_ap_class",
    }
