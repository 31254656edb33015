"""Image files of any kind become 8-bit RGB; without torch, so that commands that only read images start at once."""

import struct
import zlib

import numpy as np
from PIL import Image

from .errors import InputError

# What PIL raises on damaged files, depending on the format and on where the damage is.
DECODING_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, TypeError, IndexError, KeyError, OverflowError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any PIL mode to 8-bit RGB, pixels where they are stored (no EXIF rotation).

    16-bit gray is scaled from [0, 65535] to [0, 255]; transparent images are laid on white, as a viewer shows them.

    Raises:
        ValueError: mode "F", whose range is not defined.
    """
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise InputError("got a floating-point image (mode F), whose range is not defined; save it as 8 or 16 bit.")
    if image.mode.startswith("I"):
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray((values // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        foreground = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", foreground.size, "white"), foreground).convert("RGB")
    return image.convert("RGB")
