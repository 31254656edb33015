"""Run a table of recipe variants with several seeds, and write one report.

python training/ablate.py --config ablations/paper_tables_shapes

Every cell of the table is an ordinary run, `<output_dir>/<name>/<variant>/seed<number>/`, trained by `train.py` and
scored by `make_seeds.py`. Rows that differ only in how seeds are made share one training: the later row's `train` is a
link to the first one's. Finished runs are kept and a killed one goes on where it was when the same command is given
again. The page, `<output_dir>/<name>/report/index.html`, and `metrics.json` are written anew each time.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from jsonargparse import ActionConfigFile, ArgumentParser  # type: ignore[attr-defined]  # not in its __all__

from ..commands import if_stopped
from ..data import class_names, open_image, open_mask
from ..data.segmentation import resized_label_map
from ..hub.errors import InputError
from ..hub.image_processing_bitrans import MAX_SIDE, bounded_image
from ..hub.seeds import SEED_VARIANTS
from ..metrics.scores import RowScores, RunScores, SeedsRecord
from ..progress import Counter, progress, say_progress, say_result
from ..recipes import FOLDER, recipe_file
from ..report.page import VARIANT_TITLES, GalleryRow, Table, recipe_table, write_report
from ..store import SeedStore
from .build import load_images
from .parse import CONFIG_HELP, config_names, parse_recipe
from .recipe import ALL_IMAGES, Options, PlainRecipe, Recipe
from .records import provenance, read_json, recipe_parts, write_json
from .report import spread
from .run import StageError, holds
from .seeds import DEPENDS_ON as SEEDS_DEPEND_ON
from .train import DEPENDS_ON as TRAINING_DEPENDS_ON

PRESETS = FOLDER / "presets"
# `str` first: the parser takes the first type that fits, and would read the text "no" as false otherwise.
Changes: TypeAlias = dict[str, str | bool | int | float | list[Any] | Options | None]
SET_BY_THE_ABLATION = ("seed", "name", "output_dir")
"""Keys that no variant may change: they say which run it is."""
FIXED_FOR_ALL = (
    *(f"data.{key}" for key in ("source", "root", "classes", "sbd_root", "mask_folder", "mask_overlap", "mask_crowd")),
    *(f"data.{key}" for key in ("drop_empty", "num_val", "image_size", "seed")),
    "seeds.splits",
)
"""Keys whose values must be those of the baseline, so that all rows are scored on the same images and masks."""
LATER_STAGES = ("affinity", "pseudo_labels", "segmentation", "prediction", "publish")
"""Recipe sections that a table of seeds leaves out."""
MOST_GALLERY_ROWS = 8
"""Rows that the page shows images of when `gallery_rows` names none: more would be too small to look at."""
CHOSEN = "chosen"
"""Name, beside those of the seed variants, of the variant that a row's own recipe names."""


class Cell(NamedTuple):
    """One run of the table."""

    variant: str
    seed: int

    def __str__(self) -> str:
        return f"{self.variant}/seed{self.seed}"


