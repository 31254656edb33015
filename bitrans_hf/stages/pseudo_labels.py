"""Make pseudo labels from seeds: by a random walk along learned affinities, or by a refiner alone.

accelerate launch training/make_pseudo_labels.py --config voc_deit_small

Every image with seeds gets a label map: the background score joins the seeds, all scores are propagated by a random
walk along the affinities of the trained network, a refiner follows if the recipe names one, and the highest score
wins. Finished images are skipped, so an interrupted run can be resumed and writes the same files. If masks are known,
the label maps after each step are scored.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator

from ..data import UnreadableImageError, class_names, image_size, open_image
from ..data.common import ImageRow
from ..file_names import label_path
from ..hub.configuration_affinitynet import RELATIONS
from ..hub.image_processing_bitrans import BiTransImageProcessor, bounded_image
from ..hub.modeling_affinitynet import AffinityNetModel
from ..hub.weight_files import load_trained
from ..metrics.scores import StepScores, StepsRecord
from ..refine.pseudo_labels import scores_to_label_map, seeds_to_label_map, write_label_png
from ..refine.random_walk import propagate_scores
from .label_maps import (
    Background,
    LabelMap,
    LabelMapJob,
    read_seeds,
    run_jobs,
    score_steps,
    seeds_of_split,
    stored_label_maps,
)
from .parse import parse_recipe
from .recipe import ALL_IMAGES, PseudoLabelsRecipe, Recipe, RunOptions
from .records import read_json
from .run import Run, Stage, StageError, how_to_run


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stage from command-line arguments."""
    make_pseudo_labels(*parse_recipe(__doc__, arguments))


def make_pseudo_labels(recipe: Recipe, options: RunOptions) -> Path:
    """Make the pseudo labels of every split of the recipe; return the folder of the stage.

    `<split>/labels/*.png` are the pseudo labels; `<split>/walk/*.png` those before the refiner, where one follows the
    walk. `metrics.json` has "miou" of the first split's pseudo labels and, for each split with masks, the mIoU after
    each step.
    """
    settings = recipe.pseudo_labels
    if settings is None:
        raise StageError("the recipe has no section pseudo_labels; add it, or --pseudo_labels.method refiner.")
    network = None if settings.network is None else Path(settings.network).parent
    run = Run.start(recipe, options, "affinity", network=network)
    stage = Stage(run, "pseudo_labels", depends_on(settings))
    if stage.was_done_before():
        return stage.folder
    walk = None
    if settings.method == "random_walk":
        run.say_precision("affinity")
        with run.working("pseudo_labels: loading the affinity network"):
            walk = RandomWalk.of(run, settings)
    background = background_of(run, settings)
    run.remove_unfinished(stage.folder)

    splits: dict[str, StepScores] = {}
    left_out: set[str] = set()
    for split in settings.splits:
        name = split or ALL_IMAGES
        with run.working(f"pseudo_labels: reading the list of {name}"):
            labels = SplitLabels(run, split, stage.folder / name, background, walk)
        if split == settings.splits[0] and labels.note_on_classes():
            run.say(f"pseudo_labels: {labels.note_on_classes()}")
        left_out |= labels.make()
        splits[name] = labels.score()

    steps = next(iter(splits.values())).steps
    record = StepsRecord(miou=steps.get("refined" if settings.refiner != "none" else "walk"), splits=splits)
    stage.finish(
        {
            **record.to_json(),
            **({"steps": steps} if steps else {}),
            "threshold": background.threshold,
            "unreadable": sorted(left_out),
        }
    )
    run.say_unreadable(left_out)
    for name, scores in splits.items():
        run.say(f"pseudo_labels: {name}, {scores.shown_images()}, {scores.shown()}")
        if number := scores.without_classes:
            run.say(f"pseudo_labels: {name}, {number} image(s) hold no class and are background alone")
    run.say(f"pseudo_labels: -> {stage.folder}")
    run.accelerator.wait_for_everyone()
    return stage.folder


def depends_on(settings: PseudoLabelsRecipe) -> tuple[str, ...]:
    """Return the parts of the recipe on which the result depends."""
    own_network = settings.method == "random_walk" and settings.network is None
    return ("seed", "data", "model", "train", "seeds", *(("affinity",) if own_network else ()), "pseudo_labels")


def background_of(run: Run, settings: PseudoLabelsRecipe) -> Background:
    """Return the background score of the recipe.

    Raises:
        StageError: the seeds' best threshold is wanted, and there were no masks to find it.
    """
    if settings.background == "alpha":
        return Background(alpha=settings.alpha)
    if settings.threshold is None:
        return Background(threshold=run.seed_threshold())
    if settings.threshold != "best":
        return Background(threshold=settings.threshold)
    path = run.stage_folder("seeds") / "metrics.json"
    found = read_json(path).get("threshold", {}) if path.is_file() else {}
    variant = settings.variant or run.recipe.seeds.variant
    if variant not in found:
        raise StageError(
            f'pseudo_labels.threshold "best" needs the seeds\' best threshold in {path}, and there is none: no masks '
            "are known for the first of seeds.splits. Give a number, or null for seeds.threshold."
        )
    return Background(threshold=found[variant])


