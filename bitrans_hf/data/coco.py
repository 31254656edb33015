"""COCO 2014 and 2017: image labels from `instances_*.json`, and masks painted from its instances by a stated rule."""

from __future__ import annotations

import json
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from ..errors import InputError
from ..labels import BACKGROUND, IGNORE_INDEX
from ..store import atomic_write
from .common import (
    COCO_REFERENCE,
    DataError,
    chosen_classes,
    collector_paused,
    index_png,
    inner_path,
    label_lookup,
    masks_in_order,
    missing_files,
    without_suffix,
)
from .rows import build_dataset

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
    category ids, whose gaps vanish. Pictures are not opened here.

    Args:
        root: The folder with `annotations/instances_<split>.json` and the pictures in `<split>` or `images/<split>`.
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
        (undecoded), `labels` (ascending class ids), `mask`. `mask_rule` gives back the rule of the masks.

    Raises:
        DataError: a file is missing or damaged, or does not fit; the message names it.
        ValueError: an unknown value of `overlap` or `crowd`.
    """
    root = Path(root)
    split = _whole_split_name(root, split)
    path = _annotation_file(root, split)
    instances = _read_instances(path, shapes=False)
    folder = _picture_folder(root, split)
    _check_pictures(instances, folder, path)
    chosen = chosen_classes(classes, instances.classes, f"the categories of {path}")
    rule = CocoMaskRule(overlap or "later", crowd or "background")
    new_ids = {instances.classes.index(name): class_id for class_id, name in enumerate(chosen)}
    labels = [[new_ids[old] for old in instances.labels[image.number] if old in new_ids] for image in instances.images]
    kept = [position for position in range(len(labels)) if labels[position] or not drop_empty]
    if not kept:
        raise DataError(f"no image of {split} shows any of {', '.join(chosen)}; choose others or another split.")
    images = [instances.images[position] for position in kept]

    cells: Sequence[Path | bytes | str | None] = [None] * len(images)
    if masks is True:
        keep = None if chosen == instances.classes else [instances.classes.index(name) for name in chosen]
        cells = [_reference(path, image.number, rule, keep) for image in images]
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
    says how they were painted; another rule needs another folder.

    Args:
        root: As for `load_coco`.
        split: As for `load_coco`.
        folder: Made if need be.
        overlap: Part of the `CocoMaskRule`.
        crowd: Part of the `CocoMaskRule`.
        progress: Wraps the list of images.

    Raises:
        DataError: as `load_coco`, or the folder holds masks of another rule or file.
        ValueError: an unknown value of `overlap` or `crowd`.
    """
    rule = CocoMaskRule(overlap, crowd)
    root, folder = Path(root), Path(folder)
    path = _annotation_file(root, _whole_split_name(root, split))
    record = {**asdict(rule), "annotations": path.name}
    rule_file = folder / "rule.json"
    if rule_file.is_file():
        stored = _read_rule(rule_file)
        if stored != record:
            raise DataError(f"{rule_file} says {stored}, asked for {record}; choose another folder.")
    elif folder.is_dir() and any(folder.glob("*.png")):
        raise DataError(f"{folder} holds masks, but no rule.json that says how they were made; choose another folder.")
    else:
        with atomic_write(rule_file) as temporary:
            temporary.write_text(json.dumps(record, indent=2) + "\n")
    instances = _read_instances(path)
    for image in progress(instances.images):
        target = folder / f"{image.image_id}.png"
        if not target.is_file():
            with atomic_write(target) as temporary:
                temporary.write_bytes(index_png(_paint(instances, image, rule)))
    return rule


# ---- Files.


def _whole_split_name(root: Path, split: str) -> str:
    """Return `split` with its year, after checking that it is a name and not a way out of the folder."""
    found = sorted(path.stem.removeprefix("instances_") for path in (root / "annotations").glob("instances_*.json"))
    if split in found:
        return split
    with_year = [name for name in found if re.fullmatch(rf"{re.escape(split)}20\d\d", name)]
    if len(with_year) == 1:
        return with_year[0]
    if with_year:
        raise DataError(f"{root} holds {' and '.join(with_year)}; name the split with its year.")
    raise DataError(
        f"{root / 'annotations'} has no instances_{split}.json, found {', '.join(found) or 'none'}; give the "
        "folder that holds annotations/instances_*.json."
    )


def _annotation_file(root: Path, split: str) -> Path:
    return (root / "annotations" / f"instances_{split}.json").absolute()


def _picture_folder(root: Path, split: str) -> Path:
    for folder in (root / split, root / "images" / split):
        if folder.is_dir():
            return folder
    raise DataError(f"{root} has no folder {split} or images/{split}, expected pictures there; unpack {split}.zip.")


def _check_pictures(instances: _Instances, folder: Path, path: Path) -> None:
    missing = missing_files(folder, [image.file_name for image in instances.images])
    if missing:
        raise DataError(
            f"{path} names {missing[0]}, which is not in {folder} ({len(missing)} of "
            f"{len(instances.images)} images are missing); unpack the whole archive."
        )


