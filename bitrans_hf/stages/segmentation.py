"""Train the segmentation network on pseudo labels.

accelerate launch training/train_segmentation.py --config voc_deit_small

Label maps are checked before the first step: all exist, fit their images, hold known ids, and are not the ground truth
by mistake. An interrupted run resumes from its newest checkpoint. Ground truth is used to score the network on another
split, and for training only if the recipe says `segmentation.labels: ground_truth`.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset, Image
from transformers import set_seed

from ..data import DataError, UnreadableImageError, class_names, open_image, open_mask
from ..data.segmentation import LABEL_MAP, TrainingPairs, open_pair, pair_augmentation, with_label_maps
from ..file_names import label_files
from ..hub.configuration_deeplab import DeepLabConfig
from ..hub.image_processing_bitrans import BiTransImageProcessor
from ..hub.labels import IGNORE_INDEX
from ..hub.maps import enlarged_strips
from ..hub.modeling_bitrans import BiTransModel
from ..hub.modeling_deeplab import DeepLabForSemanticSegmentation
from ..hub.weight_files import load_trained
from ..metrics import confusion_counts, iou_from_counts, miou_from_counts
from ..metrics.scores import NetworkScores, percent
from ..weights import load_backbone
from .build import evenly_chosen
from .loop import RateSchedule, TrainingLoop
from .multi_scale import SINGLE_SCALE, multi_scale_scores
from .parse import parse_recipe
from .recipe import ALL_IMAGES, Recipe, RunOptions, SegmentationRecipe
from .run import Run, Stage, StageError, how_to_run

DEPENDS_ON = ("seed", "data", "model", "train", "seeds", "affinity", "pseudo_labels", "segmentation")

SGD_MOMENTUM = {"mctformer": 1e-5, "deeplab-v1": 0.9}
"""MCTformer passes its weight decay, 0.00001, as SGD's momentum."""

LEARNING_RATE = {"mctformer": 7e-4, "deeplab-v1": 1e-3}
"""Initial learning rates of the presets, for 4 and for 10 images per step."""

LOOKED_AT = 24
"""Number of label maps compared with the ground truth to detect a copy of it."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stage from command-line arguments."""
    train_segmentation(*parse_recipe(__doc__, arguments))


def train_segmentation(recipe: Recipe, options: RunOptions) -> Path:
    """Train the recipe's segmentation network; return the stage's folder, whose `model/` holds it and a processor."""
    if recipe.segmentation is None:
        raise StageError("the recipe has no section segmentation; add it, or --segmentation.backbone bitrans.")
    settings = recipe.segmentation
    run = Run.start(recipe, options, "segmentation", trains=True)
    stage = Stage(run, "segmentation", DEPENDS_ON)
    if stage.was_done_before():
        return stage.folder
    run.say_precision("segmentation")

    # ---- Images and label maps
    with run.working("segmentation: reading the list of images"):
        pairs = labelled_images(run, settings)
    own_crop = {} if settings.crop_size is None else {"crop_size": settings.crop_size}
    augmentation = pair_augmentation(settings.preset, **own_crop, **settings.augmentation_options)
    check_label_maps(run, pairs, augmentation.crop_size / augmentation.scale[1])
    dataset = TrainingPairs(pairs, augmentation, seed=recipe.seed, strict=run.options.strict, max_side=run.max_side)
    validation = None
    if settings.val_split is not None:
        validation = run.images(settings.val_split, masks=True)

    # ---- Network and optimizer
    with run.working("segmentation: building the network"):
        model = build_network(run, settings, class_names(pairs))
    if settings.batch_norm == "sync":
        model = synchronized(model, run.accelerator)
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-arg]  # transformers hides the overloads
    optimizer = make_optimizer(model, settings)
    # Images up to the bound keep their size: the network sees them whole.
    processor = BiTransImageProcessor(do_resize=False, max_side=run.max_side)

    # ---- Loop and result
    peak = LEARNING_RATE[settings.preset] if settings.learning_rate is None else settings.learning_rate
    rate = RateSchedule("poly", peak, settings.epochs)
    loop = TrainingLoop(settings, stage, model, optimizer, dataset, rate)

    scores = NetworkScores()

    def score() -> dict[str, float]:
        nonlocal scores
        epoch = loop.at.step // loop.steps_per_epoch
        if validation is None or (epoch % settings.val_every and epoch < settings.epochs):
            return {}
        scores = validate(run, loop.model, processor, validation)
        return {} if scores.miou is None else {"miou": scores.miou}

    trained = loop.run(score)
    if validation is not None and scores.miou is None:  # resumed after the last epoch
        score()
    loop.finish(trained, processor, **scores.to_json(), labels=settings.labels, images=len(pairs))
    scored = "" if scores.miou is None else f", mIoU {scores.miou:.1f} on {settings.val_split}"
    run.say(f"segmentation: loss {trained.scores['loss']:.3f}{scored} -> {stage.folder}")
    run.accelerator.wait_for_everyone()
    return stage.folder


