"""Loaders: every data set becomes a `datasets.Dataset` with `image_id`, `image`, `labels` and `mask`."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .coco import load_coco, write_coco_masks
    from .coco_painting import CocoMaskRule
    from .common import DataError, UnreadableImageError, image_size, open_image
    from .folder import load_folder
    from .folder_report import FolderReport, check_folder
    from .mask_report import check_masks
    from .mask_values import MaskValues
    from .masks import colors_to_ids, open_mask
    from .rows import class_names, mask_rule, require_labels
    from .shapes import make_shapes
    from .sharing import write_parquet
    from .voc import load_voc, prepare_voc, write_reduced_voc

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "CocoMaskRule": "coco_painting",
        "DataError": "common",
        "FolderReport": "folder_report",
        "MaskValues": "mask_values",
        "UnreadableImageError": "common",
        "check_folder": "folder_report",
        "check_masks": "mask_report",
        "class_names": "rows",
        "colors_to_ids": "masks",
        "image_size": "common",
        "load_coco": "coco",
        "load_folder": "folder",
        "load_voc": "voc",
        "make_shapes": "shapes",
        "mask_rule": "rows",
        "open_image": "common",
        "open_mask": "masks",
        "prepare_voc": "voc",
        "require_labels": "rows",
        "write_coco_masks": "coco",
        "write_parquet": "sharing",
        "write_reduced_voc": "voc",
    },
)

__all__ = [
    "CocoMaskRule",
    "DataError",
    "FolderReport",
    "MaskValues",
    "UnreadableImageError",
    "check_folder",
    "check_masks",
    "class_names",
    "colors_to_ids",
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
