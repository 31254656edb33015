"""Pretrained weights of other systems in our networks.

DeiT from timm and MCTformer's checkpoints as a `BiTransModel`; PSA's and MCTformer's ResNet38 networks as AffinityNet
and DeepLab; ImageNet weights for their backbones, from timm or from MXNet's `.params`, which is read without mxnet.
"""

import argparse
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file

from .backbones import ResNet38Backbone, TimmFeatures
from .configuration_affinitynet import AffinityNetConfig
from .configuration_bitrans import BiTransConfig
from .configuration_deeplab import DeepLabConfig
from .errors import InputError, MissingFileError
from .modeling_affinitynet import AffinityNetModel
from .modeling_bitrans import BiTransModel
from .modeling_cam import CamModel
from .modeling_deeplab import DeepLabForSemanticSegmentation

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
        raise InputError(
            f"timm has no pretrained model {name!r}; name one such as 'deit_small_patch16_224.fb_in1k' "
            "(timm.list_pretrained('deit*') lists them)."
        )
    try:
        model: Any = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:
        raise MissingFileError(
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
        raise InputError(
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
        raise InputError(f"the checkpoint has {num_classes} classes, id2label names {len(id2label)}.")
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
        raise MissingFileError(f"no weights file at {path}; expected a .safetensors or .pth file.")
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix == ".params":
        return read_mxnet_params(path)
    # DeiT and MCTformer save their parsed arguments beside the weights: a Namespace is admitted, nothing else is.
    with torch.serialization.safe_globals([argparse.Namespace]):
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    return dict(loaded.get("model", loaded))


def _required(state: StateDict, name: str) -> torch.Tensor:
    if name not in state:
        raise InputError(f"the weights have no {name!r}; expected a vision transformer in timm's names (DeiT).")
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
            raise InputError(f"{name} is {value} in the weights, got {config[name]}; leave it out.")
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
            found[name] = value  # DeiT's final LayerNorm among them, where the model has one
        elif not re.match(r"(norm|fc_norm|cls_token|pos_embed|head_dist|dist_token)\b|pos_embed_", key):
            raise InputError(
                f"the weights hold {key!r}, which the model has no place for; expected a DeiT or MCTformer."
            )
    _fill(model, found, new)
    return model


def _fill(module: nn.Module, found: StateDict, new: Collection[str] = ()) -> None:
    """Load `found`; all other tensors of `module` must be in `new`."""
    own = module.state_dict()
    missing = [name for name in own if name not in found and name not in new]
    if missing:
        raise InputError(f"the weights lack {len(missing)} tensors, first {missing[0]!r}; the file is not complete.")
    for name, value in found.items():
        if value.shape != own[name].shape:
            raise InputError(
                f"{name} has shape {tuple(value.shape)} in the weights, expected {tuple(own[name].shape)}."
            )
    module.load_state_dict({**own, **found})


# ---- AffinityNet, DeepLab and the plain CNN.

# PSA's and MCTformer's names of what is not ResNet38, and where it goes; other names are the trunk's own.
_HEADS = {"f8_3": "feature_head.", "f8_4": "feature_head.", "f8_5": "feature_head.", "f9": "feature_head.",
          "fc8_seg_conv1": "head.", "fc8_seg_conv2": "head."}  # fmt: skip
_TRUNK = "backbone.network."

# MXNet's names of the tensors of a layer.
_MXNET_TENSORS = {
    "weight": "weight", "gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_var": "running_var",
}  # fmt: skip


def affinitynet_from_psa(weights: StateDict | str | Path, **config: Any) -> AffinityNetModel:
    """Build an `AffinityNetModel` on ResNet38 from a checkpoint of PSA's or MCTformer's AffinityNet.

    Args:
        weights: State dict in PSA's names, or a `.pth` or `.safetensors` file of one.
        **config: Further fields of `AffinityNetConfig`; the backbone and its width are read off the weights.

    Raises:
        ValueError: names or shapes do not fit.
        FileNotFoundError: there is no such file.
    """
    state = _public_resnet38(_state_dict(weights))
    model = AffinityNetModel(AffinityNetConfig(backbone_config=_width(state), **config))
    _fill_public(model, state)
    return model


def deeplab_from_mctformer(
    weights: StateDict | str | Path, *, id2label: Mapping[int, str] | None = None, **config: Any
) -> DeepLabForSemanticSegmentation:
    """Build a `DeepLabForSemanticSegmentation` on ResNet38 from a checkpoint of MCTformer's segmentation network.

    Args:
        weights: State dict in MCTformer's names, or a `.pth` or `.safetensors` file of one.
        id2label: Names of the 1 + C labels, background first; None for VOC's where there are 21, else numbered ones.
        **config: Further fields of `DeepLabConfig`; backbone, width and number of labels are read off the weights.

    Raises:
        ValueError: names or shapes do not fit, or `id2label` has another number of labels.
        FileNotFoundError: there is no such file.
    """
    state = _public_resnet38(_state_dict(weights))
    classifier = state.get("head.fc8_seg_conv2.weight")
    if classifier is None:
        raise InputError("the weights have no 'fc8_seg_conv2.weight'; expected MCTformer's segmentation network.")
    num_labels = len(classifier)
    if id2label is not None and len(id2label) != num_labels:
        raise InputError(f"the checkpoint has {num_labels} labels, id2label names {len(id2label)}.")
    labels = {"num_labels": num_labels} if id2label is None else {"id2label": dict(id2label)}
    model = DeepLabForSemanticSegmentation(DeepLabConfig(backbone_config=_width(state), **labels, **config))
    _fill_public(model, state)
    return model


def load_backbone(
    model: AffinityNetModel | CamModel | DeepLabForSemanticSegmentation,
    weights: StateDict | str | Path | None = None,
) -> None:
    """Give the backbone of a network pretrained weights; its head is left as it is.

    Args:
        model: With backbone resnet38 or a timm network; a bitrans backbone comes with `from_bitrans`.
        weights: For resnet38 MXNet's ImageNet weights (`ilsvrc-cls_rna-a1_cls1000_ep-0001.params`), or a checkpoint of
            PSA or MCTformer such as `res38_cls.pth`; heads in it are not read. For a timm network a file or state dict
            in timm's own names, or None for the weights of timm's default tag, from the Hub or its local cache.

    Raises:
        ValueError: names or shapes do not fit, or the backbone takes no such weights.
        FileNotFoundError: there is no such file.
        OSError: timm's weights are neither cached nor can be downloaded.
    """
    backbone = model.backbone
    if isinstance(backbone, TimmFeatures):
        _load_timm(model, weights)
    elif isinstance(backbone, ResNet38Backbone) and weights is not None:
        state = _public_resnet38(_state_dict(weights))
        trunk = {name.removeprefix(_TRUNK): value for name, value in state.items() if name.startswith(_TRUNK)}
        unknown = [name for name in trunk if name not in backbone.network.state_dict() and name != "fc8.weight"]
        if unknown:
            raise InputError(f"the weights hold {unknown[0]!r}, which ResNet38 has no place for.")
        trunk.pop("fc8.weight", None)  # the classifier of res38_cls
        _fill(backbone.network, trunk, _batch_counters(backbone.network))
    else:
        raise InputError(
            f"backbone {model.config.backbone!r} takes no such weights; give a file for resnet38, and build one on a "
            "Bi-Trans encoder with from_bitrans."
        )


def read_mxnet_params(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a `.params` file of MXNet, a list of dense arrays with names, without mxnet.

    The format is that of `NDArray::Save` in MXNet 0.5 to 1.9: a header, the arrays (each with its own version, shape,
    device and type), and their names, all little-endian.

    Args:
        path: The file; its arrays are copied.

    Returns:
        Tensors by name, such as "arg:conv1a_weight" and "aux:bn7_moving_mean".

    Raises:
        ValueError: the file is no such list, ends early, or holds a sparse array or one of an unknown type.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"no weights file at {path}; expected a .params file of MXNet.")
    reader = _MxnetReader(path)
    if reader.numbers("<u8", 1) != [_MXNET_LIST]:
        raise InputError(f"{path.name} is no list of MXNet arrays: it does not start with 0x112.")
    reader.numbers("<u8", 1)  # reserved
    arrays = [reader.array() for _ in range(reader.numbers("<u8", 1)[0])]
    names = [reader.text() for _ in range(reader.numbers("<u8", 1)[0])]
    if len(names) != len(arrays) or reader.rest():
        raise InputError(
            f"{path.name} holds {len(arrays)} arrays, {len(names)} names and {reader.rest()} bytes more; expected a "
            "name for each array and nothing after."
        )
    return dict(zip(names, arrays, strict=True))


_MXNET_LIST = 0x112
# First four bytes of an array. Before the first version they were the number of dimensions.
_MXNET_V1, _MXNET_V2, _MXNET_V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA
_MXNET_TYPES = {0: "<f4", 1: "<f8", 2: "<f2", 3: "u1", 4: "<i4", 5: "i1", 6: "<i8", 7: "?"}


class _MxnetReader:
    """Reads a file from its beginning; a number of bytes that is not there is an error by name."""

    def __init__(self, path: Path):
        self.name = path.name
        self.bytes = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
        self.position = 0

    def rest(self) -> int:
        return len(self.bytes) - self.position

    def values(self, dtype: str, count: int) -> np.ndarray:
        size = np.dtype(dtype).itemsize * count
        if size > self.rest():
            raise InputError(
                f"{self.name} ends early: {size} bytes are missing after byte {self.position}, {self.rest()} are left."
            )
        part = self.bytes[self.position : self.position + size]
        self.position += size
        return np.array(part).view(dtype)

    def numbers(self, dtype: str, count: int) -> list[int]:
        return [int(number) for number in self.values(dtype, count)]

    def text(self) -> str:
        return self.values("u1", self.numbers("<u8", 1)[0]).tobytes().decode()

    def array(self) -> torch.Tensor:
        version = self.numbers("<u4", 1)[0]
        if version in (_MXNET_V2, _MXNET_V3) and self.numbers("<i4", 1) != [0]:
            raise InputError(f"{self.name} holds a sparse array; only dense ones are read.")
        if version in (_MXNET_V1, _MXNET_V2, _MXNET_V3):
            dimensions, size_type = self.numbers("<i4", 1)[0], "<i8"
        else:
            dimensions, size_type = version, "<u4"
        unset = -1 if version == _MXNET_V3 else 0  # a scalar has no dimensions in the third version
        if dimensions == unset:
            return torch.zeros(0)
        if not 0 <= dimensions <= 32:
            raise InputError(f"{self.name} holds an array of {dimensions} dimensions; expected at most 32.")
        shape = self.numbers(size_type, dimensions)
        self.numbers("<i4", 2)  # the device it was on
        kind = self.numbers("<i4", 1)[0]
        if kind not in _MXNET_TYPES:
            raise InputError(f"{self.name} holds an array of MXNet's type {kind}; expected 0 to 7.")
        return torch.from_numpy(self.values(_MXNET_TYPES[kind], math.prod(shape)).reshape(shape))


def _public_resnet38(state: StateDict) -> dict[str, torch.Tensor]:
    """Rename MXNet's, PSA's and MCTformer's tensors to those of our networks."""
    renamed = {}
    for key, value in state.items():
        name = key.removeprefix("module.")  # of a model in DataParallel
        if name.startswith(("arg:", "aux:")):
            name = _from_mxnet(name)
            if name.startswith("linear1000"):  # ImageNet's classifier
                continue
        prefix = _HEADS.get(name.split(".")[0], _TRUNK)
        renamed[prefix + name] = value
    if f"{_TRUNK}conv1a.weight" not in renamed:
        raise InputError("the weights have no 'conv1a.weight'; expected a network on ResNet38 (PSA or MCTformer).")
    return renamed


def _from_mxnet(name: str) -> str:
    """Turn MXNet's name of a tensor of ResNet38 into PSA's: "arg:res2b1_branch2a_weight" is b2_1.conv_branch2a.weight.

    Example:
        >>> _from_mxnet("aux:bn5a_branch2b1_moving_var"), _from_mxnet("arg:bn7_gamma")
        ('b5.bn_branch2b1.running_var', 'bn7.weight')
    """
    match = re.fullmatch(r"(?:arg|aux):(\w+?)_(weight|bias|gamma|beta|moving_mean|moving_var)", name)
    if match is None:
        return name
    layer, tensor = match[1], _MXNET_TENSORS.get(match[2], match[2])
    block = re.fullmatch(r"(res|bn)(\d)[a-z](\d*)_(branch\w+)", layer)
    if block is not None:
        kind, stage, number, branch = block.groups()
        layer = f"b{stage}{'_' if number else ''}{number}.{'conv' if kind == 'res' else 'bn'}_{branch}"
    return f"{layer}.{tensor}"


def _width(state: StateDict) -> dict[str, float]:
    """`backbone_config` of the trunk that the weights belong to."""
    return {"width_multiplier": len(state[f"{_TRUNK}conv1a.weight"]) / 64}


def _batch_counters(module: nn.Module) -> list[str]:
    """Names of tensors that older checkpoints lack, and that nothing but a cumulative average reads."""
    return [name for name in module.state_dict() if name.endswith("num_batches_tracked")]


def _fill_public(model: nn.Module, state: StateDict) -> None:
    unknown = [name for name in state if name not in model.state_dict()]
    if unknown:
        public = unknown[0].removeprefix(_TRUNK)
        raise InputError(f"the weights hold {public!r}, which a {type(model).__name__} has no place for.")
    _fill(model, state, _batch_counters(model))


def _load_timm(
    model: AffinityNetModel | CamModel | DeepLabForSemanticSegmentation, weights: StateDict | str | Path | None
) -> None:
    """Let timm itself read the weights: it knows the classifier and the names of its older files."""
    config = model.config
    options = {"pretrained": True, **(config.backbone_config or {})}
    overlay: dict[str, Any] | None = None
    if weights is not None:
        state = dict(_state_dict(weights))
        known: Any = timm.get_pretrained_cfg(config.backbone)
        classifiers = known.classifier if known is not None and known.classifier is not None else ()
        for layer in (classifiers,) if isinstance(classifiers, str) else classifiers:
            state.pop(f"{layer}.weight", None)
            state.pop(f"{layer}.bias", None)
        # The whole network first, without classes: one of features alone takes what does not fit without a word.
        overlay = {"state_dict": state, "num_classes": 0}
        try:
            whole: Any = timm.create_model(config.backbone, pretrained_cfg_overlay=overlay, num_classes=0, **options)
        except RuntimeError as error:
            raise InputError(f"the weights do not fit {config.backbone!r}: {error}") from error
        overlay = {"state_dict": whole.state_dict()}
    try:
        features: Any = timm.create_model(
            config.backbone,
            pretrained_cfg_overlay=overlay,
            features_only=True,
            out_indices=model.backbone.out_indices,
            output_stride=config.output_stride,
            **options,
        )
    except Exception as error:
        raise MissingFileError(
            f"could not get the weights of {config.backbone!r} ({type(error).__name__}: {error}); go online once, or "
            "give a file in timm's names."
        ) from error
    model.backbone.get_submodule("network._backbone").load_state_dict(features.state_dict())
