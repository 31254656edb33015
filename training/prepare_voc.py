"""Complete a VOC 2012 devkit with SBD's masks. See `bitrans_hf.stages.prepare_voc`."""

from bitrans_hf.commands import run_script

if __name__ == "__main__":
    run_script("bitrans_hf.stages.prepare_voc")
