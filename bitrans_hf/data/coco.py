"""COCO 2014 and 2017: image labels from `instances_*.json`, and masks painted from its instances by a stated rule.

Files written by label tools are read too, although they take liberties with the format. Boxes are enough for labels.
An image whose mask is unknown has the mask None: it is used for training and left out of scores.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from datasets import Dataset
from PIL import Image as PILImage

from ..files import atomic_write
from ..hub.labels import IGNORE_INDEX
from .coco_instances import LOOKED_AT, Canvas, CocoImage, Instances, Key, read_instances
from .coco_painting import UNTURNED, CocoMaskRule, is_crowd, paint, references
from .common import (
    DataError,
    UnreadableImageError,
    chosen_classes,
    folded_name,
    image_size,
    inner_path,
    missing_files,
)
from .masks import index_png, masks_in_order
from .outlines import OutlineError, polygon_painter, read_outline
from .rows import build_dataset

logger = logging.getLogger(__name__)


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

    An image shows a class if any of its instances belongs to it, crowd regions included: 82,081 of the 82,783 images
    of train2014 and 40,137 of the 40,504 of val2014 have a label. Class ids are 0 to 79 in the order of the category
    ids, without their gaps. Categories without annotations are kept, so that all splits have the same classes;
    background and the root category that Roboflow puts above all others are not classes. Images are not decoded here.

    Args:
        root: The folder with `annotations/instances_<split>.json` and the images in `<split>`, `images/<split>` or
            `images`; or with `<split>/_annotations.coco.json` beside the images.
        split: train2014, val2014, train2017 or val2017; the year may be left out if the folder has only one.
        classes: A subset of the category names in the order of their new ids; labels of other classes are dropped, and
            their pixels become background. Default: all.
        masks: True: masks are painted when `open_mask` gets the `mask` of a row, which names the instances; each
            process reads the whole JSON file at its first mask. A folder: PNGs that `write_coco_masks` wrote, which is
            faster for a whole split. False: the column is all None.
        overlap: See `CocoMaskRule`; default "later", or the folder's rule.
        crowd: See `CocoMaskRule`; default "background", or the folder's rule.
        drop_empty: Leave out images without any of `classes`.

    Returns:
        A dataset in the order of the file: `image_id` (`COCO_train2014_000000000009`, in 2017 `000000000009`), `image`
        (undecoded), `labels` (ascending class ids), `mask`. `mask_rule` gives back the rule of the masks. A mask is
        None if an object has no readable outline or if the size in the JSON differs from the image's; the log says how
        many and why.

    Raises:
        DataError: a file is missing or damaged, or does not fit; the message names it.
        MissingExtraError: masks are wanted and pycocotools is not installed.
        ValueError: an unknown value of `overlap` or `crowd`.
    """
    rule = CocoMaskRule(overlap or "later", crowd or "background")
    split, path = _annotation_file(Path(root), split)
    instances = read_instances(path, "checked" if masks is True else "unread")
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
        refer = references(path, rule, keep)
        cells = [
            refer(image.number, canvas) if isinstance(canvas, Canvas) and image.number not in reasons else None
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

    Files appear by atomic rename and existing ones are kept, so a run that was killed can be resumed. `rule.json`
    records how they were painted and which images have no mask because it is unknown; use one folder per rule.

    Args:
        root: As for `load_coco`; if the images are absent, the JSON must give their sizes.
        split: As for `load_coco`.
        folder: Made if need be.
        overlap: Part of the `CocoMaskRule`.
        crowd: Part of the `CocoMaskRule`.
        progress: Wraps the list of images, for example in a progress bar.

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
    instances = read_instances(path, "kept")
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
        if isinstance(canvas, Canvas) and image.number not in reasons
    ]
    for image, canvas in progress(todo):
        target = folder / f"{image.image_id}.png"
        if not target.is_file():
            with atomic_write(target) as temporary:
                temporary.write_bytes(index_png(paint(instances, image, canvas, rule)))
    return rule


@cache
def _say_once(note: str) -> None:
    """Log a note; a run loads the same file in several stages."""
    logger.warning("%s", note)


# ---- Files.

_RULE_FILE = "rule.json"

_ROBOFLOW = "_annotations.coco.json"


def _annotation_file(root: Path, split: str) -> tuple[str, Path]:
    """Return `split` with its year, and its JSON file; refuse a name that is not a split of the folder."""
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


