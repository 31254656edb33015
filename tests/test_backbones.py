from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from tiny_models import pixels, tiny_config, tiny_model
from torch import nn

from bitrans_hf.hub.backbones import (
    BiTransBackbone,
    apply_freezing,
    bitrans_options,
    build_backbone,
    chosen_maps,
    parameter_groups,
)

TINY_SWIN = {"embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 2, "img_size": 64}


def bitrans_backbone(out_indices: Any = (1, 2), output_stride: int | None = None, **overrides: Any) -> BiTransBackbone:
    model = tiny_model(**overrides)
    backbone = build_backbone(
        "bitrans", bitrans_options(model), out_indices=out_indices, output_stride=output_stride
    ).eval()
    assert isinstance(backbone, BiTransBackbone)
    weights = model.state_dict()
    backbone.encoder.load_state_dict({name: weights[name] for name in backbone.encoder.state_dict()})
    return backbone


# ---- Which maps.


@pytest.mark.parametrize(
    ("out_indices", "strides", "expected"),
    [
        (1, (4, 8, 16), (2,)),
        (3, (2, 4, 8, 8, 8), (2, 3, 4)),
        (9, (4, 8, 16), (0, 1, 2)),
        (1, (16,) * 12, (11,)),
        (3, (16,) * 12, (3, 7, 11)),
        (5, (16,) * 3, (0, 1, 2)),
        ((-3, -1), (16,) * 12, (9, 11)),
        ((0, 2), (4, 8, 16), (0, 2)),
    ],
)
def test_the_last_maps_of_a_pyramid_and_evenly_spread_layers_of_a_transformer_are_read(
    out_indices: Any, strides: tuple[int, ...], expected: tuple[int, ...]
):
    assert chosen_maps(out_indices, strides) == expected


@pytest.mark.parametrize("out_indices", [(3,), (1, 0), (1, 1), (), (-4,)])
def test_maps_that_do_not_exist_are_refused(out_indices: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"out_indices must rise and lie in \[0, 3\).*3 feature maps, got"):
        chosen_maps(out_indices, (4, 8, 16))


# ---- Networks.


@pytest.mark.parametrize(
    ("name", "options", "output_stride", "strides"),
    [
        ("resnet38", {"width_multiplier": 1 / 32}, None, (2, 4, 8, 8, 8)),
        ("test_resnet", {}, None, (2, 4, 8, 16, 32)),
        ("test_resnet", {}, 8, (2, 4, 8, 8, 8)),
        ("test_convnext", {}, 16, (4, 8, 16, 16)),
        ("test_vit", {}, None, (16, 16, 16, 16, 16)),
        ("swin_tiny_patch4_window7_224", TINY_SWIN, None, (4, 8, 16, 32)),
        ("bitrans", None, None, (8, 8, 8)),
        ("bitrans", None, 4, (4, 4, 4)),
    ],
)
def test_every_map_has_the_channels_and_the_stride_that_are_told(
    name: str, options: dict[str, Any] | None, output_stride: int | None, strides: tuple[int, ...]
):
    options = bitrans_options(tiny_model()) if options is None else options
    backbone = build_backbone(name, options, out_indices=5, output_stride=output_stride).eval()
    assert backbone.strides == strides
    side = 2 * max(strides)
    with torch.no_grad():
        maps = backbone(pixels(2, 3, side, 2 * side))
    assert [tuple(feature_map.shape) for feature_map in maps] == [
        (2, channels, side // stride, 2 * side // stride)
        for channels, stride in zip(backbone.channels, strides, strict=True)
    ]


def test_channels_last_stay_last_in_convolutional_networks():
    for name, options in (("resnet38", {"width_multiplier": 1 / 16}), ("test_resnet", {})):
        backbone = build_backbone(name, options, out_indices=2, output_stride=None).eval()
        images = pixels(2, 3, 64, 64)
        with torch.no_grad():
            plain = backbone(images)
            last = backbone.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
        for ours, theirs in zip(last, plain, strict=True):
            assert ours.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_a_timm_network_gives_timms_own_maps(name: str):
    backbone = build_backbone(name, {}, out_indices=2, output_stride=8).eval()
    theirs = timm.create_model(
        name, pretrained=False, features_only=True, out_indices=backbone.out_indices, output_stride=8
    ).eval()
    theirs.load_state_dict(backbone.network._backbone.state_dict())
    images = pixels(1, 3, 64, 96)
    with torch.no_grad():
        assert all(map(torch.equal, backbone(images), theirs(images)))


def test_a_plain_transformers_maps_are_its_normalized_tokens_at_any_size():
    backbone = build_backbone("test_vit", {}, out_indices=(1, 4), output_stride=None).eval()
    inner = backbone.network._backbone.model
    images = pixels(1, 3, 48, 80)
    with torch.no_grad():
        maps = backbone(images)
        expected = inner.forward_intermediates(images, indices=[1, 4], norm=False, intermediates_only=True)
    for ours, theirs in zip(maps, expected, strict=True):
        assert ours.shape == (1, 64, 3, 5)
        torch.testing.assert_close(ours, (theirs - theirs.mean(1)) / (theirs.var(1, unbiased=False) + 1e-5).sqrt())


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_the_maps_of_a_bitrans_encoder_are_its_normalized_patch_tokens(size: tuple[int, int]):
    images = pixels(2, 3, *size)
    with torch.no_grad():
        maps = bitrans_backbone((0, 2))(images)
        states = tiny_model()(images, output_hidden_states=True).hidden_states
    for ours, state in zip(maps, (states[1], states[3]), strict=True):
        tokens = F.layer_norm(state[:, 3:], (24,))
        torch.testing.assert_close(ours, tokens.transpose(1, 2).unflatten(2, (size[0] // 8, size[1] // 8)))


def test_layers_that_no_map_needs_are_left_out():
    backbone = bitrans_backbone((0, 1))
    assert len(backbone.encoder.layers) == 2
    assert not any("seg_head" in name for name, _ in backbone.named_parameters())


def test_overlapping_patches_are_centered_on_their_cells():
    # One layer whose branches are cut off: its token is the patch's embedding plus the position.
    backbone = bitrans_backbone((0,), output_stride=4)
    layer = backbone.encoder.layers[0]
    for projection in (layer.attention.proj, layer.mlp.fc2):
        nn.init.zeros_(projection.weight)
        nn.init.zeros_(projection.bias)
    image = pixels(1, 3, 24, 32)
    with torch.no_grad():
        found = backbone(image)[0]
        position = backbone.encoder.position_embedding(6 * 8, 8 * 8)[0, 3:].reshape(6, 8, 24)
        for row, column in [(0, 0), (2, 3), (5, 7), (4, 0)]:
            patch = torch.zeros(3, 8, 8)  # its center is the cell's
            for y in range(8):
                for x in range(8):
                    inside = (row * 4 + 2 + y - 4, column * 4 + 2 + x - 4)
                    if 0 <= inside[0] < 24 and 0 <= inside[1] < 32:
                        patch[:, y, x] = image[0, :, inside[0], inside[1]]
            weight, bias = backbone.encoder.patch_embed.weight, backbone.encoder.patch_embed.bias
            token = (weight * patch).sum((1, 2, 3)) + bias + position[row, column]
            torch.testing.assert_close(found[0, :, row, column], F.layer_norm(token, (24,)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "output_stride", "words"),
    [
        ("no_such_net", {}, None, "backbone must be resnet38, bitrans or a timm network, got 'no_such_net'"),
        ("resnet38", {"depth": 3}, None, "backbone_config of resnet38 takes width_multiplier only, got depth"),
        ("resnet38", {}, 16, "output stride of resnet38 is 8, got 16"),
        ("bitrans", {}, None, "backbone 'bitrans' needs backbone_config"),
        ("bitrans", tiny_config().to_diff_dict(), 3, "must divide its patch size 8, got 3"),
        ("bitrans", tiny_config().to_diff_dict(), 16, "must divide its patch size 8, got 16"),
        ("test_vit", {}, 8, "backbone 'test_vit' cannot have output_stride 8"),
        ("vgg11", {}, 8, "backbone 'vgg11' cannot have output_stride 8"),
    ],
)
def test_a_backbone_that_cannot_be_is_told(name: str, options: dict[str, Any], output_stride: int | None, words: str):
    with pytest.raises(ValueError, match=words):
        build_backbone(name, options, out_indices=1, output_stride=output_stride)


def test_an_unknown_option_of_a_timm_network_is_timms_own_error():
    with pytest.raises(TypeError, match="no_such_option"):
        build_backbone("test_resnet", {"no_such_option": 1}, out_indices=1, output_stride=None)


# ---- Training.

STAGES = {
    "resnet38": {"network.conv1a.weight": 0, "network.b2_2.conv_branch2a.weight": 1, "network.bn7.bias": 6},
    "test_resnet": {"network._backbone.conv1.0.weight": 0, "network._backbone.layer1.0.conv1.weight": 1},
    "test_convnext": {
        "network._backbone.stem_0.weight": 0,
        "network._backbone.stages_0.blocks.0.conv_dw.weight": 0,
        "network._backbone.stages_1.downsample.0.weight": 1,
    },
    "test_vit": {
        "network._backbone.model.pos_embed": 0,
        "network._backbone.model.patch_embed.proj.weight": 0,
        "network._backbone.model.blocks.0.attn.qkv.weight": 0,
        "network._backbone.model.blocks.1.attn.qkv.weight": 1,
    },
    "bitrans": {"encoder.class_tokens": 0, "encoder.patch_embed.bias": 0, "encoder.layers.2.norm1.weight": 3},
}


@pytest.mark.parametrize("name", STAGES)
def test_every_parameter_has_its_stage(name: str):
    options = {"bitrans": bitrans_options(tiny_model()), "resnet38": {"width_multiplier": 1 / 32}}.get(name, {})
    backbone = build_backbone(name, options, out_indices=1, output_stride=None)
    stages = backbone.stage_of_parameters()
    assert stages.keys() == {name for name, _ in backbone.named_parameters()}
    assert {name: stages[name] for name in STAGES[name]} == STAGES[name]
    assert max(stages.values()) >= 3


@pytest.mark.parametrize(
    ("num_frozen_stages", "freeze_batch_norm", "trained"),
    [(0, False, 117), (0, True, 43), (2, True, 35), (-1, True, 0)],
)
def test_frozen_stages_and_frozen_norms_are_not_trained(num_frozen_stages: int, freeze_batch_norm: bool, trained: int):
    # 43 convolutions, 8 of them up to b2_2, and 37 norms of two tensors.
    backbone = build_backbone("resnet38", {"width_multiplier": 1 / 32}, out_indices=1, output_stride=None).train()
    apply_freezing(backbone, num_frozen_stages, freeze_batch_norm)
    assert sum(parameter.requires_grad for parameter in backbone.parameters()) == trained
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(module.training != freeze_batch_norm for module in norms)


def test_the_norms_of_a_frozen_stage_keep_their_statistics_too():
    backbone = build_backbone("test_resnet", {}, out_indices=1, output_stride=None).train()
    apply_freezing(backbone, 2, freeze_batch_norm=False)
    stages = backbone.stage_of_parameters()
    norms = {name: module for name, module in backbone.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert {name: not module.training for name, module in norms.items()} == {
        name: stages[f"{name}.weight"] < 2 for name in norms
    }
    assert any(module.training for module in norms.values())


def test_parameters_are_grouped_by_part_and_kind():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
            self.backbone.register_parameter("class_tokens", nn.Parameter(torch.zeros(1, 2, 4)))
            self.head = nn.Conv2d(4, 2, 1)

    net = Net()
    net.backbone[1].bias.requires_grad_(False)
    groups = parameter_groups(net, {"backbone": 1.0, "head": 10.0}, bias_rate=2.0, weight_decay=0.1)
    found = {group.pop("name"): group for group in groups}
    assert {name: (group["rate_multiplier"], group["weight_decay"]) for name, group in found.items()} == {
        "backbone weights": (1.0, 0.1), "backbone biases": (2.0, 0.0), "backbone scales": (1.0, 0.0),
        "head weights": (10.0, 0.1), "head biases": (20.0, 0.0),
    }  # fmt: skip
    assert [tuple(parameter.shape) for parameter in found["backbone scales"]["params"]] == [(1, 2, 4), (4,)]
    assert found["backbone biases"]["params"][0] is net.backbone[0].bias
    assert len(found["backbone biases"]["params"]) == 1
