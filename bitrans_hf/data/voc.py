"""PASCAL VOC 2012 in the layout of its devkit, with image labels and, where allowed, masks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from datasets import Dataset

from ..labels import BACKGROUND, IGNORE_INDEX, VOC_CLASSES
from .common import DataError, build_dataset, chosen_classes, masks_in_order, open_mask, read_text, suggest
from .label_files import read_label_file

logger = logging.getLogger(__name__)


def load_voc(
    root: str | Path,
    split: str,
    *,
    classes: Sequence[str] | None = None,
    label_file: str | Path | None = None,
    masks: bool = True,
    drop_empty: bool = False,
) -> Dataset:
    """Load a split of PASCAL VOC from a devkit folder.

    Image labels come from `label_file` if given, else from `Annotations/*.xml`, else from the masks (said aloud in the
    log, since this is more supervision than image labels). Pictures are not opened here.

    Args:
        root: The folder with `JPEGImages` and `ImageSets`, or one above it (`VOCdevkit`).
        split: Name of a list in `ImageSets/Segmentation`: train, val, train_aug, ...
        classes: Part of the 20 VOC names, in the order that their ids shall have; labels of other classes are dropped
            and become background in the masks. Default: all in VOC's order.
        label_file: A `cls_labels.npy` or `.npz` for all 20 classes, see `read_label_file`.
        masks: Give masks where a file is known, `SegmentationClass` before `SegmentationClassAug`. False: the column
            is None throughout and no mask file is touched, so that training cannot see a pixel label.
        drop_empty: Leave out images that show none of `classes`.

    Returns:
        A dataset in the order of the list: `image_id`, `image` (undecoded), `labels` (ascending class ids), `mask`.

    Raises:
        DataError: a file or folder is missing or damaged, or does not fit; the message names it.
    """
    root = _devkit_folder(Path(root))
    image_ids = _read_list(root, split)
    chosen = chosen_classes(classes, VOC_CLASSES, "the VOC classes")
    images = _image_paths(root, image_ids, split)
    mask_paths = _mask_paths(root, image_ids) if masks else [None] * len(image_ids)
    voc_labels = _image_labels(root, image_ids, mask_paths, label_file, masks)

    new_ids = {VOC_CLASSES.index(name): class_id for class_id, name in enumerate(chosen)}
    labels = [[new_ids[voc_id] for voc_id in voc_ids if voc_id in new_ids] for voc_ids in voc_labels]
    rows = [position for position in range(len(image_ids)) if labels[position] or not drop_empty]
    if not rows:
        raise DataError(f"no image of {split} shows any of {', '.join(chosen)}; choose others or another split.")
    return build_dataset(
        [image_ids[position] for position in rows],
        [images[position] for position in rows],
        [labels[position] for position in rows],
        masks_in_order([mask_paths[position] for position in rows], VOC_CLASSES, chosen),
        chosen,
    )


# ---- Files.


def _devkit_folder(root: Path) -> Path:
    for folder in (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"):
        if (folder / "JPEGImages").is_dir():
            return folder
    what = "has no folder JPEGImages" if root.is_dir() else "is not a folder"
    raise DataError(f"{root} {what}; give the devkit folder that holds JPEGImages and ImageSets.")


def _read_list(root: Path, split: str) -> list[str]:
    folder = root / "ImageSets" / "Segmentation"
    path = folder / f"{split}.txt"
    if not path.is_file():
        found = ", ".join(sorted(file.stem for file in folder.glob("*.txt"))) or "none"
        raise DataError(f"list {path} is not there; the splits in that folder are: {found}.")
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


def _image_paths(root: Path, image_ids: Sequence[str], split: str) -> list[Path]:
    folder = root / "JPEGImages"
    present = {file.name for file in folder.iterdir()}
    missing = [image_id for image_id in image_ids if f"{image_id}.jpg" not in present]
    if missing:
        raise DataError(
            f"list {split} names {missing[0]}, but {folder / missing[0]}.jpg is not there ({len(missing)} of "
            f"{len(image_ids)} images are missing); unpack the whole archive or shorten the list."
        )
    return [folder / f"{image_id}.jpg" for image_id in image_ids]


def _mask_paths(root: Path, image_ids: Sequence[str]) -> list[Path | None]:
    """Return the mask of each image; VOC's own one, which marks object borders as 255, before the merged SBD one."""
    paths: dict[str, Path] = {}
    for name in ("SegmentationClassAug", "SegmentationClass"):
        folder = root / name
        if folder.is_dir():
            paths.update({file.stem: file for file in folder.iterdir() if file.suffix == ".png"})
    return [paths.get(image_id) for image_id in image_ids]


# ---- Image labels, as ids of the 20 VOC classes.


def _image_labels(
    root: Path,
    image_ids: Sequence[str],
    mask_paths: Sequence[Path | None],
    label_file: str | Path | None,
    masks: bool,
) -> list[list[int]]:
    if label_file is not None:
        known = read_label_file(label_file, len(VOC_CLASSES))
        unlabelled = [image_id for image_id in image_ids if image_id not in known]
        if unlabelled:
            raise DataError(
                f"{label_file} has no labels for {unlabelled[0]} ({len(unlabelled)} of {len(image_ids)} images); "
                "use the label file of this data set."
            )
        return [known[image_id] for image_id in image_ids]
    annotations = root / "Annotations"
    if annotations.is_dir():
        return [_labels_from_xml(annotations / f"{image_id}.xml") for image_id in image_ids]
    if not masks:
        raise DataError(
            f"{root} has no folder Annotations and masks=False forbids to derive image labels from masks; "
            "pass label_file= (a cls_labels.npy)."
        )
    without = [image_id for image_id, path in zip(image_ids, mask_paths, strict=True) if path is None]
    if without:
        raise DataError(
            f"image {without[0]} has neither an annotation nor a mask ({len(without)} of {len(image_ids)} images); "
            "add the folder Annotations or pass label_file=."
        )
    logger.warning(
        "image labels of %d images are taken from their masks, since %s has no folder Annotations; pass label_file= "
        "to train on image labels alone",
        len(image_ids),
        root,
    )
    return [_labels_from_mask(path) for path in mask_paths if path is not None]


def _labels_from_xml(path: Path) -> list[int]:
    """Return the classes of all objects in an annotation, those marked difficult too, as `cls_labels.npy` counts."""
    try:
        tree = ElementTree.parse(path)
    except FileNotFoundError as error:
        raise DataError(f"annotation {path} is not there; unpack the whole Annotations folder.") from error
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise DataError(f"annotation {path} is no valid XML ({error}); unpack it again.") from error
    class_ids = []
    for thing in tree.findall("object"):
        name = (thing.findtext("name") or "").strip()
        if name not in VOC_CLASSES:
            raise DataError(f"annotation {path} names the class {name!r}: {suggest(name, VOC_CLASSES)}")
        class_ids.append(VOC_CLASSES.index(name))
    return class_ids


def _labels_from_mask(path: Path) -> list[int]:
    present = np.unique(open_mask(path, num_classes=len(VOC_CLASSES)))
    return [int(label) - 1 for label in present if label not in (BACKGROUND, IGNORE_INDEX)]
