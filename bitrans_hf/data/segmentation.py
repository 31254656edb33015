"""Images with label maps for training a segmentation network: scaled, flipped and cropped together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from datasets import Dataset, Image
from numpy.typing import NDArray
from PIL import Image as PILImage

from ..hub.image_processing_bitrans import BiTransImageProcessor, bounded_image
from ..hub.labels import BACKGROUND, IGNORE_INDEX
from .common import DataError, ImageCell, open_image
from .masks import open_mask
from .rows import class_names
from .training_set import Item, TrainingSet

LABEL_MAP = "label_map"
"""Column of the label maps that a network is trained on: undecoded index images."""


# ---- Augmentation.


@dataclass(frozen=True)
class PairAugmentation:
    """How an image and its label map become a training crop.

    Attributes:
        crop_size: Side S of the square crops in pixels. A smaller image is placed in the upper left corner; the rest
            is 0 in the normalized image and `padding_label` in the label map.
        scale: Smallest and largest factor of the image's sides, drawn uniformly.
        one_scale_for_batch: All images of a batch get the same factor.
        hflip: Probability of a horizontal flip.
        hsv_jitter: Largest shift of hue (of OpenCV's 180), saturation and value (of 255); 0 for none.
        padding_label: Label id outside the image.
    """

    crop_size: int
    scale: tuple[float, float] = (1.0, 1.0)
    one_scale_for_batch: bool = False
    hflip: float = 0.5
    hsv_jitter: int = 0
    padding_label: int = IGNORE_INDEX

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            DataError: a value is out of range.
        """
        if self.crop_size < 1:
            raise DataError(f"crop_size must be at least 1 pixel, got {self.crop_size}.")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise DataError(f"scale must be two factors above 0, the smaller one first, got {self.scale}.")
        if not 0 <= self.hflip <= 1:
            raise DataError(f"hflip must be a probability in [0, 1], got {self.hflip}.")
        if not 0 <= self.hsv_jitter <= 90:
            raise DataError(f"hsv_jitter must lie in [0, 90], half of the hues, got {self.hsv_jitter}.")


PAIR_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "mctformer": {
        "crop_size": 321,
        "scale": (0.7, 1.3),
        "one_scale_for_batch": True,
        # The reference trains the border of small images as background.
        "padding_label": BACKGROUND,
    },
    "deeplab-v1": {"crop_size": 448, "scale": (0.5, 1.5), "hsv_jitter": 10},
}
"""Options of `PairAugmentation` by name: MCTformer's `seg/`, and the DeepLab-V1 that retrains SEAM."""


def pair_augmentation(preset: str, **options: Any) -> PairAugmentation:
    """Return a preset of `PAIR_PRESETS`, with some of its options changed.

    Raises:
        DataError: unknown preset or option, or a value that is out of range.
    """
    if preset not in PAIR_PRESETS:
        raise DataError(f"augmentation preset {preset!r} is unknown, expected one of {', '.join(PAIR_PRESETS)}.")
    try:
        made = PairAugmentation(**{**PAIR_PRESETS[preset], **options})
    except TypeError as error:
        known = ", ".join(PairAugmentation.__dataclass_fields__)
        raise DataError(
            f"augmentation options {sorted(options)} hold an unknown one, expected some of {known}."
        ) from (error)
    return made


