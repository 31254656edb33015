"""The meaning of mask pixels that are not label ids: binary masks, other numbers, colors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from ..hub.errors import InputError
from ..hub.labels import BACKGROUND, IGNORE_INDEX, palette

Ids = NDArray[np.uint8]

_ENTRY = re.compile(r"(\d+)(?:-(\d+))?=(\d+)")
_COLOR_ENTRY = re.compile(r"(\d+)/(\d+)/(\d+)=(\d+)")
_JPEG_FORMATS = frozenset({"JPEG", "MPO"})
_JPEG_OBJECT = 128
_MAX_VALUES_SHOWN = 6

FORMS = (
    "ids (pixels are label ids), binary (0 is background, the one other value is the class), voc_colors (colors of "
    "the VOC palette), or a list of your own such as 0=0,128=255,255=1 (value=label id), 0-127=0,128-255=1 (ranges) "
    "or 0/0/0=0,128/0/0=1 (red/green/blue=label id)"
)
"""The ways to state what pixel values mean, for a message or a help text."""

OPTION = 'mask_values="{}"'
"""The option of `load_folder` that states what pixel values mean."""


class MaskValueError(InputError):
    """A mask holds values that have no meaning.

    Attributes:
        kind: What is wrong in a word.
    """

    def __init__(self, message: str, kind: str, form: str = ""):
        """Keep what is wrong; "{}" in `message` is the place of the caller's option that reads `form`."""
        super().__init__(message.replace("{}", OPTION.replace("{}", form)))
        self.kind = kind
        self._message, self._form = message, form

    def advising(self, option: str) -> str:
        """Return the message with this caller's option; "{}" in `option` is the place of the form."""
        return self._message.replace("{}", option.replace("{}", self._form))


