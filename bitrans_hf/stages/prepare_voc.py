"""Complete a VOC 2012 devkit with SBD's masks, and check all counts of both.

python training/prepare_voc.py --voc VOCdevkit/VOC2012 --sbd benchmark_RELEASE

Needed: VOCtrainval_11-May-2012.tar, VOC2012test.tar for the test split, and SBD's benchmark.tgz, all unpacked. It
writes `SegmentationClassAug/*.png` and `ImageSets/Segmentation/train_aug.txt`. An interrupted run can be resumed.

python training/prepare_voc.py --voc VOCdevkit/VOC2012 --reduced VOC2012_256 --max_side 256

writes a copy with smaller images and masks of everything in the folder, for training on a CPU or for slow uploads.
"""

import argparse
from collections.abc import Iterable, Sequence

from ..commands import if_stopped
from ..data import prepare_voc, write_reduced_voc
from ..progress import progress


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepare the folders that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--voc", required=True, metavar="FOLDER", help="the devkit, with JPEGImages and ImageSets")
    parser.add_argument("--sbd", metavar="FOLDER", help="benchmark_RELEASE; not needed where all masks are there")
    parser.add_argument("--partial", action="store_true", help="accept a part of the data, and say what is missing")
    parser.add_argument(
        "--reduced", metavar="FOLDER", help="write a smaller copy here; without --sbd nothing else is done"
    )
    parser.add_argument("--max_side", type=int, default=256, metavar="PIXELS", help="longest side there (256)")
    parser.add_argument("--quiet", action="store_true", help="print the result alone")
    options = parser.parse_args(arguments)

    if_stopped(lambda: "before the end; files that are written are kept")

    def shown(image_ids: Sequence[str], what: str) -> Iterable[str]:
        return progress(image_ids, desc=what, unit="image", quiet=options.quiet)

    if options.reduced is None or options.sbd is not None:
        print(prepare_voc(options.voc, options.sbd, partial=options.partial, progress=shown))
    if options.reduced is not None:
        print(write_reduced_voc(options.voc, options.reduced, options.max_side, progress=shown))