# ---- The random walk.


class RandomWalk:
    """A random walk of scores along the affinities of a trained network.

    The network relates cells, independent of classes, so it may have been trained for other classes. Only the seeds
    must match the classes of the data, and that is checked.

    Args:
        model: In evaluation mode.
        processor: Normalizes.
        settings: The recipe's section.
        accelerator: Of the run.
    """

    def __init__(
        self,
        model: AffinityNetModel,
        processor: BiTransImageProcessor,
        settings: PseudoLabelsRecipe,
        accelerator: Accelerator,
    ):
        self.model, self.processor, self.accelerator = model, processor, accelerator
        self.rescale, self.stride = settings.rescale, model.stride
        relation = RELATIONS[model.config.relation]
        self.beta = relation.beta if settings.beta is None else settings.beta
        self.num_doublings = relation.num_doublings if settings.num_doublings is None else settings.num_doublings

    @classmethod
    def of(cls, run: Run, settings: PseudoLabelsRecipe) -> "RandomWalk":
        """Load the network that the recipe names.

        Raises:
            StageError: there is none, or the folder holds another kind of network.
            ValueError: the network cannot have this output stride.
        """
        folder = run.stage_folder("affinity") / "model"
        if settings.network is not None:
            folder = Path(settings.network)
        elif not (folder.parent / "done.json").is_file():
            raise StageError(f"no trained affinity network at {folder}; {how_to_run('affinity')}.")
        config = folder / "config.json"
        if not config.is_file():
            raise StageError(f"{folder} holds no network: there is no config.json in it.")
        kind = read_json(config).get("model_type")
        if kind != AffinityNetModel.config_class.model_type:
            raise StageError(
                f"{folder} holds a network of the type {kind!r}, expected 'affinitynet'; name the folder model/ of "
                "an affinity stage in pseudo_labels.network."
            )
        stride = settings.output_stride
        finer = {} if stride is None else {"output_stride": stride, "stride": None}
        model = load_trained(AffinityNetModel, folder, **finer).to(run.accelerator.device).eval()
        return cls(model, BiTransImageProcessor.from_pretrained(folder), settings, run.accelerator)

    @torch.no_grad()
    def __call__(
        self, images: Sequence[Any], scores: Sequence[npt.NDArray[np.float32]]
    ) -> list[npt.NDArray[np.float32]]:
        """Propagate the scores of images of one size.

        Args:
            images: B RGB images of W x H pixels.
            scores: For each image (1 + K, H, W), background first.

        Returns:
            For each image (1 + K, H, W) walked scores.
        """
        device = self.accelerator.device
        pixel_values = torch.stack([self.processor.normalized(image) for image in images]).to(device)
        with self.accelerator.autocast():
            affinities, boundaries = self.model.affinity_and_boundary(pixel_values)
        walked = []
        for number, (before, affinity) in enumerate(zip(scores, affinities, strict=True)):
            values = torch.from_numpy(before).to(device)
            if boundaries is not None:  # IRN: object scores do not start from a boundary
                inside = (1 - boundaries[number]).repeat_interleave(self.stride, 0).repeat_interleave(self.stride, 1)
                values[1:] *= inside[: values.shape[1], : values.shape[2]]
            values = propagate_scores(
                values, affinity, stride=self.stride, beta=self.beta, num_doublings=self.num_doublings
            )
            if self.rescale:
                values[1:] /= values[1:].amax(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
            walked.append(values.cpu().numpy())
        return walked


# ---- The images of a split.


class SplitLabels:
    """The pseudo labels of one split.

    Args:
        run: Each process makes its share. Its recipe has a section pseudo_labels.
        split: Of the data.
        folder: Folder of the label maps.
        background: Background score.
        walk: The random walk; None for the refiner alone.

    Raises:
        StageError: the split has no seeds.
    """

    def __init__(
        self,
        run: Run,
        split: str | None,
        folder: Path,
        background: Background,
        walk: "RandomWalk | None",
    ):
        recipe = run.recipe
        assert recipe.pseudo_labels is not None
        self.run, self.settings = run, recipe.pseudo_labels
        self.images = run.images(split, masks=True)
        self.store = seeds_of_split(run, split)
        self.variant = self.settings.variant or recipe.seeds.variant
        self.max_side = run.max_side
        self.folder, self.background, self.walk = folder, background, walk
        best = background.threshold if self.settings.threshold == "best" else None
        self.seed_threshold = run.seed_threshold() if best is None else best
        self.left_out: set[str] = set()
        self.affinity_labels: Path | None = None
        affinity = recipe.affinity
        if walk is not None and affinity is not None and affinity.split == split and affinity.num_images is None:
            self.affinity_labels = folder.parents[1] / "affinity" / "labels" / folder.name

    def note_on_classes(self) -> str:
        """Return a note if the network was trained for other classes than the data's; "" otherwise."""
        if self.walk is None:
            return ""
        trained = [name for _, name in sorted((self.walk.model.config.id2label or {}).items())]
        wanted = class_names(self.images)
        if trained == wanted:
            return ""
        return (
            f"the affinity network was trained for {len(trained)} classes ({', '.join(trained)}), the data has "
            f"{len(wanted)} ({', '.join(wanted)}): it relates cells and knows no class, and is used as it is."
        )

    def make(self) -> set[str]:
        """Write this process's share of the pseudo labels; return the ids that all processes left out.

        Unreadable images and images without seeds, which the seeds stage left out, are left out.
        """
        seeded_ids = set(self.store.ids())
        own = []
        for index in self.run.own(len(self.images)):
            image_id = self.images[index]["image_id"]
            if image_id in seeded_ids:
                own.append(index)
            else:
                self.left_out.add(image_id)
        todo = [index for index in own if not self._is_done(self.images[index])]
        self.run.announce(
            f"pseudo_labels: {len(todo):,} of {len(own):,} images to do; method {self.settings.method}, refiner "
            f"{self.settings.refiner}, device {self.run.accelerator.device.type}"
        )
        jobs = self._walked_jobs(own) if self.walk is not None else self._jobs_from_seeds(todo)
        broken = run_jobs(self.run, jobs, len(todo), self.settings.refiner, "pseudo labels")
        self.run.wait()
        return self.run.union(self.left_out | broken)

    def score(self) -> StepScores:
        """Score the label maps after each step.

        The steps are "seed" (cut at their own background score: seeds.threshold, or their best one where the recipe
        asks for it), "low" and "high" (the affinity network's labels, where it was trained on all of this split),
        "walk" and "refined".
        """

        def seed(image_id: str) -> LabelMap | None:
            if image_id not in self.store:
                return None
            seeds = self.store.read(image_id, self.variant, max_side=self.max_side)
            return seeds_to_label_map(seeds, self.seed_threshold, self.store.size(image_id))

        steps: dict[str, Callable[[str], LabelMap | None]] = {"seed": seed}
        if self.affinity_labels is not None:
            steps |= {name: stored_label_maps(self.affinity_labels / name) for name in ("low", "high")}
        if self.walk is not None:
            folder = "labels" if self.settings.refiner == "none" else "walk"
            steps["walk"] = stored_label_maps(self.folder / folder)
        if self.settings.refiner != "none":
            steps["refined"] = stored_label_maps(self.folder / "labels")
        made = [row["labels"] for row in self.images.select_columns(["image_id", "labels"]) if self._is_done(row)]
        scores = score_steps(self.run, self.images, steps)
        return replace(scores, images=len(made), without_classes=sum(not labels for labels in made))

    def _is_done(self, row: ImageRow) -> bool:
        return label_path(self.folder / "labels", row["image_id"]).is_file()

    def _job(self, row: ImageRow, **source: Any) -> LabelMapJob:
        return LabelMapJob(
            image_id=row["image_id"],
            image=row["image"],
            labels=tuple(row["labels"]),
            outputs=((label_path(self.folder / "labels", row["image_id"]), self.background),),
            refiner=self.settings.refiner,
            crf_preset=self.settings.crf_preset,
            max_side=self.max_side,
            strict=self.run.options.strict,
            **source,
        )

    def _jobs_from_seeds(self, todo: Sequence[int]) -> Iterator[LabelMapJob]:
        for index in todo:
            yield self._job(self.images[index], seeds=(self.store.folder, self.variant))

    def _walked_jobs(self, own: Sequence[int]) -> Iterator[LabelMapJob]:
        """Propagate the scores of all unfinished images, and yield the jobs that write their label maps.

        Batches hold images of one size and do not depend on what is finished, because the last digits of a network's
        output depend on its batch: a resumed run ends with the same files as an uninterrupted one.
        """
        assert self.walk is not None
        of_size = defaultdict(list)
        for index in own:
            row = self.images[index]
            try:
                of_size[image_size(row["image"])].append(index)
            except UnreadableImageError:
                if self.run.options.strict:
                    raise
                self.left_out.add(row["image_id"])
        for size, indices in sorted(of_size.items()):
            for start in range(0, len(indices), self.settings.batch_size):
                rows = [self.images[index] for index in indices[start : start + self.settings.batch_size]]
                if all(map(self._is_done, rows)):
                    continue
                opened, seeds, readable = [], [], []
                for row in rows:
                    try:
                        opened.append(bounded_image(open_image(row["image"]), self.max_side))
                    except UnreadableImageError:
                        if self.run.options.strict:
                            raise
                        self.left_out.add(row["image_id"])
                        continue
                    seeds.append(
                        read_seeds(row["image_id"], self.store, self.variant, row["labels"], size, self.max_side)
                    )
                    readable.append(row)
                if not readable:
                    continue
                walked = self.walk(opened, [self.background.scores(each.maps) for each in seeds])
                for row, each, scores in zip(readable, seeds, walked, strict=True):
                    if self._is_done(row):
                        continue
                    if self.settings.refiner != "none":
                        path = label_path(self.folder / "walk", row["image_id"])
                        write_label_png(path, scores_to_label_map(each.class_ids, scores, size), row["image_id"])
                    yield self._job(row, class_ids=each.class_ids, scores=scores)
