from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import pixels
from torch import nn
from transformers.modeling_outputs import SemanticSegmenterOutput

from bitrans_hf.stages.multi_scale import SINGLE_SCALE, TEST_PRESETS, multi_scale_scores, view_logits, window_starts

NUM_LABELS = 5


class TinySegmenter(nn.Module):
    """Two strided convolutions: logits (B, 5, ceil(H/4), ceil(W/4)) that are not symmetric under a flip."""

    def __init__(self, stride: int = 2) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.Conv2d(3, 8, 3, stride=stride, padding=1)
            self.second = nn.Conv2d(8, NUM_LABELS, 3, stride=stride, padding=1)
        self.sizes: list[tuple[int, int]] = []

    def forward(self, pixel_values: torch.Tensor) -> SemanticSegmenterOutput:
        self.sizes.append((pixel_values.shape[2], pixel_values.shape[3]))
        return SemanticSegmenterOutput(logits=3 * self.second(self.first(pixel_values).relu()))


def logits_of(model: nn.Module, image: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(image[None]).logits[0]


def resized(maps: torch.Tensor, size: tuple[int, int], align_corners: bool) -> torch.Tensor:
    return F.interpolate(maps[None], size, mode="bilinear", align_corners=align_corners)[0]


# ---- Scales, flips and fusion, against a loop that does one thing after the other.


def test_the_mctformer_preset_is_the_reference_loop():
    # seg/infer_seg.py: int(H * s), align_corners=True; logits to the image, softmax, maximum from zeros on.
    model, image = TinySegmenter(), pixels(3, 37, 50)
    expected = torch.zeros(NUM_LABELS, 37, 50)
    for scale in (0.5, 0.75, 1.0, 1.25, 1.5):
        scaled = resized(image, (int(37 * scale), int(50 * scale)), align_corners=True)
        logits = resized(logits_of(model, scaled), (37, 50), align_corners=False)
        expected = torch.max(expected, logits.softmax(dim=0))
    scores = multi_scale_scores(model, image, **TEST_PRESETS["mctformer"])
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=0)
    assert model.sizes[-5:] == [(18, 25), (27, 37), (37, 50), (46, 62), (55, 75)]


def test_the_deeplab_v1_preset_is_the_mean_logit_of_twelve_views():
    model, image = TinySegmenter(), pixels(3, 37, 50)
    views = []
    for scale in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75):
        scaled = resized(image, (int(37 * scale), int(50 * scale)), align_corners=False)
        views.append(resized(logits_of(model, scaled), (37, 50), align_corners=True))
        flipped = resized(logits_of(model, scaled.flip(-1)), (37, 50), align_corners=True)
        views.append(flipped.flip(-1))
    expected = torch.stack(views).mean(dim=0).softmax(dim=0)
    scores = multi_scale_scores(model, image, **TEST_PRESETS["deeplab-v1"])
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(scores.sum(dim=0), torch.ones(37, 50))


def test_the_order_of_the_scales_does_not_matter_and_a_repeated_one_changes_no_maximum():
    model, image = TinySegmenter(), pixels(3, 24, 31)
    once = multi_scale_scores(model, image, scales=(0.5, 1.0), fusion="max")
    again = multi_scale_scores(model, image, scales=(1.0, 0.5, 1.0), fusion="max")
    assert torch.equal(once, again)


def test_a_mirrored_image_has_mirrored_scores_when_both_are_seen():
    # Only then: the network itself is not symmetric. Odd sides keep the strided grid symmetric.
    model, image = TinySegmenter(), pixels(3, 33, 33)
    with_flip = multi_scale_scores(model, image, flip=True)
    torch.testing.assert_close(
        multi_scale_scores(model, image.flip(-1), flip=True), with_flip.flip(-1), atol=1e-6, rtol=0
    )
    alone = multi_scale_scores(model, image)
    assert (multi_scale_scores(model, image.flip(-1)) - alone.flip(-1)).abs().max() > 0.01


def test_a_single_scale_is_the_softmax_of_the_network():
    model, image = TinySegmenter(), pixels(3, 20, 28)
    expected = resized(logits_of(model, image), (20, 28), align_corners=False).softmax(dim=0)
    torch.testing.assert_close(multi_scale_scores(model, image, **SINGLE_SCALE), expected)


