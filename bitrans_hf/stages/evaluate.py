"""Score a folder of label maps or seeds against ground truth: a table, JSON, a confusion image, worst images first.

accelerate launch training/evaluate_masks.py --predictions runs/voc_deit_small/predictions/val/crf \
    --config voc_deit_small --data.root VOCdevkit/VOC2012 --split val
accelerate launch training/evaluate_masks.py --predictions my_masks --targets their_masks --classes cat,dog

Predictions are one `<image_id>.png` for each image, whose pixels are label ids, or the `.npz` files of a seeds folder.
Masks with other names are read if all names differ in the same way (`a_mask.png`); the match is reported.
"""

import csv
import dataclasses
import json
import math
import time
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from accelerate.utils import gather_object
from numpy.typing import NDArray
from PIL import Image

from ..commands import if_stopped
from ..data import DataError, MaskValues, class_names, mask_rule, open_image, open_mask
from ..data.coco_painting import CocoMaskRule
from ..data.common import check_classes, read_class_file, read_text
from ..data.mask_names import mask_files, match_masks
from ..data.segmentation import resized_label_map
from ..file_names import label_name, label_path
from ..files import atomic_write, mark_output, refuse_same_folder
from ..hub.errors import InputError
from ..hub.image_processing_bitrans import MAX_SIDE, bounded_image
from ..hub.labels import BACKGROUND, COCO_CLASSES, IGNORE_INDEX, VOC_CLASSES
from ..hub.seeds import Seeds, seed_strips
from ..metrics import MeanIoU, SweepResult, ThresholdSweep
from ..metrics.scores import LabelScores, MaskScores, percent
from ..refine.pseudo_labels import seeds_to_label_map
from ..report.charts import confusion_picture
from ..report.drawing import GalleryRow
from ..report.page import write_report
from ..report.tables import Table
from ..store import SeedStore
from .parse import parse_recipe_with
from .recipe import Recipe, RunOptions
from .records import provenance, write_json
from .run import Run, StageError

LabelMap: TypeAlias = NDArray[np.uint8]

KNOWN_CLASSES = {"voc": VOC_CLASSES, "coco": COCO_CLASSES}


@dataclass(frozen=True)
class EvaluationOptions:
    """What to score, against what and by which rules.

    Attributes:
        predictions: Folder of `<image_id>.png` label maps, or of seeds (`.npz`).
        split: Split of the recipe's data that is the ground truth; null for all images of a folder.
        targets: Folder of true label maps, `<image_id>.png`, instead of the recipe's data.
        classes: With targets: "voc", "coco", a text file with one name in each line, or the object classes in the
            order of their ids, with commas between.
        mask_values: With targets: the meaning of their pixel values, if they are not label ids: "binary",
            "voc_colors", or a list such as "0=0,128=255,255=1" or "128/0/0=1"; "ids" accepts masks without objects.
        prediction_values: The same for predictions that are masks.
        ids: Text file with one image id in each line; only these are scored.
        absent: Whether a label in neither prediction nor ground truth is left out of the mean ("skip") or counts as
            IoU 0 ("zero").
        unsure: How a predicted 255 counts: as a "miss" of the true label, as "background", or not at all ("ignore").
        allow_missing: Score the images with a prediction even if others have none.
        variant: For seeds: the variant; null for the recipe's seeds.variant.
        threshold: For seeds: the background score; null for the best one, found on the same masks.
        num_worst: Number of images on the page, those with the lowest mean IoU.
        output: Folder of the result; null for the folder of predictions with `_scores` appended.
    """

    predictions: str
    split: str | None = None
    targets: str | None = None
    classes: str | None = None
    mask_values: str | None = None
    prediction_values: str | None = None
    ids: str | None = None
    absent: Literal["skip", "zero"] = "skip"
    unsure: Literal["miss", "background", "ignore"] = "miss"
    allow_missing: bool = False
    variant: Literal["sc_cam", "coarse_cam", "fused", "refined"] | None = None
    threshold: float | None = None
    num_worst: int = 12
    output: str | None = None


