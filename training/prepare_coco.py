"""Paint the masks of a COCO split once, by a stated rule, for recipes with `data.mask_folder`.

python training/prepare_coco.py --coco COCO --split val2014 --masks COCO/masks/val2014

Needed: annotations_trainval2014.zip (or 2017), unpacked; no pictures. Killed, it goes on where it was.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tqdm.auto import tqdm

from bitrans_hf.data import write_coco_masks
from bitrans_hf.data.coco import CROWDS, OVERLAPS
from runtime import run_script


def main(arguments: Sequence[str] | None = None) -> None:
    """Paint the masks that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--coco", required=True, metavar="FOLDER", help="with annotations/instances_<split>.json")
    parser.add_argument("--split", required=True, help="train2014, val2014, train2017 or val2017")
    parser.add_argument("--masks", required=True, metavar="FOLDER", help="where the PNGs go")
    parser.add_argument("--overlap", choices=tuple(OVERLAPS), default="later", help=said(OVERLAPS))
    parser.add_argument("--crowd", choices=tuple(CROWDS), default="background", help=said(CROWDS))
    parser.add_argument("--quiet", action="store_true", help="no progress bar, only the result")
    options = parser.parse_args(arguments)

    def progress(images: Sequence[Any]) -> Iterable[Any]:
        return tqdm(images, desc="masks", unit="image", disable=options.quiet or not sys.stderr.isatty())

    rule = write_coco_masks(
        options.coco, options.split, options.masks, overlap=options.overlap, crowd=options.crowd, progress=progress
    )
    print(f"{options.masks}: {rule}")


def said(choices: Mapping[str, str]) -> str:
    """Return the choices with their meaning."""
    return "; ".join(f"{name}: {meaning}" for name, meaning in choices.items())


if __name__ == "__main__":
    run_script(main)
