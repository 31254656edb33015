"""Image files of any kind become 8-bit RGB; without torch, so that commands that only read images start at once."""

import struct
import warnings
import zlib
from typing import Any

import numpy as np
from PIL import Image

# What PIL raises on damaged files, depending on the format and on where the damage is.
DECODING_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, TypeError, IndexError, KeyError, OverflowError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip

BIT_DEPTHS = (8, 10, 12, 14, 16)
"""Of gray values that are stored in 16 bits or more."""

NEARLY_CONSTANT = 16
"""An image whose values, of 256, span less than this shows nothing."""

ANIMATED = ("GIF", "PNG", "WEBP", "TIFF")
"""Formats with frames or pages. JPEG is not one: cameras store previews as further frames."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any PIL mode to 8-bit RGB, pixels where they are stored (no EXIF rotation).

    Gray values of more than 8 bits are scaled from the range that `value_range` finds to [0, 255]; transparent images
    are laid on white, as a viewer shows them. Of several frames or pages the current one is taken.
    """
    if image.mode == "RGB":
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        low, high = value_range(values)
        if (low, high) == (0, 65535):
            eight_bit = values // 257
        else:
            inside = np.clip(np.nan_to_num(values.astype(np.float64), nan=low), low, high)
            eight_bit = np.rint((inside - low) * (255 / max(high - low, 1e-300)))
        return Image.fromarray(eight_bit.astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        foreground = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", foreground.size, "white"), foreground).convert("RGB")
    return image.convert("RGB")


def value_range(values: np.ndarray) -> tuple[float, float]:
    """Return the values (low, high) that become black and white in an image of more than 8 bits.

    No format says how many bits of a 16 or 32-bit value are used; many cameras and microscopes use 12. So the smallest
    of `BIT_DEPTHS` that holds the largest value is taken: it is 16 from 16,384 on. Floating-point values from 0 to 1
    keep that range. Values below 0 or above 65,535 have no usual range and are stretched from the smallest to the
    largest. The range depends on the image alone.

    Args:
        values: (H, W) integers or floating-point numbers; NaN and infinity do not count.
    """
    finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if low < 0 or high > 65535:
        return low, high
    if values.dtype.kind == "f" and high <= 1:
        return 0, 1
    return 0, next(2**bits - 1 for bits in BIT_DEPTHS if high < 2**bits)


def decoding_notes(image: Image.Image, rgb: Image.Image) -> list[str]:
    """Say what was guessed or left out when an opened image became RGB, and whether it shows anything.

    Args:
        image: As PIL opened it.
        rgb: What `to_rgb` made of it.
    """
    notes = []
    if image.mode == "F" or image.mode.startswith("I"):
        low, high = value_range(np.asarray(image))
        if (low, high) != (0, 65535):
            notes.append(
                f"its values are taken to lie in [{low:g}, {high:g}], which is guessed from the smallest and the "
                "largest; save it with 8 bits to have it otherwise"
            )
    lowest, highest = np.array(rgb.getextrema()).T  # of each channel
    if (highest - lowest).max() < NEARLY_CONSTANT:
        notes.append(
            f"it is nearly constant, its values lie in [{lowest.min()}, {highest.max()}] of [0, 255]: it shows "
            "nothing, or its bits are not where they are expected; look at it, and save it with 8 bits"
        )
    frames = getattr(image, "n_frames", 1) if image.format in ANIMATED else 1
    if frames > 1:
        notes.append(f"it has {frames} frames or pages, of which the first is used")
    return notes


def opened(source: Any) -> Image.Image:
    """Open a file as `PIL.Image.open` does, without its warning of large images; too large ones stay an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(source)


TOO_LARGE = "has more than 178 million pixels, the most that are opened; save a smaller copy, or cut it into pieces"
"""The end of a sentence about an image that PIL refuses as a decompression bomb."""
