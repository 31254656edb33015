"""Model cards from measured numbers: only those in a run's `recipe.json` and `metrics.json`."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Literal

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCardData

from ..hub.errors import InputError, MissingFileError
from ..metrics.scores import SeedScores, SeedsRecord, StepScores
from .markdown import literal

STAGES = ("train", "seeds", "affinity", "pseudo_labels", "segmentation", "predictions")
"""Folders of a run that a card reads, in the order of the stages."""

TEMPLATES = Path(__file__).with_name("templates")
NOT_MEASURED = "not yet measured"
VARIANTS = {"sc_cam": "SC-CAM", "coarse_cam": "Coarse-CAM", "fused": "product", "refined": "refined"}

Network = Literal["bitrans", "affinitynet", "deeplab"]

SECTIONS: dict[str, tuple[str, ...]] = {
    "bitrans": ("seed", "data", "model", "train", "seeds"),
    "affinitynet": ("seed", "data", "affinity", "pseudo_labels"),
    "deeplab": ("seed", "data", "segmentation", "prediction"),
}
"""Parts of the recipe that a network's card shows."""

NETWORK_STAGES: dict[Network, str] = {"bitrans": "train", "affinitynet": "affinity", "deeplab": "segmentation"}
"""Stage that trains each network."""

TITLES = {"bitrans": "Bi-Trans", "affinitynet": "AffinityNet", "deeplab": "DeepLab"}
PIPELINE_TAGS = {"bitrans": "image-segmentation", "affinitynet": None, "deeplab": "image-segmentation"}

DATA_NAMES = {"shapes": "drawn scenes of shapes", "voc": "PASCAL VOC 2012", "coco": "MS COCO"}

LATER_STAGES = {
    "pseudo_labels": "pseudo labels",
    "segmentation": "segmentation network while training, one scale",
    "predictions": "segmentation network, as tested at last",
}
"""Stages with one "miou", and what it is of."""


