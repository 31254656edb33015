"""PSA's random walk: class scores spread along a learned affinity, in memory O(edges).

The transition matrix is T = W^beta (element by element), each column divided by its sum, and scores become
``vec(M) T^t`` with t = 2 ** num_doublings (Ahn & Kwak, CVPR 2018, arXiv:1803.10464, as the public code computes it).
That code squares a dense T num_doublings times; here t products with the scores give the same result.
"""

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..hub.errors import InputError

Affinity = torch.Tensor | Sequence[torch.Tensor]
"""W of one image, dense or sparse (N, N); of B images, dense (B, N, N) or a list of B sparse (N, N)."""


def propagate(cams: torch.Tensor, affinity: Affinity, *, beta: float = 8.0, num_doublings: int = 6) -> torch.Tensor:
    """Spread class scores to similar cells by a random walk.

    Args:
        cams: (C, h, w) scores of one image or (B, C, h, w) of images of one size, any range, on the affinity's grid;
            background is one of the C channels where it takes part. Give present classes only: time is in
            proportion to C.
        affinity: W of each image over the N = h*w cells in row-major order, values in [0, 1], 1 on the diagonal:
            for one image (N, N) dense or sparse, for B images (B, N, N) dense or a list of B sparse (N, N).
        beta: Element-wise power; larger values cut weak links (PSA: 8).
        num_doublings: log2 of the number of steps (PSA: 8, SEAM and MCTformer: 6, which is 64 steps).

    Returns:
        Shape, dtype and device of `cams`. Every value is a weighted mean of its channel's inputs (columns of T sum to
        1), so the range of a channel cannot grow.

    Raises:
        ValueError: shapes or devices that do not belong together, a value that is NaN, infinite or (in the affinity)
            negative, a column of the affinity without any entry, a beta that is not positive.

    Example:
        >>> propagate(torch.tensor([[[1.0, 0.0]]]), torch.ones(2, 2))
        tensor([[[0.5000, 0.5000]]])
    """
    _check_walk(beta, num_doublings)
    if cams.dim() not in (3, 4):
        raise InputError(f"scores must be (C, h, w) or (B, C, h, w), got {tuple(cams.shape)}.")
    if not torch.isfinite(cams).all():
        raise InputError("the scores hold NaN or infinity; look at the image and the network that made them.")
    affinities = _one_for_each_image(cams, affinity)
    if cams.numel() == 0:
        return cams.clone()
    num_channels, h, w = cams.shape[-3:]
    images = cams.reshape(-1, num_channels, h * w)
    # In float32 the rounding errors of 64 steps add up to more than 1e-5; sums of products cost little here.
    dtype = torch.float32 if cams.device.type == "mps" else torch.float64
    if isinstance(affinity, torch.Tensor) and affinity.layout == torch.strided:
        transition = torch.stack([_dense_transition(matrix.to(dtype), beta) for matrix in affinities])
        scores = images.to(dtype)
        for _ in range(2**num_doublings):
            scores = scores @ transition
    else:
        weights = _sparse_inflow(affinities, beta, dtype)
        sums = weights @ torch.ones(weights.shape[0], 1, dtype=dtype, device=weights.device)
        _check_sums(sums[:, 0], beta)
        columns = images.to(dtype).transpose(1, 2).reshape(-1, num_channels)
        for _ in range(2**num_doublings):
            columns = weights @ columns / sums
        scores = columns.reshape(-1, h * w, num_channels).transpose(1, 2)
    return scores.reshape(cams.shape).to(cams.dtype)


def propagate_scores(
    scores: torch.Tensor, affinity: Affinity, *, stride: int = 8, beta: float = 8.0, num_doublings: int = 6
) -> torch.Tensor:
    """Walk with scores at the image's size: average over the network's cells, `propagate`, resize, crop.

    As PSA does: the image and its scores are padded with zeros at the right and at the bottom to a multiple of the
    stride, scores are averaged over stride x stride blocks and come back by bilinear interpolation.

    Args:
        scores: (L, H, W) or (B, L, H, W) at the image's size.
        affinity: As for `propagate`, on the grid (ceil(H / stride), ceil(W / stride)).
        stride: Pixels between two cells.
        beta: See `propagate`.
        num_doublings: See `propagate`.

    Returns:
        Shape, dtype and device of `scores`.

    Raises:
        ValueError: see `propagate`.
    """
    if scores.dim() not in (3, 4):
        raise InputError(f"scores must be (L, H, W) or (B, L, H, W), got {tuple(scores.shape)}.")
    height, width = scores.shape[-2:]
    maps = scores.to(torch.promote_types(scores.dtype, torch.float32)).flatten(0, -3).unsqueeze(1)  # L may be 0
    cells = F.avg_pool2d(F.pad(maps, (0, -width % stride, 0, -height % stride)), stride)
    grid = (cells.shape[2], cells.shape[3])
    walked = propagate(cells.reshape(*scores.shape[:-2], *grid), affinity, beta=beta, num_doublings=num_doublings)
    large = F.interpolate(walked.reshape(cells.shape), scale_factor=stride, mode="bilinear")
    return large[:, 0, :height, :width].reshape(scores.shape).to(scores.dtype)


