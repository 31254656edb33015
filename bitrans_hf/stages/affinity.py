"""Train an affinity network on label maps that refined seeds agree upon.

accelerate launch training/train_affinity.py --config voc_deit_small

Seeds with much and with little background are refined (dense CRF or pixel-adaptive refinement) and stored as two label
maps for each image: what is an object in the first is trusted, and what is background in the second. The network
learns which neighboring cells have the same label. Existing label maps are kept, and training resumes from its newest
checkpoint. Known pixel labels only score the label maps; training never sees them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from datasets import Dataset
from PIL import Image
from torchvision import transforms

from ..data import class_names, open_image
from ..data.segmentation import resized_label_map
from ..data.training_set import Item, TrainingSet
from ..data.transforms import seeded
from ..file_names import label_path
from ..hub.configuration_affinitynet import RELATIONS, AffinityNetConfig
from ..hub.image_processing_bitrans import BiTransImageProcessor
from ..hub.labels import IGNORE_INDEX
from ..hub.modeling_affinitynet import AffinityNetModel
from ..hub.modeling_bitrans import BiTransModel
from ..hub.weight_files import load_trained
from ..metrics.scores import StepScores
from ..weights import load_backbone
from .build import build_model, evenly_chosen
from .label_maps import (
    Background,
    LabelMap,
    LabelMapJob,
    cell_labels,
    read_label_map,
    run_jobs,
    score_steps,
    seeds_of_split,
    stored_label_maps,
)
from .loop import RateSchedule, TrainingLoop
from .parse import parse_recipe
from .recipe import ALL_IMAGES, AffinityRecipe, BiTransRecipe, Recipe, RunOptions
from .run import Run, Stage, StageError

DEPENDS_ON = ("seed", "data", "model", "train", "seeds", "affinity")

SGD_MOMENTUM = {"literal": 5e-4, "momentum": 0.9}
"""Presets of the optimizer. PSA passes its weight decay, 0.0005, as SGD's momentum."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stage from command-line arguments."""
    train_affinity(*parse_recipe(__doc__, arguments))


def train_affinity(recipe: Recipe, options: RunOptions) -> Path:
    """Make the label maps and train the recipe's affinity network; return the folder of the stage.

    `labels/<split>/low/` and `high/` contain the label maps, `model/` the network and an image processor.
    """
    if recipe.affinity is None:
        raise StageError("the recipe has no section affinity; add it, or --affinity.backbone bitrans, to train one.")
    settings = recipe.affinity
    run = Run.start(recipe, options, "affinity", trains=True)
    stage = Stage(run, "affinity", DEPENDS_ON)
    if stage.was_done_before():
        return stage.folder
    run.say_precision("affinity")

    # ---- Labels
    with run.working("affinity: reading the list of images"):
        images = evenly_chosen(run.images(settings.split, masks=False), settings.num_images)
    labels = stage.folder / "labels" / (settings.split or ALL_IMAGES)
    run.remove_unfinished(labels)
    left_out = make_label_maps(run, settings, images, labels)
    run.say_unreadable(left_out)
    usable = [number for number, image_id in enumerate(images["image_id"]) if image_id not in left_out]
    images = images.select(usable)

    # ---- Network and optimizer
    with run.working("affinity: building the network"):
        model = build_network(run, settings, dict(enumerate(class_names(images))))
    processor = BiTransImageProcessor(
        size={"height": settings.crop_size, "width": settings.crop_size}, max_side=run.max_side
    )
    dataset = AffinityCrops(
        images, labels, model.stride, processor, settings, seed=recipe.seed, strict=run.options.strict
    )
    optimizer = torch.optim.SGD(
        model.parameter_groups(settings.weight_decay),
        lr=settings.learning_rate,
        momentum=SGD_MOMENTUM[settings.optimizer],
    )

    # ---- Loop and result
    rate = RateSchedule("poly", settings.learning_rate, settings.epochs)
    loop = TrainingLoop(settings, stage, model, optimizer, dataset, rate)
    trained = loop.run()
    scores = score_labels(run, evenly_chosen(run.images(settings.split, masks=True), settings.num_images), labels)
    trained = replace(trained, unreadable=sorted({*left_out, *trained.unreadable}))
    loop.finish(trained, processor, labels=scores.to_json())
    if steps := scores.steps:
        run.say(
            f"affinity: mIoU of the labels {steps['low']:.1f} low, {steps['high']:.1f} high, "
            f"{steps['confident']:.1f} on the {scores.sure['confident']:.0f} % of pixels that are sure",
        )
    run.say(f"affinity: loss {trained.scores['loss']:.3f} -> {stage.folder}")
    run.accelerator.wait_for_everyone()
    return stage.folder


