"""The stages as a person runs them: small, on the CPU, killed, resumed, and given bad input."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from huggingface_hub.errors import StrictDataclassClassValidationError
from PIL import Image
from safetensors.torch import load_file
from scipy.stats import spearmanr
from stage_processes import kill_everything, launch
from stopping import stop
from timm.scheduler import CosineLRScheduler

from bitrans_hf import BiTransModel, PseudoMaskPipeline
from bitrans_hf.data import UnreadableImageError, class_names, make_shapes
from bitrans_hf.hub.confidence import mask_confidence
from bitrans_hf.metrics.confidence import lift
from bitrans_hf.recipes import FOLDER as RECIPES
from bitrans_hf.refine.pseudo_labels import seeds_to_label_map
from bitrans_hf.refine.threshold import SeedHistogram
from bitrans_hf.stages.build import build_model
from bitrans_hf.stages.loop import ShardedBatches, stop_if_not_finite
from bitrans_hf.stages.parse import parse_recipe
from bitrans_hf.stages.recipe import BiTransRecipe, TrainRecipe
from bitrans_hf.stages.records import provenance
from bitrans_hf.stages.run import StageError, auto_precision
from bitrans_hf.stages.run_all import main as run_all_main
from bitrans_hf.stages.seeds import main as make_seeds_main
from bitrans_hf.stages.train import consistency_warmup, learning_rate, parameter_groups
from bitrans_hf.stages.train import main as train_main
from bitrans_hf.store import SeedStore

TRAINING = Path(__file__).resolve().parents[1] / "training"

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

TINY = [
    "--cpu", "true", "--quiet", "true",
    "--data.num_train", "48", "--data.num_val", "12",
    "--model.image_size", "64", "--model.patch_size", "16", "--model.hidden_size", "24",
    "--model.num_hidden_layers", "2", "--model.num_attention_heads", "2", "--model.num_seed_layers", "1",
    "--train.epochs", "2", "--train.batch_size", "4", "--train.augmentation", "flip", "--num_workers", "0",
    "--train.schedule", "step_cosine", "--train.learning_rate", "0.05", "--log_every", "2",
    "--report.num_images", "3",
]  # fmt: skip


def arguments(folder: Path, *more: str) -> list[str]:
    return [*TINY, "--output_dir", str(folder), "--name", "tiny", *more]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "tiny" / "train" / "model" / "model.safetensors")


def metrics(folder: Path, stage: str) -> dict[str, Any]:
    return json.loads((folder / "tiny" / stage / "metrics.json").read_text())


# ---- Precision.


def test_auto_precision_is_the_devices_said_recorded_and_then_that_of_the_trained_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("bitrans_hf.stages.run.has_native_bf16", lambda device: True)
    monkeypatch.setattr("bitrans_hf.stages.run.why", lambda device: "a good CPU")
    train_main(arguments(tmp_path, "--train.epochs", "1"))
    assert "precision: bf16 (a good CPU)" in capsys.readouterr().out
    assert metrics(tmp_path, "train")["made_with"]["precision"] == "bf16"
    recipe = json.loads((tmp_path / "tiny" / "train" / "recipe.json").read_text())
    assert recipe["train"]["precision"] == "auto"

    # The next stage on another machine.
    monkeypatch.setattr("bitrans_hf.stages.run.has_native_bf16", lambda device: False)
    monkeypatch.setattr("bitrans_hf.stages.run.bf16_slowdown", lambda device: 8.25)
    make_seeds_main(arguments(tmp_path, "--train.epochs", "1"))
    said = capsys.readouterr().out
    assert "precision: bf16 (as the network was trained so far)" in said
    assert "warning: a good CPU; a linear layer takes 8.2 times as long in bf16 as in float32\n" in said
    assert metrics(tmp_path, "seeds")["made_with"]["precision"] == "bf16"


def test_bf16_by_name_where_it_is_emulated_warns_and_says_how_to_avoid_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("bitrans_hf.stages.run.has_native_bf16", lambda device: False)
    monkeypatch.setattr("bitrans_hf.stages.run.bf16_slowdown", lambda device: 8.25)
    train_main(arguments(tmp_path, "--train.epochs", "1", "--train.precision", "bf16"))
    said = capsys.readouterr().out
    assert "precision: bf16 (as the recipe says)" in said
    assert "as in float32; --train.precision auto chooses float32 here" in said


@pytest.mark.parametrize("native", [True, False])
def test_a_network_keeps_its_precision_on_every_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: bool):
    monkeypatch.setattr("bitrans_hf.stages.run.has_native_bf16", lambda device: native)
    state = PartialState(cpu=True)
    of_device = "bf16" if native else "no"
    assert auto_precision(tmp_path, state) == of_device
    (tmp_path / "metrics.json").write_text('{"made_with": {"torch": "2.15"}}')  # made before precisions were recorded
    assert auto_precision(tmp_path, state) == of_device
    for name, title in (("bf16", "bf16"), ("no", "float32")):
        (tmp_path / "metrics.json").write_text(json.dumps({"made_with": {"precision": title}}))
        assert auto_precision(tmp_path, state) == name
    # A run that was killed: its newest checkpoint counts.
    for step, name in ((8, "no"), (12, "bf16"), (100, "no")):
        checkpoint = tmp_path / "checkpoints" / f"step_{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "progress.json").write_text(json.dumps({"step": step, "precision": name}))
        assert auto_precision(tmp_path, state) == name


def test_work_on_the_cpu_of_a_machine_with_a_gpu_records_the_cpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    for accelerator in (None, SimpleNamespace(device=torch.device("cpu"), mixed_precision="no")):
        assert provenance(accelerator)["device"].endswith("CPU cores")
    on_gpu = provenance(SimpleNamespace(device=torch.device("cuda", 0), mixed_precision="bf16"))
    assert (on_gpu["device"], on_gpu["precision"]) == ("a GPU", "bf16")


# ---- The whole road.


def test_run_all_goes_from_images_to_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command = arguments(tmp_path, "--trackers", "[tensorboard]", "--train.precision", "bf16")
    run_all_main(command)
    assert list((tmp_path / "tiny" / "train").rglob("events.out.tfevents*")), "the tracker wrote nothing"

    seeds = metrics(tmp_path, "seeds")
    assert set(seeds["miou"]) == set(seeds["threshold"]) == {"sc_cam", "coarse_cam", "fused", "refined"}
    assert seeds["splits"]["val"]["scored"] == 12
    assert seeds["miou"] == seeds["splits"]["train"]["miou"]
    # A threshold that was chosen on the other split cannot beat the best one.
    for variant, best in seeds["splits"]["val"]["miou"].items():
        assert seeds["splits"]["val"]["miou_at_given_threshold"][variant] <= best
    scene = make_shapes(12, 1)[0]
    label_map = Image.open(tmp_path / "tiny" / "seeds" / "val" / "masks" / f"{scene['image_id']}.png")
    assert label_map.mode == "P"
    assert label_map.size == (64, 64)
    assert set(np.unique(label_map)) <= {0, *(label + 1 for label in scene["labels"])}
    trained = metrics(tmp_path, "train")
    assert {"loss", "class", "patch", "scc", "pac", "map_class", "map_patch", "made_with"} <= set(trained)
    page = (tmp_path / "tiny" / "report" / "index.html").read_text()
    assert scene["image_id"].rsplit("-", 1)[0] in page
    assert isinstance(BiTransModel.from_pretrained(tmp_path / "tiny" / "train" / "model"), BiTransModel)

    capsys.readouterr()
    run_all_main(command)
    said = capsys.readouterr().out
    assert "train: already done" in said
    assert "seeds: already done" in said


def test_seeds_go_on_after_a_kill_and_other_images_are_left_alone(tmp_path: Path):
    train_main(arguments(tmp_path))
    make_seeds_main(arguments(tmp_path))
    folder = tmp_path / "tiny" / "seeds"
    store = SeedStore(folder / "val" / "seeds")
    before = {image_id: store.path(image_id).read_bytes() for image_id in store.ids()}
    scores = metrics(tmp_path, "seeds")["splits"]

    # As after a kill: not finished, some images missing, one temporary file left behind.
    (folder / "done.json").unlink()
    kept, *redone = store.ids()
    for image_id in redone:
        store.path(image_id).unlink()
    written = store.path(kept).stat().st_mtime_ns
    (store.folder / ".half.1.tmp.npz").write_bytes(b"half")
    make_seeds_main(arguments(tmp_path))

    assert {image_id: store.path(image_id).read_bytes() for image_id in store.ids()} == before
    assert store.path(kept).stat().st_mtime_ns == written
    assert metrics(tmp_path, "seeds")["splits"] == scores


# ---- Killed and resumed.


@pytest.mark.skipif(torch.accelerator.is_available(), reason="only without a GPU have processes the CPU to share")
def test_processes_share_the_work_without_being_told_that_there_is_no_gpu(tmp_path: Path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    trained = launch([*launcher, str(TRAINING / "train.py"), *arguments(tmp_path, "--cpu", "false")])
    said, _ = trained.communicate()
    assert trained.returncode == 0, said
    assert said.count("train: loss") == 1  # one main process
    assert metrics(tmp_path, "train")["steps"] == 12  # 2 epochs of 48 images, 2 processes of 4


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_killed_run_resumes_to_the_same_weights(num_processes: int, tmp_path: Path):
    launcher = [] if num_processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    options = (
        "--checkpoint_every", "2", "--train.gradient_accumulation", "2", "--train.batch_size", "2",
        "--model.drop_path_rate", "0.3", "--data.num_train", "96", "--num_workers", "1",
        "--trackers", "[tensorboard]",
    )  # fmt: skip

    def command(name: str) -> list[str]:
        return [*launcher, str(TRAINING / "train.py"), *arguments(tmp_path / name, *options)]

    whole = launch(command("whole"))
    killed = launch(command("killed"))
    checkpoints = tmp_path / "killed" / "tiny" / "train" / "checkpoints"
    deadline = time.monotonic() + 240
    while not list(checkpoints.glob("step_0000000[246]")):
        assert killed.poll() is None, killed.communicate()[0]
        assert time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.002)
    kill_everything(killed)
    epoch_steps = 96 // (2 * 2 * num_processes)
    (newest,) = checkpoints.glob("step_*")
    assert 0 < int(newest.name.removeprefix("step_")) < epoch_steps, "killed too late to be in the middle of an epoch"
    assert not (checkpoints.parent / "done.json").exists()

    said = whole.communicate(timeout=240)[0]
    assert whole.returncode == 0, said
    resumed = launch(command("killed"))
    said = resumed.communicate(timeout=240)[0]
    assert resumed.returncode == 0, said
    assert "resuming after step" in said
    expected, actual = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert max(float((expected[name] - actual[name]).abs().max()) for name in expected) == 0.0
    logs = [
        (tmp_path / name / "tiny" / "train" / "log.jsonl").read_text().splitlines() for name in ("whole", "killed")
    ]
    steps = [[json.loads(line)["step"] for line in log] for log in logs]
    assert steps[0] == steps[1], "log lines are missing or there twice after the resume"


def test_ctrl_c_ends_a_training_with_its_workers_and_the_same_command_goes_on(tmp_path: Path):
    more = ["--checkpoint_every", "2", "--num_workers", "2", "--quiet", "false"]
    command = [str(TRAINING / "run_all.py"), *arguments(tmp_path / "stopped", *more)]
    checkpoints = tmp_path / "stopped" / "tiny" / "train" / "checkpoints"
    ended = stop(command, lambda _: bool(list(checkpoints.glob("step_*"))), tmp_path / "said")
    assert ended.status == 130
    said = [line for line in ended.err.splitlines() if " so far" not in line]
    assert said[:2] == ["run_all: loading PyTorch and its libraries ...", "stage 1 of 3: train"]
    assert "train: 48 images, 2 epochs, 24 steps of 4 images; batch size 4, 1 process(es), device cpu" in said[-2]
    (newest,) = checkpoints.glob("step_*")
    step = int(newest.name.removeprefix("step_"))
    assert re.fullmatch(
        rf"stopped in stage train after step \d+; the checkpoint of step {step} is kept; to go on, rerun the same "
        r"command\.",
        said[-1],
    )
    assert "Traceback" not in ended.err + ended.out

    again = launch(command)
    said_again = again.communicate(timeout=240)[0]
    assert again.returncode == 0, said_again
    assert f"train: resuming after step {step} (" in said_again
    train_main(arguments(tmp_path / "whole", *more[:2]))
    expected, actual = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert max(float((expected[name] - actual[name]).abs().max()) for name in expected) == 0.0


def test_two_processes_make_the_same_seeds_and_scores_as_one(tmp_path: Path):
    train_main(arguments(tmp_path))
    make_seeds_main(arguments(tmp_path))
    alone = metrics(tmp_path, "seeds")["splits"]
    folder = tmp_path / "tiny" / "seeds"
    folder.rename(tmp_path / "tiny" / "seeds_of_one")
    run = launch(
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(TRAINING / "make_seeds.py"),
         *arguments(tmp_path)]
    )  # fmt: skip
    said = run.communicate(timeout=240)[0]
    assert run.returncode == 0, said
    together = metrics(tmp_path, "seeds")["splits"]
    for split, scores in alone.items():
        assert together[split]["scored"] == scores["scored"]
        # Another batch may round the last digit of a map differently.
        assert together[split]["miou"] == pytest.approx(scores["miou"], abs=0.1)


# ---- Bad input, by its message.


def failed(capsys: pytest.CaptureFixture[str], command: list[str]) -> str:
    with pytest.raises(SystemExit) as error:
        parse_recipe("", command)
    assert error.value.code != 0
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["--report.split", "test"], "report.split must be one of seeds.splits, ['train', 'val'], got 'test'"),
        (["--train.epoch", "3"], "train.epoch"),
        (["--train.epochs", "many"], "train.epochs"),
        (["--train.epochs", "0"], "train.epochs must be at least 1, got 0"),
        (["--seeds.variant", "best"], "seeds.variant"),
        (["--seeds.scales", "[0.5, 1.0]"], "seeds.scales must begin with 1.0"),
        (["--data.source", "voc"], "data.root must name the folder"),
    ],
)
def test_a_wrong_recipe_is_refused(command: list[str], words: str, capsys: pytest.CaptureFixture[str]):
    assert words in failed(capsys, command)


def test_an_unknown_key_in_a_recipe_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("train:\n  lr: 0.1\n")
    assert "'lr'" in failed(capsys, ["--config", str(recipe)])


@pytest.mark.parametrize("recipe", sorted((RECIPES).glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_that_is_shipped_can_be_read(recipe: Path):
    parsed, _ = parse_recipe("", ["--config", str(recipe)])
    assert parsed.name == recipe.stem


def test_the_command_line_overrides_the_file(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text("name: mine\ntrain:\n  epochs: 3\n  batch_size: 5\n")
    recipe, _ = parse_recipe("", ["--train.epochs", "7", "--config", str(tmp_path / "recipe.yaml"), "--seed", "2"])
    assert (recipe.name, recipe.train.batch_size, recipe.seed) == ("mine", 5, 2)
    recipe, _ = parse_recipe("", ["--config", str(tmp_path / "recipe.yaml"), "--train.epochs", "7"])
    assert recipe.train.epochs == 7


def test_a_folder_of_another_recipe_is_refused(tmp_path: Path):
    train_main(arguments(tmp_path))
    with pytest.raises(StageError, match=r"another recipe \(it differs in model.scc_weight, train.epochs\)"):
        train_main(arguments(tmp_path, "--train.epochs", "3", "--model.scc_weight", "0.5"))


def test_seeds_without_a_trained_model_say_what_to_run(tmp_path: Path):
    with pytest.raises(StageError, match=r"no trained model at .*run the stage train "):
        make_seeds_main(arguments(tmp_path))


@pytest.mark.parametrize("changed_later", [False, True])
def test_a_trained_model_is_read_as_its_recipe_says(tmp_path: Path, changed_later: bool):
    reading = ["--seeds.fusion", "competing", "--seeds.affinity_source", "joint", "--seeds.refine_steps", "2",
               "--seeds.threshold", "0.55", "--seeds.num_affinity_layers", "1"]  # fmt: skip
    precise = ["--train.precision", "no"]  # as the pipeline
    train_main(arguments(tmp_path, *precise, *([] if changed_later else reading)))
    folder = tmp_path / "tiny"
    if changed_later:
        assert json.loads((folder / "train" / "model" / "config.json").read_text())["fusion"] == "fused"
        make_seeds_main(arguments(tmp_path, *precise, *reading))
    pipe = PseudoMaskPipeline.from_pretrained(folder / "train" / "model", "cpu")
    config = pipe.model.config
    assert (config.fusion, config.affinity_source, config.refine_steps) == ("competing", "joint", 2)
    assert (config.threshold, config.num_affinity_layers) == (0.55, 1)
    make_seeds_main(arguments(tmp_path, *precise, *reading))
    scenes = make_shapes(12, 1)
    names = class_names(scenes)
    differing, otherwise = [], []
    for row in scenes:
        written = np.asarray(Image.open(folder / "seeds" / "val" / "masks" / f"{row['image_id']}.png"))
        papers = {"threshold": 0.4, "mode": "fused", "refine_steps": 1}
        for options, shares in (({}, differing), (papers, otherwise)):
            made = np.zeros(written.shape, dtype=np.uint8)
            for answer in pipe(row["image"], candidate_labels=[names[index] for index in row["labels"]], **options):
                made[np.asarray(answer["mask"]) > 0] = names.index(answer["label"]) + 1
            shares.append((made != written).mean())
    assert np.mean(differing) < 0.03  # seeds are kept in float16
    assert np.mean(otherwise) > 0.1


def test_seeds_that_the_network_cannot_give_are_refused_before_it_is_trained(tmp_path: Path):
    with pytest.raises(
        StrictDataclassClassValidationError,
        match=r"num_affinity_layers must be in \[1, num_hidden_layers = 2\], got 6",
    ):
        train_main(arguments(tmp_path, "--seeds.num_affinity_layers", "6"))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_threshold_auto_is_found_without_masks_and_used_from_there_on(tmp_path: Path):
    more = ["--seeds.threshold", "auto", "--seeds.splits", "[val]", "--train.precision", "no",
            "--pseudo_labels.splits", "[val]", "--pseudo_labels.method", "refiner",
            "--pseudo_labels.refiner", "par"]  # fmt: skip
    run_all_main(arguments(tmp_path, *more))
    folder = tmp_path / "tiny"
    found = json.loads((folder / "seeds" / "metrics.json").read_text())["cut_at"]
    histogram, store = SeedHistogram(), SeedStore(folder / "seeds" / "val" / "seeds")
    for image_id in store.ids():
        histogram.add(store.read(image_id, "refined"))
    assert found == histogram.threshold() != 0.4
    for image_id in store.ids():
        written = np.asarray(Image.open(folder / "seeds" / "val" / "masks" / f"{image_id}.png"))
        np.testing.assert_array_equal(written, seeds_to_label_map(store.read(image_id, "refined"), found))
    assert json.loads((folder / "train" / "model" / "config.json").read_text())["threshold"] == found
    assert json.loads((folder / "pseudo_labels" / "metrics.json").read_text())["threshold"] == found
    assert f"background score {found}, found in the seeds" in (folder / "report" / "index.html").read_text()


def test_seeds_say_how_sure_their_masks_are_and_how_well_that_fits(tmp_path: Path):
    more = ["--seeds.splits", "[val]", "--train.precision", "no", "--seeds.scales", "[1.0, 1.5]"]
    train_main(arguments(tmp_path, *more))
    make_seeds_main(arguments(tmp_path, *more))
    folder, scenes = tmp_path / "tiny" / "seeds", make_shapes(12, 1)
    said = json.loads((folder / "val" / "confidence.json").read_text())
    assert list(said) == sorted(row["image_id"] for row in scenes)
    store, names = SeedStore(folder / "val" / "seeds"), class_names(scenes)
    values: list[float] = []
    ious: list[float] = []
    for row in scenes:
        others = store.others(row["image_id"])
        assert others is not None
        assert others.shape[:2] == (4, len(row["labels"]))
        seeds = store.read(row["image_id"], "refined")
        sure = mask_confidence(torch.from_numpy(seeds.maps), others, 0.4).tolist()
        assert list(said[row["image_id"]]) == [names[index] for index in row["labels"]]
        assert list(said[row["image_id"]].values()) == pytest.approx(sure, abs=0.0051)
        label_map, target = seeds_to_label_map(seeds, 0.4), np.asarray(row["mask"])
        for index in row["labels"]:
            ours, true = label_map == index + 1, target == index + 1
            ious.append((ours & true).sum() / (ours | true).sum())
        values += sure
    assert len(set(values)) > 6
    found = json.loads((folder / "metrics.json").read_text())["splits"]["val"]["confidence"]
    assert found["spearman"] == pytest.approx(spearmanr(values, ious).statistic, abs=0.006)
    assert found["lift"] == pytest.approx(lift(np.array(values), np.array(ious)), abs=0.006)


def test_a_missing_image_folder_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match="nowhere"):
        train_main(arguments(tmp_path, "--data.source", "folder", "--data.root", str(tmp_path / "nowhere")))


def test_too_few_images_for_a_step_are_named(tmp_path: Path):
    with pytest.raises(StageError, match="48 training images do not fill one optimizer step of 64"):
        train_main(arguments(tmp_path, "--train.batch_size", "64"))


def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_images(tmp_path: Path):
    with pytest.raises(StageError, match=r"not finite at optimizer step \d+ .*shapes"):
        train_main(arguments(tmp_path, "--train.learning_rate", "1e30", "--train.warmup_epochs", "0"))
    assert not (tmp_path / "tiny" / "train" / "done.json").exists()


def test_the_stop_names_the_broken_terms_only():
    with pytest.raises(StageError, match=r"step 7 \(pac = nan\); the batch held the images a, b\."):
        stop_if_not_finite({"loss": 1.0, "pac": float("nan")}, 7, ["a", "b"])
    stop_if_not_finite({"loss": 1.0}, 7, ["a"])


@pytest.fixture
def folder_with_a_broken_image(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    (root / "images").mkdir(parents=True)
    table = ["file_name,labels"]
    scenes = make_shapes(16, 5)
    names = scenes.features["labels"].feature.names
    for number, row in enumerate(scenes):
        (root / "images" / f"{number:02d}.png").write_bytes(row["image"]["bytes"])
        table.append(f"{number:02d}.png,{';'.join(names[label] for label in row['labels'])}")
    whole = (root / "images" / "03.png").read_bytes()
    (root / "images" / "03.png").write_bytes(whole[: len(whole) // 2])
    (root / "labels.csv").write_text("\n".join(table) + "\n")
    return root


def folder_arguments(tmp_path: Path, root: Path) -> list[str]:
    return arguments(
        tmp_path, "--data.source", "folder", "--data.root", str(root), "--data.train_split", "null",
        "--data.val_split", "null", "--seeds.splits", "[null]", "--report.split", "null", "--train.epochs", "1",
    )  # fmt: skip


def test_an_unreadable_image_is_named_at_the_end_and_the_rest_is_done(
    tmp_path: Path, folder_with_a_broken_image: Path, capsys: pytest.CaptureFixture[str]
):
    run_all_main(folder_arguments(tmp_path, folder_with_a_broken_image))
    said = capsys.readouterr().out
    found = said.index(f"{folder_with_a_broken_image}: 16 images, ")
    assert found < said.index("epoch 1/1"), "what was found comes before training"
    assert (
        said.count("1 image(s) left out, unreadable or smaller than a patch: 03") == 2
    )  # once by training, once by seeds
    assert metrics(tmp_path, "train")["unreadable"] == metrics(tmp_path, "seeds")["unreadable"] == ["03"]
    seeds = metrics(tmp_path, "seeds")["splits"]["all_images"]
    assert seeds == {"images": 15}, "no masks are known, so nothing can be scored"
    assert len(list((tmp_path / "tiny" / "seeds" / "all_images" / "masks").glob("*.png"))) == 15


def test_images_that_show_no_class_are_trained_on_and_their_masks_are_background(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    root = tmp_path / "photos"
    (root / "images").mkdir(parents=True)
    for number, row in enumerate(make_shapes(8, 5)):
        (root / "images" / f"{number}.png").write_bytes(row["image"]["bytes"])
    table = ["file_name,crack", *(f"{number}.png,{number % 2}" for number in range(8))]
    (root / "labels.csv").write_text("\n".join(table) + "\n")
    run_all_main(folder_arguments(tmp_path, root))
    assert "labels for each image: 0 in 4, 1 in 4" in capsys.readouterr().out
    masks = tmp_path / "tiny" / "seeds" / "all_images" / "masks"
    shown = {path.stem: set(np.unique(np.asarray(Image.open(path)))) for path in masks.glob("*.png")}
    assert len(shown) == 8
    assert all(shown[str(number)] <= {0, 255} for number in range(0, 8, 2))


def test_an_image_smaller_than_a_patch_is_named_and_the_rest_is_done(
    tmp_path: Path, folder_with_a_broken_image: Path, capsys: pytest.CaptureFixture[str]
):
    Image.new("RGB", (40, 9)).save(folder_with_a_broken_image / "images" / "03.png")
    command = folder_arguments(tmp_path, folder_with_a_broken_image)
    train_main(command)
    make_seeds_main(command)
    assert capsys.readouterr().out.count("smaller than a patch: 03") == 1
    assert metrics(tmp_path, "seeds")["splits"]["all_images"]["images"] == 15
    shutil.rmtree(tmp_path / "tiny" / "seeds")
    with pytest.raises(UnreadableImageError, match=r"03 is smaller than a patch: 9 x 40 pixels .* at least 16 x 16"):
        make_seeds_main([*command, "--strict", "true"])


def test_strict_stops_at_an_unreadable_image(tmp_path: Path, folder_with_a_broken_image: Path):
    with pytest.raises(ValueError, match=r"03\.png"):
        train_main([*folder_arguments(tmp_path, folder_with_a_broken_image), "--strict", "true"])


# ---- Schedule, order and parameter groups.


def test_the_epoch_schedule_is_timms_as_the_reference_steps_it():
    train = TrainRecipe()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=5e-4 * 64 / 512)
    timm_schedule = CosineLRScheduler(
        optimizer, t_initial=60, lr_min=1e-5, warmup_t=5, warmup_lr_init=1e-6, cycle_limit=1, t_in_epochs=True
    )
    for epoch in range(60):
        for step in (165 * epoch, 165 * epoch + 164):
            rate = learning_rate(train, step, 165, 64)
            assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), f"epoch {epoch}"
        timm_schedule.step(epoch)
    # wsss facts: 1e-6 twice, then 1.33, 2.56 ... e-5, the last epoch 1.014e-5.
    assert learning_rate(train, 165, 165, 64) == pytest.approx(1e-6)
    assert learning_rate(train, 2 * 165, 165, 64) == pytest.approx(1.33e-5)
    assert learning_rate(train, 59 * 165, 165, 64) == pytest.approx(1.014e-5, rel=1e-3)


def test_the_step_schedule_is_timms_with_a_warmup_prefix():
    train = TrainRecipe(epochs=3, warmup_epochs=0.5, schedule="step_cosine", learning_rate=1e-3, min_learning_rate=0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3 * 32 / 512)
    timm_schedule = CosineLRScheduler(
        optimizer, t_initial=250, lr_min=0, warmup_t=50, warmup_lr_init=1e-6, warmup_prefix=True, t_in_epochs=False
    )
    for step in range(300):
        timm_schedule.step_update(step)
        assert learning_rate(train, step, 100, 32) == pytest.approx(
            optimizer.param_groups[0]["lr"], rel=1e-6, abs=1e-12
        )


def test_the_consistency_losses_weight_rises_from_nothing_to_one(tmp_path: Path):
    rise = [consistency_warmup(1.5, torch.device("cpu"), step, 4)["consistency_scale"].item() for step in range(8)]
    assert rise == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1, 1])
    for warmup in ("0", "1.0"):
        more = ["--data.val_split", "null", "--log_every", "1", "--train.consistency_warmup_epochs", warmup]
        train_main(arguments(tmp_path / warmup, *more))
        lines = (tmp_path / warmup / "tiny" / "train" / "log.jsonl").read_text().splitlines()
        for entry in map(json.loads, lines):
            if "loss" not in entry:  # of an epoch
                continue
            scale = 1.0 if warmup == "0" else min(1.0, (entry["step"] - 1) / 12)
            wanted = entry["class"] + entry["patch"] + scale * (entry["scc"] + entry["pac"])
            assert entry["loss"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("preset", sorted((RECIPES / "presets").glob("*.yaml")), ids=lambda preset: preset.stem)
def test_a_preset_goes_on_top_of_a_recipe(preset: Path):
    for name in ("voc_deit_small", "voc_animals_deit_tiny"):
        files = ["--config", str(RECIPES / f"{name}.yaml"), "--config", str(preset)]
        assert parse_recipe(None, files)[0].data.train_split == "train_aug"


def test_an_epoch_shows_every_image_once_whatever_the_number_of_processes():
    def batches(num_processes: int, process: int, epoch: int) -> np.ndarray:
        settings = TrainRecipe(batch_size=12 // num_processes)
        shares = SimpleNamespace(num_processes=num_processes, process_index=process)
        sampler = ShardedBatches(50, settings, shares, seed=3)
        sampler.start_at(epoch)
        return np.array(list(sampler))

    alone = batches(1, 0, epoch=0)
    assert alone.shape == (4, 12)  # the last two images do not fill a batch
    assert np.unique(alone).size == 48
    np.testing.assert_array_equal(np.hstack([batches(3, process, epoch=0) for process in range(3)]), alone)
    assert (batches(1, 0, epoch=1) != alone).any()
    sampler = ShardedBatches(50, TrainRecipe(batch_size=12), Accelerator(cpu=True), seed=3)
    sampler.start_at(0, first_batch=3)
    np.testing.assert_array_equal(list(sampler), alone[3:])
    assert len(sampler) == 1


def test_biases_norms_tokens_and_positions_are_not_decayed():
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_seed_layers": 1}
    model = build_model(BiTransRecipe(image_size=32, patch_size=16, **sizes), {0: "a"}, seed=0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, plain = parameter_groups(model, 0.05)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    assert {names[id(parameter)] for parameter in decayed["params"]} == {
        "patch_embed.weight", "seg_head.weight", "layers.0.attention.qkv.weight", "layers.0.attention.proj.weight",
        "layers.0.mlp.fc1.weight", "layers.0.mlp.fc2.weight",
    }  # fmt: skip
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
