"""Runs go to the Hub and come back the same, whatever happens on the way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import pytest
from datasets import load_dataset
from hub_server import HubServer
from huggingface_hub.utils import get_session
from open_published import open_without_the_package, run_published
from PIL import Image
from test_hub_server import run_client
from tiny_models import tiny_model
from tiny_run import write_run

from bitrans_hf import BiTransImageProcessor, BiTransModel, PseudoMaskPipeline
from bitrans_hf.hub_errors import hub_error_sentence
from bitrans_hf.publishing.folders import PublishError, check_in_clean_process, files_of, write_model_folder
from bitrans_hf.recipes import FOLDER as RECIPES
from bitrans_hf.stages import run_all
from bitrans_hf.stages.publish import main as publish_main
from bitrans_hf.stages.run import StageError

TRAINING = Path(__file__).resolve().parents[1] / "training"


def arguments(runs: Path) -> list[str]:
    return [
        "--output_dir", str(runs), "--name", "animals", "--cpu", "true", "--data.source", "voc",
        "--data.root", "VOC2012",
    ]  # fmt: skip


def publish(runs: Path, environment: dict[str, str], *more: str) -> subprocess.CompletedProcess[str]:
    """Run the stage as a person does, on the run `animals` in `runs`."""
    command = [sys.executable, str(TRAINING / "publish.py"), *arguments(runs), *more]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600)


# ---- The whole way.


PARTS = {
    "model": ("model", "", "bitrans"),
    "affinity": ("model", "-affinity", "affinitynet"),
    "segmentation": ("model", "-segmentation", "deeplab"),
    "pseudo_labels": ("dataset", "-pseudo-labels", None),
    "metric": ("space", None, None),
}
"""Part -> kind of repository, suffix of its name, name of the network for `run_published`."""


@pytest.mark.parametrize(
    "parts",
    [("model", "pseudo_labels", "metric"), pytest.param(tuple(PARTS), marks=pytest.mark.slow)],
    ids=["model", "everything"],
)
def test_a_run_goes_to_the_hub_and_comes_back_without_the_package(
    hub: HubServer, tmp_path: Path, parts: tuple[str, ...]
):
    run = write_run(tmp_path / "runs" / "animals")
    command = ("--publish.repo", "me/bitrans-animals", "--publish.parts", f"[{', '.join(parts)}]")

    # The Hub dies when the first commit is half sent: nothing of it is to be seen, and the command may be repeated.
    hub.die_at("POST /api/models/me/bitrans-animals/commit/main")
    died = publish(tmp_path / "runs", hub.env, *command)
    assert died.returncode != 0
    assert f"error: the connection to {hub.url} broke or could not be made" in died.stderr
    assert "rerun the same command afterwards" in died.stderr
    assert "--publish.repo me/bitrans-animals" in died.stderr
    assert "Traceback" not in died.stderr
    assert list(hub.repository("model", "me/bitrans-animals").files()) == [".gitattributes"]
    hub.start()
    again = publish(tmp_path / "runs", hub.env, *command)
    assert again.returncode == 0, again.stderr
    assert "model is already written and checked" in again.stdout
    assert hub.token not in died.stdout + died.stderr + again.stdout + again.stderr

    # One commit for each, tagged, private, with the files of the folder.
    folders = {part: run / "publish" / part for part in parts}
    repositories = {}
    for part in parts:
        kind, suffix, _ = PARTS[part]
        repo_id = "me/mean_iou" if suffix is None else f"me/bitrans-animals{suffix}"
        repository = repositories[part] = hub.repository(kind, repo_id)
        assert [commit.title for commit in repository.history()] == ["Version v1.0", "initial commit"]
        assert repository.tags == {"v1.0": repository.branches["main"]}
        assert repository.private
        there = {path: blob.data for path, blob in repository.files("v1.0").items() if path != ".gitattributes"}
        assert there == {path: (folders[part] / path).read_bytes() for path in files_of(folders[part])}
        assert hub.token.encode() not in b"".join(there.values())
    assert repositories["metric"].sdk == "gradio"
    record = json.loads((run / "publish" / "metrics.json").read_text())
    assert record["uploads"]["model"]["url"] == f"{hub.url}/me/bitrans-animals"
    assert hub.token not in json.dumps(record)

    # What comes later does not change the tagged version, code included.
    networks = {PARTS[part][2]: part for part in parts if PARTS[part][2]}
    for part in networks.values():
        readme = repositories[part].files()["README.md"]
        repositories[part].add_commit("main", "broken", {"config.json": readme})
    local = {name: {"path": str(folders[part])} for name, part in networks.items()}
    asked = {name: {"path": repositories[part].repo_id, "revision": "v1.0"} for name, part in networks.items()}
    expected = run_published(local, trust_remote_code=False, pipeline_class=PseudoMaskPipeline)
    assert_equal_bits(open_without_the_package(asked, tmp_path / "online", hub.env), expected)

    data = run_client(PULL_DATA, hub.env)
    stored = {path: Image.open(path) for path in (run / "pseudo_labels").rglob("*.png")}
    assert sorted(data["ids"]) == ["2007_000032", "folder/a b"]
    assert data["modes"] == ["P", "P"]
    assert sorted(data["sums"]) == sorted(int(np.asarray(image).sum()) for image in stored.values())
    assert data["palette"] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
    assert data["miou"] == pytest.approx(0.25)

    if "segmentation" in parts:  # once downloaded, all opens with the Hub out of reach
        hub.stop()
        cached = {"HF_HUB_CACHE": str(hub.home / "hub"), "HF_MODULES_CACHE": str(hub.home / "modules")}
        offline = open_without_the_package(asked, tmp_path / "offline", {**cached, "HF_HUB_OFFLINE": "1"})
        assert_equal_bits(offline, expected)


PULL_DATA = """
import evaluate
import numpy as np
from datasets import load_dataset
labels = load_dataset("me/bitrans-animals-pseudo-labels", split="train", revision="v1.0")
metric = evaluate.load("me/mean_iou", num_labels=2)
metric.add_batch(predictions=[np.array([[0, 1]])], references=[np.array([[0, 0]])])
result = {"ids": list(labels["image_id"]), "modes": [row["pseudo_label"].mode for row in labels],
          "sums": [int(np.asarray(row["pseudo_label"]).sum()) for row in labels],
          "palette": labels[0]["pseudo_label"].getpalette()[:9], "miou": metric.compute()["mean_iou"]}
