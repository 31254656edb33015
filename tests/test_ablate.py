"""The table of variants and seeds: its arithmetic, its runs, and what it does after a kill."""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
import threading
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import yaml
from stage_processes import forget_processes

from bitrans_hf.metrics.scores import RowScores, RunScores, SeedScores
from bitrans_hf.recipes import FOLDER as RECIPES
from bitrans_hf.stages import ablate as ablate_module
from bitrans_hf.stages import grid as grid_module
from bitrans_hf.stages.ablate import Ablation, as_text, described, make_tables, summarize
from bitrans_hf.stages.ablate import main as ablate_main
from bitrans_hf.stages.grid import Cell
from bitrans_hf.stages.parse import parse_recipe
from bitrans_hf.stages.records import recipe_parts, write_json
from bitrans_hf.stages.run import StageError
from bitrans_hf.stages.seeds import main as make_seeds_main
from bitrans_hf.stages.train import main as train_main
from bitrans_hf.store import SeedStore

TRAINING = Path(__file__).resolve().parents[1] / "training"

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
        "recipe": str(RECIPES / "shapes.yaml"),
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
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


Started: TypeAlias = list[tuple[str, str]]
"""(stage, run) of every stage that was started, in order."""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    """Run the stages without starting processes, one at a time; gives those that were run."""
    calls: Started = []
    stages = {"train": train_main, "seeds": make_seeds_main}
    lock = threading.Lock()

    def run_stage(script: str, arguments: list[str], environment: dict[str, str], running: set[Any]) -> None:
        with lock:
            calls.append((script, run_name(arguments)))
            stages[script](arguments)
            forget_processes()

    monkeypatch.setattr(grid_module, "run_stage", run_stage)
    return calls


def run_name(arguments: list[str]) -> str:
    folder, name = (arguments[arguments.index(key) + 1] for key in ("--output_dir", "--name"))
    return f"{Path(folder).name}/{name}"


def test_equal_rows_give_equal_numbers_and_finished_runs_are_kept(
    tmp_path: Path, started: Started, capsys: pytest.CaptureFixture[str]
):
    # A value that no number depends on: the row trains on its own, and must come to the same numbers.
    file = table(tmp_path, variants={**VARIANTS, "the same": {"train.max_grad_norm": 1e9}})
    ablate_main(["--config", str(file)])
    folder = tmp_path / "runs" / "tiny"
    result = json.loads((folder / "metrics.json").read_text())
    assert [script for script, _ in started].count("train") == 6
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
    (folder / "both" / "seed1" / "seeds" / "done.json").unlink()
    shutil.rmtree(folder / "the same" / "seed0")
    started.clear()
    ablate_main(["--config", str(file)])
    again = json.loads((folder / "metrics.json").read_text())
    assert sorted(started) == [
        ("seeds", "both/seed1"), ("seeds", "the same/seed0"), ("train", "the same/seed0"),
    ]  # fmt: skip
    assert again["summary"] == result["summary"]


def test_a_finished_run_of_another_recipe_is_not_taken_for_this_one(tmp_path: Path, started: Started):
    file = table(tmp_path, variants={"one view": {}}, seeds=[0])
    ablate_main(["--config", str(file)])
    with pytest.raises(StageError, match=r"one view/seed0.*another recipe \(it differs in train.epochs"):
        ablate_main(["--config", str(table(tmp_path, variants={"one view": {"train.epochs": 2}}, seeds=[0]))])


# ---- Rows that share a training.

SHARING = {
    "one view": {"model.view": "none"},
    "both": {},
    "one scale less": {"seeds.flip": False},
    "sc-cam": {"seeds.variant": "sc_cam"},
}
"""The last three differ in how seeds are made only."""


