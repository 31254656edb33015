"""What every loader shares: images and masks opened safely, masks in another class order, names and paths."""

from __future__ import annotations

import codecs
import difflib
import functools
import gc
import hashlib
import io
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypedDict, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from ..hub.errors import InputError
from ..hub.image_decoding import DECODING_ERRORS, TOO_LARGE, decoding_notes, opened, to_rgb
from ..hub.labels import BACKGROUND, IGNORE_INDEX, palette
from .mask_values import OPTION, MaskValueError, MaskValues, checked_ids, label_ids

ImageCell: TypeAlias = Mapping[str, Any] | PILImage.Image | str | Path
"""An image as a row may hold it: `{"path", "bytes"}`, a decoded PIL image, or a path."""


class ImageRow(TypedDict):
    """A row of the data sets of this package: see `row_features`. `mask` is None where none is known."""

    image_id: str
    image: ImageCell
    labels: list[int]
    mask: ImageCell | None


_PALETTE = palette()

_EXIF_ORIENTATION = 0x0112

_DRIVE = re.compile("[A-Za-z]:")
_SAVE_AGAIN = "save it again as UTF-8, in a spreadsheet as 'CSV UTF-8'."
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")

_INVISIBLE = str.maketrans("", "", "\u00ad\u200b\u200e\u200f\u2060\ufeff")
"""Soft hyphen, zero-width blanks, marks of direction and the byte order mark: no one sees them in a name."""

_JOINERS = str.maketrans("", "", "\u200c\u200d")
"""They shape letters in some scripts, so that names keep them."""

COCO_REFERENCE = "coco:"
"""How a mask cell begins that names COCO instances to be painted in place of a file."""

_Opened = TypeVar("_Opened")


class DataError(InputError):
    """A data set that cannot be used as it is: what was found, what was expected, what to do.

    Attributes:
        kind: Of masks, what is wrong in a word: "unreadable", "colors", "size" or "ids"; "" otherwise.
    """

    kind = ""

    def of_kind(self, kind: str) -> DataError:
        """Return this error after setting its kind."""
        self.kind = kind
        return self


class UnreadableImageError(DataError):
    """An image or mask whose file is missing, damaged or no image; the message names the file."""

    kind = "unreadable"


