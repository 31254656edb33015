"""Run every stage of a recipe in order; a stage that is finished is skipped.

accelerate launch training/run_all.py --config training/recipes/shapes.yaml
"""

from collections.abc import Sequence

from make_report import make_report
from make_seeds import make_seeds
from recipe import parse_recipe
from runtime import run_script
from train import train


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stages from command-line arguments."""
    recipe, options = parse_recipe(__doc__, arguments)
    for stage in (train, make_seeds, make_report):
        stage(recipe, options)


if __name__ == "__main__":
    run_script(main)
