"""COCO 2014 and 2017: image labels from `instances_*.json`, and masks painted from its instances by a stated rule.

Files of label tools are read too, which take liberties with the format. Boxes suffice for labels. Where the mask of an
image is not known it is None: such images are trained on and not scored.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias
from urllib.parse import parse_qs, quote, unquote, urlencode

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from PIL import Image as PILImage

from ..files import atomic_write
from ..hub.errors import InputError
from ..hub.labels import BACKGROUND, IGNORE_INDEX
from .common import (
    COCO_REFERENCE,
    DataError,
    UnreadableImageError,
    chosen_classes,
    collector_paused,
    first_alike,
    folded_name,
    image_size,
    index_png,
    inner_path,
    is_background,
    masks_in_order,
    missing_files,
    tidy_name,
    without_suffix,
)
from .outlines import OutlineError, polygon_painter, read_outline
from .rows import build_dataset

logger = logging.getLogger(__name__)

Key: TypeAlias = int | str
"""An id of an image or a category; text that is a whole number is the number."""

OVERLAPS: Mapping[str, str] = {
    "later": "later objects over earlier ones, in the order of the file",
    "smaller": "smaller objects over larger ones",
    "ignore": f"pixels of objects of different classes are {IGNORE_INDEX}",
}
"""Who may get the pixels that several objects cover, in words."""

CROWDS: Mapping[str, str] = {
    "background": "crowd regions are background",
    "ignore": f"crowd regions are {IGNORE_INDEX} where no object covers them",
    "object": "crowd regions have their class where no object covers them",
}
"""What may become of regions marked `iscrowd`, in words."""


@dataclass(frozen=True)
class CocoMaskRule:
    """How instances become a label map; there is no official rule, and scores differ by it. `str()` says it.

    Attributes:
        overlap: Who gets a pixel that several objects cover: the "later" one in the file, the "smaller" one (of fewer
            pixels; of equal ones the later), or nobody: "ignore" makes it 255 if their classes differ.
        crowd: What regions marked `iscrowd` become: "background", "ignore" (255) or "object" (their class). They lie
            below all objects, whatever their place in the file.

    Raises:
        ValueError: an unknown value.
    """

    overlap: str = "later"
    crowd: str = "background"

    def __post_init__(self) -> None:
        for name, known in (("overlap", OVERLAPS), ("crowd", CROWDS)):
            if getattr(self, name) not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}.")

    def __str__(self) -> str:
        return f"COCO instances, {OVERLAPS[self.overlap]}; {CROWDS[self.crowd]}"


def load_coco(
    root: str | Path,
    split: str,
    *,
    classes: Sequence[str] | None = None,
    masks: bool | str | Path = True,
    overlap: str | None = None,
    crowd: str | None = None,
    drop_empty: bool = False,
) -> Dataset:
    """Load a split of COCO, or of a data set in its layout.

    A class counts as shown by an image if any of its instances does, crowd regions included: 82,081 of the 82,783
    images of train2014 and 40,137 of the 40,504 of val2014 have a label. Class ids are 0 to 79 in the order of the
    category ids, whose gaps vanish. Categories without annotations stay, so that all splits have the same classes;
    background, and the root category that Roboflow puts above all others, are none. Images are not decoded here.

    Args:
        root: The folder with `annotations/instances_<split>.json` and the images in `<split>`, `images/<split>` or
            `images`; or with `<split>/_annotations.coco.json` beside the images.
        split: train2014, val2014, train2017 or val2017; without the year where there is one year only.
        classes: Part of the category names, in the order that their ids shall have; labels of other classes are
            dropped and become background in the masks. Default: all.
        masks: True: masks are painted when `open_mask` is given the `mask` of a row, which names the instances; each
            process then reads the whole JSON file at its first mask. A folder: the PNGs that `write_coco_masks` wrote
            there once, which is the better way for a whole split. False: the column is None throughout.
        overlap: Part of the `CocoMaskRule`; default "later", or that of the folder.
        crowd: Part of the `CocoMaskRule`; default "background", or that of the folder.
        drop_empty: Leave out images that show none of `classes`.

    Returns:
        A dataset in the order of the file: `image_id` (`COCO_train2014_000000000009`, in 2017 `000000000009`), `image`
        (undecoded), `labels` (ascending class ids), `mask`. `mask_rule` gives back the rule of the masks. A mask is
        None where an object has no outline or one that cannot be read, or where the size in the JSON is not the
        image's; how many and why is logged.

    Raises:
        DataError: a file is missing or damaged, or does not fit; the message names it.
        MissingExtraError: masks are wanted and pycocotools is not installed.
        ValueError: an unknown value of `overlap` or `crowd`.
    """
    rule = CocoMaskRule(overlap or "later", crowd or "background")
    split, path = _annotation_file(Path(root), split)
    instances = _read_instances(path, "checked" if masks is True else "unread")
    folder = _image_folder(Path(root), split)
    instances.images = _with_files(instances, folder)
    for note in instances.notes:
        _say_once(note)
    chosen = chosen_classes(classes, instances.classes, f"the categories of {path}")
    if len(chosen) >= IGNORE_INDEX:
        raise DataError(
            f"{path} has {len(chosen)} categories, expected at most {IGNORE_INDEX - 1}; choose some of them with "
            "classes (--data.classes)."
        )
    new_ids = {instances.classes.index(name): class_id for class_id, name in enumerate(chosen)}
    labels = [
        [new_ids[old] for old in instances.labels.get(image.number, ()) if old in new_ids]
        for image in instances.images
    ]
    kept = [position for position in range(len(labels)) if labels[position] or not drop_empty]
    if not kept:
        raise DataError(f"no image of {split} shows any of {', '.join(chosen)}; choose others or another split.")
    if without := sum(not labels[position] for position in kept):
        _say_once(
            f"{path}: {without} of {len(kept)} images have no annotation of the classes and count as showing none of "
            "them; drop_empty (--data.drop_empty true) leaves them out"
        )
    images = [instances.images[position] for position in kept]

    cells: Sequence[Path | bytes | str | None] = [None] * len(images)
    if masks is True:
        polygon_painter()  # without it no mask could be painted: now, not after training
        canvases = _canvases(images, folder)
        reasons = _unknown_masks(instances, images, canvases, rule)
        _say_unknown(path, reasons, len(images))
        keep = None if chosen == instances.classes else [instances.classes.index(name) for name in chosen]
        refer = _references(path, rule, keep)
        cells = [
            refer(image.number, canvas) if isinstance(canvas, _Canvas) and image.number not in reasons else None
            for image, canvas in zip(images, canvases, strict=True)
        ]
    elif masks is not False:
        rule, paths = _written_masks(Path(masks), path, [image.image_id for image in images], overlap, crowd)
        cells = masks_in_order(paths, instances.classes, chosen)
    return build_dataset(
        [image.image_id for image in images],
        [f"{folder}/{image.file_name}" for image in images],
        [labels[position] for position in kept],
        cells,
        chosen,
        mask_rule=None if masks is False else str(rule),
    )


def write_coco_masks(
    root: str | Path,
    split: str,
    folder: str | Path,
    *,
    overlap: str = "later",
    crowd: str = "background",
    progress: Callable[[Sequence[Any]], Iterable[Any]] = lambda images: images,
) -> CocoMaskRule:
    """Paint the masks of a split once, as `<folder>/<image_id>.png` with the VOC palette.

    Files appear by atomic rename and those that are there stay, so that a run that was killed goes on. `rule.json`
    says how they were painted, and which images have no mask because it cannot be known; another rule needs another
    folder.

    Args:
        root: As for `load_coco`; without images, their sizes must be in the JSON.
        split: As for `load_coco`.
        folder: Made if need be.
        overlap: Part of the `CocoMaskRule`.
        crowd: Part of the `CocoMaskRule`.
        progress: Wraps the list of images.

    Raises:
        DataError: as `load_coco`, or the folder holds masks of another rule or file.
        MissingExtraError: masks are wanted and pycocotools is not installed.
        ValueError: an unknown value of `overlap` or `crowd`.
    """
    rule = CocoMaskRule(overlap, crowd)
    folder = Path(folder)
    split, path = _annotation_file(Path(root), split)
    record = {**asdict(rule), "annotations": _short_name(path)}
    rule_file = folder / _RULE_FILE
    if rule_file.is_file():
        stored = {key: value for key, value in _read_rule(rule_file).items() if key in record}
        if stored != record:
            raise DataError(f"{rule_file} says {stored}, asked for {record}; choose another folder.")
    elif folder.is_dir() and any(folder.glob("*.png")):
        raise DataError(f"{folder} holds masks, but no rule.json that says how they were made; choose another folder.")
    instances = _read_instances(path, "kept")
    if len(instances.classes) >= IGNORE_INDEX:
        raise DataError(
            f"{path} has {len(instances.classes)} categories, expected at most {IGNORE_INDEX - 1} for masks of one "
            "byte for each pixel; keep some of the categories alone in the file."
        )
    image_folder = _image_folder(Path(root), split, required=False)
    if image_folder is None:
        instances.images = [
            image._replace(file_name=inner_path(image.file_name, f"{path}, image {image.number},"))
            for image in instances.images
        ]
        _check_unique(path, instances.images)
    else:
        instances.images = _with_files(instances, image_folder)
    for note in instances.notes:
        _say_once(note)
    canvases = _canvases(instances.images, image_folder)
    reasons = _unknown_masks(instances, instances.images, canvases, rule)
    _say_unknown(path, reasons, len(instances.images))
    without = sorted(image.image_id for image in instances.images if image.number in reasons)
    with atomic_write(rule_file) as temporary:
        temporary.write_text(json.dumps({**record, "without_mask": without}, indent=2) + "\n", encoding="utf-8")
    todo = [
        (image, canvas)
        for image, canvas in zip(instances.images, canvases, strict=True)
        if isinstance(canvas, _Canvas) and image.number not in reasons
    ]
    for image, canvas in progress(todo):
        target = folder / f"{image.image_id}.png"
        if not target.is_file():
            with atomic_write(target) as temporary:
                temporary.write_bytes(index_png(_paint(instances, image, canvas, rule)))
    return rule


@cache
def _say_once(note: str) -> None:
    """Log a note; a run loads the same file in several stages."""
    logger.warning("%s", note)


# ---- Files.

_RULE_FILE = "rule.json"

_ROBOFLOW = "_annotations.coco.json"


def _annotation_file(root: Path, split: str) -> tuple[str, Path]:
    """Return `split` with its year, and its JSON file; a name that is no split of the folder is refused."""
    folder = root / "annotations"
    files = {path.parent.name: path for path in sorted(root.glob(f"*/{_ROBOFLOW}"))}
    files |= {path.stem.removeprefix("instances_"): path for path in sorted(folder.glob("instances_*.json"))}
    with_year = [name for name in files if re.fullmatch(rf"{re.escape(split)}20\d\d", name)]
    if split not in files and len(with_year) == 1:
        split = with_year[0]
    if split in files:
        return split, files[split].absolute()
    if with_year:
        raise DataError(f"{root} holds {' and '.join(sorted(with_year))}; name the split with its year.")
    others = sorted(path.relative_to(root).as_posix() for place in (root, folder) for path in place.glob("*.json"))
    hint = f" (and {', '.join(others[:5])}, to be renamed so)" if others and not files else ""
    raise DataError(
        f"{folder} has no instances_{split}.json, found {', '.join(sorted(files)) or 'none'}{hint}; give the "
        f"folder that holds annotations/instances_*.json or <split>/{_ROBOFLOW}."
    )


def _short_name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}" if path.name == _ROBOFLOW else path.name


def _image_folder(root: Path, split: str, *, required: bool = True) -> Path | None:
    for folder in (root / split, root / "images" / split, root / "images"):
        if folder.is_dir():
            return folder
    if not required:
        return None
    raise DataError(f"{root} has no folder {split} or images/{split}, expected images there; unpack {split}.zip.")


def _with_files(instances: _Instances, folder: Path | None) -> list[_Image]:
    """Return the images with the names of their files as they are in `folder`.

    Tools write names with folders of another machine, backslashes, percent signs, or in another case: such a name is
    read as that of the one file in the folder that fits its end.

    Raises:
        DataError: files are missing, or images share one.
    """
    assert folder is not None
    plain = [image for image in instances.images if _is_plain(image.file_name)]
    absent = set(missing_files(folder, [image.file_name for image in plain]))
    if len(plain) < len(instances.images) or absent:
        files = _FileIndex(folder)
        found = {}
        for image in instances.images:
            if image.file_name in absent or not _is_plain(image.file_name):
                found[image.number] = files.find(image.file_name)
        if lost := [image for image in instances.images if found.get(image.number, "") is None]:
            for image in lost:
                inner_path(image.file_name, f"{instances.path}, image {image.number},")
            raise DataError(
                f"{instances.path} names {lost[0].file_name}, which is not in {folder} ({len(lost)} of "
                f"{len(instances.images)} images are missing); put them there, or take them out of the file."
            )
        images = [
            image._replace(file_name=name) if (name := found.get(image.number)) else image
            for image in instances.images
        ]
    else:
        images = instances.images
    _check_unique(instances.path, images)
    return images


def _is_plain(file_name: str) -> bool:
    """Return whether a name is one inside a folder as it stands."""
    if "/" not in file_name and "\\" not in file_name and ":" not in file_name:
        return file_name not in ("", ".", "..")
    parts = file_name.split("/")
    return "\\" not in file_name and ":" not in file_name and not any(part in ("", ".", "..") for part in parts)


class _FileIndex:
    """The files in a folder, by what is the same for names that mean one file."""

    def __init__(self, folder: Path) -> None:
        self.by_path: dict[str, list[str]] = defaultdict(list)
        self.by_name: dict[str, list[str]] = defaultdict(list)
        for place, _, names in os.walk(folder):
            for name in names:
                path = (Path(place) / name).relative_to(folder).as_posix()
                self.by_path[folded_name(path)].append(path)
                self.by_name[folded_name(name)].append(path)

    def find(self, file_name: str) -> str | None:
        """Return the path in the folder that a name means; None where none or several fit."""
        for text in dict.fromkeys((file_name, unquote(file_name), unquote(file_name).partition("?")[0])):
            parts = [part for part in text.replace("\\", "/").split("/") if part not in ("", ".", "..")]
            for start in range(len(parts)):
                paths = self.by_path.get(folded_name("/".join(parts[start:])), [])
                exact = [path for path in paths if path == "/".join(parts[start:])]
                if len(paths) == 1 or exact:
                    return (exact or paths)[0]
            if len(parts) == 1 and len(paths := self.by_name.get(folded_name(parts[0]), [])) == 1:
                return paths[0]
        return None


def _check_unique(path: Path, images: Sequence[_Image]) -> None:
    """Refuse two images whose masks would have one name."""
    seen: dict[str, _Image] = {}
    for image in images:
        if (first := seen.setdefault(image.image_id, image)) is not image:
            what = "one file" if first.file_name == image.file_name else "names that differ in their suffix alone"
            raise DataError(
                f"{path}: the images {first.number} ({first.file_name}) and {image.number} ({image.file_name}) have "
                f"{what}, expected each file once and names of their own; join their annotations or rename one."
            )


def _written_masks(
    folder: Path, path: Path, image_ids: Sequence[str], overlap: str | None, crowd: str | None
) -> tuple[CocoMaskRule, list[Path | None]]:
    """Return the rule of a folder of masks and the mask of each image, after checking that they are as asked for."""
    if not (folder / _RULE_FILE).is_file():
        raise DataError(f"{folder} has no rule.json, expected masks that write_coco_masks wrote; write them first.")
    record = _read_rule(folder / _RULE_FILE)
    rule = CocoMaskRule(record["overlap"], record["crowd"])
    asked = CocoMaskRule(overlap or rule.overlap, crowd or rule.crowd)
    if asked != rule or record["annotations"] != _short_name(path):
        raise DataError(
            f"the masks in {folder} are of {record['annotations']} by the rule '{rule}', asked for "
            f"{_short_name(path)} by '{asked}'; choose the folder of that rule, or write one."
        )
    without = set(record["without_mask"])
    missing = missing_files(folder, [f"{image_id}.png" for image_id in image_ids if image_id not in without])
    if missing:
        raise DataError(
            f"{folder} lacks the mask {missing[0]} ({len(missing)} of {len(image_ids)} are missing); start "
            "write_coco_masks again, it goes on where it was."
        )
    if number := len(without.intersection(image_ids)):
        _say_once(
            f"{folder}: {number} of {len(image_ids)} images are not scored, their masks are not known (see rule.json)"
        )
    return rule, [None if image_id in without else folder / f"{image_id}.png" for image_id in image_ids]


def _read_rule(path: Path) -> Mapping[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        without = [str(image_id) for image_id in record.get("without_mask", [])]  # older files have none
        return {key: str(record[key]) for key in ("overlap", "crowd", "annotations")} | {"without_mask": without}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} cannot be read ({error}); delete its folder and write the masks again.") from error


# ---- Instances.


# A segmentation of polygons in plain numbers, without the brackets at its ends. Text inside a JSON string cannot look
# like it: its quotes have backslashes.
_POLYGONS = re.compile(rb'"segmentation"\s*:\s*\[\s*\[([\d.,\-\s]*(?:\]\s*,\s*\[[\d.,\-\s]*)*)\]\s*\]')
# Any other, polygons or run lengths.
_SEGMENTATION = re.compile(rb'"segmentation"\s*:\s*(?:\[[\[\]\d.,eE+\-\s]*\]|\{[^{}]*\})')

_LOOKED_AT = "\x00 polygons that are as they should be"
_IN_PLACE = b'"segmentation":' + json.dumps(_LOOKED_AT).encode()

_IMAGE_KEYS = ("id", "file_name", "height", "width")


def _without_good_polygons(found: re.Match[bytes]) -> bytes:
    """Put a short text in the place of polygons of three corners or more; all else stays, to be looked at closely.

    Nearly all of a file are these, and reading their numbers would take most of the time.
    """
    commas = [part.count(b",") for part in found[1].split(b"]")]
    good = commas[0] >= 5 and commas[0] % 2 and all(more >= 6 and more % 2 == 0 for more in commas[1:])
    return _IN_PLACE if good else found[0]


class _Image(NamedTuple):
    number: Key
    file_name: str
    height: int | None
    width: int | None

    @property
    def image_id(self) -> str:
        return without_suffix(self.file_name)


class _Canvas(NamedTuple):
    """What an image's instances are painted on: the size they are drawn for, and the EXIF turn of the file, if any."""

    height: int
    width: int
    orientation: int | None = None


