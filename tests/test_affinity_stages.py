"""From seeds to pseudo labels as a person runs it: small, on the CPU, killed, resumed, and given bad input."""

from __future__ import annotations

import errno
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from stage_processes import forget_processes, kill_everything, launch
from torch.optim.lr_scheduler import PolynomialLR

from bitrans_hf.data import UnreadableImageError, make_shapes, open_mask
from bitrans_hf.data.rows import build_dataset
from bitrans_hf.files import DiskFullError
from bitrans_hf.hub.image_processing_bitrans import BiTransImageProcessor
from bitrans_hf.hub.modeling_affinitynet import AffinityNetModel
from bitrans_hf.metrics.scores import StepScores
from bitrans_hf.report.tables import step_table
from bitrans_hf.stages.affinity import AffinityCrops, label_backgrounds, random_window
from bitrans_hf.stages.affinity import main as train_affinity_main
from bitrans_hf.stages.checkpoints import Checkpoints
from bitrans_hf.stages.label_maps import cell_labels
from bitrans_hf.stages.loop import RateSchedule
from bitrans_hf.stages.parse import parse_recipe
from bitrans_hf.stages.pseudo_labels import main as make_pseudo_labels_main
from bitrans_hf.stages.recipe import AffinityRecipe
from bitrans_hf.stages.run import StageError
from bitrans_hf.stages.run_all import main as run_all_main
from bitrans_hf.stages.seeds import main as make_seeds_main
from bitrans_hf.stages.train import main as train_main
from bitrans_hf.store import SeedStore

TRAINING = Path(__file__).resolve().parents[1] / "training"

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

