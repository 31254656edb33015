"""Test a segmentation network and write its masks. See `bitrans_hf.stages.predictions`."""

from bitrans_hf.commands import run_script

if __name__ == "__main__":
    run_script("bitrans_hf.stages.predictions")
