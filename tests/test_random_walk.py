from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bitrans_hf.hub.affinity_pairs import affinity_matrix, pair_affinity
from bitrans_hf.refine.random_walk import propagate, propagate_scores, transition_matrix

with np.load(Path(__file__).parent / "golden" / "psa_affinity_golden.npz") as arrays:
    GOLDEN = {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def golden_affinity() -> torch.Tensor:
    """W of the golden features as a sparse matrix."""
    features = F.elu(F.elu(GOLDEN["feat_preelu"]))
    return affinity_matrix(pair_affinity(features), (14, 17))[0]


def random_affinities(h: int, w: int, batch: int, seed: int = 0) -> list[torch.Tensor]:
    features = torch.randn(batch, 3, h, w, generator=torch.Generator().manual_seed(seed))
    return affinity_matrix(pair_affinity(features), (h, w))


def random_cams(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(7))


def walk_by_loops(cams: np.ndarray, affinity: np.ndarray, beta: float, num_doublings: int) -> np.ndarray:
    """Step after step in float64, cell after cell."""
    flat = cams.reshape(len(cams), -1).astype(np.float64)
    weights = affinity.astype(np.float64) ** beta
    for _ in range(2**num_doublings):
        stepped = np.zeros_like(flat)
        for cell in range(flat.shape[1]):
            stepped[:, cell] = (flat * weights[:, cell]).sum(axis=1) / weights[:, cell].sum()
        flat = stepped
    return flat.reshape(cams.shape)


# ---- The reference's arrays.


def test_the_transition_matrix_agrees_with_the_reference():
    ours = transition_matrix(golden_affinity().to_dense())
    np.testing.assert_allclose(ours, GOLDEN["trans_mat_beta8_logt6"].float(), atol=2e-3)


@pytest.mark.parametrize("form", ["sparse", "dense", "batched sparse", "batched dense"])
def test_walked_scores_agree_with_the_reference(form: str):
    affinity, cams = golden_affinity(), GOLDEN["cam_pooled_in"]
    if form == "sparse":
        walked = propagate(cams, affinity)
    elif form == "dense":
        walked = propagate(cams, affinity.to_dense())
    elif form == "batched sparse":
        walked = propagate(torch.stack([cams, cams]), [affinity, affinity])[1]
    else:
        walked = propagate(torch.stack([cams, cams]), affinity.to_dense().repeat(2, 1, 1))[1]
    np.testing.assert_allclose(walked, GOLDEN["cam_rw"], atol=2e-5, rtol=1e-4)


def test_the_prediction_agrees_with_the_reference():
    # Scores that are constant within a cell are what the reference pooled.
    scores = GOLDEN["cam_pooled_in"].repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)
    walked = propagate_scores(scores, golden_affinity())
    np.testing.assert_array_equal(walked.argmax(dim=0), GOLDEN["pred"])


# ---- Against loops.


@pytest.mark.parametrize(("beta", "num_doublings"), [(1.0, 0), (8.0, 3), (2.5, 6)])
def test_the_walk_agrees_with_a_loop(beta: float, num_doublings: int):
    (affinity,), cams = random_affinities(12, 13, 1), random_cams(3, 12, 13)
    expected = walk_by_loops(cams.numpy(), affinity.to_dense().numpy(), beta, num_doublings)
    for form in (affinity, affinity.to_dense()):
        walked = propagate(cams, form, beta=beta, num_doublings=num_doublings)
        np.testing.assert_allclose(walked, expected, atol=1e-6)


def test_columns_are_normalized_when_the_affinity_is_not_symmetric():
    affinity = torch.rand(12, 12, generator=torch.Generator().manual_seed(3))
    cams = random_cams(2, 3, 4)
    expected = walk_by_loops(cams.numpy(), affinity.numpy(), 2.0, 2)
    for form in (affinity, affinity.to_sparse()):
        np.testing.assert_allclose(propagate(cams, form, beta=2.0, num_doublings=2), expected, atol=1e-6)


def test_steps_and_squares_of_the_matrix_give_the_same():
    (affinity,), cams = random_affinities(20, 23, 1), random_cams(4, 20, 23)
    squared = (cams.double().flatten(1) @ transition_matrix(affinity.to_dense().double())).reshape(cams.shape)
    torch.testing.assert_close(propagate(cams.double(), affinity), squared, atol=1e-7, rtol=0)


def test_an_image_of_a_batch_walks_as_if_it_were_alone():
    affinities, cams = random_affinities(11, 14, 3), random_cams(3, 5, 11, 14)
    batched = propagate(cams, affinities)
    for image, affinity, walked in zip(cams, affinities, batched, strict=True):
        torch.testing.assert_close(walked, propagate(image, affinity), atol=1e-6, rtol=0)
    dense = propagate(cams, torch.stack([affinity.to_dense() for affinity in affinities]))
    torch.testing.assert_close(batched, dense, atol=1e-6, rtol=0)


