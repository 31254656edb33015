"""The segmentation stage and its test as a person runs them: small, killed, resumed, and given bad input."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from tiny_models import tiny_model

from bitrans_hf import BiTransImageProcessor, DeepLabConfig, DeepLabForSemanticSegmentation
from bitrans_hf.data import load_coco, make_shapes, open_mask
from bitrans_hf.metrics import MeanIoU
from bitrans_hf.stages.multi_scale import TEST_PRESETS, multi_scale_scores
from bitrans_hf.stages.parse import parse_recipe
from bitrans_hf.stages.predictions import VOC_SERVER_FOLDER, pack_for_voc_server, predict_image
from bitrans_hf.stages.predictions import main as predict_main
from bitrans_hf.stages.recipe import PredictionRecipe, RunOptions, SegmentationRecipe
from bitrans_hf.stages.run import Run, StageError
from bitrans_hf.stages.run_all import main as run_all_main
from bitrans_hf.stages.segmentation import build_network, make_optimizer
from bitrans_hf.stages.segmentation import main as train_main

TRAINING = Path(__file__).resolve().parents[1] / "training"

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

TINY = [
    "--cpu", "true", "--quiet", "true", "--workers", "1",
    "--data.num_train", "16", "--data.num_val", "6",
    "--segmentation.labels", "ground_truth", "--segmentation.val_split", "val",
    "--segmentation.options", '{"backbone_config": {"width_multiplier": 0.03125}}',
    "--segmentation.crop_size", "48", "--segmentation.epochs", "2", "--segmentation.batch_size", "4",
    "--num_workers", "0", "--log_every", "2", "--segmentation.learning_rate", "0.002",
    "--prediction.refiner", "none", "--prediction.scales", "[1.0, 0.5]",
]  # fmt: skip


def arguments(folder: Path, *more: str) -> list[str]:
    return [*TINY, "--output_dir", str(folder), "--name", "tiny", *more]


def stage(folder: Path, name: str) -> Path:
    return folder / "tiny" / name


def metrics(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((stage(folder, name) / "metrics.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(stage(folder, "segmentation") / "model" / "model.safetensors")


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name].float() - second[name].float()).abs().max()) for name in first)


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*.png")
    }


def write_label_maps(folder: Path, count: int = 16, **changed: np.ndarray) -> Path:
    """Label maps for the training scenes that are wrong in one corner, and those given by number as `map_<n>`."""
    folder.mkdir(parents=True)
    for number, row in enumerate(make_shapes(count, 0)):
        label_map = np.array(row["mask"])
        label_map[:8, :8] = 1
        Image.fromarray(changed.get(f"map_{number}", label_map)).save(folder / f"{row['image_id']}.png")
    return folder


# ---- The whole road.


def test_a_network_is_trained_tested_and_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    labels = write_label_maps(tmp_path / "labels")
    command = arguments(tmp_path, "--segmentation.labels", str(labels))
    train_main(command)
    predict_main(command)

    model = DeepLabForSemanticSegmentation.from_pretrained(stage(tmp_path, "segmentation") / "model").eval()
    assert model.config.id2label[0] == "background"
    trained = metrics(tmp_path, "segmentation")
    assert {"loss", "miou", "per_class", "parameters_million", "made_with"} <= set(trained)
    assert (trained["scored"], trained["images"], trained["labels"]) == (6, 16, str(labels))

    # The files are those of a loop over the images, and so are the scores.
    tested = metrics(tmp_path, "predictions")["splits"]["val"]
    views: Any = {**TEST_PRESETS["mctformer"], "scales": [1.0, 0.5]}
    processor, metric = BiTransImageProcessor(), MeanIoU(6)
    for row in make_shapes(6, 1):
        path = stage(tmp_path, "predictions") / "val" / "multi_scale" / f"{row['image_id']}.png"
        expected = multi_scale_scores(model, processor.normalized(_picture(row)), **views).argmax(dim=0)
        np.testing.assert_array_equal(open_mask(path), expected)
        with Image.open(path) as image:
            assert image.mode == "P"
        metric.add(prediction=expected.numpy(), reference=np.array(row["mask"]))
    miou = 100 * metric.compute()["mean_iou"]
    assert tested["steps"]["multi_scale"] == pytest.approx(miou, abs=0.006)
    assert metrics(tmp_path, "predictions")["miou"] == tested["steps"]["multi_scale"]
    # One scale, whole images: what training scored after its last epoch.
    assert tested["steps"]["single_scale"] == trained["miou"]

    capsys.readouterr()
    train_main(command)
    predict_main(command)
    said = capsys.readouterr().out
    assert "segmentation: already done" in said
    assert "predictions: already done" in said


def test_run_all_goes_on_to_the_segmentation_network_and_shows_it(tmp_path: Path):
    small = (
        "--model.image_size", "64", "--model.patch_size", "16", "--model.hidden_size", "24",
        "--model.num_hidden_layers", "2", "--model.num_attention_heads", "2", "--model.num_seed_layers", "1",
        "--train.epochs", "1", "--train.batch_size", "4", "--train.augmentation", "flip", "--num_workers", "0",
        "--train.learning_rate", "0.05", "--report.num_images", "2",
        "--segmentation.labels", "seeds", "--segmentation.num_images", "12", "--segmentation.backbone", "bitrans",
        "--segmentation.weights", "trained", "--segmentation.options", "{output_stride: 8, head_dilation: 1}",
    )  # fmt: skip
    run_all_main(arguments(tmp_path, *small))
    assert metrics(tmp_path, "segmentation")["images"] == 12
    page = (stage(tmp_path, "report") / "index.html").read_text()
    for words in ("Segmentation network, val: 6 images", "Several scales or flips", "Segmentation network: loss",
                  "Segmentation network: validation mIoU (%)", "segmentation.num_images"):  # fmt: skip
        assert words in page
    pictures = list((stage(tmp_path, "report") / "index_pictures").glob("chart_segmentation_network*.png"))
    assert len(pictures) == 3


def _picture(row: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(row["image"]["bytes"]))


@pytest.mark.parametrize("refiner", ["crf", "par"])
def test_a_refiner_is_a_further_step(refiner: str, tmp_path: Path):
    if refiner == "crf":
        pytest.importorskip("pydensecrf", reason="the dense CRF is an extra")
    train_main(arguments(tmp_path))
    command = arguments(tmp_path, "--prediction.refiner", refiner, "--prediction.splits", "[val, test]")
    predict_main(command)
    tested = metrics(tmp_path, "predictions")
    assert list(tested["splits"]) == ["val", "test"]
    for scores in tested["splits"].values():
        assert list(scores["steps"]) == ["single_scale", "multi_scale", refiner]
        assert scores["images"] == scores["scored"] == 6
    folder = stage(tmp_path, "predictions") / "val"
    for path in (folder / refiner).glob("*.png"):
        # Classes that won no pixel before the refiner cannot win one after it.
        assert set(np.unique(open_mask(path))) <= {0, *np.unique(open_mask(folder / "multi_scale" / path.name))}


def test_no_more_than_one_image_is_held_for_each_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("pydensecrf", reason="the dense CRF is an extra")
    from bitrans_hf.stages import predictions as predict_masks

    train_main(arguments(tmp_path))
    order: list[tuple[str, str]] = []
    monkeypatch.setattr(
        predict_masks, "write_label_png", lambda path, label_map, image_id: order.append((path.stem, path.parent.name))
    )
    predict_main(arguments(tmp_path, "--prediction.refiner", "crf"))
    steps = ["single_scale", "multi_scale", "crf"]
    assert order == [(image_id, step) for image_id in make_shapes(6, 1)["image_id"] for step in steps]


def test_the_refiner_sees_the_predicted_of_81_classes(tmp_path: Path, shared_data: Path):
    rows = load_coco(shared_data / "tiny_coco", "val2017").select(range(2))
    recipe, _ = parse_recipe("", TINY)
    names = rows.features["labels"].feature.names
    run = Run(recipe, RunOptions(cpu=True), Accelerator(cpu=True))
    network = build_network(run, recipe.segmentation, names).eval()
    for row in rows:
        made = predict_image(run, network, BiTransImageProcessor(), row, tmp_path, PredictionRecipe(scales=[0.25]))
        label_map = open_mask(tmp_path / "multi_scale" / f"{row['image_id']}.png", num_classes=80)
        np.testing.assert_array_equal(made.label_map(made.scores), label_map)
        predicted = np.union1d([0], np.unique(label_map))
        assert made.label_ids.tolist() == list(predicted)
        assert made.scores.shape == (len(predicted), *made.image.shape[:2])


def test_bf16_accumulation_and_adamw_are_recipe_keys(tmp_path: Path):
    train_main(
        arguments(
            tmp_path, "--segmentation.precision", "bf16", "--segmentation.gradient_accumulation", "2",
            "--segmentation.batch_size", "2", "--segmentation.optimizer", "adamw", "--segmentation.preset",
            "deeplab-v1", "--segmentation.batch_norm", "frozen", "--segmentation.val_every", "2",
        )
    )  # fmt: skip
    lines = [json.loads(line) for line in (stage(tmp_path, "segmentation") / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "miou" in line] == [8], "4 steps an epoch, scored every second one"
    tensors = weights(tmp_path)
    assert {tensor.dtype for name, tensor in tensors.items() if name.endswith("weight")} == {torch.float32}


def test_channels_last_trains_to_the_same_network(tmp_path: Path):
    # Wider than elsewhere: below 16 channels oneDNN 3.x overwrites memory in strided 1x1 convolutions, channels last.
    wider = ("--segmentation.options", '{"backbone_config": {"width_multiplier": 0.25}}', "--segmentation.epochs", "1")
    wider += ("--segmentation.learning_rate", "1e-4")
    train_main(arguments(tmp_path / "plain", *wider))
    train_main(arguments(tmp_path / "last", *wider, "--segmentation.channels_last", "true"))
    assert largest_difference(weights(tmp_path / "plain"), weights(tmp_path / "last")) < 1e-3
    plain, last = (metrics(tmp_path / name, "segmentation")["loss"] for name in ("plain", "last"))
    assert last == pytest.approx(plain, rel=1e-3)


def test_label_maps_of_earlier_stages_are_found_by_name(tmp_path: Path):
    for labels, place in (("pseudo_labels", "pseudo_labels/train/labels"), ("seeds", "seeds/train/masks")):
        folder = tmp_path / labels
        write_label_maps(folder / "tiny" / place)
        train_main(arguments(folder, "--segmentation.labels", labels, "--segmentation.epochs", "1"))
        assert metrics(folder, "segmentation")["labels"] == labels


def test_the_backbone_starts_from_the_weights_that_the_recipe_names(tmp_path: Path):
    recipe, _ = parse_recipe("", arguments(tmp_path))
    run = Run(recipe, RunOptions(cpu=True), Accelerator(cpu=True))
    tiny = {"backbone_config": {"width_multiplier": 0.03125}}
    source = build_network(run, SegmentationRecipe(options=tiny), ["a"])
    names = {name.removeprefix("network."): value for name, value in source.backbone.state_dict().items()}
    torch.save(names, tmp_path / "res38_cls.pth")
    started = build_network(
        replace(run, recipe=replace(recipe, seed=1)),
        SegmentationRecipe(options=tiny, weights=str(tmp_path / "res38_cls.pth")),
        ["b", "c"],
    )
    assert largest_difference(source.backbone.state_dict(), started.backbone.state_dict()) == 0.0
    assert started.config.id2label == {0: "background", 1: "b", 2: "c"}

    bitrans = tiny_model()
    bitrans.save_pretrained(tmp_path / "tiny" / "train" / "model")
    own = SegmentationRecipe(backbone="bitrans", weights="trained", options={"output_stride": 4})
    network = build_network(run, own, ["cat", "dog", "horse"])
    assert network.stride == 4
    for name, value in network.backbone.encoder.state_dict().items():
        assert torch.equal(value, bitrans.state_dict()[name])
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        build_network(run, SegmentationRecipe(options=tiny, weights="nowhere.pth"), ["a"])


# ---- Killed and resumed.


class Killed(Exception):
    pass


def test_a_killed_run_resumes_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    more = ("--checkpoint_every", "1", "--segmentation.preset", "deeplab-v1")
    train_main(arguments(tmp_path / "whole", *more))

    from bitrans_hf.stages import loop

    save = loop.Checkpoints.save

    def save_and_die(self: Any, step: int, progress_state: Any) -> None:
        save(self, step, progress_state)
        if step == 3:
            raise Killed

    monkeypatch.setattr(loop.Checkpoints, "save", save_and_die)
    with pytest.raises(Killed):
        train_main(arguments(tmp_path / "killed", *more))
    monkeypatch.undo()
    train_main(arguments(tmp_path / "killed", *more))
    assert largest_difference(weights(tmp_path / "whole"), weights(tmp_path / "killed")) == 0.0
    assert metrics(tmp_path / "whole", "segmentation")["miou"] == metrics(tmp_path / "killed", "segmentation")["miou"]


def test_predictions_go_on_after_a_kill_and_done_images_are_left_alone(tmp_path: Path):
    train_main(arguments(tmp_path))
    predict_main(arguments(tmp_path))
    folder = stage(tmp_path, "predictions")
    before, scores = digest(folder), metrics(tmp_path, "predictions")["splits"]

    # As after a kill: not finished, the last step missing for some images, a temporary file left behind.
    (folder / "done.json").unlink()
    kept, *redone = sorted((folder / "val" / "multi_scale").glob("*.png"))
    for path in redone:
        path.unlink()
    written = kept.stat().st_mtime_ns
    (kept.parent / ".half.1.tmp.png").write_bytes(b"half")
    predict_main(arguments(tmp_path))
    (kept.parent / ".half.1.tmp.png").unlink()
    assert digest(folder) == before
    assert kept.stat().st_mtime_ns == written
    assert metrics(tmp_path, "predictions")["splits"] == scores


@pytest.mark.slow
def test_two_processes_score_as_one(tmp_path: Path):
    train_main(arguments(tmp_path, "--data.num_val", "7"))
    predict_main(arguments(tmp_path, "--data.num_val", "7"))
    alone = metrics(tmp_path, "predictions")["splits"]["val"]
    files = digest(stage(tmp_path, "predictions"))
    stage(tmp_path, "predictions").rename(tmp_path / "of_one")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, *launcher, str(TRAINING / "predict_masks.py"), *arguments(tmp_path, "--data.num_val", "7")],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert metrics(tmp_path, "predictions")["splits"]["val"] == alone
    assert digest(stage(tmp_path, "predictions")) == files


# ---- The VOC server.


def test_predictions_are_packed_as_the_voc_server_wants_them(tmp_path: Path):
    folder = tmp_path / "test"
    (folder / "multi_scale").mkdir(parents=True)
    for image_id in ("2008_000006", "2008_000001"):
        Image.fromarray(np.full((3, 4), 20, np.uint8)).save(folder / "multi_scale" / f"{image_id}.png")
    settings = PredictionRecipe(refiner="none")
    archive = pack_for_voc_server(["2008_000001", "2008_000006"], folder, settings)
    with tarfile.open(archive) as tar:
        assert tar.getnames() == [f"{VOC_SERVER_FOLDER}/2008_00000{number}.png" for number in (1, 6)]
        packed = tar.extractfile(f"{VOC_SERVER_FOLDER}/2008_000006.png")
        assert packed is not None
        assert (np.asarray(Image.open(packed)) == 20).all()
    first = archive.read_bytes()
    assert pack_for_voc_server(["2008_000006", "2008_000001"], folder, settings).read_bytes() == first
    with pytest.raises(StageError, match=r"1 of 3 images have no prediction, the first is 2008_000002"):
        pack_for_voc_server(["2008_000001", "2008_000002", "2008_000006"], folder, settings)


# ---- Bad input, by its message.


def test_label_maps_that_are_the_ground_truth_are_refused(tmp_path: Path):
    folder = tmp_path / "labels"
    folder.mkdir()
    for row in make_shapes(16, 0):
        row["mask"].save(folder / f"{row['image_id']}.png")
    with pytest.raises(StageError, match=r"are the ground truth: 16 of 16 .* segmentation.labels ground_truth"):
        train_main(arguments(tmp_path, "--segmentation.labels", str(folder)))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (np.full((64, 64), 6, np.uint8), r"1 of 16 label maps cannot .* holds the id 6, expected .* 1 to 5"),
        (np.zeros((64, 63), np.uint8), r"1 of 16 label maps cannot .* 64x63 .* its image 64x64"),
        (np.full((64, 64, 3), (128, 0, 0), np.uint8), r"1 of 16 label maps cannot .* is a RGB image"),
    ],
)
def test_label_maps_that_do_not_fit_stop_before_training(wrong: np.ndarray, words: str, tmp_path: Path):
    labels = write_label_maps(tmp_path / "labels", map_3=wrong)
    with pytest.raises(StageError, match=words):
        train_main(arguments(tmp_path, "--segmentation.labels", str(labels)))
    assert not (stage(tmp_path, "segmentation") / "log.jsonl").exists()


def test_missing_label_maps_are_counted_and_the_first_is_named(tmp_path: Path):
    labels = write_label_maps(tmp_path / "labels")
    ids = make_shapes(16, 0)["image_id"]
    for number in (4, 9, 11):
        (labels / f"{ids[number]}.png").unlink()
    with pytest.raises(StageError, match=rf"3 of 16 images have no label map in .*, the first is {ids[4]}"):
        train_main(arguments(tmp_path, "--segmentation.labels", str(labels)))


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ("pseudo_labels", r"no label maps at .*pseudo_labels/train/labels; run the stage pseudo_labels "),
        ("seeds", r"no label maps at .*seeds/train/masks; run the stage seeds "),
        ("nowhere", r"no label maps at nowhere; segmentation.labels must be pseudo_labels, seeds, ground_truth or"),
    ],
)
def test_a_folder_of_label_maps_that_is_not_there_says_how_to_make_it(labels: str, words: str, tmp_path: Path):
    with pytest.raises(StageError, match=words):
        train_main(arguments(tmp_path, "--segmentation.labels", labels))


def test_a_crop_larger_than_every_image_is_refused(tmp_path: Path):
    # At the largest scale of the preset, 1.3, a scene of 64 pixels has 83.
    with pytest.raises(StageError, match=r"the longest side is 64 pixels, a crop at the largest scale spans 65"):
        train_main(arguments(tmp_path, "--segmentation.crop_size", "84"))


def test_a_network_for_other_classes_is_refused(tmp_path: Path):
    other = DeepLabForSemanticSegmentation(DeepLabConfig(num_labels=3, backbone_config={"width_multiplier": 0.03125}))
    other.save_pretrained(tmp_path / "other")
    BiTransImageProcessor(do_resize=False).save_pretrained(tmp_path / "other")
    words = r"knows the classes LABEL_1, LABEL_2, the data disc, square, triangle, star, cross"
    with pytest.raises(StageError, match=words):
        train_main(arguments(tmp_path, "--segmentation.weights", str(tmp_path / "other")))
    with pytest.raises(StageError, match=words):
        predict_main(arguments(tmp_path, "--prediction.network", str(tmp_path / "other")))


def test_what_is_missing_says_what_to_run(tmp_path: Path):
    with pytest.raises(StageError, match=r"no segmentation network at .*run the stage segmentation "):
        predict_main(arguments(tmp_path))
    trained = ("--segmentation.backbone", "bitrans", "--segmentation.weights", "trained")
    with pytest.raises(StageError, match=r"no trained model at .*run the stage train "):
        train_main(arguments(tmp_path, *trained))
    with pytest.raises(StageError, match="the recipe has no section segmentation"):
        train_main(["--cpu", "true", "--output_dir", str(tmp_path)])
    with pytest.raises(StageError, match="sync needs GPUs, got cpu; use trained"):
        train_main(arguments(tmp_path / "sync", "--segmentation.batch_norm", "sync"))


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["--segmentation.epochs", "0"], "segmentation.epochs must be at least 1, got 0"),
        (["--segmentation.val_every", "0"], "segmentation.val_every must be at least 1, got 0"),
        (["--segmentation.num_images", "0"], "segmentation.num_images must be at least 1, got 0"),
        (["--prediction.network", "n", "--prediction.crf_preset", "x"], "unknown CRF preset 'x'"),
        (["--segmentation.preset", "deeplab-v9"], "key='preset', val='deeplab-v9'"),
        (["--segmentation.weights", "trained"], "is for the backbone bitrans, got the backbone 'resnet38'"),
        (["--segmentation.labels", "seeds", "--segmentation.split", "test"], "names 'test', which has no seeds"),
        (["--prediction.refiner", "crf"], "prediction needs a network: add the section segmentation"),
        (["--prediction.network", "n", "--prediction.splits", "[]"], "prediction.splits is empty"),
        (["--prediction.network", "n", "--prediction.scales", "[0.0]"], "must be factors above 0"),
        (["--prediction.network", "n", "--prediction.pack", "true"], "it needs data.source voc"),
    ],
)
def test_a_wrong_recipe_is_refused(command: list[str], words: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse_recipe("", command)
    assert words in capsys.readouterr().err


# ---- Presets.


@pytest.mark.parametrize(
    ("preset", "momentum", "groups"),
    [
        ("mctformer", 1e-5, {(1.0, 0.0), (10.0, 0.0)}),
        ("deeplab-v1", 0.9, {(1.0, 5e-4), (1.0, 0.0), (2.0, 0.0), (10.0, 5e-4), (10.0, 0.0), (20.0, 0.0)}),
    ],
)
def test_the_optimizer_is_the_presets(preset: Any, momentum: float, groups: set[tuple[float, float]]):
    recipe, _ = parse_recipe("", TINY)
    settings = SegmentationRecipe(preset=preset, options={"backbone_config": {"width_multiplier": 0.03125}})
    model = build_network(Run(recipe, RunOptions(cpu=True), Accelerator(cpu=True)), settings, ["a", "b"])
    optimizer = make_optimizer(model, settings)
    assert {group["momentum"] for group in optimizer.param_groups} == {momentum}
    assert {(group["rate_multiplier"], group["weight_decay"]) for group in optimizer.param_groups} == groups
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == trained