# ---- Label maps.


def labelled_images(run: Run, settings: SegmentationRecipe) -> Dataset:
    """Load the images of the recipe's split with the label maps that it names.

    Raises:
        StageError: label maps are missing, or are the ground truth without the recipe saying so.
    """
    if settings.labels == "ground_truth":
        images = evenly_chosen(run.images(settings.split, masks=True), settings.num_images)
        cells = list(images.cast_column("mask", Image(decode=False))["mask"])
        missing = [name for name, cell in zip(images["image_id"], cells, strict=True) if cell is None]
        refuse_missing(missing, len(images), "ground-truth mask", "choose a split whose masks are known")
        return with_label_maps(images, cells)

    folder = label_folder(run, settings)
    if not folder.is_dir():
        raise StageError(f"there are no label maps at {folder}; {how_to_make(settings.labels)}.")
    images = evenly_chosen(run.images(settings.split, masks=False), settings.num_images)
    present = label_files(folder)  # one look, not 80,000
    missing = [name for name in images["image_id"] if name not in present]
    refuse_missing(missing, len(images), f"label map in {folder}", how_to_make(settings.labels))
    pairs = with_label_maps(images, [present[name] for name in images["image_id"]])
    refuse_ground_truth(folder, pairs, evenly_chosen(run.images(settings.split, masks=True), settings.num_images))
    return pairs


def label_folder(run: Run, settings: SegmentationRecipe) -> Path:
    """Return the folder of the label maps, if they are not ground truth."""
    split = settings.split or ALL_IMAGES
    own = {
        "pseudo_labels": run.stage_folder("pseudo_labels") / split / "labels",
        "seeds": run.stage_folder("seeds") / split / "masks",
    }
    return own.get(settings.labels, Path(settings.labels))


def how_to_make(labels: str) -> str:
    """Say how to make the label maps of a recipe, as part of a message."""
    if labels in ("pseudo_labels", "seeds"):
        return f"{how_to_run(labels)}, for this split"
    return "segmentation.labels must be pseudo_labels, seeds, ground_truth or a folder of <image_id>.png"


def refuse_missing(missing: Sequence[str], total: int, what: str, remedy: str) -> None:
    """Raise StageError if something is missing, with the count and the first."""
    if missing:
        raise StageError(f"{len(missing)} of {total} images have no {what}, the first is {missing[0]}; {remedy}.")