# ---- Labels.


def label_backgrounds(settings: AffinityRecipe) -> dict[str, Background]:
    """Return the background scores of the maps "low" (foreground is taken from it) and "high" (background)."""
    relation = RELATIONS[settings.relation]
    thresholds = (settings.foreground_threshold, settings.background_threshold)
    alphas = (settings.low_alpha, settings.high_alpha)
    own_thresholds = relation.label_thresholds or (None, None)
    own_alphas = relation.label_alphas or (None, None)
    chosen = {}
    for name, threshold, alpha, own_threshold, own_alpha in zip(
        ("low", "high"), thresholds, alphas, own_thresholds, own_alphas, strict=True
    ):
        given = threshold is not None or alpha is not None
        chosen[name] = Background(threshold, alpha) if given else Background(own_threshold, own_alpha)
    return chosen


def make_label_maps(
    run: Run,
    settings: AffinityRecipe,
    images: Dataset,
    folder: Path,
) -> set[str]:
    """Write `low/` and `high/` of every image into a folder; return the ids of images that are left out.

    Each process makes its share. Unreadable images and images without seeds, which the seeds stage left out, are left
    out.
    """
    store = seeds_of_split(run, settings.split)
    variant = settings.variant or run.recipe.seeds.variant
    backgrounds = label_backgrounds(settings)
    seeded_ids = set(store.ids())
    without_seeds = set(images["image_id"]) - seeded_ids
    jobs = []
    for index in run.own(len(images)):
        row = images[index]
        outputs = tuple((label_path(folder / name, row["image_id"]), each) for name, each in backgrounds.items())
        if row["image_id"] in seeded_ids and not all(path.is_file() for path, _ in outputs):
            jobs.append(
                LabelMapJob(
                    image_id=row["image_id"],
                    image=row["image"],
                    labels=tuple(row["labels"]),
                    outputs=outputs,
                    refiner=settings.refiner,
                    crf_preset=settings.crf_preset,
                    max_side=run.max_side,
                    seeds=(store.folder, variant),
                    strict=run.options.strict,
                )
            )
    run.announce(f"affinity: label maps of {len(jobs):,} of {len(images):,} images to do, refiner {settings.refiner}")
    broken = run_jobs(run, jobs, len(jobs), settings.refiner, "labels")
    run.wait()
    return without_seeds | run.union(broken)


def score_labels(run: Run, images: Dataset, folder: Path) -> StepScores:
    """Score the label maps "low" and "high" and their agreement, "confident"; see `score_steps`."""
    low_of, high_of = stored_label_maps(folder / "low"), stored_label_maps(folder / "high")

    def confident_of(image_id: str) -> LabelMap | None:
        low, high = low_of(image_id), high_of(image_id)
        return None if low is None or high is None else cell_labels(low, high, 1)

    steps = {"low": low_of, "high": high_of, "confident": confident_of}
    return score_steps(run, images, steps)


# ---- Crops.


