"""Paint the masks of a COCO split once, by a stated rule, for recipes with `data.mask_folder`.

python training/prepare_coco.py --coco COCO --split val2014 --masks COCO/masks/val2014

Needed: annotations_trainval2014.zip (or 2017), unpacked; no images. An interrupted run can be resumed.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..commands import if_stopped
from ..data import write_coco_masks
from ..data.coco_painting import CROWDS, OVERLAPS
from ..progress import progress


def main(arguments: Sequence[str] | None = None) -> None:
    """Paint the masks that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--coco", required=True, metavar="FOLDER", help="with annotations/instances_<split>.json")
    parser.add_argument("--split", required=True, help="train2014, val2014, train2017 or val2017")
    parser.add_argument("--masks", required=True, metavar="FOLDER", help="where the PNGs go")
    parser.add_argument("--overlap", choices=tuple(OVERLAPS), default="later", help=said(OVERLAPS))
    parser.add_argument("--crowd", choices=tuple(CROWDS), default="background", help=said(CROWDS))
    parser.add_argument("--quiet", action="store_true", help="print the result alone")
    options = parser.parse_args(arguments)

    if_stopped(lambda: "before the end; masks that are painted are kept")

    def shown(images: Sequence[Any]) -> Iterable[Any]:
        return progress(images, desc="masks", unit="image", quiet=options.quiet)

    rule = write_coco_masks(
        options.coco, options.split, options.masks, overlap=options.overlap, crowd=options.crowd, progress=shown
    )
    print(f"{options.masks}: {rule}")


def said(choices: Mapping[str, str]) -> str:
    """Return the choices with their meanings."""
    return "; ".join(f"{name}: {meaning}" for name, meaning in choices.items())