@dataclass(frozen=True)
class Ablation:
    """A table: rows are variants of one recipe, each run once for every seed.

    Attributes:
        name: Runs and report go to <output_dir>/<name>/.
        recipe: The recipe file that every row starts from.
        variants: Name of a row -> recipe keys that it changes, such as {"model.scc_weight": 0.0}. The key `preset`
            names a file of `recipes/presets`, or a list of them, laid over the recipe before the other keys.
        baseline: The row that the others are compared with, seed by seed.
        seeds: Recipe seeds; equal seeds see the same images in the same order, which makes the differences paired.
        changes: Recipe keys that are changed in every row; a row's own value of a key, `preset` too, comes before.
        tables: Title -> its rows, a list, or a mapping from the name that is shown to the row, for tables that share
            rows; null for one table of all.
        output_dir: Folder of all runs.
        parallel: Runs at the same time, on one GPU or on the CPU's cores.
        num_images: Images that the page shows under every variant.
        gallery_rows: Rows that the page shows images of; null for all, but at most the first eight.
        cpu: Run on the CPU even where there is a GPU.
        quiet: Print results alone: no plan, no progress.
    """

    name: str
    recipe: str
    variants: dict[str, Changes]
    baseline: str
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    changes: Changes = field(default_factory=dict)
    tables: dict[str, list[str] | dict[str, str]] | None = None
    output_dir: str = "runs"
    parallel: int = 1
    num_images: int = 8
    gallery_rows: list[str] | None = None
    cpu: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        """Check what the types do not say.

        Raises:
            ValueError: a name is of no row or no preset, a row is in no table, or seeds are missing or repeated.
        """
        if self.baseline not in self.variants:
            raise InputError(f"baseline {self.baseline!r} is no variant; there are {', '.join(self.variants)}.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds must be different numbers, at least one, got {self.seeds}.")
        if self.parallel < 1:
            raise InputError(f"parallel must be at least 1, got {self.parallel}.")
        for row, changed in self.variants.items():
            if Path(row).name != row or row == "report":
                raise InputError(f"variant {row!r} cannot be the name of a folder beside report/; rename it.")
            for key in SET_BY_THE_ABLATION:
                if key in changed:
                    raise InputError(f"variant {row!r} changes {key}, which must be set for the whole ablation.")
            self.preset_files(row)
        tables = {title: set(rows.values()) for title, rows in self.shown_tables().items()}
        for title, rows in {**tables, "gallery_rows": set(self.gallery_rows or ())}.items():
            unknown = sorted(rows - self.variants.keys())
            if unknown:
                raise InputError(f"{title} names the row {unknown[0]!r}; there are {', '.join(self.variants)}.")
        left_out = [row for row in self.variants if not any(row in rows for rows in tables.values())]
        if left_out:
            raise InputError(f"no table shows the row {left_out[0]!r}; name it under tables or drop it from variants.")

    @property
    def folder(self) -> Path:
        """Folder of the runs and of the report."""
        return Path(self.output_dir) / self.name

    def shown_tables(self) -> dict[str, dict[str, str]]:
        """Return title -> name that is shown -> row; one table without a title where `tables` is null."""
        tables = {"": list(self.variants)} if self.tables is None else self.tables
        return {
            title: rows if isinstance(rows, dict) else {row: row for row in rows} for title, rows in tables.items()
        }

    def row_changes(self, variant: str) -> Changes:
        """Return the keys that a row changes, with those that are changed in every row."""
        return {**self.changes, **self.variants[variant]}

    def preset_files(self, variant: str) -> list[Path]:
        """Return the preset files of a row.

        Raises:
            ValueError: there is no such preset.
        """
        names = self.row_changes(variant).get("preset") or []
        files = [PRESETS / f"{name}.yaml" for name in (names if isinstance(names, list) else [names])]
        for file in files:
            if file.parent != PRESETS or not file.is_file():
                known = ", ".join(sorted(path.stem for path in PRESETS.glob("*.yaml"))) or "none"
                raise InputError(f"variant {variant!r} names the preset {file.stem!r}; there are: {known}.")
        return files

    def arguments(self, variant: str, seed: int) -> list[str]:
        """Return the command-line arguments of one run's stages."""
        arguments = [word for file in (self.recipe, *self.preset_files(variant)) for word in ("--config", str(file))]
        for section in LATER_STAGES:
            arguments += [f"--{section}", "null"]
        for key, value in self.row_changes(variant).items():
            if key != "preset":
                arguments += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
        arguments += ["--output_dir", str(self.folder / variant), "--name", f"seed{seed}", "--seed", str(seed)]
        return [*arguments, "--cpu", json.dumps(self.cpu), "--quiet", "true"]

    def recipes(self) -> dict[Cell, Recipe]:
        """Return the resolved recipe of every run, in the order of the variants.

        Raises:
            SystemExit: a key or value is wrong.
            ValueError: a row would be scored on other images than the baseline.
        """
        rows = {variant: parse_recipe(None, self.arguments(variant, self.seeds[0]))[0] for variant in self.variants}
        baseline = fixed_values(rows[self.baseline])
        for variant, recipe in rows.items():
            for key, value in fixed_values(recipe).items():
                if value != baseline[key]:
                    raise InputError(
                        f"variant {variant!r} changes {key} to {value!r}, which must be the same in every row; "
                        "put it under changes, or set it there if a preset sets it."
                    )
        return {
            Cell(variant, seed): replace(recipe, seed=seed, name=f"seed{seed}")
            for variant, recipe in rows.items()
            for seed in self.seeds
        }


