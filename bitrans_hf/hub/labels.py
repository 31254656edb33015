"""Class names, label ids and the VOC palette: data, and the one rule that joins class ids to label ids."""

import functools

import numpy as np

from .errors import InputError

IGNORE_INDEX = 255
"""Label id of pixels that no loss and no score counts."""

BACKGROUND = 0
"""Label id of background; object class `c` (0-based) has label id `c + 1`."""

VOC_CLASSES: tuple[str, ...] = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

COCO_CLASSES: tuple[str, ...] = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich",
    "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed",
    "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven",
    "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip


def palette() -> list[int]:
    """Return the VOC color map as PIL wants it: 256 RGB triples in one flat list of 768 values in [0, 255].

    The bits of a label id are dealt out to red, green and blue, most significant first (`VOClabelcolormap` of the
    VOC devkit), so that neighboring ids differ strongly.
    """
    return list(_palette())


@functools.cache  # it goes into every mask that is written
def _palette() -> tuple[int, ...]:
    colors = []
    for label in range(256):
        rgb = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                rgb[channel] |= ((label >> (3 * bit + channel)) & 1) << (7 - bit)
        colors.extend(rgb)
    return tuple(colors)


def class_ids_to_multi_hot(class_ids: list[int], num_classes: int) -> np.ndarray:
    """Turn 0-based object class ids into a multi-hot vector (num_classes,) float32.

    Raises:
        ValueError: an id is outside [0, num_classes).
    """
    multi_hot = np.zeros(num_classes, dtype=np.float32)
    for class_id in class_ids:
        if not 0 <= class_id < num_classes:
            raise InputError(
                f"class id {class_id} is outside [0, {num_classes}); class ids count object classes from 0, "
                "background is not one of them."
            )
        multi_hot[class_id] = 1.0
    return multi_hot
