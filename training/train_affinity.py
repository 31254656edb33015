"""Train the affinity network. See `bitrans_hf.stages.affinity`."""

from bitrans_hf.commands import run_script

if __name__ == "__main__":
    run_script("bitrans_hf.stages.affinity")
