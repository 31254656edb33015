"""Loaders: every data set becomes a `datasets.Dataset` with `image_id`, `image`, `labels` and `mask`."""

from .coco import CocoMaskRule, load_coco, write_coco_masks
from .common import (
    DataError,
    UnreadableImageError,
    class_names,
    colours_to_ids,
    image_size,
    mask_rule,
    open_image,
    open_mask,
    require_labels,
)
from .folder import load_folder
from .folder_report import FolderReport, check_folder
from .shapes import make_shapes
from .sharing import write_parquet
from .voc import load_voc, prepare_voc, write_reduced_voc

__all__ = [
    "CocoMaskRule",
    "DataError",
    "FolderReport",
    "UnreadableImageError",
    "check_folder",
    "class_names",
    "colours_to_ids",
    "image_size",
    "load_coco",
    "load_folder",
    "load_voc",
    "make_shapes",
    "mask_rule",
    "open_image",
    "open_mask",
    "prepare_voc",
    "require_labels",
    "write_coco_masks",
    "write_parquet",
    "write_reduced_voc",
]
