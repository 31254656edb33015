"""PASCAL VOC 2012 in its devkit layout, merged with SBD: image labels and, if requested, masks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from datasets import Dataset
from PIL import Image as PILImage

from ..files import atomic_write, lies_in
from ..hub.errors import InputError
from ..hub.labels import BACKGROUND, IGNORE_INDEX, VOC_CLASSES
from .common import DataError, chosen_classes, folded_name, image_size, open_image, read_id_list, suggest, tidy_name
from .label_files import read_label_file
from .masks import index_png, masks_in_order, open_mask
from .rows import build_dataset
from .sbd import SBD_SPLITS, read_sbd_mask, sbd_folder, sbd_ids

logger = logging.getLogger(__name__)

VOC_COUNTS = {"train": 1464, "val": 1449, "test": 1456, "train_aug": 10582}
"""Images of each split of the whole data set."""

SBD_COUNTS = {"train": 8498, "val": 2857}
"""Images of SBD's own lists, some of which are in VOC's too."""

_MASK_RULE = "VOC's SegmentationClass (255 along object borders) where it has the image, else SegmentationClassAug"


def load_voc(
    root: str | Path,
    split: str,
    *,
    classes: Sequence[str] | None = None,
    label_file: str | Path | None = None,
    sbd: str | Path | None = None,
    masks: bool = True,
    drop_empty: bool = False,
) -> Dataset:
    """Load a split of PASCAL VOC from a devkit folder.

    Image labels come from `label_file` if given, else from `Annotations/*.xml`, else from the masks (the log says so,
    since this is more supervision than image labels). Of `test`, whose annotations are not public, both labels and
    masks are None. Images are not opened here.

    Args:
        root: The folder with `JPEGImages` and `ImageSets`, or one above it (`VOCdevkit`).
        split: Name of a list in `ImageSets/Segmentation`: train, val, test, ... `train_aug`, (VOC train + SBD train +
            SBD val) - VOC val, is in no archive: `prepare_voc` writes it, or `sbd` locates its parts.
        classes: A subset of the 20 VOC names in the order of their new ids; labels of other classes are dropped, and
            their pixels become background. Default: all in VOC's order.
        label_file: A `cls_labels.npy`, `.pkl` or `.npz` for all 20 classes, see `read_label_file`.
        sbd: SBD's folder `benchmark_RELEASE`, for `train_aug` without a list.
        masks: Return the masks that exist, those of `SegmentationClass` before `SegmentationClassAug`. False: the
            column is all None and no mask file is opened, so that training cannot see a pixel label.
        drop_empty: Leave out images without any of `classes`.

    Returns:
        A dataset in the order of the list: `image_id`, `image` (undecoded), `labels` (ascending class ids), `mask`.

    Raises:
        DataError: a file or folder is missing or damaged, or does not fit; the message names it.
    """
    root = _devkit_folder(Path(root))
    if split == "train_aug" and sbd is not None and not _list_path(root, split).is_file():
        image_ids = train_aug_ids(root, sbd)
    else:
        image_ids = _read_list(root, split)
    chosen = chosen_classes(classes, VOC_CLASSES, "the VOC classes")
    images = _image_paths(root, image_ids, split)
    mask_paths = _mask_paths(root, image_ids) if masks else [None] * len(image_ids)
    if masks and split == "train_aug" and None in mask_paths:
        missing = mask_paths.count(None)
        logger.warning("%d of %d images of %s have no mask; prepare_voc writes SBD's", missing, len(image_ids), split)
    voc_labels: Sequence[list[int] | None]
    if split == "test" and label_file is None:
        voc_labels = [None] * len(image_ids)
    else:
        voc_labels = _image_labels(root, image_ids, mask_paths, label_file, masks)

    new_ids = {VOC_CLASSES.index(name): class_id for class_id, name in enumerate(chosen)}
    labels = [
        None if voc_ids is None else [new_ids[voc_id] for voc_id in voc_ids if voc_id in new_ids]
        for voc_ids in voc_labels
    ]
    rows = [position for position in range(len(image_ids)) if labels[position] != [] or not drop_empty]
    if not rows:
        raise DataError(f"no image of {split} shows any of {', '.join(chosen)}; choose others or another split.")
    return build_dataset(
        [image_ids[position] for position in rows],
        [images[position] for position in rows],
        [labels[position] for position in rows],
        masks_in_order([mask_paths[position] for position in rows], VOC_CLASSES, chosen),
        chosen,
        mask_rule=_MASK_RULE if masks else None,
    )


def train_aug_ids(root: str | Path, sbd: str | Path) -> list[str]:
    """Return the ids of (VOC train + SBD train + SBD val) - VOC val, ascending: 10,582 of the whole data sets.

    Args:
        root: The devkit folder or one above it.
        sbd: SBD's folder `benchmark_RELEASE`.

    Raises:
        DataError: a list is missing or damaged.
    """
    root = _devkit_folder(Path(root))
    more = {image_id for split in SBD_SPLITS for image_id in sbd_ids(sbd, split)}
    return sorted((set(_read_list(root, "train")) | more) - set(_read_list(root, "val")))


# ---- The devkit made complete.


@dataclass
class VocReport:
    """What `prepare_voc` found and wrote; `str()` prints it.

    Attributes:
        root: The devkit folder.
        counts: Images of each split; "sbd_train" and "sbd_val" are SBD's own lists.
        expected: The counts of the whole data sets.
        pictures_per_class: Images of train_aug and val that show each class; empty without annotations.
        masks_written: Masks that were written into `SegmentationClassAug`.
        masks_there: Masks that existed already.
        notes: Differences from the whole data sets, one sentence each; empty unless `partial` was set.
    """

    root: Path
    counts: dict[str, int] = field(default_factory=dict)
    expected: dict[str, int] = field(default_factory=dict)
    pictures_per_class: dict[str, int] = field(default_factory=dict)
    masks_written: int = 0
    masks_there: int = 0
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"VOC 2012 in {self.root}" + (" (PARTIAL: scores on it are not VOC's)" if self.notes else "")]
        for name, count in self.counts.items():
            whole = self.expected[name]
            lines.append(f"  {name:<10} {count:>6,} images" + ("" if count == whole else f" of {whole:,}"))
        lines.append(f"  masks      {self.masks_written:>6,} written, {self.masks_there:,} there already")
        if self.pictures_per_class:
            shown = ", ".join(f"{name} {count:,}" for name, count in self.pictures_per_class.items())
            lines.append(f"  images of train_aug and val that show each class: {shown}")
        return "\n".join([*lines, *(f"  partial: {note}" for note in self.notes)])


def prepare_voc(
    root: str | Path,
    sbd: str | Path | None = None,
    *,
    partial: bool = False,
    progress: Callable[[Sequence[str], str], Iterable[str]] = lambda image_ids, _: image_ids,
) -> VocReport:
    """Complete a devkit with SBD, and check all of its counts and files.

    Writes `SegmentationClassAug/<id>.png` for the images of train_aug and val (VOC's own file where there is one, else
    SBD's mask) and, when all are there, `ImageSets/Segmentation/train_aug.txt`. Files appear by atomic rename;
    existing ones are kept, so an interrupted run can be resumed, and a complete folder is only checked.

    Args:
        root: The devkit folder or one above it.
        sbd: SBD's folder `benchmark_RELEASE`; not needed where `SegmentationClassAug` and `train_aug.txt` are ready.
        partial: Accept a part of the data: other counts, missing images of SBD, no annotations. The report notes each
            difference.
        progress: Wraps the image ids of a long loop, given the name of the task.

    Raises:
        DataError: a count is wrong (unless `partial`), or files are missing or damaged. Everything else is written
            first: fix the named files and rerun.
    """
    root = _devkit_folder(Path(root))
    report = VocReport(root)
    lists = {split: _read_list(root, split) for split in ("train", "val")}
    if _list_path(root, "test").is_file():  # an archive of its own, which not everybody has
        lists["test"] = _read_list(root, "test")
    for split, image_ids in lists.items():
        _image_paths(root, image_ids, split)
        report.counts[split], report.expected[split] = len(image_ids), VOC_COUNTS[split]
    lists["train_aug"] = _checked_train_aug(root, sbd, report, partial)
    wrong = [name for name, count in report.counts.items() if count != report.expected[name]]
    if wrong:
        shown = ", ".join(f"{name} has {report.counts[name]:,} of {report.expected[name]:,}" for name in wrong)
        _partial_only(f"{shown} images", report, partial)

    wanted = sorted({*lists["train_aug"], *lists["val"]})
    problems = []
    if (root / "Annotations").is_dir():
        report.pictures_per_class = dict.fromkeys(VOC_CLASSES, 0)
        for image_id in progress(wanted, "annotations"):
            try:
                for class_id in set(_labels_from_xml(root / "Annotations" / f"{image_id}.xml")):
                    report.pictures_per_class[VOC_CLASSES[class_id]] += 1
            except DataError as error:
                problems.append(str(error))
    else:
        _partial_only(f"{root} has no folder Annotations, so loading needs a label_file", report, partial)
    for image_id in progress(wanted, "masks"):
        try:
            _check_or_write_mask(root, image_id, sbd, report)
        except DataError as error:
            problems.append(str(error))
    if problems:
        more = f" ({len(problems)} such problems in {len(wanted)} images)" if len(problems) > 1 else ""
        raise DataError(f"{problems[0]}{more}")
    if not _list_path(root, "train_aug").is_file():
        with atomic_write(_list_path(root, "train_aug")) as temporary:
            temporary.write_text("".join(f"{image_id}\n" for image_id in lists["train_aug"]), encoding="utf-8")
    return report


def _checked_train_aug(root: Path, sbd: str | Path | None, report: VocReport, partial: bool) -> list[str]:
    """Return the ids of train_aug whose images are there, and note the counts of SBD's lists."""
    path = _list_path(root, "train_aug")
    if sbd is None:
        if not path.is_file():
            raise DataError(
                f"list {path} is not there and no SBD folder was given; give SBD's folder benchmark_RELEASE, which "
                "names the images of train_aug."
            )
        image_ids = read_id_list(path)
    else:
        for split, whole in SBD_COUNTS.items():
            report.counts[f"sbd_{split}"], report.expected[f"sbd_{split}"] = len(sbd_ids(sbd, split)), whole
        image_ids = train_aug_ids(root, sbd)
        present = {file.stem for file in (root / "JPEGImages").iterdir()}
        without = [image_id for image_id in image_ids if image_id not in present]
        if without:
            what = f"{len(without):,} images that SBD names are not in {root / 'JPEGImages'}, the first {without[0]}"
            _partial_only(f"{what}; train_aug goes without them", report, partial)
            image_ids = [image_id for image_id in image_ids if image_id in present]
        if path.is_file() and sorted(read_id_list(path)) != image_ids:
            listed = set(read_id_list(path))
            raise DataError(
                f"list {path} is not (VOC train + SBD train + SBD val) - VOC val: it has {len(listed - {*image_ids})} "
                f"other images and lacks {len({*image_ids} - listed)}; delete it to have it rewritten."
            )
    _image_paths(root, image_ids, "train_aug")
    report.counts["train_aug"], report.expected["train_aug"] = len(image_ids), VOC_COUNTS["train_aug"]
    return image_ids


def _partial_only(what: str, report: VocReport, partial: bool) -> None:
    if not partial:
        raise DataError(
            f"{what}; unpack the whole archives, or allow a part of the data with partial=True (--partial)."
        )
    report.notes.append(f"{what}.")


def _check_or_write_mask(root: Path, image_id: str, sbd: str | Path | None, report: VocReport) -> None:
    """Write one mask into `SegmentationClassAug` if it does not exist; check its size and ids."""
    target = root / "SegmentationClassAug" / f"{image_id}.png"
    own = root / "SegmentationClass" / f"{image_id}.png"
    size = image_size(root / "JPEGImages" / f"{image_id}.jpg")
    if target.is_file():
        report.masks_there += 1
        open_mask(target, image_size=size, num_classes=len(VOC_CLASSES))
        return
    if own.is_file():
        open_mask(own, image_size=size, num_classes=len(VOC_CLASSES))
        content = own.read_bytes()
    elif sbd is not None:
        source = sbd_folder(sbd) / "cls" / f"{image_id}.mat"
        mask = read_sbd_mask(source)
        if mask.shape != size:
            raise DataError(f"SBD mask {source} is {mask.shape}, its image {size} (height, width); unpack both again.")
        content = index_png(mask)
    else:
        raise DataError(f"image {image_id} has no mask in {target.parent} or {own.parent}; give SBD's folder too.")
    with atomic_write(target) as temporary:
        temporary.write_bytes(content)
    report.masks_written += 1


# ---- The devkit made smaller.


@dataclass
class ReducedVoc:
    """What `write_reduced_voc` wrote; `str()` says it.

    Attributes:
        root: The folder of the copy.
        max_side: Longest side of its images in pixels.
        written: Images and masks that were written.
        there: Images and masks that existed already.
    """

    root: Path
    max_side: int
    written: int = 0
    there: int = 0

    def __str__(self) -> str:
        return (
            f"{self.root}: images and masks of at most {self.max_side} pixels a side, {self.written:,} written, "
            f"{self.there:,} there already"
        )


def write_reduced_voc(
    root: str | Path,
    target: str | Path,
    max_side: int = 256,
    *,
    progress: Callable[[Sequence[str], str], Iterable[str]] = lambda image_ids, _: image_ids,
) -> ReducedVoc:
    """Write a copy of a devkit with smaller images and masks, for CPUs and slow uploads.

    Images (bicubic, JPEG of quality 95) and masks (nearest pixel, PNG with its palette) become round(w * s) x
    round(h * s) pixels, s = max_side / max(w, h); smaller ones are copied. `ImageSets` and `Annotations` are copied
    too; their boxes keep the original scale. Scores on the copy are not those on VOC. Files appear by atomic rename
    and existing ones are kept, so an interrupted run can be resumed.

    Args:
        root: The devkit folder or one above it.
        target: Folder of the copy.
        max_side: Longest side in pixels.
        progress: Wraps the image ids, given the name of the task.

    Raises:
        DataError: images or masks are damaged, or a file of another size exists; everything else is written first.
        ValueError: `max_side` is below 1, or the copy would lie over the original.
    """
    root, copy = _devkit_folder(Path(root)), ReducedVoc(Path(target), max_side)
    if max_side < 1:
        raise InputError(f"max_side must be at least 1 pixel, got {max_side}.")
    if lies_in(copy.root, root) or lies_in(root, copy.root):
        raise InputError(f"the copy would lie over the original, {root}; name another folder.")
    for folder in ("ImageSets", "Annotations"):
        for path in sorted((root / folder).rglob("*")):
            if path.is_file():
                _copy_file(path, copy.root / path.relative_to(root))
    images = sorted(path for path in (root / "JPEGImages").iterdir() if path.suffix == ".jpg")
    problems = []
    for image_id in progress([path.stem for path in images], "smaller images"):
        try:
            _reduce_image(root, image_id, copy)
        except DataError as error:
            problems.append(str(error))
    if problems:
        more = f" ({len(problems)} such problems in {len(images)} images)" if len(problems) > 1 else ""
        raise DataError(f"{problems[0]}{more}")
    return copy


def _reduce_image(root: Path, image_id: str, copy: ReducedVoc) -> None:
    """Write one image and its masks."""
    source = root / "JPEGImages" / f"{image_id}.jpg"
    height, width = image_size(source)
    scale = min(1.0, copy.max_side / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    masks = [root / folder / f"{image_id}.png" for folder in ("SegmentationClass", "SegmentationClassAug")]
    for path in (source, *(mask for mask in masks if mask.is_file())):
        made = copy.root / path.relative_to(root)
        if made.is_file():
            found = image_size(made)[::-1]
            if found != size:
                raise DataError(
                    f"{made} has {found[0]} x {found[1]} pixels, expected {size[0]} x {size[1]} for a longest side of "
                    f"{copy.max_side}; it was made with another one: delete {copy.root} or name another folder."
                )
            copy.there += 1
            continue
        if path == source:
            image = open_image(path)
        else:
            open_mask(path, image_size=(height, width), num_classes=len(VOC_CLASSES))
            with PILImage.open(path) as mask:
                image = mask.copy()  # with the palette that it was drawn with
        if scale == 1:
            _copy_file(path, made)
        else:
            with atomic_write(made) as temporary:
                if path == source:
                    image.resize(size, PILImage.Resampling.BICUBIC).save(temporary, format="JPEG", quality=95)
                else:
                    image.resize(size, PILImage.Resampling.NEAREST).save(temporary, format="PNG")
        copy.written += 1


# ---- Files.


def _copy_file(path: Path, target: Path) -> None:
    if not target.is_file():
        with atomic_write(target) as temporary:
            temporary.write_bytes(path.read_bytes())


def _devkit_folder(root: Path) -> Path:
    for folder in (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"):
        if (folder / "JPEGImages").is_dir():
            return folder
    what = "has no folder JPEGImages" if root.is_dir() else "is not a folder"
    raise DataError(f"{root} {what}; give the devkit folder that holds JPEGImages and ImageSets.")


def _list_path(root: Path, split: str) -> Path:
    return root / "ImageSets" / "Segmentation" / f"{split}.txt"


def _read_list(root: Path, split: str) -> list[str]:
    path = _list_path(root, split)
    if not path.is_file():
        found = ", ".join(sorted(file.stem for file in path.parent.glob("*.txt"))) or "none"
        hint = "; prepare_voc writes train_aug from SBD, or pass sbd=" if split == "train_aug" else ""
        raise DataError(f"list {path} is not there; the splits in that folder are: {found}{hint}.")
    return read_id_list(path)


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
    """Return the mask of each image: VOC's own, which marks object borders as 255, before the merged SBD one."""
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
            "pass label_file= (data.label_file in a recipe), a cls_labels.npy."
        )
    without = [image_id for image_id, path in zip(image_ids, mask_paths, strict=True) if path is None]
    if without:
        raise DataError(
            f"image {without[0]} has neither an annotation nor a mask ({len(without)} of {len(image_ids)} images); "
            "add the folder Annotations or pass label_file= (data.label_file in a recipe)."
        )
    logger.warning(
        "image labels of %d images are taken from their masks, since %s has no folder Annotations; pass label_file= "
        "(data.label_file in a recipe) to train on image labels alone",
        len(image_ids),
        root,
    )
    return [_labels_from_mask(path) for path in mask_paths if path is not None]


def _labels_from_xml(path: Path) -> list[int]:
    """Return the classes of all objects in an annotation, including difficult ones, as `cls_labels.npy` does."""
    try:
        tree = ElementTree.parse(path)
    except FileNotFoundError as error:
        raise DataError(f"annotation {path} is not there; unpack the whole Annotations folder.") from error
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise DataError(f"annotation {path} is no valid XML ({error}); unpack it again.") from error
    known = {folded_name(name): class_id for class_id, name in enumerate(VOC_CLASSES)}
    class_ids = []
    for thing in tree.findall("{*}object"):  # in any name space; the parts of objects have names of their own
        name = tidy_name(thing.findtext("{*}name") or "")
        if not name:
            raise DataError(f"annotation {path} has an object without a name, expected one of VOC's classes.")
        if folded_name(name) not in known:
            raise DataError(f"annotation {path} names the class {name!r}: {suggest(name, VOC_CLASSES)}")
        class_ids.append(known[folded_name(name)])
    return class_ids


def _labels_from_mask(path: Path) -> list[int]:
    present = np.unique(open_mask(path, num_classes=len(VOC_CLASSES)))
    return [int(label) - 1 for label in present if label not in (BACKGROUND, IGNORE_INDEX)]