@contextmanager
def collector_paused() -> Iterator[None]:
    """Keep Python's collector of cycles out of a loop that makes many objects; also a decorator.

    It would look through all of them, and through all imported libraries, every some thousand new ones: half of the
    time that COCO's 122,218 rows take.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


# ---- Images and masks.


def open_image(cell: ImageCell) -> PILImage.Image:
    """Open an image as RGB, with the pixels as they are stored.

    An EXIF orientation tag is not applied: masks of VOC, COCO and of annotation tools belong to the stored pixels.

    Args:
        cell: The `image` of a row, a path or a PIL image of any mode.

    Raises:
        UnreadableImageError: the file is missing, damaged or no image.
    """
    return _open(cell, "image", to_rgb)


@dataclass(frozen=True)
class ImageFacts:
    """What one look at an image file tells.

    Attributes:
        size: (height, width) as it is stored.
        orientation: How its EXIF tag turns it upright: 1 not at all, 2 to 4 within its size, 5 to 8 to the side.
        notes: What was guessed or left out when it was decoded, and whether it shows nothing; see `decoding_notes`.
    """

    size: tuple[int, int]
    orientation: int
    notes: tuple[str, ...] = ()


def look_at_image(cell: ImageCell, *, decode: bool) -> ImageFacts:
    """Open an image once and return what there is to know of it.

    Args:
        cell: As for `open_image`.
        decode: Decode it completely, for the notes; damage inside the file shows only then.

    Raises:
        UnreadableImageError: the file is missing, damaged or no image.
    """

    def read(image: PILImage.Image) -> ImageFacts:
        notes = tuple(decoding_notes(image, to_rgb(image))) if decode else ()
        return ImageFacts((image.height, image.width), int(image.getexif().get(_EXIF_ORIENTATION, 1)), notes)

    return _open(cell, "image", read, decode=decode)


def look_at_file(path: Path) -> tuple[ImageFacts, bytes]:
    """Read and decode an image file once; return what it tells, and a digest of its bytes.

    Raises:
        UnreadableImageError: the file is missing, damaged or no image.
    """
    try:
        content = path.read_bytes()
    except OSError:
        content = b""
    # Without a byte, what is wrong shows when the file is opened by its name.
    cell: ImageCell = {"path": str(path), "bytes": content} if content else path
    return look_at_image(cell, decode=True), hashlib.sha256(content).digest()


def image_size(cell: ImageCell) -> tuple[int, int]:
    """Return the (height, width) of an image as it is stored; a file is opened but not decoded.

    Raises:
        UnreadableImageError: the file is missing or no image. Damage further inside shows when it is opened.
    """
    return _open(cell, "image", lambda image: (image.height, image.width), decode=False)


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
        cell: The `mask` of a row, a path or a PIL image. Palette and gray images hold label ids as they are, also
            where they are saved with three equal channels, as 16 or 32-bit integers or with one bit.
        image_size: (height, width) of the image; given, the mask must have this size.
        num_classes: Number of object classes; given, other ids than 0 to `num_classes` and 255 are refused.
        values: What the pixel values mean where they are not label ids.
        values_option: How the caller says `values`, for the advice in errors; "{}" is where their form stands.

    Returns:
        (H, W) uint8.

    Raises:
        UnreadableImageError: the file is missing, damaged or no image.
        DataError: the mask is not known (None), the image is no index image, or its size or its ids do not fit.
    """
    mask = open_mask_with_palette(cell, num_classes=num_classes, values=values, values_option=values_option)[0]
    if image_size is not None and mask.shape != tuple(image_size):
        raise DataError(
            f"mask {_name(cast(ImageCell, cell))} is {mask.shape[0]}x{mask.shape[1]} (height x width) and its image "
            f"{image_size[0]}x{image_size[1]}; save the mask at the size of the stored image, without EXIF rotation."
        ).of_kind("size")
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
    name = _name(cell)

    def read(image: PILImage.Image) -> tuple[NDArray[np.uint8], list[int]]:
        colors = image.getpalette("RGB") if image.mode == "P" else None
        return _label_ids(image, num_classes, values), colors or []

    try:
        if name.startswith(COCO_REFERENCE):
            from .coco import painted_mask  # here: that file builds on this one

            return checked_ids(painted_mask(name), num_classes), []
        return _open(cell, "mask", read)
    except MaskValueError as error:
        raise DataError(f"mask {name} {error.advising(values_option)}").of_kind(error.kind) from error


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
        raise DataError(
            f"mask {_name(cell)} has the color {tuple(pixels[row, column].tolist())} at row {row}, column {column}, "
            f"expected one of {len(colors)} colors; was it resized with smoothing, or saved as JPEG?"
        ).of_kind("colors")
    image = PILImage.fromarray(ids.astype(np.uint8))
    image.putpalette(_PALETTE)
    return image


def _label_ids(image: PILImage.Image, num_classes: int | None, values: MaskValues | None) -> NDArray[np.uint8]:
    return label_ids(image, num_classes) if values is None else values.label_ids(image)


def _open(cell: ImageCell, kind: str, read: Callable[[PILImage.Image], _Opened], *, decode: bool = True) -> _Opened:
    """Return what `read` makes of the image in `cell`; every way of failing becomes one named error."""
    name = _name(cell)
    try:
        if isinstance(cell, PILImage.Image):
            if decode:
                cell.load()
            return read(cell)
        source: Any = cell
        if isinstance(cell, Mapping):
            content = cell.get("bytes")
            source = cell.get("path") if content is None else io.BytesIO(content)
        with opened(source) as image:
            if decode:
                image.load()  # damage shows here, not at some later use after the file is closed
            return read(image)
    except MaskValueError:
        raise  # readable, and not what was expected
    except FileNotFoundError as error:
        raise UnreadableImageError(f"{kind} {name} is not there; was it moved or deleted?") from error
    except PILImage.DecompressionBombError as error:
        raise UnreadableImageError(f"{kind} {name} {TOO_LARGE}.") from error
    except DECODING_ERRORS as error:
        raise UnreadableImageError(
            f"{kind} {name} cannot be read ({type(error).__name__}: {error}); replace the file or leave it out."
        ) from error


