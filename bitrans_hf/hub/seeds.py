"""Class seeds: a trained model and an image with its labels in, one map per present class out (Eqs. 2, 8, 10).

The procedure is MCTformer's: every scale and its horizontal flip is passed through the network, each view's maps are
fused, refined and resized to the image, summed, and min-max normalized for each present class.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedConfig

from .configuration_bitrans import BiTransConfig
from .errors import InputError
from .image_processing_bitrans import BiTransImageProcessor
from .labels import class_ids_to_multi_hot
from .maps import CAM_FUSIONS, enlarged_strips, fused_maps, min_max_normalized, resized, sum_over_scales
from .modeling_bitrans import BiTransModel, BiTransOutput

SEED_VARIANTS: dict[str, tuple[str, bool]] = {
    "sc_cam": ("sc_cam", False),
    "coarse_cam": ("coarse_cam", False),
    "fused": ("fused", False),
    "refined": ("fused", True),
}
"""The (mode, refine) pairs that every report shows side by side."""


def seed_variants(fusion: str = "fused") -> dict[str, tuple[str, bool]]:
    """Return `SEED_VARIANTS` with another rule of fusion, a name of `CAM_FUSIONS`, behind "fused" and "refined"."""
    return {name: (fusion if mode == "fused" else mode, refine) for name, (mode, refine) in SEED_VARIANTS.items()}


@dataclass(frozen=True)
class Seeds:
    """Class seeds of one image.

    Attributes:
        class_ids: (K,) int64, 0-based ids of the present object classes, ascending.
        maps: (K, H, W) float32 in [0, 1] at the image's size, or at a smaller size where a reader asked for that; each
            map's minimum is 0 and its maximum 1.
    """

    class_ids: np.ndarray
    maps: np.ndarray


def sum_over_views(
    model: Callable[[torch.Tensor], BiTransOutput],
    scaled_views: Sequence[torch.Tensor],
    variants: Mapping[str, tuple[str, bool]],
    *,
    flip: bool = True,
    size: tuple[int, int] | None = None,
    refine_steps: int = 1,
    normalize_affinity: bool = False,
    present: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Sum the maps of every scale and its flip, before normalization.

    Args:
        model: In evaluation mode; its output holds the maps that the variants are made of.
        scaled_views: One normalized batch (B, 3, H_s, W_s) for each scale, on the model's device.
        variants: Names of the results -> (mode, refine), see `SEED_VARIANTS`. All come from the same forward passes.
        flip: Add the horizontally flipped image of each scale; image and flip run as one batch.
        size: (H, W) to resize every view's maps to before summing; None leaves them on the token grid, which needs a
            single scale and loses nothing: resizing and flipping commute with the sum.
        refine_steps: How often refined maps are spread.
        normalize_affinity: Give every row of the affinity the sum 1 first.
        present: (B, C) in [0, 1], the classes that the images show; None: as probably as the model tags them.

    Returns:
        name -> (B, C, H, W) or (B, C, h, w) float32, for all C classes.
    """
    if size is None and len(scaled_views) > 1:
        raise InputError(f"{len(scaled_views)} scales have {len(scaled_views)} token grids; give the size to sum at.")

    def maps_of(pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        output = model(torch.cat([pixel_values, pixel_values.flip(-1)]) if flip else pixel_values)
        spread = {"refine_steps": refine_steps, "normalize_affinity": normalize_affinity, "present": present}
        return {
            name: fused_maps(output, mode, refine=refine, flip=flip, **spread)  # type: ignore[arg-type]
            for name, (mode, refine) in variants.items()
        }

    with torch.no_grad():
        return sum_over_scales(map(maps_of, scaled_views), size)


def normalized_seeds(class_ids: np.ndarray, maps: torch.Tensor, size: tuple[int, int]) -> Seeds:
    """Resize the maps of the present classes to the image and min-max normalize each.

    Args:
        class_ids: (K,) ids that belong to `maps`.
        maps: (K, h, w) float, any range.
        size: (H, W) of the image in pixels.
    """
    if len(class_ids) == 0:
        return Seeds(np.zeros(0, dtype=np.int64), np.zeros((0, *size), dtype=np.float32))
    values = min_max_normalized(resized(maps.float(), size))
    return Seeds(np.asarray(class_ids, dtype=np.int64), values.cpu().numpy())


def seed_strips(seeds: Seeds, size: tuple[int, int]) -> Iterator[tuple[slice, Seeds]]:
    """Bring seeds that were read at a smaller size to the image's (H, W), in strips of rows."""
    for rows, strip in enlarged_strips(torch.from_numpy(seeds.maps), size):
        yield rows, Seeds(seeds.class_ids, strip.numpy())


def extract_seeds(
    model: BiTransModel,
    image: Image.Image,
    image_labels: Sequence[str] | Sequence[float] | np.ndarray | torch.Tensor,
    *,
    processor: BiTransImageProcessor,
    scales: Sequence[float] = (1.0,),
    flip: bool = True,
    mode: str | None = None,
    refine: bool = True,
    refine_steps: int | None = None,
    normalize_affinity: bool | None = None,
) -> Seeds:
    """Localize the classes that an image is known to hold.

    Args:
        model: A trained model; it runs in evaluation mode and is left in the mode it was in.
        image: PIL image of any mode, at least one patch in height and width.
        image_labels: Names of the present classes, or a multi-hot vector (C,).
        processor: Resizes and normalizes; an image with a longer side than its `max_side` is worked on at that size.
        scales: Sizes to average over, relative to the image; the first must be 1.0.
        flip: Average over the horizontal flip of each size too.
        mode: "fused" (SC-CAM x ReLU(Coarse-CAM), Eq. 8), its root "fused_sqrt", "competing"
            (the classes of the image share its patches), "sc_cam" or "coarse_cam"; None: the model's `config.fusion`.
        refine: Spread the maps along the patch affinity (Eq. 10).
        refine_steps: How often; None: as the model's configuration says.
        normalize_affinity: Give every row of the affinity the sum 1 first; None: as the model's configuration says.

    Returns:
        One map per present class, ascending by class id.

    Raises:
        ValueError: unknown mode or class name, wrong number of labels, first scale not 1.0, image smaller than a
            patch.
    """
    config = cast(BiTransConfig, model.config)
    mode, reading = reading_of(config, mode, refine_steps, normalize_affinity)
    if mode not in CAM_FUSIONS:
        raise InputError(f"mode must be one of {', '.join(CAM_FUSIONS)}, got {mode!r}.")
    if len(scales) == 0 or scales[0] != 1.0:
        raise InputError(f"the first scale must be 1.0, which sets the size of the seeds; got {tuple(scales)}.")
    class_ids = present_class_ids(image_labels, cast("Mapping[int, str]", config.id2label))
    bounded = processor.bounded(image)
    views = [view.to(device=model.device, dtype=model.dtype) for view in processor.scaled_views(bounded, scales)]
    was_training = model.training
    model.eval()
    try:
        total = sum_over_views(
            model,
            views,
            {mode: (mode, refine)},
            flip=flip,
            size=(bounded.height, bounded.width),
            **reading,
            present=presence(class_ids, config),
        )[mode]
    finally:
        model.train(was_training)
    return normalized_seeds(class_ids, total[0, torch.from_numpy(class_ids)], (image.height, image.width))


def reading_of(
    config: BiTransConfig, mode: str | None, refine_steps: int | None, normalize_affinity: bool | None
) -> tuple[str, dict[str, Any]]:
    """Return the mode, and the other two options by name; None: as the model's configuration says."""
    return config.fusion if mode is None else mode, {
        "refine_steps": config.refine_steps if refine_steps is None else refine_steps,
        "normalize_affinity": config.normalize_affinity if normalize_affinity is None else normalize_affinity,
    }


def presence(class_ids: np.ndarray, config: PreTrainedConfig) -> torch.Tensor:
    """Turn the ids (K,) of an image's classes into a multi-hot (1, C) float32 for a model with this config."""
    return torch.from_numpy(class_ids_to_multi_hot(class_ids.tolist(), cast(int, config.num_labels)))[None]


def present_class_ids(
    image_labels: Sequence[str] | Sequence[float] | np.ndarray | torch.Tensor, id2label: Mapping[int, str]
) -> np.ndarray:
    """Turn class names or a multi-hot vector (C,) into ascending 0-based class ids (K,) int64.

    Raises:
        ValueError: an unknown class name, or a vector that does not have C entries of 0 or 1.
    """
    labels = list(image_labels)
    if labels and all(isinstance(label, str) for label in labels):
        ids = {name: int(class_id) for class_id, name in id2label.items()}
        unknown = sorted({label for label in labels if label not in ids})
        if unknown:
            raise InputError(f"unknown class name {', '.join(map(repr, unknown))}; the model knows {', '.join(ids)}.")
        return np.array(sorted({ids[label] for label in labels}), dtype=np.int64)
    if labels and len(labels) != len(id2label):
        raise InputError(
            f"expected one 0/1 label for each of {len(id2label)} classes, or class names; got {len(labels)} values."
        )
    values = np.array([float(label) for label in labels])
    if not np.isin(values, (0.0, 1.0)).all():
        raise InputError(f"image labels must be 0 or 1, got {sorted(set(values.tolist()) - {0.0, 1.0})}.")
    return np.flatnonzero(values).astype(np.int64)
