"""From scores to label maps: background score, ignore bands, palette PNGs."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..file_names import ID_KEY, SHORTENED
from ..files import atomic_write
from ..hub.errors import InputError
from ..hub.labels import BACKGROUND, IGNORE_INDEX, palette
from ..hub.maps import enlarged_strips
from ..hub.seeds import Seeds

CONFIDENCE_KEY = "confidence"
"""Key in a PNG's text of how sure its masks are, as JSON."""

NO_SCORE = 1e-5
"""A pixel whose scores are all below this counts as not scored (PSA: the zero padding of a crop)."""

# ---- Scores.


def with_background(maps: np.ndarray, *, threshold: float | None = None, alpha: float | None = None) -> np.ndarray:
    """Prepend a background score to the class maps.

    Args:
        maps: (K, H, W) scores of the present classes in [0, 1]; K may be 0.
        threshold: A constant background score in [0, 1], as MCTformer's random walk has it.
        alpha: Or the exponent of (1 - max_k map_k) ** alpha, as PSA has it: small values give much background, large
            ones little (PSA 4 and 32, MCTformer 1 and 12 for its two label maps).

    Returns:
        (1 + K, H, W) float32.

    Raises:
        ValueError: not exactly one of both rules is given, or its value is out of range.
    """
    maps = np.asarray(maps, dtype=np.float32)
    if (threshold is None) == (alpha is None):
        raise InputError(f"give either a threshold or alpha, got threshold {threshold} and alpha {alpha}.")
    if threshold is not None:
        _check_threshold("threshold", threshold)
        background = np.full(maps.shape[1:], threshold, dtype=np.float32)
    else:
        if not 0 < alpha < float("inf"):  # type: ignore[operator]  # one of both is given
            raise InputError(f"alpha must be a positive number, got {alpha}.")
        background = (1 - np.clip(maps.max(axis=0, initial=0.0), 0, 1)) ** np.float32(alpha)
    return np.concatenate([background[None], maps])


# ---- Label maps.


def scores_to_label_map(class_ids: np.ndarray, scores: np.ndarray, size: tuple[int, int] | None = None) -> np.ndarray:
    """Take the highest-scoring label of each pixel; on a tie the first, so background before classes.

    Args:
        class_ids: (K,) 0-based ids of the classes that rows 1 to K belong to.
        scores: (1 + K, h, w), background as row 0.
        size: (H, W) of the label map where the scores are smaller; they are enlarged bilinearly, a strip at a time.

    Returns:
        (H, W) uint8 with 0 for background and class id + 1 for objects.

    Raises:
        ValueError: the rows do not fit the class ids, a class id above 253, or NaN.
    """
    label_ids = _label_ids(class_ids, scores)
    strips = enlarged_strips(torch.from_numpy(np.ascontiguousarray(scores)), size or scores.shape[1:])
    return np.concatenate([label_ids[strip.numpy().argmax(axis=0)] for _, strip in strips])


def seeds_to_label_map(seeds: Seeds, threshold: float, size: tuple[int, int] | None = None) -> np.ndarray:
    """Threshold seeds into a label map: the class with the highest score if it exceeds the background score.

    Args:
        seeds: K class maps (K, H, W) in [0, 1].
        threshold: Constant background score in [0, 1]; a pixel whose best class only equals it stays background, and
            of equal classes the first wins, as `argmax` over [threshold; maps] does.
        size: (H, W) of the label map where the seeds were read at a smaller size.

    Returns:
        (H, W) uint8 with 0 for background and class id + 1 for objects.

    Raises:
        ValueError: the threshold is outside [0, 1].
    """
    return scores_to_label_map(seeds.class_ids, with_background(seeds.maps, threshold=threshold), size)


