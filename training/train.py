"""Train the Bi-Trans model, or the CNN baseline. See `bitrans_hf.stages.train`."""

from bitrans_hf.commands import run_script

if __name__ == "__main__":
    run_script("bitrans_hf.stages.train")