def fixed_values(recipe: Recipe) -> PlainRecipe:
    """Return the values of the keys that must be the same in every row."""
    sections = {section: asdict(getattr(recipe, section)) for section in ("data", "seeds")}
    return {key: sections[key.split(".")[0]][key.split(".")[1]] for key in FIXED_FOR_ALL}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run an ablation from command-line arguments."""
    parser = ArgumentParser(description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile, help=CONFIG_HELP)
    parser.add_class_arguments(Ablation, as_group=False)
    names, words = config_names(sys.argv[1:] if arguments is None else arguments)
    files = [word for name in names for word in ("--config", str(recipe_file(name)))]
    values = parser.instantiate(parser.parse_args([*files, *words]))
    values.pop("config", None)
    try:
        ablation = Ablation(**values)
    except InputError as error:
        parser.error(str(error))
    ablate(ablation)


def ablate(ablation: Ablation) -> Path:
    """Run what is missing and write the report; return the page.

    Raises:
        StageError: runs failed. The others are finished first; the message names the failed ones and the reason.
    """
    made_with = provenance()
    # Every row is parsed before the first one runs: a mistyped key must not show up after hours.
    recipes = ablation.recipes()
    failed = run_all(ablation, recipes)
    if failed:
        reasons = "; ".join(f"{run}: {reason}" for run, reason in failed.items())
        raise StageError(
            f"{len(failed)} of {len(recipes)} runs failed ({reasons}); mend it and run the command again."
        )
    runs = {str(cell): read_run(ablation.folder / str(cell)) for cell in recipes}
    chosen = {variant: recipes[Cell(variant, ablation.seeds[0])].seeds.variant for variant in ablation.variants}
    first = recipes[Cell(ablation.baseline, ablation.seeds[0])]
    splits = [split or ALL_IMAGES for split in first.seeds.splits]
    summary = {split: summarize(ablation, runs, chosen, split) for split in splits if has_scores(runs, split)}
    if not summary:
        raise StageError(f"no split of {', '.join(splits)} has masks; without ground truth there is no table to make.")
    seconds, devices = total_seconds(runs), sorted({each for run in runs.values() for each in run.device.values()})
    result = {
        "recipe": ablation.recipe,
        "changes": ablation.changes,
        "variants": ablation.variants,
        "baseline": ablation.baseline,
        "seeds": ablation.seeds,
        "tables": ablation.shown_tables(),
        "chosen": chosen,
        "summary": summary,
        "seconds": seconds,
        "devices": devices,
        "runs": runs,
        "made_with": made_with,
    }
    write_json(ablation.folder / "metrics.json", result)
    tables = list(make_tables(ablation, summary, chosen))
    page = write_page(ablation, recipes, tables, spent(seconds, devices))
    for table in tables:
        say_result(as_text(table) + "\n")
    say_result(f"{spent(seconds, devices)}\nablation: {page}")
    return page


# ---- Runs.


def run_all(ablation: Ablation, recipes: Mapping[Cell, Recipe]) -> dict[str, str]:
    """Run what is missing, `ablation.parallel` at a time; return the failed runs with the reason.

    A row that shares the training of another is not begun before that is finished, and holds no place until then.
    """
    environment = dict(os.environ)
    if ablation.parallel > 1:
        # Left alone, every run would take all cores and all of them would wait for each other.
        threads = max(1, (os.cpu_count() or 1) // ablation.parallel)
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    in_turn = sorted(recipes, key=lambda cell: ablation.seeds.index(cell.seed))  # whole tables of one seed first
    trainings = plan_trainings({cell: recipes[cell] for cell in in_turn})
    missing = {cell for sharing in trainings.values() for cell in sharing}
    failed: dict[str, str] = {}
    running_stages: set[subprocess.Popen[str]] = set()
    if_stopped(lambda: "before all runs were done; finished runs and checkpoints are kept")
    if not ablation.quiet:
        say_progress(f"ablation: {len(recipes)} runs, {len(trainings)} trainings to do, {ablation.parallel} at a time")

    def run(stage: str, cell: Cell, trained_by: Cell) -> str | None:
        train = stage_folder(recipes[cell], "train")
        if stage == "train":
            if finished(recipes[cell], "train"):
                return None
            if train.is_symlink() and not train.exists():
                train.unlink()  # it led to the training of a row whose folder was deleted
        elif cell != trained_by:
            share_training(recipes[trained_by], recipes[cell])
        return run_stage(stage, ablation.arguments(*cell), environment, running_stages)

    bar: Counter
    with (
        ThreadPoolExecutor(ablation.parallel) as pool,
        progress(total=len(recipes), desc="ablation", unit="run", quiet=ablation.quiet) as bar,
        ending(running_stages),
    ):

        def ended(cell: Cell, reason: str | None) -> None:
            if reason:
                failed[str(cell)] = reason
            bar.update()
            say_result(f"{cell}: {'failed' if reason else 'done'}")

        for cell in in_turn:
            if cell not in missing:
                ended(cell, None)
        ready = deque(("train", cell, cell) for cell in trainings)
        running: dict[Future[str | None], tuple[str, Cell, Cell]] = {}
        while ready or running:
            while ready and len(running) < ablation.parallel:
                job = ready.popleft()
                running[pool.submit(run, *job)] = job
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                stage, cell, _ = running.pop(future)
                reason = future.result()
                if stage == "seeds":
                    ended(cell, reason)
                elif reason is None:  # seeds come before other trainings: a row is whole as soon as it can be
                    ready.extendleft(("seeds", other, cell) for other in reversed(trainings[cell]))
                else:
                    for other in trainings[cell]:
                        ended(other, reason if other == cell else f"it shares the training of {cell}, where {reason}")
    return dict(sorted(failed.items()))


def plan_trainings(recipes: Mapping[Cell, Recipe]) -> dict[Cell, list[Cell]]:
    """Choose one run to train for all that train alike, of those without finished seeds.

    That run is the one whose training is finished, else one that has begun, else the first.

    Returns:
        Run that trains -> the runs, itself among them, that still need its training.
    """
    alike: dict[str, list[Cell]] = {}
    for cell, recipe in recipes.items():
        key = json.dumps(recipe_parts(recipe, TRAINING_DEPENDS_ON), sort_keys=True)
        if holds(recipe, "train", TRAINING_DEPENDS_ON) is False:
            key = str(cell)  # a training of another recipe lies there: train.py refuses it, and others need not wait
        alike.setdefault(key, []).append(cell)
    trainings = {}
    for cells in alike.values():
        missing = [cell for cell in cells if not finished(recipes[cell], "seeds")]
        if missing:
            trained = [cell for cell in cells if finished(recipes[cell], "train")]
            begun = [cell for cell in missing if holds(recipes[cell], "train", TRAINING_DEPENDS_ON)]
            trainings[(trained or begun or missing)[0]] = missing
    return trainings


def share_training(source: Recipe, recipe: Recipe) -> None:
    """Make `train` of a run a relative link to the finished one of `source`, unless it has a finished one itself.

    A training that was begun there is deleted: it would end as the finished one did.
    """
    if finished(recipe, "train"):
        return
    train = stage_folder(recipe, "train")
    if train.is_symlink():
        train.unlink()
    elif train.is_dir():
        shutil.rmtree(train)
    train.parent.mkdir(parents=True, exist_ok=True)
    target = stage_folder(source, "train").resolve()
    train.symlink_to(os.path.relpath(target, train.parent.resolve()), target_is_directory=True)


def stage_folder(recipe: Recipe, stage: str) -> Path:
    """Return the folder of a run's stage."""
    return Path(recipe.output_dir) / recipe.name / stage