def _written_masks(
    folder: Path, path: Path, image_ids: Sequence[str], overlap: str | None, crowd: str | None
) -> tuple[CocoMaskRule, list[Path]]:
    """Return the rule of a folder of masks and the mask of each image, after checking that they are as asked for."""
    if not (folder / "rule.json").is_file():
        raise DataError(f"{folder} has no rule.json, expected masks that write_coco_masks wrote; write them first.")
    record = _read_rule(folder / "rule.json")
    rule = CocoMaskRule(record["overlap"], record["crowd"])
    asked = CocoMaskRule(overlap or rule.overlap, crowd or rule.crowd)
    if asked != rule or record["annotations"] != path.name:
        raise DataError(
            f"the masks in {folder} are of {record['annotations']} by the rule '{rule}', asked for {path.name} by "
            f"'{asked}'; choose the folder of that rule, or write one."
        )
    missing = missing_files(folder, [f"{image_id}.png" for image_id in image_ids])
    if missing:
        raise DataError(
            f"{folder} lacks the mask {missing[0]} ({len(missing)} of {len(image_ids)} are missing); start "
            "write_coco_masks again, it goes on where it was."
        )
    return rule, [folder / f"{image_id}.png" for image_id in image_ids]


def _read_rule(path: Path) -> dict[str, str]:
    try:
        record = json.loads(path.read_text())
        return {key: str(record[key]) for key in ("overlap", "crowd", "annotations")}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({error}); delete its folder and write the masks again.") from error


# ---- Instances.


# A segmentation, polygons or run lengths. Text inside a JSON string cannot look like it: its quotes have backslashes.
_SEGMENTATION = re.compile(rb'"segmentation":\s*(?:\[[\[\]\d.,eE+\-\s]*\]|\{[^{}]*\})')


@dataclass(frozen=True, slots=True)
class _Image:
    number: int
    file_name: str
    height: int
    width: int

    @property
    def image_id(self) -> str:
        return without_suffix(self.file_name)


@dataclass
class _Instances:
    """What a JSON file says: class names by class id, images in order, class ids and annotations by image number."""

    path: Path
    classes: list[str]
    class_of_category: dict[int, int]
    images: list[_Image] = field(default_factory=list)
    labels: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    annotations: dict[int, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))


@collector_paused()
def _read_instances(path: Path, *, shapes: bool = True) -> _Instances:
    """Read `instances_*.json`: pycocotools' own reader does no checks, and prints.

    Args:
        path: The file.
        shapes: Keep the annotations, whose segmentations are nearly all of the file. False: labels alone, which takes
            a third of the time and a tenth of the memory.

    Raises:
        DataError: the file is damaged, or its parts do not fit together.
    """
    category_ids: dict[int, set[int]] = defaultdict(set)

    def take(part: dict[str, Any]) -> Any:
        """Turn parts of the file into what is kept of them while it is parsed."""
        if "category_id" in part:  # first: there are seven of these for each image
            if shapes:
                return part
            category_ids[part["image_id"]].add(part["category_id"])
            return None
        if "file_name" in part:
            return _Image(part["id"], part["file_name"], part["height"], part["width"])
        return part

    try:
        text = path.read_bytes()
        content = json.loads(text if shapes else _SEGMENTATION.sub(b'"segmentation":0', text), object_hook=take)
        del text
        instances = _Instances(path, *_classes(path, content["categories"]))
        instances.images, numbers = _checked_images(path, content["images"])
        annotations = content["annotations"]
        named = set().union(*category_ids.values())
        if shapes:
            _sort_annotations(instances, numbers, annotations)
        elif category_ids.keys() <= numbers and named <= instances.class_of_category.keys():
            for number, ids in category_ids.items():
                instances.labels[number] = {instances.class_of_category[category] for category in ids}
        else:
            return _read_instances(path)  # which says what is wrong
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} lacks a part ({type(error).__name__}: {error}); expected images, annotations and categories."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}); download it again.") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is no valid JSON ({error}); download it again.") from error
    return instances


def _classes(path: Path, categories: Sequence[Mapping[str, Any]]) -> tuple[list[str], dict[int, int]]:
    """Return class names in the order of category ids, and category id -> class id."""
    ordered = sorted(categories, key=lambda category: category["id"])
    names = [str(category["name"]) for category in ordered]
    class_of_category = {category["id"]: class_id for class_id, category in enumerate(ordered)}
    if not names or len(set(names)) < len(names) or len(class_of_category) < len(names):
        raise DataError(f"{path} names no category, or one twice; expected one for each class.")
    if len(names) >= IGNORE_INDEX:
        raise DataError(f"{path} has {len(names)} categories, expected at most {IGNORE_INDEX - 1}.")
    return names, class_of_category


def _checked_images(path: Path, images: Sequence[_Image]) -> tuple[list[_Image], set[int]]:
    """Return the images and their numbers after checking that all names are inside and none comes twice."""
    if not images:
        raise DataError(f"{path} names no image, expected one or more.")
    ids: set[str] = set()
    numbers: set[int] = set()
    checked = []
    for image in images:
        file_name = inner_path(image.file_name, f"{path}, image {image.number},")
        if file_name != image.file_name:
            image = replace(image, file_name=file_name)
        image_id = image.image_id
        if image.number in numbers or image_id in ids:
            raise DataError(f"{path} holds the image {image.number} ({image.file_name}) twice, expected each once.")
        numbers.add(image.number)
        ids.add(image_id)
        checked.append(image)
    return checked, numbers


