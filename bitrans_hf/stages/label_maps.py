"""Shared by the stages after the seeds: write label maps in a pool of processes, and score them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import numpy.typing as npt
from accelerate.utils import gather_object
from datasets import Dataset

from ..data import UnreadableImageError, class_names, mask_rule, open_image, open_mask
from ..data.common import ImageCell, ImageRow
from ..file_names import label_path
from ..hub.image_processing_bitrans import bounded_image
from ..hub.labels import BACKGROUND, IGNORE_INDEX
from ..hub.refiners import find_refiner
from ..hub.seeds import Seeds
from ..metrics import confusion_counts, iou_from_counts, miou_from_counts
from ..metrics.scores import ByName, StepScores, percent
from ..pool import ImagePool, Outcome, available_cores
from ..progress import size_text
from ..refine.pseudo_labels import confident_label_map, scores_to_label_map, with_background, write_label_png
from ..store import SeedStore
from .recipe import ALL_IMAGES
from .run import Run, StageError, how_to_run

LabelMap = npt.NDArray[np.uint8]
Result = TypeVar("Result")


# ---- One image.


@dataclass(frozen=True)
class Background:
    """Source of the background score: a constant `threshold`, or (1 - max)^`alpha`; the other one is None."""

    threshold: float | None = None
    alpha: float | None = None

    def scores(self, maps: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Prepend the background score to class maps (K, H, W) in [0, 1]: (1 + K, H, W)."""
        return with_background(maps, threshold=self.threshold, alpha=self.alpha)


@dataclass(frozen=True)
class LabelMapJob:
    """Everything needed to write the label maps of one image, in this or another process.

    Attributes:
        image_id: Id of the image.
        image: As a row of the data holds it.
        labels: (K,) ids of the classes that the image shows.
        outputs: Files to write, each with its background score. Existing ones are kept.
        refiner: "crf", "par" or "none".
        crf_preset: Of the CRF.
        seeds: Folder of the seeds and their variant; None with `class_ids` and `scores`.
        class_ids: (K,) 0-based ids of the classes of `scores`.
        scores: (1 + K, h, w) with background first, at the image's bounded size; the outputs' background scores are
            then not used.
        max_side: Longest side at which the image is refined; label maps have the image's size.
        strict: Raise the error that makes an image unusable.
    """

    image_id: str
    image: ImageCell
    labels: tuple[int, ...]
    outputs: tuple[tuple[Path, Background], ...]
    refiner: str
    crf_preset: str
    max_side: int
    seeds: tuple[Path, str] | None = None
    class_ids: npt.NDArray[np.int64] | None = None
    scores: npt.NDArray[np.float32] | None = None
    strict: bool = False


def write_label_maps(job: LabelMapJob) -> bool:
    """Refine the scores of one image and write its label maps.

    Returns:
        False if the image cannot be read.

    Raises:
        UnreadableImageError: the image cannot be read, and the job is strict.
        StageError: the seeds do not fit the image.
        DiskFullError: there is no room for a label map.
    """
    try:
        image = open_image(job.image)
    except UnreadableImageError:
        if job.strict:
            raise
        return False
    size = (image.height, image.width)
    pixels = np.asarray(bounded_image(image, job.max_side))
    refine = find_refiner(job.refiner, job.crf_preset)
    for path, background in job.outputs:
        if path.is_file():
            continue
        if job.scores is not None and job.class_ids is not None:
            class_ids, scores = job.class_ids, job.scores
        else:
            assert job.seeds is not None
            folder, variant = job.seeds
            seeds = read_seeds(job.image_id, SeedStore(folder), variant, job.labels, size, job.max_side)
            class_ids, scores = seeds.class_ids, background.scores(seeds.maps)
        if len(class_ids) == 0:
            label_map = np.zeros(size, dtype=np.uint8)
        else:
            label_map = scores_to_label_map(class_ids, refine(pixels, scores), size)
        write_label_png(path, label_map, job.image_id)
    return True


