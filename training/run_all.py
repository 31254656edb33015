"""Run every stage of a recipe in order; a stage that is finished is skipped, as is one without a section.

accelerate launch training/run_all.py --config training/recipes/shapes.yaml
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from bitrans_hf.commands import run_script

    run_script("run_all")

from collections.abc import Sequence

from bitrans_hf import commands, progress
from make_pseudo_labels import make_pseudo_labels
from make_report import make_report
from make_seeds import make_seeds
from predict_masks import predict_masks
from publish import publish
from recipe import check_later_splits, parse_recipe
from train import train
from train_affinity import train_affinity
from train_segmentation import train_segmentation


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
