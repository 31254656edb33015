"""How sure a mask is, and how that is judged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from bitrans_hf.hub.confidence import mask_confidence
from bitrans_hf.hub.maps import min_max_normalized
from bitrans_hf.metrics.confidence import lift, spearman


def cone(radius: float, side: int = 40) -> torch.Tensor:
    """A cone of height 1 whose value falls to 0.5 at the radius."""
    places = torch.arange(side) - (side - 1) / 2
    distance = (places[:, None] ** 2 + places[None] ** 2).sqrt()
    return (1 - 0.5 * distance / radius).clamp(0, 1)


def test_equal_maps_are_as_sure_as_the_threshold_is_stable():
    maps = min_max_normalized(cone(10)[None])
    masks = [maps > threshold for threshold in (0.5, 0.4, 0.6)]
    ious = [(masks[0] & other).sum() / (masks[0] | other).sum() for other in masks[1:]]
    wanted = float((ious[0] * ious[1]) ** (1 / 5))  # three other maps that agree wholly
    assert mask_confidence(maps, maps.repeat(3, 1, 1, 1), 0.5).item() == pytest.approx(wanted, abs=1e-6)
    steep = (maps > 0.5).float()
    assert mask_confidence(steep, steep.repeat(3, 1, 1, 1), 0.5).item() == pytest.approx(1)


def test_another_mask_elsewhere_lowers_the_confidence_of_its_class_alone():
    left, right = torch.zeros(20, 40), torch.zeros(20, 40)
    left[5:15, 5:15], right[5:15, 25:35] = 1, 1
    maps = torch.stack([left, right])
    others = maps.repeat(4, 1, 1, 1)
    others[0, 0] = others[0, 0].roll(5, dims=1)  # one way sees the first class half beside itself: IoU 1/3
    sure = mask_confidence(maps, others, 0.5)
    torch.testing.assert_close(sure, torch.tensor([(1 / 3) ** (1 / 6), 1.0]))


def test_large_maps_are_compared_small_and_other_grids_are_resized():
    large = torch.nn.functional.interpolate((cone(10) > 0.5).float()[None, None], (640, 640), mode="bilinear")[0]
    sure = mask_confidence(large, (cone(10) > 0.5).float().repeat(4, 1, 1, 1), 0.5)
    assert 0.9 < sure.item() < 1


def test_an_empty_mask_and_no_class_have_none():
    assert mask_confidence(torch.zeros(1, 8, 8), torch.rand(4, 1, 8, 8), 0.5).tolist() == [0.0]
    assert mask_confidence(torch.zeros(0, 8, 8), torch.zeros(4, 0, 8, 8), 0.5).shape == (0,)


def test_the_rank_correlation_is_scipys():
    generator = np.random.default_rng(0)
    first = generator.integers(0, 8, 60).astype(float)  # with ties
    second = first + generator.normal(0, 3, 60)
    assert spearman(first, second) == pytest.approx(spearmanr(first, second).statistic)
    assert np.isnan(spearman(np.ones(4), np.arange(4.0)))


def test_the_lift_counts_bad_masks_among_the_least_sure():
    iou = np.full(20, 0.9)
    iou[[0, 1, 9]] = 0.2
    confidence = np.arange(20.0)
    assert lift(confidence, iou) == pytest.approx(1.0 / 0.15)  # the two least sure are bad, 3 of 20 are
    assert lift(-confidence, iou) == 0
    assert np.isnan(lift(confidence, np.ones(20)))