def finished(recipe: Recipe, stage: str) -> bool:
    """Say whether a run's "train" or "seeds" is finished, by this recipe."""
    depends_on = {"train": TRAINING_DEPENDS_ON, "seeds": SEEDS_DEPEND_ON}[stage]
    return (stage_folder(recipe, stage) / "done.json").is_file() and bool(holds(recipe, stage, depends_on))


def run_stage(
    stage: str, arguments: Sequence[str], environment: Mapping[str, str], running: set[subprocess.Popen[str]]
) -> str | None:
    """Run a stage in a process of its own, one of `running` meanwhile; return the last line of the error, or None."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bitrans_hf.stages", stage, *arguments],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    running.add(process)
    _, error = process.communicate()
    running.discard(process)
    if not process.returncode:
        return None
    said = error.strip().splitlines()
    return f"{stage} ended with {process.returncode}" + (f", {said[-1]}" if said else "")


@contextmanager
def ending(processes: Collection[subprocess.Popen[str]]) -> Iterator[None]:
    """End the processes where the block is stopped; each keeps its own last checkpoint."""
    try:
        yield
    except BaseException:
        for process in list(processes):
            process.terminate()
        raise


def read_run(folder: Path) -> RunScores:
    """Return what a run measured."""
    stages = {
        stage: read_json(path)
        for stage in ("train", "seeds")
        if (path := folder / stage / "metrics.json").is_file()  # a training may have been deleted after its seeds
    }
    return RunScores(
        splits=SeedsRecord.from_json(stages["seeds"]).splits,
        made_with=stages["seeds"]["made_with"],
        trained_in=os.path.relpath((folder / "train").resolve().parent, folder.parents[1].resolve()),
        seconds={stage: metrics.get("seconds") for stage, metrics in stages.items()},
        device={stage: metrics["made_with"].get("device", "unknown") for stage, metrics in stages.items()},
    )


def total_seconds(runs: Mapping[str, RunScores]) -> dict[str, float]:
    """Add up the wall seconds of the stages of all runs; a training that rows share counts once."""
    trainings = {run.trained_in: run.seconds.get("train") or 0.0 for run in runs.values()}
    seeds = sum(run.seconds["seeds"] or 0.0 for run in runs.values())
    return {"train": round(sum(trainings.values()), 1), "seeds": round(seeds, 1)}


def spent(seconds: Mapping[str, float], devices: Sequence[str]) -> str:
    """Say how long the runs took, and where."""
    shown = {
        stage: f"{each / 3600:.1f} h" if each >= 3600 else f"{each / 60:.1f} min" for stage, each in seconds.items()
    }
    return (
        f"Wall time of all runs, one after another: training {shown['train']}, seeds {shown['seeds']}, on "
        f"{', '.join(devices)}."
    )


# ---- Scores.


Summary: TypeAlias = dict[str, dict[str, dict[str, RowScores]]]
"""Row -> kind of score -> seed variant, or "chosen" -> scores; see `summarize`."""


def has_scores(runs: Mapping[str, RunScores], split: str) -> bool:
    """Whether the split was scored against masks, in every run."""
    return all(run.splits[split].miou for run in runs.values())


def summarize(ablation: Ablation, runs: Mapping[str, RunScores], chosen: Mapping[str, str], split: str) -> Summary:
    """Give mean, standard deviation and paired difference to the baseline of every row.

    Args:
        ablation: The table.
        runs: Run -> its scores.
        chosen: Row -> the seed variant that its recipe names.
        split: Which scores.

    Returns:
        Row -> kind of score ("best threshold", and for every split but the first "first split's threshold") -> seed
        variant, and "chosen" -> the scores. Variants that a row does not have are left out; differences to a baseline
        that has them not are None.
    """
    scores = {run: found.splits[split] for run, found in runs.items()}
    kinds = {
        "best threshold": {run: each.miou for run, each in scores.items()},
        "first split's threshold": {run: each.miou_at_given_threshold for run, each in scores.items()},
    }
    found: dict[str, dict[str, dict[str, list[float]]]] = {row: {} for row in ablation.variants}
    for kind, mious in kinds.items():
        if not mious[f"{ablation.baseline}/seed{ablation.seeds[0]}"]:
            continue
        for row in ablation.variants:
            of_seeds = [mious[f"{row}/seed{seed}"] for seed in ablation.seeds]
            values = {
                variant: [each[variant] for each in of_seeds]
                for variant in SEED_VARIANTS
                if all(variant in each for each in of_seeds)
            }
            found[row][kind] = values | {CHOSEN: values[chosen[row]]}
    return {
        row: {
            kind: {
                variant: described(values, found[ablation.baseline][kind].get(variant))
                for variant, values in by_variant.items()
            }
            for kind, by_variant in by_kind.items()
        }
        for row, by_kind in found.items()
    }


def described(values: Sequence[float], baseline: Sequence[float] | None) -> RowScores:
    """Describe the scores of one row, in the order of the seeds, beside the baseline's of the same seeds."""
    differences = [value - other for value, other in zip(values, baseline or [], strict=baseline is not None)]
    return RowScores(
        mean=round(statistics.fmean(values), 3),
        std=deviation(values),
        values=list(values),
        difference_mean=round(statistics.fmean(differences), 3) if differences else None,
        difference_std=deviation(differences),
    )


