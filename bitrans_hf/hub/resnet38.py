"""ResNet38d: the wide residual network that AffinityNet and DeepLab are built on.

Wu et al., "Wider or Deeper" (arXiv:1611.10080), model A1 with dilations in place of the last strides, as the public
code jiwoon-ahn/psa has it. Names of modules are PSA's, so that its checkpoints need no renaming.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from .errors import InputError

TAPS = ("conv2", "conv3", "conv4", "conv5", "conv6")
"""Feature maps of `ResNet38.forward`, shallow to deep. PSA names conv4 to conv6; conv2 and conv3 go on downwards."""

TAP_STRIDES = (2, 4, 8, 8, 8)
TAP_CHANNELS = (128, 256, 512, 1024, 4096)

STAGES: tuple[tuple[str, ...], ...] = (
    ("conv1a",),
    ("b2", "b2_1", "b2_2"),
    ("b3", "b3_1", "b3_2"),
    ("b4", "b4_1", "b4_2", "b4_3", "b4_4", "b4_5"),
    ("b5", "b5_1", "b5_2"),
    ("b6",),
    ("b7", "bn7"),
)
"""Modules by stage, in the order of the forward pass: what "the first n stages are frozen" speaks of."""


class ResidualBlock(nn.Module):
    """Pre-activation block of two 3x3 convolutions; the shortcut is a 1x1 convolution where the shape changes.

    Args:
        in_channels: Channels of the input.
        mid_channels: Channels between the convolutions.
        out_channels: Channels of the output.
        stride: Of the first convolution and the shortcut.
        first_dilation: Of the first convolution; None for `dilation`.
        dilation: Of the second convolution.
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        stride: int = 1,
        first_dilation: int | None = None,
        dilation: int = 1,
    ):
        super().__init__()
        first = dilation if first_dilation is None else first_dilation
        self.bn_branch2a = nn.BatchNorm2d(in_channels)
        self.conv_branch2a = nn.Conv2d(in_channels, mid_channels, 3, stride, padding=first, dilation=first, bias=False)
        self.bn_branch2b1 = nn.BatchNorm2d(mid_channels)
        self.conv_branch2b1 = nn.Conv2d(mid_channels, out_channels, 3, padding=dilation, dilation=dilation, bias=False)
        same_shape = in_channels == out_channels and stride == 1
        self.conv_branch1 = None if same_shape else nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the block's output and its normalized and rectified input, which the taps are made of."""
        activated = F.relu(self.bn_branch2a(features))
        shortcut = features if self.conv_branch1 is None else self.conv_branch1(activated)
        branch = self.conv_branch2b1(F.relu(self.bn_branch2b1(self.conv_branch2a(activated))))
        return shortcut + branch, activated


class BottleneckBlock(nn.Module):
    """Pre-activation block 1x1 - dilated 3x3 - 1x1 with dropout of whole channels before the last two convolutions.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output; a quarter and a half of it lie between.
        dilation: Of the 3x3 convolution.
        dropout: Probability that a channel is dropped in training.
    """

    def __init__(self, in_channels: int, out_channels: int, dilation: int, dropout: float):
        super().__init__()
        quarter, half = out_channels // 4, out_channels // 2
        self.bn_branch2a = nn.BatchNorm2d(in_channels)
        self.conv_branch2a = nn.Conv2d(in_channels, quarter, 1, bias=False)
        self.bn_branch2b1 = nn.BatchNorm2d(quarter)
        self.dropout_2b1 = nn.Dropout2d(dropout)
        self.conv_branch2b1 = nn.Conv2d(quarter, half, 3, padding=dilation, dilation=dilation, bias=False)
        self.bn_branch2b2 = nn.BatchNorm2d(half)
        self.dropout_2b2 = nn.Dropout2d(dropout)
        self.conv_branch2b2 = nn.Conv2d(half, out_channels, 1, bias=False)
        self.conv_branch1 = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the block's output and its normalized and rectified input."""
        activated = F.relu(self.bn_branch2a(features))
        branch = F.relu(self.bn_branch2b1(self.conv_branch2a(activated)))
        branch = F.relu(self.bn_branch2b2(self.conv_branch2b1(self.dropout_2b1(branch))))
        return self.conv_branch1(activated) + self.conv_branch2b2(self.dropout_2b2(branch)), activated


