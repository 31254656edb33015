from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bitrans_hf.hub.par import DILATIONS, pixel_adaptive_refinement


def random_images(batch: int = 2, h: int = 7, w: int = 9) -> torch.Tensor:
    return torch.rand(batch, 3, h, w, generator=torch.Generator().manual_seed(0))


def random_scores(batch: int = 2, channels: int = 3, h: int = 7, w: int = 9) -> torch.Tensor:
    return torch.rand(batch, channels, h, w, generator=torch.Generator().manual_seed(1))


def refine_by_loops(image: np.ndarray, scores: np.ndarray, dilations: tuple[int, ...], iterations: int) -> np.ndarray:
    """AFA's rule pixel after pixel in float64, with its weights that sum to 1.01."""
    _, height, width = image.shape
    steps = [(dy * d, dx * d) for d in dilations for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
    distances = [math.hypot(dy, dx) for dy, dx in steps]
    position = softmax([-((distance / np.std(distances, ddof=1) / 0.3) ** 2) for distance in distances])

    def neighbors(y: int, x: int) -> list[tuple[int, int]]:
        return [(min(max(y + dy, 0), height - 1), min(max(x + dx, 0), width - 1)) for dy, dx in steps]

    weights = {}
    for y in range(height):
        for x in range(width):
            logits = np.zeros(len(steps))
            for channel in image.astype(np.float64):
                values = np.array([channel[at] for at in neighbors(y, x)])
                logits -= (np.abs(values - channel[y, x]) / (values.std(ddof=1) + 1e-8) / 0.3) ** 2 / 3
            weights[y, x] = softmax(logits) + 0.01 * position
    refined = scores.astype(np.float64)
    for _ in range(iterations):
        before = refined.copy()
        for (y, x), weight in weights.items():
            refined[:, y, x] = sum(w * before[:, at[0], at[1]] for w, at in zip(weight, neighbors(y, x), strict=True))
    return refined


def softmax(values: Any) -> np.ndarray:
    exponentials = np.exp(np.asarray(values) - np.max(values))
    return exponentials / exponentials.sum()


@pytest.mark.parametrize("dilations", [(1,), (1, 2, 4), (3, 12)])
@pytest.mark.parametrize("iterations", [1, 4])
def test_refinement_agrees_with_afas_rule_pixel_after_pixel(dilations: tuple[int, ...], iterations: int):
    images, scores = random_images(), random_scores()
    refined = pixel_adaptive_refinement(images, scores, dilations=dilations, iterations=iterations)
    for image, given, ours in zip(images, scores, refined, strict=True):
        theirs = refine_by_loops(image.numpy(), given.numpy(), dilations, iterations)
        np.testing.assert_allclose(ours, theirs / 1.01**iterations, atol=1e-5)


def test_an_image_of_a_batch_is_refined_as_if_it_were_alone():
    images, scores = random_images(3, 30, 41), random_scores(3, 2, 30, 41)
    batched = pixel_adaptive_refinement(images, scores)
    for index in range(3):
        alone = pixel_adaptive_refinement(images[index : index + 1], scores[index : index + 1])
        torch.testing.assert_close(batched[index], alone[0], atol=1e-6, rtol=0)


def test_ragged_scores_move_to_the_edge_of_the_picture():
    # A gray square on black; the scores know it only roughly and are blurred.
    image = torch.zeros(1, 3, 60, 60)
    image[:, :, 20:40, 20:40] = 0.6
    image += 0.02 * torch.rand(image.shape, generator=torch.Generator().manual_seed(0))
    inside = (image[0, 0] > 0.3).float()
    coarse = F.avg_pool2d(F.pad(inside.roll((3, -3), (0, 1))[None, None], (6, 6, 6, 6)), 13, stride=1)
    scores = torch.cat([1 - coarse, coarse], dim=1)
    refined = pixel_adaptive_refinement(image, scores)

    def wrong(maps: torch.Tensor) -> int:
        return int((maps[0].argmax(dim=0) != inside).sum())

    assert wrong(scores) > 100
    assert wrong(refined) < 0.3 * wrong(scores)


@pytest.mark.parametrize("kind", ["uint8", "0-255", "0-1"])
def test_the_scale_of_the_colors_does_not_matter(kind: str):
    pixels = (random_images() * 255).round()
    images = {"uint8": pixels.to(torch.uint8), "0-255": pixels, "0-1": pixels / 255}[kind]
    expected = pixel_adaptive_refinement(pixels, random_scores())
    torch.testing.assert_close(pixel_adaptive_refinement(images, random_scores()), expected, atol=1e-5, rtol=0)


def test_constant_scores_stay_and_ranges_do_not_grow():
    scores = random_scores()
    scores[:, 1] = 0.4
    refined = pixel_adaptive_refinement(random_images(), scores)
    torch.testing.assert_close(refined[:, 1], scores[:, 1], atol=1e-5, rtol=0)
    assert (refined.amin(dim=(2, 3)) >= scores.amin(dim=(2, 3)) - 1e-5).all()
    assert (refined.amax(dim=(2, 3)) <= scores.amax(dim=(2, 3)) + 1e-5).all()


def test_scores_that_sum_to_one_still_do():
    scores = random_scores(channels=4).softmax(dim=1)
    refined = pixel_adaptive_refinement(random_images(), scores)
    torch.testing.assert_close(refined.sum(dim=1), torch.ones(2, 7, 9), atol=1e-5, rtol=0)


def test_a_picture_of_one_color_is_handled():
    refined = pixel_adaptive_refinement(torch.full((1, 3, 8, 8), 0.5), random_scores(1, 2, 8, 8))
    assert torch.isfinite(refined).all()


def test_no_iteration_changes_nothing_and_inputs_come_back_unchanged():
    images, scores = random_images(), random_scores()
    torch.testing.assert_close(pixel_adaptive_refinement(images, scores, iterations=0), scores, atol=0, rtol=0)
    pixel_adaptive_refinement(images, scores)
    torch.testing.assert_close(images, random_images(), atol=0, rtol=0)
    torch.testing.assert_close(scores, random_scores(), atol=0, rtol=0)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 3)])
