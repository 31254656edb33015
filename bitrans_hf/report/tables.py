"""Tables of scores and of a recipe."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..metrics.scores import SeedScores, StepScores
from .drawing import ordered_variants, variant_title

STEP_TITLES = {
    "seed": "Seed, cut at its background score",
    "low": "Refined seed, much background",
    "high": "Refined seed, little background",
    "confident": "What both agree upon",
    "walk": "After the random walk",
    "refined": "After the refiner",
    "single_scale": "Segmentation network, the image as it is",
    "multi_scale": "Several scales or flips",
    "crf": "After the dense CRF",
    "par": "After pixel-adaptive refinement",
}
"""Names, in a table, of the steps from seeds to pseudo labels and of the segmentation network's test."""


@dataclass(frozen=True)
class Table:
    """A table of text; columns after the first are set flush right. `best_row` is printed bold."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    best_row: int | None = None
    folded: bool = field(default=False, kw_only=True)


def score_table(scores: SeedScores, title: str = "Scores") -> Table | None:
    """Return the table of the seed variants of one split, with the best one marked; None if nothing was scored."""
    if not scores.miou:
        return None
    names = ordered_variants(scores.miou)
    rows = [
        [
            variant_title(name),
            f"{scores.miou[name]:.1f}",
            f"{scores.threshold[name]:.2f}" if name in scores.threshold else "-",
        ]
        for name in names
    ]
    best = max(range(len(names)), key=lambda index: scores.miou[names[index]])
    return Table(title, ["Seed", "mIoU (%)", "best threshold"], rows, best)


def step_table(scores: StepScores, title: str = "Steps") -> Table | None:
    """Return the table of the steps of a stage: from seeds to pseudo labels, or of the segmentation network's test.

    Returns:
        The table with the best step marked, or None if nothing was scored. Steps that leave pixels out are not
        compared.
    """
    if not scores.steps:
        return None
    several = scores.several_classes.steps if scores.several_classes else {}
    rows = []
    for name, miou in scores.steps.items():
        share = f" ({scores.sure[name]:.0f} % of the pixels)" if name in scores.sure else ""
        rows.append(
            [STEP_TITLES.get(name, name) + share, f"{miou:.1f}", *([f"{several[name]:.1f}"] if several else [])]
        )
    whole = [index for index, name in enumerate(scores.steps) if name not in scores.sure]
    best = max(whole, key=lambda index: list(scores.steps.values())[index], default=None)
    columns = ["Step", "mIoU (%)", *(["several classes (%)"] if several else [])]
    return Table(title, columns, rows, best)


def recipe_table(recipe: Mapping[str, Any], title: str = "Recipe") -> Table:
    """Return a collapsed table of a recipe; nested keys are joined by dots."""

    def flat(part: Mapping[str, Any], prefix: str) -> Iterable[list[str]]:
        for key, value in part.items():
            if isinstance(value, Mapping) and value:
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield [f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, default=str)]

    return Table(title, ["Setting", "Value"], list(flat(recipe, "")), folded=True)