@pytest.mark.parametrize("parallel", [1, 2])
def test_rows_that_train_alike_share_one_training(tmp_path: Path, started: Started, parallel: int):
    ablate_main(["--config", str(table(tmp_path, variants=SHARING, parallel=parallel, seeds=[0]))])
    folder = tmp_path / "runs" / "tiny"
    assert sorted(run for script, run in started if script == "train") == ["both/seed0", "one view/seed0"]
    assert len(started) == 2 + 4
    trained = started.index(("train", "both/seed0"))
    for row in ("one scale less", "sc-cam"):
        link = folder / row / "seed0" / "train"
        assert link.readlink() == Path("../../both/seed0/train")
        assert started.index(("seeds", f"{row}/seed0")) > trained
    assert not (folder / "both" / "seed0" / "train").is_symlink()

    result = json.loads((folder / "metrics.json").read_text())
    runs, val = result["runs"], result["summary"]["val"]
    assert runs["sc-cam/seed0"]["trained_in"] == "both/seed0"
    assert runs["sc-cam/seed0"]["splits"]["val"]["miou"] == runs["both/seed0"]["splits"]["val"]["miou"]
    assert val["one scale less"]["best threshold"] != val["both"]["best threshold"]
    # What the row's own recipe chooses, beside what the baseline's does.
    chosen = val["sc-cam"]["best threshold"]["chosen"]
    assert chosen["values"] == val["sc-cam"]["best threshold"]["sc_cam"]["values"]
    refined_of_baseline = val["one view"]["best threshold"]["refined"]["mean"]
    assert chosen["difference_mean"] == pytest.approx(chosen["mean"] - refined_of_baseline, abs=1e-3)
    # The shared training counts once.
    seconds = {run: json.loads((folder / run / "train" / "metrics.json").read_text())["seconds"] for run in runs}
    wanted = seconds["both/seed0"] + seconds["one view/seed0"]
    assert result["seconds"]["train"] == pytest.approx(wanted, abs=0.11)
    assert runs["both/seed0"]["seconds"]["train"] == seconds["both/seed0"]
    assert result["devices"] == [runs["both/seed0"]["device"]["train"]]


def test_a_killed_run_and_every_kind_of_leftover_are_mended(tmp_path: Path, started: Started):
    file = table(tmp_path, variants=SHARING, parallel=2, seeds=[0])
    ablate_main(["--config", str(file)])
    folder = tmp_path / "runs" / "tiny"
    first = json.loads((folder / "metrics.json").read_text())["summary"]

    def again() -> list[str]:
        started.clear()
        ablate_main(["--config", str(file)])
        assert json.loads((folder / "metrics.json").read_text())["summary"] == first
        return sorted(run.split("/")[0] for script, run in started if script == "train")

    assert again() == []
    assert not started
    # Killed after the training, before the links' seeds.
    for row in ("one scale less", "sc-cam"):
        shutil.rmtree(folder / row)
    assert again() == []
    # The folder that the links lead to was deleted: the first row trains again, the dangling links stay good.
    shutil.rmtree(folder / "both")
    shutil.rmtree(folder / "sc-cam" / "seed0" / "seeds")
    assert again() == ["both"]
    # The same where only a row with a dangling link is to be made: it trains itself.
    shutil.rmtree(folder / "both" / "seed0" / "train")
    shutil.rmtree(folder / "sc-cam" / "seed0" / "seeds")
    assert again() == ["sc-cam"]
    assert not (folder / "sc-cam" / "seed0" / "train").is_symlink()
    # A training that was begun in the wrong place gives way to the finished one.
    shutil.rmtree(folder / "one scale less")
    begun = folder / "one scale less" / "seed0" / "train"
    shutil.copytree(folder / "sc-cam" / "seed0" / "train", begun)
    (begun / "done.json").unlink()
    assert again() == []
    assert begun.is_symlink()
    # A finished one of its own stays, as an earlier version of this script made them.
    begun.unlink()
    shutil.copytree(folder / "sc-cam" / "seed0" / "train", begun)
    shutil.rmtree(folder / "one scale less" / "seed0" / "seeds")
    assert again() == []
    assert not begun.is_symlink()


def test_a_training_that_was_begun_goes_on_and_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ablation = Ablation(**yaml.safe_load(table(tmp_path, variants=SHARING, seeds=[0]).read_text()))
    recipes = ablation.recipes()
    assert list(grid_module.plan_trainings(recipes)) == [Cell("one view", 0), Cell("both", 0)]
    begun = recipes[Cell("sc-cam", 0)]
    folder = tmp_path / "runs" / "tiny" / "sc-cam" / "seed0" / "train"
    write_json(folder / "recipe.json", recipe_parts(begun, ("seed", "data", "model", "train")))
    assert grid_module.plan_trainings(recipes)[Cell("sc-cam", 0)] == [
        Cell("both", 0), Cell("one scale less", 0), Cell("sc-cam", 0),
    ]  # fmt: skip
    # One of another recipe is left to train.py, which refuses it; the others do not wait for it.
    write_json(folder / "recipe.json", {"seed": 5})
    assert grid_module.plan_trainings(recipes)[Cell("sc-cam", 0)] == [Cell("sc-cam", 0)]
    assert grid_module.plan_trainings(recipes)[Cell("both", 0)] == [Cell("both", 0), Cell("one scale less", 0)]


