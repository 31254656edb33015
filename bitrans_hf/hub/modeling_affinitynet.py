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
    affinity_labels,
    affinity_loss,
    affinity_matrix,
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
)
from .configuration_affinitynet import RELATIONS, AffinityNetConfig
from .errors import InputError
from .irn import BOUNDARY_STRIDE, BoundaryHead, boundary_to_matrices, boundary_to_pair_affinity
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

LEARNING_RATES: dict[str, tuple[dict[str, float], float]] = {
    "psa": ({"backbone": 1.0, "feature_head": 10.0}, 2.0),
    "irn": ({"backbone": 1.0, "boundary_head": 1.0}, 1.0),
}
"""By relation: multiples of the learning rate of each part, and how many times its part's rate a bias gets."""


@dataclass
class AffinityNetOutput(ModelOutput):
    """What `AffinityNetModel` returns. B images, h x w cells, P offsets, M from-cells.

    Attributes:
        loss: Scalar total loss; only with labels.
        losses: Scalar terms before weighting: "background", "foreground" and "negative" pairs; only with labels.
        pair_affinity: (B, P, M) in [0, 1], as `affinity_pairs.pair_affinity` orders pairs of the training radius.
        features: (B, D, h, w) that psa compares; None for irn.
        boundary: (B, 1, h, w) logits of a class boundary; None for psa.
    """

    # ModelOutput wants None as the default, also of what is always set.
    loss: torch.Tensor | None = None
    losses: dict[str, torch.Tensor] | None = None
    pair_affinity: torch.Tensor = None  # type: ignore[assignment]
    features: torch.Tensor | None = None
    boundary: torch.Tensor | None = None


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
            F.interpolate(F.elu(self.get_submodule(name)(feature_map)), size=grid, mode="bilinear")
            for name, feature_map in zip(self.level_names, maps, strict=True)
        ]
        features: torch.Tensor = F.elu(self.f9(torch.cat(levels, dim=1)))
        return features


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
        elif self._is_part(module, self.boundary_head):
            bound = cast(nn.Conv2d, module).in_channels ** -0.5  # torch's default, as IRN
            init.uniform_(cast(nn.Conv2d, module).weight, -bound, bound)
            init_bias(cast(nn.Conv2d, module))
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

        PSA: the head at 10x the rate, biases at twice their part's, without decay.

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
        features = boundary = None
        if self.feature_head is not None:
            features = cropped(self.feature_head(maps), grid)
            pairs = pair_affinity(features.float(), radius)
        else:
            boundary = cropped(self._boundary_logits(maps), grid)
            pairs = boundary_to_pair_affinity(boundary[:, 0].float().sigmoid(), radius)
        loss: torch.Tensor | None = None
        losses: dict[str, torch.Tensor] | None = None
        if labels is not None:
            losses = affinity_loss(pairs, affinity_labels(labels, radius))
            loss = losses.pop("total")
        output = AffinityNetOutput(loss=loss, losses=losses, pair_affinity=pairs, features=features, boundary=boundary)
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


__all__ = ["AffinityNetModel", "AffinityNetOutput"]


# A saved folder carries this code, so that it opens, with trust_remote_code, where the package is not installed.
AffinityNetModel.register_for_auto_class()
