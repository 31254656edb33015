"""Configuration of the DeepLab segmentation network."""

from dataclasses import dataclass
from typing import Any

from transformers.configuration_utils import PreTrainedConfig, strict

from .errors import InputError
from .labels import BACKGROUND, IGNORE_INDEX, VOC_CLASSES


@dataclass(frozen=True)
class DeepLabPreset:
    """What a published DeepLab-V1 does.

    Attributes:
        head: "large_fov" is two dilated 3x3 convolutions; "normalized" is one, two of 1x1, with BatchNorm and dropout.
        align_corners: How logits are resized to the image in the loss.
        freeze_batch_norm: Whether the backbone's BatchNorm stays as it was loaded.
        num_frozen_resnet38_stages: Stages of resnet38 that are not trained.
        bias_rate: How many times the learning rate biases get.
        weight_decay: Of the optimizer.
    """

    head: str
    align_corners: bool
    freeze_batch_norm: bool
    num_frozen_resnet38_stages: int
    bias_rate: float
    weight_decay: float


PRESETS: dict[str, DeepLabPreset] = {
    # MCTformer's `seg/`, literally: its weight decay lands in the optimizer's momentum.
    "mctformer": DeepLabPreset("large_fov", False, True, 1, 1.0, 0.0),
    # YudeWang/semantic-segmentation-codebase, with which SEAM was retrained.
    "deeplab-v1": DeepLabPreset("normalized", True, False, 0, 2.0, 5e-4),
}

HEAD_REACH_PX = 96
"""Dilation of the head's 3x3 convolutions in pixels: 12 cells at output stride 8."""


@strict
class DeepLabConfig(PreTrainedConfig):
    r"""Backbone and head of DeepLab-V1 with a large field of view.

    The defaults are MCTformer's segmentation network for VOC. `id2label` names the 1 + C labels, background first.

    Args:
        backbone (`str`, defaults to `"resnet38"`): "resnet38", "bitrans" for the encoder of a `BiTransModel`, or the
            name of a timm network with feature maps.
        backbone_config (`dict`, *optional*): Options of the backbone: `width_multiplier` of resnet38, the
            `BiTransConfig` of bitrans, arguments of `timm.create_model`.
        preset (`str`, defaults to `"mctformer"`): Head, freezing and parameter groups of "mctformer" or "deeplab-v1".
        out_indices (`list`, *optional*): The one feature map of the backbone that is read; the deepest by default.
        output_stride (`int`, *optional*): Pixels per cell, where the backbone leaves a choice (8 or 16 for ResNets and
            ConvNeXts, a divisor of the patch size for bitrans); None for the backbone's own.
        num_frozen_stages (`int`, *optional*): Stages of the backbone, from the pixels on, that are not trained; -1
            for all. By default the first of resnet38 under "mctformer", else none.
        freeze_batch_norm (`bool`, *optional*): Keep the backbone's BatchNorm as it was loaded; by default as the
            preset has it ("mctformer" does).
        head_dilation (`int`, *optional*): Dilation of the head in cells; by default 96 pixels, which are the
            reference's 12 cells at stride 8. The model fills it in.
        semantic_loss_ignore_index (`int`, defaults to 255): Label id that the loss does not count.
        stride (`int`, *optional*): Pixels per cell of the logits; the model fills it in.

    Raises:
        StrictDataclassClassValidationError, StrictDataclassFieldValidationError: a value is of the wrong type or out
            of range; the message says which and what is allowed.

    Example:
        >>> DeepLabConfig().id2label[20], DeepLabConfig(num_labels=3).id2label
        ('tvmonitor', {0: 'background', 1: 'LABEL_1', 2: 'LABEL_2'})
    """

    model_type = "bitrans-deeplab"

    backbone: str = "resnet38"
    backbone_config: dict[str, Any] | None = None
    preset: str = "mctformer"
    out_indices: list[int] | tuple[int, ...] | None = None
    output_stride: int | None = None
    num_frozen_stages: int | None = None
    freeze_batch_norm: bool | None = None
    head_dilation: int | None = None
    semantic_loss_ignore_index: int = IGNORE_INDEX
    stride: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        id2label = kwargs.get("id2label", getattr(self, "id2label", None))
        if not id2label:
            num_labels = kwargs.pop("num_labels", None)
            names: tuple[str, ...] = ("background", *VOC_CLASSES)
            if num_labels is not None and num_labels != len(names):
                names = ("background", *(f"LABEL_{label}" for label in range(1, num_labels)))
            id2label = dict(enumerate(names))
            kwargs["id2label"] = self.id2label = id2label
        if not kwargs.get("label2id", getattr(self, "label2id", None)):
            # transformers leaves label2id None when only id2label is given.
            kwargs["label2id"] = self.label2id = {name: int(label) for label, name in id2label.items()}
        preset = PRESETS.get(self.preset)
        if preset is not None:  # else `validate_preset` says what is allowed
            if self.freeze_batch_norm is None:
                self.freeze_batch_norm = preset.freeze_batch_norm
            if self.num_frozen_stages is None:
                resnet38 = self.backbone == "resnet38"
                self.num_frozen_stages = preset.num_frozen_resnet38_stages if resnet38 else 0
        super().__post_init__(**kwargs)

    def validate_preset(self) -> None:
        """Check the preset (called by transformers when the config is built and saved)."""
        if self.preset not in PRESETS:
            raise InputError(f"preset must be one of {', '.join(PRESETS)}, got {self.preset!r}.")

    def validate_labels(self) -> None:
        """Check that the labels are background and at least one class, and leave room for the ignored id."""
        id2label = self.id2label or {}
        number = len(id2label)
        if number < 2 or number > self.semantic_loss_ignore_index >= 0:
            raise InputError(
                f"id2label must name background and the object classes, 2 to {self.semantic_loss_ignore_index} "
                f"labels, got {number}."
            )
        names = [name.lower() for _, name in sorted(id2label.items(), key=lambda item: int(item[0]))]
        if "background" in names and names.index("background") != BACKGROUND:
            raise InputError(
                f"background must be label {BACKGROUND}, got label {names.index('background')}; put it first."
            )

    def validate_backbone(self) -> None:
        """Check what can be checked without building the backbone."""
        if not self.backbone:
            raise InputError("backbone must be resnet38, bitrans or a timm network, got an empty name.")
        if self.out_indices is not None and len(self.out_indices) != 1:
            raise InputError(f"out_indices must be one feature map, got {list(self.out_indices)}.")
        if self.num_frozen_stages is not None and self.num_frozen_stages < -1:
            raise InputError(f"num_frozen_stages must be -1 (all) or at least 0, got {self.num_frozen_stages}.")
        if self.head_dilation is not None and self.head_dilation < 1:
            raise InputError(f"head_dilation must be at least 1 cell, got {self.head_dilation}.")


# A saved folder carries this code, so that it opens, with trust_remote_code, where the package is not installed.
DeepLabConfig.register_for_auto_class()
