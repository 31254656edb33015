"""Bi-Trans: a vision transformer with one class token per object class, trained on image-level labels.

Its attention gives class seeds (class-to-patch) and patch affinities (patch-to-patch). The encoder is DeiT's; the
multi-class tokens follow MCTformer (Xu et al., CVPR 2022, arXiv:2203.02891), the two views and the consistency losses
the Bi-Trans paper, whose equation numbers are given below.
"""

from dataclasses import dataclass
from os import PathLike
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from .configuration_bitrans import BiTransConfig
from .errors import InputError
from .losses import affinity_consistency_loss, class_consistency_loss, class_contrast_loss, classification_loss
from .views import VIEWS, invert_affinity

AUTO_CLASSES = ("AutoModel", "AutoModelForImageClassification")
"""Classes of transformers that open a saved model; the second lets the stock pipeline tag pictures by `logits`."""


@dataclass
class BiTransOutput(ModelOutput):
    """What `BiTransModel` returns. B images, C classes, h x w = N patches, D width; fields speak of the first view.

    Attributes:
        loss: Scalar total loss (Eq. 12); only with labels.
        logits: (B, C) mean of `class_logits` and `patch_logits` (the former alone where the latter are not trained);
            their sigmoid is the image-level tag score.
        losses: Scalar terms of the loss before weighting, each averaged over the views: "class", "patch", "contrast"
            where it has a weight, and with a second view "scc" and "pac"; only with labels.
        class_logits: (B, C) logits of the class tokens (Eq. 4).
        patch_logits: (B, C) logits of the patch branch (Eq. 7).
        sc_cam: (B, C, h, w) SC-CAM (Eq. 2), class-to-patch attention; values of one class sum to at most 1.
        coarse_cam: (B, C, h, w) Coarse-CAM (Eq. 6) before the ReLU, any range.
        pseudo_mask: (B, C, h, w) SC-CAM x ReLU(Coarse-CAM) (Eq. 8), at least 0.
        affinity: (B, N, N) patch-to-patch attention (Eq. 9), [query, key], rows sum to less than 1.
        last_hidden_state: (B, C + N, D) output tokens, class tokens first, as both branches read them: no final
            LayerNorm unless `config.final_layer_norm`.
        hidden_states: On request, L + 1 tensors (B, C + N, D), the embeddings first.
        attentions: On request, L tensors (B, C + N, C + N), each layer's attention averaged over its heads.
    """

    # ModelOutput wants None as the default, also of what is always set.
    loss: torch.Tensor | None = None
    logits: torch.Tensor = None  # type: ignore[assignment]
    losses: dict[str, torch.Tensor] | None = None
    class_logits: torch.Tensor = None  # type: ignore[assignment]
    patch_logits: torch.Tensor = None  # type: ignore[assignment]
    sc_cam: torch.Tensor = None  # type: ignore[assignment]
    coarse_cam: torch.Tensor = None  # type: ignore[assignment]
    pseudo_mask: torch.Tensor = None  # type: ignore[assignment]
    affinity: torch.Tensor = None  # type: ignore[assignment]
    last_hidden_state: torch.Tensor = None  # type: ignore[assignment]
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


def softmax_over_keys(scores: torch.Tensor) -> torch.Tensor:
    """Softmax over the last axis in float32 or better: rows of bfloat16 weights would not sum to 1."""
    return scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))


