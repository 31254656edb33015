from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import reference_resnet38 as reference
import torch
import torch.nn.functional as F
from hub_contract import HubModelContract
from tiny_models import pixels, tiny_model
from transformers import AutoConfig, AutoModel

from bitrans_hf import AffinityNetConfig, AffinityNetModel, BiTransModel
from bitrans_hf.hub.affinity_pairs import affinity_labels, half_disc_offsets
from bitrans_hf.hub.backbones import bitrans_options
from bitrans_hf.hub.configuration_affinitynet import RELATIONS
from bitrans_hf.hub.irn import boundary_to_matrices, boundary_to_pair_affinity

NARROW = {"backbone_config": {"width_multiplier": 1 / 32}}
BITRANS = {"backbone": "bitrans", "backbone_config": bitrans_options(tiny_model())}
VARIANTS: dict[str, dict[str, Any]] = {
    "psa resnet38": NARROW,
    "psa timm": {"backbone": "test_resnet", "freeze_batch_norm": False},
    "psa timm dilated": {"backbone": "test_convnext", "output_stride": 8, "num_frozen_stages": 1},
    "psa bitrans": {**BITRANS, "output_stride": 4, "num_frozen_stages": 1},
    "irn resnet38": {**NARROW, "relation": "irn"},
    "irn timm": {"backbone": "test_resnet", "relation": "irn"},
    "irn bitrans": {**BITRANS, "relation": "irn", "radius": 4},
}


def make(seed: int = 0, **options: Any) -> AffinityNetModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AffinityNetModel(AffinityNetConfig(**options)).eval()


def label_map(h: int, w: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 3, (2, h, w), generator=torch.Generator().manual_seed(seed))


class TestAffinityNet(HubModelContract):
    auto = AutoModel
    outputs = ("pair_affinity", "features", "boundary")

    @pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
    def variant(self, request: pytest.FixtureRequest) -> dict[str, Any]:
        return request.param

    def make(self, **options: Any) -> AffinityNetModel:
        return make(**options)

    def labels(self, model: AffinityNetModel, images: torch.Tensor) -> torch.Tensor:
        return label_map(*model.grid_size(*images.shape[2:]))


# ---- PSA.


