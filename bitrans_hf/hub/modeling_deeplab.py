"""DeepLab-V1 with a large field of view: the segmentation network that is trained on pseudo labels.

Chen et al. (arXiv:1412.7062), in the two forms that weakly supervised methods are compared with. B images of H x W
pixels, C object classes, an h x w grid of logits.
"""

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import SemanticSegmenterOutput

from .backbones import (
    apply_freezing,
    bitrans_options,
    build_backbone,
    copy_encoder,
    init_bias,
    init_convolutional,
    parameter_groups,
)
from .configuration_deeplab import HEAD_REACH_PX, PRESETS, DeepLabConfig
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

HEAD_WIDTH = 512
"""Channels inside both heads."""


class LargeFovHead(nn.Module):
    """MCTformer's head: two dilated 3x3 convolutions. Names of modules are those of its checkpoints."""

    def __init__(self, in_channels: int, num_labels: int, dilation: int):
        super().__init__()
        self.fc8_seg_conv1 = nn.Conv2d(in_channels, HEAD_WIDTH, 3, padding=dilation, dilation=dilation)
        self.fc8_seg_conv2 = nn.Conv2d(HEAD_WIDTH, num_labels, 3, padding=dilation, dilation=dilation)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map (B, D, h, w) to logits (B, 1 + C, h, w)."""
        logits: torch.Tensor = self.fc8_seg_conv2(F.relu(self.fc8_seg_conv1(features)))
        return logits


class NormalizedHead(nn.Module):
    """SEAM's head: one dilated 3x3 convolution and one 1x1, each with BatchNorm, dropout, and the classifier."""

    def __init__(self, in_channels: int, num_labels: int, dilation: int):
        super().__init__()
        self.conv_fov = nn.Conv2d(in_channels, HEAD_WIDTH, 3, padding=dilation, dilation=dilation, bias=False)
        self.bn_fov = nn.BatchNorm2d(HEAD_WIDTH, momentum=3e-4)
        self.conv_fov2 = nn.Conv2d(HEAD_WIDTH, HEAD_WIDTH, 1, bias=False)
        self.bn_fov2 = nn.BatchNorm2d(HEAD_WIDTH, momentum=3e-4)
        self.dropout1 = nn.Dropout(0.5)
        self.cls_conv = nn.Conv2d(HEAD_WIDTH, num_labels, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map (B, D, h, w) to logits (B, 1 + C, h, w)."""
        hidden = F.relu(self.bn_fov(self.conv_fov(features)))
        hidden = F.relu(self.bn_fov2(self.conv_fov2(hidden)))
        logits: torch.Tensor = self.cls_conv(self.dropout1(hidden))
        return logits


HEADS = {"large_fov": LargeFovHead, "normalized": NormalizedHead}


class DeepLabForSemanticSegmentation(PreTrainedModel):
    """A backbone and a head with a large field of view; one label per pixel, background included.

    Args:
        config: Backbone, preset and labels. `out_indices`, `stride` and `head_dilation` are filled in.

    Raises:
        ValueError: the backbone does not exist or cannot be built in this way.

    Example:
        >>> config = DeepLabConfig(num_labels=3, backbone_config={"width_multiplier": 1 / 32})
        >>> model = DeepLabForSemanticSegmentation(config).eval()
        >>> model(torch.zeros(1, 3, 65, 80)).logits.shape
        torch.Size([1, 3, 9, 10])
    """

    config_class = DeepLabConfig
    base_model_prefix = "deeplab"
    main_input_name = "pixel_values"
    _no_split_modules = ["ResidualBlock", "BottleneckBlock", "BiTransLayer"]  # noqa: RUF012 - transformers' attribute

    def __init__(self, config: DeepLabConfig):
        super().__init__(config)
        chosen = 1 if config.out_indices is None else config.out_indices
        self.backbone = build_backbone(
            config.backbone, config.backbone_config, out_indices=chosen, output_stride=config.output_stride
        )
        self.stride = self.backbone.strides[-1]
        config.out_indices, config.stride = list(self.backbone.out_indices), self.stride
        if config.head_dilation is None:
            config.head_dilation = max(1, round(HEAD_REACH_PX / self.stride))
        head = HEADS[PRESETS[config.preset].head]
        self.head = head(self.backbone.channels[-1], cast(int, config.num_labels), config.head_dilation)
        self.post_init()
        self.train(self.training)

    @classmethod
    def from_bitrans(cls, bitrans: BiTransModel, **config: Any) -> "DeepLabForSemanticSegmentation":
        """Build a DeepLab on a copy of a trained Bi-Trans encoder; the head is new.

        Args:
            bitrans: Left as it is.
            **config: Fields of `DeepLabConfig`; by default the labels are background and the encoder's classes.
        """
        if not config.get("id2label") and not config.get("num_labels"):
            names = {int(label): name for label, name in cast("dict[int, str]", bitrans.config.id2label).items()}
            config["id2label"] = {0: "background", **{label + 1: names[label] for label in sorted(names)}}
        model = cls(DeepLabConfig(backbone="bitrans", backbone_config=bitrans_options(bitrans), **config))
        copy_encoder(bitrans, model)
        return model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(self.head, LargeFovHead) and (
            module is self.head.fc8_seg_conv1 or module is self.head.fc8_seg_conv2
        ):
            init.xavier_uniform_(module.weight)
            init_bias(module)
        elif isinstance(self.head, NormalizedHead) and module is self.head.cls_conv:
            # torch's default. SEAM draws it over the fan-out, that is, larger the fewer labels there are: with four
            # labels the loss would start at 11.
            bound = module.in_channels**-0.5
            init.uniform_(module.weight, -bound, bound)
            init_bias(module)
        else:
            init_convolutional(module)

    def train(self, mode: bool = True) -> "DeepLabForSemanticSegmentation":
        """Set the mode, leaving frozen parts of the backbone in evaluation."""
        super().train(mode)
        apply_freezing(
            self.backbone, cast(int, self.config.num_frozen_stages), cast(bool, self.config.freeze_batch_norm)
        )
        return self

    def parameter_groups(self, weight_decay: float | None = None) -> list[dict[str, Any]]:
        """Return what is trained as optimizer groups: the head at 10x the rate, biases as the preset has it.

        Args:
            weight_decay: None for the preset's: 0 for "mctformer", 5e-4 for "deeplab-v1".

        Returns:
            As `backbones.parameter_groups`.
        """
        preset = PRESETS[self.config.preset]
        return parameter_groups(
            self,
            {"backbone": 1.0, "head": 10.0},
            bias_rate=preset.bias_rate,
            weight_decay=preset.weight_decay if weight_decay is None else weight_decay,
        )

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, return_dict: bool | None = None
    ) -> SemanticSegmenterOutput | tuple[Any, ...]:
        """Score every label in every cell; with labels, also compute the loss.

        Args:
            pixel_values: (B, 3, H, W) normalized images of any size. For a backbone that sees whole cells only, an
                image between two sizes is enlarged bilinearly to the next.
            labels: (B, H, W) label ids, 0 background, `semantic_loss_ignore_index` not counted.
            return_dict: False for a plain tuple of the fields that are not None.

        Returns:
            `loss`, the mean cross-entropy of the logits resized to the image over all counted pixels (0 if there is
            none), and `logits` (B, 1 + C, h, w), both in float32.

        Raises:
            ValueError: the images are not (B, 3, H, W), the labels are not of their size, or a label id is not one of
                the model's.
        """
        self._check_inputs(pixel_values, labels)
        height, width = pixel_values.shape[2:]
        multiple = self.backbone.size_multiple
        if height % multiple or width % multiple:
            size = (height + -height % multiple, width + -width % multiple)
            pixel_values = F.interpolate(pixel_values, size=size, mode="bilinear", align_corners=False)
        logits = self.head(self.backbone(pixel_values)[-1]).float()
        loss: torch.Tensor | None = None
        if labels is not None:
            loss = self._loss(logits, labels)
        output = SemanticSegmenterOutput(loss=loss, logits=logits)
        return output.to_tuple() if return_dict is False else output

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        align = PRESETS[self.config.preset].align_corners
        logits = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=align)
        ignored = self.config.semantic_loss_ignore_index
        total = F.cross_entropy(logits, labels.long(), ignore_index=ignored, reduction="sum")
        # A crop without a sure pixel is no reason for a mean of nothing, which is not a number.
        mean: torch.Tensor = total / (labels != ignored).sum().clamp(min=1)
        return mean

    def _check_inputs(self, pixel_values: torch.Tensor, labels: torch.Tensor | None) -> None:
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise InputError(f"pixel_values must be (B, 3, H, W), got {tuple(pixel_values.shape)}.")
        if labels is None:
            return
        expected = (len(pixel_values), *pixel_values.shape[2:])
        if labels.shape != expected:
            raise InputError(
                f"labels must be {tuple(expected)}, one for each pixel, got {tuple(labels.shape)}; resize label maps "
                "with the nearest-neighbor filter."
            )
        if torch.compiler.is_compiling():
            return  # what follows depends on values, which a compiled graph does not branch on
        num_labels, ignored = cast(int, self.config.num_labels), self.config.semantic_loss_ignore_index
        wrong = labels[((labels < 0) | (labels >= num_labels)) & (labels != ignored)]
        if wrong.numel():
            raise InputError(
                f"labels hold id {int(wrong[0])} in {wrong.numel()} pixels, expected 0 to {num_labels - 1} or "
                f"{ignored} for pixels that are not counted; config.id2label names the labels."
            )


__all__ = ["DeepLabForSemanticSegmentation"]


# A saved folder carries this code, so that it opens, with trust_remote_code, where the package is not installed.
DeepLabForSemanticSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")
