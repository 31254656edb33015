"""Which files of a folder are images: one answer for loaders, `bitrans check` and `bitrans masks`."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from PIL import Image, features

from ..files import OUTPUT_MARK
from .common import tidy_name

# Formats that Pillow only stands in for, or opens by another program: films, tables, drawings.
_NO_PHOTOS = frozenset({"BUFR", "EPS", "FLI", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF"})

_LIBRARIES = {"AVIF": "avif", "JPEG": "jpg", "JPEG2000": "jpg_2000", "MPO": "jpg", "PNG": "zlib", "WEBP": "webp"}
"""Format -> what Pillow must have been built with to read it."""

_OTHER_SUFFIXES = frozenset(
    {".heic", ".heif", ".hif", ".jxl", ".jxr", ".wdp", ".exr", ".hdr", ".svg", ".svgz", ".dcm", ".nii", ".djvu"}
    | {".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dng", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".srw"}
    | {".avif", ".avifs"}  # which Pillow knows from 11.2 on
)
"""Image types that Pillow does not read unless a plug-in is registered."""

_FOREIGN_FOLDERS = frozenset(
    {"__macosx", "__pycache__", "@eadir", "$recycle.bin", "system volume information", "lost+found"}
)
"""Folders that archives, disks and file servers leave behind, in lower case."""

_RECORDS = frozenset({OUTPUT_MARK, "masks.json", "recipe.json"})
"""Files that this package writes, or once wrote, beside its results: images there are not the user's."""


@dataclass
class ImageListing:
    """The images in a folder and its subfolders.

    Attributes:
        names: Paths relative to the folder, with forward slashes, in alphabetical order.
        unreadable_types: Paths of images whose type cannot be read here.
        results: Subfolders left out because they hold results of this package.
        empty_folders: Subfolders without images or subfolders.
    """

    names: list[str] = field(default_factory=list)
    unreadable_types: list[str] = field(default_factory=list)
    results: list[str] = field(default_factory=list)
    empty_folders: list[str] = field(default_factory=list)

    def left_out(self) -> list[str]:
        """Return a sentence for each kind of thing that was left out."""
        said = []
        if self.unreadable_types:
            kinds = Counter(suffix_of(name) for name in self.unreadable_types)
            counts = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(kinds.items()))
            said.append(
                f"{counts}: images of types that cannot be read here are left out, first {self.unreadable_types[0]}; "
                "convert them to JPEG or PNG."
            )
        if self.results:
            said.append(f"{', '.join(self.results)}: left out, since it holds results of this package.")
        return said