# ---- Properties.


def test_an_identity_affinity_changes_nothing():
    cams = random_cams(3, 5, 6)
    identity = torch.eye(30)
    for form in (identity, identity.to_sparse(), identity.to_sparse_coo()):
        torch.testing.assert_close(propagate(cams, form), cams, atol=0, rtol=0)


def test_separate_regions_exchange_nothing():
    left = torch.zeros(4, 6, dtype=torch.bool)
    left[:, :3] = True
    same = (left.flatten()[:, None] == left.flatten()[None]).float()
    cams = random_cams(2, 4, 6)
    other = cams.clone()
    other[:, ~left] = random_cams(2, 12) + 5.0
    for form in (same, same.to_sparse()):
        walked, walked_other = propagate(cams, form), propagate(other, form)
        torch.testing.assert_close(walked[:, left], walked_other[:, left], atol=0, rtol=0)
        torch.testing.assert_close(walked[:, left], cams[:, left].mean(dim=1, keepdim=True).expand(-1, 12))


def test_the_range_of_a_channel_does_not_grow_and_a_constant_stays():
    (affinity,), cams = random_affinities(12, 15, 1), random_cams(3, 12, 15)
    cams[1] = 0.25
    walked = propagate(cams, affinity)
    assert (walked.amin(dim=(1, 2)) >= cams.amin(dim=(1, 2)) - 1e-6).all()
    assert (walked.amax(dim=(1, 2)) <= cams.amax(dim=(1, 2)) + 1e-6).all()
    torch.testing.assert_close(walked[1], cams[1], atol=1e-6, rtol=0)


def test_inputs_come_back_unchanged():
    (affinity,), cams = random_affinities(12, 13, 1), random_cams(2, 12, 13)
    values, scores = affinity.values().clone(), cams.clone()
    propagate(cams, affinity)
    torch.testing.assert_close(affinity.values(), values, atol=0, rtol=0)
    torch.testing.assert_close(cams, scores, atol=0, rtol=0)


