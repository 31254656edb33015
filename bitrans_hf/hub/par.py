"""Pixel-adaptive refinement (PAR): scores follow the edges of the image. Plain torch, batched, on any device.

Ru et al., "Learning Affinity from Attention" (AFA), CVPR 2022, arXiv:2203.02664. A second refiner beside the dense
CRF, without anything to compile.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from .errors import InputError

DILATIONS = (1, 2, 4, 8, 12, 24)
"""Distances in pixels of the eight neighbors, as in AFA."""

_COLOUR_SCALE, _POSITION_SCALE, _POSITION_WEIGHT = 0.3, 0.3, 0.01  # AFA's w1 (used twice) and w2


def pixel_adaptive_refinement(
    images: torch.Tensor, scores: torch.Tensor, *, dilations: Sequence[int] = DILATIONS, iterations: int = 10
) -> torch.Tensor:
    """Replace each pixel's scores by a weighted mean of its neighbors' scores, again and again.

    A pixel has eight neighbors for each dilation; beyond the border the border's pixel stands in. The neighbors'
    weights are softmax(-((|difference of color| / s) / 0.3)^2, mean over the three channels) plus
    0.01 softmax(-((distance / s') / 0.3)^2), with s and s' the standard deviations over the neighbors. They sum to
    1.01 and are divided by that here, so that scores keep their range: the result is AFA's divided by
    1.01 ** iterations, with the same argmax.

    Args:
        images: (B, 3, H, W); colors relative to each other matter, not their scale, so [0, 1], [0, 255] and float or
            uint8 are alike.
        scores: (B, L, H, W) of the same size, any range. Give present classes only: time is in proportion to L.
        dilations: Distances in pixels, each at least 1.
        iterations: How often scores are passed on.

    Returns:
        Shape, dtype and device of `scores`; each channel stays within the range that it had.

    Raises:
        ValueError: shapes or devices that do not belong together, NaN or infinity, no dilation, a dilation below 1, a
            negative number of iterations.
    """
    _check(images, scores, dilations, iterations)
    if scores.numel() == 0:
        return scores.clone()
    dtype = torch.promote_types(scores.dtype, torch.float32)
    weights = _neighbor_weights(images.to(dtype), dilations)
    refined = scores.to(dtype)
    padded = _padded(refined, dilations)
    # Made once: for small images, taking slices would cost as much as working with them.
    pairs = list(zip(weights.split(1, dim=1), _neighbors(padded, dilations), strict=True))
    for iteration in range(iterations):
        if iteration:
            padded.copy_(_padded(refined, dilations))
        refined = torch.zeros_like(refined)
        # One neighbor after the other: all 8 x len(dilations) shifted copies at once would not fit for large batches.
        for weight, neighbor in pairs:
            refined.addcmul_(weight, neighbor)
    return refined.to(scores.dtype)


def _neighbor_weights(images: torch.Tensor, dilations: Sequence[int]) -> torch.Tensor:
    """(B, 3, H, W) -> (B, P, H, W), sum 1 over the P = 8 * len(dilations) neighbors."""
    neighbors = list(_neighbors(_padded(images, dilations), dilations))  # views of one padded copy
    mean = torch.zeros_like(images)
    for neighbor in neighbors:
        mean += neighbor / len(neighbors)
    variance = torch.zeros_like(images)
    for neighbor in neighbors:
        variance += (neighbor - mean).square_() / (len(neighbors) - 1)
    scale = 1 / ((variance.sqrt_() + 1e-8) * _COLOUR_SCALE)
    color = torch.stack([-((each - images) * scale).square_().mean(dim=1) for each in neighbors], dim=1)
    distances = images.new_tensor([d * (dy * dy + dx * dx) ** 0.5 for d in dilations for dy, dx in _DIRECTIONS])
    position = -((distances / (distances.std() + 1e-8) / _POSITION_SCALE) ** 2)
    position_weights = _POSITION_WEIGHT * position.softmax(dim=0).reshape(1, -1, 1, 1)
    return (color.softmax(dim=1) + position_weights) / (1.0 + _POSITION_WEIGHT)


_DIRECTIONS = tuple((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0))


def _padded(maps: torch.Tensor, dilations: Sequence[int]) -> torch.Tensor:
    """Repeat the border of (B, C, H, W) outwards by the largest dilation."""
    return F.pad(maps, [max(dilations)] * 4, mode="replicate")


def _neighbors(padded: torch.Tensor, dilations: Sequence[int]) -> Iterator[torch.Tensor]:
    """Yield views (B, C, H, W) of padded maps, shifted by each direction at each dilation."""
    reach = max(dilations)
    height, width = (side - 2 * reach for side in padded.shape[2:])
    for dilation in dilations:
        for dy, dx in _DIRECTIONS:
            top, left = reach + dy * dilation, reach + dx * dilation
            yield padded[:, :, top : top + height, left : left + width]


def _check(images: torch.Tensor, scores: torch.Tensor, dilations: Sequence[int], iterations: int) -> None:
    if images.dim() != 4 or images.shape[1] != 3:
        raise InputError(f"images must be (B, 3, H, W), got {tuple(images.shape)}.")
    if scores.dim() != 4 or scores.shape[0] != images.shape[0] or scores.shape[2:] != images.shape[2:]:
        batch, _, height, width = images.shape
        raise InputError(
            f"scores of these images must be ({batch}, L, {height}, {width}), got {tuple(scores.shape)}; "
            "resize the scores to the image first."
        )
    if images.device != scores.device:
        raise InputError(f"images are on {images.device}, scores on {scores.device}; move them to one device.")
    if not torch.isfinite(scores).all() or not torch.isfinite(images).all():
        raise InputError("images or scores hold NaN or infinity; look at what made them.")
    if len(dilations) == 0 or min(dilations) < 1:
        raise InputError(f"dilations must be distances of at least 1 pixel, got {tuple(dilations)}.")
    if iterations < 0:
        raise InputError(f"iterations must be 0 or more, got {iterations}.")