def read_seeds(
    image_id: str, store: SeedStore, variant: str, labels: Sequence[int], size: tuple[int, int], max_side: int
) -> Seeds:
    """Read the seeds of an image of (H, W) pixels that shows the classes `labels`, at its bounded size.

    Raises:
        StageError: they belong to another image or other classes, or are damaged.
    """
    seeds = store.read(image_id, variant, max_side=max_side)
    height, width = store.size(image_id)
    if (height, width) != size:
        raise StageError(
            f"the seeds of image {image_id} are for {height} x {width} pixels (height x width), the image has "
            f"{size[0]} x {size[1]}: it was changed since. Delete the seeds stage and make the seeds again."
        )
    if seeds.class_ids.tolist() != sorted(labels):
        raise StageError(
            f"the seeds of image {image_id} are of the classes {seeds.class_ids.tolist()}, the data says "
            f"{sorted(labels)}: the labels or the list of classes changed since. Delete the seeds stage and make the "
            "seeds again."
        )
    if not np.isfinite(seeds.maps).all():
        raise StageError(
            f"the seeds of image {image_id} hold NaN or infinity; delete {store.path(image_id)} and the seeds stage's "
            "done.json, and make the seeds again."
        )
    return seeds


def read_label_map(path: Path) -> LabelMap:
    """Read a label map (H, W) uint8."""
    return open_mask(path)


def stored_label_maps(folder: Path) -> Callable[[str], LabelMap | None]:
    """Return a function from an image id to its label map in a folder, None if it has none."""

    def read(image_id: str) -> LabelMap | None:
        path = label_path(folder, image_id)
        return read_label_map(path) if path.is_file() else None

    return read


# ---- Two label maps that have to agree.


def cell_labels(low: LabelMap, high: LabelMap, stride: int) -> LabelMap:
    """Reduce two label maps (S, S) to labels on a grid of cells of `stride` pixels, by PSA's rule.

    In each map, a cell takes the label of most of its pixels. It is background if the "high" map says so, otherwise
    the label of the "low" map, or unsure (255) if that is background. Ignored pixels (255) are not counted; a cell
    with only ignored pixels becomes 255. PSA averages the scores of a cell and takes the highest; here label maps are
    stored instead of scores, and pixels vote.

    Returns:
        (S // stride, S // stride) uint8.
    """
    label_ids = np.union1d([BACKGROUND], np.union1d(low, high))
    label_ids = label_ids[label_ids != IGNORE_INDEX]
    shares = [cell_shares(label_map, label_ids, stride) for label_map in (low, high)]
    return confident_label_map(label_ids[1:].astype(np.int64) - 1, *shares)