def test_pictures_smaller_than_the_dilations(size: tuple[int, int]):
    images, scores = random_images(1, *size), random_scores(1, 2, *size)
    refined = pixel_adaptive_refinement(images, scores)
    expected = refine_by_loops(images[0].numpy(), scores[0].numpy(), DILATIONS, 10) / 1.01**10
    np.testing.assert_allclose(refined[0], expected, atol=1e-5)


@pytest.mark.parametrize("channels", [0, 1])
def test_few_classes_or_none(channels: int):
    assert pixel_adaptive_refinement(random_images(), random_scores(channels=channels)).shape == (2, channels, 7, 9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_come_back_in_their_own_type(dtype: torch.dtype):
    refined = pixel_adaptive_refinement(random_images(), random_scores().to(dtype))
    assert refined.dtype == dtype
    exact = pixel_adaptive_refinement(random_images(), random_scores())
    torch.testing.assert_close(refined.float(), exact, atol=1e-2, rtol=0)


def test_strided_arrays_give_the_same():
    images = random_images().permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    scores = random_scores().permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert not images.is_contiguous()
    expected = pixel_adaptive_refinement(random_images(), random_scores())
    torch.testing.assert_close(pixel_adaptive_refinement(images, scores), expected)


NOT_A_NUMBER = torch.full((2, 3, 7, 9), float("nan"))


@pytest.mark.parametrize(
    ("images", "scores", "options", "words"),
    [
        (random_images()[0], random_scores(), {}, r"images must be \(B, 3, H, W\), got \(3, 7, 9\)"),
        (random_images(), random_scores(h=8), {}, r"must be \(2, L, 7, 9\), got \(2, 3, 8, 9\); resize the scores"),
        (random_images(), random_scores(batch=1), {}, r"must be \(2, L, 7, 9\), got \(1, 3, 7, 9\)"),
        (random_images(), random_scores()[0], {}, r"must be \(2, L, 7, 9\), got \(3, 7, 9\)"),
        (random_images(), NOT_A_NUMBER, {}, "hold NaN or infinity"),
        (NOT_A_NUMBER, random_scores(), {}, "hold NaN or infinity"),
        (random_images(), random_scores().to("meta"), {}, "images are on cpu, scores on meta"),
        (random_images(), random_scores(), {"dilations": ()}, r"at least 1 pixel, got \(\)"),
        (random_images(), random_scores(), {"dilations": (1, 0)}, r"at least 1 pixel, got \(1, 0\)"),
        (random_images(), random_scores(), {"iterations": -1}, "iterations must be 0 or more, got -1"),
    ],
)
def test_bad_input_is_refused_by_message(
    images: torch.Tensor, scores: torch.Tensor, options: dict[str, Any], words: str
):
    with pytest.raises(ValueError, match=words):
        pixel_adaptive_refinement(images, scores, **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_refinement_on_a_gpu_agrees_with_the_cpu():
    on_gpu = pixel_adaptive_refinement(random_images().cuda(), random_scores().cuda())
    expected = pixel_adaptive_refinement(random_images(), random_scores())
    torch.testing.assert_close(on_gpu.cpu(), expected, atol=1e-5, rtol=0)