def main(arguments: Sequence[str] | None = None) -> None:
    """Score a folder from command-line arguments."""
    evaluate_masks(*parse_recipe_with(EvaluationOptions, __doc__, arguments))


def evaluate_masks(recipe: Recipe, options: RunOptions, evaluation: EvaluationOptions) -> Path:
    """Score a folder of predictions; return the folder of the result.

    Raises:
        StageError: the predictions are the ground truth itself, some are missing or do not fit, or there is no ground
            truth.
    """
    started, made_with = time.perf_counter(), provenance()
    run = Run.start(recipe, options)
    folder = Path(evaluation.predictions)
    output = Path(evaluation.output or f"{folder}_scores")
    for read in (folder, *([Path(evaluation.targets)] if evaluation.targets else [])):
        refuse_same_folder(output, read, "--output")
    if_stopped(lambda: "before the result was written")
    with run.working("masks: reading the lists of predictions and ground truth"):
        truth = ground_truth(run, evaluation)
        predictions = open_predictions(folder, run, evaluation, len(truth.classes))
        if isinstance(predictions, MaskPredictions):
            predictions = predictions.matched_to(truth.ids)
            if predictions.rule:
                run.say(f"note: masks are matched by name, where {predictions.rule}")
        known, missing = matching(truth, predictions, folder, evaluation)
        refuse_linked_ground_truth(truth, predictions, known)
    run.announce(f"masks: {len(known):,} of {len(truth.ids):,} images to score")

    sweep = None
    if isinstance(predictions, SeedPredictions) and predictions.threshold is None:
        sweep = best_threshold(run, truth, predictions, known)
        predictions = dataclasses.replace(predictions, threshold=sweep.best_threshold)
    metric, images = score(run, truth, predictions, known, evaluation)
    notes = masks_without_objects(metric, images, predictions, evaluation, recipe)
    if all(image.identical for image in images) and isinstance(predictions, MaskPredictions):
        raise StageError(
            f"all {len(images)} label maps in {folder} equal the ground truth in every counted pixel: this is a copy "
            "of it. Give the folder that the network wrote."
        )

    if run.accelerator.is_main_process:
        mark_output(output)
        scores = summary(metric, images, truth.classes, evaluation)
        record = {
            **scores.to_json(),
            "predictions": str(folder),
            "ground_truth": truth.description,
            "rules": rules(truth, predictions, sweep, evaluation),
            "notes": notes,
            "missing": len(missing),
            "not_in_ground_truth": len(predictions.others(truth.ids)),
            "seconds": round(time.perf_counter() - started, 1),
            "made_with": made_with,
        }
        with run.working("masks: writing the result"):
            write_result(output, record, scores, images, truth, predictions, evaluation)
        if not run.options.quiet:
            run.say(text_table(score_table(scores)))
        for note in notes:
            run.say(f"note: {note}")
        run.say(
            f"masks: mIoU {scores.miou:.2f} % over {scores.labels_in_mean} of {1 + len(truth.classes)} labels, "
            f"{scores.images} images{left_out(missing)} ({'; '.join(record['rules'].values())}) -> {output}",
        )
    run.accelerator.wait_for_everyone()
    return output


# ---- Ground truth.


@dataclass(frozen=True)
class GroundTruth:
    """True label maps by image id.

    Attributes:
        ids: Ids of the images that have a mask.
        rows: For each of them a row with "mask", and "image" if there is one.
        classes: Names of the object classes.
        mask_rule: How the masks were made, if the data set records it.
        description: Where they come from.
        values: What pixel values mean, where they are not label ids.
        values_option: The option that sets `values`, for advice; "{}" is the place of the form.
    """

    ids: Sequence[str]
    rows: "Rows"
    classes: Sequence[str]
    mask_rule: str | None
    description: str
    values: MaskValues | None = None
    values_option: str = "--data.mask_values {}"

    def label_map(self, position: int) -> LabelMap:
        """Open the mask of the image at `position`."""
        return open_mask(
            self.rows[position]["mask"],
            num_classes=len(self.classes),
            values=self.values,
            values_option=self.values_option,
        )

    def photo(self, position: int, size: tuple[int, int]) -> Image.Image:
        """Open the image at `position`; a white image of `size` (height, width) if there is none."""
        cell = self.rows[position].get("image")
        return Image.new("RGB", size[::-1], "white") if cell is None else open_image(cell)


