"""Make class seeds and label maps with a trained model, and score them where masks are known.

accelerate launch training/make_seeds.py --config voc_deit_small

Images whose seeds are already there are not done again, so that a run that was killed goes on. All four variants
(SC-CAM, Coarse-CAM, their product, the refined product) come from the same forward passes and are kept; a plain CNN
has the second alone.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset

from ..data import UnreadableImageError, class_names, image_size, mask_rule, open_image, open_mask
from ..file_names import label_path
from ..hub.image_processing_bitrans import MAX_SIDE, BiTransImageProcessor, bounded_size
from ..hub.modeling_bitrans import BiTransModel
from ..hub.modeling_cam import CamModel
from ..hub.seeds import seed_strips, sum_over_views
from ..hub.weight_files import load_trained
from ..metrics import SweepResult, ThresholdSweep
from ..progress import size_text
from ..refine.pseudo_labels import seeds_to_label_map, write_label_png
from ..store import SeedStore
from .label_maps import scored_images
from .parse import parse_recipe
from .recipe import ALL_IMAGES, CamRecipe, Recipe, RunOptions, SeedsRecipe
from .run import Run, Stage, StageError

DEPENDS_ON = ("seed", "data", "model", "train", "seeds")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stage from command-line arguments."""
    make_seeds(*parse_recipe(__doc__, arguments))


def make_seeds(recipe: Recipe, options: RunOptions) -> Path:
    """Make the seeds and label maps of every split of the recipe; return the folder of the stage.

    `<split>/seeds/*.npz` holds the seeds, `<split>/masks/*.png` the label maps of `seeds.variant` cut at
    `seeds.threshold`. `metrics.json` has the best threshold of every variant and its score, and for every further
    split also the score at the first split's best threshold, which is the honest one where masks are only for testing.
    """
    run = Run.start(recipe, options)
    stage = Stage(run, "seeds", DEPENDS_ON)
    if stage.was_done_before():
        return stage.folder
    run.say_precision("train")
    trained = run.trained_model()
    model: BiTransModel | CamModel
    with run.working("seeds: loading the model"):
        if isinstance(recipe.model, CamRecipe):
            model = load_trained(CamModel, trained)
        else:
            names = ("num_seed_layers", "num_affinity_layers")
            changed = {name: value for name in names if (value := getattr(recipe.seeds, name)) is not None}
            model = load_trained(BiTransModel, trained, **changed)
        model = model.to(run.accelerator.device).eval()
    processor = BiTransImageProcessor.from_pretrained(trained)
    processor.max_side = run.max_side

    splits: dict[str, dict[str, Any]] = {}
    unreadable: set[str] = set()
    for split in recipe.seeds.splits:
        name = split or ALL_IMAGES
        with run.working(f"seeds: reading the list of {name}"):
            images = run.images(split, masks=True)
        known = [name for _, name in sorted((model.config.id2label or {}).items())]
        wanted = class_names(images)
        if known != wanted:
            raise StageError(
                f"the model knows the classes {', '.join(known)}, the data {', '.join(wanted)}; "
                "use the recipe that the model was trained with."
            )
        folder = stage.folder / name
        broken, reduced = extract_split(run, model, processor, images, SeedStore(folder / "seeds"))
        first = next(iter(splits.values()), {}).get("threshold")
        scores = score_split(run, images, folder, first)
        splits[name] = {**scores, "reduced": reduced} if reduced else scores
        unreadable |= broken

    head = next(iter(splits.values()))
    stage.finish(
        {
            **{key: head[key] for key in ("miou", "threshold") if key in head},
            "max_side": run.max_side,
            "splits": splits,
            "unreadable": sorted(unreadable),
        }
    )
    run.say_unreadable(unreadable)
    for name, scores in splits.items():
        shown = "no masks to score against"
        if "miou" in scores:
            shown = "mIoU " + ", ".join(
                f"{variant} {value:.1f} (at {scores['threshold'][variant]:.2f})"
                for variant, value in scores["miou"].items()
            )
        run.say(f"seeds: {name}, {scored_images(scores)}, {shown}")
    run.say(f"seeds: -> {stage.folder}")
    run.accelerator.wait_for_everyone()
    return stage.folder


