"""Pretrained weights of other systems in our networks.

DeiT from timm and MCTformer's checkpoints as a `BiTransModel`; PSA's and MCTformer's ResNet38 networks as AffinityNet
and DeepLab; ImageNet weights for their backbones, from timm or from MXNet's `.params`, which is read without mxnet.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

from .checkpoints import Checkpoint, StateDict, read_checkpoint
from .hub.backbones import ResNet38Backbone, TimmFeatures
from .hub.configuration_affinitynet import AffinityNetConfig
from .hub.configuration_bitrans import BiTransConfig
from .hub.configuration_deeplab import DeepLabConfig
from .hub.errors import InputError, MissingFileError
from .hub.modeling_affinitynet import AffinityNetModel
from .hub.modeling_bitrans import BiTransModel
from .hub.modeling_cam import CamModel
from .hub.modeling_deeplab import DeepLabForSemanticSegmentation
from .hub_errors import hub_error_sentence

_VISION_TRANSFORMER = ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight")
_RESNET38 = ("conv1a.weight", "b7.conv_branch1.weight", "arg:conv1a_weight")
"""Names that identify the network in a checkpoint, see `read_checkpoint`."""

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
        ValueError: timm has no pretrained model of that name, or it is not a plain vision transformer.
        MissingFileError: the weights are not cached and cannot be downloaded.
    """
    if not timm.is_model(name.split(".")[0]) or not timm.models.is_model_pretrained(name):
        raise InputError(
            f"timm has no pretrained model {name!r}; name one such as 'deit_small_patch16_224.fb_in1k' "
            "(timm.list_pretrained('deit*') lists them)."
        )
    model = _from_the_hub(name, lambda: timm.create_model(name, pretrained=True, num_classes=0))
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
        weights: State dict in timm's names, or a file of one; wrapped or prefixed as `read_checkpoint` finds it.
        id2label: Names of the C object classes.
        class_token_noise: Standard deviation of the Gaussian noise added to each class token, as a multiple of the
            class token's own standard deviation. 0, the reference, leaves all class tokens identical, so that only the
            loss can separate them.
        seed: Seed of the noise and of the new head.
        **config: Fields of `BiTransConfig`; sizes that the weights fix may be left out.
            `num_attention_heads` defaults to hidden_size // 64, which all DeiT models have.

    Raises:
        ValueError: the weights are not those of a vision transformer with one class token.
        FileNotFoundError: there is no such file.
    """
    checkpoint = read_checkpoint(weights, _VISION_TRANSFORMER)
    cls_token, pos_embed = _required(checkpoint, "cls_token"), _required(checkpoint, "pos_embed")
    if cls_token.shape[1] != 1:
        raise InputError(
            f"{checkpoint.name}: expected one class token, got {cls_token.shape[1]}; use from_mctformer for "
            "multi-class-token weights."
        )
    num_classes = len(id2label)
    model = _model_from_shapes(checkpoint, pos_embed[:, 1:], id2label, config, seed)
    grid = model.config.image_size // model.config.patch_size
    state = {key: value for key, value in checkpoint.tensors.items() if not key.startswith("head.")}
    state |= {
        "class_tokens": cls_token.repeat(1, num_classes, 1),
        "class_position": pos_embed[:, :1].repeat(1, num_classes, 1),
        "patch_position": _resized_grid(pos_embed[:, 1:], grid),
    }
    if class_token_noise:
        noise = torch.randn(1, num_classes, cls_token.shape[2], generator=torch.Generator().manual_seed(seed))
        state["class_tokens"] = state["class_tokens"] + class_token_noise * cls_token.float().std() * noise
    return _loaded(model, Checkpoint(state, checkpoint.name), new=("seg_head.weight", "seg_head.bias"))


def from_mctformer(
    weights: StateDict | str | Path,
    *,
    id2label: Mapping[int, str],
    num_attention_heads: int | None = None,
    **config: Any,
) -> BiTransModel:
    """Build a `BiTransModel` from a public MCTformer V2 or MCTformer+ checkpoint.

    Args:
        weights: State dict, or a file of one, such as the training script's `.pth`; see `read_checkpoint`.
        id2label: Names of the C object classes, in the checkpoint's order.
        num_attention_heads: None for hidden_size // 64; the shapes do not determine it.
        **config: Further fields of `BiTransConfig`, such as the view; the sizes are read off the shapes.

    Raises:
        ValueError: names or shapes do not fit, or `id2label` has another number of classes.
        FileNotFoundError: there is no such file.
    """
    checkpoint = read_checkpoint(weights, _VISION_TRANSFORMER)
    state, cls_token = checkpoint.tensors, _required(checkpoint, "cls_token")
    num_classes = cls_token.shape[1]
    if len(id2label) != num_classes:
        raise InputError(f"{checkpoint.name}: {num_classes} classes, id2label names {len(id2label)}; name each one.")
    if "pos_embed" in state:  # V2: one tensor, class part first
        class_position, patch_position = state["pos_embed"][:, :num_classes], state["pos_embed"][:, num_classes:]
    else:  # MCTformer+
        class_position, patch_position = (_required(checkpoint, f"pos_embed_{part}") for part in ("cls", "pat"))
    config = {"num_attention_heads": num_attention_heads, **config}
    model = _model_from_shapes(checkpoint, patch_position, id2label, config)
    moved = {"class_tokens": cls_token, "class_position": class_position, "patch_position": patch_position}
    return _loaded(model, Checkpoint({**state, **moved}, checkpoint.name), new=())


def _required(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    if name not in checkpoint.tensors:
        raise InputError(
            f"{checkpoint.name} lacks {name!r}; expected a vision transformer in timm's names (DeiT), found "
            f"{_first(checkpoint)}."
        )
    return checkpoint.tensors[name]


def _first(checkpoint: Checkpoint) -> str:
    """The first names of a checkpoint, for messages."""
    names = list(checkpoint.tensors)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _model_from_shapes(
    checkpoint: Checkpoint,
    patch_position: torch.Tensor,
    id2label: Mapping[int, str],
    config: Mapping[str, Any],
    seed: int = 0,
) -> BiTransModel:
    patch_weight = _required(checkpoint, "patch_embed.proj.weight")
    hidden_size, num_channels, patch_size = patch_weight.shape[:3]
    depths = [int(match[1]) for key in checkpoint.tensors if (match := re.match(r"blocks\.(\d+)\.", key))]
    sizes = {
        "hidden_size": hidden_size,
        "num_channels": num_channels,
        "patch_size": patch_size,
        "num_hidden_layers": 1 + max(depths, default=-1),
        "mlp_ratio": _required(checkpoint, "blocks.0.mlp.fc1.weight").shape[0] / hidden_size,
    }
    for name, value in sizes.items():
        if config.get(name, value) != value:
            raise InputError(f"{name} is {value} in {checkpoint.name}, got {config[name]}; leave it out.")
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


def _loaded(model: BiTransModel, checkpoint: Checkpoint, new: tuple[str, ...]) -> BiTransModel:
    own = model.state_dict()
    found: dict[str, torch.Tensor] = {}
    for key, value in checkpoint.tensors.items():
        name = key
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        if name in own:
            found[name] = value  # DeiT's final LayerNorm among them, where the model has one
        elif not re.match(r"(norm|fc_norm|cls_token|pos_embed|head_dist|dist_token)\b|pos_embed_", key):
            raise InputError(
                f"{checkpoint.name}: it holds {key!r}, which the model has no place for; expected a DeiT or MCTformer."
            )
    _fill(model, Checkpoint(found, checkpoint.name), new)
    return model


def _fill(module: nn.Module, checkpoint: Checkpoint, new: Collection[str] = ()) -> None:
    """Load a checkpoint in the module's names; all other tensors of `module` must be in `new`."""
    own, found = module.state_dict(), checkpoint.tensors
    missing = [name for name in own if name not in found and name not in new]
    if missing:
        raise InputError(
            f"{checkpoint.name} lacks {len(missing)} tensors, first {missing[0]!r}; the file is not complete."
        )
    for name, value in found.items():
        if value.shape != own[name].shape:
            raise InputError(
                f"{checkpoint.name}: {name} has shape {tuple(value.shape)}, expected {tuple(own[name].shape)}; these "
                "are the weights of a network of another size."
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
    checkpoint = _public_resnet38(weights)
    model = AffinityNetModel(AffinityNetConfig(backbone_config=_width(checkpoint), **config))
    _fill_public(model, checkpoint)
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
    checkpoint = _public_resnet38(weights)
    classifier = checkpoint.tensors.get("head.fc8_seg_conv2.weight")
    if classifier is None:
        raise InputError(f"{checkpoint.name} lacks 'fc8_seg_conv2.weight'; expected MCTformer's segmentation network.")
    num_labels = len(classifier)
    if id2label is not None and len(id2label) != num_labels:
        raise InputError(f"{checkpoint.name}: got {num_labels} labels, id2label names {len(id2label)}; name each.")
    labels = {"num_labels": num_labels} if id2label is None else {"id2label": dict(id2label)}
    model = DeepLabForSemanticSegmentation(DeepLabConfig(backbone_config=_width(checkpoint), **labels, **config))
    _fill_public(model, checkpoint)
    return model


def load_backbone(
    model: AffinityNetModel | CamModel | DeepLabForSemanticSegmentation,
    weights: StateDict | str | Path | None = None,
) -> None:
    """Load pretrained weights into the backbone of a network; its head is left unchanged.

    Args:
        model: With backbone resnet38 or a timm network; a bitrans backbone comes with `from_bitrans`.
        weights: For resnet38 MXNet's ImageNet weights (`ilsvrc-cls_rna-a1_cls1000_ep-0001.params`), or a checkpoint of
            PSA or MCTformer such as `res38_cls.pth`; heads in it are not read. For a timm network a file or state dict
            in timm's own names, or None for the weights of timm's default tag, from the Hub or its local cache.

    Raises:
        ValueError: names or shapes do not fit, or the backbone cannot take such weights.
        FileNotFoundError: there is no such file.
        MissingFileError: timm's weights are neither cached nor can be downloaded.
    """
    backbone = model.backbone
    if isinstance(backbone, TimmFeatures):
        _load_timm(model, weights)
    elif isinstance(backbone, ResNet38Backbone) and weights is not None:
        checkpoint = _public_resnet38(weights)
        trunk = {
            name.removeprefix(_TRUNK): value for name, value in checkpoint.tensors.items() if name.startswith(_TRUNK)
        }
        unknown = [name for name in trunk if name not in backbone.network.state_dict() and name != "fc8.weight"]
        if unknown:
            raise InputError(f"{checkpoint.name}: it holds {unknown[0]!r}, which ResNet38 has no place for.")
        trunk.pop("fc8.weight", None)  # the classifier of res38_cls
        _fill(backbone.network, Checkpoint(trunk, checkpoint.name), _batch_counters(backbone.network))
    else:
        raise InputError(
            f"backbone {model.config.backbone!r} takes no such weights; give a file for resnet38, and build one on a "
            "Bi-Trans encoder with from_bitrans."
        )


def _public_resnet38(weights: StateDict | str | Path) -> Checkpoint:
    """Read a network on ResNet38 and rename MXNet's, PSA's and MCTformer's tensors to those of our networks."""
    checkpoint = read_checkpoint(weights, _RESNET38)
    renamed = {}
    for name, value in checkpoint.tensors.items():
        if name.startswith(("arg:", "aux:")):
            name = _from_mxnet(name)
            if name.startswith("linear1000"):  # ImageNet's classifier
                continue
        prefix = _HEADS.get(name.split(".")[0], _TRUNK)
        renamed[prefix + name] = value
    if f"{_TRUNK}conv1a.weight" not in renamed:
        raise InputError(
            f"{checkpoint.name} lacks 'conv1a.weight'; expected a network on ResNet38 (PSA or MCTformer), found "
            f"{_first(checkpoint)}."
        )
    return Checkpoint(renamed, checkpoint.name)


def _from_mxnet(name: str) -> str:
    """Convert MXNet's name of a ResNet38 tensor to PSA's: "arg:res2b1_branch2a_weight" is b2_1.conv_branch2a.weight.

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


def _width(checkpoint: Checkpoint) -> dict[str, float]:
    """`backbone_config` of the trunk that the weights belong to."""
    return {"width_multiplier": len(checkpoint.tensors[f"{_TRUNK}conv1a.weight"]) / 64}


def _batch_counters(module: nn.Module) -> list[str]:
    """Names of tensors that older checkpoints lack; only a cumulative average reads them."""
    return [name for name in module.state_dict() if name.endswith("num_batches_tracked")]


def _fill_public(model: nn.Module, checkpoint: Checkpoint) -> None:
    unknown = [name for name in checkpoint.tensors if name not in model.state_dict()]
    if unknown:
        public = unknown[0].removeprefix(_TRUNK)
        raise InputError(f"{checkpoint.name}: it holds {public!r}, which a {type(model).__name__} has no place for.")
    _fill(model, checkpoint, _batch_counters(model))


def _load_timm(
    model: AffinityNetModel | CamModel | DeepLabForSemanticSegmentation, weights: StateDict | str | Path | None
) -> None:
    """Let timm read the weights: it knows the classifier and the names in its older files."""
    config = model.config
    options = {"pretrained": True, **(config.backbone_config or {})}
    overlay: dict[str, Any] | None = None
    if weights is not None:
        with torch.device("meta"):
            own: Any = timm.create_model(config.backbone, num_classes=0, **(config.backbone_config or {}))
        checkpoint = read_checkpoint(weights, own.state_dict().keys())
        state = checkpoint.tensors
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
            raise InputError(f"{checkpoint.name}: the weights do not fit {config.backbone!r}: {error}") from error
        overlay = {"state_dict": whole.state_dict()}
    features = _from_the_hub(
        config.backbone,
        lambda: timm.create_model(
            config.backbone,
            pretrained_cfg_overlay=overlay,
            features_only=True,
            out_indices=model.backbone.out_indices,
            output_stride=config.output_stride,
            **options,
        ),
    )
    model.backbone.get_submodule("network._backbone").load_state_dict(features.state_dict())


def _from_the_hub(name: str, create: Callable[[], Any]) -> Any:
    """Create a timm model with weights from the Hub; errors other than the network's are passed on."""
    try:
        return create()
    except Exception as error:
        reason = hub_error_sentence(error, name)
        if reason is None:
            raise
        raise MissingFileError(
            f"could not get the weights of {name!r}: {reason}; go online once, or give a .safetensors or .pth file in "
            "timm's names instead of the name."
        ) from error
