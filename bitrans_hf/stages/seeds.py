"""Make class seeds and label maps with a trained model, and score them where masks are known.

accelerate launch training/make_seeds.py --config voc_deit_small

Images whose seeds exist are skipped, so an interrupted run can be resumed. All four variants
(SC-CAM, Coarse-CAM, their product, the refined product) come from the same forward passes and are kept; a plain CNN
has the second alone.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from accelerate.utils import gather_object
from datasets import Dataset

from ..data import UnreadableImageError, class_names, image_size, mask_rule, open_image, open_mask
from ..data.common import ImageRow
from ..file_names import label_path
from ..hub.confidence import mask_confidence, other_maps
from ..hub.image_processing_bitrans import MAX_SIDE, BiTransImageProcessor, bounded_size, patch_problem
from ..hub.labels import IGNORE_INDEX
from ..hub.modeling_bitrans import BiTransModel
from ..hub.modeling_cam import CamModel
from ..hub.seeds import Seeds, presence, seed_strips, sum_over_views
from ..hub.weight_files import load_trained
from ..metrics import SweepResult, ThresholdSweep
from ..metrics.confidence import lift, spearman
from ..metrics.scores import ByName, SeedScores, SeedsRecord
from ..progress import size_text
from ..refine.pseudo_labels import seeds_to_label_map, write_label_png
from ..refine.threshold import SeedHistogram
from ..store import SeedStore
from .parse import parse_recipe
from .recipe import ALL_IMAGES, CamRecipe, Recipe, RunOptions, SeedsRecipe, reading_of
from .records import read_json, write_json
from .run import Run, Stage, StageError

DEPENDS_ON = ("seed", "data", "model", "train", "seeds")

Size: TypeAlias = tuple[int, int]
"""(height, width) in pixels."""

HISTOGRAM_SIDE = 160
"""Longest side in pixels that seeds are read at to find a threshold."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stage from command-line arguments."""
    make_seeds(*parse_recipe(__doc__, arguments))


def make_seeds(recipe: Recipe, options: RunOptions) -> Path:
    """Make the seeds and label maps of every split of the recipe; return the folder of the stage.

    `<split>/seeds/*.npz` holds the seeds, `<split>/masks/*.png` the label maps of `seeds.variant` cut at
    `seeds.threshold`, which may be found here. `metrics.json` has the best threshold of every variant and its score,
    and for every further split also the score at the first split's best threshold, which is the honest one where masks
    are only for testing.
    """
    run = Run.start(recipe, options)
    stage = Stage(run, "seeds", DEPENDS_ON)
    if stage.was_done_before():
        return stage.folder
    run.say_precision("train")
    with run.working("seeds: loading the model"):
        model, processor = load_model(run)

    splits: dict[str, SeedScores] = {}
    unreadable: set[str] = set()
    for split in recipe.seeds.splits:
        name = split or ALL_IMAGES
        with run.working(f"seeds: reading the list of {name}"):
            images = run.images(split, masks=True)
        check_classes(model, images)
        made = SplitSeeds(run, model, processor, images, stage.folder / name)
        made.make()
        if not splits:
            cut_at = threshold_of(run, made.store, images)
        first = next(iter(splits.values()), SeedScores()).threshold
        splits[name] = replace(score_split(run, images, stage.folder / name, cut_at, first), reduced=made.reduced)
        unreadable |= made.unreadable

    if run.accelerator.is_main_process and not isinstance(recipe.model, CamRecipe):
        keep_reading(run.trained_model(), {**reading_of(recipe), "threshold": cut_at})
    stage.finish({**SeedsRecord.of(splits, run.max_side, cut_at).to_json(), "unreadable": sorted(unreadable)})
    run.say_unreadable(unreadable)
    for name, scores in splits.items():
        run.say(f"seeds: {name}, {scores.shown_images()}, {scores.shown()}")
    run.say(f"seeds: -> {stage.folder}")
    run.accelerator.wait_for_everyone()
    return stage.folder


