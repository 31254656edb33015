"""Dense CRF: scores follow the edges of the image. The only file that uses pydensecrf.

Kraehenbuehl & Koltun, NeurIPS 2011 (arXiv:1210.5644), through `pydensecrf2`. One image takes seconds on one core and
the library holds Python's global lock meanwhile, so sets of images use processes: threads gain nothing.
"""

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from ..hub.errors import InputError, MissingExtraError
from ..pool import ImagePool, Outcome


class CrfNotInstalledError(MissingExtraError):
    """The package that computes dense CRFs is absent; the message says how to install it."""


# ---- One image.


@dataclass(frozen=True)
class CrfPreset:
    """Settings of a dense CRF: the unary term, and two Potts terms with Gaussian kernels.

    Attributes:
        iterations: Steps of mean-field inference.
        gaussian_sxy: Standard deviation of the smoothness kernel in pixels.
        gaussian_compat: Its weight.
        bilateral_sxy: Standard deviation of the appearance kernel in pixels.
        bilateral_srgb: Its standard deviation in color, of [0, 255].
        bilateral_compat: Its weight.
        hard_label_probability: None takes -log(score) as unary term. A number takes only each pixel's best label and
            gives it this probability, the others share the rest.
    """

    iterations: int
    gaussian_sxy: float
    gaussian_compat: float
    bilateral_sxy: float
    bilateral_srgb: float
    bilateral_compat: float
    hard_label_probability: float | None = None


CRF_PRESETS: dict[str, CrfPreset] = {
    # CAM labels of PSA, SEAM and MCTformer; `crf_inference` of AFA and ToCo.
    "psa": CrfPreset(10, 3, 3, 80, 13, 10),
    # IRN, SIPE, ReCAM, WeakTr on COCO.
    "irn": CrfPreset(10, 3, 3, 50, 5, 10, hard_label_probability=0.7),
    # Test of MCTformer's segmentation network.
    "mctformer": CrfPreset(10, 4, 3, 83, 5, 3),
    # WeakTr's masks on VOC.
    "weaktr": CrfPreset(10, 4, 3, 83, 5, 3, hard_label_probability=0.7),
    # SEAM after the random walk.
    "seam": CrfPreset(1, 3, 3, 80, 13, 10),
    # Test of SEAM's retrained segmentation network.
    "seam-retrain": CrfPreset(1, 3, 3, 32, 13, 10),
    # AFA's test.
    "afa": CrfPreset(10, 3, 3, 64, 5, 4),
    # ToCo's test on VOC and COCO, and its CAMs.
    "toco": CrfPreset(10, 1, 1, 121, 5, 4),
    "toco-cam": CrfPreset(10, 3, 3, 36, 3, 4),
    # The DeepLab-V2 family: L2G, EPS, ViT-PCM.
    "deeplab-v2": CrfPreset(10, 1, 3, 67, 3, 4),
}
"""Settings by the name of the system that uses them."""


def check_crf_installed() -> None:
    """Raise CrfNotInstalledError with one sentence on how to install it, unless the CRF can run here."""
    _densecrf()


def dense_crf(image: np.ndarray, scores: np.ndarray, *, preset: str | CrfPreset = "psa") -> np.ndarray:
    """Refine label scores by a fully connected CRF over the image's pixels.

    Args:
        image: (H, W, 3) uint8, stored pixels in RGB. Read-only and strided arrays are fine.
        scores: (L, H, W) in [0, 1], of any float type. Row 0 is background, the others are present classes only: time
            is in proportion to L. They need not sum to 1; values below 1e-5 count as 1e-5.
        preset: A name in `CRF_PRESETS`, or settings of your own.

    Returns:
        (L, H, W) float32 marginals in [0, 1], sum 1 over L.

    Raises:
        ValueError: unknown preset, wrong shape or type, no row, NaN, or scores outside [0, 1].
        CrfNotInstalledError: pydensecrf is absent.
    """
    settings = find_preset(preset)
    _check(image, scores)
    densecrf = _densecrf()
    num_labels, height, width = scores.shape
    if num_labels == 1 or height * width == 0:
        return np.ones(scores.shape, dtype=np.float32)
    # pydensecrf refuses float64, read-only and non-contiguous arrays.
    crf = densecrf.DenseCRF2D(width, height, num_labels)
    crf.setUnaryEnergy(_unary_energy(scores, settings.hard_label_probability))
    crf.addPairwiseGaussian(sxy=settings.gaussian_sxy, compat=settings.gaussian_compat)
    crf.addPairwiseBilateral(
        sxy=settings.bilateral_sxy,
        srgb=settings.bilateral_srgb,
        rgbim=np.array(image, dtype=np.uint8, order="C"),
        compat=settings.bilateral_compat,
    )
    marginals = np.array(crf.inference(settings.iterations), dtype=np.float32)
    return marginals.reshape(scores.shape)


