"""Images of a run: seeds and label maps overlaid on photos, and grids of them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from ..hub.errors import InputError
from ..hub.labels import BACKGROUND, IGNORE_INDEX, palette
from ..hub.seeds import Seeds

VARIANT_TITLES = {"sc_cam": "SC-CAM", "coarse_cam": "Coarse-CAM", "fused": "Product", "refined": "Refined seed"}
"""Heading of each seed variant, in the order of the columns."""


PHOTO, TARGET, MASK = "Photo", "Ground truth", "Mask"


NUM_ROWS_IN_GRID = 8


@dataclass(frozen=True)
class GalleryRow:
    """One image with its seeds and label maps.

    Attributes:
        image_id: Id of the image.
        image: The photo, RGB.
        target: True label map (H, W) uint8 of the photo's size; None if unknown.
        maps: Variant name -> seeds at the photo's size; the variants of `VARIANT_TITLES` come first, others follow.
        label_map: Predicted label map (H, W) uint8, or None.
        class_names: Names of all object classes, indexed by class id.
        caption: A short remark beside the name.
        steps: Label maps (H, W) of later stages by their headings, shown after `label_map`.
    """

    image_id: str
    image: Image.Image
    target: npt.NDArray[np.uint8] | None
    maps: Mapping[str, Seeds]
    label_map: npt.NDArray[np.uint8] | None
    class_names: Sequence[str]
    caption: str = ""
    steps: Mapping[str, npt.NDArray[np.uint8]] = field(default_factory=dict)


@dataclass(frozen=True)
class GalleryLine:
    """One line of images: the maps of one class; photo, ground truth and mask stand in an image's first line only.

    Attributes:
        class_name: The class whose maps are shown, "" in an image without classes.
        cells: Column heading -> image at the photo's size.
    """

    class_name: str
    cells: Mapping[str, Image.Image]


def heat_overlay(image: Image.Image, cam: npt.NDArray[np.floating], strength: float = 0.5) -> Image.Image:
    """Blend a class map over its photo: blue is 0, red is 1.

    Args:
        image: Photo of any mode, W x H.
        cam: Map (H, W) in [0, 1].
        strength: Weight of the colors in [0, 1].

    Returns:
        An RGB image of the photo's size. The photo beneath is gray, so that its colors are not taken for heat.

    Raises:
        ValueError: the sizes differ or the map leaves [0, 1].
    """
    _check_size(image, cam, "class map")
    # Written so that nan fails too.
    if cam.size and not (cam.min() >= 0 and cam.max() <= 1):
        raise InputError(f"class map has values in [{cam.min():g}, {cam.max():g}]; normalize it to [0, 1] first.")
    grey = np.asarray(image.convert("L"), dtype=np.float32)[..., None]
    heat = matplotlib.colormaps["jet"](cam)[..., :3] * 255
    return _to_image((1 - strength) * grey + strength * heat)


def label_overlay(image: Image.Image, label_map: npt.NDArray[np.uint8], strength: float = 0.7) -> Image.Image:
    """Paint a label map over its photo in the VOC colors.

    Args:
        image: Photo of any mode, W x H.
        label_map: Label ids (H, W): background leaves a paler photo, ignored pixels become white.
        strength: Weight of the colors in [0, 1].

    Returns:
        An RGB image of the photo's size.

    Raises:
        ValueError: the sizes differ.
    """
    _check_size(image, label_map, "label map")
    colors = np.array(palette(), dtype=np.float32).reshape(256, 3)
    # Most palette colors are dark, so that they stand out on a pale photo.
    colors[[BACKGROUND, IGNORE_INDEX]] = 255
    weights = np.full(256, strength, dtype=np.float32)
    weights[[BACKGROUND, IGNORE_INDEX]] = (0.4, 1.0)
    weight = weights[label_map][..., None]
    return _to_image((1 - weight) * np.asarray(image.convert("RGB")) + weight * colors[label_map])


def gallery_row(row: GalleryRow) -> list[GalleryLine]:
    """Draw the gallery's lines of one image, one for each present class.

    Raises:
        ValueError: a map or label map does not have the photo's size (the image id is named).
    """
    try:
        whole = {PHOTO: row.image.convert("RGB")}
        if row.target is not None:
            whole[TARGET] = label_overlay(row.image, row.target)
        masks = {} if row.label_map is None else {MASK: label_overlay(row.image, row.label_map)}
        masks |= {heading: label_overlay(row.image, label_map) for heading, label_map in row.steps.items()}
        class_ids = sorted({int(class_id) for seeds in row.maps.values() for class_id in seeds.class_ids})
        lines = [
            GalleryLine(
                row.class_names[class_id],
                {
                    variant_title(variant): heat_overlay(row.image, seeds.maps[position])
                    for variant, seeds in row.maps.items()
                    for position in np.flatnonzero(seeds.class_ids == class_id)
                },
            )
            for class_id in class_ids
        ] or [GalleryLine("", {})]
    except InputError as error:
        raise InputError(f"{row.image_id}: {error}") from error
    return [GalleryLine(lines[0].class_name, {**whole, **lines[0].cells, **masks}), *lines[1:]]


def figure_grid(rows: Sequence[GalleryRow], height: int = 160) -> Image.Image:
    """Draw a grid of images with column headings, like Figure 3 of the paper.

    Args:
        rows: Images to show, top to bottom.
        height: Largest height of one image in pixels.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise InputError("figure_grid got no rows; give at least one image.")
    return draw_grid([gallery_row(row) for row in rows], gallery_columns(rows), height)


