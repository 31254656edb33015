"""IRN's relation of two cells: whether a class boundary lies between them (Ahn et al., CVPR 2019, arXiv:1904.05044).

IRN's second branch, displacements to the object's center, tells instances apart; the boundaries do not depend on it,
and it is not here. B images, a grid of h x w = N cells, P offsets and M from-cells as in `affinity_pairs`.
"""

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

from .affinity_pairs import affinity_matrix, fitting_radius, half_disc_offsets

BOUNDARY_STRIDE = 4
"""Pixels per cell of IRN's grid, if the backbone has a map that fine."""


class BoundaryHead(nn.Module):
    """IRN's branch of class boundaries: each map to 32 channels, on one grid, to one logit per cell."""

    def __init__(self, channels: Sequence[int]):
        super().__init__()
        self.levels = nn.ModuleList(normalized_convolution(depth, 32, 4) for depth in channels)
        self.output = nn.Conv2d(32 * len(channels), 1, 1)

    def forward(self, maps: Sequence[torch.Tensor], grid: Sequence[int]) -> torch.Tensor:
        """Map features (B, D_i, h_i, w_i) to logits (B, 1, h, w)."""
        levels = [
            F.relu(F.interpolate(level(feature_map), size=tuple(grid), mode="bilinear"))
            for level, feature_map in zip(self.levels, maps, strict=True)
        ]
        logits: torch.Tensor = self.output(torch.cat(levels, dim=1))
        return logits


def normalized_convolution(in_channels: int, out_channels: int, groups: int) -> nn.Sequential:
    """1x1 convolution and GroupNorm, IRN's unit; resizing comes before its ReLU."""
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.GroupNorm(groups, out_channels))


def path_cells(offset: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the cells (dy, dx) on the way from (0, 0) to `offset`, both included.

    These are the cells of the rectangle between them whose center is closer than 1 to the line (IRN's `PathIndex`).

    Example:
        >>> path_cells((2, 2))
        [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 1), (2, 2)]
    """
    dy, dx = offset
    ys, xs = range(min(0, dy), max(0, dy) + 1), range(min(0, dx), max(0, dx) + 1)
    return [(y, x) for y in ys for x in xs if (dy * x - dx * y) ** 2 < dy**2 + dx**2]


def boundary_to_pair_affinity(boundary: torch.Tensor, radius: int) -> torch.Tensor:
    """1 - the strongest boundary on the way between two cells (IRN's Eq. for a_ij).

    Args:
        boundary: (B, h, w) probabilities in [0, 1].
        radius: In cells.

    Returns:
        (B, P, M), pairs in the order of `affinity_pairs.pair_affinity`.
    """
    batch, h, w = boundary.shape
    reach = fitting_radius((h, w), radius) - 1

    def shifted(dy: int, dx: int) -> torch.Tensor:
        return boundary[:, dy : h - reach + dy, reach + dx : w - reach + dx]

    affinities = [
        # `max` over the stack, not pairwise: its backward pass keeps one index per pair instead of every step.
        1 - torch.stack([shifted(dy, dx) for dy, dx in path_cells(offset)]).max(dim=0).values.flatten(1)
        for offset in half_disc_offsets(reach + 1)
    ]
    return torch.stack(affinities, dim=1) if affinities else boundary.new_zeros(batch, 0, h * w)


def boundary_to_matrices(boundary: torch.Tensor, radius: int) -> list[torch.Tensor]:
    """Turn boundaries (B, h, w) into B sparse matrices (N, N), every cell with all its partners inside the image.

    As IRN, the map is extended by cells that are all boundary, which nothing passes, and these are left out again.
    """
    h, w = boundary.shape[1:]
    reach = fitting_radius((h, w), radius) - 1
    extended = F.pad(boundary, (reach, reach, 0, reach), value=1.0)
    size = (h + reach, w + 2 * reach)
    matrices = []
    for matrix in affinity_matrix(boundary_to_pair_affinity(extended, reach + 1), size, reach + 1):
        indices, values = matrix.indices(), matrix.values()
        rows, columns = indices // size[1], indices % size[1] - reach
        inside = ((rows < h) & (columns >= 0) & (columns < w)).all(dim=0)
        kept = (rows * w + columns)[:, inside]
        matrices.append(
            torch.sparse_coo_tensor(kept, values[inside], (h * w, h * w), is_coalesced=True, check_invariants=False)
        )
    return matrices
