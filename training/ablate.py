"""Run a table of recipe variants. See `bitrans_hf.stages.ablate`."""

from bitrans_hf.commands import run_script

if __name__ == "__main__":
    run_script("bitrans_hf.stages.ablate")