def refuse_ground_truth(folder: Path, pairs: Dataset, truth: Dataset) -> None:
    """Stop if the label maps are the ground truth, which happens if folders are mixed up.

    Some label maps, spread over the set, are compared with the masks of the data: no method that sees only image
    labels reproduces all of them exactly.

    Raises:
        StageError: every compared one equals its mask wherever the mask is not ignored.
    """
    looked_at = 0
    for number in range(0, len(truth), max(1, len(truth) // (10 * LOOKED_AT))):
        mask = truth[number]["mask"]
        if mask is None or looked_at == LOOKED_AT:
            continue
        try:
            label_map, target = open_mask(pairs[number][LABEL_MAP]), open_mask(mask)
        except DataError:
            return  # `check_label_maps` says what is wrong with it
        looked_at += 1
        counted = target != IGNORE_INDEX
        if label_map.shape != target.shape or bool((label_map != target)[counted].any()):
            return
    if looked_at:
        raise StageError(
            f"the label maps in {folder} are the ground truth: {looked_at} of {looked_at} that were looked at equal "
            "the masks of the data. Give the folder of pseudo labels; for the ceiling say "
            "segmentation.labels ground_truth."
        )


def check_label_maps(run: Run, pairs: Dataset, largest_crop: float) -> None:
    """Open every image and label map once, before hours of training depend on them.

    Args:
        run: Each process works on its share.
        pairs: Images with label maps.
        largest_crop: Least longer side of an image, in pixels before scaling, for a crop to fit in.

    Raises:
        StageError: some label maps do not fit (how many, and what is wrong with the first), or a crop is larger than
            every image.
    """
    num_classes = len(class_names(pairs))
    own = run.own(len(pairs))

    def look(index: int) -> tuple[str, int]:
        """Return what is wrong with a pair, and the longest side of the image."""
        row = pairs[index]
        try:
            image, _ = open_pair(row, num_classes)
        except UnreadableImageError:
            return "", 0  # training leaves it out and names it
        except DataError as error:
            return f"{row['image_id']}: {error}", 0
        return "", max(image.size)

    pool = ThreadPoolExecutor()  # PIL releases the interpreter lock
    try:
        looked = pool.map(look, own)
        found = list(run.progress(looked, total=len(own), desc="check labels", unit="image"))
    finally:
        pool.shutdown(cancel_futures=True)
    wrong = gather_object([message for message, _ in found if message])
    longest = max(gather_object([max((side for _, side in found), default=0)]))
    if wrong:
        raise StageError(f"{len(wrong)} of {len(pairs)} label maps cannot be trained on. The first: {wrong[0]}")
    if longest and longest < largest_crop:
        raise StageError(
            f"the crop is larger than every image: the longest side is {longest} pixels, a crop at the largest scale "
            f"spans {largest_crop:.0f}. Every crop would be mostly padding; lower segmentation.crop_size."
        )


# ---- Network and optimizer.


def build_network(run: Run, settings: SegmentationRecipe, classes: Sequence[str]) -> DeepLabForSemanticSegmentation:
    """Build the recipe's network with its starting weights.

    Raises:
        StageError: there is no trained encoder, or the weights belong to a network for other classes.
        ValueError, OSError: the weights are not there or do not fit, see `load_backbone`.
    """
    names = {0: "background", **dict(enumerate(classes, start=1))}
    options = {"preset": settings.preset, "id2label": names, **settings.options}
    if settings.batch_norm is not None:
        options["freeze_batch_norm"] = settings.batch_norm == "frozen"
    set_seed(run.recipe.seed)
    if settings.weights == "trained":
        run.refuse_cnn("segmentation")
        bitrans = load_trained(BiTransModel, run.trained_model())
        return DeepLabForSemanticSegmentation.from_bitrans(bitrans, **options)
    if Path(settings.weights).is_dir():
        model = load_trained(DeepLabForSemanticSegmentation, settings.weights)
        check_classes(model, classes)
        return model
    model = DeepLabForSemanticSegmentation(DeepLabConfig(backbone=settings.backbone, **options))
    if settings.weights != "scratch":
        load_backbone(model, None if settings.weights == "timm" else settings.weights)
    return model


def check_classes(model: DeepLabForSemanticSegmentation, classes: Sequence[str]) -> None:
    """Check that a network was trained for these object classes.

    Raises:
        StageError: the classes differ.
    """
    known = [name for _, name in sorted((model.config.id2label or {}).items())][1:]
    if known != list(classes):
        raise StageError(
            f"the segmentation network knows the classes {', '.join(known)}, the data {', '.join(classes)}; use the "
            "recipe that it was trained with."
        )


def synchronized(model: DeepLabForSemanticSegmentation, accelerator: Accelerator) -> DeepLabForSemanticSegmentation:
    """Synchronize BatchNorm over all GPUs.

    Raises:
        StageError: on the CPU, which torch does not support.
    """
    if accelerator.device.type != "cuda":
        raise StageError(f"segmentation.batch_norm sync needs GPUs, got {accelerator.device.type}; use trained.")
    converted: DeepLabForSemanticSegmentation = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return converted


def make_optimizer(model: DeepLabForSemanticSegmentation, settings: SegmentationRecipe) -> torch.optim.Optimizer:
    """Build the recipe's optimizer; the loop sets the learning rate of each step."""
    groups = model.parameter_groups(settings.weight_decay)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups)
    return torch.optim.SGD(groups, lr=0.0, momentum=SGD_MOMENTUM[settings.preset])


# ---- Scores.


@torch.no_grad()
def validate(
    run: Run,
    model: torch.nn.Module,
    processor: BiTransImageProcessor,
    images: Dataset,
) -> NetworkScores:
    """Score whole images at one scale; memory does not grow with their number, since only confusion counts are kept.

    Raises:
        StageError: no image has a mask.
    """
    network: torch.nn.Module = run.accelerator.unwrap_model(model)
    network.eval()
    names = ["background", *class_names(images)]
    counts = np.zeros((len(names), len(names)), dtype=np.int64)
    scored = 0
    own: Iterable[int] = run.own(len(images))
    for index in run.progress(own, desc="validate", unit="image", leave=False):
        row = images[index]
        if row["mask"] is None:
            continue
        try:
            image = open_image(row["image"])
        except UnreadableImageError:
            continue
        target = open_mask(row["mask"], image_size=(image.height, image.width), num_classes=len(names) - 1)
        with run.accelerator.autocast():
            pixel_values = processor.normalized(processor.bounded(image)).to(run.accelerator.device)
            scores = multi_scale_scores(network, pixel_values, **SINGLE_SCALE)
        for rows, strip in enlarged_strips(scores, target.shape):
            counts += confusion_counts(strip.argmax(dim=0).cpu().numpy(), target[rows], len(names))
        scored += 1
    counts, scored = np.sum(gather_object([counts]), axis=0), sum(gather_object([scored]))
    if not scored:
        raise StageError("segmentation.val_split has no readable image with a mask; leave it out or name another.")
    per_class = dict(zip(names, map(percent, iou_from_counts(counts)), strict=True))
    return NetworkScores(miou=percent(miou_from_counts(counts)), per_class=per_class, scored=scored)