@pytest.mark.parametrize("parallel", [1, 2])
def test_a_failed_training_fails_the_rows_that_share_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parallel: int
):
    done = []

    def run_stage(script: str, arguments: list[str], environment: dict[str, str], running: set[Any]) -> str | None:
        done.append((script, run_name(arguments)))
        fails = script == "train" and run_name(arguments).startswith("both")
        if not fails:
            (Path(arguments[arguments.index("--output_dir") + 1]) / "seed0" / "train").mkdir(
                parents=True, exist_ok=True
            )
        return "train ended with 1, error: the loss is not finite" if fails else None

    monkeypatch.setattr(grid_module, "run_stage", run_stage)
    with pytest.raises(
        StageError,
        match=r"3 of 4 runs failed \(both/seed0: train ended.*sc-cam/seed0: it shares the training of both/seed0, "
        r"where train ended with 1, error: the loss is not finite",
    ):
        ablate_main(["--config", str(table(tmp_path, variants=SHARING, seeds=[0], parallel=parallel))])
    assert sorted(done) == [
        ("seeds", "one view/seed0"), ("train", "both/seed0"), ("train", "one view/seed0"),
    ]  # fmt: skip


# ---- Failures and refusals.


def test_a_failed_run_is_named_after_the_others_are_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    done = []

    def run_stage(script: str, arguments: list[str], environment: dict[str, str], running: set[Any]) -> str | None:
        done.append((script, run_name(arguments)))
        failed = script == "seeds" and run_name(arguments).startswith("both")
        return "seeds ended with 1, error: no memory" if failed else None

    monkeypatch.setattr(grid_module, "run_stage", run_stage)
    variants = {**VARIANTS, "the same": {"train.max_grad_norm": 1e9}}
    with pytest.raises(StageError, match=r"2 of 6 runs failed \(both/seed0: seeds ended with 1.*both/seed1"):
        ablate_main(["--config", str(table(tmp_path, variants=variants))])
    assert len(done) == 12


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"baseline": "nobody"}, "baseline 'nobody' is no variant"),
        ({"seeds": [0, 0]}, "seeds must be different numbers"),
        ({"seeds": []}, "seeds must be different numbers"),
        ({"parallel": 0}, "parallel must be at least 1"),
        ({"variants": {"one view": {}, "a": {"data.classes": ["star"]}}}, "'a' changes data.classes to ['star']"),
        ({"variants": {"one view": {}, "a": {"data.num_val": 5}}}, "'a' changes data.num_val to 5"),
        (
            {"variants": {"one view": {}, "a": {"preset": "fewer"}}, "changes": {}},
            "'a' changes seeds.splits to ['val']",
        ),
        ({"variants": {"one view": {}, "a": {"seed": 4}}}, "'a' changes seed"),
        ({"variants": {"one view": {}, "a": {"preset": ["wide", "best"]}}}, "preset 'best'; there are: fewer, wide."),
        ({"changes": {"preset": "../shapes"}}, "there are: fewer, wide."),
        ({"tables": {"First": ["one view", "both"]}}, "no table shows the row 'the same'"),
        ({"tables": {"First": {"none": "one"}}}, "First names the row 'one'"),
        ({"gallery_rows": ["all"]}, "gallery_rows names the row 'all'"),
        ({"variants": {"one view": {}, "a/b": {}}}, "cannot be the name of a folder"),
        ({"variants": {"one view": {"model.no_such_key": 1}}}, "model.no_such_key"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_a_wrong_table_is_refused_before_anything_runs(
    tmp_path: Path, changes: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, presets: Path,
):  # fmt: skip
    monkeypatch.setattr(grid_module, "run_stage", lambda *_: pytest.fail("a run was started"))
    with pytest.raises((SystemExit, ValueError)) as caught:
        ablate_main(["--config", str(table(tmp_path, **changes))])
    assert words in capsys.readouterr().err + str(caught.value)
    assert not (tmp_path / "runs").exists()


# ---- Presets.


@pytest.fixture
def presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two presets."""
    folder = tmp_path / "presets"
    folder.mkdir()
    (folder / "wide.yaml").write_text("model: {hidden_size: 48, view: vflip}\nseeds: {variant: sc_cam}\n")
    (folder / "fewer.yaml").write_text("model: {num_seed_layers: 2}\nseeds: {splits: [val]}\n")
    monkeypatch.setattr(ablate_module, "PRESETS", folder)
    return folder


def test_a_preset_lies_between_the_recipe_and_the_other_keys(tmp_path: Path, presets: Path):
    # A later file's key comes before an earlier one's; keys that no preset names stay the recipe's.
    variants = {
        "one view": {"seeds.splits": ["val"]},
        "wide": {"preset": "wide", "seeds.splits": ["val"]},
        "two": {"model.view": "hflip", "preset": ["wide", "fewer"]},
    }
    changes = {key: value for key, value in TINY.items() if key not in ("model.hidden_size", "seeds.splits")}
    content = yaml.safe_load(table(tmp_path, variants=variants, changes={**changes, "preset": "fewer"}).read_text())
    recipes = Ablation(**content).recipes()
    plain, wide, two = (recipes[Cell(row, 1)] for row in variants)
    assert (plain.model.view, plain.model.hidden_size, plain.seeds.variant) == ("rot90", None, "refined")
    assert (plain.model.num_seed_layers, wide.model.num_seed_layers) == (1, 1)  # changes come after presets
    assert (wide.model.view, wide.model.hidden_size, wide.seeds.variant) == ("vflip", 48, "sc_cam")
    assert (two.model.view, two.model.hidden_size, two.seeds.variant) == ("hflip", 48, "sc_cam")
    assert two.model.class_token_noise == plain.model.class_token_noise == 0.0
    assert two.seeds.scales == [1.0]


TOP_LEVEL = ("shapes", "voc_animals_deit_tiny", "voc_deit_small", "coco_deit_small")


@pytest.mark.parametrize("preset", sorted((RECIPES / "presets").glob("*.yaml")), ids=lambda file: file.stem)
@pytest.mark.parametrize("recipe", TOP_LEVEL)
def test_every_preset_of_the_repository_fits_every_recipe(recipe: str, preset: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(TRAINING.parent)
    ablation = Ablation(
        name="presets", recipe=f"bitrans_hf/recipes/{recipe}.yaml", baseline="plain",
        variants={"plain": {}, "preset": {"preset": preset.stem}}, seeds=[0],
    )  # fmt: skip
    plain, laid_over = ablation.recipes().values()  # which refuses presets that change the scored images
    assert dataclasses.asdict(plain) | {"output_dir": ""} != dataclasses.asdict(laid_over) | {"output_dir": ""}


# ---- Arithmetic and tables.


def test_a_single_seed_has_no_deviation():
    expected = RowScores(mean=50.0, std=None, values=[50.0], difference_mean=2.0, difference_std=None)
    assert described([50.0], [48.0]) == expected


def test_differences_are_paired_by_seed():
    # Both rows vary by 10 points between seeds, and differ by exactly 1 in each.
    row = described([41.0, 51.0, 61.0], [40.0, 50.0, 60.0])
    assert (row.std, row.difference_mean, row.difference_std) == (10.0, 1.0, 0.0)


def one_run(**miou: float) -> RunScores:
    splits = {"train": SeedScores(miou=miou), "val": SeedScores(miou=miou, miou_at_given_threshold=miou)}
    return RunScores(splits=splits, made_with={}, trained_in="", seconds={}, device={})


def test_tables_share_rows_and_say_which(tmp_path: Path):
    four = {"sc_cam": 50.0, "coarse_cam": 41.0, "fused": 52.0, "refined": 55.0}
    runs = {
        "one view/seed0": one_run(**four),
        "both/seed0": one_run(**{key: value + 2 for key, value in four.items()}),
        "cnn/seed0": one_run(coarse_cam=45.25),
    }
    tables = {"Table 1": ["one view", "cnn"], "Table 2": {"none": "one view", "horizontal flip": "both"}}
    variants = {"one view": {}, "both": {}, "cnn": {}}
    ablation = Ablation(name="t", recipe="r", variants=variants, baseline="one view", tables=tables, seeds=[0])
    chosen = {"one view": "sc_cam", "both": "refined", "cnn": "coarse_cam"}
    summary = {split: summarize(ablation, runs, chosen, split) for split in ("train", "val")}
    assert "refined" not in summary["train"]["cnn"]["best threshold"]
    made = list(make_tables(ablation, summary, chosen))
    titles = ["Table 1: seeds of train", "Table 1: seeds of val", "Table 2: seeds of train", "Table 2: seeds of val"]
    assert [each.title for each in made] == titles
    assert made[0].rows == [
        ["one view (baseline)", "50.0", "41.0", "52.0", "55.0", "50.0", "SC-CAM", "-", "-", "-"],
        ["cnn", "-", "45.2", "-", "-", "45.2", "Coarse-CAM", "-", "-", "-4.8"],
    ]
    # Without a table of its own, a baseline still is what its rows are compared with.
    assert made[2].rows == [
        ["none (row 'one view', baseline)", "50.0", "41.0", "52.0", "55.0", "50.0", "SC-CAM", "-", "-", "-"],
        [
            "horizontal flip (row 'both')",
            "52.0",
            "43.0",
            "54.0",
            "57.0",
            "57.0",
            "Refined seed",
            "+2.0",
            "+2.0",
            "+7.0",
        ],
    ]
    assert [row[0] for row in made[1].rows][2] == "one view (baseline), first split's threshold"
    assert len({len(line) for line in as_text(made[0]).splitlines()}) == 1


def test_a_baseline_without_a_variant_leaves_its_differences_open():
    runs = {"cnn/seed0": one_run(coarse_cam=40.0), "both/seed0": one_run(coarse_cam=41.0, refined=45.0)}
    ablation = Ablation(name="t", recipe="r", variants={"cnn": {}, "both": {}}, baseline="cnn", seeds=[0])
    chosen = {"cnn": "coarse_cam", "both": "refined"}
    scores = summarize(ablation, runs, chosen, "train")["both"]["best threshold"]
    assert (scores["refined"].mean, scores["refined"].difference_mean) == (45.0, None)
    assert (scores["coarse_cam"].difference_mean, scores["chosen"].difference_mean) == (1.0, 5.0)


@pytest.mark.parametrize(
    ("gallery_rows", "shown"), [(None, [str(number) for number in range(8)]), (["9", "0"], ["9", "0"])]
)
def test_pictures_are_of_few_rows(gallery_rows: list[str] | None, shown: list[str]):
    variants: dict[str, Any] = {str(number): {} for number in range(10)}
    ablation = Ablation(name="t", recipe="r", variants=variants, baseline="0", gallery_rows=gallery_rows)
    assert ablate_module.shown_rows(ablation) == shown


def test_pictures_are_of_the_variant_that_a_row_chooses(tmp_path: Path, started: Started):
    variants = {"one view": {"seeds.variant": "coarse_cam"}, "both": {"seeds.variant": "sc_cam"}}
    content = yaml.safe_load(table(tmp_path, variants=variants, seeds=[0]).read_text())
    ablate_main(["--config", str(tmp_path / "tiny.yaml")])
    ablation = Ablation(**content)
    for row in ablate_module.gallery(ablation, ablation.recipes()):
        for name, variant in (("one view", "coarse_cam"), ("both", "sc_cam")):
            store = SeedStore(tmp_path / "runs" / "tiny" / name / "seed0" / "seeds" / "val" / "seeds")
            np.testing.assert_array_equal(row.maps[name].maps, store.read(row.image_id, variant).maps)


@pytest.mark.parametrize("file", sorted((RECIPES / "ablations").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_table_of_the_repository_parses(file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(TRAINING.parent)
    content = yaml.safe_load(file.read_text())
    assert content["name"] == file.stem
    ablation = Ablation(**content)
    recipes = ablation.recipes()
    assert {cell.seed for cell in recipes} == set(ablation.seeds)
    # What a stage reads from its command line is the recipe that sharing and the report go by.
    for cell in (Cell(ablation.baseline, 0), list(recipes)[-1]):
        assert parse_recipe(None, ablation.arguments(*cell))[0] == recipes[cell]


def test_the_small_table_on_voc_animals_trains_as_the_papers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(TRAINING.parent)
    recipes = {}
    for data in ("voc", "voc_animals"):
        file = RECIPES / "ablations" / f"paper_tables_{data}.yaml"
        recipes[data] = Ablation(**yaml.safe_load(file.read_text())).recipes()
    for cell, small in recipes["voc_animals"].items():
        paper = recipes["voc"][cell]
        assert small.train == paper.train
        same = {"weights": "", "image_size": None}  # 224 is also what the paper's weights are for
        assert dataclasses.replace(small.model, **same) == dataclasses.replace(paper.model, **same)
        assert small.seeds == paper.seeds


@pytest.mark.slow
def test_cells_run_in_processes_of_their_own(tmp_path: Path):
    ablate_main(
        [
            "--config",
            str(
                table(
                    tmp_path,
                    parallel=2,
                    seeds=[0],
                    variants={"one view": {}, "the same": {"train.max_grad_norm": 1e9}},
                )
            ),
        ]
    )
    rows = json.loads((tmp_path / "runs" / "tiny" / "metrics.json").read_text())["summary"]["val"]
    assert rows["one view"] == rows["the same"]
