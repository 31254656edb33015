"""Write a page with images of seeds and label maps, loss curves and scores of a run.

python training/make_report.py --config voc_deit_small
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..commands import if_stopped
from ..data import class_names, open_image, open_mask
from ..data.segmentation import resized_label_map
from ..hub.image_processing_bitrans import bounded_image
from ..metrics.scores import SeedScores, SeedsRecord, StepScores, StepsRecord
from ..refine.pseudo_labels import seeds_to_label_map
from ..report.charts import Chart, charts_from_log
from ..report.drawing import GalleryRow
from ..report.page import write_report
from ..report.tables import Table, recipe_table, score_table, step_table
from ..store import SeedStore
from .label_maps import LabelMap, cell_labels, stored_label_maps
from .parse import parse_recipe
from .recipe import ALL_IMAGES, PlainRecipe, Recipe, RunOptions
from .records import read_json
from .run import Run, StageError, how_to_run

PREDICTION_STEPS = {
    "multi_scale": "Segmentation network",
    "crf": "Segmentation network, CRF",
    "par": "Segmentation network, PAR",
}
"""Headings of the images of the last stage."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stage from command-line arguments."""
    make_report(*parse_recipe(__doc__, arguments))


def make_report(recipe: Recipe, options: RunOptions) -> Path:
    """Write the page of a run with finished training and seeds; return its path."""
    run = Run.start(recipe, options)
    page = run.stage_folder("report") / "index.html"
    if not run.accelerator.is_main_process:
        return page
    for name in ("train", "seeds"):
        if not run.is_done(name):
            raise StageError(f"{run.stage_folder(name)} is not finished; {how_to_run(name)}.")
    if_stopped(lambda: "in stage report; earlier stages are kept")
    with run.working("report: drawing the page"):
        write_page(run, page)
    run.say(f"report: {page}")
    return page


def write_page(run: Run, page: Path) -> None:
    """Write the page from the metrics of the stages."""
    recipe, trained, seeds = run.recipe, run.metrics("train"), run.metrics("seeds")
    later = {stage: StepsRecord.from_json(run.metrics(stage)).splits for stage in ("pseudo_labels", "predictions")}
    rows = list(gallery(run))
    chosen = "found in the seeds without any mask" if recipe.seeds.threshold == "auto" else "as the recipe says"
    shutil.rmtree(page.parent, ignore_errors=True)  # images of an earlier choice of images
    write_report(
        page,
        title=f"Bi-Trans: {recipe.name}",
        rows=rows,
        curves=list(charts(run)),
        tables=[
            *score_tables(SeedsRecord.from_json(seeds).splits),
            *step_tables(later["pseudo_labels"], "From seeds to pseudo labels"),
            *step_tables(later["predictions"], "Segmentation network"),
            *training_table(trained),
            recipe_table(resolved_recipe(run)),
        ],
        notes=[
            (
                f"Label maps are cut from the variant {recipe.seeds.variant!r} at the background score "
                f"{run.seed_threshold()}, {chosen}. The tables show the best threshold of each "
                "variant, found with the ground truth of the same images, as the field reports seeds."
            ),
            (
                f"Made at commit {seeds['made_with']['commit']} with seed {recipe.seed} on "
                f"{seeds['made_with']['device']}; training took {trained['seconds']:.0f} s."
            ),
        ],
    )


def charts(run: Run) -> Iterator[Chart]:
    """Return the curves of every stage that trained."""
    yield from charts_from_log(run.stage_folder("train") / "log.jsonl")
    for stage, network in (("affinity", "Affinity network"), ("segmentation", "Segmentation network")):
        if run.is_done(stage):
            for chart in charts_from_log(run.stage_folder(stage) / "log.jsonl"):
                title = chart.title[0].lower() + chart.title[1:]
                yield replace(chart, title=f"{network}: {title}")


def resolved_recipe(run: Run) -> PlainRecipe:
    """Return the recipe of a run: the parts that its finished stages depend on."""
    resolved: PlainRecipe = {}
    for stage in ("seeds", "affinity", "pseudo_labels", "segmentation", "predictions"):
        if run.is_done(stage):
            resolved |= read_json(run.stage_folder(stage) / "recipe.json")
    return resolved


