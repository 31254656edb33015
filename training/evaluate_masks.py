"""Score masks, predictions or seeds against ground truth. See `bitrans_hf.stages.evaluate`."""

from bitrans_hf.commands import run_script

if __name__ == "__main__":
    run_script("bitrans_hf.stages.evaluate")
