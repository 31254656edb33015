"""Reading `instances_*.json` of COCO and of label tools, which take liberties with the format."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from .common import DataError, collector_paused, first_alike, is_background, tidy_name, without_suffix

Key: TypeAlias = int | str
"""An id of an image or a category; text that is a whole number is the number."""

# A segmentation of polygons in plain numbers, without the brackets at its ends. Text inside a JSON string cannot look
# like it: its quotes have backslashes.
_POLYGONS = re.compile(rb'"segmentation"\s*:\s*\[\s*\[([\d.,\-\s]*(?:\]\s*,\s*\[[\d.,\-\s]*)*)\]\s*\]')
# Any other, polygons or run lengths.
_SEGMENTATION = re.compile(rb'"segmentation"\s*:\s*(?:\[[\[\]\d.,eE+\-\s]*\]|\{[^{}]*\})')

LOOKED_AT = "\x00 polygons that are as they should be"
_IN_PLACE = b'"segmentation":' + json.dumps(LOOKED_AT).encode()

_IMAGE_KEYS = ("id", "file_name", "height", "width")


def _without_good_polygons(found: re.Match[bytes]) -> bytes:
    """Replace polygons of three corners or more by a short text; keep everything else for a closer look.

    They make up nearly all of a file, and parsing their numbers would take most of the time.
    """
    commas = [part.count(b",") for part in found[1].split(b"]")]
    good = commas[0] >= 5 and commas[0] % 2 and all(more >= 6 and more % 2 == 0 for more in commas[1:])
    return _IN_PLACE if good else found[0]


class CocoImage(NamedTuple):
    """An image of the file, with its size where the file says it."""

    number: Key
    file_name: str
    height: int | None
    width: int | None

    @property
    def image_id(self) -> str:
        """Its id in a row of ours: the file name without suffix."""
        return without_suffix(self.file_name)


class Canvas(NamedTuple):
    """What an image's instances are painted on: the size they were drawn for, and the file's EXIF rotation, if any."""

    height: int
    width: int
    orientation: int | None = None


class Annotation(NamedTuple):
    """One object: its name in messages, its class (None if its category is no class), its outline as written."""

    name: str
    class_id: int | None
    is_crowd: Any
    segmentation: Any


@dataclass
class Instances:
    """The content of a JSON file: class names by class id, images in order, class ids and annotations by image number.

    `notes` say what was read differently from how it is written. `annotations` are those that need a look: all that
    are painted, or those whose outlines are not plain polygons.
    """

    path: Path
    images: list[CocoImage]
    classes: list[str] = field(default_factory=list)
    labels: dict[Key, set[int]] = field(default_factory=lambda: defaultdict(set))
    annotations: dict[Key, list[Annotation]] = field(default_factory=lambda: defaultdict(list))
    notes: list[str] = field(default_factory=list)


@collector_paused()
def read_instances(path: Path, outlines: Literal["unread", "checked", "kept"]) -> Instances:
    """Read `instances_*.json`. pycocotools' own reader checks nothing, and prints.

    Args:
        path: The file.
        outlines: "kept": all of them, which are nearly all of the file. "checked": those that are not plain polygons,
            for `_unknown_masks`. "unread": none, for labels alone. These two take a third of the time and a tenth
            of the memory.

    Raises:
        DataError: the file is damaged, or its parts do not fit together.
    """

    def take(part: Mapping[str, Any]) -> Any:
        """Reduce each part of the file to what is kept, while the file is parsed."""
        if "category_id" in part and "image_id" in part:  # first: there are seven of these for each image
            odd = None
            if outlines != "unread":
                segmentation, crowd = part.get("segmentation"), part.get("iscrowd", 0)
                if outlines == "kept" or segmentation != LOOKED_AT or crowd not in (0, 1):
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
    instances = Instances(path, _read_images(path, content["images"]))
    _sort_annotations(instances, content["annotations"], content["categories"])
    return instances


def _key(value: Any, where: str) -> Key:
    """Return an id in a form that compares equal for 12, 12.0 and "12", which tools mix."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.strip():
        value = value.strip()
        return int(value) if value.isascii() and value.isdecimal() and str(int(value)) == value else str(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise DataError(f"{where} is {value!r}, expected a number or text.")


def _read_images(path: Path, parts: Sequence[Any]) -> list[CocoImage]:
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
        images.append(CocoImage(number, file_name, _pixels(part.get("height")), _pixels(part.get("width"))))
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


def _sort_annotations(instances: Instances, parts: Sequence[Any], categories: Sequence[Any]) -> None:
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
        annotation = Annotation(_annotation_name(place, part), class_of[category_keys[category]], crowd, segmentation)
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
