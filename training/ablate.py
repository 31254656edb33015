"""Run a table of recipe variants with several seeds, and write one report.

python training/ablate.py --config training/recipes/ablations/table1_shapes.yaml

Every cell of the table is an ordinary run, `<output_dir>/<name>/<variant>/seed<number>/`, trained by `train.py` and
scored by `make_seeds.py`. Finished runs are kept and a killed one goes on where it was when the same command is given
again. The page, `<output_dir>/<name>/report/index.html`, and `metrics.json` are written anew each time.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from jsonargparse import ActionConfigFile, ArgumentParser  # type: ignore[attr-defined]  # not in its __all__
from tqdm.auto import tqdm

from bitrans_hf.data import class_names, open_image, open_mask
from bitrans_hf.report import VARIANT_TITLES, GalleryRow, Table, recipe_table, write_report
from bitrans_hf.seeds import SEED_VARIANTS
from bitrans_hf.store import SeedStore
from make_report import spread
from recipe import ALL_IMAGES, Recipe, load_images, parse_recipe
from runtime import StageError, provenance, run_script, write_json

HERE = Path(__file__).resolve().parent
# `str` first: the parser takes the first type that fits, and would read the text "no" as false otherwise.
Changes: TypeAlias = dict[str, str | bool | int | float | list[Any] | dict[str, Any] | None]
FIXED_FOR_ALL = ("data.source", "data.root", "data.classes", "seeds.splits", "seed", "name", "output_dir")
"""Keys that no variant may change: the rows of a table are scored on the same images."""
LATER_STAGES = ("affinity", "pseudo_labels", "segmentation", "prediction", "publish")
"""Recipe sections that a table of seeds leaves out."""


@dataclass(frozen=True)
class Ablation:
    """A table: rows are variants of one recipe, each run once for every seed.

    Attributes:
        name: Runs and report go to <output_dir>/<name>/.
        recipe: The recipe file that every row starts from.
        variants: Name of a row -> recipe keys that it changes, such as {"model.scc_weight": 0.0}.
        baseline: The row that the others are compared with, seed by seed.
        seeds: Recipe seeds; equal seeds see the same images in the same order, which makes the differences paired.
        changes: Recipe keys that are changed in every row.
        output_dir: Folder of all runs.
        parallel: Runs at the same time, on one GPU or on the CPU's cores.
        num_images: Images that the page shows under every variant.
        cpu: Run on the CPU even where there is a GPU.
        quiet: No progress bar.
    """

    name: str
    recipe: str
    variants: dict[str, Changes]
    baseline: str
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    changes: Changes = field(default_factory=dict)
    output_dir: str = "runs"
    parallel: int = 1
    num_images: int = 8
    cpu: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        """Check what the types do not say.

        Raises:
            ValueError: the baseline is no row, there is no seed, one comes twice, or a row changes the scored images.
        """
        if self.baseline not in self.variants:
            raise ValueError(f"baseline {self.baseline!r} is no variant; there are {', '.join(self.variants)}.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be different numbers, at least one, got {self.seeds}.")
        if self.parallel < 1:
            raise ValueError(f"parallel must be at least 1, got {self.parallel}.")
        for row, changed in self.variants.items():
            if Path(row).name != row or row == "report":
                raise ValueError(f"variant {row!r} cannot be the name of a folder beside report/; rename it.")
            for key in changed:
                if key in FIXED_FOR_ALL:
                    raise ValueError(
                        f"variant {row!r} changes {key}, which must be the same in every row; put it under changes "
                        "or set it for the whole ablation."
                    )

    @property
    def folder(self) -> Path:
        """Folder of the runs and of the report."""
        return Path(self.output_dir) / self.name

    def arguments(self, variant: str, seed: int) -> list[str]:
        """Return the command-line arguments of one run's stages."""
        arguments = ["--config", self.recipe]
        for section in LATER_STAGES:
            arguments += [f"--{section}", "null"]
        for key, value in {**self.changes, **self.variants[variant]}.items():
            arguments += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
        arguments += ["--output_dir", str(self.folder / variant), "--name", f"seed{seed}", "--seed", str(seed)]
        return [*arguments, "--cpu", json.dumps(self.cpu), "--quiet", "true"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run an ablation from command-line arguments."""
    parser = ArgumentParser(description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with the keys below")
    parser.add_class_arguments(Ablation, as_group=False)
    values = parser.instantiate(parser.parse_args(arguments))
    values.pop("config", None)
    try:
        ablation = Ablation(**values)
    except ValueError as error:
        parser.error(str(error))
    ablate(ablation)


def ablate(ablation: Ablation) -> Path:
    """Run what is missing and write the report; return the page.

    Raises:
        StageError: runs failed. The others are finished first; the message names the failed ones and the reason.
    """
    made_with = provenance()
    # Every row is parsed before the first one runs: a mistyped key must not show up after hours.
    recipes = {
        (variant, seed): parse_recipe(None, ablation.arguments(variant, seed))[0]
        for variant in ablation.variants
        for seed in ablation.seeds
    }
    failed = run_all(ablation)
    if failed:
        reasons = "; ".join(f"{run}: {reason}" for run, reason in failed.items())
        raise StageError(
            f"{len(failed)} of {len(recipes)} runs failed ({reasons}); mend it and run the command again."
        )
    runs = {
        f"{variant}/seed{seed}": json.loads(
            (ablation.folder / variant / f"seed{seed}" / "seeds" / "metrics.json").read_text()
        )
        for variant, seed in recipes
    }
    first = recipes[ablation.baseline, ablation.seeds[0]]
    splits = [split or ALL_IMAGES for split in first.seeds.splits]
    summary = {split: summarize(ablation, runs, split) for split in splits if has_scores(runs, split)}
    if not summary:
        raise StageError(f"no split of {', '.join(splits)} has masks; without ground truth there is no table to make.")
    write_json(
        ablation.folder / "metrics.json",
        {
            "baseline": ablation.baseline,
            "seeds": ablation.seeds,
            "variants": ablation.variants,
            "summary": summary,
            "runs": {
                run: {"splits": scores["splits"], "made_with": scores["made_with"]} for run, scores in runs.items()
            },
            "made_with": made_with,
        },
    )
    page = write_page(ablation, first, summary)
    for split in summary:
        print(as_text(split_table(split, summary[split], ablation)), flush=True)
    print(f"ablation: {page}", flush=True)
    return page


# ---- Runs.


def run_all(ablation: Ablation) -> dict[str, str]:
    """Run every cell of the table, `ablation.parallel` at a time; return the failed ones with the reason."""
    environment = dict(os.environ)
    if ablation.parallel > 1:
        # Left alone, every run would take all cores and all of them would wait for each other.
        threads = max(1, (os.cpu_count() or 1) // ablation.parallel)
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    cells = [(variant, seed) for seed in ablation.seeds for variant in ablation.variants]
    failed: dict[str, str] = {}
    hidden = ablation.quiet or not sys.stderr.isatty()
    with ThreadPoolExecutor(ablation.parallel) as pool:
        waiting = {
            pool.submit(run_one, ablation.arguments(*cell), environment): f"{cell[0]}/seed{cell[1]}" for cell in cells
        }
        bar = tqdm(as_completed(waiting), total=len(cells), desc="ablation", unit="run", disable=hidden)
        for finished in bar:
            run, reason = waiting[finished], finished.result()
            if reason:
                failed[run] = reason
            if hidden:
                print(f"{run}: {'failed' if reason else 'done'}", flush=True)
    return dict(sorted(failed.items()))


def run_one(arguments: Sequence[str], environment: Mapping[str, str]) -> str | None:
    """Train and score one cell in processes of its own; return the last line of the error, or None."""
    for script in ("train.py", "make_seeds.py"):
        result = subprocess.run(
            [sys.executable, str(HERE / script), *arguments], env=environment, capture_output=True, text=True
        )
        if result.returncode:
            said = result.stderr.strip().splitlines()
            return f"{script} ended with {result.returncode}" + (f", {said[-1]}" if said else "")
    return None


# ---- Scores.


def has_scores(runs: Mapping[str, Any], split: str) -> bool:
    """Whether the split was scored against masks, in every run."""
    return all("miou" in scores["splits"][split] for scores in runs.values())


def summarize(ablation: Ablation, runs: Mapping[str, Any], split: str) -> dict[str, Any]:
    """Give mean, standard deviation and paired difference to the baseline of every row.

    Returns:
        Row -> kind of score ("best threshold", and for every split but the first "first split's threshold") -> seed
        variant -> {"mean", "std", "values", "difference_mean", "difference_std"}, mIoU in percent. A standard
        deviation (of the sample, n - 1) needs two seeds; it is null for one.
    """
    kinds = {"best threshold": "miou", "first split's threshold": "miou_at_given_threshold"}
    found: dict[str, dict[str, dict[str, list[float]]]] = {
        row: {
            kind: {
                variant: [float(runs[f"{row}/seed{seed}"]["splits"][split][key][variant]) for seed in ablation.seeds]
                for variant in SEED_VARIANTS
            }
            for kind, key in kinds.items()
            if key in runs[f"{row}/seed{ablation.seeds[0]}"]["splits"][split]
        }
        for row in ablation.variants
    }
    return {
        row: {
            kind: {
                variant: described(values, found[ablation.baseline][kind][variant])
                for variant, values in by_variant.items()
            }
            for kind, by_variant in by_kind.items()
        }
        for row, by_kind in found.items()
    }


def described(values: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    """Describe the scores of one row, in the order of the seeds, beside the baseline's of the same seeds."""
    differences = [value - other for value, other in zip(values, baseline, strict=True)]
    return {
        "mean": round(statistics.fmean(values), 3),
        "std": deviation(values),
        "values": list(values),
        "difference_mean": round(statistics.fmean(differences), 3),
        "difference_std": deviation(differences),
    }


def deviation(values: Sequence[float]) -> float | None:
    """Return the sample's standard deviation, None for a single value."""
    return round(statistics.stdev(values), 3) if len(values) > 1 else None


# ---- The page.


def write_page(ablation: Ablation, recipe: Recipe, summary: Mapping[str, Any]) -> Path:
    """Write the tables, and the same images under every variant."""
    page = ablation.folder / "report" / "index.html"
    shutil.rmtree(page.parent, ignore_errors=True)  # pictures of an earlier choice of images
    count = f"{len(ablation.seeds)} seeds" if len(ablation.seeds) > 1 else "one seed, so without deviations"
    settings = {"recipe": ablation.recipe, "changes": ablation.changes, "variants": ablation.variants}
    write_report(
        page,
        title=f"Ablation: {ablation.name}",
        rows=list(gallery(ablation, recipe)),
        tables=[split_table(split, rows, ablation) for split, rows in summary.items()] + [recipe_table(settings)],
        notes=[
            (
                f"mIoU (%), mean and standard deviation of {count}. The last columns are differences to the baseline "
                f"{ablation.baseline!r} of the same seed. Maps below are the {recipe.seeds.variant!r} seeds of "
                f"seed {ablation.seeds[0]}."
            ),
            (
                "Scores at a split's own best threshold use its ground truth to choose that one number; those at the "
                "first split's threshold do not."
            ),
        ],
    )
    return page


def split_table(split: str, rows: Mapping[str, Any], ablation: Ablation) -> Table:
    """Make the table of one split, a line for each variant and way of choosing the threshold."""
    kinds = list(next(iter(rows.values())))
    lines = []
    for kind in kinds:
        for row, by_kind in rows.items():
            scores = by_kind[kind]
            cells = [plus_minus(scores[variant]["mean"], scores[variant]["std"]) for variant in SEED_VARIANTS]
            differences = [
                "-" if row == ablation.baseline else plus_minus(part["difference_mean"], part["difference_std"], "+")
                for part in (scores["fused"], scores["refined"])
            ]
            lines.append([row + (f", {kind}" if len(kinds) > 1 else ""), *cells, *differences])
    titles = [VARIANT_TITLES[variant] for variant in SEED_VARIANTS]
    differences = [f"{VARIANT_TITLES[variant]}, difference" for variant in ("fused", "refined")]
    return Table(f"Seeds of {split}", ["", *titles, *differences], lines)


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


def gallery(ablation: Ablation, recipe: Recipe) -> Iterator[GalleryRow]:
    """Give the same images with the seeds of every variant, as the paper's Figure 3; several classes come first."""
    split = recipe.report.split
    images = load_images(recipe.data, split, masks=True)
    stores = {
        row: SeedStore(ablation.folder / row / f"seed{ablation.seeds[0]}" / "seeds" / (split or ALL_IMAGES) / "seeds")
        for row in ablation.variants
    }
    stored = set.intersection(*(set(store.ids()) for store in stores.values()))
    labels = images["labels"]
    found = [index for index, image_id in enumerate(images["image_id"]) if image_id in stored and labels[index]]
    several = [index for index in found if len(labels[index]) > 1]
    single = [index for index in found if len(labels[index]) == 1]
    half = min(len(several), ablation.num_images // 2)
    for index in spread(several, half) + spread(single, ablation.num_images - half):
        row = images[index]
        yield GalleryRow(
            image_id=row["image_id"],
            image=open_image(row["image"]),
            target=None if row["mask"] is None else open_mask(row["mask"]),
            maps={name: store.read(row["image_id"], recipe.seeds.variant) for name, store in stores.items()},
            label_map=None,
            class_names=class_names(images),
        )


if __name__ == "__main__":
    run_script(main)
