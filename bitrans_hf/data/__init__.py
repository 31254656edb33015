"""Loaders: every data set becomes a `datasets.Dataset` with `image_id`, `image`, `labels` and `mask`."""

from .common import DataError, UnreadableImageError, class_names, image_size, open_image, open_mask
from .folder import load_folder
from .shapes import make_shapes
from .voc import load_voc

__all__ = [
    "DataError",
    "UnreadableImageError",
    "class_names",
    "image_size",
    "load_folder",
    "load_voc",
    "make_shapes",
    "open_image",
    "open_mask",
]
