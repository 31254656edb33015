"""From a stored image to the tensor that a model trains on, reproducible in any process."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from datasets import Dataset
from PIL import Image as PILImage
from timm.data.transforms_factory import create_transform
from torchvision import transforms

from ..hub.image_processing_bitrans import BiTransImageProcessor
from ..hub.labels import class_ids_to_multi_hot
from .common import DataError, open_image
from .rows import class_names, require_labels
from .training_set import Item, TrainingSet

Transform: TypeAlias = Callable[[PILImage.Image], torch.Tensor]

_BICUBIC = transforms.InterpolationMode.BICUBIC


# ---- Presets of augmentation.


def training_transform(image_size: int, preset: str = "reference", **options: Any) -> Transform:
    """Return an augmentation of RGB images for training on image labels.

    Args:
        image_size: Side S of the square crops in pixels.
        preset: "reference" is MCTformer's: random resized crop, flip, RandAugment, random erasing. "crop_flip" leaves
            out the last two and crops less tightly. "flip" resizes to the square and flips, for images whose objects
            must stay visible. "rescale_crop" is IRN's: the longer side is drawn, proportions stay, and what a crop has
            beside a smaller image is 0 once normalized.
        **options: Options of the preset:
            reference: `scale=(0.08, 1.0)`, `ratio=(3/4, 4/3)`, `hflip=0.5`, `rand_augment="rand-m9-mstd0.5-inc1"`
            (timm's grammar), `erasing=0.25` (probability);
            crop_flip: `scale=(0.4, 1.0)`, `ratio=(3/4, 4/3)`, `hflip=0.5`;
            flip: `hflip=0.5`;
            rescale_crop: `longer_side=(320, 640)` in pixels, both included, `hflip=0.5`.

    Returns:
        A function from a PIL RGB image to a normalized tensor (3, S, S). It draws from the generators of `random`,
        numpy and torch.

    Raises:
        DataError: unknown preset.
        TypeError: an option that the preset does not have.
    """
    if preset not in PRESETS:
        raise DataError(f"augmentation preset {preset!r} is unknown, expected one of {', '.join(PRESETS)}.")
    return PRESETS[preset](image_size, **options)


def _reference(
    image_size: int,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
    rand_augment: str = "rand-m9-mstd0.5-inc1",
    erasing: float = 0.25,
) -> Transform:
    # The reference's color jitter is missing on purpose: timm switches it off as soon as RandAugment is on.
    transform: Transform = create_transform(
        image_size,
        is_training=True,
        scale=scale,
        ratio=ratio,
        hflip=hflip,
        auto_augment=rand_augment,
        interpolation="bicubic",
        mean=tuple(BiTransImageProcessor.image_mean),
        std=tuple(BiTransImageProcessor.image_std),
        re_prob=erasing,
        re_mode="pixel",
        re_count=1,
    )
    return transform


def _crop_flip(
    image_size: int,
    *,
    scale: tuple[float, float] = (0.4, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
) -> Transform:
    crop = transforms.RandomResizedCrop(image_size, scale=scale, ratio=ratio, interpolation=_BICUBIC)
    return _chain(crop, transforms.RandomHorizontalFlip(hflip))


def _flip(image_size: int, *, hflip: float = 0.5) -> Transform:
    resize = transforms.Resize((image_size, image_size), interpolation=_BICUBIC)
    return _chain(resize, transforms.RandomHorizontalFlip(hflip))


def _rescale_crop(image_size: int, *, longer_side: tuple[int, int] = (320, 640), hflip: float = 0.5) -> Transform:
    shortest, longest = longer_side
    if not 1 <= shortest <= longest:
        raise DataError(f"longer_side must be two rising numbers of pixels, got {tuple(longer_side)}.")

    def rescale(picture: PILImage.Image) -> PILImage.Image:
        factor = int(torch.randint(shortest, longest + 1, ())) / max(picture.size)
        width, height = (max(1, round(side * factor)) for side in picture.size)
        return picture.resize((width, height), PILImage.Resampling.BICUBIC)

    # Padded by as much as is missing on either side, a smaller image lies anywhere in the crop.
    crop = transforms.RandomCrop(image_size, pad_if_needed=True)
    whole = _chain(rescale, transforms.RandomHorizontalFlip(hflip))
    chain: Transform = transforms.Compose([whole, crop])
    return chain


def _chain(*steps: Callable[[PILImage.Image], PILImage.Image]) -> Transform:
    """Return `steps`, then the conversion to a normalized tensor, as one function."""
    normalize = transforms.Normalize(BiTransImageProcessor.image_mean, BiTransImageProcessor.image_std)
    chain: Transform = transforms.Compose([*steps, transforms.ToTensor(), normalize])
    return chain


PRESETS: Mapping[str, Callable[..., Transform]] = {
    "reference": _reference,
    "crop_flip": _crop_flip,
    "flip": _flip,
    "rescale_crop": _rescale_crop,
}
"""Augmentations by name; each takes the size of the crop and its own options."""


# ---- Images of a data set, augmented.


class TrainingImages(TrainingSet[tuple[list[int], PILImage.Image]]):
    """Augmented images with multi-hot image labels.

    An item is `{"pixel_values": (3, S, S) float, "labels": (C,) float32 of 0 and 1, "index": int, "unreadable": str}`
    and a function of (seed, epoch, index) alone; the caller's random generators are left unchanged. An unreadable
    image is replaced together with its labels: see `TrainingSet`.
    """

    def __init__(self, dataset: Dataset, transform: Transform, *, seed: int = 0, strict: bool = False) -> None:
        """Wrap a data set of this package.

        Args:
            dataset: Rows of `image_id`, `image` and `labels`; other columns, masks in particular, are not read.
            transform: From a PIL RGB image to a tensor, e.g. a `training_transform`.
            seed: Of all random draws, 0 or greater.
            strict: Raise `UnreadableImageError` instead of replacing an image.

        Raises:
            DataError: the dataset is empty, lacks labels of named classes for some row, or the seed is negative.
        """
        self.classes = class_names(dataset)
        require_labels(dataset)
        super().__init__(dataset, ("image", "labels"), seed=seed, strict=strict)
        self._transform = transform

    def __getitem__(self, index: int) -> Item:
        asked = range(len(self))[index]
        (labels, picture), origin = self._readable(asked)
        with seeded(self._seed, int(self._epoch), asked):
            pixel_values = self._transform(picture)
        multi_hot = torch.from_numpy(class_ids_to_multi_hot(labels, len(self.classes)))
        return {
            "pixel_values": pixel_values,
            "labels": multi_hot,
            "index": origin.position,
            "unreadable": origin.unreadable,
        }

    def _open(self, row: Mapping[str, Any]) -> tuple[list[int], PILImage.Image]:
        return row["labels"], open_image(row["image"])


@contextmanager
def seeded(seed: int, epoch: int, index: int) -> Iterator[None]:
    """Seed the three generators that augmentations draw from, and restore them afterwards.

    Only torch's CPU generator is touched: `torch.manual_seed` would also reset those of the GPUs, which the model
    uses.
    """
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 - timm draws from it
    words = np.random.SeedSequence(seed, spawn_key=(epoch, index)).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))  # noqa: NPY002
    torch.default_generator.manual_seed(int(words[2]))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])