def deviation(values: Sequence[float]) -> float | None:
    """Return the sample's standard deviation, None for fewer than two values."""
    return round(statistics.stdev(values), 3) if len(values) > 1 else None


# ---- The page.


def write_page(ablation: Ablation, recipes: Mapping[Cell, Recipe], tables: Sequence[Table], wall_time: str) -> Path:
    """Write the tables, and the same images under every variant."""
    page = ablation.folder / "report" / "index.html"
    shutil.rmtree(page.parent, ignore_errors=True)  # images of an earlier choice of images
    count = f"{len(ablation.seeds)} seeds" if len(ablation.seeds) > 1 else "one seed, so without deviations"
    settings = {"recipe": ablation.recipe, "changes": ablation.changes, "variants": ablation.variants}
    write_report(
        page,
        title=f"Ablation: {ablation.name}",
        rows=list(gallery(ablation, recipes)),
        tables=[*map(unbroken, tables), recipe_table(settings)],
        notes=[
            (
                f"mIoU (%), mean and standard deviation of {count}. The last columns are differences to the baseline "
                f"{ablation.baseline!r} of the same seed. The chosen variant of the seeds is the one that the "
                f"row's own recipe names; the maps below are of it, of seed {ablation.seeds[0]}."
            ),
            (
                "Scores at a split's own best threshold use its ground truth to choose that one number; those at the "
                "first split's threshold do not."
            ),
            wall_time,
        ],
    )
    return page


