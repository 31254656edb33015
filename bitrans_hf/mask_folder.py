"""Masks for a folder of images: what `bitrans masks` does."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import transformers
from huggingface_hub.utils import disable_progress_bars
from torch.utils.data import Dataset

from .commands import children_without_signals, if_stopped
from .data import load_folder
from .data.common import is_background, without_suffix
from .data.folder import TABLE_NAMES
from .data.image_files import list_images
from .file_names import label_path
from .files import OUTPUT_MARK, atomic_write, mark_output, refuse_overwriting, refuse_same_folder
from .hub.errors import InputError
from .hub.pipeline_bitrans import LocalizedImage, PipelineItem, PseudoMaskPipeline
from .progress import progress, say_progress, say_result, working
from .refine.pseudo_labels import read_confidence, write_label_png


def run_masks(options: argparse.Namespace) -> None:
    """Write the masks of a folder; the options are those of `bitrans masks`."""
    if options.quiet or not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
        disable_progress_bars()
    if not options.images.is_dir():
        raise InputError(f"{options.images} is not a folder; give the folder that holds the images.")
    if (options.images / OUTPUT_MARK).is_file():
        raise InputError(f"{options.images} holds masks that bitrans wrote; give the folder that holds the images.")
    refuse_same_folder(options.out, options.images, "--out")
    with working(f"masks: loading the model {options.model}", quiet=options.quiet):
        pipe = LabelMapPipeline.from_pretrained(options.model, options.device)
    if options.threshold is None:
        options.threshold = pipe.model.config.threshold  # its number goes into the record
    if background := [name for name in pipe.class_names if is_background(name)]:
        raise InputError(
            f"model {options.model} has a class {background[0]!r}, expected object classes alone: background has the "
            "label id 0 in every mask. Train a model on labels without that name."
        )
    with working(f"masks: reading the list of images in {options.images}", quiet=options.quiet):
        pictures = pictures_with_labels(options.images, options.labels, pipe.class_names, options.separator)
    prepare_output(options, pictures, pipe.class_names)
    todo = [picture for picture in pictures if options.overwrite or not mask_path(options.out, picture).is_file()]
    refused = write_masks(options, pipe, todo, len(pictures))
    record_confidence(options.out / "masks.json", {each.image_id: mask_path(options.out, each) for each in pictures})
    for reason in refused:
        say_progress(f"left out: {reason}")
    say_result(
        f"masks: {len(pictures):,} images, {len(todo) - len(refused):,} written, {len(pictures) - len(todo):,} "
        f"there before, {len(refused):,} left out -> {options.out}"
    )


def pipeline_options(options: argparse.Namespace) -> Mapping[str, Any]:
    """Return the pipeline's options from the command line."""
    return {
        "threshold": options.threshold,
        "label_threshold": options.label_threshold,
        "scales": options.scales,
        "flip": not options.no_flip,
        "refine": not options.no_refine,
        "refiner": options.refiner,
        "max_side": options.max_side,
        "upright": not options.stored_pixels,
    }


def prepare_output(options: argparse.Namespace, pictures: Sequence[PictureFile], class_names: Sequence[str]) -> None:
    """Create the folder of the masks, and record how they are made.

    Raises:
        InputError: it holds other files under the names of masks, or masks made with other settings.
    """
    masks = [mask_path(options.out, picture) for picture in pictures]
    refuse_overwriting(masks, (Path(picture.path) for picture in pictures), "--out")
    there = [] if (options.out / "masks.json").is_file() else [path for path in masks if path.is_file()]
    if there:
        raise InputError(f"{there[0]} is there and is no mask that bitrans wrote; give another --out.")
    mark_output(options.out)
    record = {
        "model": options.model,
        "labels": str(options.labels or "predicted"),
        **pipeline_options(options),
        "label_ids": {"background": 0, **{name: label_id for label_id, name in enumerate(class_names, start=1)}},
    }
    write_record(options.out / "masks.json", record, overwrite=options.overwrite)


def write_masks(
    options: argparse.Namespace, pipe: LabelMapPipeline, todo: Sequence[PictureFile], total: int
) -> list[str]:
    """Write the masks of images; return why some of them were refused."""
    if not options.quiet:
        views = len(options.scales) * (1 if options.no_flip else 2)
        say_progress(
            f"masks: {len(todo):,} of {total:,} images to do, {views} view(s) of each; batch size "
            f"{options.batch_size}, device {pipe.device}"
        )
    answers = pipe(
        PictureList(todo),
        batch_size=options.batch_size,
        num_workers=options.workers,
        **pipeline_options(options),
    )
    bar = progress(todo, desc="masks", unit="image", quiet=options.quiet)
    with children_without_signals():
        answered = zip(bar, answers, strict=True)  # starts the workers that load images
    if_stopped(lambda: f"before all {len(todo):,} masks were made; masks that are written are kept")
    refused: list[str] = []
    for picture, answer in answered:
        if not isinstance(answer, RefusedImage):
            label_map, confidence = answer
            write_label_png(mask_path(options.out, picture), label_map, picture.image_id, confidence)
        elif options.strict:
            raise InputError(answer.reason)
        else:
            refused.append(answer.reason)
    return refused


@dataclass(frozen=True)
class PictureFile:
    """An image of the folder: its name without suffix, its path, and the names of its classes if known."""

    image_id: str
    path: str
    labels: tuple[str, ...] | None


