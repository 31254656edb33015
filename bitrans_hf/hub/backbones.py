"""Backbones by name, each giving feature maps, and what fine-tuning one takes: freezing, initializing, grouping.

AffinityNet and DeepLab choose among ResNet38, the encoder of a `BiTransModel`, and timm's networks, which
transformers' `TimmBackbone` builds. B images of H x W pixels, D channels, h x w a grid.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import initialization as init

from .configuration_bitrans import BiTransConfig
from .encoder import ClassTokenEncoder
from .errors import InputError
from .modeling_bitrans import BiTransModel
from .resnet38 import STAGES, TAP_STRIDES, TAPS, ResNet38


class Backbone(nn.Module):
    """A network that gives feature maps, shallow to deep; the base of those below.

    Attributes:
        out_indices: Which of the network's maps are given.
        channels: D of each given map.
        strides: Pixels per cell of each given map.
        size_multiple: Height and width that every map covers exactly are multiples of this; 1 where any size is taken
            as it is, with the last cells reaching over the edge.
    """

    out_indices: tuple[int, ...]
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    size_multiple: int

    def forward(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """Map (B, 3, H, W) to the chosen maps (B, D_i, h_i, w_i), shallow to deep."""
        raise NotImplementedError

    def stage_of_parameters(self) -> dict[str, int]:
        """Return the stage of each parameter by its name; stage 0 sees the pixels."""
        raise NotImplementedError


class ResNet38Backbone(Backbone):
    """`ResNet38`; its maps are `TAPS`."""

    def __init__(self, options: Mapping[str, Any], out_indices: Sequence[int] | int, output_stride: int | None):
        super().__init__()
        unknown = options.keys() - {"width_multiplier"}
        if unknown:
            raise InputError(f"backbone_config of resnet38 takes width_multiplier only, got {', '.join(unknown)}.")
        if output_stride not in (None, 8):
            raise InputError(f"the output stride of resnet38 is 8, got {output_stride}; leave output_stride out.")
        self.network = ResNet38(**options)
        self.out_indices = chosen_maps(out_indices, TAP_STRIDES)
        self.channels = tuple(self.network.channels[TAPS[index]] for index in self.out_indices)
        self.strides = tuple(TAP_STRIDES[index] for index in self.out_indices)
        self.size_multiple = 1

    def forward(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """Map (B, 3, H, W) to the chosen maps."""
        taps = self.network(pixel_values)
        return [taps[TAPS[index]] for index in self.out_indices]

    def stage_of_parameters(self) -> dict[str, int]:
        """Stage 0 is conv1a, stage 1 is b2, and so on to b7."""
        stages = {module: stage for stage, modules in enumerate(STAGES) for module in modules}
        return {name: stages[name.split(".")[1]] for name, _ in self.named_parameters()}


class BiTransBackbone(Backbone):
    """The encoder of a `BiTransModel`, class tokens included; its maps are the patch tokens after each layer.

    Tokens are layer-normalized without parameters: the residual stream of a pre-norm transformer grows with depth.

    An output stride below the patch size makes patches overlap (Amir et al., arXiv:2112.05814): a finer grid at the
    cost of more tokens, with the position embeddings resized to it.
    """

    def __init__(self, options: Mapping[str, Any], out_indices: Sequence[int] | int, output_stride: int | None):
        super().__init__()
        if not options:
            raise InputError("backbone 'bitrans' needs backbone_config, the config of a BiTransModel as a dict.")
        config = BiTransConfig.from_dict(dict(options))
        stride = config.patch_size if output_stride is None else output_stride
        if not 1 <= stride <= config.patch_size or config.patch_size % stride:
            raise InputError(
                f"output_stride of backbone 'bitrans' must divide its patch size {config.patch_size}, got {stride}."
            )
        self.out_indices = chosen_maps(out_indices, (stride,) * config.num_hidden_layers)
        # What the last map does not need would be a parameter without gradient.
        self.encoder = ClassTokenEncoder(config, num_layers=self.out_indices[-1] + 1)
        self.patch_size, self.stride = config.patch_size, stride
        self.channels = (config.hidden_size,) * len(self.out_indices)
        self.strides = (stride,) * len(self.out_indices)
        self.size_multiple = stride

    def forward(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """Map (B, 3, H, W) to the chosen maps."""
        margin = self.patch_size - self.stride
        # Half the overlap on each side centers patch i on the pixels from i * stride on.
        before, after = margin // 2, margin - margin // 2
        tokens, grid = self.encoder.embed(F.pad(pixel_values, (before, after, before, after)), self.stride)
        num_patches, maps = grid[0] * grid[1], []
        for index, layer in enumerate(self.encoder.layers):
            tokens, _, _ = layer(tokens, with_map=False)
            if index in self.out_indices:
                maps.append(token_map(tokens[:, -num_patches:], grid))
        return maps

    def stage_of_parameters(self) -> dict[str, int]:
        """Stage 0 is the embedding of patches and class tokens, stage i the i-th layer."""
        prefix = "encoder.layers."
        return {
            name: int(name.removeprefix(prefix).split(".")[0]) + 1 if name.startswith(prefix) else 0
            for name, _ in self.named_parameters()
        }


class TimmFeatures(Backbone):
    """A timm network by name, built by transformers' `TimmBackbone`, without pretrained weights.

    Plain vision transformers take images of any size (timm's `dynamic_img_size`), and their tokens are
    layer-normalized as those of `BiTransBackbone`; other networks' maps are given as they are.
    """

    def __init__(
        self, name: str, options: Mapping[str, Any], out_indices: Sequence[int] | int, output_stride: int | None
    ):
        super().__init__()
        if isinstance(out_indices, int):
            # The network itself knows how many maps it has; on the meta device asking costs no memory.
            with torch.device("meta"):
                probe = timm_network(name, options, (-1,), output_stride)
            out_indices = chosen_maps(out_indices, reductions(probe))
        self.network = timm_network(name, options, out_indices, output_stride)
        strides = reductions(self.network)
        self.out_indices = chosen_maps(out_indices, strides)
        self.channels = tuple(self.network.num_features[index] for index in self.out_indices)
        self.strides = tuple(strides[index] for index in self.out_indices)
        self.size_multiple = max(self.strides)
        self.is_plain = len(set(strides)) == 1

    def forward(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """Map (B, 3, H, W) to the chosen maps."""
        maps = []
        for given, channels in zip(self.network(pixel_values).feature_maps, self.channels, strict=True):
            # Swin and its like keep channels last.
            feature_map = given if given.shape[1] == channels else given.permute(0, 3, 1, 2).contiguous()
            if self.is_plain:
                feature_map = token_map(feature_map.flatten(2).transpose(1, 2), feature_map.shape[2:])
            maps.append(feature_map)
        return maps

    def stage_of_parameters(self) -> dict[str, int]:
        """The stages that timm names, with what comes before each."""
        # timm wraps vision transformers as "model" and flattens "stages.0" to "stages_0" in other networks.
        modules = [name.removeprefix("model.").replace(".", "_") for name, _ in self.network._backbone.named_modules()]
        ends = []
        for stage in (name.replace(".", "_") for name in self.network.stage_names):
            inside = [i for i, module in enumerate(modules) if module == stage or module.startswith(f"{stage}_")]
            ends.append(max(inside, default=len(modules)))
        stages = {}
        for i, (module_name, module) in enumerate(self.network._backbone.named_modules()):
            stage = next((number for number, end in enumerate(ends) if i <= end), len(ends) - 1)
            for name, _ in module.named_parameters(recurse=False):
                stages[".".join(["network._backbone", *filter(None, [module_name]), name])] = stage
        return stages


def build_backbone(
    name: str,
    options: Mapping[str, Any] | None,
    *,
    out_indices: Sequence[int] | int,
    output_stride: int | None,
) -> Backbone:
    """Build a backbone with new weights.

    Args:
        name: "resnet38", "bitrans", or a timm network.
        options: For resnet38 `width_multiplier`; for bitrans the `BiTransConfig` as a dict; for timm arguments of
            `timm.create_model`.
        out_indices: Which maps, counted from the shallowest; a number n for the last n maps of a network with several
            strides, and for n layers evenly spread, the last among them, of one with a single stride.
        output_stride: Pixels per cell of the deepest map; None for the network's own.

    Raises:
        ValueError: unknown network, options, index or output stride; the message says what is allowed.
        ImportError: a timm network is asked for and timm is not installed.
    """
    if name == "resnet38":
        return ResNet38Backbone(options or {}, out_indices, output_stride)
    if name == "bitrans":
        return BiTransBackbone(options or {}, out_indices, output_stride)
    return TimmFeatures(name, options or {}, out_indices, output_stride)


def chosen_maps(out_indices: Sequence[int] | int, strides: Sequence[int]) -> tuple[int, ...]:
    """Resolve `out_indices` of `build_backbone` against the strides of all maps of a network.

    Example:
        >>> chosen_maps(3, (2, 4, 8, 16, 32)), chosen_maps(3, (16,) * 12), chosen_maps([-2, -1], (4, 8, 16))
        ((2, 3, 4), (3, 7, 11), (1, 2))
    """
    total = len(strides)
    if isinstance(out_indices, int):
        number = min(out_indices, total)
        if len(set(strides)) > 1:
            return tuple(range(total - number, total))
        return tuple(round(total * (i + 1) / number) - 1 for i in range(number))
    indices = tuple(index + total if index < 0 else index for index in out_indices)
    if not indices or list(indices) != sorted(set(indices)) or not 0 <= indices[0] <= indices[-1] < total:
        raise InputError(
            f"out_indices must rise and lie in [0, {total}), the backbone's {total} feature maps, got "
            f"{list(out_indices)}."
        )
    return indices


def reductions(network: Any) -> list[int]:
    """Pixels per cell of all maps of a `TimmBackbone`."""
    return [stage["reduction"] for stage in network._backbone.feature_info.info]


def timm_network(name: str, options: Mapping[str, Any], out_indices: Sequence[int], output_stride: int | None) -> Any:
    """Build a `TimmBackbone` with new weights; TimmBackbone itself asks for timm where it is not installed."""
    from transformers import TimmBackbone, TimmBackboneConfig  # here: they load timm, which other backbones can spare

    # `out_indices` is a property of the config's, which mypy does not see among its fields.
    make_config: Any = TimmBackboneConfig
    config = make_config(backbone=name, out_indices=list(out_indices), output_stride=output_stride)
    try:
        try:
            return TimmBackbone(config, **{"dynamic_img_size": True, **options})
        except TypeError:  # a network without position embeddings; other options that it does not know, fail again
            return TimmBackbone(config, **options)
    except RuntimeError as error:
        raise InputError(
            f"backbone must be resnet38, bitrans or a timm network, got {name!r} ({error}); timm.list_models() names "
            "those."
        ) from error
    except (AssertionError, NotImplementedError, TypeError) as error:
        if output_stride is None:
            raise
        raise InputError(
            f"backbone {name!r} cannot have output_stride {output_stride}; leave it out, or take a ResNet or ConvNeXt "
            "(8, 16 or 32)."
        ) from error


def token_map(tokens: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Layer-normalize tokens (B, N, D), without parameters, and lay them out as (B, D, h, w)."""
    normalized = F.layer_norm(tokens.float(), tokens.shape[-1:]).to(tokens.dtype)
    grid: torch.Tensor = normalized.transpose(1, 2).unflatten(2, tuple(size))
    return grid.contiguous()


# ---- A trained Bi-Trans encoder as the backbone of another network.


def bitrans_options(bitrans: BiTransModel) -> dict[str, Any]:
    """Return the `backbone_config` of backbone "bitrans" for the encoder of `bitrans`."""
    options: dict[str, Any] = bitrans.config.to_diff_dict()
    # Files of the Hub that hold the code of the Bi-Trans model itself; the new model brings its own.
    return {name: value for name, value in options.items() if name not in ("auto_map", "custom_pipelines")}


def copy_encoder(bitrans: BiTransModel, model: nn.Module) -> None:
    """Copy the weights of an encoder into `model.backbone`, a `BiTransBackbone`."""
    weights = bitrans.state_dict()
    encoder = model.get_submodule("backbone.encoder")
    encoder.load_state_dict({name: weights[name] for name in encoder.state_dict()})


# ---- Training.


def apply_freezing(backbone: Backbone, num_frozen_stages: int, freeze_batch_norm: bool) -> None:
    """Freeze the first stages and BatchNorm of a backbone; called again whenever the mode changes.

    Args:
        backbone: Changed in place: frozen parameters lose `requires_grad`, their BatchNorm goes to evaluation mode.
        num_frozen_stages: How many stages from the pixels on; -1 for all.
        freeze_batch_norm: Keep the statistics, the scale and the shift of every BatchNorm.
    """
    if num_frozen_stages:
        stages = backbone.stage_of_parameters()
        for name, parameter in backbone.named_parameters():
            if num_frozen_stages < 0 or stages[name] < num_frozen_stages:
                parameter.requires_grad_(False)
    if num_frozen_stages < 0:
        backbone.eval()  # nor dropout in what is not trained
    for module in backbone.modules():
        if isinstance(module, _BatchNorm) and (freeze_batch_norm or not module.weight.requires_grad):
            module.eval().requires_grad_(False)


def parameter_groups(
    model: nn.Module, rates: Mapping[str, float], *, bias_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Sort the trained parameters into groups for an optimizer, as PSA and DeepLab do.

    Args:
        model: Its parameters without `requires_grad` are left out.
        rates: How many times the learning rate each part of the model gets, by the part's name.
        bias_rate: How many times the learning rate biases get, on top of their part's.
        weight_decay: For weights; biases, scales of norms, tokens and position embeddings have none.

    Returns:
        Groups with "params", "rate_multiplier", "weight_decay", and "name": the part, then "weights", "biases" or
        "scales". Empty groups are left out.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = name.split(".")[0]
        kind, rate, decay = "scales", rates[part], 0.0
        if name.endswith("bias"):
            kind, rate = "biases", rate * bias_rate
        elif parameter.ndim > 1 and not name.endswith(("_tokens", "_token", "_position", "pos_embed")):
            kind, decay = "weights", weight_decay
        empty = {"name": f"{part} {kind}", "rate_multiplier": rate, "weight_decay": decay, "params": []}
        groups.setdefault(f"{part} {kind}", empty)["params"].append(parameter)
    return list(groups.values())


def init_convolutional(module: nn.Module) -> None:
    """Give the modules of ResNet38 and of heads their start values, through transformers' `init`.

    Convolutions: He et al.'s normal distribution over the fan-out, biases torch's default. Norms: identity.
    """
    if isinstance(module, nn.Conv2d):
        init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        init_bias(module)
    elif isinstance(module, _BatchNorm | nn.GroupNorm):
        init.ones_(module.weight)
        init.zeros_(module.bias)
    if isinstance(module, _BatchNorm):
        for name, buffer in module.named_buffers(recurse=False):
            (init.ones_ if name == "running_var" else init.zeros_)(buffer)


def init_bias(module: nn.Conv2d) -> None:
    """Draw the bias as torch does by default: U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    if module.bias is not None:
        bound = module.weight[0].numel() ** -0.5
        init.uniform_(module.bias, -bound, bound)
