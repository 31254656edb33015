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
from transformers.utils import ModelOutput

from .configuration_bitrans import BiTransConfig
from .encoder import ClassTokenEncoder, Encoded
from .errors import InputError
from .losses import affinity_consistency_loss, class_consistency_loss, class_contrast_loss, classification_loss
from .maps import fuse
from .views import VIEWS, invert_affinity

AUTO_CLASSES = ("AutoModel", "AutoModelForImageClassification")
"""Classes of transformers that open a saved model; the second lets the stock pipeline tag images by `logits`."""


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
        affinity: (B, N, N) patch affinity, [query, key]: attention (Eq. 9), whose rows sum to less than 1, or what
            `config.affinity_source` names.
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


RANK_DECAY = 0.996
"""MCTformer+'s weight of a patch over that of the next higher scoring one."""


def pooled(maps: torch.Tensor, pooling: str) -> torch.Tensor:
    """Pool class maps (B, C, h, w) to logits (B, C): "mean" over patches, or "ranked" (see `BiTransConfig`)."""
    if pooling == "mean":
        return maps.mean(dim=(2, 3))
    scores = maps.flatten(2).sort(dim=2, descending=True).values
    weights = RANK_DECAY ** torch.arange(scores.shape[2], dtype=scores.dtype, device=scores.device)
    return scores @ (weights / weights.sum())


@dataclass
class Branches:
    """What the two branches read off the encoder's output, of a batch of B images (2B with a second view).

    Attributes:
        tokens: (B, C + N, D) output tokens as both branches read them.
        class_logits: (B, C) mean over D of each class token (Eq. 4).
        coarse_cam: (B, C, h, w) Coarse-CAM (Eq. 6), any range.
        patch_logits: (B, C) the pooled Coarse-CAM (Eq. 7).
    """

    tokens: torch.Tensor
    class_logits: torch.Tensor
    coarse_cam: torch.Tensor
    patch_logits: torch.Tensor