class Rows(Protocol):
    """Rows by number: a `Dataset` or a list."""

    def __getitem__(self, position: int, /) -> Mapping[str, Any]:
        """Return a row."""


def ground_truth(run: Run, evaluation: EvaluationOptions) -> GroundTruth:
    """Find the true label maps: those of the recipe's data, or of a folder.

    Raises:
        StageError: there is no mask, or the classes are unknown.
    """
    wanted = None
    if evaluation.ids is not None:
        wanted = {line.strip() for line in read_text(Path(evaluation.ids)).splitlines() if line.strip()}
    if evaluation.targets is not None:
        folder, classes = Path(evaluation.targets), given_classes(evaluation)
        paths = masks_by_id(folder)
        ids = [image_id for image_id in paths if wanted is None or image_id in wanted]
        rows = [{"mask": str(paths[image_id])} for image_id in ids]
        values = given_values(evaluation.mask_values, len(classes))
        truth = GroundTruth(ids, rows, classes, painting_rule(folder), str(folder), values, "--mask_values {}")
    else:
        if evaluation.classes is not None:
            raise StageError("--classes goes with --targets; the recipe's data has its own, see --data.classes.")
        if evaluation.mask_values is not None:
            raise StageError("--mask_values goes with --targets; give --data.mask_values for the recipe's data.")
        images = run.images(evaluation.split, masks=True)
        has_mask = ~images.select_columns("mask").with_format("arrow")[:]["mask"].is_null().to_numpy()
        keep = [
            position
            for position, image_id in enumerate(images["image_id"])
            if has_mask[position] and (wanted is None or image_id in wanted)
        ]
        images = images.select(keep)
        where = f"{run.recipe.data.source} {run.recipe.data.root or ''}".strip() + f", split {evaluation.split}"
        truth = GroundTruth(list(images["image_id"]), images, class_names(images), mask_rule(images), where)
    if not truth.ids:
        raise StageError(
            f"there is no mask to score against in {truth.description}"
            + (f" for the ids of {evaluation.ids}." if wanted is not None else "; choose another split or folder.")
        )
    lacking = [] if wanted is None else sorted(wanted - set(truth.ids))
    if lacking:
        raise StageError(
            f"{len(lacking)} of {len(wanted or ())} ids in {evaluation.ids} have no mask in {truth.description}, the "
            f"first is {lacking[0]!r}; take the list that belongs to the masks."
        )
    return truth


def masks_by_id(folder: Path) -> dict[str, Path]:
    """Return the masks of a folder by their names without suffix.

    Raises:
        StageError: there is no such folder, or two masks have one name.
    """
    if not folder.is_dir():
        raise StageError(f"{folder} is not a folder; give the folder that holds the true masks as --targets.")
    paths: dict[str, Path] = {}
    for file, path in mask_files(folder).items():
        image_id = file.removesuffix(path.suffix)
        other = paths.get(image_id, path)
        if other != path and ".png" not in (path.suffix, other.suffix):
            raise StageError(f"{other} and {path} are masks of one name; keep one of them.")
        if other == path or path.suffix == ".png":  # which is what a mask is called, whatever lies beside it
            paths[image_id] = path
    return paths


def given_values(text: str | None, num_classes: int) -> MaskValues | None:
    """Return the meaning of pixel values.

    Raises:
        InputError: the form is unknown, or does not fit the classes.
    """
    values = MaskValues.parse(text)
    if values is not None:
        values.require_classes(num_classes)
    return values


