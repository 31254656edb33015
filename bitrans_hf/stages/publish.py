"""Write a run's results as folders for the Hub, check each in another process, and upload them on request.

python training/publish.py --config shapes                            (folders only)
python training/publish.py --config shapes --dry-run                  (what would go up)
python training/publish.py --config shapes --publish.repo me/bitrans-shapes

The token comes from HF_TOKEN or `hf auth login`; it is never printed. The command can be rerun at any time.
"""

import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from datasets import concatenate_datasets
from transformers import PreTrainedModel

from .. import __version__
from ..hub.image_processing_bitrans import BiTransImageProcessor
from ..hub.modeling_affinitynet import AffinityNetModel
from ..hub.modeling_bitrans import BiTransModel
from ..hub.modeling_deeplab import DeepLabForSemanticSegmentation
from ..hub.weight_files import load_trained
from ..metrics.scores import StepScores, StepsRecord
from ..progress import size_text
from ..publishing.cards import Network, RunRecord, render_card, step_table
from ..publishing.folders import (
    Kind,
    PublishError,
    Upload,
    files_of,
    upload,
    write_metric_folder,
    write_model_folder,
    write_pseudo_label_folder,
)
from ..publishing.pseudo_labels import pseudo_label_card, pseudo_label_dataset
from .parse import parse_recipe
from .recipe import CamRecipe, PublishRecipe, Recipe, RunOptions
from .run import Run, Stage, StageError, how_to_run

DEPENDS_ON = ("seed", "data", "model", "train", "seeds")


@dataclass(frozen=True)
class Part:
    """One folder, and the repository it goes to.

    Attributes:
        name: Name of the part, a key of `PARTS`.
        kind: Type of the repository.
        stage: Stage that made it; None for the metric.
        suffix: Appended to the run's repository name.
    """

    name: str
    kind: Kind
    stage: str | None
    suffix: str

    def repo(self, repo: str) -> str:
        """Return the repository of this part."""
        return f"{repo.split('/')[0]}/mean_iou" if self.name == "metric" else repo + self.suffix


PARTS = {
    part.name: part
    for part in (
        Part("model", "model", "train", ""),
        Part("affinity", "model", "affinity", "-affinity"),
        Part("segmentation", "model", "segmentation", "-segmentation"),
        Part("pseudo_labels", "dataset", "pseudo_labels", "-pseudo-labels"),
        # `evaluate.load` looks for a script of the repository's name.
        Part("metric", "space", None, ""),
    )
}

