"""What every loader shares: safe opening of images, class lists, names and paths."""

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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypedDict, TypeVar

from PIL import Image as PILImage

from ..hub.errors import InputError
from ..hub.image_decoding import DECODING_ERRORS, TOO_LARGE, decoding_notes, opened, to_rgb
from .mask_values import MaskValueError

ImageCell: TypeAlias = Mapping[str, Any] | PILImage.Image | str | Path
"""An image as a row holds it: `{"path", "bytes"}`, a decoded PIL image, or a path."""


class ImageRow(TypedDict):
    """A row of the data sets of this package: see `row_features`. `mask` is None where none is known."""

    image_id: str
    image: ImageCell
    labels: list[int]
    mask: ImageCell | None


_EXIF_ORIENTATION = 0x0112

_DRIVE = re.compile("[A-Za-z]:")
_SAVE_AGAIN = "save it again as UTF-8, in a spreadsheet as 'CSV UTF-8'."
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")

_INVISIBLE = str.maketrans("", "", "\u00ad\u200b\u200e\u200f\u2060\ufeff")
"""Soft hyphen, zero-width spaces, direction marks and the byte order mark: invisible in a name."""

_JOINERS = str.maketrans("", "", "\u200c\u200d")
"""They shape letters in some scripts, so names keep them."""

_Opened = TypeVar("_Opened")


class DataError(InputError):
    """A data set that cannot be used as it is; the message says what was found, what was expected and what to do.

    Attributes:
        kind: Of masks, what is wrong in a word: "unreadable", "colors", "size" or "ids"; "" otherwise.
    """

    kind = ""


class MaskError(DataError):
    """A mask that can be read and does not fit; `kind` says what is wrong with it."""

    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind


class UnreadableImageError(DataError):
    """An image or mask whose file is missing, damaged or not an image; the message names the file."""

    kind = "unreadable"


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause Python's cyclic garbage collector in a loop that makes many objects; also works as a decorator.

    It would scan all of them, and all imported libraries, after every few thousand new objects, which takes half of
    the time for COCO's 122,218 rows.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


# ---- Images.


def open_image(cell: ImageCell) -> PILImage.Image:
    """Open an image as RGB, with the pixels as they are stored.

    An EXIF orientation tag is not applied: masks of VOC, COCO and of annotation tools belong to the stored pixels.

    Args:
        cell: The `image` of a row, a path or a PIL image of any mode.

    Raises:
        UnreadableImageError: the file is missing, damaged or no image.
    """
    return read_image_file(cell, "image", to_rgb)


@dataclass(frozen=True)
class ImageFacts:
    """What opening an image file once tells.

    Attributes:
        size: (height, width) as it is stored.
        orientation: EXIF orientation: 1 upright, 2 to 4 flipped or upside down, 5 to 8 height and width exchanged.
        notes: What was guessed or left out in decoding, and whether the image is blank; see `decoding_notes`.
    """

    size: tuple[int, int]
    orientation: int
    notes: tuple[str, ...] = ()


def look_at_image(cell: ImageCell, *, decode: bool) -> ImageFacts:
    """Open an image once and return its facts.

    Args:
        cell: As for `open_image`.
        decode: Decode it completely, for the notes; damage inside the file shows only then.

    Raises:
        UnreadableImageError: the file is missing, damaged or no image.
    """

    def read(image: PILImage.Image) -> ImageFacts:
        notes = tuple(decoding_notes(image, to_rgb(image))) if decode else ()
        return ImageFacts((image.height, image.width), int(image.getexif().get(_EXIF_ORIENTATION, 1)), notes)

    return read_image_file(cell, "image", read, decode=decode)


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
    return read_image_file(cell, "image", lambda image: (image.height, image.width), decode=False)


def read_image_file(
    cell: ImageCell, kind: str, read: Callable[[PILImage.Image], _Opened], *, decode: bool = True
) -> _Opened:
    """Return `read` of the image in `cell`; every failure becomes one error that names the file."""
    name = cell_name(cell)
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


def cell_name(cell: ImageCell) -> str:
    """Return the name of an image for messages."""
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
    """Return a name as it is compared and stored: Unicode NFC, single inner spaces, no outer or invisible ones."""
    return " ".join(unicodedata.normalize("NFC", name).translate(_INVISIBLE).split())


@functools.lru_cache(maxsize=1 << 16)
def folded_name(name: str) -> str:
    """Return a form that is equal for names that look alike, whatever their case, letter width and ligatures."""
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

    Background is not a class. A list may begin with it, since it always has label id 0; it is left out.

    Raises:
        DataError: no class is named, one is named twice, two look alike, or background follows another class, which
            would leave the ids of later classes unclear.
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
    """Suggest which of `known` was meant by `name`, as part of a message."""
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


def inner_path(file_name: str, where: str) -> str:
    """Return `file_name` with forward slashes, refusing any path that leaves its folder; `where` is for messages."""
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
    """Return a file name with forward slashes and without its suffix."""
    folder, slash, name = file_name.rpartition("/")
    return folder + slash + (name.rpartition(".")[0] or name)


def missing_files(folder: Path, names: Sequence[str]) -> list[str]:
    """Return those of `names` that are not files in `folder`, by one listing instead of a query per file."""
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
"""First bytes of files that carry a text suffix but are not text, what they are, and what to do."""


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