def painting_rule(folder: Path) -> str | None:
    """Return the rule, in words, by which `prepare_coco.py` painted a folder of masks; None for other folders."""
    path = folder / "rule.json"
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    return str(CocoMaskRule(record["overlap"], record["crowd"]))


def given_classes(evaluation: EvaluationOptions) -> Sequence[str]:
    """Return the object classes of a folder of masks, without background.

    Raises:
        StageError: they were not given.
        DataError: they are not a list of different classes.
    """
    if evaluation.classes is None:
        raise StageError(
            "--targets needs --classes: voc, coco, or the names of the object classes in the order of their ids, with "
            "commas between. Their number says which ids are allowed, and which labels the mean is over."
        )
    if evaluation.classes in KNOWN_CLASSES:
        return KNOWN_CLASSES[evaluation.classes]
    path = Path(evaluation.classes)
    if path.suffix == ".txt":
        return read_class_file(path)
    return check_classes(evaluation.classes.split(","), "--classes")


# ---- Predictions.


@dataclass(frozen=True)
class MaskPredictions:
    """A folder of label maps.

    Attributes:
        folder: Where they are.
        num_classes: Number of object classes.
        values: What pixel values mean, where they are not label ids.
        paths: Image id -> file, of the images to be scored.
        rule: How names differ from the image ids, in words.
        unmatched: Files that match none of these images.
    """

    folder: Path
    num_classes: int
    values: MaskValues | None = None
    paths: Mapping[str, Path] = field(default_factory=dict)
    rule: str = ""
    unmatched: Sequence[str] = ()

    def matched_to(self, image_ids: Sequence[str]) -> "MaskPredictions":
        """Return these predictions with the files of images.

        Raises:
            StageError: several predictions match one image.
        """
        # Names that no file can have are ours alone, see `label_path`.
        own = {name: label_path(self.folder, name) for name in image_ids if label_name(name) != f"{name}.png"}
        own = {name: path for name, path in own.items() if path.is_file()}
        names = {f"{image_id}.png": image_id for image_id in image_ids if image_id not in own}
        match = match_masks(list(names), self.folder, image_word="true masks", mask_word="predictions")
        for name, files in match.ambiguous.items():
            raise StageError(
                f"{names[name]} may have the predictions {' and '.join(files)} in {self.folder}; keep one."
            )
        paths = {names[name]: path for name, path in match.paths.items()} | own
        taken = {path.relative_to(self.folder).as_posix() for path in own.values()}
        unmatched = [name for name in match.unmatched if name not in taken]
        return dataclasses.replace(self, paths=paths, rule=match.rule, unmatched=unmatched)

    def others(self, image_ids: Sequence[str]) -> list[str]:
        """Return the other files in the folder."""
        return list(self.unmatched)

    def path(self, image_id: str) -> Path:
        """Return the file of an image, or the expected name if it is missing."""
        return self.paths.get(image_id, label_path(self.folder, image_id))

    def label_map(self, image_id: str) -> LabelMap:
        """Open the label map of an image."""
        return open_mask(
            self.path(image_id),
            num_classes=self.num_classes,
            values=self.values,
            values_option="--prediction_values {}",
        )


