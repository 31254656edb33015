"""Testing a segmentation network: one image at several scales, flipped, whole or in windows, fused into scores."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import nn

from ..hub.errors import InputError


class ViewOptions(TypedDict):
    """Which views of an image are passed through the network, and how their logits become one map.

    Attributes:
        scales: Factors of the image's height and width.
        flip: Pass the horizontal flip of every scale too.
        fusion: A name of `FUSIONS`.
        align_image: Resize the image with its corner pixels' centers kept in place (`align_corners` of torch).
        align_logits: The same for the resizing of logits to the image.
    """

    scales: Sequence[float]
    flip: bool
    fusion: Literal["max", "mean"]
    align_image: bool
    align_logits: bool


SINGLE_SCALE: ViewOptions = {
    "scales": (1.0,), "flip": False, "fusion": "mean", "align_image": False, "align_logits": False,
}  # fmt: skip
"""The image as it is, once."""

TEST_PRESETS: Mapping[str, ViewOptions] = {
    "mctformer": {
        "scales": (0.5, 0.75, 1.0, 1.25, 1.5),
        "flip": False,
        "fusion": "max",
        "align_image": True,
        "align_logits": False,
    },
    "deeplab-v1": {
        "scales": (0.5, 0.75, 1.0, 1.25, 1.5, 1.75),
        "flip": True,
        "fusion": "mean",
        "align_image": False,
        "align_logits": True,
    },
}
"""Views of the published tests by name: MCTformer's `seg/infer_seg.py`, and the DeepLab-V1 that retrains SEAM."""


class ViewLogits(NamedTuple):
    """Logits (1 + C, H, W) float32 of one view, turned back and at the image's size."""

    scale: float
    flipped: bool
    logits: torch.Tensor


def _max_of_probabilities(views: Iterable[torch.Tensor]) -> torch.Tensor:
    return _fold(torch.maximum, (logits.softmax(dim=0) for logits in views))


def _mean_of_logits(views: Iterable[torch.Tensor]) -> torch.Tensor:
    number = 0

    def counted() -> Iterator[torch.Tensor]:
        nonlocal number
        for logits in views:
            number += 1
            yield logits

    total = _fold(torch.add, counted())
    return (total / number).softmax(dim=0)


def _fold(join: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], maps: Iterable[torch.Tensor]) -> torch.Tensor:
    """Join maps one by one, so that only two are held at a time."""
    result: torch.Tensor | None = None
    for each in maps:
        result = each if result is None else join(result, each)
    assert result is not None  # `scales` was checked
    return result


FUSIONS: Mapping[str, Callable[[Iterable[torch.Tensor]], torch.Tensor]] = {
    "max": _max_of_probabilities,
    "mean": _mean_of_logits,
}
"""How the logits (1 + C, H, W) of all views become scores: "max", the largest probability of each class over the
views, not normalized again; "mean", the softmax of the mean logit. A fusion takes views one by one and keeps none."""


def multi_scale_scores(
    model: nn.Module,
    pixel_values: torch.Tensor,
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    fusion: Literal["max", "mean"] = "mean",
    align_image: bool = False,
    align_logits: bool = False,
    window: int | None = None,
    stride: int | None = None,
) -> torch.Tensor:
    """Score every class at every pixel of one image, with a segmentation network in evaluation mode.

    `multi_scale_scores(model, pixel_values, **TEST_PRESETS["mctformer"])` is the reference's test.

    Args:
        model: Gives `.logits` (B, 1 + C, h, w) for pixel values (B, 3, H, W) of any size, as
            `DeepLabForSemanticSegmentation` does.
        pixel_values: The normalized image (3, H, W), on the model's device.
        scales: Factors of height and width, above 0.
        flip: See the horizontal flip of every scale too; image and flip run as one batch.
        fusion: A name of `FUSIONS`.
        align_image: See `ViewOptions`.
        align_logits: See `ViewOptions`.
        window: Side in pixels of square windows that slide over each scaled image that is larger, for images that
            do not fit in memory at once; logits are averaged where windows overlap. None, or a window that covers the
            scaled image, sees the image whole.
        stride: Pixels from one window to the next; None for two thirds of the window.

    Returns:
        (1 + C, H, W) float32 in [0, 1], channel 0 is background. They sum to 1 over classes, but for "max".

    Raises:
        ValueError: the image is not (3, H, W), there are no scales, one is not above 0 or leaves less than a pixel,
            the fusion is unknown, or window and stride do not fit together.
    """
    if fusion not in FUSIONS:
        raise InputError(f"fusion must be one of {', '.join(FUSIONS)}, got {fusion!r}.")
    views = view_logits(
        model,
        pixel_values,
        scales=scales,
        flip=flip,
        align_image=align_image,
        align_logits=align_logits,
        window=window,
        stride=stride,
    )
    return FUSIONS[fusion](view.logits for view in views)


