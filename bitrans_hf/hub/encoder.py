"""The encoder: a vision transformer (DeiT) with one class token per object class, and the maps of its attention.

`ClassTokenEncoder.encode` is all that `BiTransModel` asks of an encoder: another one stands in its place by returning
the same `Encoded`. B images, C classes, h x w = N patches, T = C + N tokens, D width, L layers.
"""

from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_bitrans import BiTransConfig
from .maps import AFFINITIES


@dataclass
class Encoded:
    """What an encoder makes of a batch of B images.

    Attributes:
        tokens: (B, C + N, D) output tokens, class tokens first.
        sc_cam: (B, C, h, w) SC-CAM (Eq. 2), class-to-patch attention; values of one class sum to at most 1.
        affinity: (B, N, N) patch affinity, [query, key]: attention (Eq. 9), whose rows sum to less than 1, or what
            `config.affinity_source` names.
        class_tokens: The class tokens (B, C, D) after each layer, where they are contrasted; else empty.
        hidden_states: On request, L + 1 tensors (B, C + N, D), the embeddings first; else empty.
        attentions: On request, L tensors (B, C + N, C + N), each averaged over its heads; else empty.
    """

    tokens: torch.Tensor
    sc_cam: torch.Tensor
    affinity: torch.Tensor
    class_tokens: list[torch.Tensor] = field(default_factory=list)
    hidden_states: list[torch.Tensor] = field(default_factory=list)
    attentions: list[torch.Tensor] = field(default_factory=list)


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