@dataclass(frozen=True)
class MaskValues:
    """Which label id each pixel value of a mask means; `parse` makes one from text.

    Attributes:
        text: As given.
        ranges: (lowest, highest, label id) of pixel values of gray and palette masks; the first match counts.
        colors: Red << 16 | green << 8 | blue -> label id; masks are then opened as RGB.
    """

    text: str
    ranges: tuple[tuple[int, int, int], ...] = ()
    colors: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str | None) -> MaskValues | None:
        """Read one of the forms in `FORMS`; None and "ids" are None.

        Raises:
            InputError: the text has none of these forms, or a label id is beyond 255.
        """
        if text is None or text == "ids":
            return None
        if text == "binary":
            return cls(text)
        if text == "voc_colors":
            triples = np.array(palette()).reshape(256, 3).tolist()
            return cls(text, colors={_packed(*triple): label for label, triple in enumerate(triples)})
        ranges, colors = [], {}
        for entry in str(text).replace(" ", "").split(","):
            plain, color = _ENTRY.fullmatch(entry), _COLOR_ENTRY.fullmatch(entry)
            found = plain or color
            numbers = [int(part) for part in found.groups() if part] if found else []
            if not numbers or numbers[-1] > IGNORE_INDEX or (color and max(numbers) > 255):
                raise InputError(f"mask values {text!r} hold {entry!r}; expected {FORMS}.")
            if color:
                colors[_packed(*numbers[:3])] = numbers[3]
            else:
                ranges.append((numbers[0], numbers[-2], numbers[-1]))
        if ranges and colors:
            raise InputError(f"mask values {text!r} mix numbers and colors; give one kind for all masks.")
        if ranges:
            ranges.append((0, 0, BACKGROUND))  # where nothing else was said of it
        else:
            colors.setdefault(0, BACKGROUND)
        return cls(str(text), tuple(ranges), colors)

    def require_classes(self, num_classes: int) -> None:
        """Check the label ids against `num_classes` object classes.

        Raises:
            InputError: a binary mask cannot say which of several classes it shows, or a label id is too large.
        """
        if self.text == "binary" and num_classes > 1:
            raise InputError(
                f"mask values binary mean one class, and there are {num_classes}; say which class the value is, for "
                "example 0=0,255=1 for the first."
            )
        given = [label for *_, label in self.ranges] + list(self.colors.values() if self.text != "voc_colors" else ())
        beyond = [label for label in given if label != IGNORE_INDEX and label > num_classes]
        if beyond:
            raise InputError(
                f"mask values {self.text} give the label id {beyond[0]}, expected 0 for background, 1 to "
                f"{num_classes} for classes and {IGNORE_INDEX} for ignored pixels."
            )

    def label_ids(self, image: PILImage.Image) -> Ids:
        """Return the label ids (H, W) of a mask.

        Raises:
            MaskValueError: a pixel has a value without a meaning.
        """
        if self.colors:
            return self._looked_up(_packed_pixels(image))
        pixels = stored_values(image)
        if self.ranges:
            return self._looked_up(pixels)
        values = np.unique(pixels)
        if image.format in _JPEG_FORMATS and (values[-1] == 0 or values[-1] >= _JPEG_OBJECT):
            return (pixels >= _JPEG_OBJECT).astype(np.uint8)
        if np.count_nonzero(values) > 1 or image.format in _JPEG_FORMATS:
            raise MaskValueError(
                f"holds the values {_shown(values, str)}, expected 0 and one other for mask values binary; where "
                "edges were smoothed, give {}.",
                "values",
                "0-127=0,128-255=1",
            )
        objects: NDArray[np.uint8] = (pixels != 0).astype(np.uint8)
        return objects

    def _looked_up(self, pixels: NDArray[Any]) -> Ids:
        values, places = np.unique(pixels, return_inverse=True)
        labels = [self._label(int(value)) for value in values]
        unknown = [int(value) for value, label in zip(values, labels, strict=True) if label is None]
        if unknown:
            shown = _shown(unknown, _color_text if self.colors else str)
            raise MaskValueError(
                f"holds {'the colors' if self.colors else 'the values'} {shown}, which have no meaning in mask values "
                f"{self.text}; add them there.",
                "colors" if self.colors else "values",
            )
        return np.array(labels, dtype=np.uint8)[places.reshape(pixels.shape)]

    def _label(self, value: int) -> int | None:
        if self.colors:
            return self.colors.get(value)
        return next((label for low, high, label in self.ranges if low <= value <= high), None)


def stored_values(image: PILImage.Image) -> NDArray[Any]:
    """Return the values (H, W) of a gray or palette mask, with palette indices as they are.

    An image of three equal channels is read as gray, and a constant alpha channel is ignored. If only the alpha
    channel varies, it is the mask.

    Raises:
        MaskValueError: the image has colors or transparency, or its numbers are no integers.
    """
    pixels = np.asarray(image)
    if pixels.ndim == 3 and image.mode in ("LA", "PA", "RGBA"):
        if (pixels[..., -1] == pixels[0, 0, -1]).all():
            pixels = pixels[..., :-1]
        elif (pixels[..., :-1] == pixels[0, 0, :-1]).all():
            pixels = pixels[..., -1]
    if pixels.ndim == 3 and image.mode in ("L", "LA", "PA", "RGB", "RGBA") and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., 0]
    if pixels.ndim != 2:
        colors = np.unique(_packed_pixels(image))
        smoothed = " (was it resized with smoothing, or saved as JPEG?)" if colors.size > 50 else ""
        example = ",".join(
            f"{_color_text(int(color))}={number}" for number, color in enumerate(colors[colors > 0][:2], 1)
        )
        raise MaskValueError(
            f"is a {image.mode} image with the colors {_shown(colors, _color_text)}{smoothed}, expected a palette or "
            f"gray image whose pixels are label ids; say which color means which label id, as in {{}}.",
            "colors",
            example,
        )
    if pixels.dtype.kind == "f" and not (whole := np.isfinite(pixels) & (pixels == np.rint(pixels))).all():
        raise MaskValueError(
            f"holds {float(pixels[~whole][0]):g}, expected label ids; save them as integers, in an 8-bit gray PNG.",
            "ids",
        )
    return pixels if pixels.dtype.kind in "iu" else pixels.astype(np.int64)


