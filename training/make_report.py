"""Write the page of a run. See `bitrans_hf.stages.report`."""

from bitrans_hf.commands import run_script

if __name__ == "__main__":
    run_script("bitrans_hf.stages.report")
