"""The plain CNN: its maps against einsum, its training and seeds through the stages, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from hub_contract import HubModelContract
from tiny_models import CLASSES, picture, pixels
from transformers import AutoModel

from bitrans_hf import BiTransImageProcessor, CamConfig, CamModel
from bitrans_hf.hub.seeds import sum_over_views
from bitrans_hf.recipes import FOLDER as RECIPES
from bitrans_hf.stages.affinity import build_network as build_affinity_network
from bitrans_hf.stages.build import build_cam
from bitrans_hf.stages.parse import parse_recipe
from bitrans_hf.stages.publish import publish
from bitrans_hf.stages.recipe import CamRecipe, RunOptions, TrainRecipe
from bitrans_hf.stages.report import make_report
from bitrans_hf.stages.run import Run, StageError
from bitrans_hf.stages.seeds import main as make_seeds_main
from bitrans_hf.stages.segmentation import build_network as build_segmentation_network
from bitrans_hf.stages.train import learning_rate, make_optimizer
from bitrans_hf.stages.train import main as train_main
from bitrans_hf.store import SeedStore
from bitrans_hf.weights import load_backbone

TRAINING = Path(__file__).resolve().parents[1] / "training"

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

PRESET = RECIPES / "presets" / "cam_resnet50.yaml"
VARIANTS: dict[str, dict[str, Any]] = {
    "resnet": {"backbone": "test_resnet"},
    "resnet, IRN's freezing": {"backbone": "test_resnet", "num_frozen_stages": 3, "freeze_batch_statistics": True},
    "convnext": {"backbone": "test_convnext", "output_stride": 8},
    "resnet38": {"backbone": "resnet38", "backbone_config": {"width_multiplier": 1 / 32}, "output_stride": None},
}


def make(seed: int = 0, **options: Any) -> CamModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CamModel(CamConfig(id2label=CLASSES, **{"backbone": "test_resnet", **options})).eval()


class TestCam(HubModelContract):
    auto = AutoModel
    outputs = ("logits", "coarse_cam")

    @pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
    def variant(self, request: pytest.FixtureRequest) -> dict[str, Any]:
        return request.param

    def make(self, **options: Any) -> CamModel:
        return make(**options)

    def labels(self, model: CamModel, images: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])[: len(images)]


# ---- The network.


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_maps_are_the_classifier_in_every_cell_and_logits_that_of_averaged_features(variant: dict[str, Any]):
    model, images = make(**variant), pixels(2, 3, 70, 101)
    seen: list[torch.Tensor] = []
    model.backbone.register_forward_hook(lambda module, inputs, maps: seen.append(maps[-1]))
    with torch.no_grad():
        output = model(images)
    (features,) = seen
    weights = model.classifier.weight[:, :, 0, 0]
    assert model.classifier.bias is None
    for cells, side in zip(output.coarse_cam.shape[2:], (70, 101), strict=True):
        assert cells in (side // model.config.stride, -(-side // model.config.stride))
    torch.testing.assert_close(output.coarse_cam, torch.einsum("cd,bdhw->bchw", weights, features))
    torch.testing.assert_close(output.logits, torch.einsum("cd,bd->bc", weights, features.mean(dim=(2, 3))))
    assert output.coarse_cam.std() > 1e-3
    assert output.loss is None


def test_the_loss_is_torchs_multi_label_soft_margin_loss():
    model, images = make(), pixels(2, 3, 64, 64)
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    output = model(images, labels=labels)
    torch.testing.assert_close(output.loss, F.multilabel_soft_margin_loss(output.logits, labels))


def test_the_published_network_is_resnet50_at_stride_16_with_its_last_stage_dilated():
    with torch.device("meta"):
        model = CamModel(CamConfig(id2label=dict(enumerate("abcdefghijklmnopqrst"))))
        output = model(torch.empty(2, 3, 512, 512))
    # ResNet50 has 25,557,032 parameters with its 1000 classes of 2048 weights and a bias.
    assert sum(parameter.numel() for parameter in model.parameters()) == 25_557_032 - 2049 * 1000 + 2048 * 20
    assert output.coarse_cam.shape == (2, 20, 32, 32)
    assert model.config.stride == 16
    dilated = {name for name, module in model.named_modules() if getattr(module, "dilation", (1, 1)) == (2, 2)}
    assert dilated
    assert all(".layer4." in name for name in dilated)


def test_irns_freezing_keeps_the_first_stages_and_all_statistics_but_trains_scale_and_shift_after_them():
    model = make(backbone="resnet18", num_frozen_stages=3, freeze_batch_statistics=True).train()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split("_backbone.")[-1].split(".")[0] for name in trained} == {"layer3", "layer4", "classifier"}
    assert any(name.endswith("layer4.1.bn2.bias") for name in trained)
    before = {name: value.clone() for name, value in model.state_dict().items() if "running_" in name}
    model(pixels(2, 3, 64, 64), labels=torch.ones(2, 3)).loss.backward()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    moved = make(backbone="resnet18").train()
    moved(pixels(2, 3, 64, 64))
    assert not all(torch.equal(moved.state_dict()[name], value) for name, value in before.items())


def test_timms_weights_fill_the_backbone_and_leave_the_classifier(tmp_path: Path):
    network: Any = timm.create_model("test_resnet", num_classes=10)
    torch.save(network.state_dict(), tmp_path / "resnet.pth")
    model = make()
    classifier = model.classifier.weight.clone()
    load_backbone(model, tmp_path / "resnet.pth")
    assert torch.equal(model.classifier.weight, classifier)
    images = pixels(1, 3, 96, 96)
    with torch.no_grad():
        # Stride 16 dilates what has stride 32 in the whole network: compared where both see the same.
        plain: Any = timm.create_model("test_resnet", num_classes=0, output_stride=16).eval()
        plain.load_state_dict({name: value for name, value in network.state_dict().items() if "fc." not in name})
        torch.testing.assert_close(model.backbone(images)[-1], plain.forward_features(images))


def test_seeds_are_the_positive_part_summed_over_scales_and_flips():
    model = make()
    views = BiTransImageProcessor().scaled_views(picture(40, 56), (1.0, 0.5, 1.5))
    total = sum_over_views(model, views, {"coarse_cam": ("coarse_cam", False)}, size=(10, 14))["coarse_cam"]
    expected = np.zeros((3, 10, 14))
    with torch.no_grad():
        for view in views:
            for image, flip_back in ((view, False), (view.flip(-1), True)):
                cam = model(image).coarse_cam.clamp(min=0)
                large = F.interpolate(cam, size=(10, 14), mode="bilinear", align_corners=False)[0].numpy()
                expected += large[:, :, ::-1] if flip_back else large
    np.testing.assert_allclose(total[0].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backbone": "bitrans"}, "backbone must be resnet38 or a convolutional network of timm, got 'bitrans'"),
        ({"backbone": ""}, "backbone must be resnet38"),
        (
            {"backbone": "test_vit", "output_stride": None},
            "must be a convolutional network, got the vision transformer 'test_vit'",
        ),
        ({"backbone": "no_such_network"}, "timm network, got 'no_such_network'"),
        ({"backbone": "resnet38"}, "the output stride of resnet38 is 8, got 16"),
        ({"output_stride": 5}, "output_stride 5"),
        ({"num_frozen_stages": -2}, "num_frozen_stages must be -1"),
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
        ({"id2label": {}, "num_labels": 0}, "must name at least one object class"),
    ],
)
def test_a_wrong_configuration_is_refused(options: dict[str, Any], words: str):
    with pytest.raises(Exception, match=words):
        CamModel(CamConfig(**{"id2label": CLASSES, "backbone": "test_resnet", "output_stride": 16, **options}))


@pytest.mark.parametrize(
    ("shape", "labels", "words"),
    [
        ((2, 1, 64, 64), None, r"pixel_values must be \(B, 3, H, W\), got \(2, 1, 64, 64\)"),
        ((3, 64, 64), None, "got \\(3, 64, 64\\)"),
        ((2, 3, 64, 64), (2, 4), r"labels must be multi-hot of shape \(2, 3\) for 3 classes, got \(2, 4\)"),
        ((2, 3, 64, 64), (2,), r"got \(2,\)"),
    ],
)
def test_wrong_inputs_are_refused(shape: tuple[int, ...], labels: tuple[int, ...] | None, words: str):
    with pytest.raises(ValueError, match=words):
        make()(torch.zeros(shape), labels=None if labels is None else torch.zeros(labels))


# ---- The stages.

TINY = [
    "--config", str(RECIPES / "shapes.yaml"), "--config", str(PRESET),
    "--cpu", "true", "--quiet", "true", "--name", "tiny",
    "--data.num_train", "24", "--data.num_val", "6",
    "--model.weights", "scratch", "--model.backbone", "test_resnet", "--model.image_size", "64",
    "--model.options", '{"output_stride": 8}',
    "--train.epochs", "2", "--train.batch_size", "4", "--train.precision", "no", "--log_every", "2",
    "--train.augmentation_options", '{"longer_side": [48, 80]}', "--seeds.scales", "[1.0, 0.5]",
    "--report.num_images", "2",
]  # fmt: skip


def test_from_images_to_scores_of_the_only_variant_a_cnn_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    command = [*TINY, "--output_dir", str(tmp_path)]
    train_main(command)
    folder = tmp_path / "tiny"
    trained = json.loads((folder / "train" / "metrics.json").read_text())
    assert {"loss", "map", "image_ap", "made_with"} <= set(trained)
    assert not {"class", "patch", "map_class", "map_patch", "image_ap_class"} & set(trained)
    assert isinstance(AutoModel.from_pretrained(folder / "train" / "model"), CamModel)
    rates = [json.loads(line).get("lr") for line in (folder / "train" / "log.jsonl").read_text().splitlines()]
    # Steps 2, 4 ... 12 of 12, numbered from 0; 3.2 is for 512 images.
    expected = [3.2 * 4 / 512 * (1 - step / 12) ** 0.9 for step in range(1, 12, 2)]
    assert [rate for rate in rates if rate is not None] == pytest.approx(expected)

    make_seeds_main(command)
    seeds = json.loads((folder / "seeds" / "metrics.json").read_text())
    assert set(seeds["miou"]) == set(seeds["threshold"]) == {"coarse_cam"}
    for split in ("val", "train"):
        scores = seeds["splits"][split]
        for key in ("miou", "threshold", "per_class", "miou_at_recipe_threshold"):
            assert set(scores[key]) == {"coarse_cam"}, key
        assert set(scores["several_classes"]["miou"]) == {"coarse_cam"}
    assert set(seeds["splits"]["train"]["miou_at_given_threshold"]) == {"coarse_cam"}
    store = SeedStore(folder / "seeds" / "val" / "seeds")
    with np.load(store.path(store.ids()[0])) as arrays:
        assert {name for name in arrays if name.startswith("maps_")} == {"maps_coarse_cam"}
    assert len(list((folder / "seeds" / "val" / "masks").glob("*.png"))) == 6

    recipe, options = parse_recipe(None, command)
    page = make_report(recipe, options).read_text()
    assert "Coarse-CAM" in page
    assert "SC-CAM" not in page
    with pytest.raises(StageError, match=r"cam is a baseline, whose network is not published"):
        publish(recipe, options)
    assert recipe.affinity is not None
    with pytest.raises(StageError, match=r"affinity.backbone bitrans is the run's own encoder"):
        build_affinity_network(Run(recipe, RunOptions(cpu=True), Accelerator(cpu=True)), recipe.affinity, CLASSES)
    assert recipe.segmentation is not None
    with pytest.raises(StageError, match=r"segmentation.backbone bitrans is the run's own encoder"):
        build_segmentation_network(
            Run(recipe, RunOptions(cpu=True), Accelerator(cpu=True)), recipe.segmentation, list(CLASSES.values())
        )


def test_the_preset_turns_a_recipe_into_the_baseline_and_keeps_its_data():
    recipe = str(RECIPES / "voc_deit_small.yaml")
    before, _ = parse_recipe(None, ["--config", recipe])
    after, _ = parse_recipe(None, ["--config", recipe, "--config", str(PRESET)])
    # A recipe may set any key of a transformer: none of them is left.
    own = ["--config", recipe, "--config", "presets/late_affinity", "--config", str(PRESET)]
    assert parse_recipe(None, own)[0] == after
    assert after.model == CamRecipe(
        weights="timm", architecture="cam", backbone="resnet50.tv_in1k", image_size=512,
        options={"output_stride": 16, "num_frozen_stages": 3, "freeze_batch_statistics": True},
    )  # fmt: skip
    assert (after.data, after.seed, after.seeds.splits) == (before.data, before.seed, before.seeds.splits)
    assert after.seeds.scales == [1.0, 0.5, 1.5, 2.0]
    assert after.train.augmentation_options == {}
    # 0.1 at 16 images a step, ten times that for the classifier.
    assert learning_rate(after.train, 0, 100, 16) == pytest.approx(0.1)
    assert learning_rate(after.train, 250, 100, 16) == pytest.approx(0.1 * 0.5**0.9)


def test_the_optimizer_is_what_the_recipe_says():
    model = make()
    adamw = make_optimizer(model, TrainRecipe(weight_decay=0.05))
    sgd = make_optimizer(model, TrainRecipe(weight_decay=1e-4, optimizer="sgd", momentum=0.9))
    assert isinstance(adamw, torch.optim.AdamW)
    assert isinstance(sgd, torch.optim.SGD)
    for optimizer, decay in ((adamw, 0.05), (sgd, 1e-4)):
        groups = {group["name"]: group for group in optimizer.param_groups}
        assert groups["classifier weights"]["rate_multiplier"] == 10
        assert groups["backbone weights"]["rate_multiplier"] == 1
        assert groups["backbone weights"]["weight_decay"] == groups["classifier weights"]["weight_decay"] == decay
        assert groups["backbone scales"]["weight_decay"] == 0
    assert {group["momentum"] for group in sgd.param_groups} == {0.9}


def test_equal_seeds_draw_equal_networks():
    recipe = CamRecipe(backbone="test_resnet")
    first, same, other = (build_cam(recipe, CLASSES, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["--model.architecture", "cam"], "seeds.variant must be coarse_cam for model.architecture cam, got"),
        (["--config", str(PRESET), "--seeds.variant", "sc_cam"], "a CNN has no attention"),
        (
            ["--config", str(PRESET), "--pseudo_labels.method", "refiner", "--pseudo_labels.refiner", "par",
             "--pseudo_labels.variant", "fused"],
            "pseudo_labels.variant must be coarse_cam",
        ),
        (
            ["--config", str(PRESET), "--model.scc_weight", "0.5"],
            "--model.scc_weight",
        ),
        (
            ["--config", str(PRESET), "--model.class_token_noise", "0.5"],
            "--model.class_token_noise",
        ),
        (
            ["--model.backbone", "resnet50"],
            "--model.backbone",
        ),
        (["--model.architecture", "cnn"], "model.architecture"),
        (["--config", str(PRESET), "--seeds.refine_steps", "2"], "seeds.refine_steps does not belong to"),
        (["--config", str(PRESET), "--train.consistency_warmup_epochs", "1"], "train.consistency_warmup_epochs does"),
        (["--train.momentum", "0.9"], "train.momentum must be in [0, 1) and is for train.optimizer sgd, got 0.9 for"),
        (["--train.optimizer", "sgd", "--train.momentum", "1.5"], "train.momentum must be in [0, 1)"),
    ],
)  # fmt: skip
def test_a_wrong_recipe_is_refused(command: list[str], words: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse_recipe(None, command)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"options": {"num_frozen_stages": 2}}, "scratch leaves nothing to freeze, got num_frozen_stages 2"),
        ({"options": {"freeze_batch_statistics": True}}, "scratch leaves nothing to freeze"),
        ({"weights": "nowhere/resnet.pth"}, "no weights file at nowhere/resnet.pth"),
        ({"weights": "timm"}, "could not get the weights of 'test_resnet'"),
    ],
)
def test_weights_that_cannot_be_had_are_named(changes: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises((ValueError, OSError), match=words):
        build_cam(CamRecipe(**{"backbone": "test_resnet", **changes}), CLASSES, 0)