"""


def assert_equal_bits(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert set(actual) == set(expected)
    assert [name for name, value in expected.items() if not np.array_equal(actual[name], value)] == []


def test_pseudo_labels_of_several_splits_say_whose_score_is_whose(tmp_path: Path):
    run = write_run(tmp_path / "runs" / "animals", ("train", "seeds", "pseudo_labels"))
    stage = run / "pseudo_labels"
    shutil.copytree(stage / "train", stage / "val")
    (stage / "val" / "labels" / "2007_000032.png").unlink()
    metrics = json.loads((stage / "metrics.json").read_text())
    # The stage made val first, which its one score is of.
    val = {"images": 1, "scored": 1, "steps": {"seed": 61.5, "walk": 63.0, "refined": 65.25}}
    metrics |= {"miou": 65.25, "splits": {"val": val, **metrics["splits"]}}
    (stage / "metrics.json").write_text(json.dumps(metrics))
    publish_main([*arguments(tmp_path / "runs"), "--publish.parts", "[pseudo_labels]"])
    folder = run / "publish" / "pseudo_labels"
    card = (folder / "README.md").read_text()
    assert "3 segmentation masks" in card
    assert "**65.25 %** over 1 images" in card
    assert "| val | 1 | 61.5 | 63.0 | 65.2 |\n| train | 2 | 71.4 | 74.2 | 77.8 |" in card
    assert {name: split.num_rows for name, split in load_dataset(str(folder)).items()} == {"train": 2, "val": 1}


def test_a_dry_run_lists_what_would_go_up_and_asks_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    write_run(tmp_path / "runs" / "animals", ("train", "seeds"))
    monkeypatch.setattr("bitrans_hf.publishing.folders.check_in_clean_process", lambda *_: None)
    monkeypatch.setattr("bitrans_hf.stages.publish.upload", lambda *_, **__: pytest.fail("a dry run uploads nothing"))
    publish_main([*arguments(tmp_path / "runs"), "--publish.repo", "me/x", "--publish.version", "v2", "--dry-run"])
    said = capsys.readouterr().out
    assert "model me/x, version v2" in said
    for name, size in files_of(tmp_path / "runs" / "animals" / "publish" / "model").items():
        (line,) = [line for line in said.splitlines() if line.endswith(f"  {name}")]
        assert f"{size} B" in line or f"{size / 1000:.1f} kB" in line or f"{size / 1000:.0f} kB" in line


def test_without_a_repository_the_folder_is_written_and_nothing_uploaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    run = write_run(tmp_path / "runs" / "animals", ("train", "seeds"))
    checked: list[Path] = []
    monkeypatch.setattr(
        "bitrans_hf.publishing.folders.check_in_clean_process", lambda folder, *_: checked.append(folder)
    )
    for _ in range(2):
        publish_main(arguments(tmp_path / "runs"))
    assert len(checked) == 1, "what is written and checked is not done again"
    assert "nothing was uploaded, no repository is named (--publish.repo owner/name)" in capsys.readouterr().out
    assert {path.name for path in (run / "publish").iterdir()} == {"done.json", "metrics.json", "model", "recipe.json"}
    # A stage that was run again since makes the folder anew.
    (run / "seeds" / "done.json").write_text(json.dumps({"finished": "2026-11-25 10:00:00"}))
    publish_main(arguments(tmp_path / "runs"))
    assert len(checked) == 2


# ---- What goes wrong, by its sentence.


REFUSALS = """
import os
from pathlib import Path
from bitrans_hf import BiTransModel
from bitrans_hf.hub_errors import hub_error_sentence
from bitrans_hf.publishing.folders import PublishError, upload
from huggingface_hub import HfApi
folder, result = Path(sys.argv[1]), {}