def find_preset(preset: str | CrfPreset) -> CrfPreset:
    """Return the settings of that name; settings come back as they are.

    Raises:
        ValueError: there is no preset of that name.
    """
    if isinstance(preset, CrfPreset):
        return preset
    if preset not in CRF_PRESETS:
        raise InputError(f"unknown CRF preset {preset!r}; there are {', '.join(CRF_PRESETS)}.")
    return CRF_PRESETS[preset]


def _densecrf() -> ModuleType:
    try:
        from pydensecrf import densecrf  # compiled, and an extra: most users never need it
    except ImportError as error:
        raise CrfNotInstalledError(
            "the dense CRF needs pydensecrf2, which is not installed: pip install 'bitrans-hf[crf]' (it needs a C++ "
            'compiler, and a Python before 3.13); the refiner "par" needs nothing.'
        ) from error
    return densecrf  # type: ignore[no-any-return]


def _check(image: np.ndarray, scores: np.ndarray) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise InputError(f"the image must be (H, W, 3) uint8, got {image.shape} {image.dtype}.")
    if scores.ndim != 3 or scores.shape[0] == 0 or scores.shape[1:] != image.shape[:2]:
        height, width = image.shape[:2]
        raise InputError(
            f"scores of this image must be (L, {height}, {width}) with background as row 0, got {scores.shape}; "
            "seeds and image must have one size."
        )
    if not np.issubdtype(scores.dtype, np.floating):
        raise InputError(f"scores must be floats in [0, 1], got {scores.dtype}.")
    if scores.size == 0:
        return
    low, high = float(scores.min()), float(scores.max())
    if not np.isfinite([low, high]).all():  # NaN anywhere makes both NaN
        raise InputError("the scores hold NaN or infinity; look at the network that made them.")
    if low < -1e-3 or high > 1 + 1e-3:
        raise InputError(f"scores must be in [0, 1], got values from {low:.4g} to {high:.4g}; normalize them first.")


def _unary_energy(scores: np.ndarray, hard_label_probability: float | None) -> np.ndarray:
    """(L, H, W) -> (L, H*W) float32, -log of a probability."""
    flat = scores.reshape(len(scores), -1)
    if hard_label_probability is None:
        probabilities = np.clip(flat.astype(np.float32), 1e-5, 1.0)
    else:
        rest = (1.0 - hard_label_probability) / (len(scores) - 1)
        probabilities = np.full(flat.shape, rest, dtype=np.float32)
        np.put_along_axis(probabilities, flat.argmax(axis=0)[None], hard_label_probability, axis=0)
    return np.ascontiguousarray(-np.log(probabilities))


# ---- A set of images.


@dataclass(frozen=True)
class CrfJob:
    """What `dense_crf` needs of one image: `image` (H, W, 3) uint8 and `scores` (L, H, W)."""

    image: np.ndarray
    scores: np.ndarray


def crf_pool(
    jobs: Iterable[tuple[str, CrfJob]],
    *,
    preset: str | CrfPreset = "psa",
    processes: int | None = None,
    strict: bool = False,
    progress: str | None = "CRF",
    total: int | None = None,
) -> Iterator[Outcome[np.ndarray]]:
    """Refine a set of images, one on each core.

    Args:
        jobs: (image id, image and scores), taken from their iterable as the work proceeds.
        preset: See `dense_crf`.
        processes: See `ImagePool`.
        strict: Stop at the first image that fails.
        progress: Title of the progress on stderr; None shows none.
        total: Number of jobs, where `jobs` has no length.

    Returns:
        An iterator over the outcomes: for each job in order, marginals (L, H, W) float32, or why the image failed.

    Raises:
        ValueError: unknown preset.
        CrfNotInstalledError: pydensecrf is absent.
        ImageFailedError: `strict` and an image failed.
    """
    work = functools.partial(_refine_job, preset=find_preset(preset))
    check_crf_installed()
    pool = ImagePool(processes)

    def outcomes() -> Iterator[Outcome[np.ndarray]]:
        with pool:
            yield from pool.run(work, jobs, strict=strict, progress=progress, total=total)

    return outcomes()  # bad arguments have been refused by now, not at the first image


def _refine_job(job: CrfJob, preset: CrfPreset) -> np.ndarray:
    return dense_crf(job.image, job.scores, preset=preset)
