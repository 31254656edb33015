"""Label maps painted from COCO's instances by a stated rule, at once or when a mask is opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlencode

import numpy as np
from numpy.typing import NDArray

from ..hub.errors import InputError
from ..hub.labels import BACKGROUND, IGNORE_INDEX
from .coco_instances import Annotation, Canvas, CocoImage, Instances, Key, read_instances
from .common import DataError
from .outlines import OutlineError, read_outline

COCO_REFERENCE = "coco:"
"""Prefix of a mask cell that names COCO instances to paint instead of a file."""

OVERLAPS: Mapping[str, str] = {
    "later": "later objects over earlier ones, in the order of the file",
    "smaller": "smaller objects over larger ones",
    "ignore": f"pixels of objects of different classes are {IGNORE_INDEX}",
}
"""The choices for pixels that several objects cover, in words."""

CROWDS: Mapping[str, str] = {
    "background": "crowd regions are background",
    "ignore": f"crowd regions are {IGNORE_INDEX} where no object covers them",
    "object": "crowd regions have their class where no object covers them",
}
"""The choices for regions marked `iscrowd`, in words."""


@dataclass(frozen=True)
class CocoMaskRule:
    """How instances become a label map. There is no official rule, and scores depend on it. `str()` states it.

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


UNTURNED: Mapping[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    5: lambda upright: upright.T,
    6: lambda upright: np.rot90(upright),
    7: lambda upright: np.rot90(upright, 2).T,
    8: lambda upright: np.rot90(upright, -1),
}
"""EXIF orientation -> from the upright view to the stored pixels, where height and width are exchanged."""


def is_crowd(annotation: Annotation) -> bool:
    """Read `iscrowd`, which tools write as a number, text, true or null.

    Raises:
        OutlineError: it is something else.
    """
    text = str(annotation.is_crowd).strip().lower()
    if text in ("0", "0.0", "false", "none", "nan", ""):
        return False
    if text in ("1", "1.0", "true"):
        return True
    raise OutlineError(f"its iscrowd is {annotation.is_crowd!r}, expected 0 or 1")


def paint(
    instances: Instances, image: CocoImage, canvas: Canvas, rule: CocoMaskRule, keep: Sequence[int] | None = None
) -> NDArray[np.uint8]:
    """Paint the label map (H, W) of one image, aligned with the stored pixels.

    Args:
        instances: With outlines.
        image: Which.
        canvas: Of the image.
        rule: Who gets which pixels.
        keep: Class ids in the order of their new ids; others become background. None: all as they are.

    Raises:
        DataError: an outline is missing or cannot be read.
    """
    regions, labels, in_crowd = [], [], []
    for annotation in instances.annotations.get(image.number, ()):
        try:
            crowd = is_crowd(annotation)
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
        in_crowd.append(crowd)
    label_map = np.full((canvas.height, canvas.width), BACKGROUND, dtype=np.int16)
    for number in np.flatnonzero(in_crowd).tolist():
        label_map[regions[number]] = _IGNORED if rule.crowd == "ignore" else labels[number]
    objects = [number for number in range(len(regions)) if not in_crowd[number]]
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
    return painted if canvas.orientation is None else np.ascontiguousarray(UNTURNED[canvas.orientation](painted))


_IGNORED = -1
"""Label of ignored pixels until classes are chosen: with more than 254 classes, 255 is a class."""


# ---- Masks on demand: a cell names the instances, `open_mask` has them painted.


def references(path: Path, rule: CocoMaskRule, keep: Sequence[int] | None) -> Callable[[Key, Canvas], str]:
    """Return a function from an image's number to its mask cell."""
    start = f"{COCO_REFERENCE}{quote(str(path))}?image="
    chosen = {} if keep is None else {"keep": ",".join(map(str, keep))}
    end = f"&{urlencode({**asdict(rule), **chosen}, safe=',')}"

    def refer(number: Key, canvas: Canvas) -> str:
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
    canvas = Canvas(int(wanted["height"]), int(wanted["width"]), orientation)
    keep = [int(class_id) for class_id in wanted["keep"].split(",")] if "keep" in wanted else None
    return paint(instances, image, canvas, CocoMaskRule(wanted["overlap"], wanted["crowd"]), keep)


@lru_cache(maxsize=2)  # train and val
def _instances_for_painting(path: Path, modified: int) -> tuple[Instances, dict[str, CocoImage]]:
    instances = read_instances(path, "kept")
    return instances, {str(image.number): image for image in instances.images}
