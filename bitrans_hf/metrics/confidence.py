"""Does a confidence tell good masks from bad ones? Scores against the true IoU."""

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]

BAD_IOU = 0.3
"""A mask with a lower IoU counts as bad."""

LEAST_SURE = 0.1
"""Share of the masks that are looked at first."""


def spearman(confidence: Values, iou: Values) -> float:
    """Return Spearman's rank correlation of two (N,) in [-1, 1]; nan where one is constant."""
    first, second = _ranks(confidence), _ranks(iou)
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    return float(np.corrcoef(first, second)[0, 1])


def lift(confidence: Values, iou: Values) -> float:
    """Return how many times as many of the least sure tenth are bad as of all; nan where none is bad.

    Args:
        confidence: (N,) of the masks.
        iou: (N,) of the masks with the truth, in [0, 1].
    """
    bad = iou < BAD_IOU
    if not bad.any():
        return float("nan")
    least_sure = np.argsort(confidence, kind="stable")[: max(1, round(LEAST_SURE * len(confidence)))]
    return float(bad[least_sure].mean() / bad.mean())


def _ranks(values: Values) -> Values:
    """Return ranks (N,); equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    ranks: Values = (last - (counts - 1) / 2)[inverse]
    return ranks
