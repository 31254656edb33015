"""Re-render the tables of docs/results.md from the numbers stored next to it; named grids are read again.

python training/render_results.py                                       (all tables, from docs/results/*.json)
python training/render_results.py runs/paper_tables_shapes              (this grid's numbers are copied first)

A table stands between `<!-- results: GRID, TABLE -->` and `<!-- end -->`.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from bitrans_hf.commands import run_script

    run_script("render_results")

import argparse
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitrans_hf.files import atomic_write
from bitrans_hf.metrics.scores import RowScores
from bitrans_hf.report.drawing import VARIANT_TITLES
from bitrans_hf.stages.ablate import CHOSEN, deviation, mean_text, plus_minus
from bitrans_hf.stages.records import write_json
from bitrans_hf.stages.run import StageError

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAPER = {
    "Table 1": {"one view": "56.9 / 60.6", "SCC": "59.2 / 61.8", "PAC": "59.3 / 62.6", "SCC and PAC": "61.5 / 63.2"},
    "Table 2": {"none": "60.6", "rotation": "61.9", "vertical flip": "60.5", "horizontal flip": "63.2",
                "both flips": "61.9"},
}  # fmt: skip
"""The paper's mIoU on VOC train by table and row; of Table 1 without and with affinity refinement."""
SHOWN = ("sc_cam", "fused", "refined", CHOSEN)
BLOCK = re.compile(r"(<!-- results: (?P<grid>[^,]+), (?P<table>.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from command-line arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "grids", nargs="*", type=Path, help="folders of finished grids, such as runs/paper_tables_shapes"
    )
    parser.add_argument("--docs", type=Path, default=DOCS, help="where results.md is")
    options = parser.parse_args(arguments)
    for folder in options.grids:
        write_json(
            options.docs / "results" / f"{folder.name}.json",
            kept(json.loads((folder / "metrics.json").read_text(encoding="utf-8"))),
        )
    page = options.docs / "results.md"
    with atomic_write(page) as temporary:
        temporary.write_text(rendered(page.read_text(encoding="utf-8"), options.docs / "results"), encoding="utf-8")
    print(page)


def kept(metrics: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what of a grid's `metrics.json` the tables are made from, and where each run comes from."""
    runs = {
        run: {
            "commit": found["made_with"]["commit"],
            "seconds": found["seconds"],
            "threshold": {split: scores["threshold"] for split, scores in found["splits"].items()},
        }
        for run, found in metrics["runs"].items()
    }
    return {**metrics, "runs": runs}


def rendered(page: str, numbers: Path) -> str:
    """Return the page with every table re-rendered.

    Raises:
        StageError: it names a grid or a table that there are no numbers of.
    """

    def table(block: re.Match[str]) -> str:
        source = numbers / f"{block['grid']}.json"
        if not source.is_file():
            raise StageError(f"no numbers at {source}; name the folder of the grid, such as runs/{block['grid']}.")
        grid = json.loads(source.read_text(encoding="utf-8"))
        if block["table"] not in grid["tables"]:
            raise StageError(f"{source} has no table {block['table']!r}; there are {', '.join(grid['tables'])}.")
        return f"{block[1]}{markdown(grid, block['table'])}{block[4]}"

    return BLOCK.sub(table, page)


def markdown(grid: Mapping[str, Any], title: str) -> str:
    """Return one table of a grid.

    The first split is scored at its own best threshold, the others at the first one's. Of the chosen variant there are
    also the threshold, the last split's score at a threshold of its own, and paired differences on the last split to
    the table's first row.
    """
    rows: Mapping[str, str] = grid["tables"][title]
    splits = list(grid["summary"])
    first, last = splits[0], splits[-1]
    variants = [
        variant
        for variant in SHOWN
        if any(variant in scores_of(grid, split, row) for split in splits for row in rows.values())
    ]
    if len({grid["chosen"][row] for row in rows.values()}) == 1:
        variants.remove(CHOSEN)  # a column that repeats another
    titles = {**VARIANT_TITLES, CHOSEN: "chosen"}
    paper = PAPER.get(title, {})
    head = ["", *(["paper"] if paper else [])]
    head += [f"{split}: {titles[variant].lower()}" for split in splits for variant in variants]
    head += [f"threshold of {first}", *([f"{last} at its own"] if last != first else []), f"{last}, difference"]
    lines = [head, ["---"] * len(head)]
    compared = scores_of(grid, last, next(iter(rows.values())))[CHOSEN].values
    for number, (name, row) in enumerate(rows.items()):
        cells = [name, *([paper.get(name, "")] if paper else [])]
        cells += [mean_text(scores_of(grid, split, row).get(variant)) for split in splits for variant in variants]
        cells.append(thresholds(grid, first, row))
        if last != first:
            cells.append(mean_text(RowScores.from_json(grid["summary"][last][row]["best threshold"][CHOSEN])))
        differences = [a - b for a, b in zip(scores_of(grid, last, row)[CHOSEN].values, compared, strict=True)]
        paired = plus_minus(statistics.fmean(differences), deviation(differences), "+")
        lines.append([*cells, paired if number else ""])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def thresholds(grid: Mapping[str, Any], split: str, row: str) -> str:
    """Write the best thresholds of a row's chosen variant, from the lowest to the highest of its seeds."""
    found = [grid["runs"][f"{row}/seed{seed}"]["threshold"][split][grid["chosen"][row]] for seed in grid["seeds"]]
    low, high = min(found), max(found)
    return f"{low:.2f}" if low == high else f"{low:.2f} - {high:.2f}"


def scores_of(grid: Mapping[str, Any], split: str, row: str) -> dict[str, RowScores]:
    """Return variant -> scores of a row at the first split's threshold (the first split: its own best)."""
    kinds = grid["summary"][split][row]
    found = kinds.get("first split's threshold", kinds["best threshold"])
    return {variant: RowScores.from_json(scores) for variant, scores in found.items()}
