"""Class maps: fusion of the two branches (Eq. 8), refinement along the affinity (Eq. 10), scales, sizes, ranges.

B images, C object classes, an h x w grid of N patches, H x W pixels. Used by seeds, pipeline, image processor and app.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

THRESHOLD = 0.4
"""Background score in [0, 1] that seeds are cut at unless another one is given; higher values give smaller masks."""

STRIP_VALUES = 1 << 22
"""Numbers in a strip of `enlarged_strips`: 16 MiB of float32."""


# ---- One forward pass.


class HasMaps(Protocol):
    """The maps of a forward pass: a `BiTransOutput`, or `ClassMaps`."""

    @property
    def affinity(self) -> torch.Tensor:
        """(B, N, N), [query, key]."""


@dataclass(frozen=True)
class ClassMaps:
    """The maps of some classes, where there is no model's output.

    Attributes:
        sc_cam: (B, C, h, w) class-to-patch attention (Eq. 2).
        coarse_cam: (B, C, h, w) before the ReLU (Eq. 6).
        affinity: (B, N, N) patch-to-patch attention (Eq. 9), [query, key].
    """

    sc_cam: torch.Tensor
    coarse_cam: torch.Tensor
    affinity: torch.Tensor

    @property
    def pseudo_mask(self) -> torch.Tensor:
        """(B, C, h, w), both maps fused."""
        return fuse(self.sc_cam, self.coarse_cam)


def fuse(sc_cam: torch.Tensor, coarse_cam: torch.Tensor) -> torch.Tensor:
    """Return SC-CAM * ReLU(Coarse-CAM), element-wise (Eq. 8)."""
    return sc_cam * coarse_cam.relu()


def compete(sc_cam: torch.Tensor, coarse_cam: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Return SC-CAM * softplus(Coarse-CAM), of which each class gets its share among the classes of the image.

    Attention finds the objects, but class tokens often look at each other's. The patch branch tells classes apart: the
    shares are a softmax, over the classes that the image shows, of its map less the map's mean, for the maps of two
    classes may lie at different levels. With one class the share is 1. Softplus keeps what attention finds where
    Coarse-CAM is unsure; the ReLU of Eq. 8 would cut it off.

    Args:
        sc_cam: (B, C, h, w).
        coarse_cam: (B, C, h, w) before the ReLU.
        present: (B, C) in [0, 1]: whether an image shows a class, or how probably.
    """
    above_mean = coarse_cam - coarse_cam.mean(dim=(2, 3), keepdim=True)
    odds = present.to(coarse_cam).clamp(min=1e-30).log()[:, :, None, None]
    return sc_cam * F.softplus(coarse_cam) * (SHARPNESS * above_mean + odds).softmax(dim=1)


SHARPNESS = 2.0
"""Factor of Coarse-CAM in the softmax of `compete`, chosen on train images; 3 and 4 do as well."""

CAM_FUSIONS: Mapping[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "fused": lambda output, present: output.pseudo_mask,
    "fused_sqrt": lambda output, present: output.pseudo_mask.sqrt(),  # MCTformer+: less peaked
    "competing": lambda output, present: compete(output.sc_cam, output.coarse_cam, present),
    "sc_cam": lambda output, present: output.sc_cam,
    "coarse_cam": lambda output, present: output.coarse_cam.relu(),
}
"""Names of `mode`: how the two branches' maps of an output become one (B, C, h, w); `present` as in `compete`."""


def fusion_of(output: Any, mode: str, present: torch.Tensor | None) -> torch.Tensor:
    """Fuse the maps of a forward pass by a name of `CAM_FUSIONS`.

    Args:
        output: A `BiTransOutput`, or `ClassMaps`, whose classes count as present.
        mode: A name of `CAM_FUSIONS`.
        present: (B, C) in [0, 1], the classes that the images show; None: as probably as the model tags them.
    """
    if present is None:
        logits = getattr(output, "logits", None)
        present = torch.ones(output.coarse_cam.shape[:2]) if logits is None else logits.float().sigmoid()
    return CAM_FUSIONS[mode](output, present)


def rows_to_one(affinity: torch.Tensor) -> torch.Tensor:
    """Divide each row of an affinity (B, N, N) by its sum."""
    return affinity / affinity.sum(dim=2, keepdim=True)


AFFINITIES: Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "attention": lambda attention, similarity: attention,
    "similarity": lambda attention, similarity: similarity,
    "joint": lambda attention, similarity: (rows_to_one(attention) + similarity) / 2,
}
"""How attention (Eq. 9) and self-similarity of the patches, both (B, N, N), become the affinity that spreads maps."""


def refine_with_affinity(
    maps: torch.Tensor, affinity: torch.Tensor, *, steps: int = 1, normalize_rows: bool = False
) -> torch.Tensor:
    """Spread class maps along patch affinities: out_i = sum_j A_ij m_j for each class (Eq. 10).

    Args:
        maps: (B, C, h, w).
        affinity: (B, N, N) with N = h*w, [query, key].
        steps: How often to spread; the paper does it once.
        normalize_rows: Divide each row of the affinity by its sum. False, the paper and MCTformer, leaves less to
            patches that give much of their attention to the class tokens.
    """
    if normalize_rows:
        affinity = rows_to_one(affinity)
    flat = maps.flatten(2)
    for _ in range(steps):
        flat = flat @ affinity.transpose(1, 2)
    return flat.reshape(maps.shape)