class _Annotation(NamedTuple):
    name: str
    class_id: int | None  # None: of a category that is no class
    is_crowd: Any
    segmentation: Any


@dataclass
class _Instances:
    """What a JSON file says: class names by class id, images in order, class ids and annotations by image number.

    `notes` are what was read in another way than it stands, `annotations` those that have to be looked at: all that
    are painted, or those whose outlines are not plain polygons.
    """

    path: Path
    images: list[_Image]
    classes: list[str] = field(default_factory=list)
    labels: dict[Key, set[int]] = field(default_factory=lambda: defaultdict(set))
    annotations: dict[Key, list[_Annotation]] = field(default_factory=lambda: defaultdict(list))
    notes: list[str] = field(default_factory=list)


@collector_paused()
def _read_instances(path: Path, outlines: Literal["unread", "checked", "kept"]) -> _Instances:
    """Read `instances_*.json`: pycocotools' own reader does no checks, and prints.

    Args:
        path: The file.
        outlines: "kept": all of them, which are nearly all of the file. "checked": those that are not plain polygons,
            for `_unknown_masks`. "unread": none, for labels alone. These two take a third of the time and a tenth
            of the memory.

    Raises:
        DataError: the file is damaged, or its parts do not fit together.
    """

    def take(part: Mapping[str, Any]) -> Any:
        """Turn parts of the file into what is kept of them while it is parsed."""
        if "category_id" in part and "image_id" in part:  # first: there are seven of these for each image
            odd = None
            if outlines != "unread":
                segmentation, crowd = part.get("segmentation"), part.get("iscrowd", 0)
                if outlines == "kept" or segmentation != _LOOKED_AT or crowd not in (0, 1):
                    odd = segmentation, crowd
            return part.get("id"), part["image_id"], part["category_id"], odd
        if "file_name" in part and "images" not in part and "name" not in part:
            return {key: part[key] for key in _IMAGE_KEYS if key in part}
        return part

    text = path.read_bytes()
    if outlines == "checked":
        text = _POLYGONS.sub(_without_good_polygons, text)
    elif outlines == "unread":
        text = _SEGMENTATION.sub(b'"segmentation":0', text)
    try:
        content = json.loads(text, object_hook=take)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}); download or export it again.") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is no valid JSON ({error}); download or export it again.") from error
    del text
    if not isinstance(content, dict):
        raise DataError(
            f"{path} is a {type(content).__name__}, expected an object with the lists images, annotations and "
            "categories; export it as COCO instances."
        )
    for name in ("images", "annotations", "categories"):
        if not isinstance(content.get(name), list):
            what = f"has no list '{name}'" if content.get(name) is None else f"has '{name}' that is no list"
            raise DataError(
                f"{path} {what}, expected images, annotations and categories; export it as COCO instances."
            )
    instances = _Instances(path, _read_images(path, content["images"]))
    _sort_annotations(instances, content["annotations"], content["categories"])
    return instances


