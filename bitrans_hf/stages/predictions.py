"""Test the segmentation network: predict whole splits at several scales, refine, score and pack the label maps.

accelerate launch training/predict_masks.py --config voc_deit_small

Every image gets three palette PNGs: for one scale, for all scales, and after the refiner, so that one run scores each
step. Finished images are skipped. Memory holds the scores of only a few images.
"""

import gzip
import io
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset

from ..data import UnreadableImageError, class_names, open_image
from ..data.common import ImageRow
from ..file_names import label_path
from ..files import atomic_write
from ..hub.image_processing_bitrans import BiTransImageProcessor
from ..hub.maps import enlarged_strips
from ..hub.modeling_deeplab import DeepLabForSemanticSegmentation
from ..hub.refiners import par_refiner
from ..hub.weight_files import load_trained
from ..metrics.scores import StepScores, StepsRecord
from ..pool import Outcome
from ..refine.crf import CrfJob, CrfNotInstalledError, check_crf_installed, crf_pool
from ..refine.pseudo_labels import write_label_png
from .label_maps import num_workers, result_of, score_steps, stored_label_maps
from .multi_scale import FUSIONS, TEST_PRESETS, ViewOptions, view_logits
from .parse import parse_recipe
from .recipe import ALL_IMAGES, PredictionRecipe, Recipe, RunOptions
from .run import Run, Stage, StageError, how_to_run
from .segmentation import check_classes

DEPENDS_ON = (
    "seed", "data", "model", "train", "seeds", "affinity", "pseudo_labels", "segmentation", "prediction",
)  # fmt: skip

SINGLE_SCALE, MULTI_SCALE = "single_scale", "multi_scale"
"""Folders of the label maps before the refiner; the last folder is named after the refiner."""

CRF_PRESETS = {"mctformer": "mctformer", "deeplab-v1": "seam-retrain"}
"""The dense CRF at the end of each published test."""

VOC_SERVER_FOLDER = "results/VOC2012/Segmentation/comp6_test_cls"
"""Where the VOC server expects the maps of methods that used other data than VOC's, such as ImageNet or SBD."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stage from command-line arguments."""
    predict_masks(*parse_recipe(__doc__, arguments))


def predict_masks(recipe: Recipe, options: RunOptions) -> Path:
    """Predict and score every split of the recipe; return the folder of the stage.

    `<split>/<step>/*.png` are the label maps after each step.
    """
    if recipe.prediction is None:
        raise StageError("the recipe has no section prediction; add it, or --prediction.preset mctformer.")
    settings = recipe.prediction
    network = None if settings.network is None else Path(settings.network).parent
    run = Run.start(recipe, options, "segmentation", network=network)
    stage = Stage(run, "predictions", DEPENDS_ON)
    if stage.was_done_before():
        return stage.folder
    if settings.refiner == "crf":
        try:
            check_crf_installed()  # before hours of predictions depend on it
        except CrfNotInstalledError as error:
            raise StageError(f"prediction.refiner is crf: {error}") from error
    run.say_precision("segmentation")
    with run.working("predictions: loading the network"):
        model, processor = load_network(run, settings)
    model.to(run.accelerator.device).eval()

    splits: dict[str, StepScores] = {}
    unreadable: set[str] = set()
    for split in settings.splits:
        name = split or ALL_IMAGES
        with run.working(f"predictions: reading the list of {name}"):
            images = run.images(split, masks=True)
        check_classes(model, class_names(images))
        folder = stage.folder / name
        broken = predict_split(run, model, processor, images, folder, settings)
        splits[name] = score_split(run, images, folder, settings)
        if settings.pack and not splits[name].scored and run.accelerator.is_main_process:
            with run.working("predictions: packing"):
                archive = pack_for_voc_server(images["image_id"], folder, settings)
            splits[name] = replace(splits[name], archive=str(archive))
        unreadable |= broken

    record = StepsRecord(miou=next(iter(splits.values())).steps.get(last_step(settings)), splits=splits)
    stage.finish({**record.to_json(), "unreadable": sorted(unreadable)})
    run.say_unreadable(unreadable)
    for name, scores in splits.items():
        run.say(f"predictions: {name}, {scores.shown_images()}, {scores.shown()}")
    run.say(f"predictions: -> {stage.folder}")
    run.accelerator.wait_for_everyone()
    return stage.folder


# ---- The network.