def augment_pair(
    image: PILImage.Image,
    label_map: NDArray[np.uint8],
    augmentation: PairAugmentation,
    scale: float,
    generator: np.random.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale, flip and crop an image and its label map.

    Args:
        image: RGB.
        label_map: Label ids (H, W) of the image's size.
        augmentation: What to do.
        scale: Factor for both sides, drawn by the caller because a batch may share it.
        generator: For all other random draws.

    Returns:
        Normalized pixel values (3, S, S) float32, and label ids (S, S) int64.
    """
    size = augmentation.crop_size
    if augmentation.hsv_jitter:
        image = _shifted_hsv(image, generator.integers(-augmentation.hsv_jitter, augmentation.hsv_jitter, 3))
    height, width = (max(1, int(side * scale)) for side in label_map.shape)  # rounded down, as the reference does
    flipped = generator.random() < augmentation.hflip
    top, left = (int(generator.integers(max(0, side - size) + 1)) for side in (height, width))
    # Only the pixels of the crop are computed.
    rows, columns = np.arange(height)[top : top + size], np.arange(width)[left : left + size]
    if flipped:
        columns = width - 1 - columns
    pixels = np.full((size, size, 3), BiTransImageProcessor.image_mean, dtype=np.float32)
    pixels[: rows.size, : columns.size] = _bilinear(np.asarray(image), rows, columns, (height, width)) / np.float32(
        255
    )
    labels = np.full((size, size), augmentation.padding_label, dtype=np.int64)
    labels[: rows.size, : columns.size] = _nearest(label_map, rows, columns, (height, width))
    mean, std = (
        np.array(values, dtype=np.float32)
        for values in (BiTransImageProcessor.image_mean, BiTransImageProcessor.image_std)
    )
    normalized = np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1))
    return torch.from_numpy(normalized), torch.from_numpy(labels)


def _bilinear(
    pixels: NDArray[np.uint8], rows: NDArray[np.int64], columns: NDArray[np.int64], size: tuple[int, int]
) -> NDArray[np.float32]:
    """Return some rows and columns of `pixels` (H, W, 3) resized to `size` without antialiasing, as OpenCV does.

    In NumPy, because torch's rounding depends on the number of threads, and a crop must not.
    """
    (above, below, down), (before, after, right) = (
        _neighbors(places, new, old) for places, new, old in zip((rows, columns), size, pixels.shape, strict=False)
    )
    nearby = pixels[:, before.min() : after.max() + 1]  # a crop needs a part of each line
    before, after = before - before.min(), after - before.min()
    low, high = nearby[above].astype(np.float32), nearby[below].astype(np.float32)
    lines = low + (high - low) * down[:, None, None]
    low, high = lines.take(before, axis=1), lines.take(after, axis=1)
    result: NDArray[np.float32] = low + (high - low) * right[:, None]
    return result


def _neighbors(
    places: NDArray[np.int64], new: int, old: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Return the two pixels of `old` around each position on a side of `new` pixels, and the weight of the second."""
    centers = np.clip((places + 0.5) * old / new - 0.5, 0, old - 1)
    first = np.floor(centers).astype(np.int64)
    return first, np.minimum(first + 1, old - 1), (centers - first).astype(np.float32)


def _nearest(
    label_map: NDArray[np.uint8], rows: NDArray[np.int64], columns: NDArray[np.int64], size: tuple[int, int]
) -> NDArray[np.uint8]:
    """Return some rows and columns of a label map resized to `size`, as OpenCV does."""
    picked = (places * old // new for places, new, old in zip((rows, columns), size, label_map.shape, strict=True))
    result: NDArray[np.uint8] = label_map[np.ix_(*picked)]
    return result


def _shifted_hsv(image: PILImage.Image, shift: NDArray[np.int64]) -> PILImage.Image:
    """Shift hue (modulo 180), saturation and value (clipped to [0, 255])."""
    levels = np.arange(256)
    hue = (levels + round(float(shift[0]) * 256 / 180)) % 256  # PIL's circle has 256 hues
    others = [np.clip(levels + by, 0, 255) for by in shift[1:]]
    return image.convert("HSV").point(np.concatenate([hue, *others]).tolist()).convert("RGB")


# ---- A data set with label maps.


def with_label_maps(dataset: Dataset, label_maps: Sequence[ImageCell | None]) -> Dataset:
    """Return the rows of `dataset` with a column of label maps to train on, instead of ground truth.

    Args:
        dataset: Rows of `image_id`, `image` and `labels`.
        label_maps: For each row the path of an index image, or a cell of `{"path", "bytes"}`.
    """
    cells = [cell if isinstance(cell, Mapping) or cell is None else {"path": str(cell)} for cell in label_maps]
    kept = dataset.select_columns(["image_id", "image", "labels"])
    return kept.add_column(LABEL_MAP, cells, feature=Image(decode=False))


Pair: TypeAlias = tuple[PILImage.Image, NDArray[np.uint8]]


class TrainingPairs(TrainingSet[Pair]):
    """Augmented images with label maps.

    An item is `{"pixel_values": (3, S, S) float32, "labels": (S, S) int64, "index": int, "unreadable": str}` and a
    function of (seed, epoch, index) alone, a scale that a batch shares one of (seed, epoch, first index of the batch).
    An image or label map that cannot be read is replaced: see `TrainingSet`.
    """

    def __init__(
        self,
        dataset: Dataset,
        augmentation: PairAugmentation,
        *,
        seed: int = 0,
        strict: bool = False,
        max_side: int | None = None,
    ) -> None:
        """Wrap a data set.

        Args:
            dataset: Made by `with_label_maps`.
            augmentation: How pairs become crops.
            seed: Of all random draws, 0 or greater.
            strict: Raise `UnreadableImageError` instead of replacing an image.
            max_side: Longest side in pixels; larger pairs are reduced to `bounded_size` before they are augmented.

        Raises:
            DataError: the dataset is empty or has no label maps, or the seed is negative.
        """
        if LABEL_MAP not in dataset.column_names:
            raise DataError(f"the data set has no column {LABEL_MAP!r}; give it one with with_label_maps.")
        super().__init__(dataset, ("image", LABEL_MAP), seed=seed, strict=strict)
        self.classes = class_names(dataset)
        self._augmentation = augmentation
        self._max_side = max_side

    def __getitem__(self, index: int) -> Item:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Item]:
        """Return the items of a batch; torch's loaders ask for whole batches where they can."""
        shared = self._scale(self._generator(indices[0], "batch"))
        return [self._item(range(len(self))[index], shared) for index in indices]

    def _item(self, asked: int, shared_scale: float) -> Item:
        (image, label_map), origin = self._readable(asked)
        generator = self._generator(asked)
        own_scale = self._scale(generator)
        scale = shared_scale if self._augmentation.one_scale_for_batch else own_scale
        pixel_values, labels = augment_pair(image, label_map, self._augmentation, scale, generator)
        return {
            "pixel_values": pixel_values,
            "labels": labels,
            "index": origin.position,
            "unreadable": origin.unreadable,
        }

    def _open(self, row: Mapping[str, Any]) -> Pair:
        image, label_map = open_pair(row, len(self.classes))
        if self._max_side is not None:
            image = bounded_image(image, self._max_side)
        return image, resized_label_map(label_map, (image.height, image.width))

    def _generator(self, index: int, purpose: str = "") -> np.random.Generator:
        key = (int(self._epoch), index, *purpose.encode())
        return np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=key))

    def _scale(self, generator: np.random.Generator) -> float:
        return float(generator.uniform(*self._augmentation.scale))


def resized_label_map(label_map: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize a label map to (H, W) by taking the nearest pixel; one of that size comes back as it is."""
    if label_map.shape == size:
        return label_map
    return np.array(PILImage.fromarray(label_map).resize(size[::-1], PILImage.Resampling.NEAREST))


def open_pair(row: Mapping[str, Any], num_classes: int) -> Pair:
    """Open the image and the label map of a row.

    Raises:
        UnreadableImageError: one of them cannot be read.
        DataError: the label map does not have the image's size, or holds an id above `num_classes` that is not 255.
    """
    image = open_image(row["image"])
    return image, open_mask(row[LABEL_MAP], image_size=(image.height, image.width), num_classes=num_classes)