def fused_maps(
    output: HasMaps,
    mode: str,
    *,
    refine: bool,
    flip: bool,
    refine_steps: int = 1,
    normalize_affinity: bool = False,
    present: torch.Tensor | None = None,
) -> torch.Tensor:
    """Fuse, refine and un-flip the maps of one forward pass.

    Args:
        output: Of a batch of B images, or with `flip` of B images followed by their B horizontal mirrors.
        mode: A name of `CAM_FUSIONS`.
        refine: Spread the maps along the patch affinity (Eq. 10).
        flip: Add the mirrors' maps, turned back, to the images' maps.
        refine_steps: How often to spread them.
        normalize_affinity: Give every row of the affinity the sum 1 first.
        present: (B, C) in [0, 1], the classes that the images show; None: as probably as the model tags them.

    Returns:
        (B, C, h, w), any range.
    """
    maps = fusion_of(output, mode, present.repeat(2, 1) if flip and present is not None else present)
    if refine:
        maps = refine_with_affinity(maps, output.affinity, steps=refine_steps, normalize_rows=normalize_affinity)
    if flip:
        original, mirrored = maps.chunk(2)
        maps = original + mirrored.flip(-1)
    return maps


# ---- Several scales.


def sum_over_scales(
    scales: Iterable[Mapping[str, torch.Tensor]], size: tuple[int, int] | None
) -> dict[str, torch.Tensor]:
    """Sum the maps of all scales by their names, one scale at a time.

    Args:
        scales: For each scale name -> maps (..., h, w).
        size: (H, W) that maps are resized to before they are summed; None where all have one size.

    Returns:
        name -> (..., H, W).
    """
    totals: dict[str, torch.Tensor] = {}
    for scale in scales:
        for name, maps in scale.items():
            added = maps if size is None else resized(maps, size)
            totals[name] = totals[name] + added if name in totals else added
    return totals


# ---- Sizes and ranges.


def min_max_normalized(maps: torch.Tensor) -> torch.Tensor:
    """Scale each map (..., H, W) to [0, 1]: (x - min) / (max - min); a constant map becomes 0.

    The reference adds 1e-8 to the range. Nothing is added here, so that the result does not depend on the scale of
    the maps (a mean or a sum over layers).
    """
    low, high = maps.amin(dim=(-2, -1), keepdim=True), maps.amax(dim=(-2, -1), keepdim=True)
    return (maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny)


def resized(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize maps (..., h, w) to (..., H, W) bilinearly; maps of that size come back as they are."""
    if maps.shape[-2:] == size:
        return maps
    leading = maps.shape[:-2]
    flat = maps.reshape(1, -1, *maps.shape[-2:])
    return F.interpolate(flat, size=size, mode="bilinear").reshape(*leading, *size)


def enlarged_strips(maps: torch.Tensor, size: tuple[int, int]) -> Iterator[tuple[slice, torch.Tensor]]:
    """Resize maps (L, h, w) to (L, H, W) bilinearly, as `resized` does, in strips: bounded memory at any size.

    No value leaves the range of its map. Maps of that size come back as they are, in one strip.

    Args:
        maps: Any float type.
        size: (H, W), at least (h, w).

    Yields:
        Rows of the result, from top to bottom, and the values there, (L, rows, W).
    """
    height, width = size
    if maps.shape[-2:] == size:
        yield slice(0, height), maps
        return
    rows = max(1, STRIP_VALUES // (max(1, len(maps)) * width))
    for start in range(0, height, rows):
        stop = min(start + rows, height)
        yield slice(start, stop), interpolated(interpolated(maps, 1, height, start, stop), 2, width, 0, width)


def interpolated(maps: torch.Tensor, dim: int, length: int, start: int, stop: int) -> torch.Tensor:
    """Return the places `start` to `stop` of one side of `maps`, were it resized linearly to `length`."""
    source = maps.shape[dim]
    places = ((torch.arange(start, stop, dtype=torch.float64) + 0.5) * source / length - 0.5).clamp(0, source - 1)
    low = places.long()
    high = (low + 1).clamp(max=source - 1)
    shape = [-1 if axis == dim else 1 for axis in range(maps.dim())]
    weight = (places - low).to(maps.dtype).reshape(shape).to(maps.device)
    first, last = (maps.index_select(dim, each.to(maps.device)) for each in (low, high))
    return torch.lerp(first, last, weight)  # which does not leave the range of its ends


def strongest_row(label_ids: Sequence[int], rows: Iterable[torch.Tensor]) -> torch.Tensor:
    """Give every pixel the label id of its highest score, as `argmax` over stacked rows does: of equals the first.

    Rows are taken one at a time, so that an image of 48 million pixels and 80 classes needs two of them in memory.

    Args:
        label_ids: Label id of each row, in [0, 255].
        rows: As many score maps (H, W), the first of which is the background's.

    Returns:
        (H, W) uint8.
    """
    best: torch.Tensor | None = None
    label_map = torch.empty(0, dtype=torch.uint8)
    for label_id, row in zip(label_ids, rows, strict=True):
        if best is None:
            best, label_map = row, torch.full(row.shape, label_id, dtype=torch.uint8, device=row.device)
            continue
        label_map[row > best] = label_id
        best = torch.maximum(best, row)
    return label_map
