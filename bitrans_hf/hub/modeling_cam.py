"""Class activation maps of a plain CNN (Zhou et al., arXiv:1512.04150): the baseline without a transformer.

A backbone, global average pooling and a linear classifier without bias, trained on image-level labels; the classifier
applied to every cell gives the maps. As trained for PSA, IRN and SEAM. B images, C object classes, an h x w grid.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .backbones import TimmFeatures, apply_freezing, build_backbone, init_convolutional, parameter_groups
from .configuration_cam import CamConfig
from .errors import InputError
from .losses import classification_loss

if TYPE_CHECKING:
    # What the imports above import: transformers before 5.23 copies only the files that this text names.
    from .configuration_bitrans import BiTransConfig as BiTransConfig
    from .encoder import ClassTokenEncoder as ClassTokenEncoder
    from .maps import fuse as fuse
    from .modeling_bitrans import BiTransModel as BiTransModel
    from .resnet38 import ResNet38 as ResNet38
    from .views import VIEWS as VIEWS


@dataclass
class CamOutput(ModelOutput):
    """What `CamModel` returns. B images, C classes, an h x w grid.

    Attributes:
        loss: Scalar multi-label soft margin loss; only with labels.
        logits: (B, C), the mean of `coarse_cam` over its cells; their sigmoid is the image-level tag score.
        coarse_cam: (B, C, h, w) class activation maps before the ReLU, any range; called as those of a
            `BiTransOutput`, so that seeds are made of them in the same way.
    """

    # ModelOutput wants None as the default, also of what is always set.
    loss: torch.Tensor | None = None
    logits: torch.Tensor = None  # type: ignore[assignment]
    coarse_cam: torch.Tensor = None  # type: ignore[assignment]


class CamModel(PreTrainedModel):
    """A CNN that tags images, and its class activation maps.

    Args:
        config: Backbone and classes. `stride` is filled in.

    Raises:
        ValueError: the backbone does not exist, cannot be built in this way, or is no convolutional network.

    Example:
        >>> config = CamConfig(id2label={0: "cat", 1: "dog"}, backbone="test_resnet")
        >>> output = CamModel(config).eval()(torch.zeros(1, 3, 100, 133), labels=torch.tensor([[1.0, 0.0]]))
        >>> tuple(output.logits.shape), tuple(output.coarse_cam.shape), output.loss.shape
        ((1, 2), (1, 2, 7, 9), torch.Size([]))
    """

    config_class = CamConfig
    base_model_prefix = "cam"
    main_input_name = "pixel_values"
    _no_split_modules = ["ResidualBlock", "BottleneckBlock", "BasicBlock", "Bottleneck"]  # noqa: RUF012

    def __init__(self, config: CamConfig):
        super().__init__(config)
        self.backbone = build_backbone(
            config.backbone, config.backbone_config, out_indices=1, output_stride=config.output_stride
        )
        if isinstance(self.backbone, TimmFeatures) and self.backbone.is_plain:
            raise InputError(
                f"backbone must be a convolutional network, got the vision transformer {config.backbone!r}; take a "
                "ResNet or ConvNeXt, or a BiTransModel for the maps of a transformer."
            )
        config.stride = self.backbone.strides[-1]
        # No bias: the maps would be shifted, and with them what the ReLU leaves.
        self.classifier = nn.Conv2d(self.backbone.channels[-1], cast(int, config.num_labels), 1, bias=False)
        self.post_init()
        self.train(self.training)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self.classifier:
            bound = self.classifier.in_channels**-0.5  # torch's default, as IRN
            init.uniform_(self.classifier.weight, -bound, bound)
        else:
            init_convolutional(module)

    def train(self, mode: bool = True) -> "CamModel":
        """Set the mode, leaving frozen parts of the backbone in evaluation."""
        super().train(mode)
        apply_freezing(self.backbone, self.config.num_frozen_stages, freeze_batch_norm=False)
        if self.config.freeze_batch_statistics:
            for module in self.backbone.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def parameter_groups(self, weight_decay: float = 1e-4) -> list[dict[str, Any]]:
        """Return what is trained as optimizer groups, the classifier at 10x the rate.

        Args:
            weight_decay: IRN's 1e-4, which it also applies to the scales of norms.

        Returns:
            As `backbones.parameter_groups`.
        """
        rates = {"backbone": 1.0, "classifier": 10.0}
        return parameter_groups(self, rates, bias_rate=1.0, weight_decay=weight_decay)

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, return_dict: bool | None = None
    ) -> CamOutput | tuple[Any, ...]:
        """Tag images and map every class; with labels, also compute the loss.

        Args:
            pixel_values: (B, 3, H, W) normalized images of any size. Where a side is no multiple of the stride, the
                last cells of a ResNet reach over the edge, and a ConvNeXt does not see up to `stride - 1` pixels.
            labels: (B, C) multi-hot image-level labels, 0 or 1.
            return_dict: False for a plain tuple of the fields that are not None.

        Raises:
            ValueError: the images are not (B, 3, H, W), or the labels not (B, C).
        """
        self._check_inputs(pixel_values, labels)
        # A linear classifier of averaged features gives the average of what it gives in every cell.
        coarse_cam = self.classifier(self.backbone(pixel_values)[-1]).float()
        logits = coarse_cam.mean(dim=(2, 3))
        loss = None if labels is None else classification_loss(logits, labels)
        output = CamOutput(loss=loss, logits=logits, coarse_cam=coarse_cam)
        return output.to_tuple() if return_dict is False else output

    def _check_inputs(self, pixel_values: torch.Tensor, labels: torch.Tensor | None) -> None:
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise InputError(f"pixel_values must be (B, 3, H, W), got {tuple(pixel_values.shape)}.")
        num_classes = cast(int, self.config.num_labels)
        if labels is not None and labels.shape != (len(pixel_values), num_classes):
            raise InputError(
                f"labels must be multi-hot of shape ({len(pixel_values)}, {num_classes}) for {num_classes} classes, "
                f"got {tuple(labels.shape)}; config.id2label names the classes."
            )


__all__ = ["CamModel", "CamOutput"]
