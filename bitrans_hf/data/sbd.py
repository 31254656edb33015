"""SBD, the Semantic Boundaries Dataset (Hariharan et al., ICCV 2011): masks for more images of VOC.

Its archive `benchmark.tgz` unpacks to `benchmark_RELEASE/dataset` with `train.txt` (8,498 ids), `val.txt` (2,857) and
a MATLAB file for each image in `cls`. The images are VOC's own, and so are the 20 classes and their ids.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..hub.image_decoding import DECODING_ERRORS
from ..hub.labels import VOC_CLASSES
from .common import DataError, read_id_list

SBD_SPLITS = ("train", "val")


def sbd_folder(root: str | Path) -> Path:
    """Return the folder with `cls`, `train.txt` and `val.txt`, given that folder, `benchmark_RELEASE` or its parent.

    Raises:
        DataError: there is no such folder.
    """
    root = Path(root)
    for folder in (root, root / "dataset", root / "benchmark_RELEASE" / "dataset"):
        if (folder / "cls").is_dir():
            return folder
    what = "has no folder dataset/cls" if root.is_dir() else "is not a folder"
    raise DataError(f"{root} {what}; give SBD's folder benchmark_RELEASE, unpacked from benchmark.tgz.")


def sbd_ids(root: str | Path, split: str) -> list[str]:
    """Return the image ids of SBD's list `split`, "train" or "val", in the order of the file.

    Raises:
        DataError: the list is missing or damaged.
    """
    path = sbd_folder(root) / f"{split}.txt"
    if not path.is_file():
        raise DataError(f"list {path} is not there, expected SBD's lists train.txt and val.txt; unpack it again.")
    return read_id_list(path)


def read_sbd_mask(path: Path) -> NDArray[np.uint8]:
    """Read the classes of all pixels, `GTcls.Segmentation`, from a file of SBD's folder `cls`.

    SBD marks no object borders: there is no 255.

    Returns:
        (H, W) uint8: 0 background, class id + 1 for objects, the classes in VOC's order.

    Raises:
        DataError: scipy is not installed, or the file is missing, damaged or of another kind.
    """
    try:
        import scipy.io  # here: an extra, only needed to convert these files once
    except ImportError as error:
        raise DataError(
            "SBD's masks are MATLAB files, which need scipy; run pip install 'bitrans-hf[sbd]'."
        ) from error
    if not path.is_file():
        raise DataError(f"SBD mask {path} is not there; unpack the whole archive.")
    try:
        content = scipy.io.loadmat(path, variable_names=["GTcls"])
        mask: Any = content["GTcls"]["Segmentation"][0, 0]
    # scipy meets damaged files with errors of many kinds; nothing but numbers is ever built from the file.
    except (*DECODING_ERRORS, NotImplementedError, scipy.io.matlab.MatReadError) as error:
        raise DataError(
            f"SBD mask {path} cannot be read ({type(error).__name__}: {error}); expected a MATLAB file with the "
            "structure GTcls, as in SBD's folder cls; unpack it again."
        ) from error
    if not isinstance(mask, np.ndarray) or mask.ndim != 2 or mask.dtype.kind not in "uif":
        raise DataError(f"SBD mask {path} holds no GTcls.Segmentation of (height, width) numbers; unpack it again.")
    wrong = mask[~np.isin(mask, np.arange(1 + len(VOC_CLASSES)))]
    if wrong.size:
        raise DataError(f"SBD mask {path} holds the id {wrong[0]}, expected 0 to {len(VOC_CLASSES)}; unpack it again.")
    return mask.astype(np.uint8)
