"""The second view (Eq. 1): each transform f, and its inverse on images, patch maps and affinities.

All of them act on the 2-D grid. Flipping the flattened patch axis instead would turn the image by 180 degrees.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class View:
    """A transform f of the last two axes of a tensor, and its inverse."""

    apply: Callable[[torch.Tensor], torch.Tensor]
    invert: Callable[[torch.Tensor], torch.Tensor]
    keeps_shape: bool = True
    """False when height and width are exchanged: such a view needs square images."""


VIEWS: dict[str, View] = {
    "hflip": View(lambda x: x.flip(-1), lambda x: x.flip(-1)),
    "vflip": View(lambda x: x.flip(-2), lambda x: x.flip(-2)),
    "rot90": View(lambda x: x.rot90(1, (-2, -1)), lambda x: x.rot90(-1, (-2, -1)), keeps_shape=False),
    "rot180": View(lambda x: x.flip(-2, -1), lambda x: x.flip(-2, -1)),
    "none": View(lambda x: x, lambda x: x),
}
"""Names of `BiTransConfig.view`; "none" means that there is no second view (the single-view baseline)."""


def invert_affinity(view: View, affinity: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Apply f^-1 to an affinity between patches: rows (queries) and columns (keys) are both put back (Eq. 11).

    Args:
        view: A row of `VIEWS`.
        affinity: (B, N, N) with N = h*w, patches in row-major order of the *transformed* image.
        grid: (h, w) of the transformed image.

    Returns:
        (B, N, N), rows and columns in row-major order of the original image.
    """
    batch = affinity.shape[0]
    h, w = grid
    columns_back = view.invert(affinity.reshape(batch, h * w, h, w)).flatten(2)
    rows_back = view.invert(columns_back.transpose(1, 2).reshape(batch, h * w, h, w)).flatten(2)
    return rows_back.transpose(1, 2)
