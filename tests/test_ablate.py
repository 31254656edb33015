"""The table of variants and seeds: its arithmetic, its runs, and what it does after a kill."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState

TRAINING = Path(__file__).resolve().parents[1] / "training"
sys.path.insert(0, str(TRAINING))

import ablate as ablate_module  # noqa: E402
from ablate import Ablation, described  # noqa: E402
from ablate import main as ablate_main  # noqa: E402
from make_seeds import main as make_seeds_main  # noqa: E402
from recipe import parse_recipe  # noqa: E402
from runtime import StageError  # noqa: E402
from train import main as train_main  # noqa: E402

TINY = {
    "data.num_train": 24, "data.num_val": 6, "data.val_split": None,
    "model.weights": "scratch", "model.class_token_noise": 0.0, "model.image_size": 64, "model.patch_size": 16,
    "model.hidden_size": 24, "model.num_hidden_layers": 2, "model.num_attention_heads": 2, "model.num_seed_layers": 1,
    "train.epochs": 1, "train.batch_size": 4, "train.precision": "no", "seeds.scales": [1.0],
    "seeds.splits": ["val", "test"],
}  # fmt: skip
VARIANTS = {"one view": {"model.view": "none"}, "both": {}, "the same": {}}


def table(folder: Path, **more: Any) -> Path:
    """Write a small ablation's file."""
    content = {
        "name": "tiny",
        "recipe": str(TRAINING / "recipes" / "shapes.yaml"),
        "output_dir": str(folder / "runs"),
        "baseline": "one view",
        "changes": TINY,
        "variants": VARIANTS,
        "seeds": [0, 1],
        "num_images": 3,
        "cpu": True,
        "quiet": True,
        **more,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def runs_in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Run the cells without starting processes; gives the arguments of those that were run."""
    started: list[list[str]] = []

    def run_one(arguments: list[str], environment: dict[str, str]) -> None:
        started.append(arguments)
        for stage in (train_main, make_seeds_main):
            stage(arguments)
            for state in (AcceleratorState, GradientState, PartialState):
                state._reset_state()

    monkeypatch.setattr(ablate_module, "run_one", run_one)
    return started


def test_equal_rows_give_equal_numbers_and_finished_runs_are_kept(
    tmp_path: Path, runs_in_this_process: list[list[str]], capsys: pytest.CaptureFixture[str]
):
    file = table(tmp_path)
    ablate_main(["--config", str(file)])
    folder = tmp_path / "runs" / "tiny"
    result = json.loads((folder / "metrics.json").read_text())
    assert len(runs_in_this_process) == 6
    for split in ("val", "test"):
        rows = result["summary"][split]
        assert rows["both"] == rows["the same"]
        refined = rows["both"]["best threshold"]["refined"]
        wanted = [result["runs"][f"both/seed{seed}"]["splits"][split]["miou"]["refined"] for seed in (0, 1)]
        assert refined["values"] == wanted
        assert refined["mean"] == pytest.approx(statistics.fmean(wanted), abs=1e-3)
        assert rows["one view"]["best threshold"]["refined"]["difference_mean"] == 0
    # Only a later split has a threshold that its own ground truth did not choose.
    assert list(result["summary"]["val"]["both"]) == ["best threshold"]
    assert list(result["summary"]["test"]["both"]) == ["best threshold", "first split's threshold"]
    page = (folder / "report" / "index.html").read_text()
    assert all(name in page for name in VARIANTS)
    assert "±" in capsys.readouterr().out

    # As after a kill: one run has not begun, another has trained and made no seeds.
    trained = folder / "both" / "seed1" / "train" / "done.json"
    before = trained.stat().st_mtime_ns
    (folder / "both" / "seed1" / "seeds" / "done.json").unlink()
    for file_of_run in sorted((folder / "the same" / "seed0").rglob("*"), reverse=True):
        file_of_run.unlink() if file_of_run.is_file() else file_of_run.rmdir()
    ablate_main(["--config", str(file)])
    again = json.loads((folder / "metrics.json").read_text())
    assert trained.stat().st_mtime_ns == before
    assert again["summary"] == result["summary"]


def test_a_failed_run_is_named_after_the_others_are_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    done = []

    def run_one(arguments: list[str], environment: dict[str, str]) -> str | None:
        folder = arguments[arguments.index("--output_dir") + 1]
        done.append(folder)
        return "train.py ended with 1, error: the loss is not finite" if folder.endswith("both") else None

    monkeypatch.setattr(ablate_module, "run_one", run_one)
    with pytest.raises(StageError, match=r"2 of 6 runs failed \(both/seed0: train.py ended with 1.*both/seed1"):
        ablate_main(["--config", str(table(tmp_path))])
    assert len(done) == 6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"baseline": "nobody"}, "baseline 'nobody' is no variant"),
        ({"seeds": [0, 0]}, "seeds must be different numbers"),
        ({"seeds": []}, "seeds must be different numbers"),
        ({"parallel": 0}, "parallel must be at least 1"),
        ({"variants": {"one view": {"data.classes": ["star"]}}}, "changes data.classes"),
        ({"variants": {"one view": {}, "a/b": {}}}, "cannot be the name of a folder"),
        ({"variants": {"one view": {"model.no_such_key": 1}}}, "model.no_such_key"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_a_wrong_table_is_refused_before_anything_runs(
    tmp_path: Path, changes: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr(ablate_module, "run_one", lambda *_: pytest.fail("a run was started"))
    with pytest.raises(SystemExit):
        ablate_main(["--config", str(table(tmp_path, **changes))])
    assert words in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_single_seed_has_no_deviation():
    assert described([50.0], [48.0]) == {
        "mean": 50.0, "std": None, "values": [50.0], "difference_mean": 2.0, "difference_std": None,
    }  # fmt: skip


def test_differences_are_paired_by_seed():
    # Both rows vary by 10 points between seeds, and differ by exactly 1 in each.
    row = described([41.0, 51.0, 61.0], [40.0, 50.0, 60.0])
    assert (row["std"], row["difference_mean"], row["difference_std"]) == (10.0, 1.0, 0.0)


@pytest.mark.parametrize(
    "file", sorted((TRAINING / "recipes" / "ablations").glob("*.yaml")), ids=lambda file: file.stem
)
def test_every_table_of_the_repository_parses(file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(TRAINING.parent)
    content = yaml.safe_load(file.read_text())
    ablation = Ablation(**content)
    assert content["name"] == file.stem
    for variant in ablation.variants:
        recipe, _ = parse_recipe(None, ablation.arguments(variant, 3))
        assert (recipe.seed, recipe.name) == (3, "seed3")


@pytest.mark.slow
def test_cells_run_in_processes_of_their_own(tmp_path: Path):
    ablate_main(["--config", str(table(tmp_path, parallel=2, seeds=[0], variants={"one view": {}, "the same": {}}))])
    rows = json.loads((tmp_path / "runs" / "tiny" / "metrics.json").read_text())["summary"]["val"]
    assert rows["one view"] == rows["the same"]