def gallery_columns(rows: Sequence[GalleryRow]) -> list[str]:
    """Return the headings that at least one row has, in the order of the method."""
    variants = ordered_variants(variant for row in rows for variant in row.maps)
    has_target = any(row.target is not None for row in rows)
    has_mask = any(row.label_map is not None for row in rows)
    titles = [variant_title(variant) for variant in variants]
    steps = dict.fromkeys(heading for row in rows for heading in row.steps)
    return [PHOTO, *([TARGET] if has_target else []), *titles, *([MASK] if has_mask else []), *steps]


def ordered_variants(variants: Iterable[str]) -> list[str]:
    """Return known variants in the order of `VARIANT_TITLES`, then the others, each once."""
    found = dict.fromkeys(variants)
    return [
        *(name for name in VARIANT_TITLES if name in found),
        *(name for name in found if name not in VARIANT_TITLES),
    ]


def variant_title(variant: str) -> str:
    """Return the heading of a seed variant; for an unknown one, its name."""
    return VARIANT_TITLES.get(variant, variant)


def draw_grid(images: Sequence[Sequence[GalleryLine]], columns: Sequence[str], height: int) -> Image.Image:
    """Draw the lines as one figure, with the class name to the left of each line."""
    gap, head = 6, 30
    font = ImageFont.truetype(font_file(), 14)
    lines = [
        (number, drawable(line.class_name), {column: displayed(cell, height) for column, cell in line.cells.items()})
        for number, image in enumerate(images)
        for line in image
    ]
    photo_sizes = {number: cells[PHOTO].size for number, _, cells in lines if PHOTO in cells}
    cell_width = max(width for width, _ in photo_sizes.values())
    cell_width = max(cell_width, *(int(font.getlength(column)) for column in columns))
    margin = max(int(font.getlength(name)) for _, name, _ in lines) + 2 * gap
    total_height = head + sum(photo_sizes[number][1] + gap for number, _, _ in lines)
    grid = Image.new("RGB", (margin + len(columns) * (cell_width + gap), total_height), "white")
    draw = ImageDraw.Draw(grid)
    for index, column in enumerate(columns):
        middle = margin + index * (cell_width + gap) + cell_width / 2
        draw.text((middle, head / 2), column, fill="#222222", font=font, anchor="mm")
    top = head
    for number, class_name, cells in lines:
        line_height = photo_sizes[number][1]
        draw.text((gap, top + line_height / 2), class_name, fill="#222222", font=font, anchor="lm")
        for index, column in enumerate(columns):
            left = margin + index * (cell_width + gap)
            if column in cells:
                grid.paste(cells[column], (left + (cell_width - cells[column].width) // 2, top))
            elif column == TARGET and PHOTO in cells:
                center = (left + cell_width / 2, top + line_height / 2)
                draw.text(center, "not known", fill="#888888", font=font, anchor="mm")
        top += line_height + gap
    return grid


def drawable(text: str) -> str:
    """Replace characters that the font lacks by their code points, so that names stay distinct and show no boxes."""
    known = _font_characters()
    return "".join(
        sign if ord(sign) in known else sign.encode("ascii", "backslashreplace").decode("ascii") for sign in text
    )


def font_file() -> Path:
    """Return the file of the font that matplotlib ships."""
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@functools.cache
def _font_characters() -> frozenset[int]:
    return frozenset(FT2Font(str(font_file())).get_charmap())


def displayed(image: Image.Image, height: int) -> Image.Image:
    """Resize an image to about a height: large ones shrink, small ones grow by an integer factor, pixelated."""
    if image.height > height:
        return image.resize((max(1, round(image.width * height / image.height)), height), Image.Resampling.LANCZOS)
    factor = height // image.height
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _check_size(image: Image.Image, array: npt.NDArray[Any], name: str) -> None:
    width, height = image.size
    if array.shape != (height, width):
        raise InputError(
            f"{name} has shape {array.shape} and the photo is {height} x {width} (height x width); bring the {name} "
            "to the photo's size first."
        )


def _to_image(pixels: npt.NDArray[np.floating]) -> Image.Image:
    return Image.fromarray(pixels.round().astype(np.uint8))