def make_tables(ablation: Ablation, summary: Mapping[str, Summary], chosen: Mapping[str, str]) -> Iterator[Table]:
    """Give the tables of the ablation for each split, a line for each row and each way of choosing the threshold."""
    compared = ("fused", "refined", CHOSEN)
    titles = {**VARIANT_TITLES, CHOSEN: "Chosen variant"}
    columns = ["", *(VARIANT_TITLES[variant] for variant in SEED_VARIANTS), "Chosen variant", "which"]
    columns += [f"{titles[variant]}, difference" for variant in compared]
    for title, shown in ablation.shown_tables().items():
        for split, rows in summary.items():
            kinds = list(rows[ablation.baseline])
            lines = []
            for kind in kinds:
                for name, row in shown.items():
                    scores = rows[row][kind]
                    cells = [mean_text(scores.get(variant)) for variant in (*SEED_VARIANTS, CHOSEN)]
                    differences = [
                        "-" if row == ablation.baseline else difference_text(scores.get(variant))
                        for variant in compared
                    ]
                    heading = row_heading(ablation, name, row) + (f", {kind}" if len(kinds) > 1 else "")
                    lines.append([heading, *cells, VARIANT_TITLES[chosen[row]], *differences])
            yield Table(f"{title}{': seeds' if title else 'Seeds'} of {split}", columns, lines)