def attempt(name, *given, token=None, **options):
    os.environ["HF_TOKEN"] = token if token is not None else sys.argv[2]
    try:
        result[name] = upload(folder, *given, **{"version": "v1.0", **options}).commit
    except PublishError as error:
        result[name] = str(error)

def pull(name, repo_id, revision=None, token=None):
    os.environ["HF_TOKEN"] = token if token is not None else sys.argv[2]
    try:
        BiTransModel.from_pretrained(repo_id, revision=revision)
    except OSError as error:  # of transformers, several lines long
        result[name] = hub_error_sentence(error, repo_id, revision)

attempt("done", "me/there", "model")
attempt("repeated", "me/there", "model")
HfApi().delete_tag("me/there", tag="v1.0")  # as if the Hub had died between the commit and the tag
attempt("tag was missing", "me/there", "model")
attempt("wrong token", "me/there", "model", token="hf_wrong")
attempt("no token", "me/new", "model", token="")
attempt("elsewhere", "others/new", "model")
attempt("no repository", "me/absent", "model", create=False)
attempt("no branch", "me/there", "model", branch="dev", version="v2.0")
attempt("no name", "me/there/x", "model")
(folder / "README.md").write_text("changed")
attempt("same version", "me/there", "model")
(folder / "weights.bin").unlink()
attempt("next version", "me/there", "model", version="v1.1")
pull("pull: no repository", "me/absent")
pull("pull: no revision", "me/there", "v9")
pull("pull: wrong token", "me/there", token="hf_wrong")
"""


def test_every_refusal_of_the_hub_is_one_sentence_and_changes_nothing(hub: HubServer, tmp_path: Path):
    folder = tmp_path / "folder"
    (folder / "__pycache__").mkdir(parents=True)
    (folder / "__pycache__" / "x.pyc").write_bytes(b"x")
    (folder / ".hidden").write_text("x")
    (folder / "README.md").write_text("first")
    (folder / "weights.bin").write_bytes(b"\0" * 1000)
    result = run_client(REFUSALS, hub.env, folder, hub.token)
    repository = hub.repository("model", "me/there")
    first, second = repository.tags["v1.0"], repository.tags["v1.1"]
    expected = {
        "wrong token": "does not accept the token; set HF_TOKEN to a valid one, or run `hf auth login`",
        "no token": "wants a token for this; set HF_TOKEN, or run `hf auth login`",
        "elsewhere": "the token may not write to others/new",
        "no repository": "there is no repository me/absent at",
        "no branch": "me/there has no branch, tag or commit 'dev' at",
        "no name": "'me/there/x' is no name of a repository; use owner/name",
        "pull: no repository": "there is no repository me/absent at",
        "pull: no revision": "me/there has no branch, tag or commit 'v9' at",
        "pull: wrong token": "does not accept the token",
        "same version": f"me/there has a version v1.0 already, with other content (commit {first[:12]}); nothing was",
    }
    assert result.pop("done") == result.pop("repeated") == result.pop("tag was missing") == first
    assert result.pop("next version") == second
    assert set(result) == set(expected)
    for name, words in expected.items():
        assert words in result[name], name
        assert "\n" not in result[name]
        assert hub.token not in result[name]
        assert "hf_wrong" not in result[name]
    assert [commit.title for commit in repository.history()] == ["Version v1.1", "Version v1.0", "initial commit"]
    assert set(repository.files("v1.0")) == {".gitattributes", "README.md", "weights.bin"}
    assert set(repository.files("v1.1")) == {".gitattributes", "README.md"}
    assert set(hub.repositories) == {("model", "me/there")}


def refused_connection() -> Exception:
    """As huggingface_hub's client raises it: its version decides which library it asks through."""
    library = sys.modules[type(get_session()).__module__.partition(".")[0]]
    return library.ConnectError("refused")


