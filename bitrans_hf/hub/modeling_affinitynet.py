"""AffinityNet: a network that tells which neighboring cells of an image belong to the same object.

Two relations behind one interface: PSA compares the features of two cells (Ahn & Kwak, CVPR 2018, arXiv:1803.10464);
IRN asks whether a class boundary lies between them (Ahn, Cho & Kwak, CVPR 2019, arXiv:1904.05044). Either gives the
affinities that `random_walk.propagate` spreads class scores along. B images, a grid of h x w = N cells, P offsets and
M from-cells as in `affinity_pairs`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .affinity_pairs import (
    AffinityLabels,
    affinity_labels,
    affinity_loss,
    affinity_matrix,
    fitting_radius,
    half_disc_offsets,
    pair_affinity,
)
from .backbones import (
    apply_freezing,
    bitrans_options,
    build_backbone,
    copy_encoder,
    init_bias,
    init_convolutional,
    parameter_groups,
    resized,
)
from .configuration_affinitynet import RELATIONS, AffinityNetConfig
from .errors import InputError
from .modeling_bitrans import BiTransModel

if TYPE_CHECKING:
    # What the imports above import: transformers before 5.23 copies only the files that this text names.
    from .configuration_bitrans import BiTransConfig as BiTransConfig
    from .encoder import ClassTokenEncoder as ClassTokenEncoder
    from .labels import IGNORE_INDEX as IGNORE_INDEX
    from .losses import classification_loss as classification_loss
    from .maps import fuse as fuse
    from .resnet38 import ResNet38 as ResNet38
    from .views import VIEWS as VIEWS

BOUNDARY_STRIDE = 4
"""Pixels per cell of IRN's grid, if the backbone has a map that fine."""

LEARNING_RATES: dict[str, tuple[dict[str, float], float]] = {
    "psa": ({"backbone": 1.0, "feature_head": 10.0}, 2.0),
    "irn": ({"backbone": 1.0, "boundary_head": 1.0, "displacement_head": 10.0}, 1.0),
}
"""By relation: multiples of the learning rate of each part, and how many times its part's rate a bias gets."""


@dataclass
class AffinityNetOutput(ModelOutput):
    """What `AffinityNetModel` returns. B images, h x w cells, P offsets, M from-cells.

    Attributes:
        loss: Scalar total loss; only with labels.
        losses: Scalar terms before weighting: "background", "foreground" and "negative" pairs, and with a displacement
            field "displacement_foreground" and "displacement_background"; only with labels.
        pair_affinity: (B, P, M) in [0, 1], as `affinity_pairs.pair_affinity` orders pairs of the training radius.
        features: (B, D, h, w) that psa compares; None for irn.
        boundary: (B, 1, h, w) logits of a class boundary; None for psa.
        displacement: (B, 2, h, w) steps (dy, dx) in cells to the object's center; only with a displacement field.
    """

    # ModelOutput wants None as the default, also of what is always set.
    loss: torch.Tensor | None = None
    losses: dict[str, torch.Tensor] | None = None
    pair_affinity: torch.Tensor = None  # type: ignore[assignment]
    features: torch.Tensor | None = None
    boundary: torch.Tensor | None = None
    displacement: torch.Tensor | None = None