def unbroken(table: Table) -> Table:
    """Keep a mean and its deviation on one line of the page."""
    return replace(
        table,
        rows=[[cell.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}") for cell in row] for row in table.rows],
    )


def row_heading(ablation: Ablation, name: str, row: str) -> str:
    """Return the name that a table shows for a row; the row's own name and what it is for stand in brackets."""
    remarks = [f"row {row!r}"] * (name != row) + ["baseline"] * (row == ablation.baseline)
    return name + (f" ({', '.join(remarks)})" if remarks else "")


def mean_text(scores: RowScores | None) -> str:
    """Write the mean of a row, "-" where it has no such score."""
    return "-" if scores is None else plus_minus(scores.mean, scores.std)


def difference_text(scores: RowScores | None) -> str:
    """Write the difference of a row to the baseline, "-" where there is none."""
    if scores is None or scores.difference_mean is None:
        return "-"
    return plus_minus(scores.difference_mean, scores.difference_std, "+")


def plus_minus(mean: float, std: float | None, sign: str = "") -> str:
    """Write a mean with its standard deviation, where there is one."""
    return f"{mean:{sign}.1f}" + ("" if std is None else f" ± {std:.1f}")


def as_text(table: Table) -> str:
    """Set a table in columns for the terminal."""
    cells = [[table.title, *table.columns[1:]], *table.rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(table.columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) if not column else cell.rjust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in cells)
    )


def gallery(ablation: Ablation, recipes: Mapping[Cell, Recipe]) -> Iterator[GalleryRow]:
    """Give the same images with the seeds of the rows, as the paper's Figure 3; several classes come first."""
    shown = {row: recipes[Cell(row, ablation.seeds[0])] for row in shown_rows(ablation)}
    baseline = recipes[Cell(ablation.baseline, ablation.seeds[0])]
    split = baseline.report.split
    images = load_images(baseline.data, split, masks=True)
    stores = {
        row: SeedStore(stage_folder(recipe, "seeds") / (split or ALL_IMAGES) / "seeds")
        for row, recipe in shown.items()
    }
    stored = set.intersection(*(set(store.ids()) for store in stores.values()))
    labels = images["labels"]
    found = [index for index, image_id in enumerate(images["image_id"]) if image_id in stored and labels[index]]
    several = [index for index in found if len(labels[index]) > 1]
    single = [index for index in found if len(labels[index]) == 1]
    half = min(len(several), ablation.num_images // 2)
    for index in spread(several, half) + spread(single, ablation.num_images - half):
        row = images[index]
        image = bounded_image(open_image(row["image"]), MAX_SIDE)
        size = (image.height, image.width)
        yield GalleryRow(
            image_id=row["image_id"],
            image=image,
            target=None if row["mask"] is None else resized_label_map(open_mask(row["mask"]), size),
            maps={
                name: store.read(row["image_id"], shown[name].seeds.variant, max_side=MAX_SIDE)
                for name, store in stores.items()
            },
            label_map=None,
            class_names=class_names(images),
        )


def shown_rows(ablation: Ablation) -> list[str]:
    """Return the rows that the page shows images of."""
    return list(ablation.variants)[:MOST_GALLERY_ROWS] if ablation.gallery_rows is None else ablation.gallery_rows
