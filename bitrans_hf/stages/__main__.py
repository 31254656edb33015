"""Start one stage: `python -m bitrans_hf.stages seeds --config voc_deit_small`, also after `accelerate launch`."""

import sys

from ..commands import run_script

STAGES = (
    "run_all",
    "train",
    "seeds",
    "affinity",
    "pseudo_labels",
    "segmentation",
    "predictions",
    "report",
    "publish",
    "evaluate",
    "ablate",
)

if __name__ == "__main__":
    if sys.argv[1:2] == [] or sys.argv[1] not in STAGES:
        sys.exit(f"usage: python -m bitrans_hf.stages STAGE [options]; the stages are {', '.join(STAGES)}.")
    run_script(f"bitrans_hf.stages.{sys.argv.pop(1)}")