def label_map_with_ignore_band(class_ids: np.ndarray, maps: np.ndarray, *, low: float, high: float) -> np.ndarray:
    """Label only confident pixels: a class above the high threshold, background up to the low one, nothing in between.

    This is AFA's rule for its pseudo labels (0.35 and 0.55 there).

    Args:
        class_ids: (K,) 0-based ids of the classes of `maps`.
        maps: (K, H, W) in [0, 1], without a background score.
        low: Threshold in [0, 1].
        high: Threshold in [low, 1].

    Returns:
        (H, W) uint8 with 0, class id + 1, and 255 where unsure.

    Raises:
        ValueError: thresholds out of range or order, or as for `scores_to_label_map`.
    """
    _check_threshold("low", low)
    _check_threshold("high", high)
    if low > high:
        raise InputError(f"the low threshold must not exceed the high one, got {low} and {high}.")
    scores = with_background(maps, threshold=high)
    label_map = scores_to_label_map(class_ids, scores)
    label_map[(label_map == BACKGROUND) & (scores[1:].max(axis=0, initial=0.0) > low)] = IGNORE_INDEX
    return label_map


def confident_label_map(class_ids: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Merge two score stacks, with high and with low background, into the labels that AffinityNet is trained with.

    PSA's rule: an object is confident if it wins against a high background, background if it wins even when it is low;
    all else is unsure, including pixels without any score (the padding of a crop).

    Args:
        class_ids: (K,) 0-based ids of the classes that rows 1 to K belong to.
        low: (1 + K, H, W) refined scores of the low alpha (much background), or their averages over grid cells.
        high: (1 + K, H, W) of the high alpha (little background).

    Returns:
        (H, W) uint8 with 0, class id + 1, and 255 where unsure.

    Raises:
        ValueError: the two stacks differ in shape, or as for `scores_to_label_map`.
    """
    if low.shape != high.shape:
        raise InputError(f"scores of both alphas must have one shape, got {low.shape} and {high.shape}.")
    label_map = scores_to_label_map(class_ids, low)
    label_map[label_map == BACKGROUND] = IGNORE_INDEX
    label_map[scores_to_label_map(class_ids, high) == BACKGROUND] = BACKGROUND
    label_map[np.maximum(low.max(axis=0), high.max(axis=0)) < NO_SCORE] = IGNORE_INDEX
    return label_map


def _label_ids(class_ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the label id of each row, (1 + K,) uint8."""
    if scores.ndim != 3 or len(scores) != 1 + len(class_ids):
        raise InputError(
            f"scores of {len(class_ids)} classes and background must be ({1 + len(class_ids)}, H, W), "
            f"got {scores.shape}."
        )
    if len(class_ids) and not 0 <= np.min(class_ids) <= np.max(class_ids) < IGNORE_INDEX - 1:
        raise InputError(f"a PNG holds the class ids 0 to {IGNORE_INDEX - 2}, got {np.max(class_ids)}.")
    if np.isnan(scores).any():
        raise InputError("the scores hold NaN; look at the network that made them.")
    return np.concatenate([[BACKGROUND], np.asarray(class_ids) + 1]).astype(np.uint8)


def _check_threshold(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise InputError(f"{name} must be in [0, 1], got {value}.")


# ---- Files.


def write_label_png(
    path: Path, label_map: np.ndarray, image_id: str | None = None, confidence: Mapping[str, float] | None = None
) -> None:
    """Write a label map (H, W) uint8 as a PNG with the VOC palette, by atomic rename.

    Args:
        path: See `file_names.label_path`.
        label_map: (H, W) uint8.
        image_id: Stored in the file if its name is too long, for `file_names.label_files`.
        confidence: Class name -> how sure its mask is, in [0, 1]; stored in the file, for `read_confidence`.

    Raises:
        ValueError: the map is not (H, W) uint8.
        OSError: the disk is full, among others; nothing is left at `path`.
    """
    if label_map.ndim != 2 or label_map.dtype != np.uint8:
        raise InputError(f"a label map is (H, W) uint8, got {label_map.shape} {label_map.dtype}.")
    image = Image.fromarray(label_map)
    image.putpalette(palette())
    text = PngInfo()
    if image_id is not None and any(SHORTENED in part for part in path.parts):
        text.add_itxt(ID_KEY, image_id)
    if confidence is not None:
        text.add_itxt(CONFIDENCE_KEY, json.dumps(dict(confidence)))
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=text)


def read_confidence(path: Path) -> dict[str, float]:
    """Return what `write_label_png` was told of how sure the masks of a file are; empty if nothing."""
    with Image.open(path) as image:
        return dict(json.loads(image.info.get(CONFIDENCE_KEY, "{}")))