class PictureList(Dataset[PipelineItem]):
    """Images as the pipeline reads them."""

    def __init__(self, pictures: Sequence[PictureFile]):
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> PipelineItem:
        return {"image": self.pictures[index].path, "candidate_labels": self.pictures[index].labels}


@dataclass(frozen=True)
class RefusedImage:
    """An unusable image, and why, in one sentence that names it."""

    reason: str


class LabelMapPipeline(PseudoMaskPipeline):
    """The pipeline with one label map (H, W) uint8 and its confidence by class name for each image.

    It answers with a `RefusedImage` instead of an error.
    """

    @property
    def class_names(self) -> list[str]:
        """Names of the object classes in the order of their ids."""
        names = cast("Mapping[int, str]", self.model.config.id2label)
        return [names[index] for index in range(len(names))]

    def preprocess(self, item: Any, **options: Any) -> dict[str, list[Any]]:  # type: ignore[override]
        """Open an image, or return why it cannot be opened."""
        try:
            return cast("dict[str, list[Any]]", super().preprocess(item, **options))
        except InputError as error:
            return {"images": [RefusedImage(str(error))]}

    def _forward(self, inputs: Mapping[str, Any], **options: Any) -> dict[str, list[Any]]:  # type: ignore[override]
        entries = [entry[0] if isinstance(entry, list) else entry for entry in inputs["images"]]
        usable = [entry for entry in entries if not isinstance(entry, RefusedImage)]
        localized: Iterator[LocalizedImage] = iter(super()._forward({"images": usable}, **options)["images"])
        return {"images": [entry if isinstance(entry, RefusedImage) else next(localized) for entry in entries]}

    def postprocess(  # type: ignore[override]
        self, outputs: Mapping[str, Any], **options: Any
    ) -> tuple[np.ndarray, dict[str, float]] | RefusedImage:
        """Merge an image's masks, which do not overlap, into one label map."""
        entry = outputs["images"]
        image: LocalizedImage | RefusedImage = entry[0] if isinstance(entry, list) else entry
        if isinstance(image, RefusedImage):
            return image
        label_map, confidence = np.zeros(image.image.size, dtype=np.uint8), {}
        for answer in super().postprocess({"images": [image]}, **options):
            label_map[np.asarray(answer["mask"]) > 0] = self.class_names.index(answer["label"]) + 1
            confidence[answer["label"]] = round(answer["confidence"], 3)
        return label_map, confidence


def pictures_with_labels(
    folder: Path, table: Path | None, class_names: Sequence[str], separator: str | None = None
) -> list[PictureFile]:
    """List the images of a folder: the rows of a table with their labels, otherwise all images, without labels.

    Raises:
        ValueError: there are none, a table does not fit (the message names row and file), or two images would get
            the same mask.
    """
    if table is not None:
        table = table.absolute() if table.is_file() else table
        objects = [name for name in class_names if not is_background(name)]
        rows = load_folder(
            folder, table, masks=False, classes=objects, separator=separator, allow_empty=True, caller="masks"
        )
        pictures = [
            PictureFile(row["image_id"], row["image"]["path"], tuple(objects[index] for index in row["labels"]))
            for row in rows
        ]
    else:
        unused = [name for name in TABLE_NAMES if (folder / name).is_file()]
        if unused:
            say_progress(f"note: {folder / unused[0]} is not used; --labels {unused[0]} uses its labels.")
        listing = list_images(folder)
        for note in listing.left_out():
            say_progress(f"note: {note}")
        pictures = [PictureFile(without_suffix(name), f"{folder}/{name}", None) for name in listing.names]
    if not pictures:
        raise InputError(f"{folder} holds no images, expected files such as .jpg, .png, .tif or .webp.")
    by_id: dict[str, PictureFile] = {}
    for picture in pictures:
        if (other := by_id.setdefault(picture.image_id, picture)) is not picture:
            raise InputError(f"{other.path} and {picture.path} would get the same mask; rename one of them.")
    return pictures


def mask_path(folder: Path, picture: PictureFile) -> Path:
    """Return where an image's mask goes."""
    return label_path(folder, picture.image_id)


def record_confidence(path: Path, masks: Mapping[str, Path]) -> None:
    """Write into the record of a folder how sure its masks are, least sure first: image id -> class -> confidence."""
    record = json.loads(path.read_text(encoding="utf-8"))
    known = {image_id: read_confidence(mask) for image_id, mask in masks.items() if mask.is_file()}
    order = sorted(known, key=lambda image_id: min(known[image_id].values(), default=1.0))
    record["confidence"] = {image_id: known[image_id] for image_id in order}
    write_record(path, record, overwrite=True)


def write_record(path: Path, record: Mapping[str, Any], *, overwrite: bool) -> None:
    """Record how the masks of a folder are made, and refuse to mix masks made with different settings.

    Raises:
        ValueError: the folder holds masks made with other settings.
    """
    text = json.dumps(record, indent=2, ensure_ascii=False)
    if path.is_file() and not overwrite:
        before = json.loads(path.read_text(encoding="utf-8"))
        now = json.loads(text)
        changed = [name for name in now if before.get(name) != now[name]]
        if changed:
            name = changed[0]
            raise InputError(
                f"{path.parent} holds masks made with {name} {before.get(name)}, now it is {now[name]}; give another "
                "--out, or --overwrite to make them again."
            )
        return
    with atomic_write(path) as temporary:
        # Image ids may hold bytes that are no UTF-8; a backslash escape is one of JSON too.
        temporary.write_bytes(f"{text}\n".encode("utf-8", "backslashreplace"))