@dataclass(frozen=True)
class SeedPredictions:
    """A folder of seeds, cut at a background score; `threshold` is None until it is chosen.

    Seeds of images with a longer side than `max_side` are read at their bounded size and enlarged in strips.
    """

    store: SeedStore
    variant: str
    num_classes: int
    threshold: float | None
    max_side: int

    def others(self, image_ids: Sequence[str]) -> list[str]:
        """Return the ids of predictions of other images."""
        return sorted(set(self.store.ids()) - set(image_ids))

    def path(self, image_id: str) -> Path:
        """Return the file of an image."""
        return self.store.path(image_id)

    def read(self, image_id: str) -> Seeds:
        """Read the seeds of an image at its bounded size."""
        return self.store.read(image_id, self.variant, max_side=self.max_side)

    def label_map(self, image_id: str) -> LabelMap:
        """Cut the seeds of an image into a label map."""
        if self.threshold is None:
            raise StageError("the seeds have no background score yet.")
        seeds = self.read(image_id)
        if seeds.class_ids.size and seeds.class_ids.max() >= self.num_classes:
            raise DataError(
                f"seeds of {image_id} hold class id {seeds.class_ids.max()}, expected ids below {self.num_classes}; "
                "score them with the classes that they were made for."
            )
        return seeds_to_label_map(seeds, self.threshold, self.store.size(image_id))


Predictions: TypeAlias = MaskPredictions | SeedPredictions


def open_predictions(folder: Path, run: Run, evaluation: EvaluationOptions, num_classes: int) -> Predictions:
    """Open a folder of predictions: label maps or seeds.

    Raises:
        StageError: it contains neither.
    """
    if mask_files(folder):
        return MaskPredictions(folder, num_classes, given_values(evaluation.prediction_values, num_classes))
    if next(folder.glob("*.npz"), None) is not None:
        variant = evaluation.variant or run.recipe.seeds.variant
        return SeedPredictions(SeedStore(folder), variant, num_classes, evaluation.threshold, run.max_side)
    raise StageError(
        f"{folder} holds no predictions, expected <image_id>.png label maps or .npz seeds; a seeds stage has them in "
        "<split>/masks and <split>/seeds."
    )


def matching(
    truth: GroundTruth, predictions: Predictions, folder: Path, evaluation: EvaluationOptions
) -> tuple[list[int], list[str]]:
    """Return the positions of the images with a prediction, and the ids of those without.

    Raises:
        StageError: some predictions are missing and `allow_missing` is not set, or all are missing.
    """
    known, missing = [], []
    for position, image_id in enumerate(truth.ids):
        if predictions.path(image_id).is_file():
            known.append(position)
        else:
            missing.append(image_id)
    if missing and (not known or not evaluation.allow_missing):
        raise StageError(
            f"{len(missing)} of {len(truth.ids)} images have no prediction in {folder}, the first is {missing[0]!r} "
            f"({predictions.path(missing[0]).name}){others(truth, predictions)}; finish the stage that writes them, "
            "name the split that was predicted, or score what is there with --allow_missing true."
        )
    return known, missing


def others(truth: GroundTruth, predictions: Predictions) -> str:
    """Describe what the folder contains instead of the missing predictions."""
    found = predictions.others(truth.ids)
    return f", and {len(found)} files there belong to no image, such as {found[0]}" if found else ""


def left_out(missing: Sequence[str]) -> str:
    """Report how many images the score leaves out."""
    return f", {len(missing)} without a prediction left out" if missing else ""


def refuse_linked_ground_truth(truth: GroundTruth, predictions: Predictions, known: Sequence[int]) -> None:
    """Refuse predictions that are the files of the ground truth: the same folder, or links to it.

    Raises:
        StageError: with the file.
    """
    for position in known:
        path = predictions.path(truth.ids[position])
        true_path = mask_path(truth.rows[position]["mask"])
        if true_path is not None and true_path.is_file() and path.samefile(true_path):
            raise StageError(
                f"{path} is the ground truth's own file {true_path}: scoring it against itself is meaningless. Give "
                "the folder that the network wrote."
            )


def mask_path(cell: Any) -> Path | None:
    """Return the file of a mask, if it has one."""
    name = cell.get("path") if isinstance(cell, Mapping) else getattr(cell, "filename", cell)
    return Path(name) if isinstance(name, str) and name else None


# ---- Scoring.


@dataclass(frozen=True)
class ScoredImage:
    """One image's score: `miou` and `accuracy` in percent, nan if all is ignored; `unsure` counts predictions of 255.

    `ignored` counts the true 255. `identical`: the prediction equals the ground truth at every pixel that is not
    ignored.
    """

    image_id: str
    position: int
    miou: float
    accuracy: float
    unsure: int
    pixels: int
    ignored: int
    identical: bool


