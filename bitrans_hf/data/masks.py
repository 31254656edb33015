"""Masks as label ids: opened from files, painted from COCO's instances, or renumbered for another order of classes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from ..hub.labels import BACKGROUND, IGNORE_INDEX, palette
from .coco_painting import COCO_REFERENCE, painted_mask
from .common import DataError, ImageCell, MaskError, cell_name, open_image, read_image_file
from .mask_values import OPTION, MaskValueError, MaskValues, checked_ids, label_ids

_PALETTE = palette()


def open_mask(
    cell: ImageCell | None,
    *,
    image_size: tuple[int, int] | None = None,
    num_classes: int | None = None,
    values: MaskValues | None = None,
    values_option: str = OPTION,
) -> NDArray[np.uint8]:
    """Open a mask as label ids: 0 background, class id + 1 for objects, 255 ignored.

    Args:
        cell: The `mask` of a row, a path or a PIL image. Palette and gray images hold label ids directly, even if
            saved with three equal channels, as 16 or 32-bit integers, or with one bit.
        image_size: (height, width) of the image; given, the mask must have this size.
        num_classes: Number of object classes; given, other ids than 0 to `num_classes` and 255 are refused.
        values: What the pixel values mean where they are not label ids.
        values_option: The caller's option for `values`, for the advice in errors; "{}" is the place of the form.

    Returns:
        (H, W) uint8.

    Raises:
        UnreadableImageError: the file is missing, damaged or no image.
        DataError: the mask is None, is not an index image, or has the wrong size or ids.
    """
    mask = open_mask_with_palette(cell, num_classes=num_classes, values=values, values_option=values_option)[0]
    if image_size is not None and mask.shape != tuple(image_size):
        raise MaskError(
            f"mask {cell_name(cast(ImageCell, cell))} is {mask.shape[0]}x{mask.shape[1]} (height x width) and its "
            f"image {image_size[0]}x{image_size[1]}; save the mask at the size of the stored image, without EXIF "
            "rotation.",
            "size",
        )
    return mask


def open_mask_with_palette(
    cell: ImageCell | None,
    *,
    num_classes: int | None = None,
    values: MaskValues | None = None,
    values_option: str = OPTION,
) -> tuple[NDArray[np.uint8], list[int]]:
    """Open a mask as `open_mask` does, and return its palette too: red, green, blue of each value, [] without one."""
    if cell is None:
        raise DataError("the mask of this image is not known, the cell is None; leave out rows without a mask.")
    name = cell_name(cell)

    def read(image: PILImage.Image) -> tuple[NDArray[np.uint8], list[int]]:
        colors = image.getpalette("RGB") if image.mode == "P" else None
        return _label_ids(image, num_classes, values), colors or []

    try:
        if name.startswith(COCO_REFERENCE):
            return checked_ids(painted_mask(name), num_classes), []
        return read_image_file(cell, "mask", read)
    except MaskValueError as error:
        raise MaskError(f"mask {name} {error.advising(values_option)}", error.kind) from error


def colors_to_ids(
    cell: ImageCell,
    colors: Sequence[tuple[int, int, int]] | None = None,
    *,
    ignore: tuple[int, int, int] | None = None,
) -> PILImage.Image:
    """Turn a mask whose classes are colors into one whose pixels are label ids; save it as PNG.

    Args:
        cell: The mask, opened as RGB.
        colors: (red, green, blue) from 0 to 255 of each label id, background first. Default: the VOC palette, whose
            last color (224, 224, 192) is 255.
        ignore: Color of pixels that do not count, which become 255.

    Returns:
        An image of mode "P" with the VOC palette.

    Raises:
        UnreadableImageError: the file is missing, damaged or no image.
        DataError: a pixel has another color, as resized and JPEG masks have.
    """
    if colors is None:
        colors = [tuple(_PALETTE[3 * label : 3 * label + 3]) for label in range(256)]  # type: ignore[misc]
    pixels = np.asarray(open_image(cell)).astype(np.int32)
    packed = pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]
    ids = np.full(packed.shape, -1, dtype=np.int32)
    for label, (red, green, blue) in [*enumerate(colors), *([(IGNORE_INDEX, ignore)] if ignore else [])]:
        ids[packed == (red << 16 | green << 8 | blue)] = label
    if (ids < 0).any():
        row, column = (int(place) for place in np.argwhere(ids < 0)[0])
        raise MaskError(
            f"mask {cell_name(cell)} has the color {tuple(pixels[row, column].tolist())} at row {row}, "
            f"column {column}, expected one of {len(colors)} colors; was it resized with smoothing, or saved as JPEG?",
            "colors",
        )
    image = PILImage.fromarray(ids.astype(np.uint8))
    image.putpalette(_PALETTE)
    return image


def _label_ids(image: PILImage.Image, num_classes: int | None, values: MaskValues | None) -> NDArray[np.uint8]:
    return label_ids(image, num_classes) if values is None else values.label_ids(image)


def label_lookup(source: Sequence[str], target: Sequence[str]) -> NDArray[np.uint8] | None:
    """Return the lookup table (256,) from the label ids of `source` to those of `target`, or None if none changes.

    Classes that are not in `target` become background; 255 stays 255.
    """
    if list(source) == list(target):
        return None
    table = np.full(256, BACKGROUND, dtype=np.uint8)
    table[IGNORE_INDEX] = IGNORE_INDEX
    for class_id, name in enumerate(source):
        if name in target:
            table[class_id + 1] = list(target).index(name) + 1
    return table


def masks_in_order(
    masks: Sequence[Path | None],
    source: Sequence[str],
    target: Sequence[str],
    values: MaskValues | None = None,
    values_option: str = OPTION,
) -> Sequence[Path | bytes | None]:
    """Return `masks`, whose pixels are ids of `source` or `values` that mean them, with the ids of `target`.

    A mask that needs no change stays a path. Others become PNG bytes, about 3 kB and 2 ms each: a row can hold a path
    or bytes but not a rule, and files in a cache would outlive their source.

    Raises:
        DataError: a mask is unreadable or holds ids beyond `source`.
    """
    table = label_lookup(source, target)
    if table is None and values is None:
        return masks

    def translate(mask: Path | None) -> bytes | None:
        if mask is None:
            return None
        label_map = open_mask(mask, num_classes=len(source), values=values, values_option=values_option)
        return index_png(label_map if table is None else table[label_map])

    with ThreadPoolExecutor() as pool:  # PIL and zlib release the interpreter lock
        return list(pool.map(translate, masks))


def index_png(label_map: NDArray[np.uint8]) -> bytes:
    """Return a label map (H, W) as a PNG with the VOC palette."""
    image = PILImage.fromarray(label_map)
    image.putpalette(_PALETTE)
    stream = io.BytesIO()
    image.save(stream, format="PNG", compress_level=1)
    return stream.getvalue()
