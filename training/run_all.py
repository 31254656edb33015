"""Run every stage of a recipe in order; a stage that is finished is skipped, as is one without a section.

accelerate launch training/run_all.py --config training/recipes/shapes.yaml
"""

from collections.abc import Sequence

from make_pseudo_labels import make_pseudo_labels
from make_report import make_report
from make_seeds import make_seeds
from predict_masks import predict_masks
from publish import publish
from recipe import parse_recipe
from runtime import run_script
from train import train
from train_affinity import train_affinity
from train_segmentation import train_segmentation


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stages from command-line arguments."""
    recipe, options = parse_recipe(__doc__, arguments)
    train(recipe, options)
    make_seeds(recipe, options)
    if recipe.affinity is not None:
        train_affinity(recipe, options)
    if recipe.pseudo_labels is not None:
        make_pseudo_labels(recipe, options)
    if recipe.segmentation is not None:
        train_segmentation(recipe, options)
    if recipe.prediction is not None:
        predict_masks(recipe, options)
    make_report(recipe, options)
    if recipe.publish is not None:
        publish(recipe, options)


if __name__ == "__main__":
    run_script(main)