def view_logits(
    model: nn.Module,
    pixel_values: torch.Tensor,
    *,
    scales: Sequence[float],
    flip: bool,
    align_image: bool = False,
    align_logits: bool = False,
    window: int | None = None,
    stride: int | None = None,
) -> Iterator[ViewLogits]:
    """Give the logits of every view of an image, one by one: the first half of `multi_scale_scores`."""
    if pixel_values.ndim != 3 or pixel_values.shape[0] != 3:
        raise InputError(
            f"pixel_values must be one image (3, H, W), got shape {tuple(pixel_values.shape)}; pass the images of a "
            "batch one by one."
        )
    height, width = pixel_values.shape[1:]
    if not scales or not all(scale > 0 and min(int(height * scale), int(width * scale)) >= 1 for scale in scales):
        raise InputError(
            f"scales must be factors above 0 that leave a pixel of {height} x {width}, at least one; got "
            f"{list(scales)}."
        )
    if window is not None:
        stride = max(1, 2 * window // 3) if stride is None else stride
        if not 1 <= stride <= window:
            raise InputError(
                f"stride must lie in [1, window = {window}], got {stride}; a larger one leaves pixels out."
            )
    return _view_logits(model, pixel_values, scales, flip, align_image, align_logits, window, stride)


def _view_logits(
    model: nn.Module,
    pixel_values: torch.Tensor,
    scales: Sequence[float],
    flip: bool,
    align_image: bool,
    align_logits: bool,
    window: int | None,
    stride: int | None,
) -> Iterator[ViewLogits]:
    height, width = pixel_values.shape[1:]
    for scale in scales:
        size = (int(height * scale), int(width * scale))  # rounded down, as the reference does
        scaled = pixel_values.unsqueeze(0)
        if size != (height, width):
            scaled = F.interpolate(scaled, size, mode="bilinear", align_corners=align_image)
        views = torch.cat([scaled, scaled.flip(-1)]) if flip else scaled
        with torch.no_grad():
            if window is None or max(size) <= window:
                logits = model(views).logits.float()
            else:
                assert stride is not None
                logits = _logits_of_windows(model, views, window, stride)
        for flipped, map_ in enumerate(logits.unsqueeze(1)):
            # Flipped before it is resized: the same map, of which fewer values are moved.
            upright = map_.flip(-1) if flipped else map_
            resized = F.interpolate(upright, (height, width), mode="bilinear", align_corners=align_logits)
            yield ViewLogits(scale, bool(flipped), resized.squeeze(0))


def _logits_of_windows(model: nn.Module, views: torch.Tensor, window: int, stride: int) -> torch.Tensor:
    """Average the logits of overlapping windows at the size of the views (B, 3, H, W): (B, 1 + C, H, W)."""
    height, width = views.shape[2:]
    total: torch.Tensor | None = None
    count = views.new_zeros(height, width, dtype=torch.float32)
    for top in window_starts(height, window, stride):
        for left in window_starts(width, window, stride):
            part = views[:, :, top : top + window, left : left + window]
            logits = F.interpolate(model(part).logits.float(), part.shape[2:], mode="bilinear", align_corners=False)
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], height, width)
            total[:, :, top : top + window, left : left + window] += logits
            count[top : top + window, left : left + window] += 1
    assert total is not None
    return total / count


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Return where windows begin along a side, so that all are whole and cover it: the last one ends where it ends.

    Example:
        >>> window_starts(10, 4, 3)
        [0, 3, 6]
        >>> window_starts(11, 4, 3)
        [0, 3, 6, 7]
        >>> window_starts(3, 4, 3)
        [0]
    """
    last = max(0, length - window)
    return [*range(0, last, stride), last]