def suffix_of(name: str) -> str:
    """Return the suffix of a file name in lower case, with its dot; "" if there is none."""
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 - making 100,000 paths takes a second


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Return the image suffixes that this Pillow reads, including registered plug-ins: ".jpg" and others."""
    Image.init()
    readable = {
        suffix
        for suffix, kind in Image.registered_extensions().items()
        if (kind in Image.OPEN or kind == "MPO") and kind not in _NO_PHOTOS
        if kind not in _LIBRARIES or features.check(_LIBRARIES[kind])
    }
    return frozenset(readable)


@functools.cache
def unreadable_suffixes() -> frozenset[str]:
    """Return the suffixes of images that this Pillow cannot read."""
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in _LIBRARIES}
    return (_OTHER_SUFFIXES | known) - image_suffixes()


def list_images(folder: Path, *, excluded: Collection[Path | None] = ()) -> ImageListing:
    """List the images in a folder and its subfolders, links to folders included.

    Left out are hidden files and folders, folders that archives, disks and file servers add, results of this package,
    and a folder that a link reaches a second time.

    Args:
        folder: To look through.
        excluded: Folders inside it to leave out.
    """
    listing = ImageListing()
    readable, other = image_suffixes(), unreadable_suffixes()
    root = folder.resolve()
    left_out = {path.resolve() for path in excluded if path is not None}
    seen: set[Path] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        here = Path(place)
        inside = here.relative_to(folder).as_posix()
        if inside != "." and not _RECORDS.isdisjoint(files):
            listing.results.append(inside)
            folders.clear()
            continue
        folders[:] = [
            name
            for name in sorted(folders)
            if not name.startswith(".") and name.lower() not in _FOREIGN_FOLDERS
            if not (here / name).is_symlink() or _leads_elsewhere((here / name).resolve(), root, seen)
            if not left_out or (here / name).resolve() not in left_out
        ]
        prefix = "" if inside == "." else f"{inside}/"
        before = len(listing.names)
        for name in files:
            if not name.startswith("."):
                suffix = suffix_of(name)
                if suffix in readable:
                    listing.names.append(prefix + name)
                elif suffix in other:
                    listing.unreadable_types.append(prefix + name)
        if inside != "." and not folders and len(listing.names) == before:
            listing.empty_folders.append(inside)
    listing.names.sort()
    listing.empty_folders.sort()
    listing.unreadable_types.sort()
    return listing


def _leads_elsewhere(target: Path, root: Path, seen: set[Path]) -> bool:
    """Return whether a link leads to a folder that is not listed otherwise, and note the folder."""
    if target in seen or target.is_relative_to(root) or root.is_relative_to(target):
        return False
    seen.add(target)
    return True


class ImageFinder:
    """Finds the file that a table means by a name.

    Args:
        names: The images that exist.
    """

    def __init__(self, names: Sequence[str]):
        self.names = frozenset(names)
        self._by_spelling = _grouped(names, _spelling)
        self._by_case = _grouped(names, lambda name: _spelling(name).casefold())
        self._by_stem = _grouped(names, lambda name: _spelling(_stem(name)))

    def found(self, name: str) -> str | None:
        """Return the one image that `name` means, in the spelling of its file, or None.

        Unicode form and spaces do not matter, and a name without an image suffix means the image with that stem.
        """
        if name in self.names:
            return name
        candidates = self._by_spelling.get(_spelling(name), ())
        if not candidates and suffix_of(name) not in image_suffixes():
            candidates = self._by_stem.get(_spelling(name), ())
        return candidates[0] if len(candidates) == 1 else None

    @functools.cached_property
    def _by_last_part(self) -> Mapping[str, list[str]]:
        return _grouped(sorted(self.names), _last_part)

    def advice(self, name: str) -> str:
        """Return what to do about a name that matches no image, or several."""
        stem = _spelling(_stem(name) if suffix_of(name) in image_suffixes() else name)
        for group in (self._by_spelling.get(_spelling(name), ()), self._by_stem.get(stem, ())):
            if len(group) > 1:
                return f"there are {group[0]} and {group[1]}; write which one is meant."
        if (plain := unquote(name)) != name and (meant := self.found(plain)):
            return f"did you mean {meant!r}?"
        alike = (*self._by_case.get(_spelling(name).casefold(), ()), *self._by_stem.get(stem, ()))
        alike = (*alike, *self._by_stem.get(_spelling(name), ()))
        elsewhere = self._by_last_part.get(_last_part(name), ())
        if not elsewhere and name.isdecimal():
            elsewhere = [found for found in sorted(self.names) if _stem(_last_part(found)) == _last_part(name)]
        if not alike and len(elsewhere) > 1:
            return f"there are {elsewhere[0]} and {elsewhere[1]}; write which one is meant."
        candidates = (*alike, *elsewhere)
        return f"did you mean {candidates[0]!r}?" if candidates else "add the file or take out the row."


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]  # noqa: PTH122


def _spelling(name: str) -> str:
    return "/".join(tidy_name(part) for part in name.split("/"))


def _last_part(name: str) -> str:
    """Return the last part of a name in lower case, without the leading zeros that spreadsheets drop."""
    last = _spelling(name).casefold().rpartition("/")[2]
    stem, suffix = os.path.splitext(last)  # noqa: PTH122
    return (stem.lstrip("0") or "0") + suffix if stem.isdecimal() else last


def _grouped(names: Sequence[str], key: Callable[[str], str]) -> Mapping[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(key(name), []).append(name)
    return groups
