"""Pretrained weights of other systems as a `BiTransModel`: DeiT from timm, and MCTformer's checkpoints."""

import argparse
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from .configuration_bitrans import BiTransConfig
from .modeling_bitrans import BiTransModel

StateDict = Mapping[str, torch.Tensor]

# timm's (and so DeiT's and MCTformer's) names, in the order in which they are replaced.
_RENAMES = (
    (r"^patch_embed\.proj\.", "patch_embed."),
    (r"^blocks\.", "layers."),
    (r"\.attn\.", ".attention."),
    (r"^head\.", "seg_head."),
)


def from_timm(
    name: str, *, id2label: Mapping[int, str], class_token_noise: float = 0.0, seed: int = 0, **config: Any
) -> BiTransModel:
    """Build a `BiTransModel` from a pretrained timm vision transformer, such as "deit_small_patch16_224.fb_in1k".

    The weights come from the Hub or its local cache; everything else is as in `from_timm_state_dict`.

    Raises:
        ValueError: timm has no pretrained model of that name, or it is no plain vision transformer.
        OSError: the weights are neither cached nor can be downloaded.
    """
    if not timm.is_model(name.split(".")[0]) or not timm.models.is_model_pretrained(name):
        raise ValueError(
            f"timm has no pretrained model {name!r}; name one such as 'deit_small_patch16_224.fb_in1k' "
            "(timm.list_pretrained('deit*') lists them)."
        )
    try:
        model: Any = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:
        raise OSError(
            f"could not get the weights of {name!r} ({type(error).__name__}: {error}); go online once, or save them "
            "as safetensors and use from_timm_state_dict."
        ) from error
    heads = model.blocks[0].attn.num_heads if hasattr(model, "blocks") else None
    return from_timm_state_dict(
        model.state_dict(),
        id2label=id2label,
        class_token_noise=class_token_noise,
        seed=seed,
        **{"num_attention_heads": heads, **config},
    )


def from_timm_state_dict(
    weights: StateDict | str | Path,
    *,
    id2label: Mapping[int, str],
    class_token_noise: float = 0.0,
    seed: int = 0,
    **config: Any,
) -> BiTransModel:
    """Build a `BiTransModel` from the weights of a timm vision transformer (DeiT), with one class token per class.

    The class token and its position are repeated C times, the position grid is resized bicubically (without
    antialiasing, as MCTformer) when `image_size` differs; classifier and final LayerNorm are left out, and the
    3x3 head is new.

    Args:
        weights: State dict in timm's names, or a `.safetensors` or `.pth` file of one.
        id2label: Names of the C object classes.
        class_token_noise: Standard deviation of the Gaussian noise added to each class token, as a multiple of the
            class token's own standard deviation. 0, the reference, leaves all class tokens identical, so that only the
            loss can tell them apart.
        seed: Seed of the noise and of the new head.
        **config: Fields of `BiTransConfig`; sizes that the weights fix may be left out.
            `num_attention_heads` defaults to hidden_size // 64, which all DeiT models have.

    Raises:
        ValueError: the weights are not those of a vision transformer with one class token.
        FileNotFoundError: there is no such file.
    """
    state = _state_dict(weights)
    cls_token, pos_embed = _required(state, "cls_token"), _required(state, "pos_embed")
    if cls_token.shape[1] != 1:
        raise ValueError(
            f"expected one class token, got {cls_token.shape[1]}; use from_mctformer for multi-class-token weights."
        )
    num_classes = len(id2label)
    model = _model_from_shapes(state, pos_embed[:, 1:], id2label, config, seed)
    grid = model.config.image_size // model.config.patch_size
    state = {key: value for key, value in state.items() if not key.startswith("head.")}
    state |= {
        "class_tokens": cls_token.repeat(1, num_classes, 1),
        "class_position": pos_embed[:, :1].repeat(1, num_classes, 1),
        "patch_position": _resized_grid(pos_embed[:, 1:], grid),
    }
    if class_token_noise:
        noise = torch.randn(1, num_classes, cls_token.shape[2], generator=torch.Generator().manual_seed(seed))
        state["class_tokens"] = state["class_tokens"] + class_token_noise * cls_token.float().std() * noise
    return _loaded(model, state, new=("seg_head.weight", "seg_head.bias"))


