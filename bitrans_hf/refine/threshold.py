"""A background score from the seeds alone, where no masks are known."""

import numpy as np
import numpy.typing as npt

from ..hub.maps import THRESHOLD
from ..hub.seeds import Seeds

NUM_BINS = 256

OUTLINE = 1.1
"""The background score as a multiple of Otsu's: maps that were spread along the affinity fade slowly beyond the
outline, so that a cut midway between both groups keeps a rim of background. Chosen on train images: training/LOG.md"""


class SeedHistogram:
    """Histogram of the highest seed of every pixel. Each image counts the same, whatever its size.

    Attributes:
        counts: (256,) sums over images of the share of pixels in each bin of [0, 1]. Add it up over processes, then
            assign the total back.
    """

    def __init__(self) -> None:
        self.counts: npt.NDArray[np.float64] = np.zeros(NUM_BINS)

    def add(self, seeds: Seeds) -> None:
        """Count one image; one without classes has no seeds and does not count."""
        if len(seeds.class_ids):
            strongest = seeds.maps.max(axis=0)
            self.counts += np.histogram(strongest, NUM_BINS, (0.0, 1.0))[0] / strongest.size

    def threshold(self) -> float:
        """Return the background score in [0, 1], to two decimals; without images, the one used by default.

        Otsu's threshold (IEEE Trans. Systems, Man, and Cybernetics 1979) splits the values into the two groups with
        the largest variance between them.
        """
        if not self.counts.any():
            return THRESHOLD
        share = self.counts / self.counts.sum()
        centers = (np.arange(NUM_BINS) + 0.5) / NUM_BINS
        below, weighted = share.cumsum()[:-1], (share * centers).cumsum()[:-1]
        mean = float((share * centers).sum())
        spread = np.divide(
            (mean * below - weighted) ** 2,
            below * (1 - below),
            out=np.zeros(NUM_BINS - 1),
            where=(below > 0) & (below < 1),
        )
        # Between two groups that lie apart, all cuts are equally good: take the middle one.
        best = np.flatnonzero(spread >= spread.max() * (1 - 1e-12))
        return round(min(1.0, OUTLINE * float(best.mean() + 1) / NUM_BINS), 2)