def _name(cell: ImageCell) -> str:
    if isinstance(cell, Mapping):
        return str(cell.get("path") or "held in memory")
    if isinstance(cell, PILImage.Image):
        return str(getattr(cell, "filename", "") or "held in memory")
    return str(cell)


# ---- Classes.


def read_class_file(path: Path) -> list[str]:
    """Read class names, one per line, in the order of their ids; blank lines are skipped.

    Raises:
        DataError: the file is not UTF-8, names no class or names one twice.
    """
    lines = [tidy_name(line) for line in read_text(path).splitlines()]
    quoted = [len(line) > 2 and line[0] == line[-1] and line[0] in "\"'" for line in lines]
    return check_classes(
        [line[1:-1] if cut else line for line, cut in zip(lines, quoted, strict=True) if line], str(path)
    )


@functools.lru_cache(maxsize=1 << 16)  # a table says the same few names many times
def tidy_name(name: str) -> str:
    """Return a name as it is compared and stored: Unicode NFC, single blanks, none outside, none invisible."""
    return " ".join(unicodedata.normalize("NFC", name).translate(_INVISIBLE).split())


@functools.lru_cache(maxsize=1 << 16)
def folded_name(name: str) -> str:
    """Return what is the same for names that look alike: case, full-width letters and ligatures make no difference."""
    plain = unicodedata.normalize("NFKC", tidy_name(name).translate(_JOINERS)).casefold()
    return tidy_name(unicodedata.normalize("NFKC", plain))


def is_background(name: str) -> bool:
    """Return whether a class name means background, in any case: `background`, `_background_`, `bg`."""
    return folded_name(name).strip("_-.()[]<> ") in ("background", "bg")


def first_alike(names: Iterable[str]) -> tuple[str, str] | None:
    """Return the first two different names that look alike, or None."""
    seen: dict[str, str] = {}
    for name in names:
        if (earlier := seen.setdefault(folded_name(name), name)) != name:
            return earlier, name
    return None


def check_classes(names: Sequence[str], source: str) -> list[str]:
    """Return the object classes that a list names, in the order of their ids; `source` says where it is from.

    Background is no class. A list may begin with it, since it has the label id 0 in any case, and it is left out.

    Raises:
        DataError: no class is named, one is named twice or two look alike, or background stands after another class,
            where it would leave the ids of the classes behind it unclear.
    """
    if isinstance(names, str):
        raise DataError(f"{source} is the text {names!r}, expected a list of class names such as [{names!r}].")
    if wrong := [name for name in names if not isinstance(name, str) or not tidy_name(name)]:
        raise DataError(f"{source} holds {wrong[0]!r}, expected class names; write numbers in quotes.")
    classes = [tidy_name(name) for name in names]
    if classes and is_background(classes[0]):
        del classes[0]
    if not classes:
        raise DataError(f"{source} names no class, expected one name or more; background does not count.")
    if late := [name for name in classes if is_background(name)]:
        raise DataError(
            f"{source} names {late[0]!r} among the classes, expected object classes alone: background has the label "
            "id 0 and no class id; take it out, and number the masks accordingly."
        )
    repeated = sorted({name for name in classes if classes.count(name) > 1})
    if repeated:
        raise DataError(f"{source} names {repeated[0]!r} more than once; give each class once, in the order of ids.")
    if pair := first_alike(classes):
        raise DataError(
            f"{source} names {pair[0]!r} and {pair[1]!r}, which look alike; give each class once, in one spelling."
        )
    return classes


def suggest(name: str, known: Sequence[str]) -> str:
    """Say which of `known` may have been meant by `name`: a piece of a message."""
    close = difflib.get_close_matches(name, known, n=1)
    shown = ", ".join(known[:30]) + (", ..." if len(known) > 30 else "")
    return f"did you mean {close[0]!r}?" if close else f"known are: {shown}."


