"""Run a table of recipe variants with several seeds, and write one report.

python training/ablate.py --config ablations/paper_tables_shapes

Every cell of the table is an ordinary run, `<output_dir>/<name>/<variant>/seed<number>/`, trained by `train.py` and
scored by `make_seeds.py`. Rows that differ only in how seeds are made share one training: the later row's `train` is a
link to the first one's. To resume an interrupted ablation, rerun the same command: finished runs are kept. The page,
`<output_dir>/<name>/report/index.html`, and `metrics.json` are rewritten each time.
"""

import json
import os
import shutil
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from jsonargparse import ActionConfigFile, ArgumentParser  # type: ignore[attr-defined]  # not in its __all__

from ..data import class_names, open_image, open_mask
from ..data.segmentation import resized_label_map
from ..hub.errors import InputError
from ..hub.image_processing_bitrans import MAX_SIDE, bounded_image
from ..hub.seeds import SEED_VARIANTS
from ..metrics.scores import RowScores, RunScores, SeedsRecord
from ..progress import say_result
from ..recipes import FOLDER, recipe_file
from ..report.drawing import VARIANT_TITLES, GalleryRow
from ..report.page import write_report
from ..report.tables import Table, recipe_table
from ..store import SeedStore
from .build import load_images
from .grid import Cell, RunGrid, stage_folder
from .parse import CONFIG_HELP, config_names, parse_recipe
from .recipe import ALL_IMAGES, Options, PlainRecipe, Recipe
from .records import provenance, read_json, write_json
from .report import spread
from .run import StageError

PRESETS = FOLDER / "presets"
# `str` first: the parser takes the first type that fits, and would read the text "no" as false otherwise.
Changes: TypeAlias = dict[str, str | bool | int | float | list[Any] | Options | None]
SET_BY_THE_ABLATION = ("seed", "name", "output_dir")
"""Keys that no variant may change: they identify the run."""
FIXED_FOR_ALL = (
    *(f"data.{key}" for key in ("source", "root", "classes", "sbd_root", "mask_folder", "mask_overlap", "mask_crowd")),
    *(f"data.{key}" for key in ("drop_empty", "num_val", "image_size", "seed")),
    "seeds.splits",
)
"""Keys that must equal the baseline's, so that all rows are scored on the same images and masks."""
LATER_STAGES = ("affinity", "pseudo_labels", "segmentation", "prediction", "publish")
"""Recipe sections that a table of seeds leaves out."""
MOST_GALLERY_ROWS = 8
"""Largest number of rows with images on the page if `gallery_rows` names none: more would be too small to see."""
CHOSEN = "chosen"
"""Key, beside the seed variants, for the variant that a row's own recipe names."""


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
        """Return the keys that a row changes, including those that every row changes."""
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
    """Return the values of the keys that must be equal in every row."""
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
        StageError: runs failed. The others are finished first; the message names the failed ones and their reasons.
    """
    made_with = provenance()
    # Every row is parsed before the first one runs: a mistyped key must not show up after hours.
    recipes = ablation.recipes()
    in_turn = sorted(recipes, key=lambda cell: ablation.seeds.index(cell.seed))  # whole tables of one seed first
    failed = RunGrid(
        {cell: recipes[cell] for cell in in_turn},
        lambda cell: ablation.arguments(*cell),
        parallel=ablation.parallel,
        quiet=ablation.quiet,
    ).run()
    if failed:
        reasons = "; ".join(f"{run}: {reason}" for run, reason in failed.items())
        raise StageError(
            f"{len(failed)} of {len(recipes)} runs failed ({reasons}); fix the cause and rerun the command."
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


def read_run(folder: Path) -> RunScores:
    """Return the scores of a run."""
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
    """Describe how long the runs took, and on which hardware."""
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
    """Return whether every run scored the split against masks."""
    return all(run.splits[split].miou for run in runs.values())


def summarize(ablation: Ablation, runs: Mapping[str, RunScores], chosen: Mapping[str, str], split: str) -> Summary:
    """Return mean, standard deviation and paired difference to the baseline for every row.

    Args:
        ablation: The table.
        runs: Run -> its scores.
        chosen: Row -> the seed variant that its recipe names.
        split: Which scores.

    Returns:
        Row -> kind of score ("best threshold", and for every split but the first "first split's threshold") -> seed
        variant, and "chosen" -> the scores. Variants that a row lacks are left out; differences are None if the
        baseline lacks the variant.
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
    """Return the tables of the ablation for each split, one line per row and per choice of the threshold."""
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
    """Return the name of a row in a table; the row's own name and purpose follow in parentheses."""
    remarks = [f"row {row!r}"] * (name != row) + ["baseline"] * (row == ablation.baseline)
    return name + (f" ({', '.join(remarks)})" if remarks else "")


def mean_text(scores: RowScores | None) -> str:
    """Format the mean of a row, "-" if it has no such score."""
    return "-" if scores is None else plus_minus(scores.mean, scores.std)


def difference_text(scores: RowScores | None) -> str:
    """Format the difference of a row from the baseline, "-" if there is none."""
    if scores is None or scores.difference_mean is None:
        return "-"
    return plus_minus(scores.difference_mean, scores.difference_std, "+")


def plus_minus(mean: float, std: float | None, sign: str = "") -> str:
    """Format a mean with its standard deviation, if there is one."""
    return f"{mean:{sign}.1f}" + ("" if std is None else f" ± {std:.1f}")


def as_text(table: Table) -> str:
    """Format a table in columns for the terminal."""
    cells = [[table.title, *table.columns[1:]], *table.rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(table.columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) if not column else cell.rjust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in cells)
    )


def gallery(ablation: Ablation, recipes: Mapping[Cell, Recipe]) -> Iterator[GalleryRow]:
    """Return the same images with the rows' seeds, as in the paper's Figure 3; several classes come first."""
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
    """Return the rows with images on the page."""
    return list(ablation.variants)[:MOST_GALLERY_ROWS] if ablation.gallery_rows is None else ablation.gallery_rows
