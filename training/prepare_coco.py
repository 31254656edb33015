"""Paint the masks of a COCO split once. See `bitrans_hf.stages.prepare_coco`."""

from bitrans_hf.commands import run_script

if __name__ == "__main__":
    run_script("bitrans_hf.stages.prepare_coco")