def load_model(run: Run) -> tuple[BiTransModel | CamModel, BiTransImageProcessor]:
    """Load the run's trained network, in evaluation mode, and its image processor.

    Raises:
        StageError: it is not trained.
    """
    recipe, folder = run.recipe, run.trained_model()
    model: BiTransModel | CamModel
    if isinstance(recipe.model, CamRecipe):
        model = load_trained(CamModel, folder)
    else:
        model = load_trained(BiTransModel, folder, **reading_of(recipe))
    processor = BiTransImageProcessor.from_pretrained(folder)
    processor.max_side = run.max_side
    return model.to(run.accelerator.device).eval(), processor


def keep_reading(folder: Path, reading: Mapping[str, Any]) -> None:
    """Write into a trained model how its seeds were read, for all who open it."""
    saved = read_json(folder / "config.json")
    if saved != saved | dict(reading):
        write_json(folder / "config.json", saved | dict(reading))


def threshold_of(run: Run, store: SeedStore, images: Dataset) -> float:
    """Return the background score of the label maps: the recipe's, or for "auto" the one that fits these seeds."""
    settings = run.recipe.seeds
    if settings.threshold != "auto":
        return settings.threshold
    histogram = SeedHistogram()
    for index in run.own(len(images)):
        image_id = images[index]["image_id"]
        if image_id in store:
            histogram.add(store.read(image_id, settings.variant, max_side=HISTOGRAM_SIDE))
    histogram.counts = np.sum(gather_object([histogram.counts]), axis=0)
    return histogram.threshold()


def check_classes(model: BiTransModel | CamModel, images: Dataset) -> None:
    """Check that a network was trained for the classes of the images.

    Raises:
        StageError: the classes differ.
    """
    known = [name for _, name in sorted((model.config.id2label or {}).items())]
    wanted = class_names(images)
    if known != wanted:
        raise StageError(
            f"the model knows the classes {', '.join(known)}, the data {', '.join(wanted)}; "
            "use the recipe that the model was trained with."
        )