class BiTransModel(ClassTokenEncoder):
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

    def __init__(self, config: BiTransConfig):
        super().__init__(config)
        # The baseline loads DeiT's final LayerNorm and never applies it: both branches read the raw tokens.
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.final_layer_norm else None
        self.seg_head = nn.Conv2d(config.hidden_size, cast(int, config.num_labels), kernel_size=3, padding=1)
        self.post_init()

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

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        consistency_scale: torch.Tensor | float = 1.0,
    ) -> BiTransOutput | tuple[Any, ...]:
        """Tag images and localize every class in them; with labels, also compute the training loss.

        With labels and a `config.view` other than "none" the second view is built here and both views run as one
        batch of 2B images through the shared weights.

        Args:
            pixel_values: (B, 3, H, W) normalized images; H and W at least one patch. Up to `patch_size - 1` pixels at
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
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        if output_attentions is None:
            output_attentions = bool(self.config.output_attentions)
        two_views = labels is not None and self.config.view != "none"

        views = self.both_views(pixel_values) if two_views else pixel_values
        encoded = self.encode(
            views,
            num_views=2 if two_views else 1,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        branches = self.branches(encoded)
        losses = {} if labels is None else self.loss_terms(encoded, branches, labels, two_views)
        loss = self.total_loss(losses, consistency_scale) if losses else None

        output = self.first_view(pixel_values.shape[0], encoded, branches, loss, losses or None)
        return output.to_tuple() if return_dict is False else output

    def both_views(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Append the second view of every image (Eq. 1): (B, 3, H, W) to (2B, 3, H, W)."""
        return torch.cat([pixel_values, VIEWS[self.config.view].apply(pixel_values)])

    def branches(self, encoded: Encoded) -> Branches:
        """Read the class tokens and the patches of the encoder's output."""
        num_classes = cast(int, self.config.num_labels)
        tokens = encoded.tokens if self.norm is None else self.norm(encoded.tokens)
        patch_grid = tokens[:, num_classes:].transpose(1, 2).unflatten(2, encoded.sc_cam.shape[2:])
        coarse_cam = self.seg_head(patch_grid).float()
        return Branches(
            tokens=tokens,
            class_logits=self.class_logits(tokens[:, :num_classes].float()),
            coarse_cam=coarse_cam,
            patch_logits=pooled(coarse_cam, self.config.patch_pooling),
        )

    def class_logits(self, class_tokens: torch.Tensor) -> torch.Tensor:
        """Read the logits (B, C) off the class tokens (B, C, D) as `config.class_head` says."""
        if self.config.class_head == "mean":
            return class_tokens.mean(dim=-1)
        # On a grid filled with one token, the convolution is a linear layer of its summed taps.
        weight, bias = self.seg_head.weight.detach().float(), cast(nn.Parameter, self.seg_head.bias).detach().float()
        return (class_tokens * weight.sum(dim=(2, 3))).sum(dim=-1) + bias

    def loss_terms(
        self, encoded: Encoded, branches: Branches, labels: torch.Tensor, two_views: bool
    ) -> dict[str, torch.Tensor]:
        """Return the terms of the loss before weighting, each a scalar.

        The mean over a batch of two views is the mean of the two views' means (Eq. 12).
        """
        per_view = labels.repeat(2, 1) if two_views else labels
        losses = {
            "class": classification_loss(branches.class_logits, per_view),
            "patch": classification_loss(branches.patch_logits, per_view),
        }
        if self.config.class_contrast_weight:
            losses["contrast"] = class_contrast_loss(encoded.class_tokens, per_view)
        if two_views:
            return {**losses, **self.consistency_terms(encoded)}
        return losses

    def consistency_terms(self, encoded: Encoded) -> dict[str, torch.Tensor]:
        """Compare the maps of both views, the second one's put back into the order of the first."""
        view = VIEWS[self.config.view]
        (sc_cam, sc_cam_second), (affinity, affinity_second) = encoded.sc_cam.chunk(2), encoded.affinity.chunk(2)
        # A view that exchanges height and width is square, so this is the second view's grid too.
        h, w = sc_cam.shape[2:]
        return {
            "scc": class_consistency_loss(sc_cam, view.invert(sc_cam_second)),
            "pac": affinity_consistency_loss(affinity, invert_affinity(view, affinity_second, (h, w))),
        }

    def total_loss(self, losses: dict[str, torch.Tensor], consistency_scale: torch.Tensor | float) -> torch.Tensor:
        """Return the weighted sum of the terms (Eq. 12)."""
        config = self.config
        loss: torch.Tensor = losses["class"] + config.patch_weight * losses["patch"]
        if "contrast" in losses:
            loss = loss + config.class_contrast_weight * losses["contrast"]
        if "scc" in losses:
            consistency = config.scc_weight * losses["scc"] + config.pac_weight * losses["pac"]
            loss = loss + consistency_scale * consistency
        return loss

    def first_view(
        self,
        batch: int,
        encoded: Encoded,
        branches: Branches,
        loss: torch.Tensor | None,
        losses: dict[str, torch.Tensor] | None,
    ) -> BiTransOutput:
        """Put the output together, of the first `batch` images: the second view served the losses alone."""
        sc_cam, coarse_cam = encoded.sc_cam[:batch], branches.coarse_cam[:batch]
        class_logits, patch_logits = branches.class_logits[:batch], branches.patch_logits[:batch]
        return BiTransOutput(
            loss=loss,
            logits=(class_logits + patch_logits) / 2 if self.config.patch_weight else class_logits,
            losses=losses,
            class_logits=class_logits,
            patch_logits=patch_logits,
            sc_cam=sc_cam,
            coarse_cam=coarse_cam,
            pseudo_mask=fuse(sc_cam, coarse_cam),
            affinity=encoded.affinity[:batch],
            last_hidden_state=branches.tokens[:batch],
            hidden_states=tuple(state[:batch] for state in encoded.hidden_states) or None,
            attentions=tuple(attention[:batch] for attention in encoded.attentions) or None,
        )

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
