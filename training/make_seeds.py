"""Make class seeds and label maps with a trained model. See `bitrans_hf.stages.seeds`."""

from bitrans_hf.commands import run_script

if __name__ == "__main__":
    run_script("bitrans_hf.stages.seeds")
