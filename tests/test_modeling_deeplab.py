from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_resnet38 as reference
import torch
from hub_contract import HubModelContract
from tiny_models import picture, pixels, tiny_model
from torch import nn
from transformers import AutoModelForSemanticSegmentation, pipeline

from bitrans_hf import (
    AffinityNetConfig,
    AffinityNetModel,
    BiTransImageProcessor,
    DeepLabConfig,
    DeepLabForSemanticSegmentation,
)
from bitrans_hf.hub.backbones import bitrans_options
from bitrans_hf.hub.labels import VOC_CLASSES

NARROW = {"backbone_config": {"width_multiplier": 1 / 32}, "num_labels": 4}
BITRANS = {"backbone": "bitrans", "backbone_config": bitrans_options(tiny_model()), "num_labels": 4}
VARIANTS: dict[str, dict[str, Any]] = {
    "mctformer resnet38": NARROW,
    "deeplab-v1 resnet38": {**NARROW, "preset": "deeplab-v1"},
    "mctformer resnet": {"backbone": "test_resnet", "num_labels": 4, "output_stride": 8},
    "deeplab-v1 convnext": {"backbone": "test_convnext", "num_labels": 4, "preset": "deeplab-v1", "output_stride": 16},
    "mctformer vit": {"backbone": "test_vit", "num_labels": 4},
    "mctformer bitrans": BITRANS,
    "deeplab-v1 bitrans": {**BITRANS, "preset": "deeplab-v1", "output_stride": 4, "num_frozen_stages": 2},
}


def make(seed: int = 0, **options: Any) -> DeepLabForSemanticSegmentation:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return DeepLabForSemanticSegmentation(DeepLabConfig(**options)).eval()


def label_map(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(seed))


class TestDeepLab(HubModelContract):
    auto = AutoModelForSemanticSegmentation
    outputs = ("logits",)

    @pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
    def variant(self, request: pytest.FixtureRequest) -> dict[str, Any]:
        return request.param

    def make(self, **options: Any) -> DeepLabForSemanticSegmentation:
        return make(**options)

    def labels(self, model: DeepLabForSemanticSegmentation, images: torch.Tensor) -> torch.Tensor:
        return label_map(len(images), *images.shape[2:])


@pytest.mark.parametrize("any_size", [False, True])
@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_224"])
def test_a_loaded_swin_has_the_masks_of_its_shifted_windows(name: str, any_size: bool, tmp_path: Path):
    # Buffers that are not saved, where the size is fixed. With two blocks a stage, the second shifts its windows.
    shape = {"embed_dim": 8, "depths": [2, 1, 1, 1], "num_heads": [1, 1, 1, 1], "window_size": 4}
    size = {"img_size": 64, "dynamic_img_size": any_size}
    model = make(backbone=name, backbone_config={**shape, **size}, num_labels=4)
    expected = dict(model.named_buffers())
    masks = [buffer.unique().tolist() for key, buffer in expected.items() if key.endswith("attn_mask")]
    assert masks == ([] if any_size else [[-100, 0]])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    buffers = dict(loaded.named_buffers())
    assert buffers.keys() == expected.keys()
    assert all(torch.equal(buffers[key], buffer) for key, buffer in expected.items())
    images = pixels(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(images).logits, model(images).logits)


# ---- Architecture.


def test_the_published_network_has_its_number_of_parameters():
    with torch.device("meta"):
        model = DeepLabForSemanticSegmentation(DeepLabConfig())
        logits = model(torch.empty(2, 3, 321, 400)).logits
    assert sum(parameter.numel() for parameter in model.parameters()) == 124_042_581
    head = {name: tuple(value.shape) for name, value in model.head.state_dict().items()}
    assert head == reference.segmentation_shapes(21, width=1)
    assert logits.shape == (2, 21, 41, 50)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    convolutions = {name for name in frozen if ".bn" not in name}
    assert convolutions == {"backbone.network.conv1a.weight"}
    assert len(frozen) == 1 + 2 * 37