def best_threshold(
    run: Run,
    truth: GroundTruth,
    predictions: SeedPredictions,
    known: Sequence[int],
) -> SweepResult:
    """Find the background score with the highest mean IoU, over all processes."""
    sweep = ThresholdSweep(predictions.num_classes)
    problems = []
    own = known[run.accelerator.process_index :: run.accelerator.num_processes]
    for position in run.progress(own, desc="sweep", unit="image"):
        image_id = truth.ids[position]
        try:
            target, size = truth.label_map(position), predictions.store.size(image_id)
            if target.shape != size:
                raise DataError(
                    f"its seeds are for {size[0]} x {size[1]} pixels (height x width), its ground truth has "
                    f"{target.shape[0]} x {target.shape[1]}; score the data that the seeds were made of."
                )
            for rows, strip in seed_strips(predictions.read(image_id), size):
                sweep.add(strip, target[rows])
        except InputError as error:
            problems.append(f"{image_id}: {error}")
    stop_at_problems(problems, len(known))
    sweep.counts = np.sum(gather_object([sweep.counts]), axis=0)
    return sweep.compute()


def score(
    run: Run,
    truth: GroundTruth,
    predictions: Predictions,
    known: Sequence[int],
    evaluation: EvaluationOptions,
) -> tuple[MeanIoU, list[ScoredImage]]:
    """Score every image once, over all processes; return the confusion counts and the images, worst first.

    Raises:
        StageError: some predictions do not fit; the first is named. All processes raise it.
    """
    num_labels = 1 + len(truth.classes)
    metric = MeanIoU(num_labels, out_of_range="miss", absent=evaluation.absent)
    single = MeanIoU(num_labels, out_of_range="miss")
    images, problems = [], []
    own = known[run.accelerator.process_index :: run.accelerator.num_processes]
    for position in run.progress(own, desc="score", unit="image"):
        image_id = truth.ids[position]
        try:
            target, prediction = truth.label_map(position), predictions.label_map(image_id)
            if prediction.shape != target.shape:
                raise DataError(
                    f"{predictions.path(image_id)} is {prediction.shape[0]}x{prediction.shape[1]} (height x width) "
                    f"and the ground truth {target.shape[0]}x{target.shape[1]}; predict at the image's size."
                )
        except InputError as error:
            problems.append(f"{image_id}: {error}")
            continue
        identical = bool(((prediction == target) | (target == IGNORE_INDEX)).all())
        unsure, num_ignored = prediction == IGNORE_INDEX, int(np.count_nonzero(target == IGNORE_INDEX))
        if evaluation.unsure == "background":
            prediction = np.where(unsure, np.uint8(BACKGROUND), prediction)
        elif evaluation.unsure == "ignore":
            target = np.where(unsure, np.uint8(IGNORE_INDEX), target)
        metric.add(prediction=prediction, reference=target)
        scores = single.compute(predictions=[prediction], references=[target])
        miou, accuracy = 100.0 * scores["mean_iou"], 100.0 * scores["overall_accuracy"]
        num_unsure = int(np.count_nonzero(unsure))
        images.append(ScoredImage(image_id, position, miou, accuracy, num_unsure, target.size, num_ignored, identical))
    stop_at_problems(problems, len(known))
    images = gather_object(images)
    images.sort(key=lambda image: (math.inf if math.isnan(image.miou) else image.miou, image.position))
    return metric.gathered(gather_object, num_images=len(known)), images


def stop_at_problems(problems: list[str], num_images: int) -> None:
    """Raise in every process if any process has a problem, so that none waits for the others.

    Raises:
        StageError: with the number of problems and the first.
    """
    problems = sorted(gather_object(problems))
    if problems:
        raise StageError(f"{len(problems)} of {num_images} images cannot be scored; the first: {problems[0]}")