class FeatureHead(nn.Module):
    """PSA's head: 1x1 convolutions of every feature map, and one of all together, on the grid of the finest map.

    Names follow PSA, where three maps make f8_3, f8_4 and f8_5, with 64, 128 and 256 channels.
    """

    def __init__(self, channels: Sequence[int]):
        super().__init__()
        widths = [64 * 2**level for level in range(len(channels))]
        self.level_names = [f"f8_{3 + level}" for level in range(len(channels))]
        for name, depth, width in zip(self.level_names, channels, widths, strict=True):
            self.add_module(name, nn.Conv2d(depth, width, 1, bias=False))
        self.f9 = nn.Conv2d(sum(widths), sum(widths), 1, bias=False)

    def forward(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Map features (B, D_i, h_i, w_i), the finest first, to (B, 64 + 128 + ..., h, w) above -1."""
        grid = maps[0].shape[2:]
        levels = [
            resized(F.elu(self.get_submodule(name)(feature_map)), grid)
            for name, feature_map in zip(self.level_names, maps, strict=True)
        ]
        features: torch.Tensor = F.elu(self.f9(torch.cat(levels, dim=1)))
        return features


class BoundaryHead(nn.Module):
    """IRN's branch of class boundaries: each map to 32 channels, on one grid, to one logit per cell."""

    def __init__(self, channels: Sequence[int]):
        super().__init__()
        self.levels = nn.ModuleList(normalized_convolution(depth, 32, 4) for depth in channels)
        self.output = nn.Conv2d(32 * len(channels), 1, 1)

    def forward(self, maps: Sequence[torch.Tensor], grid: Sequence[int]) -> torch.Tensor:
        """Map features (B, D_i, h_i, w_i) to logits (B, 1, h, w)."""
        levels = [
            F.relu(resized(level(feature_map), grid)) for level, feature_map in zip(self.levels, maps, strict=True)
        ]
        logits: torch.Tensor = self.output(torch.cat(levels, dim=1))
        return logits


class DisplacementHead(nn.Module):
    """IRN's branch of displacements: maps coarser than the grid meet on the grid of the finest of them."""

    def __init__(self, channels: Sequence[int], strides: Sequence[int], stride: int):
        super().__init__()
        widths = [(64, 128)[level] if level < 2 else 256 for level in range(len(channels))]
        self.is_coarse = [map_stride > stride for map_stride in strides]
        self.levels = nn.ModuleList(
            normalized_convolution(depth, width, 8 if width == 64 else 16)
            for depth, width in zip(channels, widths, strict=True)
        )
        coarse = sum(width for width, is_coarse in zip(widths, self.is_coarse, strict=True) if is_coarse)
        fine = sum(widths) - coarse
        self.coarse = normalized_convolution(coarse, 256, 16) if coarse else None
        self.fine = normalized_convolution(fine + (256 if coarse else 0), 256, 16)
        self.output = nn.Conv2d(256, 2, 1, bias=False)
        self.mean_shift = MeanShift(2)

    def forward(self, maps: Sequence[torch.Tensor], grid: Sequence[int]) -> torch.Tensor:
        """Map features (B, D_i, h_i, w_i) to displacements (B, 2, h, w) in cells."""
        levels = [level(feature_map) for level, feature_map in zip(self.levels, maps, strict=True)]
        fine = [
            F.relu(resized(level, grid)) for level, coarse in zip(levels, self.is_coarse, strict=True) if not coarse
        ]
        if self.coarse is not None:
            coarse = [level for level, is_coarse in zip(levels, self.is_coarse, strict=True) if is_coarse]
            meeting = coarse[0].shape[2:]
            joined = self.coarse(torch.cat([F.relu(resized(level, meeting)) for level in coarse], dim=1))
            fine.append(F.relu(resized(joined, grid)))
        displacement: torch.Tensor = self.mean_shift(self.output(F.relu(self.fine(torch.cat(fine, dim=1)))))
        return displacement


class MeanShift(nn.Module):
    """Subtract, in evaluation, the mean displacement that was seen in training.

    Only differences of displacements are trained, so a constant is left over.
    """

    def __init__(self, channels: int, momentum: float = 0.1):
        super().__init__()
        self.momentum = momentum
        self.running_mean: torch.Tensor
        self.register_buffer("running_mean", torch.zeros(channels))

    def forward(self, displacement: torch.Tensor) -> torch.Tensor:
        if self.training:
            with torch.no_grad():
                self.running_mean.lerp_(displacement.float().mean(dim=(0, 2, 3)), self.momentum)
            return displacement
        return displacement - self.running_mean.to(displacement.dtype).view(1, -1, 1, 1)


def normalized_convolution(in_channels: int, out_channels: int, groups: int) -> nn.Sequential:
    """1x1 convolution and GroupNorm, IRN's unit; resizing comes before its ReLU."""
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.GroupNorm(groups, out_channels))


# ---- IRN's relation.