def test_a_connection_that_broke_is_found_under_what_was_raised_from_it():
    error = RuntimeError("Error while uploading 'model.safetensors' to the Hub.")
    error.__cause__ = refused_connection()
    assert "broke or could not be made (ConnectError)" in str(hub_error_sentence(error, "me/x"))
    assert hub_error_sentence(RuntimeError("something else"), "me/x") is None


def test_the_demo_ends_by_publishing(monkeypatch: pytest.MonkeyPatch):
    called: list[str] = []
    stages = [name for name, value in vars(run_all).items() if isinstance(value, FunctionType)]
    for stage in set(stages) - {"main", "parse_recipe", "run_script", "check_later_splits", "say_progress"}:
        monkeypatch.setattr(run_all, stage, lambda *_, stage=stage: called.append(stage))
    run_all.main(["--config", str(RECIPES / "shapes.yaml")])
    assert (called[0], called[-1]) == ("train", "publish")
    called.clear()
    run_all.main([])
    assert "publish" not in called, "the stage is for recipes with its section"


def test_a_stage_that_is_not_finished_is_named(tmp_path: Path):
    write_run(tmp_path / "animals", ("train",))
    with pytest.raises(StageError, match=r"segmentation is not finished, and makes publish\.parts 'segmentation'"):
        publish_main([*arguments(tmp_path), "--publish.parts", "[segmentation]"])


# ---- Nothing is published that computes something else elsewhere.


def test_a_folder_that_computes_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save = BiTransModel.save_pretrained

    def save_spoilt(model: BiTransModel, folder: Any, *given: Any, **options: Any) -> None:
        save(model, folder, *given, **options)
        code = Path(folder) / "modeling_bitrans.py"
        text = code.read_text()
        assert "pseudo_mask=fuse(sc_cam, coarse_cam)" in text
        code.write_text(text.replace("fuse(sc_cam, coarse_cam)", "fuse(sc_cam, coarse_cam.abs())"))

    monkeypatch.setattr(BiTransModel, "save_pretrained", save_spoilt)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("kept")
    with pytest.raises(PublishError, match=r"computes something else than the model that was saved: .*pseudo_mask"):
        write_model_folder(tmp_path / "out", tiny_model(), BiTransImageProcessor(), "card")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old.txt"]


@pytest.mark.slow
def test_a_folder_that_does_not_open_elsewhere_says_why(tmp_path: Path):
    model, processor = tiny_model(), BiTransImageProcessor()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    with (tmp_path / "model" / "losses.py").open("a") as file:
        file.write("\nimport bitrans_hf.hub.labels\n")
    with pytest.raises(PublishError, match=r"does not open where bitrans_hf is not installed: .*bitrans_hf"):
        check_in_clean_process(tmp_path / "model", model, processor)
