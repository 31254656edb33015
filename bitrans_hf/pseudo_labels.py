"""Scores to label maps: the background score, and palette PNGs."""

from pathlib import Path

import numpy as np
from PIL import Image

from .labels import palette
from .seeds import Seeds
from .store import atomic_write


def seeds_to_label_map(seeds: Seeds, threshold: float) -> np.ndarray:
    """Cut seeds into a label map: the class with the highest score where it exceeds the background score.

    Args:
        seeds: K class maps (K, H, W) in [0, 1].
        threshold: Constant background score in [0, 1]; a pixel whose best class only equals it stays background, and
            of equal classes the first wins, as `argmax` over [threshold; maps] does.

    Returns:
        (H, W) uint8 with 0 for background and class id + 1 for objects.

    Raises:
        ValueError: the threshold is outside [0, 1].
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}.")
    height, width = seeds.maps.shape[1:]
    scores = np.concatenate([np.full((1, height, width), threshold, dtype=np.float32), seeds.maps])
    label_ids = np.concatenate([[0], seeds.class_ids + 1]).astype(np.uint8)
    label_map: np.ndarray = label_ids[scores.argmax(axis=0)]
    return label_map


def write_label_png(path: Path, label_map: np.ndarray) -> None:
    """Write a label map (H, W) uint8 as a PNG with the VOC palette, by atomic rename."""
    image = Image.fromarray(label_map)
    image.putpalette(palette())
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG")
