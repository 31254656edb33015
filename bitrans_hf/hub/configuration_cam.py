"""Configuration of the plain CNN whose class activation maps are the baseline of Bi-Trans."""

from typing import Any

from transformers.configuration_utils import PreTrainedConfig, strict

from .errors import InputError


@strict
class CamConfig(PreTrainedConfig):
    r"""Backbone of a CNN with global average pooling and one linear classifier.

    The defaults are a ResNet50 whose last stage is dilated; `id2label` names the C object classes, without background.

    Args:
        backbone (`str`, defaults to `"resnet50"`): Name of a convolutional network of timm, or "resnet38".
        backbone_config (`dict`, *optional*): Options of the backbone: arguments of `timm.create_model`,
            `width_multiplier` of resnet38.
        output_stride (`int`, *optional*, defaults to 16): Pixels per cell of the map: 8, 16 or 32 for ResNets and
            ConvNeXts; None for the backbone's own, which resnet38 needs.
        image_size (`int`, defaults to 512): Side in pixels of the square training images; other sizes work too.
        num_frozen_stages (`int`, defaults to 0): Stages of the backbone, from the pixels on, that are not trained; -1
            for all. IRN freezes 3 of ResNet50: the stem and two stages.
        freeze_batch_statistics (`bool`, defaults to `False`): Let the backbone's BatchNorm normalize with the
            statistics that were loaded, while its scale and shift are trained, as IRN.
        stride (`int`, *optional*): Pixels per cell of the map; the model fills it in.

    Raises:
        StrictDataclassClassValidationError, StrictDataclassFieldValidationError: a value is of the wrong type or out
            of range; the message says which and what is allowed.

    Example:
        >>> config = CamConfig(id2label={0: "cat", 1: "dog"})
        >>> config.backbone, config.output_stride, config.label2id
        ('resnet50', 16, {'cat': 0, 'dog': 1})
    """

    model_type = "bitrans-cam"
    keys_to_ignore_at_inference = ["coarse_cam"]  # noqa: RUF012 - transformers reads a plain class attribute

    backbone: str = "resnet50"
    backbone_config: dict[str, Any] | None = None
    output_stride: int | None = 16
    image_size: int = 512
    num_frozen_stages: int = 0
    freeze_batch_statistics: bool = False
    stride: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        id2label = kwargs.get("id2label", getattr(self, "id2label", None))
        if id2label and not kwargs.get("label2id", getattr(self, "label2id", None)):
            # transformers leaves label2id None when only id2label is given.
            self.label2id = {name: int(index) for index, name in id2label.items()}
        if self.problem_type is None:
            self.problem_type = "multi_label_classification"
        super().__post_init__(**kwargs)

    def validate_labels(self) -> None:
        """Check the classes and the size (called by transformers when the config is built and saved)."""
        if not self.num_labels:
            raise InputError("id2label must name at least one object class, got none.")
        if self.image_size < 1:
            raise InputError(f"image_size must be at least 1, got {self.image_size}.")

    def validate_backbone(self) -> None:
        """Check what can be checked without building the backbone."""
        if not self.backbone or self.backbone == "bitrans":
            raise InputError(
                f"backbone must be resnet38 or a convolutional network of timm, got {self.backbone!r}; the maps of a "
                "Bi-Trans encoder are a BiTransModel's."
            )
        if self.num_frozen_stages < -1:
            raise InputError(f"num_frozen_stages must be -1 (all) or at least 0, got {self.num_frozen_stages}.")