class ResNet38(nn.Module):
    """ResNet38d: 105,070,912 parameters, output stride 8, no classifier.

    Args:
        width_multiplier: Factor of every number of channels; 1 is the published network. Small ones, such as 1/16,
            make a network for experiments, without pretrained weights.

    Raises:
        ValueError: a layer would be left without channels.

    Example:
        >>> taps = ResNet38(width_multiplier=1 / 32).eval()(torch.zeros(1, 3, 33, 40))
        >>> {name: tuple(taps[name].shape) for name in ("conv4", "conv6")}
        {'conv4': (1, 16, 5, 5), 'conv6': (1, 128, 5, 5)}
    """

    def __init__(self, width_multiplier: float = 1.0):
        super().__init__()
        if width_multiplier < 1 / 64:
            raise InputError(
                f"width_multiplier must be at least 1/64, where the first layer has one channel, got "
                f"{width_multiplier}."
            )
        c64, c128, c256, c512, c1024, c2048, c4096 = (
            round(channels * width_multiplier) for channels in (64, 128, 256, 512, 1024, 2048, 4096)
        )
        self.channels: dict[str, int] = dict(zip(TAPS, (c128, c256, c512, c1024, c4096), strict=True))
        self.conv1a = nn.Conv2d(3, c64, 3, padding=1, bias=False)
        self.b2 = ResidualBlock(c64, c128, c128, stride=2)
        self.b2_1 = ResidualBlock(c128, c128, c128)
        self.b2_2 = ResidualBlock(c128, c128, c128)
        self.b3 = ResidualBlock(c128, c256, c256, stride=2)
        self.b3_1 = ResidualBlock(c256, c256, c256)
        self.b3_2 = ResidualBlock(c256, c256, c256)
        self.b4 = ResidualBlock(c256, c512, c512, stride=2)
        self.b4_1 = ResidualBlock(c512, c512, c512)
        self.b4_2 = ResidualBlock(c512, c512, c512)
        self.b4_3 = ResidualBlock(c512, c512, c512)
        self.b4_4 = ResidualBlock(c512, c512, c512)
        self.b4_5 = ResidualBlock(c512, c512, c512)
        self.b5 = ResidualBlock(c512, c512, c1024, first_dilation=1, dilation=2)
        self.b5_1 = ResidualBlock(c1024, c512, c1024, dilation=2)
        self.b5_2 = ResidualBlock(c1024, c512, c1024, dilation=2)
        self.b6 = BottleneckBlock(c1024, c2048, dilation=4, dropout=0.3)
        self.b7 = BottleneckBlock(c2048, c4096, dilation=4, dropout=0.5)
        self.bn7 = nn.BatchNorm2d(c4096)

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Map (B, 3, H, W) to the maps of `TAPS`, each side divided by `TAP_STRIDES` and rounded up."""
        features = self.conv1a(pixel_values)
        for block in (self.b2, self.b2_1, self.b2_2):
            features, _ = block(features)
        features, conv2 = self.b3(features)
        for block in (self.b3_1, self.b3_2):
            features, _ = block(features)
        features, conv3 = self.b4(features)
        for block in (self.b4_1, self.b4_2, self.b4_3, self.b4_4, self.b4_5):
            features, _ = block(features)
        features, conv4 = self.b5(features)
        for block in (self.b5_1, self.b5_2):
            features, _ = block(features)
        features, conv5 = self.b6(features)
        features, _ = self.b7(features)
        conv6 = F.relu(self.bn7(features))
        return {"conv2": conv2, "conv3": conv3, "conv4": conv4, "conv5": conv5, "conv6": conv6}
