from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bitrans_hf.hub.affinity_pairs import (
    AffinityLabels,
    affinity_labels,
    affinity_loss,
    affinity_matrix,
    fitting_radius,
    half_disc_offsets,
    pair_affinity,
    pair_indices,
)

with np.load(Path(__file__).parent / "golden" / "psa_affinity_golden.npz") as arrays:
    GOLDEN = {key: arrays[key] for key in arrays.files}

GRID = (14, 17)  # of the golden features


def golden(key: str) -> torch.Tensor:
    return torch.from_numpy(GOLDEN[key])


def golden_pairs() -> torch.Tensor:
    """The golden features go through ELU once per concatenated part and once after the layer that joins them."""
    return pair_affinity(F.elu(F.elu(golden("feat_preelu"))))


def random_features(h: int, w: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 5, h, w, generator=torch.Generator().manual_seed(0))


def pairs_by_loops(h: int, w: int, radius: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(from-cell, partner) of every pair, offset after offset, from the definition of the half disc."""
    offsets = [
        (dy, dx)
        for dy in range(radius)
        for dx in range(-radius + 1, radius)
        if math.hypot(dy, dx) < radius and (dy > 0 or dx > 0)
    ]
    cells = [(y, x) for y in range(h - radius + 1) for x in range(radius - 1, w - radius + 1)]
    return [((y, x), (y + dy, x + dx)) for dy, dx in offsets for y, x in cells]


# ---- The reference's arrays.


def test_offsets_and_indices_agree_with_the_reference():
    assert [list(offset) for offset in half_disc_offsets(5)] == GOLDEN["search_offsets_dy_dx"].tolist()
    start, partners = pair_indices(GRID)
    np.testing.assert_array_equal(start, GOLDEN["ind_from"])
    np.testing.assert_array_equal(partners.flatten(), GOLDEN["ind_to"])


def test_pair_affinities_agree_with_the_reference():
    np.testing.assert_allclose(golden_pairs(), GOLDEN["aff_pairs"], atol=2e-5)


def test_the_dense_matrix_agrees_with_the_reference():
    (matrix,) = affinity_matrix(golden_pairs(), GRID)
    np.testing.assert_allclose(matrix.to_dense(), GOLDEN["aff_dense"], atol=2e-5)


def test_label_masks_agree_with_the_reference():
    labels = affinity_labels(golden("label_in").unsqueeze(0))
    for ours, key in ((labels.background, "bg_pos"), (labels.foreground, "fg_pos"), (labels.negative, "neg")):
        np.testing.assert_array_equal(ours[0], GOLDEN[f"label_{key}"].astype(bool), err_msg=key)


def test_loss_terms_agree_with_the_reference():
    terms = affinity_loss(golden("loss_aff").unsqueeze(0), affinity_labels(golden("label_in").unsqueeze(0)))
    ours = [terms[name] for name in ("background", "foreground", "negative", "total")]
    np.testing.assert_allclose(ours, GOLDEN["loss_terms_bg_fg_neg_total"], atol=2e-5)


# ---- Any radius, against loops.

SIZES = [(3, 5, 2), (7, 9, 3), (9, 8, 4), (11, 13, 5), (15, 16, 7)]


@pytest.mark.parametrize(("h", "w", "radius"), SIZES)
def test_pairs_of_any_radius_agree_with_a_loop(h: int, w: int, radius: int):
    radius = fitting_radius((h, w), radius)
    features, expected_pairs = random_features(h, w), pairs_by_loops(h, w, radius)
    pairs = pair_affinity(features, radius)
    assert pairs.shape[1] == len(half_disc_offsets(radius))
    assert pairs[0].numel() == len(expected_pairs)
    dense = torch.stack([matrix.to_dense() for matrix in affinity_matrix(pairs, (h, w), radius)])
    expected_dense = torch.eye(h * w).repeat(2, 1, 1)
    for batch in range(2):
        for number, ((y, x), (to_y, to_x)) in enumerate(expected_pairs):
            distance = (features[batch, :, y, x] - features[batch, :, to_y, to_x]).abs().mean()
            value = math.exp(-float(distance))
            assert pairs[batch].flatten()[number].item() == pytest.approx(value, abs=1e-6)
            expected_dense[batch, y * w + x, to_y * w + to_x] = value
            expected_dense[batch, to_y * w + to_x, y * w + x] = value
    torch.testing.assert_close(dense, expected_dense, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("h", "w", "radius"), [(3, 5, 2), (6, 9, 3)])
def test_gradients_agree_with_finite_differences(h: int, w: int, radius: int):
    features = random_features(h, w).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda f: pair_affinity(f, radius), features)


def test_gradients_agree_with_those_of_the_plain_formula():
    features = random_features(12, 14).requires_grad_()
    weights = torch.rand(2, 34, 8 * 6, generator=torch.Generator().manual_seed(2))
    (ours,) = torch.autograd.grad((pair_affinity(features) * weights).sum(), features)
    start, partners = pair_indices((12, 14))
    flat = features.flatten(2)
    plain = torch.exp(-(flat[:, :, partners] - flat[:, :, None, start]).abs().mean(dim=1))
    (theirs,) = torch.autograd.grad((plain * weights).sum(), features)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_backward_needs_the_features_and_the_result_only():
    features = random_features(20, 24, batch=1).requires_grad_()
    kept: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        pairs = pair_affinity(features)
    assert sum(kept) <= features.numel() + pairs.numel()


@pytest.mark.parametrize(("h", "w", "radius"), SIZES)
def test_labels_of_any_radius_agree_with_a_loop(h: int, w: int, radius: int):
    radius = fitting_radius((h, w), radius)
    ids = torch.tensor([0, 0, 1, 2, 255], dtype=torch.uint8)
    maps = ids[torch.randint(0, 5, (2, h, w), generator=torch.Generator().manual_seed(1))]
    labels = affinity_labels(maps, radius)
    found: dict[str, list[bool]] = {"background": [], "foreground": [], "negative": []}
    for batch in range(2):
        for here, there in pairs_by_loops(h, w, radius):
            a, b = int(maps[batch][here]), int(maps[batch][there])
            sure = a != 255 and b != 255
            found["background"].append(sure and a == b == 0)
            found["foreground"].append(sure and a == b != 0)
            found["negative"].append(sure and a != b)
    for name, expected in found.items():
        assert getattr(labels, name).flatten().tolist() == expected, name


@pytest.mark.parametrize(("size", "expected"), [((56, 56), 5), ((11, 40), 5), ((40, 10), 4), ((5, 9), 2), ((1, 1), 1)])
def test_the_radius_shrinks_on_small_grids(size: tuple[int, int], expected: int):
    assert fitting_radius(size, 5) == expected


@pytest.mark.parametrize("size", [(1, 1), (1, 30), (2, 2), (4, 50), (5, 5), (6, 10)])
def test_a_grid_of_any_size_has_a_matrix(size: tuple[int, int]):
    pairs = pair_affinity(random_features(*size))
    for matrix in affinity_matrix(pairs, size):
        dense = matrix.to_dense()
        torch.testing.assert_close(dense, dense.T, atol=0, rtol=0)
        assert (dense.diagonal() == 1).all()
        if min(size) < 5:
            torch.testing.assert_close(dense, torch.eye(size[0] * size[1]), atol=0, rtol=0)
    assert affinity_labels(torch.zeros(2, *size, dtype=torch.uint8)).background.shape == pairs.shape


# ---- What the matrix is.


def test_the_matrix_keeps_edges_only():
    (matrix,) = affinity_matrix(pair_affinity(random_features(30, 40, batch=1)), (30, 40))
    assert matrix.is_coalesced()
    assert matrix._nnz() == 2 * 34 * 26 * 32 + 30 * 40
    torch.testing.assert_close(matrix.to_dense(), matrix.clone().coalesce().to_dense(), atol=0, rtol=0)


def test_mirrored_features_give_the_mirrored_matrix_away_from_the_sides():
    # From-cells leave columns out, so pairs with a cell among the outer four columns may be missing in one of the two.
    features = random_features(12, 15, batch=1)
    (matrix,), (mirrored,) = (affinity_matrix(pair_affinity(f), (12, 15)) for f in (features, features.flip(-1)))
    cells = torch.arange(180).reshape(12, 15)
    inner, inner_mirrored = cells[:, 4:11].flatten(), cells.flip(-1)[:, 4:11].flatten()
    ours, theirs = matrix.to_dense()[inner][:, inner], mirrored.to_dense()[inner_mirrored][:, inner_mirrored]
    assert (ours > 0).sum() > 2000
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_close_to_float32(dtype: torch.dtype):
    features = random_features(11, 12)
    pairs = pair_affinity(features.to(dtype))
    assert pairs.dtype == dtype
    torch.testing.assert_close(pairs.float(), pair_affinity(features), atol=2e-2, rtol=0)
    assert affinity_matrix(pairs, (11, 12))[0].dtype == dtype


def test_strided_features_give_the_same():
    features = random_features(11, 12)
    strided = features.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    assert not strided.is_contiguous()
    torch.testing.assert_close(pair_affinity(strided), pair_affinity(features))


# ---- Loss.


def test_the_loss_is_a_masked_mean_and_absent_kinds_count_nothing():
    pairs = torch.tensor([[[0.25, 0.5, 0.75, 0.9]]])
    none = torch.zeros(1, 1, 4, dtype=torch.bool)
    background = torch.tensor([[[True, True, False, False]]])
    terms = affinity_loss(pairs, AffinityLabels(background, none, none))
    expected = (math.log(4) + math.log(2)) / 2
    assert terms["background"].item() == pytest.approx(expected, abs=1e-4)
    assert (terms["foreground"].item(), terms["negative"].item()) == (0.0, 0.0)
    assert terms["total"].item() == pytest.approx(expected / 4, abs=1e-4)


def test_the_loss_pulls_alike_pairs_together_and_unlike_pairs_apart():
    features = random_features(11, 11, batch=1).requires_grad_()
    maps = torch.zeros(1, 11, 11, dtype=torch.uint8)
    maps[:, :, 6:] = 1
    labels = affinity_labels(maps)
    optimizer = torch.optim.Adam([features], lr=0.05)
    before = affinity_loss(pair_affinity(features), labels)["total"].item()
    for _ in range(30):
        optimizer.zero_grad()
        affinity_loss(pair_affinity(features), labels)["total"].backward()
        optimizer.step()
    pairs = pair_affinity(features.detach())
    assert affinity_loss(pairs, labels)["total"].item() < 0.7 * before
    assert pairs[labels.background | labels.foreground].mean() > pairs[labels.negative].mean() + 0.2


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_loss_is_finite_at_the_ends(value: float, dtype: torch.dtype):
    pairs = torch.full((1, 1, 2), value, dtype=dtype, requires_grad=True)
    every = torch.ones(1, 1, 2, dtype=torch.bool)
    loss = affinity_loss(pairs, AffinityLabels(every, every, every))["total"]
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert torch.isfinite(pairs.grad).all()


# ---- Bad input.


@pytest.mark.parametrize(
    ("pairs", "size", "words"),
    [
        (torch.zeros(1, 34, 91), GRID, r"14x17 grid at radius 5 have shape \(B, 34, 90\), got \(1, 34, 91\)"),
        (torch.zeros(1, 34, 90), (17, 14), r"17x14 grid at radius 5 have shape \(B, 34, 78\)"),
        (torch.zeros(34, 90), GRID, r"got \(34, 90\)"),
    ],
)
def test_pairs_of_another_grid_are_refused(pairs: torch.Tensor, size: tuple[int, int], words: str):
    with pytest.raises(ValueError, match=words):
        affinity_matrix(pairs, size)


def test_a_radius_without_meaning_is_refused():
    with pytest.raises(ValueError, match="radius must be at least 1 cell, got 0"):
        half_disc_offsets(0)
