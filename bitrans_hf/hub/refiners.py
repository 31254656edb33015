"""Refiners by name: scores in, scores that follow the edges of the image out."""

import importlib
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch

from .errors import InputError, MissingExtraError
from .par import pixel_adaptive_refinement

Refiner = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(image (H, W, 3) uint8, scores (1 + K, H, W) in [0, 1], background first) -> scores of the same shape."""


def unrefined(image: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the scores as they are."""
    return scores


def par_refiner(image: np.ndarray, scores: np.ndarray, *, device: torch.device | str = "cpu") -> np.ndarray:
    """Refine scores by pixel-adaptive refinement, which needs nothing but torch."""
    images = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(device)
    stack = torch.from_numpy(np.array(scores, dtype=np.float32))[None].to(device)
    refined: np.ndarray = pixel_adaptive_refinement(images, stack)[0].cpu().numpy()
    return refined


def crf_refiner(image: np.ndarray, scores: np.ndarray, *, preset: str = "psa") -> np.ndarray:
    """Refine scores by the dense CRF of the package.

    Raises:
        MissingExtraError: the package or pydensecrf is not installed, the latter said by the package.
    """
    try:
        # By name: this file also runs from the Hub, where the package need not be installed.
        crf = importlib.import_module("bitrans_hf.refine.crf")
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            'refiner "crf" needs the installed package with its extra crf: pip install "bitrans-hf[crf]"; without it '
            'choose refiner="par" or None.'
        ) from error
    marginals: np.ndarray = crf.dense_crf(image, scores, preset=preset)
    return marginals


REFINERS: Mapping[str, Refiner] = {"none": unrefined, "par": par_refiner, "crf": crf_refiner}
"""By name: no refinement, AFA's pixel-adaptive refinement, the dense CRF."""


def find_refiner(name: str, crf_preset: str = "psa") -> Refiner:
    """Return the refiner of that name; `crf_preset` is a name of `bitrans_hf.refine.crf.CRF_PRESETS`.

    Raises:
        InputError: there is no refiner of that name.
    """
    if name not in REFINERS:
        raise InputError(f"refiner must be one of {', '.join(REFINERS)}, got {name!r}.")
    return partial(crf_refiner, preset=crf_preset) if name == "crf" else REFINERS[name]


def refined_scores(refiner: str | Refiner, image: np.ndarray, scores: torch.Tensor) -> torch.Tensor:
    """Return scores (1 + K, H, W) as a refiner, or the one of that name, leaves them.

    Raises:
        InputError: it returns another shape, or there is no refiner of that name.
    """
    refine = find_refiner(refiner) if isinstance(refiner, str) else refiner
    refined = np.asarray(refine(image, scores.numpy()), dtype=np.float32)
    if refined.shape != scores.shape:
        raise InputError(f"the refiner returned scores of shape {refined.shape}, expected {tuple(scores.shape)}.")
    return torch.from_numpy(refined)