def cell_shares(label_map: LabelMap, label_ids: npt.NDArray[np.integer], stride: int) -> npt.NDArray[np.float32]:
    """Return the share of each label id among a cell's pixels: (L, H // stride, W // stride)."""
    height, width = label_map.shape
    cells = label_map.reshape(height // stride, stride, width // stride, stride)
    return np.stack([(cells == label).mean(axis=(1, 3), dtype=np.float32) for label in label_ids])


# ---- Seeds of a split.


def seeds_of_split(run: Run, split: str | None) -> SeedStore:
    """Return the seeds of a split.

    Raises:
        StageError: that stage is not finished.
    """
    stage = run.stage_folder("seeds")
    if not run.is_done("seeds"):
        raise StageError(f"{stage} is not finished; {how_to_run('seeds')}.")
    store = SeedStore(stage / (split or ALL_IMAGES) / "seeds")
    if not store.folder.is_dir():
        raise StageError(f"there are no seeds at {store.folder}; delete {stage}, and {how_to_run('seeds')}.")
    return store


# ---- A set of images.


BYTES_A_PIXEL, BYTES_A_PROCESS = 600, 1e9
"""Memory of a process that refines: 3 x 48 float32 numbers per pixel in PAR; libraries and whole images."""


def run_jobs(run: Run, jobs: Iterable[LabelMapJob], total: int, refiner: str, name: str) -> set[str]:
    """Write the label maps of this process's jobs; return the ids of unreadable images.

    A refiner takes about one core second per image, so worker processes share the images; without a refiner, this
    process does the work. Jobs are consumed lazily.

    Raises:
        StageError: an image failed for another reason than its file; finished images are kept.
        DiskFullError: there is no room.
    """
    workers = 1 if refiner == "none" else num_workers(run, total)
    if refiner != "none" and total:
        most = size_text(BYTES_A_PROCESS + BYTES_A_PIXEL * run.max_side**2)
        run.announce(
            f"{name}: {workers} process{'es' if workers > 1 else ''} to refine, each takes up to about {most}, "
            f"for an image of {run.max_side} x {run.max_side} pixels"
        )
    unreadable: set[str] = set()
    with ImagePool(workers) as pool:
        outcomes = pool.run(write_label_maps, ((job.image_id, job) for job in jobs))
        for outcome in run.progress(outcomes, total=total, desc=name, unit="image"):
            if not result_of(outcome):
                unreadable.add(outcome.image_id)
    return unreadable


def num_workers(run: Run, total: int) -> int:
    """Return the number of worker processes for `total` images: its share of the cores, unless the run sets it."""
    cores = available_cores() // run.accelerator.num_processes if run.options.workers is None else run.options.workers
    return max(1, min(cores, total))


def result_of(outcome: Outcome[Result]) -> Result:
    """Return the result of the work on an image.

    Raises:
        StageError: it failed. Unreadable images are left out earlier, so that a score never silently covers fewer
            images.
    """
    if outcome.error is not None:
        raise StageError(
            f"image {outcome.image_id}: {outcome.error} Finished images are kept; rerun the same command to continue."
        )
    return cast("Result", outcome.result)


# ---- Scores.


class StepCounts:
    """Confusion counts of label maps after each step, over the same images.

    Args:
        steps: Names of the steps.
        num_labels: Object classes and background.
    """

    def __init__(self, steps: Iterable[str], num_labels: int):
        self.num_labels, self.images = num_labels, 0
        self.counts = {step: np.zeros((num_labels, num_labels), dtype=np.int64) for step in steps}
        self.pixels = {step: np.zeros(2, dtype=np.int64) for step in steps}  # with a label, and all

    def add(self, label_maps: Mapping[str, LabelMap], target: LabelMap) -> None:
        """Count an image: its label map (H, W) after each step, and the true one. Unsure pixels (255) do not count."""
        self.images += 1
        for step, label_map in label_maps.items():
            sure = label_map != IGNORE_INDEX
            self.pixels[step] += (sure.sum(), sure.size)
            self.counts[step] += confusion_counts(label_map, np.where(sure, target, IGNORE_INDEX), self.num_labels)

    def gather(self) -> None:
        """Add up the counts of all processes."""
        self.images = sum(gather_object([self.images]))
        for step in self.counts:
            self.counts[step] = np.sum(gather_object([self.counts[step]]), axis=0)
            self.pixels[step] = np.sum(gather_object([self.pixels[step]]), axis=0)

    def mious(self) -> ByName:
        """Return the mIoU after each step."""
        return {step: percent(miou_from_counts(counts)) for step, counts in self.counts.items()}

    def per_class(self, names: Sequence[str]) -> dict[str, ByName]:
        """Return the IoU of each label after each step."""
        return {
            step: dict(zip(names, map(percent, iou_from_counts(counts)), strict=True))
            for step, counts in self.counts.items()
        }

    def sure(self) -> ByName:
        """Return the share of labeled pixels, for steps that leave some pixels unlabeled."""
        return {step: percent(sure / total) for step, (sure, total) in self.pixels.items() if sure < total}


def score_steps(run: Run, images: Dataset, label_map_of: Mapping[str, Callable[[str], LabelMap | None]]) -> StepScores:
    """Score the label maps after each step, for images with known masks.

    Args:
        run: Each process works on its share.
        images: With masks where they are known.
        label_map_of: Step -> function of an image's id to its label map (H, W), None if it has none. An image is
            scored if it has one after every step.
    """
    num_labels = 1 + len(class_names(images))
    every, several = StepCounts(label_map_of, num_labels), StepCounts(label_map_of, num_labels)
    own = run.own(len(images))
    for index in run.progress(own, desc="score", unit="image"):
        row: ImageRow = images[index]
        if row["mask"] is None:
            continue
        target = open_mask(row["mask"], num_classes=num_labels - 1)
        found = {step: get(row["image_id"]) for step, get in label_map_of.items()}
        label_maps = {step: label_map for step, label_map in found.items() if label_map is not None}
        if len(label_maps) < len(found):
            continue
        for counts in (every, several) if len(row["labels"]) > 1 else (every,):
            counts.add(label_maps, target)
    every.gather()
    several.gather()
    if not every.images:
        return StepScores(scored=0)
    return StepScores(
        scored=every.images,
        mask_rule=mask_rule(images),
        steps=every.mious(),
        per_class=every.per_class(["background", *class_names(images)]),
        sure=every.sure(),
        several_classes=StepScores(images=several.images, steps=several.mious()) if several.images else None,
    )