def _key(value: Any, where: str) -> Key:
    """Return an id in the one form in which ids are compared: tools mix 12, 12.0 and "12"."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.strip():
        value = value.strip()
        return int(value) if value.isascii() and value.isdecimal() and str(int(value)) == value else str(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise DataError(f"{where} is {value!r}, expected a number or text.")


def _read_images(path: Path, parts: Sequence[Any]) -> list[_Image]:
    """Return the images after checking that each has a file name and an id of its own."""
    if not parts:
        raise DataError(f"{path} names no image, expected one or more.")
    numbers: dict[Key, str] = {}
    images = []
    for place, part in enumerate(parts):
        if not isinstance(part, dict) or (lacking := [key for key in ("id", "file_name") if part.get(key) is None]):
            what = f"has no '{lacking[0]}'" if isinstance(part, dict) else f"is {part!r:.60}"
            raise DataError(f"{path}, images[{place}], {what}, expected an object with id and file_name.")
        number = part["id"] if type(part["id"]) is int else _key(part["id"], f"{path}, images[{place}], the id")
        file_name = part["file_name"]
        if not isinstance(file_name, str) or not file_name.strip():
            raise DataError(f"{path}, image {number}, has the file_name {file_name!r}, expected the name of a file.")
        if number in numbers:
            raise DataError(
                f"{path} holds the image {number} ({file_name}, and {numbers[number]}) twice, expected each once."
            )
        numbers[number] = file_name
        images.append(_Image(number, file_name, _pixels(part.get("height")), _pixels(part.get("width"))))
    return images


def _pixels(value: Any) -> int | None:
    """Return a side of an image, also one written as text or with a decimal point; None for everything else."""
    if type(value) is int:
        return value if value > 0 else None
    try:
        number = float(value) if isinstance(value, float | str) else 0.0
    except ValueError:
        return None
    return int(number) if number > 0 and number.is_integer() else None


def _sort_annotations(instances: _Instances, parts: Sequence[Any], categories: Sequence[Any]) -> None:
    """Give each annotation to its image, and name the classes."""
    path = instances.path
    pairs: dict[tuple[Any, Any], int] = {}  # image and category as they are written -> place of the first
    odd_parts = []
    try:
        for place, part in enumerate(parts):
            if type(part) is not tuple:
                raise _bad_annotation(path, place, part)
            pairs.setdefault(part[1:3], place)
            if part[3] is not None:
                odd_parts.append((place, part))
    except TypeError as error:  # a list or an object in the place of an id
        raise DataError(
            f"{path}, {_annotation_name(place, part)}, has an image_id or category_id that is no id."
        ) from error

    def named(place: int) -> str:
        return f"{path}, {_annotation_name(place, parts[place])},"

    category_keys: dict[Any, Key] = {}
    for (_, category), place in pairs.items():
        if category not in category_keys:
            category_keys[category] = _key(category, f"{named(place)} the category_id")
    instances.classes, class_of, notes = _read_classes(path, categories, set(category_keys.values()))
    instances.notes += notes
    numbers = {image.number for image in instances.images}
    image_keys: dict[Any, Key] = {}
    for (image, category), place in pairs.items():
        if category_keys[category] not in class_of:
            raise DataError(
                f"{named(place)} has the category {category!r}, which is not in its categories; is the file cut "
                "together from others?"
            )
        number = image_keys.get(image)
        if number is None:
            number = image_keys[image] = _key(image, f"{named(place)} the image_id")
            if number not in numbers:
                raise DataError(
                    f"{named(place)} is of image {image!r}, which is not there; take out annotations whose images "
                    "are not in the file."
                )
        class_id = class_of[category_keys[category]]
        if class_id is not None:
            instances.labels[number].add(class_id)
    for place, part in odd_parts:
        _, image, category, (segmentation, crowd) = part
        annotation = _Annotation(_annotation_name(place, part), class_of[category_keys[category]], crowd, segmentation)
        instances.annotations[image_keys[image]].append(annotation)


def _annotation_name(place: int, part: Any) -> str:
    number = part[0] if isinstance(part, tuple) else part.get("id") if isinstance(part, dict) else None
    return f"annotations[{place}]" if number is None else f"annotation {number}"


def _bad_annotation(path: Path, place: int, part: Any) -> DataError:
    where = f"{path}, {_annotation_name(place, part)},"
    if not isinstance(part, dict):
        return DataError(f"{where} is {part!r:.60}, expected an object with image_id and category_id.")
    if "segments_info" in part:
        return DataError(f"{path} is a panoptic file, expected instances; export it as COCO instances.")
    lacking = next(key for key in ("image_id", "category_id") if key not in part)
    return DataError(f"{where} has no '{lacking}', expected an object with image_id and category_id.")


def _read_classes(
    path: Path, parts: Sequence[Any], used: set[Key]
) -> tuple[list[str], dict[Key, int | None], list[str]]:
    """Return class names in the order of category ids, category id -> class id, and what to say about them.

    Args:
        path: The file.
        parts: The list `categories`.
        used: Ids of the categories that have annotations.
    """
    names: dict[Key, str] = {}
    above: dict[Key, str] = {}  # the supercategory of each
    for place, part in enumerate(parts):
        if not isinstance(part, dict) or (lacking := [key for key in ("id", "name") if part.get(key) is None]):
            what = f"has no '{lacking[0]}'" if isinstance(part, dict) else f"is {part!r:.60}"
            raise DataError(f"{path}, categories[{place}], {what}, expected an object with id and name.")
        number = _key(part["id"], f"{path}, categories[{place}], the id")
        name = tidy_name(str(part["name"]))
        if not name or names.get(number, name) != name:
            what = f"has the names {names[number]!r} and {name!r}" if name else "has no name"
            raise DataError(f"{path}, category {number}, {what}, expected one name.")
        names[number] = name
        above[number] = tidy_name(str(part.get("supercategory") or ""))
    ordered = sorted(names, key=lambda number: (isinstance(number, str), number))
    classes: list[str] = []
    class_of: dict[Key, int | None] = {}
    notes = []
    for number in ordered:
        name = names[number]
        is_root = (
            number not in used
            and above[number].casefold() in ("", "none", "null")
            and len(names) > 1
            and all(above[other] == name for other in names if other != number)
        )
        if is_background(name) or is_root:
            why = "is the one above all others and has no annotation" if is_root else "is no object"
            notes.append(f"{path}: the category {name!r} {why}; it is left out of the classes")
            class_of[number] = None
        elif name in classes:
            notes.append(f"{path}: the categories named {name!r} are one class")
            class_of[number] = classes.index(name)
        else:
            class_of[number] = len(classes)
            classes.append(name)
    if not classes:
        raise DataError(f"{path} names no category of objects, expected one for each class.")
    if pair := first_alike(classes):
        raise DataError(
            f"{path} names the categories {pair[0]!r} and {pair[1]!r}, which look alike; give each class one name."
        )
    return classes, class_of, notes


# ---- Masks that are not known.


class _Reason(NamedTuple):
    """Why the mask of an image is not known: a kind that is counted, and of the first image the whole story."""

    kind: str
    story: str


_MOST_LOOKED_AT = 1000
"""Images whose files are compared with the JSON; if one differs, all are."""


def _canvases(images: Sequence[_Image], folder: Path | None) -> list[_Canvas | _Reason]:
    """Return what to paint each image's instances on, or why it is not known.

    The size is that of the JSON, or of the file where the JSON has none. Of a large data set, some files are compared.
    """
    told: list[_Canvas | None] = [
        None if image.height is None or image.width is None else _Canvas(image.height, image.width) for image in images
    ]
    step = -(-len(images) // _MOST_LOOKED_AT)
    sample = range(0, len(images), step if folder is not None else len(images))
    found = {place: _compared(images[place], told[place], folder) for place in sample}
    differs = any(told[place] is not None and canvas != told[place] for place, canvas in found.items())
    return [
        found[place] if place in found else _compared(image, canvas, folder) if canvas is None or differs else canvas
        for place, (image, canvas) in enumerate(zip(images, told, strict=True))
    ]


def _compared(image: _Image, told: _Canvas | None, folder: Path | None) -> _Canvas | _Reason:
    """Return what to paint on after comparing the size that the JSON tells with the one of the file."""
    where = f"image {image.number} ({image.file_name})"
    if folder is None:
        no_size = _Reason("whose size is in no file", f"{where} has no height and width above 0 in the JSON")
        return told or no_size
    path = folder / image.file_name
    try:
        stored = _Canvas(*image_size(path))
    except UnreadableImageError as error:  # the stages name it
        return told or _Reason("whose size is in no file", f"{where} has none in the JSON, and {error}")
    if told is None or told == stored:
        return stored
    with PILImage.open(path) as opened:
        orientation = opened.getexif().get(_EXIF_ORIENTATION)
    if orientation in _UNTURNED and (told.height, told.width) == (stored.width, stored.height):
        return told._replace(orientation=orientation)  # drawn on the upright view
    return _Reason(
        "whose size in the JSON is not that of the file",
        f"{where} is {told.height} x {told.width} (height x width) in the JSON and {stored.height} x {stored.width} "
        "in the file",
    )


_EXIF_ORIENTATION = 0x0112

_UNTURNED: Mapping[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    5: lambda upright: upright.T,
    6: lambda upright: np.rot90(upright),
    7: lambda upright: np.rot90(upright, 2).T,
    8: lambda upright: np.rot90(upright, -1),
}
"""EXIF orientation -> from the upright view to the stored pixels, where these lie on their side."""


def _unknown_masks(
    instances: _Instances, images: Sequence[_Image], canvases: Sequence[_Canvas | _Reason], rule: CocoMaskRule
) -> dict[Key, _Reason]:
    """Return by image number why a mask is not known: for its size, or for its first instance without an outline."""
    reasons: dict[Key, _Reason] = {}
    for image, canvas in zip(images, canvases, strict=True):
        if isinstance(canvas, _Reason):
            reasons[image.number] = canvas
        for annotation in instances.annotations.get(image.number, ()):
            where = f"image {image.number} ({image.file_name}), {annotation.name},"
            try:
                crowd = _is_crowd(annotation)
                if annotation.class_id is None or (crowd and rule.crowd == "background"):
                    continue
                if annotation.segmentation == _LOOKED_AT:
                    continue
                outline = read_outline(annotation.segmentation)
                if outline is None:
                    kind = "with objects that have no outline (boxes suffice for labels)"
                    reasons[image.number] = _Reason(kind, f"{where} it has no segmentation")
                    break
                if isinstance(canvas, _Canvas):
                    outline.check_size(canvas.height, canvas.width)
            except OutlineError as error:
                kind = "with outlines that cannot be read"
                reasons[image.number] = _Reason(kind, f"{where} {error}")
                break
    return reasons


def _say_unknown(path: Path, reasons: Mapping[Key, _Reason], total: int) -> None:
    """Log how many masks are not known, why, and the first image of each kind."""
    if not reasons:
        return
    kinds: dict[str, list[str]] = defaultdict(list)
    for reason in reasons.values():
        kinds[reason.kind].append(reason.story)
    told = "; ".join(f"{len(stories)} {kind}, the first: {stories[0]}" for kind, stories in kinds.items())
    _say_once(f"{path}: the masks of {len(reasons)} of {total} images are not known, so these are not scored: {told}")


# ---- Painting.


def _is_crowd(annotation: _Annotation) -> bool:
    """Read `iscrowd`, which tools write as number, text, true or null.

    Raises:
        OutlineError: it is something else.
    """
    text = str(annotation.is_crowd).strip().lower()
    if text in ("0", "0.0", "false", "none", "nan", ""):
        return False
    if text in ("1", "1.0", "true"):
        return True
    raise OutlineError(f"its iscrowd is {annotation.is_crowd!r}, expected 0 or 1")


def _paint(
    instances: _Instances, image: _Image, canvas: _Canvas, rule: CocoMaskRule, keep: Sequence[int] | None = None
) -> NDArray[np.uint8]:
    """Paint the label map (H, W) of one image as its file stores it.

    Args:
        instances: With outlines.
        image: Which.
        canvas: Of the image.
        rule: Who gets which pixels.
        keep: Class ids in the order of their new ids; others become background. None: all as they are.

    Raises:
        DataError: an outline is missing or cannot be read.
    """
    regions, labels, is_crowd = [], [], []
    for annotation in instances.annotations.get(image.number, ()):
        try:
            crowd = _is_crowd(annotation)
            if annotation.class_id is None or (crowd and rule.crowd == "background"):
                continue
            outline = read_outline(annotation.segmentation)
            if outline is None:
                raise OutlineError("it has no segmentation")
            regions.append(outline.paint(canvas.height, canvas.width))
        except OutlineError as error:
            raise DataError(
                f"{instances.path}, image {image.number} ({image.file_name}), {annotation.name}, {error}; load the "
                "data set again, which leaves such masks out."
            ) from error
        labels.append(annotation.class_id + 1)
        is_crowd.append(crowd)
    label_map = np.full((canvas.height, canvas.width), BACKGROUND, dtype=np.int16)
    for number in np.flatnonzero(is_crowd).tolist():
        label_map[regions[number]] = _IGNORED if rule.crowd == "ignore" else labels[number]
    objects = [number for number in range(len(regions)) if not is_crowd[number]]
    if rule.overlap == "smaller":
        objects.sort(key=lambda number: -int(regions[number].sum()))  # stable: of equal ones the later is on top
    objects_map = np.full_like(label_map, BACKGROUND)
    for number in objects:
        region, label = regions[number], labels[number]
        if rule.overlap == "ignore":
            before = objects_map[region]
            objects_map[region] = np.where((before == BACKGROUND) | (before == label), label, _IGNORED)
        else:
            objects_map[region] = label
    label_map = np.where(objects_map == BACKGROUND, label_map, objects_map)
    new_labels = np.full(len(instances.classes) + 2, BACKGROUND, dtype=np.uint8)
    kept = range(len(instances.classes)) if keep is None else keep
    new_labels[[class_id + 1 for class_id in kept]] = range(1, len(kept) + 1)
    new_labels[_IGNORED] = IGNORE_INDEX
    painted: NDArray[np.uint8] = new_labels[label_map]
    return painted if canvas.orientation is None else np.ascontiguousarray(_UNTURNED[canvas.orientation](painted))


_IGNORED = -1
"""Ignored pixels until classes are chosen: of more than 254 classes, 255 is one."""


# ---- Masks on demand: a cell names the instances, `open_mask` has them painted.


def _references(path: Path, rule: CocoMaskRule, keep: Sequence[int] | None) -> Callable[[Key, _Canvas], str]:
    """Return what makes the cell of an image."""
    start = f"{COCO_REFERENCE}{quote(str(path))}?image="
    chosen = {} if keep is None else {"keep": ",".join(map(str, keep))}
    end = f"&{urlencode({**asdict(rule), **chosen}, safe=',')}"

    def refer(number: Key, canvas: _Canvas) -> str:
        turned = "" if canvas.orientation is None else f"&orientation={canvas.orientation}"
        return f"{start}{quote(str(number), safe='')}&height={canvas.height}&width={canvas.width}{turned}{end}"

    return refer


def painted_mask(reference: str) -> NDArray[np.uint8]:
    """Paint the label map (H, W) that a reference in the column `mask` names.

    Raises:
        DataError: the JSON file is missing or damaged, or has changed since the reference was made.
    """
    file_name, _, query = reference.removeprefix(COCO_REFERENCE).partition("?")
    path, wanted = Path(unquote(file_name)), {key: values[0] for key, values in parse_qs(query).items()}
    if not path.is_file():
        raise DataError(f"{path} is not there, from which masks are painted; was it moved or deleted?")
    instances, by_number = _instances_for_painting(path, path.stat().st_mtime_ns)
    image = by_number.get(wanted["image"])
    if image is None:
        raise DataError(f"{path} has no image {wanted['image']} any more; load the data set again.")
    orientation = int(wanted["orientation"]) if "orientation" in wanted else None
    canvas = _Canvas(int(wanted["height"]), int(wanted["width"]), orientation)
    keep = [int(class_id) for class_id in wanted["keep"].split(",")] if "keep" in wanted else None
    return _paint(instances, image, canvas, CocoMaskRule(wanted["overlap"], wanted["crowd"]), keep)


@lru_cache(maxsize=2)  # train and val
def _instances_for_painting(path: Path, modified: int) -> tuple[_Instances, dict[str, _Image]]:
    instances = _read_instances(path, "kept")
    return instances, {str(image.number): image for image in instances.images}
