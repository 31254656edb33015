"""PSA's and MCTformer's networks on ResNet38d as plain functions of a state dict in the public names.

Written from their code's layer lists, without a class: the oracle of `resnet38` and of what is built on it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

State = dict[str, torch.Tensor]

# Block -> (input, middle, output channels, stride, dilations of its two 3x3 convolutions).
BLOCKS = {
    "b2": (64, 128, 128, 2, (1, 1)), "b2_1": (128, 128, 128, 1, (1, 1)), "b2_2": (128, 128, 128, 1, (1, 1)),
    "b3": (128, 256, 256, 2, (1, 1)), "b3_1": (256, 256, 256, 1, (1, 1)), "b3_2": (256, 256, 256, 1, (1, 1)),
    "b4": (256, 512, 512, 2, (1, 1)), "b4_1": (512, 512, 512, 1, (1, 1)), "b4_2": (512, 512, 512, 1, (1, 1)),
    "b4_3": (512, 512, 512, 1, (1, 1)), "b4_4": (512, 512, 512, 1, (1, 1)), "b4_5": (512, 512, 512, 1, (1, 1)),
    "b5": (512, 512, 1024, 1, (1, 2)), "b5_1": (1024, 512, 1024, 1, (2, 2)), "b5_2": (1024, 512, 1024, 1, (2, 2)),
}  # fmt: skip
BOTTLENECKS = {"b6": (1024, 512, 1024, 2048), "b7": (2048, 1024, 2048, 4096)}


def shapes(width: float = 1.0) -> dict[str, tuple[int, ...]]:
    """Shapes of the trunk's tensors under the public names, at a fraction of the width, without batch counters."""

    def c(channels: int) -> int:
        return int(channels * width)

    found: dict[str, tuple[int, ...]] = {"conv1a.weight": (c(64), 3, 3, 3)}

    def norm(name: str, channels: int) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            found[f"{name}.{part}"] = (c(channels),)

    for name, (inside, middle, outside, stride, _) in BLOCKS.items():
        norm(f"{name}.bn_branch2a", inside)
        found[f"{name}.conv_branch2a.weight"] = (c(middle), c(inside), 3, 3)
        norm(f"{name}.bn_branch2b1", middle)
        found[f"{name}.conv_branch2b1.weight"] = (c(outside), c(middle), 3, 3)
        if inside != outside or stride != 1:
            found[f"{name}.conv_branch1.weight"] = (c(outside), c(inside), 1, 1)
    for name, (inside, quarter, half, outside) in BOTTLENECKS.items():
        norm(f"{name}.bn_branch2a", inside)
        found[f"{name}.conv_branch2a.weight"] = (c(quarter), c(inside), 1, 1)
        norm(f"{name}.bn_branch2b1", quarter)
        found[f"{name}.conv_branch2b1.weight"] = (c(half), c(quarter), 3, 3)
        norm(f"{name}.bn_branch2b2", half)
        found[f"{name}.conv_branch2b2.weight"] = (c(outside), c(half), 1, 1)
        found[f"{name}.conv_branch1.weight"] = (c(outside), c(inside), 1, 1)
    norm("bn7", 4096)
    return found


def state(width: float = 1 / 32, seed: int = 0, more: dict[str, tuple[int, ...]] | None = None) -> State:
    """Random weights under the public names, with statistics of BatchNorm that differ from a fresh network's."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in {**shapes(width), **(more or {})}.items():
        values = torch.randn(shape, generator=generator)
        if len(shape) == 4:
            tensors[name] = values * (2.0 / values[0].numel()) ** 0.5
        elif name.endswith("running_var"):
            tensors[name] = values.abs() + 0.5
        else:
            tensors[name] = values * 0.2 + (1.0 if name.endswith("weight") else 0.0)
    return tensors


def trunk(state: State, images: torch.Tensor) -> State:
    """Maps conv4, conv5 and conv6 in evaluation; conv2 and conv3 are the inputs of b3 and b4 in the same form."""

    def bn_relu(name: str, x: torch.Tensor) -> torch.Tensor:
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return F.relu(F.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-5))

    taps = {}
    x = F.conv2d(images, state["conv1a.weight"], padding=1)
    for name, (_, _, _, stride, (first, second)) in BLOCKS.items():
        activated = bn_relu(f"{name}.bn_branch2a", x)
        taps[name] = activated
        if f"{name}.conv_branch1.weight" in state:
            x = F.conv2d(activated, state[f"{name}.conv_branch1.weight"], stride=stride)
        branch = F.conv2d(activated, state[f"{name}.conv_branch2a.weight"], None, stride, first, first)
        branch = bn_relu(f"{name}.bn_branch2b1", branch)
        x = x + F.conv2d(branch, state[f"{name}.conv_branch2b1.weight"], padding=second, dilation=second)
    for name in BOTTLENECKS:
        activated = bn_relu(f"{name}.bn_branch2a", x)
        taps[name] = activated
        branch = bn_relu(f"{name}.bn_branch2b1", F.conv2d(activated, state[f"{name}.conv_branch2a.weight"]))
        branch = F.conv2d(branch, state[f"{name}.conv_branch2b1.weight"], padding=4, dilation=4)
        branch = bn_relu(f"{name}.bn_branch2b2", branch)
        x = F.conv2d(activated, state[f"{name}.conv_branch1.weight"])
        x = x + F.conv2d(branch, state[f"{name}.conv_branch2b2.weight"])
    return {
        "conv2": taps["b3"], "conv3": taps["b4"], "conv4": taps["b5"], "conv5": taps["b6"], "conv6": bn_relu("bn7", x),
    }  # fmt: skip


def affinity_shapes(width: float = 1 / 32) -> dict[str, tuple[int, ...]]:
    """Shapes of what AffinityNet adds."""
    return {
        "f8_3.weight": (64, int(512 * width), 1, 1),
        "f8_4.weight": (128, int(1024 * width), 1, 1),
        "f8_5.weight": (256, int(4096 * width), 1, 1),
        "f9.weight": (448, 448, 1, 1),
    }


def affinity_features(state: State, images: torch.Tensor) -> torch.Tensor:
    """AffinityNet's features (B, 448, h, w)."""
    taps = trunk(state, images)
    parts = [
        F.elu(F.conv2d(taps[tap], state[f"{layer}.weight"]))
        for tap, layer in (("conv4", "f8_3"), ("conv5", "f8_4"), ("conv6", "f8_5"))
    ]
    return F.elu(F.conv2d(torch.cat(parts, dim=1), state["f9.weight"]))


def segmentation_shapes(num_labels: int, width: float = 1 / 32) -> dict[str, tuple[int, ...]]:
    """Shapes of what MCTformer's segmentation network adds."""
    return {
        "fc8_seg_conv1.weight": (512, int(4096 * width), 3, 3),
        "fc8_seg_conv1.bias": (512,),
        "fc8_seg_conv2.weight": (num_labels, 512, 3, 3),
        "fc8_seg_conv2.bias": (num_labels,),
    }


def segmentation_logits(state: State, images: torch.Tensor) -> torch.Tensor:
    """MCTformer's segmentation logits (B, 1 + C, h, w)."""
    hidden = trunk(state, images)["conv6"]
    first, second = "fc8_seg_conv1", "fc8_seg_conv2"
    hidden = F.relu(F.conv2d(hidden, state[f"{first}.weight"], state[f"{first}.bias"], padding=12, dilation=12))
    return F.conv2d(hidden, state[f"{second}.weight"], state[f"{second}.bias"], padding=12, dilation=12)