def _with_files(instances: Instances, folder: Path | None) -> list[CocoImage]:
    """Return the images with the names of their files as they are in `folder`.

    Tools write names with folders of another machine, backslashes, percent-encoding or other letter case; such a name
    means the one file in the folder that matches its end.

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
    """Return whether a name, as written, is a path inside a folder."""
    if "/" not in file_name and "\\" not in file_name and ":" not in file_name:
        return file_name not in ("", ".", "..")
    parts = file_name.split("/")
    return "\\" not in file_name and ":" not in file_name and not any(part in ("", ".", "..") for part in parts)


class _FileIndex:
    """The files in a folder, indexed by a form that all spellings of one name share."""

    def __init__(self, folder: Path) -> None:
        self.by_path: dict[str, list[str]] = defaultdict(list)
        self.by_name: dict[str, list[str]] = defaultdict(list)
        for place, _, names in os.walk(folder):
            for name in names:
                path = (Path(place) / name).relative_to(folder).as_posix()
                self.by_path[folded_name(path)].append(path)
                self.by_name[folded_name(name)].append(path)

    def find(self, file_name: str) -> str | None:
        """Return the path in the folder that a name means; None if no file or several match."""
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


def _check_unique(path: Path, images: Sequence[CocoImage]) -> None:
    """Refuse two images whose masks would have the same name."""
    seen: dict[str, CocoImage] = {}
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
    """Return the rule of a folder of masks and each image's mask, after checking both against the request."""
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


# ---- Masks that are not known.


class _Reason(NamedTuple):
    """Why the mask of an image is unknown: a kind to count by, and the details for the first image of that kind."""

    kind: str
    story: str


_MOST_LOOKED_AT = 1000
"""Images whose files are compared with the JSON; if one differs, all are."""


def _canvases(images: Sequence[CocoImage], folder: Path | None) -> list[Canvas | _Reason]:
    """Return the canvas for each image's instances, or why it is unknown.

    The size is the JSON's, or the file's if the JSON has none. In a large data set only some files are compared.
    """
    told: list[Canvas | None] = [
        None if image.height is None or image.width is None else Canvas(image.height, image.width) for image in images
    ]
    step = -(-len(images) // _MOST_LOOKED_AT)
    sample = range(0, len(images), step if folder is not None else len(images))
    found = {place: _compared(images[place], told[place], folder) for place in sample}
    differs = any(told[place] is not None and canvas != told[place] for place, canvas in found.items())
    return [
        found[place] if place in found else _compared(image, canvas, folder) if canvas is None or differs else canvas
        for place, (image, canvas) in enumerate(zip(images, told, strict=True))
    ]


def _compared(image: CocoImage, told: Canvas | None, folder: Path | None) -> Canvas | _Reason:
    """Return the canvas after comparing the size in the JSON with the file's."""
    where = f"image {image.number} ({image.file_name})"
    if folder is None:
        no_size = _Reason("whose size is in no file", f"{where} has no height and width above 0 in the JSON")
        return told or no_size
    path = folder / image.file_name
    try:
        stored = Canvas(*image_size(path))
    except UnreadableImageError as error:  # the stages name it
        return told or _Reason("whose size is in no file", f"{where} has none in the JSON, and {error}")
    if told is None or told == stored:
        return stored
    with PILImage.open(path) as opened:
        orientation = opened.getexif().get(_EXIF_ORIENTATION)
    if orientation in UNTURNED and (told.height, told.width) == (stored.width, stored.height):
        return told._replace(orientation=orientation)  # drawn on the upright view
    return _Reason(
        "whose size in the JSON is not that of the file",
        f"{where} is {told.height} x {told.width} (height x width) in the JSON and {stored.height} x {stored.width} "
        "in the file",
    )


_EXIF_ORIENTATION = 0x0112


def _unknown_masks(
    instances: Instances, images: Sequence[CocoImage], canvases: Sequence[Canvas | _Reason], rule: CocoMaskRule
) -> dict[Key, _Reason]:
    """Return why each mask is unknown, by image number: its size, or its first instance without an outline."""
    reasons: dict[Key, _Reason] = {}
    for image, canvas in zip(images, canvases, strict=True):
        if isinstance(canvas, _Reason):
            reasons[image.number] = canvas
        for annotation in instances.annotations.get(image.number, ()):
            where = f"image {image.number} ({image.file_name}), {annotation.name},"
            try:
                crowd = is_crowd(annotation)
                if annotation.class_id is None or (crowd and rule.crowd == "background"):
                    continue
                if annotation.segmentation == LOOKED_AT:
                    continue
                outline = read_outline(annotation.segmentation)
                if outline is None:
                    kind = "with objects that have no outline (boxes suffice for labels)"
                    reasons[image.number] = _Reason(kind, f"{where} it has no segmentation")
                    break
                if isinstance(canvas, Canvas):
                    outline.check_size(canvas.height, canvas.width)
            except OutlineError as error:
                kind = "with outlines that cannot be read"
                reasons[image.number] = _Reason(kind, f"{where} {error}")
                break
    return reasons


def _say_unknown(path: Path, reasons: Mapping[Key, _Reason], total: int) -> None:
    """Log how many masks are unknown, why, and the first image of each kind."""
    if not reasons:
        return
    kinds: dict[str, list[str]] = defaultdict(list)
    for reason in reasons.values():
        kinds[reason.kind].append(reason.story)
    told = "; ".join(f"{len(stories)} {kind}, the first: {stories[0]}" for kind, stories in kinds.items())
    _say_once(f"{path}: the masks of {len(reasons)} of {total} images are not known, so these are not scored: {told}")
