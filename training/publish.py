"""Write a run's folders for the Hub, and upload them. See `bitrans_hf.stages.publish`."""

from bitrans_hf.commands import run_script

if __name__ == "__main__":
    run_script("bitrans_hf.stages.publish")
