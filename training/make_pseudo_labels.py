"""Make pseudo labels from seeds. See `bitrans_hf.stages.pseudo_labels`."""

from bitrans_hf.commands import run_script

if __name__ == "__main__":
    run_script("bitrans_hf.stages.pseudo_labels")