def transition_matrix(affinity: torch.Tensor, *, beta: float = 8.0, num_doublings: int = 6) -> torch.Tensor:
    """Return T^(2 ** num_doublings) (N, N) for a dense W (N, N), by squaring as PSA does; columns sum to 1.

    This takes N^2 memory and N^3 time; `propagate` needs neither.

    Raises:
        ValueError: see `propagate`.
    """
    _check_walk(beta, num_doublings)
    if affinity.dim() != 2 or affinity.shape[0] != affinity.shape[1]:
        raise InputError(f"the affinity must be a square matrix (N, N), got {tuple(affinity.shape)}.")
    transition = _dense_transition(affinity, beta)
    for _ in range(num_doublings):
        transition = transition @ transition
    return transition


def _check_walk(beta: float, num_doublings: int) -> None:
    if not 0 < beta < float("inf"):
        raise InputError(f"beta must be a positive number, got {beta}.")
    if num_doublings < 0:
        raise InputError(f"num_doublings must be 0 or more (2 ** num_doublings steps), got {num_doublings}.")


def _one_for_each_image(cams: torch.Tensor, affinity: Affinity) -> list[torch.Tensor]:
    """Check shapes and devices and give the images' matrices as a list."""
    single = cams.dim() == 3
    count, (h, w) = (1 if single else cams.shape[0]), cams.shape[-2:]
    wanted = f"({h * w}, {h * w})"
    if isinstance(affinity, torch.Tensor):
        expected_dim = 2 if single else 3
        if affinity.dim() != expected_dim:
            shape = wanted if single else f"({count}, {h * w}, {h * w}) or a list of {count} matrices {wanted}"
            raise InputError(
                f"scores {tuple(cams.shape)} need an affinity {shape}, got one tensor {tuple(affinity.shape)}."
            )
        if affinity.layout != torch.strided and not single:
            raise InputError(f"give the sparse affinities of {count} images as a list of {count} matrices {wanted}.")
        matrices = [affinity] if single else list(affinity)
    else:
        if single:
            raise InputError(
                f"scores {tuple(cams.shape)} are of one image and need one affinity {wanted}, "
                f"got a list of {len(affinity)}; add a batch axis to the scores or pick one of the list."
            )
        matrices = list(affinity)
    if len(matrices) != count:
        raise InputError(f"scores of {count} images need as many affinities, got {len(matrices)}.")
    for matrix in matrices:
        if matrix.shape != (h * w, h * w):
            raise InputError(
                f"scores on a {h}x{w} grid need an affinity {wanted}, got {tuple(matrix.shape)}; bring the scores to "
                "the affinity network's grid first."
            )
        if matrix.device != cams.device:
            raise InputError(
                f"scores are on {cams.device}, the affinity is on {matrix.device}; move them to one device."
            )
    return matrices


def _dense_transition(affinity: torch.Tensor, beta: float) -> torch.Tensor:
    _check_values(affinity)
    weights = affinity**beta
    sums = weights.sum(dim=0, keepdim=True)
    _check_sums(sums[0], beta)
    return weights / sums


def _sparse_inflow(affinities: list[torch.Tensor], beta: float, dtype: torch.dtype) -> torch.Tensor:
    """(W^beta)' of all images as one block-diagonal CSR matrix (B*N, B*N): row j holds what cell j takes in."""
    num_cells = affinities[0].shape[0]
    size = len(affinities) * num_cells
    lengths, columns, values = [], [], []
    for position, matrix in enumerate(affinities):
        entries = matrix.to_sparse_coo().coalesce()
        out_of, into = entries.indices()
        order = torch.argsort(into, stable=True)  # within a row, columns are in order already
        lengths.append(torch.bincount(into, minlength=num_cells))
        columns.append((out_of[order] + position * num_cells).int())  # half the memory of int64
        values.append(entries.values()[order].to(dtype))
    value = torch.cat(values)
    _check_values(value)
    starts = F.pad(torch.cat(lengths).cumsum(0), (1, 0)).int()
    with warnings.catch_warnings():
        # CSR products are tens of times faster than COO ones; only their product with a dense matrix is used.
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        return torch.sparse_csr_tensor(starts, torch.cat(columns), value**beta, (size, size), check_invariants=False)


def _check_values(affinity: torch.Tensor) -> None:
    if not torch.isfinite(affinity).all():
        raise InputError("the affinity holds NaN or infinity; the network that made it has diverged.")
    if (affinity < 0).any():
        raise InputError(f"affinities must be in [0, 1], got {affinity.min().item():.4g}.")


def _check_sums(sums: torch.Tensor, beta: float) -> None:
    if (sums == 0).any():
        raise InputError(
            f"column {int((sums == 0).nonzero()[0])} of the affinity is all zero after the power {beta:g}; "
            "a cell's affinity to itself (the diagonal) should be 1."
        )
