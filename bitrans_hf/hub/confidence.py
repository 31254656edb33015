"""How sure a mask is, without ground truth: whether maps that are made in other ways give the same mask.

Masks that are right survive a change of the way; masks that are wrong often do not. Which ways tell most was found on
train images (`training/LOG.md`).
"""

from typing import Any

import torch

from .maps import fused_maps, min_max_normalized, refine_with_affinity, resized

SIDE = 160
"""Longest side in pixels at which masks are compared."""

MARGIN = 0.1
"""Distance of the two other background scores from the threshold."""


def other_maps(
    output: Any,
    mode: str,
    *,
    flip: bool,
    refine_steps: int = 1,
    normalize_affinity: bool = False,
    present: torch.Tensor | None = None,
) -> torch.Tensor:
    """Make the refined maps of a forward pass in other ways; the arguments are those of `maps.fused_maps`.

    Returns:
        (V, B, C, h, w), any range: from SC-CAM alone, spread once more, and, with `flip`, of the image alone and of
        its mirror alone.
    """
    both = present.repeat(2, 1) if flip and present is not None else present
    spread: dict[str, Any] = {"refine": True, "flip": False, "refine_steps": refine_steps, "present": both}
    fused = fused_maps(output, mode, normalize_affinity=normalize_affinity, **spread)
    attention = fused_maps(output, "sc_cam", normalize_affinity=normalize_affinity, **spread)
    once_more = refine_with_affinity(fused, output.affinity, normalize_rows=normalize_affinity)
    if not flip:
        return torch.stack([attention, once_more])
    (image, mirror), ways = fused.chunk(2), [way.chunk(2) for way in (attention, once_more)]
    return torch.stack([*(first + second.flip(-1) for first, second in ways), image, mirror.flip(-1)])


def mask_confidence(maps: torch.Tensor, others: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return how sure the masks of an image are.

    Args:
        maps: (K, H, W) seeds of the present classes in [0, 1], which the masks are cut from.
        others: (V, K, h, w) maps of these classes made in other ways, any range and size.
        threshold: Background score in [0, 1].

    Returns:
        (K,) in [0, 1]: the geometric mean of the IoUs that a class's mask has with those cut from the other maps, and
        with those cut from its own at a background score that is 0.1 lower or higher. 0 for an empty mask.
    """
    if not len(maps):
        return torch.zeros(0)
    height, width = maps.shape[-2:]
    shrink = min(1.0, SIDE / max(height, width))
    size = max(1, round(height * shrink)), max(1, round(width * shrink))
    own = resized(maps.float(), size)
    masks = cut(own, threshold)
    alternatives = [cut(min_max_normalized(resized(other.float(), size)), threshold) for other in others]
    alternatives += [cut(own, threshold - MARGIN), cut(own, threshold + MARGIN)]
    ious = torch.stack([intersection_over_union(masks, other) for other in alternatives])
    return ious.clamp(min=1e-12).log().mean(dim=0).exp() * masks.any(dim=(1, 2))


def cut(maps: torch.Tensor, threshold: float) -> torch.Tensor:
    """Turn maps (K, H, W) into masks (K, H, W): each pixel above the threshold goes to its highest map."""
    values, strongest = maps.max(dim=0)
    classes = torch.arange(len(maps), device=maps.device)[:, None, None]
    return (strongest == classes) & (values > threshold)


def intersection_over_union(masks: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return the IoU (K,) of masks (K, H, W) with others; 0 where both are empty."""
    both, either = (masks & others).sum(dim=(1, 2)), (masks | others).sum(dim=(1, 2))
    return both / either.clamp(min=1)