@pytest.mark.parametrize("size", [(96, 128), (100, 93)])
def test_logits_are_those_of_a_plain_transcription_of_mctformers_network(size: tuple[int, int]):
    state = reference.state(more=reference.segmentation_shapes(4))
    model = make(**NARROW)
    renamed = {
        ("head." if name.startswith("fc8") else "backbone.network.") + name: value for name, value in state.items()
    }
    assert not model.load_state_dict(renamed, strict=False).unexpected_keys
    images = pixels(2, 3, *size)
    with torch.no_grad():
        ours, theirs = model(images).logits, reference.segmentation_logits(state, images)
    assert theirs.std() > 0.1
    assert ours.shape == (2, 4, -(-size[0] // 8), -(-size[1] // 8))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_the_other_head_is_seams():
    model = make(**VARIANTS["deeplab-v1 resnet38"])
    assert {name: tuple(value.shape) for name, value in model.head.state_dict().items() if value.ndim == 4} == {
        "conv_fov.weight": (512, 128, 3, 3), "conv_fov2.weight": (512, 512, 1, 1), "cls_conv.weight": (4, 512, 1, 1),
    }  # fmt: skip
    assert (model.head.conv_fov.dilation, model.head.conv_fov.padding) == ((12, 12), (12, 12))
    assert model.head.dropout1.p == 0.5
    assert model.head.conv_fov.bias is None
    features = pixels(2, 128, 9, 9).abs()
    with torch.no_grad():
        for norm in (model.head.bn_fov, model.head.bn_fov2):
            norm.running_mean.normal_(0, 0.2)
            norm.running_var.uniform_(0.5, 2)
        expected = nn.Sequential(
            model.head.conv_fov, model.head.bn_fov, nn.ReLU(), model.head.conv_fov2, model.head.bn_fov2, nn.ReLU(),
            model.head.cls_conv,
        )(features)  # fmt: skip
        assert torch.equal(model.head(features), expected)


@pytest.mark.parametrize(
    ("variant", "stride", "dilation"),
    [
        ("mctformer resnet38", 8, 12),
        ("mctformer resnet", 8, 12),
        ("deeplab-v1 convnext", 16, 6),
        ("mctformer vit", 16, 6),
        ("mctformer bitrans", 8, 12),
        ("deeplab-v1 bitrans", 4, 24),
    ],
)
def test_the_head_reaches_equally_far_at_every_stride(variant: str, stride: int, dilation: int):
    model = make(**VARIANTS[variant])
    assert (model.config.stride, model.config.head_dilation) == (stride, dilation)
    with torch.no_grad():
        logits = model(pixels(1, 3, 2 * stride + 1, 3 * stride)).logits
    assert logits.shape == (1, 4, 3, 3)


def test_an_image_between_two_sizes_is_enlarged_and_not_cut():
    model = make(**VARIANTS["mctformer vit"])
    image = pixels(1, 3, 50, 64)
    larger = nn.functional.interpolate(image, size=(64, 64), mode="bilinear", align_corners=False)
    with torch.no_grad():
        assert torch.equal(model(image).logits, model(larger).logits)


@pytest.mark.parametrize("name", ["resnet50", "resnet101", "convnext_tiny", "vit_small_patch16_224"])
def test_the_networks_of_the_recipes_can_be_built(name: str):
    stride = None if name.startswith("vit") else 8
    with torch.device("meta"):
        model = DeepLabForSemanticSegmentation(DeepLabConfig(backbone=name, output_stride=stride))
    assert model.config.stride == (16 if stride is None else 8)
    assert model.head.fc8_seg_conv1.in_channels == {"r": 2048, "c": 768, "v": 384}[name[0]]


# ---- Loss.


def resized_by_hand(logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear interpolation of (L, h, w) with pixel centers at half cells, one output pixel after the other."""
    _, h, w = logits.shape
    result = np.empty((len(logits), *size))
    for y in range(size[0]):
        for x in range(size[1]):
            v = min(max((y + 0.5) * h / size[0] - 0.5, 0), h - 1)
            u = min(max((x + 0.5) * w / size[1] - 0.5, 0), w - 1)
            top, left = int(v), int(u)
            below, right = min(top + 1, h - 1), min(left + 1, w - 1)
            upper = logits[:, top, left] * (1 - (u - left)) + logits[:, top, right] * (u - left)
            lower = logits[:, below, left] * (1 - (u - left)) + logits[:, below, right] * (u - left)
            result[:, y, x] = upper * (1 - (v - top)) + lower * (v - top)
    return result


def test_the_loss_is_the_mean_cross_entropy_of_the_resized_logits_over_counted_pixels():
    model, images, labels = make(**NARROW), pixels(2, 3, 33, 40), label_map(2, 33, 40)
    labels[:, :7] = 255
    labels[1] = 255
    with torch.no_grad():
        output = model(images, labels=labels)
    scores = resized_by_hand(output.logits[0].double().numpy(), (33, 40))
    log_sum = np.log(np.exp(scores - scores.max(0)).sum(0)) + scores.max(0)
    costs = [
        log_sum[y, x] - scores[int(labels[0, y, x]), y, x]
        for y in range(33)
        for x in range(40)
        if labels[0, y, x] != 255
    ]
    assert len(costs) == 26 * 40
    assert output.loss.item() == pytest.approx(np.mean(costs), rel=1e-4)


def test_a_batch_without_a_counted_pixel_has_no_loss_and_no_gradient():
    model = make(**NARROW).train()
    loss = model(pixels(2, 3, 32, 32), labels=torch.full((2, 32, 32), 255)).loss
    assert loss.item() == 0
    loss.backward()
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_label_maps_may_be_of_any_integer_type(dtype: torch.dtype):
    model, images, labels = make(**NARROW), pixels(1, 3, 32, 32), label_map(1, 32, 32)
    labels[0, 0, 0] = 255
    with torch.no_grad():
        assert torch.equal(model(images, labels=labels.to(dtype)).loss, model(images, labels=labels).loss)


@pytest.mark.parametrize("preset", ["mctformer", "deeplab-v1"])
def test_training_learns_two_colors(preset: str):
    model = make(backbone="test_resnet", num_labels=3, output_stride=8, preset=preset, freeze_batch_norm=False).train()
    images, labels = torch.zeros(2, 3, 48, 64), torch.zeros(2, 48, 64, dtype=torch.long)
    images[0, 0, :, 32:], labels[0, :, 32:] = 2.0, 1
    images[1, 2, 24:], labels[1, 24:] = 2.0, 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(12):
        loss = model(images, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# ---- Labels and configuration.


def test_labels_are_background_and_the_classes():
    config = DeepLabConfig()
    assert [config.id2label[label] for label in range(21)] == ["background", *VOC_CLASSES]
    assert config.label2id["tvmonitor"] == 20
    assert (config.num_labels, config.semantic_loss_ignore_index) == (21, 255)
    own = DeepLabConfig(id2label={0: "background", 1: "cat"})
    assert (own.num_labels, own.label2id) == (2, {"background": 0, "cat": 1})
    assert DeepLabConfig(num_labels=81).id2label[80] == "LABEL_80"


def test_presets_bring_their_published_settings():
    first, second = DeepLabConfig(), DeepLabConfig(preset="deeplab-v1")
    assert (first.freeze_batch_norm, first.num_frozen_stages) == (True, 1)
    assert (second.freeze_batch_norm, second.num_frozen_stages) == (False, 0)
    assert DeepLabConfig(backbone="resnet50").num_frozen_stages == 0
    assert DeepLabConfig(preset="deeplab-v1", freeze_batch_norm=True).freeze_batch_norm is True
    groups = {group["name"]: group for group in make(**NARROW).parameter_groups()}
    assert {name: (group["rate_multiplier"], group["weight_decay"]) for name, group in groups.items()} == {
        "backbone weights": (1.0, 0.0), "head weights": (10.0, 0.0), "head biases": (10.0, 0.0),
    }  # fmt: skip
    groups = {group["name"]: group for group in make(**VARIANTS["deeplab-v1 resnet38"]).parameter_groups()}
    assert {name: (group["rate_multiplier"], group["weight_decay"]) for name, group in groups.items()} == {
        "backbone weights": (1.0, 5e-4), "backbone scales": (1.0, 0.0), "backbone biases": (2.0, 0.0),
        "head weights": (10.0, 5e-4), "head scales": (10.0, 0.0), "head biases": (20.0, 0.0),
    }  # fmt: skip


def test_an_encoder_is_copied_from_a_bitrans_model():
    bitrans = tiny_model()
    model = DeepLabForSemanticSegmentation.from_bitrans(bitrans, preset="deeplab-v1")
    assert model.config.id2label == {0: "background", 1: "cat", 2: "dog", 3: "horse"}
    for name, value in model.backbone.encoder.state_dict().items():
        assert torch.equal(value, bitrans.state_dict()[name]), name
    assert DeepLabForSemanticSegmentation.from_bitrans(bitrans, num_labels=6).config.num_labels == 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"preset": "deeplab-v9"}, "preset must be one of mctformer, deeplab-v1, got 'deeplab-v9'"),
        ({"id2label": {0: "cat"}}, "background and the object classes, 2 to 255 labels, got 1"),
        ({"num_labels": 300}, "2 to 255 labels, got 300"),
        ({"id2label": {0: "cat", 1: "background"}}, "background must be label 0, got label 1"),
        ({"out_indices": [1, 2]}, r"out_indices must be one feature map, got \[1, 2\]"),
        ({"num_frozen_stages": -3}, "num_frozen_stages must be -1"),
        ({"head_dilation": 0}, "head_dilation must be at least 1 cell"),
        ({"backbone": ""}, "backbone must be resnet38, bitrans or a timm network"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(options: dict[str, Any], words: str):
    with pytest.raises(Exception, match=words):
        DeepLabConfig(**options)


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (pixels(3, 32, 32), None, r"pixel_values must be \(B, 3, H, W\), got \(3, 32, 32\)"),
        (pixels(1, 3, 32, 32), torch.zeros(1, 4, 4), r"labels must be \(1, 32, 32\), one for each pixel, got \(1, 4"),
        (pixels(1, 3, 8, 8), torch.full((1, 8, 8), 4), "labels hold id 4 in 64 pixels, expected 0 to 3 or 255"),
        (pixels(1, 3, 8, 8), torch.full((1, 8, 8), -1), "labels hold id -1 in 64 pixels"),
    ],
)
def test_inputs_that_do_not_fit_are_told(images: torch.Tensor, labels: torch.Tensor | None, words: str):
    with pytest.raises(ValueError, match=words):
        make(**NARROW)(images, labels=labels)


# ---- The Hub.


def test_the_stock_pipeline_cuts_a_picture_into_labels(tmp_path: Path):
    make(backbone="bitrans", backbone_config=BITRANS["backbone_config"], id2label={0: "background", 1: "cat", 2: "dog"}
         ).save_pretrained(tmp_path)  # fmt: skip
    BiTransImageProcessor(size={"height": 32, "width": 48}).save_pretrained(tmp_path)
    segment = pipeline("image-segmentation", model=str(tmp_path))
    results = segment(picture(45, 61))
    assert {result["label"] for result in results} <= {"background", "cat", "dog"}
    masks = np.stack([np.asarray(result["mask"]) for result in results])
    assert masks.shape[1:] == (45, 61)
    assert ((masks == 255).sum(0) == 1).all()  # every pixel has one label


REMOTE = """
import sys
sys.modules["bitrans_hf"] = None
sys.modules["timm"] = None
import torch
from transformers import AutoModel, AutoModelForSemanticSegmentation, pipeline
from PIL import Image
folder = sys.argv[1]
for auto, name in ((AutoModelForSemanticSegmentation, "deeplab"), (AutoModel, "affinitynet")):
    model = auto.from_pretrained(f"{folder}/{name}", trust_remote_code=True)
    with torch.no_grad():
        output = model(torch.load(f"{folder}/images.pt"))
    torch.save(output[0], f"{folder}/{name}.pt")
segment = pipeline("image-segmentation", model=f"{folder}/deeplab", trust_remote_code=True)
print(*(result["label"] for result in segment(Image.new("RGB", (50, 40)))))
"""


@pytest.mark.slow  # test_remote_code.py has a quicker one, with timm
def test_both_networks_work_by_remote_code_where_neither_this_package_nor_timm_is(tmp_path: Path):
    networks = {
        "deeplab": make(**NARROW),
        "affinitynet": AffinityNetModel(AffinityNetConfig(backbone_config=NARROW["backbone_config"])).eval(),
    }
    images = pixels(1, 3, 40, 50)
    torch.save(images, tmp_path / "images.pt")
    autos = {"deeplab": "AutoModelForSemanticSegmentation", "affinitynet": "AutoModel"}
    for name, network in networks.items():
        kind, config_kind = type(network), type(network.config)
        try:
            kind.register_for_auto_class(autos[name])
            config_kind.register_for_auto_class()
            network.save_pretrained(tmp_path / name)
        finally:
            kind._auto_class = config_kind._auto_class = None
    (tmp_path / "deeplab" / "preprocessor_config.json").write_text(
        '{"image_processor_type": "SegformerImageProcessor", "size": {"height": 40, "width": 48}}'
    )
    result = subprocess.run(
        [sys.executable, "-c", REMOTE, str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert set() < set(result.stdout.split()) <= {"background", "LABEL_1", "LABEL_2", "LABEL_3"}
    with torch.no_grad():
        for name, network in networks.items():
            assert torch.equal(torch.load(tmp_path / f"{name}.pt"), network(images)[0])