def attention_with_map(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention, and the attention map averaged over heads.

    Heads are taken one after the other, so that only one (B, T, T) map is alive beside the running mean.

    Args:
        query: (B, heads, T, d), any float type.
        key: As `query`.
        value: As `query`.

    Returns:
        (B, heads, T, d) in the type of `value`, and (B, T, T) whose rows sum to 1, in float32 (float64 for float64).
    """
    num_heads, scale = query.shape[1], query.shape[3] ** -0.5
    outputs: list[torch.Tensor] = []
    total: torch.Tensor | None = None
    for head in range(num_heads):
        weights = softmax_over_keys((query[:, head] * scale) @ key[:, head].transpose(1, 2))
        outputs.append(weights.to(value.dtype) @ value[:, head])
        total = weights if total is None else total + weights
    assert total is not None  # a layer has at least one head
    return torch.stack(outputs, dim=1), total / num_heads


class RecomputedAttention(torch.autograd.Function):
    """`attention_with_map` that keeps only query, key and value for the backward pass and recomputes each head's map.

    Keeping the maps would cost B x heads x T x T numbers in every layer: for two views of 64 images at 224 px 1.7 GB.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(query, key, value)
        ctx.set_materialize_grads(False)
        return attention_with_map(query, key, value)

    @staticmethod
    def backward(
        ctx: Any, grad_output: torch.Tensor | None, grad_map: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        if grad_output is None and grad_map is None:
            return None, None, None
        query, key, value = ctx.saved_tensors
        num_heads, scale = query.shape[1], query.shape[3] ** -0.5
        grad_mean = None if grad_map is None else grad_map / num_heads
        grads = []
        for head in range(num_heads):
            q, k, v = query[:, head] * scale, key[:, head], value[:, head]
            weights = softmax_over_keys(q @ k.transpose(1, 2))
            grad_weights, grad_v = grad_mean, torch.zeros_like(v)
            if grad_output is not None:
                grad_out = grad_output[:, head].to(v.dtype)
                grad_v = weights.to(v.dtype).transpose(1, 2) @ grad_out
                from_output = (grad_out @ v.transpose(1, 2)).to(weights.dtype)
                grad_weights = from_output if grad_mean is None else from_output + grad_mean
            assert grad_weights is not None
            # Softmax backward: each row's gradient less its mean under the row's own weights.
            weighted = grad_weights * weights
            grad_scores = torch.addcmul(weighted, weights, weighted.sum(dim=-1, keepdim=True), value=-1).to(q.dtype)
            grads.append(((grad_scores @ k) * scale, grad_scores.transpose(1, 2) @ q, grad_v))
        return tuple(torch.stack(parts, dim=1) for parts in zip(*grads, strict=True))


class BiTransAttention(nn.Module):
    """Multi-head self-attention that also returns its map, averaged over heads, unless nobody wants it."""

    def __init__(self, config: BiTransConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.recompute = config.attention_map_mode == "recompute"
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, tokens: torch.Tensor, with_map: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Map (B, T, D) to (B, T, D) and the head-averaged attention (B, T, T); None without `with_map`."""
        batch, length, width = tokens.shape
        qkv = self.qkv(tokens).reshape(batch, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, T, d)
        attention_map: torch.Tensor | None = None
        if not with_map:
            mixed = F.scaled_dot_product_attention(query, key, value)
        elif self.recompute and torch.is_grad_enabled():
            mixed, attention_map = RecomputedAttention.apply(query, key, value)
        else:
            mixed, attention_map = attention_with_map(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, width)), attention_map


class BiTransMLP(nn.Module):
    """Two linear layers with an exact GELU between."""

    def __init__(self, config: BiTransConfig):
        super().__init__()
        width = int(config.hidden_size * config.mlp_ratio)
        self.fc1 = nn.Linear(config.hidden_size, width)
        self.fc2 = nn.Linear(width, config.hidden_size)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.fc1(tokens)
        if torch.is_grad_enabled():
            # GELU's output is the largest tensor of a layer, and cheap to compute again in the backward pass.
            mixed: torch.Tensor = checkpoint(self._activate, hidden, use_reentrant=False, preserve_rng_state=False)
            return mixed
        return self._activate(hidden)

    def _activate(self, hidden: torch.Tensor) -> torch.Tensor:
        mixed: torch.Tensor = self.fc2(F.gelu(hidden))
        return mixed


class BiTransLayer(GradientCheckpointingLayer):
    """A pre-norm transformer layer with stochastic depth."""

    def __init__(self, config: BiTransConfig, index: int):
        super().__init__()
        # Python arithmetic: tensors cannot be read while the model is built on the meta device.
        self.drop_path_rate = config.drop_path_rate * index / max(1, config.num_hidden_layers - 1)
        self.share_drop_path = config.share_drop_path
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = BiTransAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = BiTransMLP(config)

    def forward(
        self, tokens: torch.Tensor, with_map: bool = True, num_views: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Map tokens (B, T, D) to (B, T, D) and the head-averaged attention (B, T, T); None without `with_map`.

        `num_views`: Of how many views of the same images, one after the other, the batch consists.
        """
        mixed, attention_map = self.attention(self.norm1(tokens), with_map)
        tokens = tokens + self.drop_path(mixed, num_views)
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)), num_views), attention_map

    def drop_path(self, branch: torch.Tensor, num_views: int = 1) -> torch.Tensor:
        """While training, drop the whole branch for some images and scale it up for the others."""
        if not self.training or self.drop_path_rate == 0.0:
            return branch
        keep, repeats = 1.0 - self.drop_path_rate, num_views if self.share_drop_path else 1
        mask = torch.empty(branch.shape[0] // repeats, 1, 1, dtype=branch.dtype, device=branch.device)
        return branch * (mask.bernoulli_(keep) / keep).repeat(repeats, 1, 1)


RANK_DECAY = 0.996
"""MCTformer+'s weight of a patch over that of the next higher scoring one."""


def pooled(maps: torch.Tensor, pooling: str) -> torch.Tensor:
    """Pool class maps (B, C, h, w) to logits (B, C): "mean" over patches, or "ranked" (see `BiTransConfig`)."""
    if pooling == "mean":
        return maps.mean(dim=(2, 3))
    scores = maps.flatten(2).sort(dim=2, descending=True).values
    weights = RANK_DECAY ** torch.arange(scores.shape[2], dtype=scores.dtype, device=scores.device)
    return scores @ (weights / weights.sum())


class BiTransModel(PreTrainedModel):
    """Bi-Trans: image-level tags, class seeds and patch affinities from one forward pass.

    Args:
        config: Architecture and loss weights.

    Example:
        >>> import torch
        >>> config = BiTransConfig(id2label={0: "cat", 1: "dog"}, image_size=32, patch_size=8, hidden_size=12,
        ...                        num_hidden_layers=3, num_attention_heads=3)
        >>> output = BiTransModel(config)(torch.zeros(1, 3, 32, 32), labels=torch.tensor([[1.0, 0.0]]))
        >>> tuple(output.pseudo_mask.shape), tuple(output.affinity.shape), sorted(output.losses)
        ((1, 2, 4, 4), (1, 16, 16), ['class', 'pac', 'patch', 'scc'])
    """

    config_class = BiTransConfig
    base_model_prefix = "bitrans"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BiTransLayer"]  # noqa: RUF012 - transformers reads a plain class attribute

    def __init__(self, config: BiTransConfig):
        super().__init__(config)
        grid, num_classes = config.image_size // config.patch_size, cast(int, config.num_labels)
        self.patch_embed = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.class_tokens = nn.Parameter(torch.empty(1, num_classes, config.hidden_size))
        self.class_position = nn.Parameter(torch.empty(1, num_classes, config.hidden_size))
        self.patch_position = nn.Parameter(torch.empty(1, grid * grid, config.hidden_size))
        self.layers = nn.ModuleList(BiTransLayer(config, index) for index in range(config.num_hidden_layers))
        # The baseline loads DeiT's final LayerNorm and never applies it: both branches read the raw tokens.
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.final_layer_norm else None
        self.seg_head = nn.Conv2d(config.hidden_size, num_classes, kernel_size=3, padding=1)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Through transformers' `init`, which leaves weights that were loaded alone.
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=std)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            # torch's own default for convolutions, which the baseline keeps: U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
            bound = (module.in_channels * module.kernel_size[0] * module.kernel_size[1]) ** -0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, BiTransModel):
            init.trunc_normal_(module.class_tokens, std=std)
            init.trunc_normal_(module.class_position, std=std)
            init.trunc_normal_(module.patch_position, std=std)

    def save_pretrained(self, save_directory: str | PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save weights, configuration and code; the folder opens as `AutoModel` and as an image classifier.

        The arguments are those of every model of transformers.
        """
        if self.is_remote_code():
            # transformers writes the one auto class it knows of and keeps what the configuration has.
            name = f"{type(self).__module__.rpartition('.')[2]}.{type(self).__name__}"
            others = getattr(self.config, "auto_map", None) or {}
            self.config.auto_map = {**others, **dict.fromkeys(AUTO_CLASSES, name)}
        super().save_pretrained(save_directory, *args, **kwargs)

    def position_embedding(self, height: int, width: int) -> torch.Tensor:
        """Position embeddings (1, C + N, D) for an image of height x width pixels, class tokens first.

        Other sizes than the training size are resized bicubically by the scale factors (h + 0.1) / grid and
        (w + 0.1) / grid, without antialiasing, as DINO and MCTformer do: the 0.1 guards the floor in torch's output
        size and shifts the sampling grid a little, which trained weights expect.
        """
        h, w = height // self.config.patch_size, width // self.config.patch_size
        patch_position: torch.Tensor = self.patch_position
        if h * w != patch_position.shape[1] or height != width:
            grid = self.config.image_size // self.config.patch_size
            patch_position = F.interpolate(
                patch_position.float().reshape(1, grid, grid, -1).permute(0, 3, 1, 2),
                scale_factor=((h + 0.1) / grid, (w + 0.1) / grid),
                mode="bicubic",
            )
            patch_position = patch_position.flatten(2).transpose(1, 2).to(self.patch_position.dtype)
        # [0]: a slice of a (1, C + N, D) gradient has strides that DistributedDataParallel warns of.
        return torch.cat([self.class_position[0], patch_position[0]]).unsqueeze(0)

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        consistency_scale: torch.Tensor | float = 1.0,
    ) -> BiTransOutput | tuple[Any, ...]:
        """Tag images and localise every class in them; with labels, also compute the training loss.

        With labels and a `config.view` other than "none" the second view is built here and both views run as one
        batch of 2B images through the shared weights.

        Args:
            pixel_values: (B, 3, H, W) normalised images; H and W at least one patch. Up to `patch_size - 1` pixels at
                the right and the bottom are not seen when a side is no multiple of the patch size.
            labels: (B, C) multi-hot image-level labels, 0 or 1.
            output_hidden_states: Also return every layer's tokens.
            output_attentions: Also return every layer's head-averaged attention; keeps L maps (B, C + N, C + N).
            return_dict: False for a plain tuple of the fields that are not None.
            consistency_scale: Factor of both consistency losses' weights, for a warm-up.

        Raises:
            ValueError: the image is smaller than a patch, has another number of channels, is not square under a view
                that exchanges height and width, or the labels are not (B, C).
        """
        self._check_inputs(pixel_values, labels)
        if output_attentions is None:
            output_attentions = bool(self.config.output_attentions)
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        view = VIEWS[self.config.view]
        two_views = labels is not None and self.config.view != "none"
        batch, _, height, width = pixel_values.shape
        h, w = height // self.config.patch_size, width // self.config.patch_size
        if two_views:
            pixel_values = torch.cat([pixel_values, view.apply(pixel_values)])

        tokens, hidden_states, attentions, contrasted, sc_cam, affinity = self._encode(
            pixel_values, output_hidden_states, output_attentions, num_views=2 if two_views else 1
        )
        num_classes = self.config.num_labels
        sc_cam = sc_cam.unflatten(2, (h, w))  # Eq. 2
        class_logits = tokens[:, :num_classes].float().mean(dim=-1)  # Eq. 4
        patch_grid = tokens[:, num_classes:].transpose(1, 2).unflatten(2, (h, w))
        coarse_cam = self.seg_head(patch_grid).float()  # Eq. 6
        patch_logits = pooled(coarse_cam, self.config.patch_pooling)  # Eq. 7

        loss: torch.Tensor | None = None
        losses: dict[str, torch.Tensor] = {}
        if labels is not None:
            per_view = labels.repeat(2, 1) if two_views else labels
            # The mean over a batch of 2B is the mean of the two views' means (Eq. 12).
            losses = {
                "class": classification_loss(class_logits, per_view),
                "patch": classification_loss(patch_logits, per_view),
            }
            loss = losses["class"] + self.config.patch_weight * losses["patch"]
            if self.config.class_contrast_weight:
                losses["contrast"] = class_contrast_loss(contrasted, per_view)
                loss = loss + self.config.class_contrast_weight * losses["contrast"]
        if loss is not None and two_views:
            sc_cam, sc_cam_second = sc_cam.chunk(2)
            affinity, affinity_second = affinity.chunk(2)
            if self.config.detach_second_view:
                sc_cam_second, affinity_second = sc_cam_second.detach(), affinity_second.detach()
            present = labels if self.config.scc_classes == "present" else None
            losses["scc"] = class_consistency_loss(
                sc_cam,
                view.invert(sc_cam_second),
                present,
                max_normalized=self.config.scc_maps == "max_normalized",
            )
            # A view that exchanges height and width is square, so (h, w) is the second view's grid too.
            losses["pac"] = affinity_consistency_loss(affinity, invert_affinity(view, affinity_second, (h, w)))
            consistency = self.config.scc_weight * losses["scc"] + self.config.pac_weight * losses["pac"]
            loss = loss + consistency_scale * consistency

        class_logits, patch_logits, coarse_cam = class_logits[:batch], patch_logits[:batch], coarse_cam[:batch]
        output = BiTransOutput(
            loss=loss,
            logits=(class_logits + patch_logits) / 2 if self.config.patch_weight else class_logits,
            losses=losses or None,
            class_logits=class_logits,
            patch_logits=patch_logits,
            sc_cam=sc_cam,
            coarse_cam=coarse_cam,
            pseudo_mask=sc_cam * coarse_cam.relu(),  # Eq. 8
            affinity=affinity,
            last_hidden_state=tokens[:batch],
            hidden_states=tuple(state[:batch] for state in hidden_states) if output_hidden_states else None,
            attentions=tuple(attention[:batch] for attention in attentions) if output_attentions else None,
        )
        return output.to_tuple() if return_dict is False else output

    def _encode(
        self, pixel_values: torch.Tensor, output_hidden_states: bool, output_attentions: bool, num_views: int
    ) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """Run the encoder.

        Returns output tokens, what was asked for, the class tokens (B, C, D) of every layer where they are contrasted,
        SC-CAM (B, C, N) and affinity (B, N, N).

        Only running sums of the head-averaged maps are kept: the SC-CAM's over the last K layers (Eq. 2), the
        affinity's over all layers unless the configuration says otherwise (Eq. 9). Means, not sums, so that the losses
        do not depend on K and L.
        """
        num_classes, num_layers = self.config.num_labels, len(self.layers)
        num_affinity_layers = self.config.num_affinity_layers or num_layers
        patches = self.patch_embed(pixel_values.to(self.patch_embed.weight.dtype)).flatten(2).transpose(1, 2)
        class_tokens = self.class_tokens.expand(patches.shape[0], -1, -1)
        position = self.position_embedding(pixel_values.shape[2], pixel_values.shape[3])
        tokens = torch.cat([class_tokens.to(patches.dtype), patches], dim=1) + position
        hidden_states, attentions = [tokens] if output_hidden_states else [], []
        contrasted: list[torch.Tensor] = []
        sc_cam: torch.Tensor | None = None
        affinity: torch.Tensor | None = None
        for index, layer in enumerate(self.layers):
            tokens, attention_map = layer(tokens, True, num_views)
            if self.config.class_contrast_weight:
                contrasted.append(tokens[:, :num_classes])
            if index >= num_layers - num_affinity_layers:
                patch_rows = attention_map[:, num_classes:, num_classes:]
                affinity = patch_rows if affinity is None else affinity + patch_rows
            if index >= num_layers - self.config.num_seed_layers:
                class_rows = attention_map[:, :num_classes, num_classes:]
                sc_cam = class_rows if sc_cam is None else sc_cam + class_rows
            if output_hidden_states:
                hidden_states.append(tokens)
            if output_attentions:
                attentions.append(attention_map)
        assert sc_cam is not None  # the config has at least one layer, and one of them gives the SC-CAM
        assert affinity is not None
        sc_cam, affinity = sc_cam / self.config.num_seed_layers, affinity / num_affinity_layers
        if self.norm is not None:
            tokens = self.norm(tokens)
        return tokens, hidden_states, attentions, contrasted, sc_cam, affinity

    def _check_inputs(self, pixel_values: torch.Tensor, labels: torch.Tensor | None) -> None:
        config = self.config
        if pixel_values.ndim != 4 or pixel_values.shape[1] != config.num_channels:
            raise InputError(
                f"pixel_values must be (B, {config.num_channels}, H, W), got {tuple(pixel_values.shape)}."
            )
        height, width = pixel_values.shape[2:]
        if height < config.patch_size or width < config.patch_size:
            raise InputError(
                f"the image is smaller than a patch: got {height} x {width} pixels (height x width), expected at "
                f"least {config.patch_size} x {config.patch_size}; enlarge it first."
            )
        if labels is None:
            return
        if labels.shape != (len(pixel_values), config.num_labels):
            raise InputError(
                f"labels must be multi-hot of shape ({len(pixel_values)}, {config.num_labels}) for "
                f"{config.num_labels} classes, got {tuple(labels.shape)}; config.id2label names the classes."
            )
        if not VIEWS[config.view].keeps_shape and height != width:
            raise InputError(
                f"view {config.view!r} exchanges height and width and needs square images, got {height} x {width}; "
                "crop to a square or use hflip, vflip or rot180."
            )


__all__ = ["BiTransModel", "BiTransOutput"]


# A saved folder carries this code, so that it opens, with trust_remote_code, where the package is not installed.
BiTransModel.register_for_auto_class()