BASE = [
    "--cpu", "true", "--quiet", "true", "--workers", "1",
    "--data.num_train", "24", "--data.num_val", "12",
    "--model.image_size", "64", "--model.patch_size", "16", "--model.hidden_size", "24",
    "--model.num_hidden_layers", "2", "--model.num_attention_heads", "2", "--model.num_seed_layers", "1",
    "--train.epochs", "1", "--train.batch_size", "4", "--train.augmentation", "flip", "--num_workers", "0",
    "--train.schedule", "step_cosine", "--train.learning_rate", "0.05", "--report.num_images", "3",
]  # fmt: skip
AFFINITY = [
    "--affinity.backbone", "bitrans", "--affinity.options", "{output_stride: 4}", "--affinity.refiner", "par",
    "--affinity.crop_size", "64", "--affinity.epochs", "2", "--affinity.batch_size", "4",
    "--num_workers", "0", "--log_every", "2",
]  # fmt: skip
PSEUDO_LABELS = ["--pseudo_labels.splits", "[val, train]"]
STAGES = [*AFFINITY, *PSEUDO_LABELS]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums over several threads may differ in their last digits, and small ones are faster without."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def arguments(folder: Path, *more: str) -> list[str]:
    return [*BASE, "--output_dir", str(folder), "--name", "tiny", *more]


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model is trained and whose seeds are made; tests get copies."""
    folder = tmp_path_factory.mktemp("runs")
    train_main(arguments(folder))
    make_seeds_main(arguments(folder))
    forget_processes()
    return folder


@pytest.fixture(scope="module")
def trained_once(made_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a trained affinity network."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(made_once / "tiny", folder / "tiny")
    train_affinity_main(arguments(folder, *AFFINITY))
    forget_processes()
    return folder


@pytest.fixture
def seeds_made(made_once: Path, tmp_path: Path) -> Path:
    shutil.copytree(made_once / "tiny", tmp_path / "tiny")
    return tmp_path


@pytest.fixture
def network_trained(trained_once: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained_once / "tiny", tmp_path / "tiny")
    return tmp_path


def metrics(folder: Path, stage: str) -> dict[str, Any]:
    return json.loads((folder / "tiny" / stage / "metrics.json").read_text())


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def split_folder(folder: Path, split: str = "val") -> Path:
    return folder / "tiny" / "pseudo_labels" / split


def slow_miou(label_maps_by_id: dict[str, np.ndarray], rows: list[dict[str, Any]]) -> float:
    """Mean IoU in percent over the classes that occur, from sets of pixels."""
    predicted = np.concatenate([label_maps_by_id[row["image_id"]].ravel() for row in rows])
    true = np.concatenate([np.asarray(row["mask"]).ravel() for row in rows])
    ious = []
    for label in range(6):
        a, b = set(np.flatnonzero(predicted == label)), set(np.flatnonzero(true == label))
        if a | b:
            ious.append(len(a & b) / len(a | b))
    return 100 * float(np.mean(ious))


# ---- The whole road.


def test_run_all_runs_the_stages_that_have_a_section(seeds_made: Path, capsys: pytest.CaptureFixture[str]):
    command = arguments(seeds_made, *STAGES, "--pseudo_labels.refiner", "par")
    run_all_main(command)
    run = seeds_made / "tiny"

    affinity = metrics(seeds_made, "affinity")
    assert {"loss", "background", "foreground", "negative", "steps", "parameters_million"} <= set(affinity)
    assert affinity["labels"]["scored"] == 24
    assert set(affinity["labels"]["steps"]) == {"low", "high", "confident"}
    assert 0 < affinity["labels"]["sure"]["confident"] < 100
    assert isinstance(AffinityNetModel.from_pretrained(run / "affinity" / "model"), AffinityNetModel)
    assert isinstance(BiTransImageProcessor.from_pretrained(run / "affinity" / "model"), BiTransImageProcessor)
    assert not (run / "affinity" / "checkpoints").exists()

    measured = metrics(seeds_made, "pseudo_labels")
    assert list(measured["splits"]["val"]["steps"]) == ["seed", "walk", "refined"]
    assert list(measured["splits"]["train"]["steps"]) == ["seed", "low", "high", "walk", "refined"]
    assert measured["miou"] == measured["splits"]["val"]["steps"]["refined"]
    assert measured["splits"]["train"]["steps"]["low"] == affinity["labels"]["steps"]["low"]
    rows = list(make_shapes(12, 1))
    assert measured["splits"]["val"]["scored"] == measured["splits"]["val"]["images"] == 12
    assert measured["splits"]["val"]["several_classes"]["images"] == sum(len(row["labels"]) > 1 for row in rows)
    for step, folder in (("walk", "walk"), ("refined", "labels")):
        stored = {
            row["image_id"]: open_mask(split_folder(seeds_made) / folder / f"{row['image_id']}.png") for row in rows
        }
        assert measured["splits"]["val"]["steps"][step] == pytest.approx(slow_miou(stored, rows), abs=0.01)
    for row in rows:
        with Image.open(split_folder(seeds_made) / "labels" / f"{row['image_id']}.png") as label_map:
            assert (label_map.mode, label_map.size) == ("P", (64, 64))
            assert set(np.unique(label_map)) <= {0, *(label + 1 for label in row["labels"])}
    page = (run / "report" / "index.html").read_text()
    assert all(heading in page for heading in ("Pseudo label", "After the walk", "After the refiner"))

    capsys.readouterr()
    run_all_main(command)
    said = capsys.readouterr().out
    assert "affinity: already done" in said
    assert "pseudo_labels: already done" in said


def test_the_refiner_alone_needs_no_network(seeds_made: Path):
    pytest.importorskip("pydensecrf", reason="the dense CRF is an extra")
    options = ("--pseudo_labels.method", "refiner", "--pseudo_labels.refiner", "crf", *PSEUDO_LABELS)
    run_all_main(arguments(seeds_made, *options))
    assert not (seeds_made / "tiny" / "affinity").exists()
    assert list(metrics(seeds_made, "pseudo_labels")["steps"]) == ["seed", "refined"]
    assert len(list((split_folder(seeds_made, "train") / "labels").glob("*.png"))) == 24


def test_irn_walks_inside_its_boundaries(seeds_made: Path):
    options = ("--affinity.relation", "irn", "--affinity.refiner", "none", "--affinity.epochs", "1", *PSEUDO_LABELS)
    train_affinity_main(arguments(seeds_made, *AFFINITY, *options))
    make_pseudo_labels_main(arguments(seeds_made, *AFFINITY, *options))
    assert metrics(seeds_made, "pseudo_labels")["splits"]["val"]["scored"] == 12


def test_the_background_can_be_a_power_or_the_best_threshold_of_the_seeds(network_trained: Path):
    make_pseudo_labels_main(arguments(network_trained, *STAGES, "--pseudo_labels.threshold", "best"))
    best = json.loads((network_trained / "tiny" / "seeds" / "metrics.json").read_text())["threshold"]["refined"]
    assert metrics(network_trained, "pseudo_labels")["threshold"] == best
    seeds = json.loads((network_trained / "tiny" / "seeds" / "metrics.json").read_text())["splits"]["train"]
    steps = metrics(network_trained, "pseudo_labels")["splits"]["train"]["steps"]
    assert steps["seed"] == pytest.approx(seeds["miou"]["refined"], abs=0.02)
    shutil.rmtree(network_trained / "tiny" / "pseudo_labels")
    make_pseudo_labels_main(arguments(network_trained, *STAGES, "--pseudo_labels.background", "alpha"))
    assert metrics(network_trained, "pseudo_labels")["threshold"] is None


def test_the_network_can_be_used_on_a_finer_grid_than_it_was_trained_on(network_trained: Path):
    run = network_trained / "tiny"
    make_pseudo_labels_main(arguments(network_trained, *STAGES, "--pseudo_labels.rescale", "true"))
    coarse = files_below(split_folder(network_trained) / "labels")
    shutil.rmtree(run / "pseudo_labels")
    make_pseudo_labels_main(arguments(network_trained, *STAGES, "--pseudo_labels.output_stride", "2"))
    fine = files_below(split_folder(network_trained) / "labels")
    assert fine.keys() == coarse.keys()
    assert fine != coarse
    shutil.rmtree(run / "pseudo_labels")
    with pytest.raises(ValueError, match="output_stride of backbone 'bitrans' must divide its patch size 16, got 3"):
        make_pseudo_labels_main(arguments(network_trained, *STAGES, "--pseudo_labels.output_stride", "3"))


# ---- Killed and resumed.


def test_pseudo_labels_that_were_killed_end_with_the_files_of_a_whole_run(network_trained: Path, tmp_path: Path):
    options = (*STAGES, "--pseudo_labels.refiner", "par")
    whole = tmp_path / "whole"
    shutil.copytree(network_trained / "tiny", whole / "tiny")
    make_pseudo_labels_main(arguments(whole, *options))
    forget_processes()
    expected = files_below(whole / "tiny" / "pseudo_labels")

    killed = launch([str(TRAINING / "make_pseudo_labels.py"), *arguments(network_trained, *options)])
    labels = split_folder(network_trained) / "labels"
    deadline = time.monotonic() + 120
    while len(list(labels.glob("[!.]*.png"))) < 2:
        assert killed.poll() is None, killed.communicate()[0]
        assert time.monotonic() < deadline, "no pseudo label came"
        time.sleep(0.001)
    kill_everything(killed)
    assert not (network_trained / "tiny" / "pseudo_labels" / "done.json").exists(), "killed too late"
    finished = {path: path.stat().st_mtime_ns for path in labels.glob("[!.]*.png")}
    for path in finished:
        open_mask(path)  # whole
    (labels / ".half.1.tmp.png").write_bytes(b"half")

    make_pseudo_labels_main(arguments(network_trained, *options))
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    after = files_below(network_trained / "tiny" / "pseudo_labels")
    assert after.keys() == expected.keys()
    measured = [json.loads(files.pop("metrics.json"))["splits"] for files in (after, expected)]
    assert measured[0] == measured[1]
    for files in (after, expected):
        for name in ("done.json", "recipe.json"):
            del files[name]
    assert after == expected


class Interrupted(Exception):
    pass


def test_a_network_whose_training_stopped_resumes_to_the_same_weights(
    seeds_made: Path, trained_once: Path, monkeypatch: pytest.MonkeyPatch
):
    options = (*AFFINITY, "--checkpoint_every", "4")
    save = Checkpoints.save

    def save_and_stop(self: Checkpoints, step: int, state: dict[str, Any]) -> None:
        save(self, step, state)
        raise Interrupted

    monkeypatch.setattr(Checkpoints, "save", save_and_stop)
    with pytest.raises(Interrupted):
        train_affinity_main(arguments(seeds_made, *options))
    forget_processes()
    monkeypatch.setattr(Checkpoints, "save", save)
    labels = seeds_made / "tiny" / "affinity" / "labels"
    written = {path: path.stat().st_mtime_ns for path in labels.rglob("*.png")}
    assert len(written) == 48
    train_affinity_main(arguments(seeds_made, *options))
    assert {path: path.stat().st_mtime_ns for path in labels.rglob("*.png")} == written
    expected, actual = (
        load_file(folder / "tiny" / "affinity" / "model" / "model.safetensors")
        for folder in (trained_once, seeds_made)
    )
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


@pytest.mark.slow
def test_two_processes_with_two_workers_each_make_the_same_pseudo_labels_as_one(network_trained: Path, tmp_path: Path):
    options = (*STAGES, "--pseudo_labels.batch_size", "1", "--pseudo_labels.refiner", "crf", "--workers", "2")
    whole = tmp_path / "whole"
    shutil.copytree(network_trained / "tiny", whole / "tiny")
    make_pseudo_labels_main(arguments(whole, *options, "--workers", "1"))
    run = launch(
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         str(TRAINING / "make_pseudo_labels.py"), *arguments(network_trained, *options)]
    )  # fmt: skip
    said = run.communicate(timeout=240)[0]
    assert run.returncode == 0, said
    one, two = (files_below(folder / "tiny" / "pseudo_labels" / "val") for folder in (whole, network_trained))
    assert one == two
    assert metrics(whole, "pseudo_labels")["splits"] == metrics(network_trained, "pseudo_labels")["splits"]


# ---- Bad input, by its message.


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["--affinity.optimizer", "adam"], "adam"),
        (["--affinity.refiner", "densecrf"], "densecrf"),
        (["--affinity.epochs", "0"], "affinity.epochs must be at least 1, got 0"),
        (["--affinity.backbone", "resnet50"], '"trained" is for the backbone bitrans'),
        (["--affinity.split", "test", "--affinity.backbone", "bitrans"], "names 'test', which has no seeds"),
        (["--affinity.low_alpha", "1", "--affinity.foreground_threshold", "0.3", "--affinity.backbone", "bitrans"],
         "exclude each other"),
        (["--affinity.crf_preset", "mine", "--affinity.backbone", "bitrans"], "unknown CRF preset 'mine'"),
        (["--pseudo_labels.crf_preset", "mine", "--pseudo_labels.network", "x"], "unknown CRF preset 'mine'"),
        (["--pseudo_labels.beta", "8"], "needs an affinity network"),
        (["--pseudo_labels.method", "refiner"], "needs pseudo_labels.refiner crf or par"),
        (["--pseudo_labels.splits", "[train_aug]"], "'train_aug', which has no seeds; add it to seeds.splits"),
        (["--pseudo_labels.threshold", "1.5", "--pseudo_labels.network", "x"], "must be in [0, 1], got 1.5"),
        (["--pseudo_labels.threshold", "worst", "--pseudo_labels.network", "x"], "worst"),
    ],
)  # fmt: skip
def test_a_wrong_recipe_is_refused(command: list[str], words: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse_recipe("", command)
    assert words in " ".join(capsys.readouterr().err.split())


def rewrite_seeds(folder: Path, split: str, **changes: Any) -> str:
    """Change arrays of the first image's seeds; return its id."""
    store = SeedStore(folder / "tiny" / "seeds" / split / "seeds")
    image_id = store.ids()[0]
    with np.load(store.path(image_id)) as arrays:
        changed = {name: changes.get(name, arrays[name]) for name in arrays}
    np.savez_compressed(store.path(image_id), **changed)
    return image_id


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": np.array([64, 60], dtype=np.int32)}, "are for 64 x 60 pixels (height x width), the image has 64"),
        ({"class_ids": np.array([7]), "maps_refined": np.ones((1, 4, 4), np.float16)}, "are of the classes [7], the"),
        ({"maps_refined": np.full((1, 4, 4), np.nan, np.float16)}, "hold NaN or infinity"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stage", ["affinity", "walk", "refiner"])
def test_seeds_that_do_not_fit_are_named(stage: str, changes: dict[str, Any], words: str, network_trained: Path):
    run = {"affinity": train_affinity_main}.get(stage, make_pseudo_labels_main)
    options = STAGES
    if stage == "refiner":
        options = [*PSEUDO_LABELS, "--pseudo_labels.method", "refiner", "--pseudo_labels.refiner", "par"]
    if stage == "affinity":
        shutil.rmtree(network_trained / "tiny" / "affinity")
    split = "train" if stage == "affinity" else "val"
    store = SeedStore(network_trained / "tiny" / "seeds" / split / "seeds")
    if "maps_refined" in changes and "class_ids" not in changes:
        with np.load(store.path(store.ids()[0])) as arrays:
            changes = {"maps_refined": np.full_like(arrays["maps_refined"], np.nan)}
    image_id = rewrite_seeds(network_trained, split, **changes)
    with pytest.raises(StageError) as error:
        run(arguments(network_trained, *options))
    assert f"seeds of image {image_id} " in str(error.value)
    assert words in str(error.value)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Somebody's folder; one image shows nothing but a class that the recipe leaves out."""
    root = tmp_path / "photos"
    (root / "images").mkdir(parents=True)
    scenes = make_shapes(12, 5)
    names = [*scenes.features["labels"].feature.names, "cloud"]
    table = ["file_name,labels"]
    for number, row in enumerate(scenes):
        (root / "images" / f"{number:02d}.png").write_bytes(row["image"]["bytes"])
        labels = ["cloud"] if number == 5 else [names[label] for label in row["labels"]]
        table.append(f"{number:02d}.png,{';'.join(labels)}")
    (root / "labels.csv").write_text("\n".join(table) + "\n")
    (root / "classes.txt").write_text("\n".join(names) + "\n")
    return root


def photo_arguments(tmp_path: Path, photos: Path) -> list[str]:
    return arguments(
        tmp_path, "--data.source", "folder", "--data.root", str(photos), "--data.train_split", "null",
        "--data.val_split", "null", "--data.classes", "[disc, square, triangle, star, cross]",
        "--seeds.splits", "[null]", "--report.split", "null", *AFFINITY,
        "--affinity.split", "null", "--affinity.refiner", "none", "--pseudo_labels.splits", "[null]",
    )  # fmt: skip


def test_broken_and_empty_pictures_do_not_stop_the_others(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
):
    command = photo_arguments(tmp_path, photos)
    train_main(command)
    make_seeds_main(command)
    # Damaged inside, so that its size can still be read.
    whole = (photos / "images" / "03.png").read_bytes()
    (photos / "images" / "03.png").write_bytes(whole[: len(whole) // 2])
    train_affinity_main(command)
    capsys.readouterr()
    make_pseudo_labels_main(command)
    said = capsys.readouterr().out
    assert "1 image(s) left out, unreadable or smaller than a patch: 03" in said
    assert "11 images, no masks to score against" in said
    assert "1 image(s) hold no class and are background alone" in said
    measured = metrics(tmp_path, "pseudo_labels")
    assert measured["unreadable"] == ["03"]
    assert "miou" not in measured
    labels = tmp_path / "tiny" / "pseudo_labels" / "all_images" / "labels"
    assert len(list(labels.glob("*.png"))) == 11
    assert not open_mask(labels / "05.png").any()
    shutil.rmtree(tmp_path / "tiny" / "pseudo_labels")
    with pytest.raises(UnreadableImageError, match=r"03\.png"):
        make_pseudo_labels_main([*command, "--strict", "true"])
    shutil.rmtree(tmp_path / "tiny" / "pseudo_labels")
    with pytest.raises(StageError, match='"best" needs the seeds\' best threshold'):
        make_pseudo_labels_main([*command, "--pseudo_labels.threshold", "best"])


@pytest.mark.parametrize("stage", ["affinity", "pseudo_labels"])
def test_a_full_disk_is_said_and_the_same_command_goes_on(
    stage: str, network_trained: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.rmtree(network_trained / "tiny" / "affinity") if stage == "affinity" else None
    run = train_affinity_main if stage == "affinity" else make_pseudo_labels_main
    written: list[Path] = []
    save = Image.Image.save

    def save_until_full(self: Image.Image, file: Any, **options: Any) -> None:
        if isinstance(file, Path):
            if len(written) == 5:
                file.write_bytes(b"half")
                raise OSError(errno.ENOSPC, "No space left on device")
            written.append(file.with_name(file.name.split(".")[1] + ".png"))
        save(self, file, **options)

    monkeypatch.setattr(Image.Image, "save", save_until_full)
    with pytest.raises(DiskFullError, match=r"no room left to write .*\.png .*make room and rerun the same command"):
        run(arguments(network_trained, *STAGES))
    times = {path: path.stat().st_mtime_ns for path in written}
    assert len(times) == 5
    monkeypatch.setattr(Image.Image, "save", save)
    assert not list((network_trained / "tiny" / stage).rglob(".*.tmp.*"))
    run(arguments(network_trained, *STAGES))
    assert {path: path.stat().st_mtime_ns for path in written} == times


def test_missing_stages_say_what_to_run(tmp_path: Path, seeds_made: Path):
    with pytest.raises(StageError, match=r"no trained affinity network at .*run the stage affinity "):
        make_pseudo_labels_main(arguments(seeds_made, *STAGES))
    (seeds_made / "tiny" / "seeds" / "done.json").unlink()
    with pytest.raises(StageError, match=r"seeds is not finished; run the stage seeds "):
        train_affinity_main(arguments(seeds_made, *AFFINITY))
    with pytest.raises(StageError, match="no section affinity"):
        train_affinity_main(arguments(seeds_made))
    with pytest.raises(StageError, match="no section pseudo_labels"):
        make_pseudo_labels_main(arguments(seeds_made))


def test_a_crop_must_be_whole_cells(seeds_made: Path):
    with pytest.raises(StageError, match=r"affinity.crop_size must be a multiple of the network's stride 4, got 62"):
        train_affinity_main(arguments(seeds_made, *AFFINITY, "--affinity.crop_size", "62"))


def test_another_kind_of_network_is_refused(network_trained: Path):
    network = str(network_trained / "tiny" / "train" / "model")
    with pytest.raises(StageError, match=r"a network of the type 'bitrans', expected 'affinitynet'"):
        make_pseudo_labels_main(arguments(network_trained, *STAGES, "--pseudo_labels.network", network))
    shutil.rmtree(network_trained / "tiny" / "pseudo_labels")
    with pytest.raises(StageError, match=r"holds no network: there is no config.json"):
        make_pseudo_labels_main(arguments(network_trained, *STAGES, "--pseudo_labels.network", str(network_trained)))


def test_a_network_trained_for_other_classes_serves_as_well(
    network_trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    network = tmp_path / "other"
    shutil.copytree(network_trained / "tiny" / "affinity" / "model", network)
    config = json.loads((network / "config.json").read_text())
    config |= {"id2label": {"0": "cat", "1": "dog"}, "label2id": {"cat": 0, "dog": 1}}
    (network / "config.json").write_text(json.dumps(config))
    make_pseudo_labels_main(arguments(network_trained, *STAGES))
    own = files_below(split_folder(network_trained))
    shutil.rmtree(network_trained / "tiny" / "pseudo_labels")
    capsys.readouterr()
    make_pseudo_labels_main(arguments(network_trained, *PSEUDO_LABELS, "--pseudo_labels.network", str(network)))
    assert files_below(split_folder(network_trained)) == own
    assert "was trained for 2 classes (cat, dog), the data has 5" in capsys.readouterr().out


# ---- Labels and crops.


def slow_cell_labels(low: np.ndarray, high: np.ndarray, stride: int) -> np.ndarray:
    result = np.full((low.shape[0] // stride, low.shape[1] // stride), 255, dtype=np.uint8)
    for row in range(result.shape[0]):
        for column in range(result.shape[1]):
            votes = []
            for label_map in (low, high):
                pixels = [
                    int(label_map[row * stride + y, column * stride + x]) for y in range(stride) for x in range(stride)
                ]
                counted = [pixel for pixel in pixels if pixel != 255]
                votes.append(max(sorted(set(counted)), key=counted.count) if counted else None)
            if votes[1] == 0:
                result[row, column] = 0
            elif votes[0]:
                result[row, column] = votes[0]
    return result


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_cells_take_the_label_that_two_maps_agree_upon(stride: int):
    rng = np.random.default_rng(stride)
    low, high = (rng.choice([0, 0, 3, 9], (16, 24)).astype(np.uint8) for _ in range(2))
    for label_map in (low, high):
        label_map[:, 18:] = 255  # beyond the image
        label_map[10:] = 255
    np.testing.assert_array_equal(cell_labels(low, high, stride), slow_cell_labels(low, high, stride))


def test_maps_of_background_alone_and_of_nothing_have_cells_too():
    nothing, background = np.full((4, 4), 255, dtype=np.uint8), np.zeros((4, 4), dtype=np.uint8)
    assert (cell_labels(nothing, nothing, 2) == 255).all()
    assert (cell_labels(background, background, 2) == 0).all()


@pytest.mark.parametrize(("height", "width"), [(50, 40), (20, 70), (24, 24), (10, 12)])
def test_crops_carry_their_labels_along(height: int, width: int, tmp_path: Path):
    """The label of a pixel is written into its color, so that pixels and labels must move together."""
    rng = np.random.default_rng(0)
    labels = np.kron(rng.integers(0, 3, (-(-height // 2), -(-width // 2))), np.ones((2, 2)))[:height, :width]
    labels = labels.astype(np.uint8)
    for name in ("low", "high"):
        (tmp_path / name).mkdir()
        Image.fromarray(labels).save(tmp_path / name / "a.png")
    picture = Image.fromarray(np.stack([labels * 100] * 3, axis=2))
    picture.save(tmp_path / "a.png")
    rows = build_dataset(["a"], [tmp_path / "a.png"], [[0]], [None], ["x"])
    settings = AffinityRecipe(crop_size=24, color_jitter=0.0, weights="scratch")
    crops = AffinityCrops(rows, tmp_path, 1, BiTransImageProcessor(), settings, seed=0, strict=True)
    seen = set()
    for epoch in range(12):
        crops.set_epoch(epoch)
        item, again = crops[0], crops[0]
        assert torch.equal(item["pixel_values"], again["pixel_values"])
        assert torch.equal(item["labels"], again["labels"])
        mean, std = BiTransImageProcessor.image_mean[0], BiTransImageProcessor.image_std[0]
        inside = item["labels"] != 255
        assert int(inside.sum()) == min(height, 24) * min(width, 24)
        coded = ((item["pixel_values"][0] * std + mean) * 255 / 100).round()
        assert torch.equal(coded[inside].long(), item["labels"][inside])
        assert (item["pixel_values"][:, ~inside] == 0).all()
        seen.add(item["labels"].numpy().tobytes())
    assert len(seen) > 1, "every epoch shows the same crop"


def test_windows_reach_every_place():
    torch.manual_seed(0)
    assert {random_window(7, 5)[1].start for _ in range(60)} == {0, 1, 2}
    assert {random_window(3, 5)[0] for _ in range(60)} == {0, 1, 2}
    assert random_window(5, 5) == (0, slice(0, 5))


def test_label_backgrounds_are_the_relations_unless_the_recipe_says_otherwise():
    def of(**fields: Any) -> tuple[tuple[float | None, float | None], ...]:
        return tuple((each.threshold, each.alpha) for each in label_backgrounds(AffinityRecipe(**fields)).values())

    assert of() == ((None, 1.0), (None, 12.0))
    assert of(low_alpha=4.0, high_alpha=24.0) == ((None, 4.0), (None, 24.0))
    assert of(relation="irn") == ((0.3, None), (0.05, None))
    assert of(foreground_threshold=0.5) == ((0.5, None), (None, 12.0))


# ---- Rates and tables.


def test_the_poly_schedule_is_torchs():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    reference = PolynomialLR(optimizer, total_iters=40, power=0.9)
    schedule = RateSchedule("poly", 0.1, epochs=4)
    for step in range(40):
        assert schedule(step, 10) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        reference.step()


def test_the_step_table_marks_the_best_whole_step():
    table = step_table(
        StepScores(
            steps={"seed": 60.0, "confident": 90.0, "walk": 70.0},
            sure={"confident": 42.0},
            several_classes=StepScores(images=2, steps={"seed": 50.0, "confident": 80.0, "walk": 55.0}),
        )
    )
    assert table is not None
    assert table.columns[-1] == "several classes (%)"
    assert table.best_row == 2
    assert table.rows[1][0] == "What both agree upon (42 % of the pixels)"
    assert step_table(StepScores(images=3)) is None