def load_network(run: Run, settings: PredictionRecipe) -> tuple[DeepLabForSemanticSegmentation, BiTransImageProcessor]:
    """Load the segmentation network and its image processor.

    Raises:
        StageError: it does not exist.
    """
    own = run.stage_folder("segmentation") / "model"
    folder = own if settings.network is None else Path(settings.network)
    if not (folder / "config.json").is_file():
        raise StageError(f"no segmentation network at {folder}; {how_to_run('segmentation')}.")
    processor = BiTransImageProcessor.from_pretrained(folder)
    processor.max_side = run.max_side
    return load_trained(DeepLabForSemanticSegmentation, folder), processor


# ---- Label maps.


def last_step(settings: PredictionRecipe) -> str:
    """Return the name of the step whose label maps are the prediction."""
    return MULTI_SCALE if settings.refiner == "none" else settings.refiner


def steps(settings: PredictionRecipe) -> list[str]:
    """Return the names of all steps in order; the folders have the same names."""
    return list(dict.fromkeys([SINGLE_SCALE, MULTI_SCALE, last_step(settings)]))


def view_options(settings: PredictionRecipe) -> ViewOptions:
    """Return the views of the recipe: the preset's, with the recipe's own scales and flip if given."""
    views = TEST_PRESETS[settings.preset].copy()
    if settings.scales is not None:
        views["scales"] = settings.scales
    if settings.flip is not None:
        views["flip"] = settings.flip
    return views