def path_cells(offset: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the cells (dy, dx) on the way from (0, 0) to `offset`, both included.

    These are the cells of the rectangle between them whose center is closer than 1 to the line (IRN's `PathIndex`).

    Example:
        >>> path_cells((2, 2))
        [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 1), (2, 2)]
    """
    dy, dx = offset
    ys, xs = range(min(0, dy), max(0, dy) + 1), range(min(0, dx), max(0, dx) + 1)
    return [(y, x) for y in ys for x in xs if (dy * x - dx * y) ** 2 < dy**2 + dx**2]


def boundary_to_pair_affinity(boundary: torch.Tensor, radius: int) -> torch.Tensor:
    """1 - the strongest boundary on the way between two cells (IRN's Eq. for a_ij).

    Args:
        boundary: (B, h, w) probabilities in [0, 1].
        radius: In cells.

    Returns:
        (B, P, M), pairs in the order of `affinity_pairs.pair_affinity`.
    """
    batch, h, w = boundary.shape
    reach = fitting_radius((h, w), radius) - 1

    def shifted(dy: int, dx: int) -> torch.Tensor:
        return boundary[:, dy : h - reach + dy, reach + dx : w - reach + dx]

    affinities = [
        # `max` over the stack, not pairwise: its backward pass keeps one index per pair instead of every step.
        1 - torch.stack([shifted(dy, dx) for dy, dx in path_cells(offset)]).max(dim=0).values.flatten(1)
        for offset in half_disc_offsets(reach + 1)
    ]
    return torch.stack(affinities, dim=1) if affinities else boundary.new_zeros(batch, 0, h * w)


def displacement_losses(displacement: torch.Tensor, labels: AffinityLabels, radius: int) -> dict[str, torch.Tensor]:
    """Displacements of two cells of one object differ by the step between them; those of background do not differ.

    Args:
        displacement: (B, 2, h, w), (dy, dx) in cells.
        labels: Masks (B, P, M) at `radius`.
        radius: In cells.

    Returns:
        Scalars "displacement_foreground" and "displacement_background": mean absolute errors in cells.
    """
    h, w = displacement.shape[2:]
    reach = fitting_radius((h, w), radius) - 1
    displacement = displacement.float()
    start = displacement[:, :, : h - reach, reach : w - reach]
    foreground, background = displacement.new_zeros(()), displacement.new_zeros(())
    for index, (dy, dx) in enumerate(half_disc_offsets(reach + 1)):
        partner = displacement[:, :, dy : h - reach + dy, reach + dx : w - reach + dx]
        difference = (start - partner).flatten(2)
        expected = displacement.new_tensor([dy, dx]).view(1, 2, 1)
        foreground = foreground + ((difference - expected).abs().sum(dim=1) * labels.foreground[:, index]).sum()
        background = background + (difference.abs().sum(dim=1) * labels.background[:, index]).sum()
    return {
        "displacement_foreground": foreground / (2 * labels.foreground.sum() + 1e-5),
        "displacement_background": background / (2 * labels.background.sum() + 1e-5),
    }


class AffinityNetModel(PreTrainedModel):
    """Affinities of neighboring cells from a backbone's feature maps.

    Args:
        config: Backbone and relation. `out_indices` and `stride` are filled in.

    Raises:
        ValueError: the backbone does not exist or cannot be built in this way.

    Example:
        >>> config = AffinityNetConfig(backbone_config={"width_multiplier": 1 / 32})
        >>> model = AffinityNetModel(config).eval()
        >>> model.grid_size(100, 133), model.config.stride
        ((13, 17), 8)
        >>> model(torch.zeros(1, 3, 100, 133)).pair_affinity.shape  # 34 offsets; 9 x 9 cells see all partners
        torch.Size([1, 34, 81])
        >>> model.affinity(torch.zeros(1, 3, 100, 133))[0].shape
        torch.Size([221, 221])
    """

    config_class = AffinityNetConfig
    base_model_prefix = "affinitynet"
    main_input_name = "pixel_values"
    _no_split_modules = ["ResidualBlock", "BottleneckBlock", "BiTransLayer"]  # noqa: RUF012 - transformers' attribute

    def __init__(self, config: AffinityNetConfig):
        super().__init__(config)
        chosen = RELATIONS[config.relation].num_maps if config.out_indices is None else config.out_indices
        self.backbone = build_backbone(
            config.backbone, config.backbone_config, out_indices=chosen, output_stride=config.output_stride
        )
        channels, strides = self.backbone.channels, self.backbone.strides
        self.stride = strides[0] if config.relation == "psa" else max(BOUNDARY_STRIDE, strides[0])
        config.out_indices, config.stride = list(self.backbone.out_indices), self.stride
        self.feature_head = FeatureHead(channels) if config.relation == "psa" else None
        self.boundary_head = BoundaryHead(channels) if config.relation == "irn" else None
        self.displacement_head = DisplacementHead(channels, strides, self.stride) if config.displacement else None
        self.post_init()
        self.train(self.training)

    @classmethod
    def from_bitrans(cls, bitrans: BiTransModel, **config: Any) -> "AffinityNetModel":
        """Build an AffinityNet on a copy of a trained Bi-Trans encoder; the head is new.

        Args:
            bitrans: Left as it is.
            **config: Fields of `AffinityNetConfig`; the class names are the encoder's unless given.
        """
        fields = {"id2label": bitrans.config.id2label, **config}
        model = cls(AffinityNetConfig(backbone="bitrans", backbone_config=bitrans_options(bitrans), **fields))
        copy_encoder(bitrans, model)
        return model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # By leaf, not by head: remote code is only asked for modules that hold weights themselves.
        if self._is_part(module, self.feature_head):
            if module is cast(FeatureHead, self.feature_head).f9:
                init.xavier_uniform_(module.weight, gain=4)
            else:
                init.kaiming_normal_(cast(nn.Conv2d, module).weight)
        elif self._is_part(module, self.boundary_head) or self._is_part(module, self.displacement_head):
            bound = cast(nn.Conv2d, module).in_channels ** -0.5  # torch's default, as IRN
            init.uniform_(cast(nn.Conv2d, module).weight, -bound, bound)
            init_bias(cast(nn.Conv2d, module))
        elif isinstance(module, MeanShift):
            init.zeros_(module.running_mean)
        else:
            init_convolutional(module)

    @staticmethod
    def _is_part(module: nn.Module, head: nn.Module | None) -> bool:
        """Tell whether a module is a convolution of this head."""
        return isinstance(module, nn.Conv2d) and head is not None and any(module is part for part in head.modules())

    def train(self, mode: bool = True) -> "AffinityNetModel":
        """Set the mode, leaving frozen parts of the backbone in evaluation."""
        super().train(mode)
        apply_freezing(self.backbone, cast(int, self.config.num_frozen_stages), self.config.freeze_batch_norm)
        return self

    def parameter_groups(self, weight_decay: float = 5e-4) -> list[dict[str, Any]]:
        """Return what is trained as optimizer groups, with the published multiples of the learning rate.

        PSA: the head at 10x the rate, biases at twice their part's, without decay. IRN: displacements at 10x.

        Args:
            weight_decay: PSA's 5e-4; IRN's is 1e-4.

        Returns:
            As `backbones.parameter_groups`.
        """
        rates, bias_rate = LEARNING_RATES[self.config.relation]
        return parameter_groups(self, rates, bias_rate=bias_rate, weight_decay=weight_decay)

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Return (h, w), the cells of an image of height x width pixels; the last ones may reach over its edge."""
        return -(-height // self.stride), -(-width // self.stride)

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, return_dict: bool | None = None
    ) -> AffinityNetOutput | tuple[Any, ...]:
        """Relate neighboring cells; with labels, also compute the loss.

        Args:
            pixel_values: (B, 3, H, W) normalized images of any size; zeros are added at the right and the bottom up to
                whole cells, as PSA does.
            labels: (B, h, w) label ids of the cells, 0 background, 255 unsure; (h, w) = `grid_size(H, W)`.
            return_dict: False for a plain tuple of the fields that are not None.

        Raises:
            ValueError: the images are not (B, 3, H, W), or the labels are not on their grid.
        """
        self._check_inputs(pixel_values, labels)
        maps, grid = self._maps(pixel_values)
        radius = cast(int, self.config.radius)
        features = boundary = displacement = None
        if self.feature_head is not None:
            features = cropped(self.feature_head(maps), grid)
            pairs = pair_affinity(features.float(), radius)
        else:
            boundary = cropped(self._boundary_logits(maps), grid)
            pairs = boundary_to_pair_affinity(boundary[:, 0].float().sigmoid(), radius)
        if self.displacement_head is not None:
            displacement = cropped(self.displacement_head(maps, maps[0].shape[2:]), grid)

        loss: torch.Tensor | None = None
        losses: dict[str, torch.Tensor] | None = None
        if labels is not None:
            pair_labels = affinity_labels(labels, radius)
            losses = affinity_loss(pairs, pair_labels)
            loss = losses.pop("total")
            if displacement is not None:
                extra = displacement_losses(displacement, pair_labels, radius)
                losses |= extra
                loss = loss + sum(extra.values()) / 2
        output = AffinityNetOutput(
            loss=loss,
            losses=losses,
            pair_affinity=pairs,
            features=features,
            boundary=boundary,
            displacement=displacement,
        )
        return output.to_tuple() if return_dict is False else output

    @torch.no_grad()
    def affinity(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """Return the matrices that class scores walk along.

        Args:
            pixel_values: (B, 3, H, W) as `forward` takes them.

        Returns:
            B sparse symmetric tensors (N, N) in float32 with 1 on the diagonal, N = h * w cells of `grid_size(H, W)`,
            row by row: what `random_walk.propagate` takes.
        """
        return self.affinity_and_boundary(pixel_values)[0]

    @torch.no_grad()
    def affinity_and_boundary(self, pixel_values: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """Return `affinity`, and for irn the boundary probabilities (B, h, w), averaged with those of the flip.

        IRN multiplies class scores by 1 - boundary before they walk; psa has no boundary (None).
        """
        self._check_inputs(pixel_values, None)
        maps, grid = self._maps(pixel_values)
        radius = cast(int, self.config.walk_radius)
        if self.feature_head is not None:
            pairs = pair_affinity(cropped(self.feature_head(maps), grid).float(), radius)
            return affinity_matrix(pairs, grid, radius), None
        logits = self._boundary_logits(maps)
        # The padded image is flipped, so that cells of both views lie upon each other.
        flipped = self._boundary_logits(self._maps(self._padded(pixel_values).flip(-1))[0]).flip(-1)
        boundary = cropped((logits + flipped) / 2, grid)[:, 0].float().sigmoid()
        return boundary_to_matrices(boundary, radius), boundary

    def _padded(self, pixel_values: torch.Tensor) -> torch.Tensor:
        height, width = pixel_values.shape[2:]
        multiple = max(self.stride, self.backbone.size_multiple)
        return F.pad(pixel_values, (0, -width % multiple, 0, -height % multiple))

    def _maps(self, pixel_values: torch.Tensor) -> tuple[list[torch.Tensor], tuple[int, int]]:
        """Return the backbone's maps of the padded images, none finer than the grid, and the (h, w) of the images."""
        grid = self.grid_size(pixel_values.shape[2], pixel_values.shape[3])
        padded = self._padded(pixel_values)
        maps = []
        for feature_map, stride in zip(self.backbone(padded), self.backbone.strides, strict=True):
            while stride < self.stride:  # a ResNet's stem: its max-pooling, which IRN reads it after
                feature_map, stride = F.max_pool2d(feature_map, 3, stride=2, padding=1), 2 * stride
            maps.append(feature_map)
        return maps, grid

    def _boundary_logits(self, maps: list[torch.Tensor]) -> torch.Tensor:
        assert self.boundary_head is not None  # relation "irn"
        logits: torch.Tensor = self.boundary_head(maps, maps[0].shape[2:])
        return logits

    def _check_inputs(self, pixel_values: torch.Tensor, labels: torch.Tensor | None) -> None:
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise InputError(f"pixel_values must be (B, 3, H, W), got {tuple(pixel_values.shape)}.")
        if labels is None:
            return
        expected = (len(pixel_values), *self.grid_size(pixel_values.shape[2], pixel_values.shape[3]))
        if labels.shape != expected:
            raise InputError(
                f"labels must be {expected}, one for each cell of {self.stride} x {self.stride} pixels, got "
                f"{tuple(labels.shape)}; reduce them to model.grid_size(H, W)."
            )


def cropped(maps: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Leave out the cells (B, D, h', w') that padding added."""
    return maps[:, :, : grid[0], : grid[1]].contiguous()


def boundary_to_matrices(boundary: torch.Tensor, radius: int) -> list[torch.Tensor]:
    """Turn boundaries (B, h, w) into B sparse matrices (N, N), every cell with all its partners inside the image.

    As IRN, the map is extended by cells that are all boundary, which nothing passes, and these are left out again.
    """
    h, w = boundary.shape[1:]
    reach = fitting_radius((h, w), radius) - 1
    extended = F.pad(boundary, (reach, reach, 0, reach), value=1.0)
    size = (h + reach, w + 2 * reach)
    matrices = []
    for matrix in affinity_matrix(boundary_to_pair_affinity(extended, reach + 1), size, reach + 1):
        indices, values = matrix.indices(), matrix.values()
        rows, columns = indices // size[1], indices % size[1] - reach
        inside = ((rows < h) & (columns >= 0) & (columns < w)).all(dim=0)
        kept = (rows * w + columns)[:, inside]
        matrices.append(
            torch.sparse_coo_tensor(kept, values[inside], (h * w, h * w), is_coalesced=True, check_invariants=False)
        )
    return matrices


__all__ = ["AffinityNetModel", "AffinityNetOutput"]


# A saved folder carries this code, so that it opens, with trust_remote_code, where the package is not installed.
AffinityNetModel.register_for_auto_class()