def chosen_classes(wanted: Sequence[str] | None, available: Sequence[str], source: str) -> list[str]:
    """Return the classes to load, in the order of their new ids: all those `available`, or the `wanted` ones.

    Raises:
        DataError: a wanted class is not available or named twice; `source` says what offers the classes.
    """
    if wanted is None:
        return list(available)
    for name in check_classes(wanted, "classes"):
        if name not in available:
            raise DataError(f"class {name!r} is not in {source}: {suggest(name, available)}")
    return list(wanted)


def label_lookup(source: Sequence[str], target: Sequence[str]) -> NDArray[np.uint8] | None:
    """Return the table (256,) from label ids for the classes `source` to those for `target`, or None if all stay.

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
    """Return `masks`, drawn with the ids of `source` or with `values` that mean them, with the ids of `target`.

    A mask that needs no change stays a path. Others become PNG bytes, about 3 kB and 2 ms each: a row of a data set
    can hold a path or bytes but no recipe, and files written to some cache would outlive the data they come from.

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


def inner_path(file_name: str, where: str) -> str:
    """Return `file_name` with forward slashes, refusing every path that leaves its folder; `where` is its place."""
    if _ADDRESS.match(file_name):
        raise DataError(
            f"{where} names {file_name!r}, which is an address on the web; download the images and write their file "
            "names."
        )
    parts = file_name.replace("\\", "/").split("/")
    if ".." in parts or parts[0] == "" or parts[-1] in ("", ".") or _DRIVE.match(file_name):
        raise DataError(
            f"{where} names {file_name!r}, which leads out of the images folder; use names relative to that folder, "
            "without '..'."
        )
    return "/".join(part for part in parts if part not in ("", "."))


def without_suffix(file_name: str) -> str:
    """Return a file name with forward slashes without what follows the last dot of its last part."""
    folder, slash, name = file_name.rpartition("/")
    return folder + slash + (name.rpartition(".")[0] or name)


def missing_files(folder: Path, names: Sequence[str]) -> list[str]:
    """Return those of `names` that are no files in `folder`; one listing in place of a question for each file."""
    present = set(os.listdir(folder))  # noqa: PTH208 - 122,218 paths would take half a second to make
    return [name for name in names if name not in present and not (folder / name).is_file()]


def read_id_list(path: Path) -> list[str]:
    """Read image ids, one on each line, as VOC and SBD list them.

    Raises:
        DataError: the file is empty, names an image twice, or holds something that is no id.
    """
    image_ids = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not image_ids:
        raise DataError(f"list {path} is empty, expected one image id on each line.")
    seen: set[str] = set()
    for image_id in image_ids:
        if image_id in seen or any(sign.isspace() or sign in "/\\" for sign in image_id):
            what = "twice" if image_id in seen else "which is no id"
            raise DataError(f"list {path} holds {image_id!r} {what}; expected one id on each line, like 2007_000032.")
        seen.add(image_id)
    return image_ids


_NO_TEXT = (
    (b"\x1f\x8b", "a gzip archive", "unpack it first (gunzip)"),
    (b"PK\x03\x04", "an Excel or OpenDocument workbook, or another zip archive", "save the sheet as CSV UTF-8"),
    (b"\xd0\xcf\x11\xe0", "a workbook of an old Excel", "save the sheet as CSV UTF-8"),
    (b"PAR1", "a Parquet file", "give it the suffix .parquet"),
)
"""How files begin that are given the suffix of a text, what they are, and what to do."""


def read_text(path: Path) -> str:
    """Read a text file: UTF-8, with or without a byte order mark, or UTF-16 with one, as spreadsheets write it.

    Raises:
        DataError: the file is neither.
    """
    content = path.read_bytes()
    for start, kind, remedy in _NO_TEXT:
        if content.startswith(start):
            raise DataError(f"{path} is {kind}, expected text; {remedy}.")
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = io.TextIOWrapper(io.BytesIO(content), encoding=encoding).read()
    except UnicodeDecodeError as error:
        place = f"byte 0x{error.object[error.start]:02x} at position {error.start}"
        name = encoding.removesuffix("-sig").upper()
        raise DataError(f"{path} is not {name} text ({place}); {_SAVE_AGAIN}") from error
    if "\0" in text:
        raise DataError(f"{path} holds zero bytes, as text in UTF-16 does; {_SAVE_AGAIN}")
    return text