@dataclass(frozen=True)
class RunRecord:
    """The record of a run: the source of a card, stored beside it.

    Attributes:
        name: Of the run.
        classes: Names of the object classes in the order of their ids.
        stages: Finished stage -> "recipe" and "metrics", as its folder holds them.
    """

    name: str
    classes: Sequence[str]
    stages: Mapping[str, Mapping[str, Any]]

    @property
    def recipe(self) -> Mapping[str, Any]:
        """Return every part of the recipe on which a stage depended."""
        merged: Mapping[str, Any] = {}
        for stage in self.stages.values():
            merged = {**merged, **stage["recipe"]}
        return merged

    def metrics(self, stage: str) -> Mapping[str, Any]:
        """Return the metrics of a stage; empty if there are none."""
        found: Mapping[str, Any] = self.stages.get(stage, {}).get("metrics", {})
        return found

    def seeds(self) -> SeedsRecord:
        """Return the scores of the seeds; empty ones if there are none."""
        return SeedsRecord.from_json(self.metrics("seeds"))

    def to_json(self) -> str:
        """Return the text that `from_json` reads."""
        return json.dumps({"name": self.name, "classes": list(self.classes), "stages": self.stages}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "RunRecord":
        """Read what `to_json` wrote."""
        content = json.loads(text)
        return cls(content["name"], content["classes"], content["stages"])

    @classmethod
    def from_folder(cls, folder: str | Path) -> "RunRecord":
        """Read the finished stages of `runs/<name>`.

        Raises:
            MissingFileError: the training stage is not finished there.
        """
        folder, stages = Path(folder), {}
        for name in STAGES:
            if (folder / name / "done.json").is_file():
                stages[name] = {
                    part: without_places(json.loads((folder / name / f"{part}.json").read_text(encoding="utf-8")))
                    for part in ("recipe", "metrics")
                }
        if "train" not in stages:
            raise MissingFileError(f"{folder / 'train'} is not finished; run its recipe first.")
        config = json.loads((folder / "train" / "model" / "config.json").read_text(encoding="utf-8"))
        names = sorted(config["id2label"].items(), key=lambda item: int(item[0]))
        return cls(folder.resolve().name, [name for _, name in names], stages)


def without_places(value: Any) -> Any:
    """Reduce paths outside the project to their last part, so that cards do not reveal local folders."""
    if isinstance(value, Mapping):
        return {key: without_places(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_places(inner) for inner in value]
    if isinstance(value, str) and (value.startswith(("/", "~")) or ".." in PurePath(value).parts):
        return PurePath(value).name
    return value


def render_card(
    run: RunRecord,
    network: Network,
    *,
    repo: str,
    version: str,
    package_version: str,
    picture: str | None = None,
    licence: str = "apache-2.0",
) -> str:
    """Write the README.md of a model.

    Args:
        run: What was measured.
        network: Which of the run's networks; `<network>.md.jinja` is its template.
        repo: Repository, or folder, that the examples open.
        version: Tag of the version.
        package_version: Of bitrans_hf.
        picture: File name of an image beside the card; None for none.
        licence: Of the weights, as the Hub spells it.

    Returns:
        Text with its YAML head. Its only numbers are the run's and the template's.

    Raises:
        ValueError: the run has no such network.
    """
    stage = NETWORK_STAGES[network]
    if stage not in run.stages:
        raise InputError(f"run {run.name} has no finished stage {stage!r}, which trains {TITLES[network]}.")
    recipe = {name: compact(run.recipe[name]) for name in SECTIONS[network] if run.recipe.get(name) is not None}
    data = run.recipe["data"]
    weights = starting_weights(run, network)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined, autoescape=False,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    text = environment.get_template(f"{network}.md.jinja").render(
        card_data=card_data(run, network, licence).to_yaml(),
        title=f"{TITLES[network]}: {literal(run.name)}",
        repo=repo,
        classes=[literal(name) for name in run.classes],
        # A JSON text is a Python one too, whatever the name holds.
        example_class=json.dumps(run.classes[0], ensure_ascii=False),
        version=version,
        package_version=package_version,
        picture=picture,
        settings=json.dumps(pipeline_settings(run)),
        seed_table=seed_table(run.seeds().splits),
        stage_table=stage_table(run),
        tag_table=tag_table(run.metrics("train")),
        provenance=provenance(run),
        data=data_sentence(data, run.classes),
        recipe=yaml.safe_dump(recipe, sort_keys=False, width=100, allow_unicode=True).rstrip(),
        saw_masks=network == "deeplab" and run.recipe["segmentation"].get("labels") == "ground_truth",
        licence_note=licence_note(licence, data["source"], weights),
    )
    # Blocks and conditions leave empty lines behind.
    lines = [line.rstrip() for line in text.splitlines()]
    kept = [line for index, line in enumerate(lines) if line or (index and lines[index - 1])]
    return "\n".join(kept).rstrip() + "\n"


def starting_weights(run: RunRecord, network: Network) -> str:
    """Return what a network's training started from: "scratch", "timm:<name>", or a file."""
    recipe = run.recipe
    if network != "bitrans":
        section = recipe["affinity" if network == "affinitynet" else "segmentation"]
        if section.get("weights", "scratch") == "timm":
            return f"timm:{section['backbone']}"
        if section.get("weights", "scratch") != "trained":
            return str(section.get("weights", "scratch"))
    return str(recipe["model"].get("weights", "scratch"))


def pipeline_settings(run: RunRecord) -> Mapping[str, Any]:
    """Return the pipeline's options that the refined seeds were scored with; empty where nothing was scored."""
    threshold = run.seeds().threshold.get("refined")
    if threshold is None:
        return {}
    return {"threshold": threshold, "scales": run.recipe["seeds"].get("scales", [1.0])}


def compact(section: Any) -> Any:
    """Leave out what a recipe leaves to others: null and empty values."""
    if not isinstance(section, Mapping):
        return section
    return {key: compact(value) for key, value in section.items() if value is not None and value not in ({}, [])}


def card_data(run: RunRecord, network: Network, licence: str) -> ModelCardData:
    """Return the card's YAML head; its results are in percent, as their names say."""
    weights = starting_weights(run, network)
    results = list(eval_results(run, network))
    return ModelCardData(
        license=licence,
        library_name="transformers",
        pipeline_tag=PIPELINE_TAGS[network],
        tags=["weakly-supervised", "image-level-labels", "semantic-segmentation", "bitrans_hf"],
        base_model=f"timm/{weights.removeprefix('timm:')}" if weights.startswith("timm:") else None,
        model_name=f"{TITLES[network]}: {run.name}" if results else None,
        eval_results=results or None,
    )


def eval_results(run: RunRecord, network: Network) -> Iterator[EvalResult]:
    """Give the scores for the Hub's own table."""
    source, name = run.recipe["data"]["source"], data_name(run.recipe["data"])

    def result(split: str, metric: str, value: float, title: str, task: str = "image-segmentation") -> EvalResult:
        return EvalResult(
            task_type=task, dataset_type=source, dataset_name=name, dataset_split=split,
            metric_type=metric, metric_value=value, metric_name=title,
        )  # fmt: skip

    if network == "bitrans":
        for split, scores in run.seeds().splits.items():
            if scores.miou:
                title = "mIoU of the refined seeds at their best threshold (%)"
                yield result(split, "mean_iou", scores.miou["refined"], title)
        trained, val_split = run.metrics("train"), run.recipe["data"].get("val_split")
        if "map_patch" in trained:
            title = "mAP of the image tags, patch branch (%)"
            value = round(trained["map_patch"], 2)
            yield result(val_split, "mean_average_precision", value, title, "image-classification")
        return
    for stage in ("pseudo_labels",) if network == "affinitynet" else ("segmentation", "predictions"):
        if "miou" in run.metrics(stage):
            yield result(
                split_of(run, stage), "mean_iou", run.metrics(stage)["miou"], f"mIoU, {LATER_STAGES[stage]} (%)"
            )


def split_of(run: RunRecord, stage: str) -> str:
    """Return the split that a stage's "miou" is of."""
    splits = run.metrics(stage).get("splits")
    if splits:
        return str(next(iter(splits)))
    section = run.recipe.get(stage) or {}
    return str(section.get("val_split") or section.get("split") or "all_images")


# ---- Tables. A number that is not there is said to be missing.


def number(value: float | None, digits: int = 1) -> str:
    """Format a measured number, or a note that there is none."""
    return NOT_MEASURED if value is None else f"{value:.{digits}f}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def seed_table(splits: Mapping[str, SeedScores]) -> str:
    """Return a line for each split: the images, each variant's score, and the refined seeds' threshold."""
    rows = []
    for split, scores in splits.items():
        parts = [(split, scores.scored or scores.images, scores)]
        if several := scores.several_classes:
            parts.append((f"{split}, two or more classes", several.images, several))
        for label, images, part in parts:
            best = [number(part.miou.get(variant)) for variant in VARIANTS]
            rows.append([literal(label), str(images), *best, number(part.threshold.get("refined"), 2)])
    if not rows:
        rows = [[NOT_MEASURED] * (len(VARIANTS) + 3)]
    return table(["split", "images", *VARIANTS.values(), "threshold of refined"], rows)


def stage_table(run: RunRecord) -> str:
    """Return a line for each later stage."""
    rows = []
    for stage, what in LATER_STAGES.items():
        miou = run.metrics(stage).get("miou")
        rows.append([what, literal(split_of(run, stage)) if miou is not None else "", number(miou)])
    return table(["stage", "split", "mIoU (%)"], rows)


def step_table(splits: Mapping[str, StepScores]) -> str:
    """Return a line for each split of a stage that refines label maps in steps: its images, the score of each step."""
    steps = list(dict.fromkeys(step for scores in splits.values() for step in scores.steps))
    rows = [
        [
            literal(name),
            NOT_MEASURED if scores.images is None else str(scores.images),
            *(number(scores.steps.get(step)) for step in steps),
        ]
        for name, scores in splits.items()
    ]
    return table(["split", "images", *(f"{step}, mIoU (%)" for step in steps)], rows)


def tag_table(trained: Mapping[str, Any]) -> str:
    """Return the image-level scores on the validation split."""
    titles = {"map_class": "mAP of the class tokens", "map_patch": "mAP of the patch branch"}
    rows = [[title, number(trained.get(key))] for key, title in titles.items()]
    return table(["image tags, validation split", "%"], rows)


# ---- Sentences.


def data_name(data: Mapping[str, Any]) -> str:
    """Return the name of the data."""
    if data["source"] == "folder":
        return PurePath(str(data.get("root"))).name
    chosen = f", {len(data['classes'])} of its classes" if data.get("classes") else ""
    return DATA_NAMES[data["source"]] + chosen


def data_sentence(data: Mapping[str, Any], classes: Sequence[str]) -> str:
    """Describe the training data of the network."""
    split = data.get("train_split") or "all images"
    if data["source"] == "shapes":
        return (
            f"{data['num_train']} scenes of {data['image_size']} x {data['image_size']} pixels, drawn by "
            f"`bitrans_hf.data.make_shapes` from seed {data['seed']}: {', '.join(map(literal, classes))} on clutter, "
            "with the list of the shapes in each scene as its labels."
        )
    source = "Somebody's own folder of images, " if data["source"] == "folder" else ""
    return f"{source}{literal(data_name(data))}, split `{split}`: the images, and the names of the classes in each."


def licence_note(licence: str, source: str, weights: str) -> str:
    """State the licence of the weights, and other terms."""
    notes = [f"Code and weights: `{licence}`."]
    if source in ("voc", "coco"):
        notes.append(
            "The training images are photographs from Flickr under their owners' terms; they are not part of this "
            "repository."
        )
    if weights.startswith("timm:"):
        notes.append(f"Training started from timm's `{weights.removeprefix('timm:')}`, under the licence named there.")
    elif weights != "scratch":
        notes.append(f"Training started from `{PurePath(weights).name}`.")
    return " ".join(notes)


def provenance(run: RunRecord) -> str:
    """State the commit, versions and hardware of each stage."""
    rows = []
    for stage, content in run.stages.items():
        metrics = content["metrics"]
        made_with = metrics.get("made_with", {})
        versions = ", ".join(f"{name} {made_with[name]}" for name in ("torch", "transformers") if name in made_with)
        seconds = metrics.get("seconds")
        rows.append(
            [stage, f"`{made_with.get('commit', 'unknown')}`", versions, made_with.get("device", "unknown"),
             NOT_MEASURED if seconds is None else f"{seconds:.0f}"]
        )  # fmt: skip
    return table(["stage", "commit", "versions", "hardware", "seconds"], rows)