class SplitSeeds:
    """The seeds of one split: each process makes its share.

    Images of equal size form a batch. Larger images are reduced to the processor's bound, and a batch takes no more
    memory than `batch_size` images at the usual bound. With one scale, maps stay on the token grid; several scales are
    summed at a quarter of the image size.

    Args:
        run: Its recipe gives the scales and the batch size.
        model: In evaluation mode, on the device of the run.
        processor: Its `max_side` bounds the images.
        images: All of the split.
        folder: Of the split; the seeds go to `seeds/` in it.

    Attributes:
        unreadable: Ids of unusable images; after `make`, those of all processes.
        reduced: Number of images larger than the bound, including those finished earlier.
    """

    def __init__(
        self,
        run: Run,
        model: BiTransModel | CamModel,
        processor: BiTransImageProcessor,
        images: Dataset,
        folder: Path,
    ):
        assert processor.max_side is not None
        self.run, self.model, self.processor, self.images = run, model, processor, images
        self.settings, self.max_side = run.recipe.seeds, processor.max_side
        self.store = SeedStore(folder / "seeds")
        self.unreadable: set[str] = set()
        self.reduced = 0

    def make(self) -> None:
        """Write the missing seeds."""
        batches = self._batches()
        self._announce(batches)
        for size, indices in self.run.progress(batches, desc="seeds", unit="batch"):
            rows, views = self._opened(indices)
            if not rows:
                continue
            maps, others = self._maps(rows, views, size)
            for position, row in enumerate(rows):
                class_ids = np.array(row["labels"], dtype=np.int64)
                own = {variant: total[position, row["labels"]].float().cpu() for variant, total in maps.items()}
                its_others = None if others is None else others[:, position, row["labels"]]
                self.store.write(row["image_id"], class_ids, own, size, its_others)
        self.run.wait()
        self.unreadable = self.run.union(self.unreadable)

    def _batches(self) -> list[tuple[Size, list[int]]]:
        """Return the (height, width) and the positions of the images of every batch."""
        todo: dict[Size, list[int]] = defaultdict(list)
        own = self.run.own(len(self.images))
        for index in self.run.progress(own, desc="sizes of the images", unit="image"):
            row = self.images[index]
            done = row["image_id"] in self.store
            try:
                size = self.store.size(row["image_id"]) if done else self._usable_size(row)
            except UnreadableImageError as error:
                self._leave_out(row, error)
                continue
            self.reduced += bounded_size(size, self.max_side) != size
            if not done:
                todo[size].append(index)
        batches = []
        for size, indices in sorted(todo.items()):
            number = images_at_once(bounded_size(size, self.max_side), self.settings.batch_size)
            batches += [(size, indices[start : start + number]) for start in range(0, len(indices), number)]
        return batches

    def _usable_size(self, row: ImageRow) -> Size:
        """Return the size of an image; raise UnreadableImageError if it is unreadable or smaller than a patch."""
        size = image_size(row["image"])
        smallest = self.model.config.stride if isinstance(self.model, CamModel) else self.model.config.patch_size
        working = bounded_size(size, self.max_side)
        problem = patch_problem(size, working, self.settings.scales, smallest, option_prefix="seeds.")
        if problem:
            raise UnreadableImageError(f"image {row['image_id']} is {problem}")
        return size

    def _leave_out(self, row: ImageRow, error: UnreadableImageError) -> None:
        """Note that an image is unusable; in a strict run, stop with the reason."""
        if self.run.options.strict:
            raise error
        self.unreadable.add(row["image_id"])

    def _announce(self, batches: Sequence[tuple[Size, Sequence[int]]]) -> None:
        """Print the plan, the memory it takes, and the number of reduced images."""
        run, settings = self.run, self.settings
        num_views = len(settings.scales) * (2 if settings.flip else 1)
        run.announce(
            f"seeds: {sum(len(indices) for _, indices in batches):,} of {len(run.own(len(self.images))):,} images to "
            f"do, {num_views} view(s) of each; batch size {settings.batch_size}, {run.accelerator.num_processes} "
            f"process(es), device {run.accelerator.device.type}"
        )
        self.reduced = sum(gather_object([self.reduced]))
        if batches:
            needs = [
                memory_of_views(self.model, bounded_size(size, self.max_side), settings, len(indices))
                for size, indices in batches
            ]
            run.announce(f"seeds: the largest batch takes about {size_text(max(needs))} of memory beside the model's")
        if self.reduced:
            run.say(
                f"seeds: {self.reduced} of {len(self.images)} images are larger than {self.max_side} pixels and are "
                "reduced to that (seeds.max_side); their label maps have the images' own sizes",
            )

    def _opened(self, indices: Sequence[int]) -> tuple[list[ImageRow], list[list[torch.Tensor]]]:
        """Return the readable rows and their views, one (1, 3, H_s, W_s) per scale."""
        rows, views = [], []
        for index in indices:
            row: ImageRow = self.images[index]
            try:
                image = self.processor.bounded(open_image(row["image"]))
            except UnreadableImageError as error:
                self._leave_out(row, error)
                continue
            views.append(self.processor.scaled_views(image, self.settings.scales))
            rows.append(row)
        return rows, views

    def _maps(
        self, rows: Sequence[ImageRow], views: Sequence[Sequence[torch.Tensor]], size: Size
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """Return the maps (B, C, h, w) of every seed variant of B images of one size, and (V, B, C, h', w') others.

        The others are refined maps of scale 1 made in other ways (`hub.confidence`); None for a CNN.
        """
        present = [presence(np.array(row["labels"], dtype=np.int64), self.model.config) for row in rows]
        device = self.run.accelerator.device
        reading: dict[str, Any] = {
            "flip": self.settings.flip,
            "refine_steps": self.settings.refine_steps,
            "normalize_affinity": self.settings.normalize_affinity,
            "present": torch.cat(present).to(device),
        }
        others: list[torch.Tensor] = []
        height, width = bounded_size(size, self.max_side)

        def network(pixel_values: torch.Tensor) -> Any:
            # Its maps are float32 and stay so: refining them in bfloat16 would round them.
            with self.run.accelerator.autocast():
                output = self.model(pixel_values)
            if isinstance(self.model, BiTransModel) and not others:
                others.append(other_maps(output, self.settings.fusion, **reading))
            return output

        maps = sum_over_views(
            network,
            [torch.cat(scale).to(device) for scale in zip(*views, strict=True)],
            self.run.variants,
            size=None if len(self.settings.scales) == 1 else (-(-height // 4), -(-width // 4)),
            **reading,
        )
        return maps, (others[0] if others else None)


def images_at_once(size: tuple[int, int], batch_size: int) -> int:
    """Return the batch size for images of one size: at least one, at most `batch_size`.

    Attention maps take memory that grows with the square of the area. A batch takes no more than `batch_size` images
    of `MAX_SIDE` by `MAX_SIDE` pixels.
    """
    share = MAX_SIDE**2 / (size[0] * size[1])
    return max(1, min(batch_size, int(batch_size * share**2)))


def memory_of_views(
    model: BiTransModel | CamModel, size: tuple[int, int], recipe: SeedsRecipe, num_images: int
) -> float:
    """Estimate the bytes that a batch takes in the network, excluding the weights.

    A transformer has five (T, T) maps of float32 alive for each view of T tokens (the scores, weights and running
    mean of a layer's attention, and the affinity), and the MLP's activations. A CNN has about 1,200 bytes for a pixel.
    """
    height, width = (round(side * max(recipe.scales)) for side in size)
    views = num_images * (2 if recipe.flip else 1)
    if isinstance(model, CamModel):
        return 1200.0 * views * height * width
    config = model.config
    tokens = config.num_labels + (height // config.patch_size) * (width // config.patch_size)
    hidden = config.hidden_size * (4 + 2 * config.mlp_ratio)
    return float(4 * views * tokens * (5 * tokens + hidden))


def score_split(run: Run, images: Dataset, folder: Path, cut_at: float, given_thresholds: ByName) -> SeedScores:
    """Write the label maps of a split and score its seeds at every threshold in one pass.

    Args:
        run: Each process works on its share.
        images: With masks where they are known.
        folder: Of the split.
        cut_at: Background score of the label maps.
        given_thresholds: Seed variant -> best threshold of the first split; empty for the first split itself.
    """
    recipe = run.recipe
    store = SeedStore(folder / "seeds")
    num_classes = len(class_names(images))
    sure = Confidences(class_names(images))
    every, several = VariantSweeps(run.variants, num_classes), VariantSweeps(run.variants, num_classes)
    made = 0
    own = run.own(len(images))
    for index in run.progress(own, desc="score", unit="image"):
        row: ImageRow = images[index]
        if row["image_id"] not in store:
            continue
        made += 1
        size = store.size(row["image_id"])
        seeds = store.read_variants(row["image_id"], run.variants, max_side=run.max_side)
        label_map = seeds_to_label_map(seeds[recipe.seeds.variant], cut_at, size)
        write_label_png(label_path(folder / "masks", row["image_id"]), label_map, row["image_id"])
        target = None
        if row["mask"] is not None:
            target = open_mask(row["mask"], image_size=size, num_classes=num_classes)
        if (others := store.others(row["image_id"])) is not None:
            maps = seeds[recipe.seeds.variant]
            values = mask_confidence(torch.from_numpy(maps.maps), others, cut_at)
            sure.add(row["image_id"], maps.class_ids, values.numpy(), label_map, target)
        if target is None:
            continue
        for sweeps in (every, several) if len(row["labels"]) > 1 else (every,):
            sweeps.add(seeds, target)
    images_made = sum(gather_object([made]))
    sure.gather()
    if sure.of_image and run.accelerator.is_main_process:
        write_json(folder / "confidence.json", sure.of_image)
    every.gather()
    several.gather()
    if not every.images:
        return SeedScores(images=images_made)
    swept = every.computed()
    classes = ["background", *class_names(images)]
    in_several = several.computed() if several.images else {}
    return SeedScores(
        images=images_made,
        scored=every.images,
        mask_rule=mask_rule(images),
        miou=best_mious(swept),
        threshold=best_thresholds(swept),
        per_class={
            variant: dict(zip(classes, map(rounded, each.per_class_iou), strict=True))
            for variant, each in swept.items()
        },
        miou_at_recipe_threshold=at_thresholds(swept, dict.fromkeys(run.variants, cut_at)),
        confidence=sure.scores(),
        miou_at_given_threshold=at_thresholds(swept, given_thresholds) if given_thresholds else {},
        several_classes=SeedScores(
            images=several.images, miou=best_mious(in_several), threshold=best_thresholds(in_several)
        )
        if in_several
        else None,
    )


class Confidences:
    """How sure the masks of a split are, and how well that tells good ones from bad ones.

    Args:
        names: Of the object classes.

    Attributes:
        of_image: Image id -> class name -> confidence in [0, 1].
        pairs: (confidence, IoU) of every image and class whose mask is known.
    """

    def __init__(self, names: Sequence[str]):
        self.names = names
        self.of_image: dict[str, ByName] = {}
        self.pairs: list[tuple[float, float]] = []

    def add(
        self,
        image_id: str,
        class_ids: npt.NDArray[np.int64],
        values: npt.NDArray[np.float32],
        label_map: npt.NDArray[np.uint8],
        target: npt.NDArray[np.uint8] | None,
    ) -> None:
        """Count an image: the confidence (K,) of its classes, its label map (H, W), and the true one if known."""
        self.of_image[image_id] = {
            self.names[class_id]: rounded(value) for class_id, value in zip(class_ids, values, strict=True)
        }
        if target is None:
            return
        for class_id, value in zip(class_ids, values, strict=True):
            counted = target != IGNORE_INDEX
            ours, true = (label_map == class_id + 1) & counted, target == class_id + 1
            self.pairs.append((float(value), float((ours & true).sum() / max(1, (ours | true).sum()))))

    def gather(self) -> None:
        """Join the images of all processes."""
        self.of_image = dict(sorted(item for part in gather_object([self.of_image]) for item in part.items()))
        self.pairs = [pair for part in gather_object([self.pairs]) for pair in part]

    def scores(self) -> ByName:
        """Return the rank correlation with the IoU, and how much more often the least sure tenth is bad."""
        if not self.pairs:
            return {}
        confidence, iou = np.array(self.pairs).T
        return {"spearman": rounded(spearman(confidence, iou)), "lift": rounded(lift(confidence, iou))}


class VariantSweeps:
    """A threshold sweep for every seed variant, over the same images.

    Args:
        variants: Names of the seed variants.
        num_classes: Object classes.
    """

    def __init__(self, variants: Iterable[str], num_classes: int):
        self.sweeps = {variant: ThresholdSweep(num_classes) for variant in variants}
        self.images = 0

    def add(self, seeds: Mapping[str, Seeds], target: npt.NDArray[np.uint8]) -> None:
        """Count an image with the true label map (H, W)."""
        self.images += 1
        for variant, maps in seeds.items():
            for rows, strip in seed_strips(maps, target.shape):
                self.sweeps[variant].add(strip, target[rows])

    def gather(self) -> None:
        """Add up the counts of all processes."""
        self.images = sum(gather_object([self.images]))
        for sweep in self.sweeps.values():
            sweep.counts = np.sum(gather_object([sweep.counts]), axis=0)

    def computed(self) -> dict[str, SweepResult]:
        """Return the result of every variant."""
        return {variant: sweep.compute() for variant, sweep in self.sweeps.items()}


def best_mious(swept: Mapping[str, SweepResult]) -> ByName:
    """Return the mIoU in percent at the best threshold of every variant."""
    return {variant: rounded(result.best_miou) for variant, result in swept.items()}


def best_thresholds(swept: Mapping[str, SweepResult]) -> ByName:
    """Return the best threshold of every variant."""
    return {variant: rounded(result.best_threshold) for variant, result in swept.items()}


def at_thresholds(swept: Mapping[str, SweepResult], thresholds: ByName) -> ByName:
    """Return the mIoU in percent at the swept threshold nearest to the given one of every variant."""
    return {
        variant: rounded(result.miou[np.abs(result.thresholds - thresholds[variant]).argmin()])
        for variant, result in swept.items()
    }


def rounded(value: float) -> float:
    """Round to two decimals as a plain float, for JSON."""
    return round(float(value), 2)