def masks_without_objects(
    metric: MeanIoU,
    images: Sequence[ScoredImage],
    predictions: Predictions,
    evaluation: EvaluationOptions,
    recipe: Recipe,
) -> list[str]:
    """Warn if no true mask, or no prediction, contains an object: a mean over background says little.

    Raises:
        StageError: they contain 255 instead, and the caller did not state that 255 means ignored, or unsure.
    """
    notes = []
    of_targets, option = evaluation.mask_values, "--mask_values"
    if evaluation.targets is None:
        of_targets, option = recipe.data.mask_values, "--data.mask_values"
    counts = metric.confusion
    if not counts[1:-1].any():
        if of_targets is None and any(image.ignored for image in images):
            raise StageError(
                f"the true masks of {len(images)} images hold only 0 (background) and 255 (ignored), expected pixels "
                f"of a class; if 255 is the object, give {option} binary (or 0=0,255=1), if not, give {option} ids."
            )
        notes.append("no true mask holds a pixel of a class: this is a score of background alone")
    if not counts[:, 1:-1].any():
        by_masks = isinstance(predictions, MaskPredictions)
        if by_masks and evaluation.prediction_values is None and any(image.unsure for image in images):
            raise StageError(
                f"the predictions of {len(images)} images hold only 0 (background) and 255 (unsure), expected pixels "
                "of a class; if 255 is the object, give --prediction_values binary (or 0=0,255=1), if not, give "
                "--prediction_values ids."
            )
        notes.append("no prediction holds a pixel of a class")
    return notes


# ---- Results.


def summary(
    metric: MeanIoU, images: Sequence[ScoredImage], classes: Sequence[str], evaluation: EvaluationOptions
) -> MaskScores:
    """Return the scores over all images.

    Raises:
        StageError: every pixel of the ground truth is ignored.
    """
    counts = metric.confusion
    scores = metric.compute()
    if math.isnan(scores["overall_accuracy"]):
        raise StageError("every pixel of the ground truth is ignored (255); there is nothing to score.")
    iou, accuracy = scores["per_category_iou"], scores["per_category_accuracy"]
    names = ["background", *classes]
    per_class = {
        name: LabelScores(
            iou=percent(iou[label]),
            accuracy=percent(accuracy[label]),
            target_pixels=int(counts[label].sum()),
            predicted_pixels=int(counts[:, label].sum()),
        )
        for label, name in enumerate(names)
    }
    return MaskScores(
        miou=percent(scores["mean_iou"]),
        mean_accuracy=percent(scores["mean_accuracy"]),
        pixel_accuracy=percent(scores["overall_accuracy"]),
        frequency_weighted_iou=percent(scores["frequency_weighted_iou"]),
        images=len(images),
        labels_in_mean=len(names) if evaluation.absent == "zero" else int(np.count_nonzero(~np.isnan(iou))),
        unsure_pixels=percent(sum(image.unsure for image in images) / sum(image.pixels for image in images)),
        per_class=per_class,
        confusion=counts[:-1].tolist(),
    )


def rules(
    truth: GroundTruth, predictions: Predictions, sweep: SweepResult | None, evaluation: EvaluationOptions
) -> dict[str, str]:
    """Describe the rules of the score."""
    result = {
        "absent": "labels in no map "
        + ("are left out of the mean" if evaluation.absent == "skip" else "count as IoU 0"),
        "unsure": {
            "miss": "a predicted 255 is a miss",
            "background": "a predicted 255 is background",
            "ignore": "pixels predicted as 255 are left out",
        }[evaluation.unsure],
    }
    if truth.mask_rule is not None:
        result["masks"] = truth.mask_rule
    if isinstance(predictions, SeedPredictions):
        chosen = "as given" if sweep is None else "the best of 101 on these same masks"
        result["threshold"] = f"seeds {predictions.variant} cut at {predictions.threshold:.2f}, {chosen}"
    return result