NETWORKS: dict[str, tuple[Network, type[PreTrainedModel]]] = {
    "model": ("bitrans", BiTransModel),
    "affinity": ("affinitynet", AffinityNetModel),
    "segmentation": ("deeplab", DeepLabForSemanticSegmentation),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stage from command-line arguments; `--dry-run` is short for `--dry_run true`."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    spelt = [word for each in given for word in (("--dry_run", "true") if each == "--dry-run" else (each,))]
    recipe, options = parse_recipe(__doc__, spelt)
    publish(dataclasses.replace(recipe, publish=recipe.publish or PublishRecipe()), options)


def publish(recipe: Recipe, options: RunOptions) -> Path:
    """Write and check the folders of a run, upload them if the recipe names a repository; return the stage's folder.

    `<part>/` is the content of a repository. `metrics.json` lists the files with their sizes, and the uploads.
    """
    settings = cast(PublishRecipe, recipe.publish)
    run = Run.start(recipe, options)
    folder = run.folder
    stage = Stage(run, "publish", DEPENDS_ON)
    if not run.accelerator.is_main_process:
        return stage.folder
    parts = chosen_parts(folder, settings)
    if isinstance(recipe.model, CamRecipe) and PARTS["model"] in parts:
        raise StageError(
            "model.architecture cam is a baseline, whose network is not published; name what is in publish.parts, "
            "without model."
        )

    # ---- Folders. Those of an earlier call are kept, if they were made of the same things.
    sources = {part.name: source_of(folder, part, settings) for part in parts}
    before = run.metrics("publish")
    for part in parts:
        if before.get("sources", {}).get(part.name) == sources[part.name] and (stage.folder / part.name).is_dir():
            run.say(f"publish: {part.name} is already written and checked, {stage.folder / part.name}")
            continue
        with run.working(f"publish: writing and opening {part.name}"):
            write_part(recipe, settings, folder, part, stage.folder / part.name)
        opened = ", opened without the package: outputs equal to the last bit" if part.name in NETWORKS else ""
        run.say(f"publish: {part.name} -> {stage.folder / part.name}{opened}")
    files = {part.name: files_of(stage.folder / part.name) for part in parts}
    uploads = {**before.get("uploads", {})}
    stage.finish({"sources": sources, "files": files, "uploads": uploads})

    # ---- The Hub.
    for part in parts:
        target = "no repository is named (--publish.repo owner/name)"
        if settings.repo is not None:
            target = f"{part.kind} {part.repo(settings.repo)}, version {settings.version}"
        if run.options.dry_run:
            total = sum(files[part.name].values())
            run.say(f"publish: {part.name}, {len(files[part.name])} files, {size_text(total)}; {target}")
            for name, size in files[part.name].items():
                run.say(f"    {size_text(size):>9}  {name}")
        elif settings.repo is not None:
            with run.working(f"publish: uploading {part.name}"):
                uploads[part.name] = dataclasses.asdict(upload_part(settings, part, stage.folder / part.name))
            run.say(f"publish: {uploads[part.name]['url']}, version {settings.version}")
    if uploads != before.get("uploads", {}):
        stage.finish({"sources": sources, "files": files, "uploads": uploads})
    if settings.repo is None and not run.options.dry_run:
        run.say(f"publish: nothing was uploaded, {target}")
    return stage.folder


def chosen_parts(folder: Path, settings: PublishRecipe) -> list[Part]:
    """Return the parts to publish: those that the recipe names, or all that the run has finished.

    Raises:
        StageError: the stage of a named part is not finished, or no stage is.
    """
    finished = [part for part in PARTS.values() if part.stage and (folder / part.stage / "done.json").is_file()]
    if settings.parts is None:
        if not finished:
            raise StageError(f"no finished stage in {folder}; {how_to_run('run_all')}.")
        return finished
    parts = [PARTS[name] for name in settings.parts]
    for part in parts:
        if part.stage and part not in finished:
            raise StageError(
                f"{folder / part.stage} is not finished, and makes publish.parts {part.name!r}; run it first."
            )
    return parts


def source_of(folder: Path, part: Part, settings: PublishRecipe) -> Mapping[str, Any]:
    """Return everything that a part's folder depends on: the finished stages, the card and the package."""
    finished = {}
    if part.stage is not None:
        for done in sorted(folder.glob("*/done.json")):
            if done.parent.name not in ("publish", "report"):
                finished[done.parent.name] = json.loads(done.read_text(encoding="utf-8"))["finished"]
    return {
        "stages": finished,
        "card": [settings.version, settings.licence, settings.picture, settings.repo],
        "package": __version__,
    }


def write_part(recipe: Recipe, settings: PublishRecipe, folder: Path, part: Part, out: Path) -> None:
    """Write one part's folder.

    Raises:
        StageError: it fails the checks for publishing.
    """
    if part.name == "metric":
        write_metric_folder(out)
        return
    record = RunRecord.from_folder(folder)
    if part.name == "pseudo_labels":
        stage = folder / "pseudo_labels"
        content = record.stages["pseudo_labels"]
        scores = StepsRecord.from_json(content["metrics"]).splits
        found = [path.name for path in sorted(stage.iterdir()) if (path / "labels").is_dir()]
        names = sorted(found, key=lambda name: list(scores).index(name) if name in scores else len(scores))
        splits = {name: pseudo_label_dataset(stage / name / "labels") for name in names}
        # The stage's one score is of its first split.
        scored = scores.get(names[0], StepScores()).scored
        measured = content["metrics"] if scored is None else {"scored": scored, **content["metrics"]}
        card = pseudo_label_card(
            concatenate_datasets([*splits.values()]), list(record.classes), content["recipe"], measured
        )
        card += f"\n## Splits\n\n{step_table(scores)}\n"
        write_pseudo_label_folder(out, splits, card)
        return
    network, model_class = NETWORKS[part.name]
    picture = picture_of(recipe, settings, folder) if part.name == "model" else None
    card = render_card(
        record, network,
        repo=part.repo(settings.repo) if settings.repo else str(out), version=settings.version,
        package_version=__version__, picture=picture.name if picture else None, licence=settings.licence,
    )  # fmt: skip
    source = folder / cast(str, part.stage) / "model"
    try:
        write_model_folder(
            out, load_trained(model_class, source), BiTransImageProcessor.from_pretrained(source), card, picture
        )
    except PublishError as error:
        raise StageError(str(error)) from error


def picture_of(recipe: Recipe, settings: PublishRecipe, folder: Path) -> Path | None:
    """Return the image of the card: the recipe's, or the report's gallery if its images are our own."""
    if settings.picture is not None:
        picture = Path(settings.picture)
        if not picture.is_file():
            raise StageError(f"publish.picture {picture} is not there.")
        return picture
    gallery = folder / "report" / "index_pictures" / "gallery.png"
    return gallery if recipe.data.source == "shapes" and gallery.is_file() else None


def upload_part(settings: PublishRecipe, part: Part, folder: Path) -> Upload:
    """Upload one part; a failure becomes one sentence with the command to rerun.

    Raises:
        StageError: the upload failed.
    """
    assert settings.repo is not None
    try:
        done = upload(
            folder, part.repo(settings.repo), part.kind, version=settings.version, private=settings.private,
            create=settings.create, branch=settings.branch,
        )  # fmt: skip
    except PublishError as error:
        raise StageError(f"{error}\n    {shlex.join(['python', *sys.argv])}") from error
    return done
