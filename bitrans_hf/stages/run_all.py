"""Run every stage of a recipe in order, skipping finished stages and those without a section.

accelerate launch training/run_all.py --config shapes
"""

from collections.abc import Sequence

from .. import commands, progress
from .affinity import train_affinity
from .build import check_later_splits
from .parse import parse_recipe
from .predictions import predict_masks
from .pseudo_labels import make_pseudo_labels
from .publish import publish
from .report import make_report
from .seeds import make_seeds
from .segmentation import train_segmentation
from .train import train


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stages from command-line arguments."""
    recipe, options = parse_recipe(__doc__, arguments)
    check_later_splits(recipe)
    stages = {"train": train, "seeds": make_seeds}
    if recipe.affinity is not None:
        stages["affinity"] = train_affinity
    if recipe.pseudo_labels is not None:
        stages["pseudo_labels"] = make_pseudo_labels
    if recipe.segmentation is not None:
        stages["segmentation"] = train_segmentation
    if recipe.prediction is not None:
        stages["predictions"] = predict_masks
    stages["report"] = make_report
    if recipe.publish is not None:
        stages["publish"] = publish
    for number, (name, run) in enumerate(stages.items(), start=1):
        if commands.is_first_process() and not options.quiet:
            progress.say_progress(f"stage {number} of {len(stages)}: {name}")
        run(recipe, options)