def write_result(
    output: Path,
    record: Mapping[str, Any],
    scores: MaskScores,
    images: Sequence[ScoredImage],
    truth: GroundTruth,
    predictions: Predictions,
    evaluation: EvaluationOptions,
) -> None:
    """Write `metrics.json`, `images.csv` (worst first), `confusion.png` and the page `index.html`."""
    write_json(output / "metrics.json", record)
    with atomic_write(output / "images.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image_id", "miou", "accuracy", "unsure_pixels"])
        writer.writerows([i.image_id, cell(i.miou), cell(i.accuracy), i.unsure] for i in images)
    counts, names = np.array(scores.confusion), ["background", *truth.classes]
    if counts[:, -1].any():
        picture = confusion_picture(counts, names, [*names, "unsure"])
    else:
        picture = confusion_picture(counts[:, :-1], names, names)
    with atomic_write(output / "confusion.png") as temporary:
        picture.save(temporary, format="PNG")
    rows = []
    for image in images[: evaluation.num_worst]:
        label_map = predictions.label_map(image.image_id)
        photo = bounded_image(truth.photo(image.position, label_map.shape), MAX_SIDE)
        size = (photo.height, photo.width)
        rows.append(
            GalleryRow(
                image_id=image.image_id,
                image=photo,
                target=resized_label_map(truth.label_map(image.position), size),
                maps={},
                label_map=resized_label_map(label_map, size),
                class_names=truth.classes,
                caption=f"mean IoU {image.miou:.1f} %",
            )
        )
    write_report(
        output / "index.html",
        title=f"Masks of {record['predictions']}",
        rows=rows,
        tables=[score_table(scores)],
        figures={"Confusion": picture},
        notes=[
            f"{scores.images} images against {record['ground_truth']}: {'; '.join(record['rules'].values())}.",
            "The images are those with the lowest mean IoU over the labels that occur in them.",
            *(f"Note: {note}." for note in record["notes"]),
            f"Made at commit {record['made_with']['commit']}.",
        ],
    )


def score_table(scores: MaskScores) -> Table:
    """Return the table of all labels, with the means below."""
    total = sum(label.target_pixels for label in scores.per_class.values())
    rows = [
        [name, shown(label.iou), shown(label.accuracy), f"{100 * label.target_pixels / total:.2f}"]
        for name, label in scores.per_class.items()
    ]
    rows.append(["mean", shown(scores.miou), shown(scores.mean_accuracy), "100.00"])
    rows.append(["weighted by pixels", shown(scores.frequency_weighted_iou), shown(scores.pixel_accuracy), ""])
    columns = ["label", "IoU (%)", "accuracy (%)", "pixels (%)"]
    return Table("Labels", columns, rows, best_row=len(rows) - 2)


def text_table(table: Table) -> str:
    """Format a table in columns for the terminal."""
    widths = [max(map(columns_of, column)) for column in zip(table.columns, *table.rows, strict=True)]
    lines = []
    for cells in (table.columns, *table.rows):
        blanks = [" " * (width - columns_of(cell)) for cell, width in zip(cells, widths, strict=True)]
        first, *rest = zip(cells, blanks, strict=True)
        lines.append("  ".join(["".join(first), *(blank + cell for cell, blank in rest)]).rstrip())
    return "\n".join(lines)


def columns_of(text: str) -> int:
    """Return the width of a text in terminal columns: two for Chinese characters and emoji, none for accents."""
    widths = {"W": 2, "F": 2}
    return sum(
        0 if unicodedata.combining(sign) else widths.get(unicodedata.east_asian_width(sign), 1) for sign in text
    )


def shown(value: float) -> str:
    """Format a percentage, "-" if there is none."""
    return "-" if math.isnan(value) else f"{value:.2f}"


def cell(value: float) -> float | str:
    """Return a percentage with two decimals for a table, an empty cell if there is none."""
    return "" if math.isnan(value) else round(value, 2)
