"""Affinities between neighboring grid cells, their labels and their loss, as in AffinityNet (PSA).

Ahn & Kwak, CVPR 2018 (arXiv:1803.10464), and the public code jiwoon-ahn/psa. Each pair is kept once: from a cell to
the cells of the half disc below and to the right of it. B images, D feature channels, an h x w grid with N = h*w
cells, P offsets, M from-cells.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .errors import InputError
from .labels import BACKGROUND, IGNORE_INDEX

_LOG_EPSILON = 1e-5  # of PSA's loss: in each logarithm and in each count


@dataclass(frozen=True)
class AffinityLabels:
    """Which pairs should be alike and which not: three masks (B, P, M) bool, at most one of them true for a pair.

    Attributes:
        background: Both cells are background.
        foreground: Both cells are of the same object class.
        negative: The cells are of different classes, background being one of them.
    """

    background: torch.Tensor
    foreground: torch.Tensor
    negative: torch.Tensor


def half_disc_offsets(radius: int = 5) -> tuple[tuple[int, int], ...]:
    """Return the (dy, dx) from a cell to its partners closer than `radius` cells, each pair once, in PSA's order.

    Raises:
        ValueError: the radius is below 1.

    Example:
        >>> half_disc_offsets(2)
        ((0, 1), (1, -1), (1, 0), (1, 1))
        >>> len(half_disc_offsets(5))
        34
    """
    if radius < 1:
        raise InputError(f"radius must be at least 1 cell, got {radius}.")
    reach = range(-radius + 1, radius)
    same_row = tuple((0, dx) for dx in range(1, radius))
    return same_row + tuple((dy, dx) for dy in range(1, radius) for dx in reach if dy**2 + dx**2 < radius**2)


def fitting_radius(size: tuple[int, int], radius: int = 5) -> int:
    """Return `radius`, or what PSA takes in its place on a grid (h, w) with a side below 2 * radius + 1 cells.

    All functions of this file shrink the radius in this way, so P depends on the grid where it is that small. A
    radius of 1 means that no cell has a partner.
    """
    shorter = min(size)
    return radius if shorter >= 2 * radius + 1 else max(1, (shorter - 1) // 2)


def pair_affinity(features: torch.Tensor, radius: int = 5) -> torch.Tensor:
    """Compare neighboring cells: exp(-mean over D of |f_i - f_j|), PSA's Eq. for W_ij.

    Args:
        features: (B, D, h, w), any range.
        radius: In cells; partners are those closer than this.

    Returns:
        (B, P, M) in (0, 1]: offsets in the order of `half_disc_offsets`, from-cells row by row. From-cells leave out
        the last radius - 1 rows and radius - 1 columns on both sides, where the half disc would reach outside.
    """
    radius = fitting_radius((features.shape[2], features.shape[3]), radius)
    affinities: torch.Tensor = _PairAffinity.apply(features, radius)
    return affinities


class _PairAffinity(torch.autograd.Function):
    """`pair_affinity` that keeps the features and the result for backward, not P differences of the features' size."""

    @staticmethod
    def forward(ctx: Any, features: torch.Tensor, radius: int) -> torch.Tensor:
        start = _from_cells(features, radius)
        affinities = features.new_empty(len(start), len(half_disc_offsets(radius)), start.shape[2] * start.shape[3])
        for number, offset in enumerate(half_disc_offsets(radius)):
            distance = (_partners(features, radius, offset) - start).abs_().mean(dim=1)
            affinities[:, number] = torch.exp(-distance).flatten(1)
        ctx.save_for_backward(features, affinities)
        ctx.radius = radius
        return affinities

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_affinities: torch.Tensor) -> tuple[torch.Tensor, None]:
        features, affinities = ctx.saved_tensors
        grad_features = torch.zeros_like(features)
        start, grad_start = _from_cells(features, ctx.radius), _from_cells(grad_features, ctx.radius)
        # d exp(-mean |f_j - f_i|) = -exp(...) / D * sign(f_j - f_i) (df_j - df_i)
        grad_signs = -grad_affinities * affinities / features.shape[1]
        for number, offset in enumerate(half_disc_offsets(ctx.radius)):
            signs = (_partners(features, ctx.radius, offset) - start).sign_()
            signs *= grad_signs[:, number].reshape(len(signs), 1, *signs.shape[2:])
            _partners(grad_features, ctx.radius, offset).add_(signs)
            grad_start -= signs
        return grad_features, None