def test_no_warning_about_sparse_matrices_reaches_the_user():
    (affinity,) = random_affinities(12, 13, 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        propagate(random_cams(2, 12, 13), affinity)
    assert caught == []


@pytest.mark.parametrize("shape", [(0, 12, 13), (1, 12, 13)])
def test_few_classes_or_none(shape: tuple[int, ...]):
    (affinity,) = random_affinities(12, 13, 1)
    for form in (affinity, affinity.to_dense()):
        assert propagate(random_cams(*shape), form).shape == shape


def test_a_single_cell_keeps_its_scores():
    (affinity,) = random_affinities(1, 1, 1)
    torch.testing.assert_close(propagate(random_cams(2, 1, 1), affinity), random_cams(2, 1, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_come_back_in_their_own_type(dtype: torch.dtype):
    (affinity,), cams = random_affinities(12, 13, 1), random_cams(2, 12, 13)
    exact = propagate(cams, affinity)
    for form in (affinity.to(dtype), affinity.to_dense().to(dtype)):
        walked = propagate(cams.to(dtype), form)
        assert walked.dtype == dtype
        torch.testing.assert_close(walked.float(), exact, atol=2e-2, rtol=0)


def test_strided_scores_give_the_same():
    (affinity,), cams = random_affinities(12, 13, 1), random_cams(2, 12, 13)
    strided = cams.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert not strided.is_contiguous()
    torch.testing.assert_close(propagate(strided, affinity), propagate(cams, affinity))


# ---- At the image's size.


@pytest.mark.parametrize("size", [(96, 104), (91, 101), (8, 8), (3, 5)])
def test_scores_at_the_images_size_are_pooled_walked_and_resized(size: tuple[int, int]):
    height, width = size
    h, w = -(-height // 8), -(-width // 8)
    (affinity,), scores = random_affinities(h, w, 1), random_cams(3, *size)
    cells = np.zeros((3, h * 8, w * 8), dtype=np.float32)
    cells[:, :height, :width] = scores
    pooled = torch.from_numpy(cells.reshape(3, h, 8, w, 8).mean(axis=(2, 4)))
    large = F.interpolate(propagate(pooled, affinity)[None], size=(h * 8, w * 8), mode="bilinear")[0]
    walked = propagate_scores(scores, affinity)
    torch.testing.assert_close(walked, large[:, :height, :width], atol=1e-6, rtol=0)
    batched = propagate_scores(torch.stack([scores, scores]), [affinity, affinity])
    torch.testing.assert_close(batched[1], walked, atol=1e-6, rtol=0)


@pytest.mark.parametrize("num_classes", [0, 1])
def test_few_classes_or_none_at_the_images_size(num_classes: int):
    (affinity,) = random_affinities(6, 7, 1)
    assert propagate_scores(random_cams(num_classes, 41, 50), affinity).shape == (num_classes, 41, 50)
    assert propagate_scores(random_cams(1, num_classes, 41, 50), [affinity]).shape == (1, num_classes, 41, 50)


# ---- Bad input.

GOOD = torch.eye(6)
CAMS = torch.ones(2, 2, 3)


def with_value(tensor: torch.Tensor, index: tuple[int, ...], value: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


@pytest.mark.parametrize(
    ("cams", "affinity", "words"),
    [
        (CAMS, torch.eye(5), r"scores on a 2x3 grid need an affinity \(6, 6\), got \(5, 5\); bring the scores"),
        (CAMS, torch.eye(5).to_sparse(), r"2x3 grid need an affinity \(6, 6\), got \(5, 5\)"),
        (CAMS, torch.ones(6, 5), r"need an affinity \(6, 6\), got \(6, 5\)"),
        (CAMS, GOOD[None], r"need an affinity \(6, 6\), got one tensor \(1, 6, 6\)"),
        (CAMS, [GOOD.to_sparse()], "of one image and need one affinity"),
        (CAMS[None], GOOD, r"need an affinity \(1, 6, 6\) or a list of 1 matrices \(6, 6\), got one tensor \(6, 6\)"),
        (CAMS[None].repeat(2, 1, 1, 1), [GOOD.to_sparse()], "scores of 2 images need as many affinities, got 1"),
        (CAMS[None], GOOD[None].to_sparse(), "sparse affinities of 1 images as a list"),
        (CAMS[0], GOOD, r"scores must be \(C, h, w\) or \(B, C, h, w\), got \(2, 3\)"),
        (with_value(CAMS, (0, 0, 0), float("nan")), GOOD, "scores hold NaN or infinity"),
        (CAMS, with_value(GOOD, (0, 1), float("nan")), "affinity holds NaN or infinity"),
        (CAMS, with_value(GOOD, (0, 1), float("inf")).to_sparse(), "affinity holds NaN or infinity"),
        (CAMS, with_value(GOOD, (0, 1), -0.5), r"affinities must be in \[0, 1\], got -0.5"),
        (CAMS, with_value(GOOD, (4, 4), 0.0), "column 4 of the affinity is all zero after the power 8; .*diagonal"),
        (CAMS, with_value(GOOD, (4, 4), 0.0).to_sparse(), "column 4 of the affinity is all zero"),
        (CAMS, GOOD.to("meta"), "scores are on cpu, the affinity is on meta"),
    ],
)
def test_bad_input_is_refused_by_message(cams: torch.Tensor, affinity: torch.Tensor, words: str):
    with pytest.raises(ValueError, match=words):
        propagate(cams, affinity)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta": 0.0}, "beta must be a positive number, got 0.0"),
        ({"beta": float("nan")}, "beta must be a positive number, got nan"),
        ({"num_doublings": -1}, "num_doublings must be 0 or more .* got -1"),
    ],
)
def test_bad_options_are_refused_by_message(options: dict[str, float], words: str):
    with pytest.raises(ValueError, match=words):
        propagate(CAMS, GOOD, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=words):
        transition_matrix(GOOD, **options)  # type: ignore[arg-type]


def test_scores_of_another_grid_than_the_network_saw_are_refused():
    with pytest.raises(ValueError, match=r"on a 6x7 grid need an affinity \(42, 42\), got \(36, 36\)"):
        propagate_scores(random_cams(2, 41, 50), torch.eye(36))
    with pytest.raises(ValueError, match=r"\(L, H, W\) or \(B, L, H, W\), got \(41, 50\)"):
        propagate_scores(random_cams(41, 50), torch.eye(42))


def test_a_matrix_that_is_not_square_has_no_transition():
    with pytest.raises(ValueError, match=r"square matrix \(N, N\), got \(3, 2\)"):
        transition_matrix(torch.ones(3, 2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_walk_on_a_gpu_agrees_with_the_cpu():
    affinities, cams = random_affinities(12, 13, 2), random_cams(2, 3, 12, 13)
    on_gpu = propagate(cams.cuda(), [affinity.cuda() for affinity in affinities])
    torch.testing.assert_close(on_gpu.cpu(), propagate(cams, affinities), atol=1e-5, rtol=0)