def extract_split(
    run: Run,
    model: BiTransModel | CamModel,
    processor: BiTransImageProcessor,
    images: Dataset,
    store: SeedStore,
) -> tuple[set[str], int]:
    """Write the seeds of this process' share of a split.

    Images of one size go through the network together. Images with a longer side than the processor's bound are
    reduced to it, and as many of them go together as keeps the memory of `batch_size` images of the usual bound. One
    scale keeps its maps on the token grid, several scales are summed at a quarter of the image.

    Returns:
        The ids of unusable images and the number of larger images, of all processes and whatever was done before.
    """
    assert processor.max_side is not None
    settings = run.recipe.seeds
    unreadable: set[str] = set()
    reduced = 0
    smallest = model.config.stride if isinstance(model, CamModel) else model.config.patch_size
    todo = defaultdict(list)
    own = run.own(len(images))
    for index in run.progress(own, desc="sizes of the images", unit="image"):
        row = images[index]
        if row["image_id"] in store:
            size = store.size(row["image_id"])
            reduced += bounded_size(size, processor.max_side) != size
            continue
        try:
            size = image_size(row["image"])
            check_size(row["image_id"], size, bounded_size(size, processor.max_side), settings.scales, smallest)
            reduced += bounded_size(size, processor.max_side) != size
            todo[size].append(index)
        except UnreadableImageError:
            if run.options.strict:
                raise
            unreadable.add(row["image_id"])
    worked_at = {size: bounded_size(size, processor.max_side) for size in todo}
    numbers = {size: images_at_once(worked_at[size], settings.batch_size) for size in todo}
    batches = [
        (size, indices[start : start + numbers[size]])
        for size, indices in sorted(todo.items())
        for start in range(0, len(indices), numbers[size])
    ]
    num_views = len(settings.scales) * (2 if settings.flip else 1)
    run.announce(
        f"seeds: {sum(map(len, todo.values())):,} of {len(own):,} images to do, {num_views} view(s) of each; batch "
        f"size {settings.batch_size}, {run.accelerator.num_processes} process(es), device "
        f"{run.accelerator.device.type}"
    )
    total = sum(gather_object([reduced]))
    if batches:
        need = max(memory_of_views(model, worked_at[size], settings, len(indices)) for size, indices in batches)
        run.announce(f"seeds: the largest batch takes about {size_text(need)} of memory beside the model's")
    if total:
        run.say(
            f"seeds: {total} of {len(images)} images are larger than {processor.max_side} pixels and are reduced to "
            "that (seeds.max_side); their label maps have the images' own sizes",
        )

    def network(pixel_values: torch.Tensor) -> Any:
        # Its maps are float32 and stay so: refining them in bfloat16 would round them.
        with run.accelerator.autocast():
            return model(pixel_values)

    for size, indices in run.progress(batches, desc="seeds", unit="batch"):
        rows, views = [], []
        for index in indices:
            row = images[index]
            try:
                image = processor.bounded(open_image(row["image"]))
                views.append(processor.scaled_views(image, settings.scales))
                rows.append(row)
            except UnreadableImageError:
                if run.options.strict:
                    raise
                unreadable.add(row["image_id"])
        if not rows:
            continue
        batch = [torch.cat(scale).to(run.accelerator.device) for scale in zip(*views, strict=True)]
        height, width = worked_at[size]
        totals = sum_over_views(
            network,
            batch,
            run.variants,
            flip=settings.flip,
            size=None if len(settings.scales) == 1 else (-(-height // 4), -(-width // 4)),
            refine_steps=settings.refine_steps,
            normalize_affinity=settings.normalize_affinity,
        )
        for position, row in enumerate(rows):
            class_ids = np.array(row["labels"], dtype=np.int64)
            maps = {variant: total[position, row["labels"]].float().cpu() for variant, total in totals.items()}
            store.write(row["image_id"], class_ids, maps, size)
    run.wait()
    return run.union(unreadable), total


def images_at_once(size: tuple[int, int], batch_size: int) -> int:
    """Return how many images of a size go through the network together: at least one, at most `batch_size`.

    The memory of attention maps grows with the square of the area. As many images go together as take no more of it
    than `batch_size` images of `MAX_SIDE` by `MAX_SIDE` pixels.
    """
    share = MAX_SIDE**2 / (size[0] * size[1])
    return max(1, min(batch_size, int(batch_size * share**2)))


def memory_of_views(
    model: BiTransModel | CamModel, size: tuple[int, int], recipe: SeedsRecipe, num_images: int
) -> float:
    """Estimate the bytes that a batch takes in the network, beside the weights.

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


def check_size(
    image_id: str, size: tuple[int, int], working: tuple[int, int], scales: Sequence[float], patch_size: int
) -> None:
    """Check that an image of (height, width) pixels holds a patch at every scale of the size that it is worked on at.

    Raises:
        UnreadableImageError: it does not; such an image is left out as a broken one is.
    """
    if round(min(working) * min(scales)) >= patch_size:
        return
    if min(size) < patch_size:
        remedy = "enlarge it or leave it out"
    elif round(min(size) * min(scales)) < patch_size:
        remedy = "leave out the small factors of seeds.scales, or enlarge the image"
    else:
        remedy = "raise seeds.max_side, or cut the image into pieces"
    raise UnreadableImageError(
        f"image {image_id} is smaller than a patch: {size[0]} x {size[1]} pixels (height x width)"
        + (f", worked on at {working[0]} x {working[1]}" if working != size else "")
        + f", at scale {min(scales)}; expected at least {patch_size} x {patch_size}: {remedy}."
    )


def score_split(
    run: Run,
    images: Dataset,
    folder: Path,
    given_thresholds: dict[str, float] | None,
) -> dict[str, Any]:
    """Write the label maps of a split and score its seeds at every threshold in one pass.

    Returns:
        "images": how many have seeds. With masks, "mask_rule" says how those were made, and for each variant in
        percent over all classes and background: "miou" at its best "threshold" and "per_class" IoU there;
        "miou_at_recipe_threshold"; with `given_thresholds` also "miou_at_given_threshold"; "several_classes" repeats
        the scores for images with two or more classes.
    """
    recipe, variants = run.recipe, run.variants
    store = SeedStore(folder / "seeds")
    num_classes = len(class_names(images))
    sweeps = {
        subset: {variant: ThresholdSweep(num_classes) for variant in variants} for subset in ("all", "several_classes")
    }
    counts = {"images": 0, "scored": 0, "several_classes": 0}
    own = run.own(len(images))
    for index in run.progress(own, desc="score", unit="image"):
        row = images[index]
        if row["image_id"] not in store:
            continue
        counts["images"] += 1
        max_side, size = run.max_side, store.size(row["image_id"])
        seeds = store.read_variants(row["image_id"], variants, max_side=max_side)
        label_map = seeds_to_label_map(seeds[recipe.seeds.variant], recipe.seeds.threshold, size)
        write_label_png(label_path(folder / "masks", row["image_id"]), label_map, row["image_id"])
        if row["mask"] is None:
            continue
        target = open_mask(row["mask"], image_size=label_map.shape, num_classes=num_classes)
        counts["scored"] += 1
        counts["several_classes"] += len(row["labels"]) > 1
        for variant, maps in seeds.items():
            for rows, strip in seed_strips(maps, size):
                sweeps["all"][variant].add(strip, target[rows])
                if len(row["labels"]) > 1:
                    sweeps["several_classes"][variant].add(strip, target[rows])
    counts = {name: sum(part[name] for part in gather_object([counts])) for name in counts}
    for by_variant in sweeps.values():
        for sweep in by_variant.values():
            sweep.counts = np.sum(gather_object([sweep.counts]), axis=0)

    result: dict[str, Any] = {"images": counts["images"]}
    if counts["scored"]:
        swept = {variant: sweep.compute() for variant, sweep in sweeps["all"].items()}
        classes = ["background", *class_names(images)]
        result |= {"scored": counts["scored"], "mask_rule": mask_rule(images), **best_scores(swept)}
        result["per_class"] = {
            variant: dict(zip(classes, map(rounded, each.per_class_iou), strict=True))
            for variant, each in swept.items()
        }
        result["miou_at_recipe_threshold"] = at_thresholds(swept, dict.fromkeys(variants, recipe.seeds.threshold))
        if given_thresholds:
            result["miou_at_given_threshold"] = at_thresholds(swept, given_thresholds)
    if counts["several_classes"]:
        swept = {variant: sweep.compute() for variant, sweep in sweeps["several_classes"].items()}
        result["several_classes"] = {"images": counts["several_classes"], **best_scores(swept)}
    return result


def best_scores(swept: dict[str, SweepResult]) -> dict[str, dict[str, float]]:
    """Return "miou" in percent at the best "threshold" of every variant."""
    return {
        "miou": {variant: rounded(result.best_miou) for variant, result in swept.items()},
        "threshold": {variant: rounded(result.best_threshold) for variant, result in swept.items()},
    }


def at_thresholds(swept: dict[str, SweepResult], thresholds: dict[str, float]) -> dict[str, float]:
    """Return the mIoU in percent at the swept threshold nearest to the given one of every variant."""
    return {
        variant: rounded(result.miou[np.abs(result.thresholds - thresholds[variant]).argmin()])
        for variant, result in swept.items()
    }


def rounded(value: float) -> float:
    """Round to two decimals as a plain float, for JSON."""
    return round(float(value), 2)