def pair_indices(size: tuple[int, int], radius: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the row-major cell numbers of all pairs on a grid (h, w): from-cells (M,) and partners (P, M), int64."""
    h, w = size
    radius = fitting_radius(size, radius)
    cells = torch.arange(h * w).reshape(1, 1, h, w)
    start = _from_cells(cells, radius).flatten()
    partners = [_partners(cells, radius, offset).flatten() for offset in half_disc_offsets(radius)]
    return start, torch.stack(partners) if partners else torch.zeros(0, start.numel(), dtype=torch.int64)


def affinity_matrix(pairs: torch.Tensor, size: tuple[int, int], radius: int = 5) -> list[torch.Tensor]:
    """Turn pair affinities into the symmetric matrix W of each image.

    Args:
        pairs: (B, P, M) of `pair_affinity`.
        size: (h, w) of the grid.
        radius: As given to `pair_affinity`.

    Returns:
        B sparse COO tensors (N, N), coalesced, with 1 on the diagonal and only the 2*P*M + N entries that are known:
        memory O(edges). `.to_dense()` gives PSA's matrix.

    Raises:
        ValueError: `pairs` does not belong to a grid of this size and radius.
    """
    start, partners = pair_indices(size, radius)
    if pairs.dim() != 3 or pairs.shape[1:] != partners.shape:
        raise InputError(
            f"pair affinities of a {size[0]}x{size[1]} grid at radius {radius} have shape (B, {partners.shape[0]}, "
            f"{partners.shape[1]}), got {tuple(pairs.shape)}; give the size of the features and the same radius."
        )
    num_cells = size[0] * size[1]
    start, partners = start.expand_as(partners).flatten().to(pairs.device), partners.flatten().to(pairs.device)
    diagonal = torch.arange(num_cells, device=pairs.device)
    rows, columns = torch.cat([start, partners, diagonal]), torch.cat([partners, start, diagonal])
    order = torch.argsort(rows * num_cells + columns)
    indices = torch.stack([rows[order], columns[order]])
    matrices = []
    for values in pairs.flatten(1):
        entries = torch.cat([values, values, values.new_ones(num_cells)])[order]
        matrices.append(
            torch.sparse_coo_tensor(
                indices, entries, (num_cells, num_cells), is_coalesced=True, check_invariants=False
            )
        )
    return matrices


def affinity_labels(label_maps: torch.Tensor, radius: int = 5) -> AffinityLabels:
    """Tell for each pair of cells whether both have the same label.

    Args:
        label_maps: (B, h, w) label ids of the cells, 0 background, 255 unsure; any integer type.
        radius: In cells.

    Returns:
        Masks (B, P, M); a pair with an unsure cell is in none of them.
    """
    radius = fitting_radius((label_maps.shape[1], label_maps.shape[2]), radius)
    cells = label_maps.unsqueeze(1)
    start = _from_cells(cells, radius).flatten(1).unsqueeze(1)
    partners = [_partners(cells, radius, offset).flatten(1) for offset in half_disc_offsets(radius)]
    partner = torch.stack(partners, dim=1) if partners else start.new_zeros(start.shape[0], 0, start.shape[2])
    sure = (start != IGNORE_INDEX) & (partner != IGNORE_INDEX)
    same = (start == partner) & sure
    return AffinityLabels(
        background=same & (start == BACKGROUND),
        foreground=same & (start != BACKGROUND),
        negative=(start != partner) & sure,
    )


def affinity_loss(pairs: torch.Tensor, labels: AffinityLabels) -> dict[str, torch.Tensor]:
    """Binary cross-entropy of pair affinities, balanced between background, objects and unlike pairs.

    PSA's loss: masked means over all pairs of the batch, background/4 + foreground/4 + negative/2. A kind of pair that
    does not occur has a term of 0.

    Args:
        pairs: (B, P, M) in [0, 1].
        labels: Masks of the same shape.

    Returns:
        Scalars in float32: "background", "foreground", "negative" before weighting, and "total".
    """
    pairs = pairs.float()
    alike, unlike = -torch.log(pairs + _LOG_EPSILON), -torch.log(1.0 + _LOG_EPSILON - pairs)
    terms = {
        "background": _masked_mean(alike, labels.background),
        "foreground": _masked_mean(alike, labels.foreground),
        "negative": _masked_mean(unlike, labels.negative),
    }
    total = terms["background"] / 4 + terms["foreground"] / 4 + terms["negative"] / 2
    return {**terms, "total": total}


def _masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (values * mask).sum() / (mask.sum() + _LOG_EPSILON)


def _from_cells(grid: torch.Tensor, radius: int) -> torch.Tensor:
    """(B, D, h, w) -> (B, D, h - reach, w - 2 * reach) with reach = radius - 1."""
    return _partners(grid, radius, (0, 0))


def _partners(grid: torch.Tensor, radius: int, offset: tuple[int, int]) -> torch.Tensor:
    """Cells at `offset` from each from-cell, in the shape of `_from_cells`."""
    (dy, dx), reach = offset, radius - 1
    h, w = grid.shape[2:]
    return grid[:, :, dy : h - reach + dy, reach + dx : w - reach + dx]