@dataclass(frozen=True)
class Prediction:
    """Scores of one image before the last step, at its bounded size.

    Attributes:
        size: (H, W) of the image and of its label maps.
        label_ids: (L,) ids of the rows of `scores`, background first.
        image: (h, w, 3) uint8.
        scores: (L, h, w) float32.
    """

    size: tuple[int, int]
    label_ids: npt.NDArray[np.uint8]
    image: npt.NDArray[np.uint8]
    scores: npt.NDArray[np.float32]

    def label_map(self, scores: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        """Return the label with the highest score (L, h, w) at each pixel: (H, W)."""
        return label_map_of(torch.from_numpy(scores), self.label_ids, self.size)


def label_map_of(
    scores: torch.Tensor, label_ids: npt.NDArray[np.uint8], size: tuple[int, int]
) -> npt.NDArray[np.uint8]:
    """Return the label with the highest score (L, h, w), enlarged to (H, W), at each pixel: (H, W)."""
    strips = enlarged_strips(scores, size)
    return np.concatenate([label_ids[strip.argmax(dim=0).cpu().numpy()] for _, strip in strips])


def predict_split(
    run: Run,
    model: DeepLabForSemanticSegmentation,
    processor: BiTransImageProcessor,
    images: Dataset,
    folder: Path,
    settings: PredictionRecipe,
) -> set[str]:
    """Write this process's share of a split's label maps; return the ids of unusable images of all processes.

    The network runs here while a pool of processes refines earlier images. An image is finished when its last label
    map exists.

    Raises:
        StageError: the refiner failed on an image; finished images are kept.
    """
    own = run.own(len(images))
    ids, final = images["image_id"], folder / last_step(settings)
    todo = [index for index in own if not label_path(final, ids[index]).is_file()]
    run.announce(
        f"predictions: {len(todo):,} of {len(own):,} images of {folder.name} to do; refiner {settings.refiner}, "
        f"device {run.accelerator.device.type}"
    )
    waiting: dict[str, Prediction] = {}
    unusable: set[str] = set()

    def jobs() -> Iterator[tuple[str, CrfJob]]:
        for index in todo:
            row = images[index]
            try:
                made = predict_image(run, model, processor, row, folder, settings)
            except UnreadableImageError:
                if run.options.strict:
                    raise
                unusable.add(row["image_id"])
                continue
            waiting[row["image_id"]] = made
            yield row["image_id"], CrfJob(made.image, made.scores)

    refined: Iterable[Outcome[npt.NDArray[np.float32]]]
    if settings.refiner == "crf":
        workers = num_workers(run, len(todo))
        preset = settings.crf_preset or CRF_PRESETS[settings.preset]
        refined = crf_pool(jobs(), preset=preset, processes=workers, progress=None)
    else:
        refined = (Outcome(image_id, job.scores) for image_id, job in jobs())
    for outcome in run.progress(refined, total=len(todo), desc=folder.name, unit="image"):
        made = waiting.pop(outcome.image_id)
        label_map = made.label_map(result_of(outcome))
        write_label_png(label_path(final, outcome.image_id), label_map, outcome.image_id)
    run.wait()
    return run.union(unusable)


@torch.no_grad()
def predict_image(
    run: Run,
    model: DeepLabForSemanticSegmentation,
    processor: BiTransImageProcessor,
    row: ImageRow,
    folder: Path,
    settings: PredictionRecipe,
) -> Prediction:
    """Pass one image through the network and write its label maps of all steps but the last.

    The refiner "par" runs here and not in another process: it uses torch, and is fast on the device of the scores.
    """
    image = open_image(row["image"])
    size = (image.height, image.width)
    image = processor.bounded(image)
    pixels = np.array(image)
    single, fused = single_and_fused_scores(
        run, model, processor.normalized(image).to(run.accelerator.device), settings
    )
    winners = fused.argmax(dim=0).unique()
    all_ids = np.arange(len(fused), dtype=np.uint8)
    for step, scores in ((SINGLE_SCALE, single), (MULTI_SCALE, fused)):
        if step != last_step(settings):
            path = label_path(folder / step, row["image_id"])
            write_label_png(path, label_map_of(scores, all_ids, size), row["image_id"])

    # Background and the classes that win some pixel: what makes 80 classes affordable.
    labels = winners[winners > 0].cpu()
    labels = torch.cat([torch.zeros(1, dtype=labels.dtype), labels])  # background first, always
    best = fused[labels.to(fused.device)].cpu().numpy()
    if settings.refiner == "par" and len(labels) > 1:
        best = par_refiner(pixels, best, device=fused.device)
    return Prediction(size, labels.numpy().astype(np.uint8), pixels, best)


def single_and_fused_scores(
    run: Run,
    model: DeepLabForSemanticSegmentation,
    pixel_values: torch.Tensor,
    settings: PredictionRecipe,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scores (1 + C, H, W) of the image as it is, and those of all views fused."""
    views = view_options(settings)
    single: torch.Tensor | None = None

    def logits(scales: Sequence[float], flip: bool) -> Iterator[torch.Tensor]:
        nonlocal single
        with run.accelerator.autocast():
            for view in view_logits(
                model,
                pixel_values,
                scales=scales,
                flip=flip,
                align_image=views["align_image"],
                align_logits=views["align_logits"],
                window=settings.window,
                stride=settings.stride,
            ):
                if view.scale == 1.0 and not view.flipped:
                    single = view.logits.softmax(dim=0)
                yield view.logits

    fused = FUSIONS[views["fusion"]](logits(views["scales"], views["flip"]))
    if single is None:  # the recipe's scales leave 1.0 out
        list(logits([1.0], False))
    assert single is not None
    return single, fused


# ---- Scores.


def score_split(run: Run, images: Dataset, folder: Path, settings: PredictionRecipe) -> StepScores:
    """Score the label maps of a split after every step, if masks are known."""
    scores = score_steps(run, images, {step: stored_label_maps(folder / step) for step in steps(settings)})
    final = folder / last_step(settings)
    return replace(scores, images=sum(label_path(final, image_id).is_file() for image_id in images["image_id"]))


# ---- The VOC server.


def pack_for_voc_server(image_ids: Sequence[str], folder: Path, settings: PredictionRecipe) -> Path:
    """Pack the predictions of a split as the VOC evaluation server wants them; return the archive.

    The same predictions give the same bytes, so that two archives can be compared.

    Raises:
        StageError: a prediction is missing.
    """
    files = {image_id: label_path(folder / last_step(settings), image_id) for image_id in image_ids}
    missing = [image_id for image_id, path in files.items() if not path.is_file()]
    if missing:
        raise StageError(
            f"{len(missing)} of {len(files)} images have no prediction, the first is {missing[0]}; the VOC server "
            "needs all of them. Fix or replace these images and rerun the command."
        )
    archive = folder / "comp6_test_cls.tar.gz"
    with (
        atomic_write(archive) as temporary,
        temporary.open("wb") as raw,
        gzip.GzipFile(fileobj=raw, mode="wb", filename="", mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as tar,
    ):
        for image_id, path in sorted(files.items()):
            content = path.read_bytes()
            entry = tarfile.TarInfo(f"{VOC_SERVER_FOLDER}/{image_id}.png")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return archive