class AffinityCrops(TrainingSet[Image.Image]):
    """Random crops of images with the labels of their cells, for the training loop.

    As PSA: images are cropped without scaling (but for the processor's bound on large ones), padded where they are
    smaller, flipped, and their colors jittered. An item is `{"pixel_values": (3, S, S) float, "labels": (S // stride,
    S // stride) int64, "index", "unreadable"}` and a function of (seed, epoch, index) alone. An unreadable image is
    replaced: see `TrainingSet`.

    Args:
        images: Rows of `image_id` and `image`.
        labels: Folder with `low/` and `high/`.
        stride: Pixels of a cell.
        processor: Normalizes.
        settings: The recipe's section.
        seed: Of all random draws.
        strict: Raise instead of replacing an image.

    Raises:
        StageError: there are no images, or a crop is not a whole number of cells.
    """

    def __init__(
        self,
        images: Dataset,
        labels: Path,
        stride: int,
        processor: BiTransImageProcessor,
        settings: AffinityRecipe,
        *,
        seed: int,
        strict: bool,
    ):
        if len(images) == 0:
            raise StageError(f"no image has label maps in {labels}; there is nothing to train on.")
        if settings.crop_size % stride:
            raise StageError(
                f"affinity.crop_size must be a multiple of the network's stride {stride}, got {settings.crop_size}."
            )
        super().__init__(images, ("image",), seed=seed, strict=strict)
        self._labels, self._stride = labels, stride
        self._size, self._processor = settings.crop_size, processor
        jitter = settings.color_jitter
        self._jitter = transforms.ColorJitter(jitter, jitter, jitter, jitter / 3) if jitter else None

    def __getitem__(self, index: int) -> Item:
        picture, origin = self._readable(index)
        shown = self.image_ids[origin.position]
        maps = [
            resized_label_map(read_label_map(label_path(self._labels / name, shown)), (picture.height, picture.width))
            for name in ("low", "high")
        ]
        with seeded(self._seed, int(self._epoch), index):
            pixel_values, (low, high) = self._crop(picture, maps)
        labels = cell_labels(low, high, self._stride)
        return {
            "pixel_values": pixel_values,
            "labels": torch.from_numpy(labels.astype(np.int64)),
            "index": origin.position,
            "unreadable": origin.unreadable,
        }

    def _open(self, row: Mapping[str, Any]) -> Image.Image:
        return self._processor.bounded(open_image(row["image"]))

    def _crop(self, picture: Image.Image, maps: Sequence[LabelMap]) -> tuple[torch.Tensor, list[LabelMap]]:
        size = self._size
        (top, rows), (left, columns) = (random_window(side, size) for side in (picture.height, picture.width))
        window = picture.crop((columns.start, rows.start, columns.stop, rows.stop))
        if self._jitter is not None:
            window = self._jitter(window)
        pixels = torch.zeros(3, size, size)
        place = (slice(top, top + window.height), slice(left, left + window.width))
        pixels[:, place[0], place[1]] = self._processor.normalized(window)
        crops = []
        for label_map in maps:
            crop = np.full((size, size), IGNORE_INDEX, dtype=np.uint8)
            crop[place] = label_map[rows, columns]
            crops.append(crop)
        if torch.rand(()) < 0.5:
            pixels, crops = pixels.flip(-1), [crop[:, ::-1] for crop in crops]
        return pixels, crops


def random_window(side: int, size: int) -> tuple[int, slice]:
    """Draw the position of a crop of `size` along an image's side: (start in the crop, slice of the image).

    A smaller image is taken whole and placed at a random position in the crop.
    """
    start = int(torch.randint(abs(side - size) + 1, ()))
    return (0, slice(start, start + size)) if side >= size else (start, slice(0, side))


# ---- Network.


def build_network(run: Run, settings: AffinityRecipe, id2label: dict[int, str]) -> AffinityNetModel:
    """Build the network of a recipe with its starting weights.

    Args:
        run: The run.
        settings: Its section affinity.
        id2label: Names of the object classes, stored for information: the network relates cells, independent of
            classes.

    Raises:
        StageError: the run's own encoder is wanted and there is none, for example because the run trains a CNN.
    """
    fields = {"relation": settings.relation, "radius": settings.radius, "id2label": id2label, **settings.options}
    set_seed(run.recipe.seed)
    if settings.backbone == "bitrans":
        if settings.weights in ("trained", "scratch"):
            run.refuse_cnn("affinity")
        if settings.weights == "scratch":
            assert isinstance(run.recipe.model, BiTransRecipe)  # no CNN, see above
            new = replace(run.recipe.model, weights="scratch")
            return AffinityNetModel.from_bitrans(build_model(new, id2label, run.recipe.seed), **fields)
        folder = run.trained_model() if settings.weights == "trained" else Path(settings.weights)
        if not folder.is_dir():
            raise StageError(f"no trained model at {folder}; affinity.weights must be the folder of one, or trained.")
        return AffinityNetModel.from_bitrans(load_trained(BiTransModel, folder), **fields)
    model = AffinityNetModel(AffinityNetConfig(backbone=settings.backbone, **fields))
    if settings.weights != "scratch":
        load_backbone(model, None if settings.weights == "timm" else settings.weights)
    return model
