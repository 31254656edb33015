"""Make class seeds and label maps with a trained model, and score them where masks are known.

accelerate launch training/make_seeds.py --config voc_deit_small

Images whose seeds are already there are not done again, so that a run that was killed goes on. All four variants
(SC-CAM, Coarse-CAM, their product, the refined product) come from the same forward passes and are kept; a plain CNN
has the second alone.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
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
from .build import load_images
from .label_maps import scored_images
from .parse import parse_recipe
from .recipe import ALL_IMAGES, Recipe, RunOptions, SeedsRecipe, max_side_of, variants_of
from .run import (
    Stage,
    StageError,
    announce,
    make_accelerator,
    model_folder,
    progress,
    say,
    say_precision,
    say_unreadable,
    wait_for_everyone,
    working,
)

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
    accelerator = make_accelerator(recipe, options)
    stage = Stage(recipe, "seeds", DEPENDS_ON, accelerator)
    if stage.done:
        say(accelerator, f"seeds: already done, {stage.folder}")
        return stage.folder
    say_precision(accelerator, recipe, "train")
    trained = model_folder(recipe)
    model: BiTransModel | CamModel
    with working("seeds: loading the model", accelerator, options):
        if recipe.model.architecture == "cam":
            model = load_trained(CamModel, trained)
        else:
            names = ("num_seed_layers", "num_affinity_layers")
            changed = {name: value for name in names if (value := getattr(recipe.seeds, name)) is not None}
            model = load_trained(BiTransModel, trained, **changed)
        model = model.to(accelerator.device).eval()
    processor = BiTransImageProcessor.from_pretrained(trained)
    processor.max_side = max_side_of(recipe)
    variants = variants_of(recipe)

    splits: dict[str, dict[str, Any]] = {}
    unreadable: set[str] = set()
    for split in recipe.seeds.splits:
        name = split or ALL_IMAGES
        with working(f"seeds: reading the list of {name}", accelerator, options):
            images = load_images(recipe.data, split, masks=True)
        known = [name for _, name in sorted((model.config.id2label or {}).items())]
        wanted = class_names(images)
        if known != wanted:
            raise StageError(
                f"the model knows the classes {', '.join(known)}, the data {', '.join(wanted)}; "
                "use the recipe that the model was trained with."
            )
        folder = stage.folder / name
        broken, reduced = extract_split(
            accelerator, model, processor, images, SeedStore(folder / "seeds"), variants, recipe.seeds, options
        )
        first = next(iter(splits.values()), {}).get("threshold")
        scores = score_split(accelerator, images, folder, variants, recipe, first, options)
        splits[name] = {**scores, "reduced": reduced} if reduced else scores
        unreadable |= broken

    head = next(iter(splits.values()))
    stage.finish(
        {
            **{key: head[key] for key in ("miou", "threshold") if key in head},
            "max_side": max_side_of(recipe),
            "splits": splits,
            "unreadable": sorted(unreadable),
        }
    )
    say_unreadable(accelerator, unreadable)
    for name, scores in splits.items():
        shown = "no masks to score against"
        if "miou" in scores:
            shown = "mIoU " + ", ".join(
                f"{variant} {value:.1f} (at {scores['threshold'][variant]:.2f})"
                for variant, value in scores["miou"].items()
            )
        say(accelerator, f"seeds: {name}, {scored_images(scores)}, {shown}")
    say(accelerator, f"seeds: -> {stage.folder}")
    accelerator.wait_for_everyone()
    return stage.folder


def extract_split(
    accelerator: Accelerator,
    model: BiTransModel | CamModel,
    processor: BiTransImageProcessor,
    images: Dataset,
    store: SeedStore,
    variants: Mapping[str, tuple[str, bool]],
    recipe: SeedsRecipe,
    options: RunOptions,
) -> tuple[set[str], int]:
    """Write the seeds of this process' share of a split.

    Images of one size go through the network together. Images with a longer side than the processor's bound are
    reduced to it, and as many of them go together as keeps the memory of `batch_size` images of the usual bound. One
    scale keeps its maps on the token grid, several scales are summed at a quarter of the image.

    Returns:
        The ids of unusable images and the number of larger images, of all processes and whatever was done before.
    """
    assert processor.max_side is not None
    unreadable: set[str] = set()
    reduced = 0
    smallest = model.config.stride if isinstance(model, CamModel) else model.config.patch_size
    todo = defaultdict(list)
    own = range(accelerator.process_index, len(images), accelerator.num_processes)
    for index in progress(own, accelerator, options, desc="sizes of the images", unit="image"):
        row = images[index]
        if row["image_id"] in store:
            size = store.size(row["image_id"])
            reduced += bounded_size(size, processor.max_side) != size
            continue
        try:
            size = image_size(row["image"])
            check_size(row["image_id"], size, bounded_size(size, processor.max_side), recipe.scales, smallest)
            reduced += bounded_size(size, processor.max_side) != size
            todo[size].append(index)
        except UnreadableImageError:
            if options.strict:
                raise
            unreadable.add(row["image_id"])
    worked_at = {size: bounded_size(size, processor.max_side) for size in todo}
    numbers = {size: images_at_once(worked_at[size], recipe.batch_size) for size in todo}
    batches = [
        (size, indices[start : start + numbers[size]])
        for size, indices in sorted(todo.items())
        for start in range(0, len(indices), numbers[size])
    ]
    num_views = len(recipe.scales) * (2 if recipe.flip else 1)
    announce(
        f"seeds: {sum(map(len, todo.values())):,} of {len(own):,} images to do, {num_views} view(s) of each; batch "
        f"size {recipe.batch_size}, {accelerator.num_processes} process(es), device {accelerator.device.type}",
        accelerator,
        options,
    )
    total = sum(gather_object([reduced]))
    if batches:
        need = max(memory_of_views(model, worked_at[size], recipe, len(indices)) for size, indices in batches)
        announce(
            f"seeds: the largest batch takes about {size_text(need)} of memory beside the model's",
            accelerator,
            options,
        )
    if total:
        say(
            accelerator,
            f"seeds: {total} of {len(images)} images are larger than {processor.max_side} pixels and are reduced to "
            "that (seeds.max_side); their label maps have the images' own sizes",
        )

    def network(pixel_values: torch.Tensor) -> Any:
        # Its maps are float32 and stay so: refining them in bfloat16 would round them.
        with accelerator.autocast():
            return model(pixel_values)

    for size, indices in progress(batches, accelerator, options, desc="seeds", unit="batch"):
        rows, views = [], []
        for index in indices:
            row = images[index]
            try:
                image = processor.bounded(open_image(row["image"]))
                views.append(processor.scaled_views(image, recipe.scales))
                rows.append(row)
            except UnreadableImageError:
                if options.strict:
                    raise
                unreadable.add(row["image_id"])
        if not rows:
            continue
        batch = [torch.cat(scale).to(accelerator.device) for scale in zip(*views, strict=True)]
        height, width = worked_at[size]
        totals = sum_over_views(
            network,
            batch,
            variants,
            flip=recipe.flip,
            size=None if len(recipe.scales) == 1 else (-(-height // 4), -(-width // 4)),
            refine_steps=recipe.refine_steps or 1,
            normalize_affinity=bool(recipe.normalize_affinity),
        )
        for position, row in enumerate(rows):
            class_ids = np.array(row["labels"], dtype=np.int64)
            maps = {variant: total[position, row["labels"]].float().cpu() for variant, total in totals.items()}
            store.write(row["image_id"], class_ids, maps, size)
    wait_for_everyone(accelerator, options)
    return set(gather_object(sorted(unreadable))), total


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
    accelerator: Accelerator,
    images: Dataset,
    folder: Path,
    variants: Collection[str],
    recipe: Recipe,
    given_thresholds: dict[str, float] | None,
    options: RunOptions,
) -> dict[str, Any]:
    """Write the label maps of a split and score its seeds at every threshold in one pass.

    Returns:
        "images": how many have seeds. With masks, "mask_rule" says how those were made, and for each variant in
        percent over all classes and background: "miou" at its best "threshold" and "per_class" IoU there;
        "miou_at_recipe_threshold"; with `given_thresholds` also "miou_at_given_threshold"; "several_classes" repeats
        the scores for images with two or more classes.
    """
    store = SeedStore(folder / "seeds")
    num_classes = len(class_names(images))
    sweeps = {
        subset: {variant: ThresholdSweep(num_classes) for variant in variants} for subset in ("all", "several_classes")
    }
    counts = {"images": 0, "scored": 0, "several_classes": 0}
    own = range(accelerator.process_index, len(images), accelerator.num_processes)
    for index in progress(own, accelerator, options, desc="score", unit="image"):
        row = images[index]
        if row["image_id"] not in store:
            continue
        counts["images"] += 1
        max_side, size = max_side_of(recipe), store.size(row["image_id"])
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
