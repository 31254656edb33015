"""A background score from the seeds alone."""

from __future__ import annotations

import numpy as np
import pytest

from bitrans_hf.hub.seeds import Seeds
from bitrans_hf.refine.threshold import OUTLINE, SeedHistogram


def seeds_of(*maps: np.ndarray) -> Seeds:
    return Seeds(np.arange(len(maps)), np.stack(maps).astype(np.float32))


def exhaustive_otsu(values: np.ndarray) -> float:
    """The cut with the largest variance between both groups, by trying all."""
    cuts, between = (np.arange(255) + 1) / 256, []
    for cut in cuts:
        above = values > cut
        apart = values[above].mean() - values[~above].mean() if 0 < above.mean() < 1 else 0.0
        between.append(above.mean() * (1 - above.mean()) * apart**2)
    best = np.flatnonzero(np.isclose(between, max(between), rtol=1e-9))
    return float(cuts[best].mean())


def test_the_threshold_is_otsus_of_the_strongest_seeds_times_the_outline():
    generator = np.random.default_rng(0)
    low, high = generator.beta(2, 8, (40, 50)), generator.beta(8, 3, (40, 50))
    maps = np.where(generator.random((40, 50)) < 0.3, high, low)
    histogram = SeedHistogram()
    histogram.add(seeds_of(maps, maps * 0.5))  # the weaker class changes nothing
    assert histogram.threshold() == pytest.approx(OUTLINE * exhaustive_otsu(maps), abs=0.011)
    assert 0.4 < histogram.threshold() < 0.8


def test_between_groups_that_lie_apart_the_middle_is_taken():
    histogram = SeedHistogram()
    histogram.add(seeds_of(np.array([[0.1, 0.1, 0.1, 0.5]])))
    assert histogram.threshold() == pytest.approx(OUTLINE * 0.3, abs=0.02)


def test_every_image_counts_the_same_and_parts_add_up():
    generator = np.random.default_rng(1)
    small, large = generator.random((8, 8)) ** 2, generator.random((80, 80)) ** 0.5
    both, parts, repeated = SeedHistogram(), [SeedHistogram(), SeedHistogram()], SeedHistogram()
    for image, part in ((small, parts[0]), (large, parts[1])):
        both.add(seeds_of(image))
        part.add(seeds_of(image))
    assert both.counts.sum() == pytest.approx(2)
    repeated.counts = parts[0].counts + parts[1].counts
    np.testing.assert_allclose(repeated.counts, both.counts)
    assert repeated.threshold() == both.threshold()


def test_without_seeds_it_is_the_usual_one():
    histogram = SeedHistogram()
    histogram.add(Seeds(np.zeros(0, dtype=np.int64), np.zeros((0, 4, 4), dtype=np.float32)))
    assert histogram.threshold() == 0.4