def test_the_published_network_has_its_number_of_parameters():
    with torch.device("meta"):
        model = AffinityNetModel(AffinityNetConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 106_484_032
    head = {name: tuple(value.shape) for name, value in model.feature_head.state_dict().items()}
    assert head == reference.affinity_shapes(width=1)
    frozen = {name.split(".")[2] for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {"conv1a", "b2", "b2_1", "b2_2"} <= frozen
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any("bn" in name or ".b2" in name for name in trained)
    assert len(trained) == 35 + 4


@pytest.mark.parametrize("size", [(112, 128), (100, 93)])
def test_features_are_those_of_a_plain_transcription_of_psa(size: tuple[int, int]):
    state = reference.state(more=reference.affinity_shapes())
    model = make(**NARROW)
    renamed = {
        ("feature_head." if name.startswith("f") else "backbone.network.") + name: value
        for name, value in state.items()
    }
    assert not model.load_state_dict(renamed, strict=False).unexpected_keys
    images = pixels(2, 3, *size)
    padded = torch.zeros(2, 3, -(-size[0] // 8) * 8, -(-size[1] // 8) * 8)  # PSA pads with zeros to whole cells
    padded[:, :, : size[0], : size[1]] = images
    with torch.no_grad():
        output, features = model(images), reference.affinity_features(state, padded)
    torch.testing.assert_close(output.features, features, atol=1e-5, rtol=1e-4)
    h, w = features.shape[2:]
    assert (h, w) == model.grid_size(*size) == (-(-size[0] // 8), -(-size[1] // 8))
    for index, (dy, dx) in enumerate(half_disc_offsets(5)):
        for cell, (y, x) in enumerate((y, x) for y in range(h - 4) for x in range(4, w - 4)):
            if (index * 7 + cell) % 23:  # a sample of the pairs
                continue
            distance = (features[1, :, y, x] - features[1, :, y + dy, x + dx]).abs().mean()
            assert output.pair_affinity[1, index, cell] == pytest.approx(math.exp(-distance), abs=2e-5)


def test_maps_of_several_strides_meet_on_the_finest():
    model = make(backbone="test_resnet")
    assert model.config.out_indices == [2, 3, 4]
    assert model.config.stride == 8
    images = pixels(1, 3, 64, 96)
    with torch.no_grad():
        maps = model.backbone(images)
        parts = []
        for feature_map, layer in zip(maps, ("f8_3", "f8_4", "f8_5"), strict=True):
            part = F.elu(F.conv2d(feature_map, getattr(model.feature_head, layer).weight))
            parts.append(F.interpolate(part, size=(8, 12), mode="bilinear", align_corners=False))
        expected = F.elu(F.conv2d(torch.cat(parts, 1), model.feature_head.f9.weight))
        torch.testing.assert_close(model(images).features, expected)


@pytest.mark.parametrize("variant", ["psa timm dilated", "psa bitrans", "irn timm", "irn resnet38"])
def test_an_image_and_the_same_with_zeros_around_have_the_same_affinities(variant: str):
    model = make(**VARIANTS[variant])
    multiple = max(model.stride, model.backbone.size_multiple)
    h, w = 3 * multiple, 4 * multiple
    image = pixels(1, 3, h - 3, w - multiple - 1)
    padded = torch.zeros(1, 3, h, w - multiple)
    padded[:, :, : h - 3, : w - multiple - 1] = image
    assert model.grid_size(*image.shape[2:]) == model.grid_size(*padded.shape[2:])
    with torch.no_grad():
        assert torch.equal(model(image).pair_affinity, model(padded).pair_affinity)
        assert torch.equal(model.affinity(image)[0].to_dense(), model.affinity(padded)[0].to_dense())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [(64, 64), (37, 90), (8, 8), (1, 40)])
def test_every_image_gives_a_symmetric_matrix_over_all_its_cells(variant: str, size: tuple[int, int]):
    model = make(**VARIANTS[variant])
    h, w = model.grid_size(*size)
    assert (h, w) == (-(-size[0] // model.config.stride), -(-size[1] // model.config.stride))
    matrices, boundary = model.affinity_and_boundary(pixels(2, 3, *size))
    assert len(matrices) == 2
    for matrix in matrices:
        assert matrix.is_sparse
        assert not matrix.requires_grad
        dense = matrix.to_dense()
        assert dense.shape == (h * w, h * w)
        assert dense.dtype == torch.float32
        assert torch.equal(dense, dense.T)
        assert torch.equal(dense.diagonal(), torch.ones(h * w))
        assert 0 <= dense.min() <= dense.max() <= 1
    assert boundary is None if model.config.relation == "psa" else boundary.shape == (2, h, w)


def test_without_a_certain_cell_there_is_no_loss_to_follow():
    model = make(**NARROW).train()
    output = model(pixels(2, 3, 96, 96), labels=torch.full((2, 12, 12), 255))
    assert output.loss.item() == 0
    output.loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("relation", ["psa", "irn"])
def test_training_tells_two_halves_apart(relation: str):
    model = make(backbone="test_resnet", relation=relation, num_frozen_stages=0, freeze_batch_norm=False, radius=4)
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 0.1
    images[:, :, :, 48:] += 1.0
    h, w = model.grid_size(64, 96)
    labels = torch.zeros(2, h, w, dtype=torch.long)
    labels[:, :, w // 2 :] = 3
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    losses = []
    for _ in range(20):
        loss = model(images, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    pairs, masks = model(images).pair_affinity.detach(), affinity_labels(labels, 4)
    assert pairs[masks.foreground | masks.background].mean() > pairs[masks.negative].mean() + 0.2


# ---- IRN.


def slow_affinity(boundary: torch.Tensor, a: tuple[int, int], b: tuple[int, int]) -> float:
    """1 - the strongest boundary among the cells of the rectangle a-b whose distance to the line is below 1."""
    strongest = 0.0
    length = math.dist(a, b)
    for y in range(min(a[0], b[0]), max(a[0], b[0]) + 1):
        for x in range(min(a[1], b[1]), max(a[1], b[1]) + 1):
            distance = abs((b[0] - a[0]) * (x - a[1]) - (b[1] - a[1]) * (y - a[0])) / length
            if distance < 1 - 1e-9:
                strongest = max(strongest, float(boundary[y, x]))
    return 1 - strongest


def test_pair_affinities_are_what_no_boundary_on_the_way_hides():
    boundary = torch.rand(2, 9, 13, generator=torch.Generator().manual_seed(0))
    pairs = boundary_to_pair_affinity(boundary, 4)
    offsets = half_disc_offsets(4)
    assert pairs.shape == (2, len(offsets), 6 * 7)
    for index, (dy, dx) in enumerate(offsets):
        for cell, (y, x) in enumerate((y, x) for y in range(6) for x in range(3, 10)):
            expected = slow_affinity(boundary[1], (y, x), (y + dy, x + dx))
            assert pairs[1, index, cell] == pytest.approx(expected, abs=1e-6)


def test_the_matrix_of_the_walk_relates_all_close_cells_of_the_image():
    boundary = torch.rand(1, 9, 11, generator=torch.Generator().manual_seed(0))
    dense = boundary_to_matrices(boundary, 3)[0].to_dense()
    for i in range(99):
        for j in range(i % 3, 99, 3):
            a, b = divmod(i, 11), divmod(j, 11)
            close = 0 < math.dist(a, b) < 3
            expected = slow_affinity(boundary[0], a, b) if close else float(i == j)
            assert dense[i, j] == pytest.approx(expected, abs=1e-6)


def test_nothing_passes_a_closed_boundary():
    boundary = torch.zeros(1, 12, 12)
    boundary[:, :, 6] = 1.0
    dense = boundary_to_matrices(boundary, 5)[0].to_dense().reshape(12, 12, 12, 12)
    assert (dense[:, :6, :, 6:] == 0).all()
    assert (dense[0, 0, :3, :3] == 1).all()


def test_the_boundary_of_a_flipped_image_is_the_flipped_boundary():
    model = make(**VARIANTS["irn timm"])
    image = pixels(1, 3, 64, 96)
    boundary, flipped = (model.affinity_and_boundary(view)[1] for view in (image, image.flip(-1)))
    torch.testing.assert_close(flipped, boundary.flip(-1), atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        assert not torch.allclose(model(image).boundary, model(image.flip(-1)).boundary.flip(-1), atol=1e-3)


def public_irn(model: AffinityNetModel, images: torch.Tensor) -> torch.Tensor:
    """The edge branch as IRN's code lists its layers, on the maps of the model's backbone."""

    def unit(x: torch.Tensor, layer: torch.nn.Sequential, groups: int, scale: int = 1) -> torch.Tensor:
        conv, norm = layer
        x = F.group_norm(F.conv2d(x, conv.weight), groups, norm.weight, norm.bias)
        if scale > 1:
            x = F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
        return F.relu(x)

    x1, x2, x3, x4, x5 = model.backbone(images)
    x1 = F.max_pool2d(x1, 3, 2, 1)
    edges = model.boundary_head.levels
    edge = torch.cat([unit(x, edges[i], 4, scale) for i, (x, scale) in
                      enumerate([(x1, 1), (x2, 1), (x3, 2), (x4, 4), (x5, 4)])], dim=1)  # fmt: skip
    return F.conv2d(edge, model.boundary_head.output.weight, model.boundary_head.output.bias)


def test_the_boundary_is_that_of_a_plain_transcription_of_irn():
    model = make(backbone="test_resnet", relation="irn", output_stride=16)
    assert model.backbone.strides == (2, 4, 8, 16, 16)
    images = pixels(2, 3, 64, 96)
    with torch.no_grad():
        output = model(images)
        edge = public_irn(model, images)
    torch.testing.assert_close(output.boundary, edge, atol=1e-5, rtol=1e-4)
    expected = boundary_to_pair_affinity(edge[:, 0].sigmoid(), 10)
    torch.testing.assert_close(output.pair_affinity, expected)


def test_the_losses_of_irn_are_weighted_as_published():
    model = make(**VARIANTS["irn bitrans"])
    labels = label_map(12, 12)
    output = model(pixels(2, 3, 96, 96), labels=labels)
    terms = output.losses
    expected = terms["background"] / 4 + terms["foreground"] / 4 + terms["negative"] / 2
    torch.testing.assert_close(output.loss, expected)


# ---- Training and configuration.


def test_learning_rates_are_the_published_multiples():
    psa = {group["name"]: group for group in make(**NARROW).parameter_groups()}
    assert {name: (group["rate_multiplier"], group["weight_decay"]) for name, group in psa.items()} == {
        "backbone weights": (1.0, 5e-4), "feature_head weights": (10.0, 5e-4),
    }  # fmt: skip
    irn = make(**VARIANTS["irn timm"]).parameter_groups(weight_decay=1e-4)
    assert {group["name"]: (group["rate_multiplier"], group["weight_decay"]) for group in irn} == {
        "boundary_head weights": (1.0, 1e-4), "boundary_head scales": (1.0, 0.0), "boundary_head biases": (1.0, 0.0),
    }  # fmt: skip
    bitrans = {group["name"]: group for group in make(**BITRANS).parameter_groups()}
    assert (bitrans["backbone biases"]["rate_multiplier"], bitrans["backbone biases"]["weight_decay"]) == (2.0, 0.0)
    assert bitrans["backbone scales"]["weight_decay"] == 0.0


def test_new_layers_start_as_psas():
    model = make(**NARROW)
    head = model.feature_head
    for name in ("f8_3", "f8_4", "f8_5"):
        weight = getattr(head, name).weight
        assert weight.std().item() == pytest.approx((2 / weight.shape[1]) ** 0.5, rel=0.1)
    assert head.f9.weight.abs().max().item() == pytest.approx(4 * (6 / 896) ** 0.5, rel=0.01)


def test_an_encoder_is_copied_from_a_bitrans_model(tmp_path: Path):
    tiny_model().save_pretrained(tmp_path)
    bitrans = BiTransModel.from_pretrained(tmp_path)
    model = AffinityNetModel.from_bitrans(bitrans, radius=3).eval()
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "horse"}
    assert (model.config.backbone, model.config.radius, model.config.stride) == ("bitrans", 3, 8)
    weights = bitrans.state_dict()
    for name, value in model.backbone.encoder.state_dict().items():
        assert torch.equal(value, weights[name]), name
    with torch.no_grad():
        model.backbone.encoder.class_tokens.add_(1.0)
    assert torch.equal(bitrans.class_tokens, weights["class_tokens"])
    assert not torch.equal(model.backbone.encoder.class_tokens, bitrans.class_tokens)


def test_the_class_names_of_an_encoder_may_be_replaced():
    config = AffinityNetModel.from_bitrans(tiny_model(), id2label={0: "moth"}).config
    assert (config.id2label, config.label2id) == ({0: "moth"}, {"moth": 0})


def test_relations_bring_their_published_settings():
    psa, irn = AffinityNetConfig(), AffinityNetConfig(relation="irn", backbone="resnet50")
    assert (psa.radius, psa.walk_radius, psa.num_frozen_stages) == (5, 5, 2)
    assert (irn.radius, irn.walk_radius, irn.num_frozen_stages) == (10, 5, -1)
    assert AffinityNetConfig(backbone="resnet50").num_frozen_stages == 0
    assert AffinityNetConfig(radius=7).radius == 7
    assert (RELATIONS["psa"].beta, RELATIONS["psa"].num_doublings) == (8.0, 6)
    assert (RELATIONS["irn"].beta, RELATIONS["irn"].num_doublings) == (10.0, 8)


def test_the_config_is_known_to_the_auto_classes(tmp_path: Path):
    AffinityNetConfig(relation="irn", radius=6, id2label={0: "cat"}).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is AffinityNetConfig
    assert (config.relation, config.radius, config.id2label, config.label2id) == ("irn", 6, {0: "cat"}, {"cat": 0})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"relation": "crf"}, "relation must be one of psa, irn, got 'crf'"),
        ({"radius": 1}, "radius must be at least 2 cells, got 1"),
        ({"walk_radius": 0}, "walk_radius must be at least 2 cells, got 0"),
        ({"backbone": ""}, "backbone must be resnet38, bitrans or a timm network"),
        ({"num_frozen_stages": -2}, "num_frozen_stages must be -1"),
        ({"radius": 2.5}, "radius"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(options: dict[str, Any], words: str):
    with pytest.raises(Exception, match=words):
        AffinityNetConfig(**options)


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (pixels(3, 96, 96), None, r"pixel_values must be \(B, 3, H, W\), got \(3, 96, 96\)"),
        (pixels(1, 4, 96, 96), None, r"pixel_values must be \(B, 3, H, W\), got \(1, 4, 96, 96\)"),
        (pixels(1, 3, 96, 90), torch.zeros(1, 96, 90), r"labels must be \(1, 12, 12\).*8 x 8 pixels.*\(1, 96, 90\)"),
        (pixels(2, 3, 96, 96), torch.zeros(1, 12, 12), r"labels must be \(2, 12, 12\)"),
    ],
)
def test_inputs_that_do_not_fit_are_told(images: torch.Tensor, labels: torch.Tensor | None, words: str):
    with pytest.raises(ValueError, match=words):
        make(**NARROW)(images, labels=labels)