def _sort_annotations(instances: _Instances, numbers: set[int], annotations: Sequence[dict[str, Any]]) -> None:
    """Give each annotation to its image."""
    for annotation in annotations:
        number, category = annotation["image_id"], annotation["category_id"]
        if category not in instances.class_of_category:
            raise DataError(
                f"{instances.path}, annotation {annotation['id']}, has the category {category!r}, which is not in its "
                "categories; is the file cut together from others?"
            )
        if number not in numbers:
            raise DataError(
                f"{instances.path}, annotation {annotation['id']}, is of image {number!r}, which is not there."
            )
        instances.labels[number].add(instances.class_of_category[category])
        instances.annotations[number].append(annotation)


def _paint(instances: _Instances, image: _Image, rule: CocoMaskRule) -> NDArray[np.uint8]:
    """Paint the label map (H, W) of one image."""
    annotations = instances.annotations.get(image.number, [])
    regions = [_region(instances, image, annotation) for annotation in annotations]
    labels = [instances.class_of_category[annotation["category_id"]] + 1 for annotation in annotations]
    is_crowd = [bool(annotation.get("iscrowd")) for annotation in annotations]
    label_map = np.full((image.height, image.width), BACKGROUND, dtype=np.uint8)
    if rule.crowd != "background":
        for number in np.flatnonzero(is_crowd).tolist():
            label_map[regions[number]] = IGNORE_INDEX if rule.crowd == "ignore" else labels[number]
    objects = [number for number in range(len(annotations)) if not is_crowd[number]]
    if rule.overlap == "smaller":
        objects.sort(key=lambda number: -int(regions[number].sum()))  # stable: of equal ones the later is on top
    objects_map = np.full_like(label_map, BACKGROUND)
    for number in objects:
        region, label = regions[number], labels[number]
        if rule.overlap == "ignore":
            before = objects_map[region]
            objects_map[region] = np.where((before == BACKGROUND) | (before == label), label, IGNORE_INDEX)
        else:
            objects_map[region] = label
    return np.where(objects_map == BACKGROUND, label_map, objects_map)


def _region(instances: _Instances, image: _Image, annotation: Mapping[str, Any]) -> NDArray[np.bool_]:
    """Return the pixels (H, W) of one instance, as pycocotools' `annToMask` does."""
    coco = _pycocotools_mask()
    shape = annotation.get("segmentation")
    try:
        if isinstance(shape, list):
            encoded = coco.merge(coco.frPyObjects(shape, image.height, image.width))
        elif isinstance(shape["counts"], list):  # type: ignore[index]  # None and the like become the error below
            encoded = coco.frPyObjects(shape, image.height, image.width)
        else:
            encoded = shape
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # pycocotools 2.0.11 asks NumPy 2 in NumPy 1's way
            region: NDArray[np.bool_] = coco.decode(encoded).astype(bool)
    # pycocotools is C behind Cython, and fails on damaged shapes in many ways.
    except Exception as error:
        raise DataError(
            f"{instances.path}, annotation {annotation['id']}, has a segmentation that cannot be read "
            f"({type(error).__name__}: {error}); expected polygons or run lengths."
        ) from error
    if region.shape != (image.height, image.width):
        raise DataError(
            f"{instances.path}, annotation {annotation['id']}, is {region.shape}, its image "
            f"{image.height, image.width} (height, width); download the file again."
        )
    return region


def _pycocotools_mask() -> Any:
    try:
        import pycocotools.mask  # here: an extra, needed for masks alone
    except ImportError as error:
        raise DataError("COCO's masks need pycocotools; run pip install 'bitrans-hf[coco]'.") from error
    return pycocotools.mask


# ---- Masks on demand: a cell names the instances, `open_mask` has them painted.


def _reference(path: Path, number: int, rule: CocoMaskRule, keep: Sequence[int] | None) -> str:
    query = {"image": str(number), **asdict(rule)}
    if keep is not None:
        query["keep"] = ",".join(map(str, keep))
    return f"{COCO_REFERENCE}{quote(str(path))}?{urlencode(query, safe=',')}"


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
    image = by_number.get(int(wanted["image"]))
    if image is None:
        raise DataError(f"{path} has no image {wanted['image']} any more; load the data set again.")
    label_map = _paint(instances, image, CocoMaskRule(wanted["overlap"], wanted["crowd"]))
    if "keep" in wanted:
        kept = [instances.classes[int(class_id)] for class_id in wanted["keep"].split(",")]
        table = label_lookup(instances.classes, kept)
        label_map = label_map if table is None else table[label_map]
    return label_map


@lru_cache(maxsize=2)  # train and val
def _instances_for_painting(path: Path, modified: int) -> tuple[_Instances, dict[int, _Image]]:
    instances = _read_instances(path)
    return instances, {image.number: image for image in instances.images}