def gallery(run: Run) -> Iterator[GalleryRow]:
    """Return the images of a split to show: those with several classes first, then others spread over the split."""
    recipe = run.recipe
    split = recipe.report.split or ALL_IMAGES
    images = run.images(recipe.report.split, masks=True)
    store = SeedStore(run.stage_folder("seeds") / split / "seeds")
    stored = set(store.ids())
    found = [index for index, image_id in enumerate(images["image_id"]) if image_id in stored]
    labels = images["labels"]
    several = [index for index in found if len(labels[index]) > 1]
    single = [index for index in found if len(labels[index]) == 1]
    threshold = run.seed_threshold()
    half = min(len(several), recipe.report.num_images // 2)
    for index in spread(several, half) + spread(single, recipe.report.num_images - half):
        row = images[index]
        maps = store.read_variants(row["image_id"], run.variants, max_side=run.max_side)
        image = bounded_image(open_image(row["image"]), run.max_side)
        size = (image.height, image.width)
        yield GalleryRow(
            image_id=row["image_id"],
            image=image,
            target=None if row["mask"] is None else resized_label_map(open_mask(row["mask"]), size),
            maps=maps,
            label_map=seeds_to_label_map(maps[recipe.seeds.variant], threshold),
            class_names=class_names(images),
            steps={
                heading: resized_label_map(label_map, size)
                for heading, label_map in later_label_maps(run.folder, split, row["image_id"])
            },
        )


def later_label_maps(run: Path, split: str, image_id: str) -> Iterator[tuple[str, LabelMap]]:
    """Return heading and label map of an image for each later stage that has one."""
    labels = run / "affinity" / "labels" / split
    low, high = (stored_label_maps(labels / name)(image_id) for name in ("low", "high"))
    if low is not None and high is not None:
        yield "Affinity labels", cell_labels(low, high, 1)
    for heading, folder in (("After the walk", "walk"), ("Pseudo label", "labels")):
        label_map = stored_label_maps(run / "pseudo_labels" / split / folder)(image_id)
        if label_map is not None:
            yield heading, label_map
    predictions = run / "predictions" / split
    for step, heading in PREDICTION_STEPS.items():
        label_map = stored_label_maps(predictions / step)(image_id)
        if label_map is not None:
            yield heading, label_map


def spread(items: Sequence[int], count: int) -> list[int]:
    """Return `count` evenly spaced items."""
    count = min(count, len(items))
    return [items[(2 * number + 1) * len(items) // (2 * count)] for number in range(count)]


def score_tables(splits: Mapping[str, SeedScores]) -> Iterator[Table]:
    """Return a score table for every split with ground truth, and one for its images with several classes."""
    for name, scores in splits.items():
        parts = [(scores, scores.scored, "images")]
        if several := scores.several_classes:
            parts.append((several, several.images, "images with several classes"))
        for part, number, what in parts:
            if table := score_table(part, f"Seeds of {name}: {number} {what}"):
                yield table


def step_tables(splits: Mapping[str, StepScores], title: str) -> Iterator[Table]:
    """Return the scores after each step of a stage, for every split with ground truth."""
    for name, scores in splits.items():
        if table := step_table(scores, f"{title}, {name}: {scores.scored} images"):
            yield table


def training_table(trained: Mapping[str, Any]) -> Iterator[Table]:
    """Return the table of the last epoch's image-level scores, if there was a validation split."""
    titles = {
        "map_class": "mAP of the class tokens (%)",
        "map_patch": "mAP of the patch branch (%)",
        "image_ap_class": "AP per image of the class tokens (%)",
        "map": "mAP (%)",
        "image_ap": "AP per image (%)",
    }
    rows = [[title, f"{trained[key]:.1f}"] for key, title in titles.items() if key in trained]
    if rows:
        yield Table("Image-level tags on the validation split", ["", ""], rows)