def from_mctformer(
    weights: StateDict | str | Path,
    *,
    id2label: Mapping[int, str],
    num_attention_heads: int | None = None,
    **config: Any,
) -> BiTransModel:
    """Build a `BiTransModel` from a public MCTformer V2 or MCTformer+ checkpoint.

    Args:
        weights: State dict, or a `.pth` file of the training script (its "model" entry is taken) or `.safetensors`.
        id2label: Names of the C object classes, in the checkpoint's order.
        num_attention_heads: None for hidden_size // 64; the shapes do not tell.
        **config: Further fields of `BiTransConfig`, such as the view; the sizes are read off the shapes.

    Raises:
        ValueError: names or shapes do not fit, or `id2label` has another number of classes.
        FileNotFoundError: there is no such file.
    """
    state = _state_dict(weights)
    cls_token = _required(state, "cls_token")
    num_classes = cls_token.shape[1]
    if len(id2label) != num_classes:
        raise ValueError(f"the checkpoint has {num_classes} classes, id2label names {len(id2label)}.")
    if "pos_embed" in state:  # V2: one tensor, class part first
        class_position, patch_position = state["pos_embed"][:, :num_classes], state["pos_embed"][:, num_classes:]
    else:  # MCTformer+
        class_position, patch_position = _required(state, "pos_embed_cls"), _required(state, "pos_embed_pat")
    model = _model_from_shapes(state, patch_position, id2label, {"num_attention_heads": num_attention_heads, **config})
    state |= {"class_tokens": cls_token, "class_position": class_position, "patch_position": patch_position}
    return _loaded(model, state, new=())


def _state_dict(weights: StateDict | str | Path) -> dict[str, torch.Tensor]:
    if isinstance(weights, Mapping):
        return dict(weights)
    path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {path}; expected a .safetensors or .pth file.")
    if path.suffix == ".safetensors":
        return load_file(path)
    # DeiT and MCTformer save their parsed arguments beside the weights: a Namespace is admitted, nothing else is.
    with torch.serialization.safe_globals([argparse.Namespace]):
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    return dict(loaded.get("model", loaded))


def _required(state: StateDict, name: str) -> torch.Tensor:
    if name not in state:
        raise ValueError(f"the weights have no {name!r}; expected a vision transformer in timm's names (DeiT).")
    return state[name]


def _model_from_shapes(
    state: StateDict, patch_position: torch.Tensor, id2label: Mapping[int, str], config: dict[str, Any], seed: int = 0
) -> BiTransModel:
    patch_weight = _required(state, "patch_embed.proj.weight")
    hidden_size, num_channels, patch_size = patch_weight.shape[:3]
    depths = [int(match[1]) for key in state if (match := re.match(r"blocks\.(\d+)\.", key))]
    sizes = {
        "hidden_size": hidden_size,
        "num_channels": num_channels,
        "patch_size": patch_size,
        "num_hidden_layers": 1 + max(depths, default=-1),
        "mlp_ratio": _required(state, "blocks.0.mlp.fc1.weight").shape[0] / hidden_size,
    }
    for name, value in sizes.items():
        if config.get(name, value) != value:
            raise ValueError(f"{name} is {value} in the weights, got {config[name]}; leave it out.")
    defaults = {"image_size": math.isqrt(patch_position.shape[1]) * patch_size}
    given = {name: value for name, value in config.items() if value is not None}
    heads = given.pop("num_attention_heads", max(1, hidden_size // 64))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BiTransModel(
            BiTransConfig(id2label=dict(id2label), num_attention_heads=heads, **{**defaults, **given, **sizes})
        )


def _resized_grid(patch_position: torch.Tensor, grid: int) -> torch.Tensor:
    side = math.isqrt(patch_position.shape[1])
    if side == grid:
        return patch_position
    square = patch_position.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    return F.interpolate(square, size=(grid, grid), mode="bicubic").flatten(2).transpose(1, 2)


def _loaded(model: BiTransModel, state: StateDict, new: tuple[str, ...]) -> BiTransModel:
    own = model.state_dict()
    found: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        name = key
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        if name in own:
            found[name] = value
        elif not re.match(r"(norm|fc_norm|cls_token|pos_embed|head_dist|dist_token)\b|pos_embed_", key):
            raise ValueError(
                f"the weights hold {key!r}, which the model has no place for; expected a DeiT or MCTformer."
            )
    missing = [name for name in own if name not in found and name not in new]
    if missing:
        raise ValueError(f"the weights lack {len(missing)} tensors, first {missing[0]!r}; the file is not complete.")
    for name, value in found.items():
        if value.shape != own[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} in the weights, expected {tuple(own[name].shape)}."
            )
    model.load_state_dict({**own, **found})
    return model
