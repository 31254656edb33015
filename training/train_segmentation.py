"""Train the segmentation network. See `bitrans_hf.stages.segmentation`."""

from bitrans_hf.commands import run_script

if __name__ == "__main__":
    run_script("bitrans_hf.stages.segmentation")