def label_ids(image: PILImage.Image, num_classes: int | None) -> Ids:
    """Return the label ids (H, W) of a mask whose pixels are label ids.

    Raises:
        MaskValueError: it has colors, is a JPEG, or holds other ids than 0 to `num_classes` (where given) and 255.
    """
    pixels = stored_values(image)
    if image.format in _JPEG_FORMATS and pixels.any():
        raise MaskValueError(
            "is a JPEG, which alters pixel values, so that they are not label ids; save masks as PNG, or, for masks "
            "of 0 and 255, give {}.",
            "values",
            _form_of(IGNORE_INDEX, num_classes),
        )
    return checked_ids(pixels, num_classes)


def checked_ids(pixels: NDArray[Any], num_classes: int | None) -> Ids:
    """Return integers (H, W) as label ids.

    Raises:
        MaskValueError: they are other than 0 to `num_classes` (255 where not given) and 255.
    """
    largest = IGNORE_INDEX if num_classes is None else num_classes
    wrong = pixels[(pixels != IGNORE_INDEX) & ((pixels > largest) | (pixels < 0))]
    if wrong.size:
        advice, form = _advice(np.unique(pixels), num_classes)
        raise MaskValueError(
            f"holds the id {int(wrong[0])}, expected {BACKGROUND} for background, 1 to {largest} for classes and "
            f"{IGNORE_INDEX} for ignored pixels; {advice}",
            "ids",
            form,
        )
    return pixels.astype(np.uint8)


def _advice(values: NDArray[Any], num_classes: int | None) -> tuple[str, str]:
    """Return the advice for a mask with `values` that are not all label ids, and the form that reads it."""
    if np.count_nonzero(values) == 1:
        object_value = int(values[values != 0][0])
        advice = f"if {object_value} is the object, give {{}}; otherwise check the list of classes."
        return advice, _form_of(object_value, num_classes)
    if values.size > 30:
        advice = (
            f"it holds {values.size} different values: was it resized with smoothing? If so, save it without, or give "
            "{}."
        )
        return advice, "0-127=0,128-255=1"
    is_trimap = set(values.tolist()) <= {1, 2, 3}
    if num_classes == 1:
        advice = (
            f"it holds the values {_shown(values, str)}: if each but 0 is the object, give {{}}; if its edges were "
            "smoothed, the values are 0-127=0,128-255=1"
            + ("; of a trimap (object, background, border) they are 1=1,2=0,3=255." if is_trimap else ".")
        )
        return advice, f"1-{values[-1]}=1"
    advice = f"check the list of classes and its order, or say what the values {_shown(values, str)} mean, as in {{}}."
    return advice, f"{values[0]}=0,{values[-1]}=1"


def _form_of(value: int, num_classes: int | None) -> str:
    """Return the form that makes `value` the object; with several classes it must name one of them."""
    return "binary" if num_classes == 1 else f"0=0,{value}=1"


def _packed(red: int, green: int, blue: int) -> int:
    return red << 16 | green << 8 | blue


def _packed_pixels(image: PILImage.Image) -> NDArray[np.int64]:
    rgb = np.asarray(image.convert("RGB")).astype(np.int64)
    packed: NDArray[np.int64] = rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]
    return packed


def _color_text(color: int) -> str:
    return f"{color >> 16}/{color >> 8 & 255}/{color & 255}"


def _shown(values: Iterable[int], name: Callable[[int], str]) -> str:
    """List the first few values, and the number of the others."""
    numbers = [int(value) for value in values]
    more = f", ... ({len(numbers)} of them)" if len(numbers) > _MAX_VALUES_SHOWN else ""
    return ", ".join(name(value) for value in numbers[:_MAX_VALUES_SHOWN]) + more
