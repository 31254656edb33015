"""Which mask file belongs to which image: the same name, or the same change of name throughout."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

LOSSLESS_SUFFIXES = frozenset({".png", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".pgm", ".ppm", ".pnm"})
JPEG_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif"})

_MASK_SUFFIXES = LOSSLESS_SUFFIXES | JPEG_SUFFIXES

_HEAD = re.compile(r"([^\W_]*[^\W\d_][^\W_]*[_\-. ])(?=.)")
_TAIL = re.compile(r"(?<=.)([_\-. ][^\W_]*[^\W\d_][^\W_]*)$")


@dataclass(frozen=True)
class MaskMatch:
    """Which masks of a folder belong to which images.

    Attributes:
        paths: Image name, as given -> its mask.
        rule: How names differ, in words; "" if each mask has its image's name.
        ambiguous: Image name -> the masks that all match it; none of them is in `paths`.
        unmatched: Masks that match no image, as paths within the folder.
    """

    paths: Mapping[str, Path] = field(default_factory=dict)
    rule: str = ""
    ambiguous: Mapping[str, Sequence[str]] = field(default_factory=dict)
    unmatched: Sequence[str] = ()


def match_masks(
    image_names: Sequence[str], folder: Path, *, image_word: str = "images", mask_word: str = "masks"
) -> MaskMatch:
    """Find the masks of images.

    `a.jpg` has the mask `a.png`; failing that, `a` with another suffix or in another case (`A.PNG`, `a.tif`), or
    `a.jpg.png`. The remaining names are matched by what all of them add, if exactly one such rule exists:
    `a_mask.png`, `mask_a.png`, `a_sat.jpg` and `a_mask.png`, or the same names in other subfolders.

    Args:
        image_names: Paths within the images folder with forward slashes, with or without suffix; no two alike.
        folder: Of the masks, with subfolders; hidden files and folders are not looked at.
        image_word: Word for what the `image_names` name, for `rule`.
        mask_word: Word for what `folder` contains, for `rule`.
    """
    files = mask_files(folder)
    paths: dict[str, Path] = {}
    for name in image_names:
        exact = f"{_stem(name)}.png"
        if exact in files:
            paths[name] = files[exact]
    taken = set(paths.values())
    by_key: dict[str, list[str]] = {}
    for file, path in files.items():
        if path not in taken:
            by_key.setdefault(_key(_stem(file)), []).append(file)
    ambiguous: dict[str, Sequence[str]] = {}
    claims = Counter(_key(_stem(name)) for name in image_names if name not in paths)
    for name in image_names:
        if name in paths:
            continue
        key = _key(_stem(name))
        found = by_key.get(key, []) or by_key.get(_key(name), [])
        found = [file for file in found if _stem(file) == _stem(name)] or found
        if len(found) > 1 or (found and claims[key] > 1 and _stem(found[0]) != _stem(name)):
            ambiguous[name] = sorted(found)
        elif found:
            paths[name] = files[found[0]]
    taken = set(paths.values()) | {files[file] for found in ambiguous.values() for file in found}
    images_left = [name for name in image_names if name not in paths and name not in ambiguous]
    masks_left = [file for file, path in files.items() if path not in taken]
    rule, more = _by_rule(images_left, masks_left, image_word, mask_word)
    paths.update({name: files[file] for name, file in more.items()})
    unmatched = sorted(set(masks_left) - set(more.values()))
    return MaskMatch(paths, rule, ambiguous, unmatched)


def mask_files(folder: Path) -> dict[str, Path]:
    """Return the files of a folder that may be masks, by their paths within it."""
    return {inside: path for inside, path in _files(folder) if path.suffix.lower() in _MASK_SUFFIXES}


def other_files(folder: Path) -> Counter[str]:
    """Return how many files of a folder cannot be masks, by their suffixes."""
    suffixes = (path.suffix.lower() for _, path in _files(folder))
    return Counter(suffix for suffix in suffixes if suffix and suffix not in _MASK_SUFFIXES)


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the files of a folder that are not hidden, in order, with their paths within it."""
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if not any(part.startswith((".", "__MACOSX")) for part in inside.parts) and path.is_file():
            yield inside.as_posix(), path


def _by_rule(
    images: Sequence[str], masks: Sequence[str], image_word: str, mask_word: str
) -> tuple[str, dict[str, str]]:
    """Match the remaining names by one change of name; nothing if not exactly one change matches a whole side."""
    found: dict[tuple[tuple[str, str], ...], str] = {}
    for flat in (False, True):
        mask_names = _variants(masks, flat)
        for image_words, image_keys in _variants(images, flat).items():
            for mask_words, mask_keys in mask_names.items():
                pairs = {image_keys[key]: mask_keys[key] for key in image_keys.keys() & mask_keys.keys()}
                both_changed = bool(image_words) and bool(mask_words)
                if not pairs or len(pairs) < (2 if both_changed else 1):
                    continue
                if len(pairs) == len(masks) or len(pairs) == len(images):
                    words = [f"{mask_word} have {mask_words}"] if mask_words else []
                    words += [f"{image_word} have {image_words}"] if image_words else []
                    words += ["their subfolders differ"] if flat else []
                    found.setdefault(tuple(sorted(pairs.items())), " and ".join(words))
        if found:
            break
    if len(found) != 1:
        return "", {}
    ((only, rule),) = found.items()
    return rule, dict(only)


def _variants(names: Sequence[str], flat: bool) -> dict[str, dict[str, str]]:
    """Return the names as they are, and without the words with which all of them begin or end.

    Returns:
        What is left out, in words -> key -> name; a variant in which two names have one key is not there.
    """
    parts = {name: _stem(name).rpartition("/") for name in names}
    folders = {name: "" if flat else part[0] + part[1] for name, part in parts.items()}
    bases = {name: part[2] for name, part in parts.items()}
    variants = {"": bases}
    heads = {match.group(1) if (match := _HEAD.match(base)) else "" for base in bases.values()}
    if len(heads) == 1 and (head := next(iter(heads))):
        variants[f"{head!r} before the name"] = {name: base.removeprefix(head) for name, base in bases.items()}
    ending, shorter = "", bases
    while True:
        tails = {match.group(1) if (match := _TAIL.search(base)) else "" for base in shorter.values()}
        if len(tails) != 1 or not (tail := next(iter(tails))):
            break
        ending = tail + ending
        shorter = {name: base.removesuffix(tail) for name, base in shorter.items()}
        variants[f"{ending!r} after the name"] = shorter
    keyed = {
        words: {_key(folders[name] + base): name for name, base in changed.items()}
        for words, changed in variants.items()
    }
    return {words: keys for words, keys in keyed.items() if len(keys) == len(names)}


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _stem(name: str) -> str:
    """Return a path without what follows the last dot of its last part."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + (file.rpartition(".")[0] or file)
