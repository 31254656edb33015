"""Run every stage of a recipe in order. See `bitrans_hf.stages.run_all`."""

from bitrans_hf.commands import run_script

if __name__ == "__main__":
    run_script("bitrans_hf.stages.run_all")