def test_scores_are_float32_whatever_the_network_computes_in():
    model, image = TinySegmenter().to(torch.bfloat16), pixels(3, 20, 28).to(torch.bfloat16)
    assert multi_scale_scores(model, image).dtype == torch.float32


def test_views_come_one_by_one_with_their_names():
    views = list(view_logits(TinySegmenter(), pixels(3, 20, 28), scales=(1.0, 0.5), flip=True))
    assert [(view.scale, view.flipped) for view in views] == [(1.0, False), (1.0, True), (0.5, False), (0.5, True)]
    assert {view.logits.shape for view in views} == {(NUM_LABELS, 20, 28)}


# ---- Sliding windows.


@pytest.mark.parametrize("window", [50, 51, 500])
@pytest.mark.parametrize("options", [SINGLE_SCALE, {"scales": (0.5, 1.0), "flip": True, "fusion": "max"}])
def test_a_window_that_covers_the_image_is_the_whole_image(window: int, options: Any):
    model, image = TinySegmenter(), pixels(3, 37, 50)
    whole = multi_scale_scores(model, image, **options)
    assert torch.equal(multi_scale_scores(model, image, **options, window=window), whole)


@pytest.mark.parametrize("flip", [False, True])
def test_windows_are_averaged_where_they_overlap(flip: bool):
    model, image = TinySegmenter(), pixels(3, 23, 40)

    def slow(picture: torch.Tensor) -> torch.Tensor:
        total, count = torch.zeros(NUM_LABELS, 23, 40), torch.zeros(23, 40)
        for top in (0, 7):
            for left in (0, 10, 20, 24):
                rows, columns = slice(top, top + 16), slice(left, left + 16)
                part = picture[:, rows, columns]
                total[:, rows, columns] += resized(logits_of(model, part), (16, 16), align_corners=False)
                count[rows, columns] += 1
        return total / count

    expected = slow(image)
    if flip:
        expected = (expected + slow(image.flip(-1)).flip(-1)) / 2
    scores = multi_scale_scores(model, image, flip=flip, window=16, stride=10)
    torch.testing.assert_close(scores, expected.softmax(dim=0), atol=1e-6, rtol=0)


def test_a_network_without_context_does_not_see_the_windows():
    model, image = TinySegmenter(stride=1), pixels(3, 40, 61)
    model.first, model.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, NUM_LABELS, 1)
    torch.testing.assert_close(
        multi_scale_scores(model, image, window=17), multi_scale_scores(model, image), atol=1e-6, rtol=0
    )


def test_no_window_is_larger_than_asked():
    model = TinySegmenter()
    multi_scale_scores(model, pixels(3, 20, 90), scales=(1.0, 2.0), window=32, stride=32)
    assert max(max(size) for size in model.sizes) == 32
    assert (20, 32) in model.sizes, "a side shorter than the window stays whole"


@pytest.mark.parametrize(("length", "window", "stride"), [(10, 4, 4), (11, 4, 3), (4, 4, 1), (3, 7, 2), (100, 33, 20)])
def test_windows_cover_every_pixel_and_stay_inside(length: int, window: int, stride: int):
    starts = window_starts(length, window, stride)
    seen = {pixel for start in starts for pixel in range(start, min(start + window, length))}
    assert seen == set(range(length))
    assert all(start + window <= max(length, window) for start in starts)
    assert len(set(starts)) == len(starts)


# ---- Bad input, by its message.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pixel_values": pixels(1, 3, 8, 8)}, r"one image \(3, H, W\), got shape \(1, 3, 8, 8\)"),
        ({"scales": ()}, "at least one; got"),
        ({"scales": (1.0, 0.0)}, "factors above 0"),
        ({"scales": (0.1,)}, "leave a pixel of 8 x 8"),
        ({"fusion": "median"}, "fusion must be one of max, mean, got 'median'"),
        ({"window": 4, "stride": 5}, r"stride must lie in \[1, window = 4\], got 5"),
        ({"window": 4, "stride": 0}, r"stride must lie in \[1, window = 4\], got 0"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, Any], words: str):
    arguments = {"pixel_values": pixels(3, 8, 8), **changes}
    with pytest.raises(ValueError, match=words):
        multi_scale_scores(TinySegmenter(), arguments.pop("pixel_values"), **arguments)