def self_similarity(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Return how alike patches are: softmax of the mean score of queries with queries and of keys with keys.

    The mean is over heads too. ExCEL (CVPR 2025) and SCLIP read affinities of CLIP so, head by head and with values
    as a third. Here values add nothing, and one softmax does as well as the mean of one for each head. Attention says
    what a patch asks for, which may be elsewhere; self-similarity says what belongs together.

    Args:
        query: (B, heads, N, d) of the patches, any float type.
        key: As `query`.

    Returns:
        (B, N, N) whose rows sum to 1, in float32 (float64 for float64).
    """
    num_heads, scale = query.shape[1], query.shape[3] ** -0.5
    features = torch.cat([query, key], dim=1).transpose(1, 2).flatten(2)  # (B, N, 2 heads d)
    return softmax_over_keys((features * (scale / (2 * num_heads))) @ features.transpose(1, 2))


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
    """Multi-head self-attention that optionally returns its head-averaged map and the patches' self-similarity."""

    def __init__(self, config: BiTransConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, tokens: torch.Tensor, with_map: bool = True, similarity_from: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Map (B, T, D) to (B, T, D), the head-averaged attention (B, T, T), and the self-similarity of tokens.

        Args:
            tokens: (B, T, D).
            with_map: False gives None for the attention.
            similarity_from: First token whose similarity counts: (B, N, N) for the N from there on. None gives None.
        """
        batch, length, width = tokens.shape
        qkv = self.qkv(tokens).reshape(batch, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, T, d)
        attention_map: torch.Tensor | None = None
        if not with_map:
            mixed = F.scaled_dot_product_attention(query, key, value)
        elif torch.is_grad_enabled():
            mixed, attention_map = RecomputedAttention.apply(query, key, value)
        else:
            mixed, attention_map = attention_with_map(query, key, value)
        similarity: torch.Tensor | None = None
        if similarity_from is not None:
            similarity = self_similarity(query[:, :, similarity_from:], key[:, :, similarity_from:])
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, width)), attention_map, similarity


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
        self,
        tokens: torch.Tensor,
        with_map: bool = True,
        num_views: int = 1,
        similarity_from: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Map tokens (B, T, D) to (B, T, D), and give the layer's maps as `BiTransAttention` does.

        `num_views`: Of how many views of the same images, one after the other, the batch consists.
        """
        mixed, attention_map, similarity = self.attention(self.norm1(tokens), with_map, similarity_from)
        tokens = tokens + self.drop_path(mixed, num_views)
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)), num_views), attention_map, similarity

    def drop_path(self, branch: torch.Tensor, num_views: int = 1) -> torch.Tensor:
        """While training, drop the whole branch for some images and scale it up for the others."""
        if not self.training or self.drop_path_rate == 0.0:
            return branch
        keep, repeats = 1.0 - self.drop_path_rate, num_views if self.share_drop_path else 1
        mask = torch.empty(branch.shape[0] // repeats, 1, 1, dtype=branch.dtype, device=branch.device)
        return branch * (mask.bernoulli_(keep) / keep).repeat(repeats, 1, 1)


class RunningMean:
    """The mean of the maps of the last layers, of which only the sum is kept.

    A mean, not a sum, so that the losses do not depend on the number of layers.

    Args:
        first: Index of the first layer that counts.
        count: How many layers count.
    """

    def __init__(self, first: int, count: int):
        self.first, self.count = first, count
        self.total: torch.Tensor | None = None

    def add(self, layer: int, maps: torch.Tensor) -> None:
        """Count the maps of a layer, given in the order of the layers."""
        if layer >= self.first:
            # Layers may lie on several devices.
            self.total = maps if self.total is None else self.total + maps.to(self.total.device)

    def mean(self) -> torch.Tensor:
        """Return the mean over the layers that count."""
        assert self.total is not None  # the configuration has it that at least one layer counts
        return self.total / self.count


class ClassTokenEncoder(PreTrainedModel):
    """Embeddings, layers, and the running means of their attention maps.

    Args:
        config: Architecture.
        num_layers: Build only the first layers, for a user who reads no later one; None for all.
    """

    config_class = BiTransConfig
    base_model_prefix = "bitrans"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BiTransLayer"]  # noqa: RUF012 - transformers reads a plain class attribute

    def __init__(self, config: BiTransConfig, num_layers: int | None = None):
        super().__init__(config)
        grid, num_classes = config.image_size // config.patch_size, cast(int, config.num_labels)
        self.patch_embed = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.class_tokens = nn.Parameter(torch.empty(1, num_classes, config.hidden_size))
        self.class_position = nn.Parameter(torch.empty(1, num_classes, config.hidden_size))
        self.patch_position = nn.Parameter(torch.empty(1, grid * grid, config.hidden_size))
        indices = range(config.num_hidden_layers if num_layers is None else num_layers)
        self.layers = nn.ModuleList(BiTransLayer(config, index) for index in indices)

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
        elif isinstance(module, ClassTokenEncoder):
            init.trunc_normal_(module.class_tokens, std=std)
            init.trunc_normal_(module.class_position, std=std)
            init.trunc_normal_(module.patch_position, std=std)

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

    def embed(self, pixel_values: torch.Tensor, stride: int | None = None) -> tuple[torch.Tensor, tuple[int, int]]:
        """Turn images (B, 3, H, W) into tokens (B, C + N, D) with their positions, and the grid (h, w) of the patches.

        Args:
            pixel_values: Normalized images.
            stride: Pixels from one patch to the next. Below the patch size patches overlap; None: they do not.
        """
        pixel_values = pixel_values.to(self.patch_embed.weight.dtype)
        if stride is None:
            patches, (height, width) = self.patch_embed(pixel_values), pixel_values.shape[2:]
        else:
            patches = F.conv2d(pixel_values, self.patch_embed.weight, self.patch_embed.bias, stride=stride)
            height, width = (cells * self.config.patch_size for cells in patches.shape[2:])
        h, w = patches.shape[2:]
        position = self.position_embedding(height, width)
        class_tokens = self.class_tokens.expand(patches.shape[0], -1, -1).to(patches.dtype)
        return torch.cat([class_tokens, patches.flatten(2).transpose(1, 2)], dim=1) + position, (h, w)

    def encode(
        self,
        pixel_values: torch.Tensor,
        *,
        num_views: int = 1,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> Encoded:
        """Run the encoder; only running means of the head-averaged maps are kept, unless more is asked for.

        Args:
            pixel_values: (B, 3, H, W) normalized images.
            num_views: Of how many views of the same images, one after the other, the batch consists.
            output_hidden_states: Keep every layer's tokens.
            output_attentions: Keep every layer's maps.
        """
        num_classes, num_layers = cast(int, self.config.num_labels), len(self.layers)
        tokens, grid = self.embed(pixel_values)
        count = self.config.num_affinity_layers or num_layers
        first = num_layers - count
        attention, similarity = RunningMean(first, count), RunningMean(first, count)
        sc_cam = RunningMean(num_layers - self.config.num_seed_layers, self.config.num_seed_layers)
        uses_similarity = self.config.affinity_source != "attention"
        hidden_states, attentions, class_tokens = [tokens] if output_hidden_states else [], [], []
        for index, layer in enumerate(self.layers):
            similarity_from = num_classes if uses_similarity and index >= first else None
            tokens, attention_map, similarity_map = layer(tokens, True, num_views, similarity_from)
            attention.add(index, attention_map[:, num_classes:, num_classes:])
            if similarity_map is not None:
                similarity.add(index, similarity_map)
            sc_cam.add(index, attention_map[:, :num_classes, num_classes:])
            if self.config.class_contrast_weight:
                class_tokens.append(tokens[:, :num_classes])
            if output_hidden_states:
                hidden_states.append(tokens)
            if output_attentions:
                attentions.append(attention_map)
        maps = sc_cam.mean().unflatten(2, grid)
        affinity = attention.mean()
        if uses_similarity:
            affinity = AFFINITIES[self.config.affinity_source](affinity, similarity.mean())
        return Encoded(tokens, maps, affinity, class_tokens, hidden_states, attentions)


__all__ = ["ClassTokenEncoder", "Encoded"]
