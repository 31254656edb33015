from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import picture, pixels, tiny_model

from bitrans_hf import BiTransImageProcessor, BiTransModel, Seeds, extract_seeds
from bitrans_hf.hub.maps import CAM_FUSIONS, compete, refine_with_affinity
from bitrans_hf.hub.seeds import SEED_VARIANTS, normalized_seeds, present_class_ids, seed_variants, sum_over_views

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def bilinear(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize (h, w) to (height, width) with pixel centers at half integers and edges repeated."""
    h, w = grid.shape
    out = np.empty((height, width))
    for row in range(height):
        y = min(max((row + 0.5) * h / height - 0.5, 0.0), h - 1.0)
        top = int(y)
        bottom = min(top + 1, h - 1)
        for column in range(width):
            x = min(max((column + 0.5) * w / width - 0.5, 0.0), w - 1.0)
            left = int(x)
            right = min(left + 1, w - 1)
            upper = grid[top, left] * (1 - (x - left)) + grid[top, right] * (x - left)
            lower = grid[bottom, left] * (1 - (x - left)) + grid[bottom, right] * (x - left)
            out[row, column] = upper * (1 - (y - top)) + lower * (y - top)
    return out


def slow_seeds(
    model: BiTransModel,
    image: Image.Image,
    class_ids: list[int],
    scales: tuple[float, ...],
    flip: bool,
    mode: str,
    refine: bool,
) -> np.ndarray:
    """The reference's procedure, one image, view, class and patch after the other."""
    num_classes = model.config.num_labels
    height, width = image.height, image.width
    totals = {class_id: np.zeros((height, width)) for class_id in class_ids}
    for scale in scales:
        size = (round(width * scale), round(height * scale))
        resized = image if scale == 1.0 else image.resize(size, Image.Resampling.BICUBIC)
        values = (np.asarray(resized) / 255.0 - MEAN) / STD
        for flipped in (False, True) if flip else (False,):
            seen = np.ascontiguousarray(values[:, ::-1] if flipped else values).transpose(2, 0, 1)
            with torch.no_grad():
                output = model(torch.from_numpy(seen).float()[None], output_attentions=True)
            attentions = np.stack([attention[0].double().numpy() for attention in output.attentions])
            h, w = output.coarse_cam.shape[2:]
            class_attention = attentions[-model.config.num_seed_layers :, :num_classes, num_classes:].sum(0)
            affinity = attentions[:, num_classes:, num_classes:].sum(0)
            head = np.maximum(output.coarse_cam[0].double().numpy(), 0.0).reshape(num_classes, h * w)
            maps = {"fused": class_attention * head, "sc_cam": class_attention, "coarse_cam": head}[mode]
            for class_id in class_ids:
                class_map = maps[class_id]
                if refine:
                    spread = np.zeros(h * w)
                    for query in range(h * w):
                        for key in range(h * w):
                            spread[query] += affinity[query, key] * class_map[key]
                    class_map = spread
                large = bilinear(class_map.reshape(h, w), height, width)
                totals[class_id] += large[:, ::-1] if flipped else large
    stacked = np.stack([totals[class_id] for class_id in class_ids])
    low, high = stacked.min((1, 2), keepdims=True), stacked.max((1, 2), keepdims=True)
    return (stacked - low) / (high - low + 1e-8)


CASES: list[tuple[tuple[float, ...], bool, str, bool]] = [
    ((1.0,), True, "fused", True),
    ((1.0,), False, "fused", False),
    ((1.0, 0.75, 1.25), True, "fused", True),
    ((1.0, 0.5), True, "sc_cam", False),
    ((1.0,), True, "sc_cam", True),
    ((1.0,), True, "coarse_cam", False),
    ((1.0, 1.5), False, "coarse_cam", True),
]


@pytest.mark.parametrize(("scales", "flip", "mode", "refine"), CASES)
@pytest.mark.parametrize("size", [(32, 44), (37, 29)])
def test_seeds_are_those_of_the_reference_procedure(
    size: tuple[int, int], scales: tuple[float, ...], flip: bool, mode: str, refine: bool
):
    model, image, processor = tiny_model(), picture(*size), BiTransImageProcessor()
    seeds = extract_seeds(
        model, image, ["horse", "cat"], processor=processor, scales=scales, flip=flip, mode=mode, refine=refine
    )
    assert seeds.class_ids.tolist() == [0, 2]
    assert seeds.class_ids.dtype == np.int64
    assert seeds.maps.dtype == np.float32
    assert seeds.maps.shape == (2, *size)
    expected = slow_seeds(model, image, [0, 2], scales, flip, mode, refine)
    np.testing.assert_allclose(seeds.maps, expected, atol=1e-4)


def seeds_of(labels: Any, model: BiTransModel | None = None, **options: Any) -> Seeds:
    options = {"processor": BiTransImageProcessor(), **options}
    return extract_seeds(tiny_model() if model is None else model, picture(40, 48), labels, **options)


def test_each_map_runs_from_zero_to_one():
    maps = seeds_of(["cat", "dog", "horse"]).maps
    np.testing.assert_array_equal(maps.min((1, 2)), 0.0)
    np.testing.assert_allclose(maps.max((1, 2)), 1.0, atol=1e-4)


@pytest.mark.parametrize(
    "labels",
    [
        ["dog", "horse"],
        ("horse", "dog", "dog"),
        [0, 1, 1],
        [0.0, 1.0, 1.0],
        np.array([0, 1, 1]),
        torch.tensor([0, 1, 1]),
    ],
)
def test_class_names_and_multi_hot_vectors_mean_the_same(labels: Any):
    seeds = seeds_of(labels)
    assert seeds.class_ids.tolist() == [1, 2]
    np.testing.assert_array_equal(seeds.maps, seeds_of(["dog", "horse"]).maps)


@pytest.mark.parametrize("labels", [[], [0, 0, 0], np.zeros(3)])
def test_an_image_without_labels_has_no_maps(labels: Any):
    seeds = seeds_of(labels)
    assert seeds.class_ids.shape == (0,)
    assert seeds.class_ids.dtype == np.int64
    assert seeds.maps.shape == (0, 40, 48)


def test_the_maps_of_a_class_do_not_depend_on_the_other_labels():
    np.testing.assert_array_equal(seeds_of(["dog"]).maps[0], seeds_of(["cat", "dog", "horse"]).maps[1])


def test_a_picture_of_any_mode_is_accepted():
    gray = picture(40, 48).convert("L")
    ours = extract_seeds(tiny_model(), gray, ["cat"], processor=BiTransImageProcessor())
    theirs = extract_seeds(tiny_model(), gray.convert("RGB"), ["cat"], processor=BiTransImageProcessor())
    np.testing.assert_array_equal(ours.maps, theirs.maps)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_evaluates_and_is_left_in_the_mode_it_was_in(training: bool):
    model = tiny_model(drop_path_rate=0.9).train(training)
    np.testing.assert_array_equal(seeds_of(["cat"], model).maps, seeds_of(["cat"]).maps)
    assert model.training == training
    with pytest.raises(ValueError, match="smaller than a patch"):
        extract_seeds(model, picture(4, 30), ["cat"], processor=BiTransImageProcessor())
    assert model.training == training


def test_seeds_of_a_bfloat16_model_are_close():
    model = tiny_model(initializer_range=0.1)
    exact = seeds_of(["cat"], model, mode="sc_cam").maps
    np.testing.assert_allclose(seeds_of(["cat"], model.bfloat16(), mode="sc_cam").maps, exact, atol=0.1)


# ---- The steps.


@pytest.mark.parametrize("flip", [True, False])
def test_images_of_equal_size_may_share_a_batch(flip: bool):
    model, images = tiny_model(), pixels(3, 3, 40, 24)
    together = sum_over_views(model, [images], SEED_VARIANTS, flip=flip)
    for index in range(3):
        alone = sum_over_views(model, [images[index : index + 1]], SEED_VARIANTS, flip=flip)
        for name in SEED_VARIANTS:
            torch.testing.assert_close(together[name][index : index + 1], alone[name], atol=1e-5, rtol=1e-4)


def test_summing_on_the_token_grid_loses_nothing():
    model, images = tiny_model(), pixels(1, 3, 40, 24)
    small = sum_over_views(model, [images], SEED_VARIANTS)
    large = sum_over_views(model, [images], SEED_VARIANTS, size=(40, 24))
    class_ids = np.arange(3)
    for name in SEED_VARIANTS:
        assert small[name].shape == (1, 3, 5, 3)
        ours = normalized_seeds(class_ids, small[name][0], (40, 24))
        np.testing.assert_allclose(ours.maps, normalized_seeds(class_ids, large[name][0], (40, 24)).maps, atol=1e-5)


def test_several_scales_need_a_common_size():
    with pytest.raises(ValueError, match="2 scales have 2 token grids; give the size to sum at"):
        sum_over_views(tiny_model(), [pixels(1, 3, 32, 32), pixels(1, 3, 16, 16)], SEED_VARIANTS)


def test_the_flip_makes_seeds_of_mirrored_pictures_mirror_each_other():
    model, images = tiny_model(), pixels(1, 3, 40, 24)
    totals = sum_over_views(model, [images], SEED_VARIANTS)
    mirrored = sum_over_views(model, [images.flip(-1)], SEED_VARIANTS)
    for name in SEED_VARIANTS:
        torch.testing.assert_close(mirrored[name].flip(-1), totals[name], atol=1e-5, rtol=1e-4)


def test_refining_with_the_identity_changes_nothing():
    maps = torch.rand(2, 3, 4, 5)
    torch.testing.assert_close(refine_with_affinity(maps, torch.eye(20).expand(2, -1, -1)), maps)


def test_refining_takes_each_query_patchs_weighted_sum_over_keys():
    maps, affinity = torch.tensor([[[[1.0, 10.0]]]]), torch.tensor([[[0.5, 0.25], [0.0, 0.5]]])
    assert refine_with_affinity(maps, affinity).tolist() == [[[[3.0, 5.0]]]]


@pytest.mark.parametrize("normalize", [False, True])
def test_refining_in_steps_is_a_power_of_the_affinity(normalize: bool):
    generator = torch.Generator().manual_seed(0)
    maps, affinity = torch.rand(2, 3, 3, 4, generator=generator), torch.rand(2, 12, 12, generator=generator)
    wanted = torch.empty_like(maps)
    for image in range(2):
        matrix = affinity[image].double().numpy()
        if normalize:
            matrix = matrix / matrix.sum(axis=1, keepdims=True)
        for class_id in range(3):
            spread = np.linalg.matrix_power(matrix, 3) @ maps[image, class_id].double().flatten().numpy()
            wanted[image, class_id] = torch.from_numpy(spread.reshape(3, 4))
    torch.testing.assert_close(refine_with_affinity(maps, affinity, steps=3, normalize_rows=normalize), wanted)
    if normalize:
        flat = torch.full((2, 3, 3, 4), 0.5)
        torch.testing.assert_close(refine_with_affinity(flat, affinity, normalize_rows=True), flat)


def test_a_rule_of_fusion_stands_behind_the_fused_and_the_refined_variant():
    model, images = tiny_model(), pixels(2, 3, 32, 32)
    plain = sum_over_views(model, [images], SEED_VARIANTS, flip=False)
    assert seed_variants() == SEED_VARIANTS
    root = sum_over_views(model, [images], seed_variants("fused_sqrt"), flip=False)
    torch.testing.assert_close(root["fused"], plain["fused"].sqrt())
    alone = sum_over_views(model, [images], seed_variants("sc_cam"), flip=False, refine_steps=2)
    assert torch.equal(alone["fused"], plain["sc_cam"])
    affinity = model(images).affinity
    torch.testing.assert_close(alone["refined"], refine_with_affinity(plain["sc_cam"], affinity, steps=2))


def shared_by_hand(sc_cam: torch.Tensor, coarse_cam: torch.Tensor, class_ids: list[int]) -> torch.Tensor:
    """The rule "competing" for one image (C, h, w), pixel by pixel, among these classes alone."""
    shares = {index: torch.exp(2 * (coarse_cam[index] - coarse_cam[index].mean())) for index in class_ids}
    total = sum(shares.values())
    soft = {index: torch.log1p(torch.exp(coarse_cam[index])) for index in class_ids}
    return torch.stack([sc_cam[index] * soft[index] * shares[index] / total for index in class_ids])


def test_the_classes_of_an_image_share_its_patches():
    model, images = tiny_model(), pixels(2, 3, 32, 32)
    output = model(images)
    present = torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    maps = sum_over_views(model, [images], seed_variants("competing"), flip=False, present=present)["fused"]
    for image, class_ids in enumerate([[0, 2], [1]]):
        wanted = shared_by_hand(output.sc_cam[image], output.coarse_cam[image], class_ids)
        torch.testing.assert_close(maps[image, class_ids], wanted)
    absent = [maps[0, 1], maps[1, 0], maps[1, 2]]
    assert max(each.max() for each in absent) < 1e-20
    # With one class, no class competes.
    alone = output.sc_cam[1, 1] * torch.nn.functional.softplus(output.coarse_cam[1, 1])
    torch.testing.assert_close(maps[1, 1], alone)
    # Where nothing is known, classes share as probably as they are there.
    guessed = sum_over_views(model, [images], seed_variants("competing"), flip=False)["fused"]
    odds = compete(output.sc_cam, output.coarse_cam, output.logits.sigmoid())
    torch.testing.assert_close(guessed, odds)
    assert (guessed - maps).abs().max() > 1e-4


def test_what_shares_patches_is_the_image_and_its_mirror_alike():
    model, images = tiny_model(), pixels(2, 3, 32, 32)
    present = torch.tensor([[1.0, 0, 1], [0, 1, 1]])
    total = sum_over_views(model, [images], seed_variants("competing"), present=present)["refined"]
    mirrored = sum_over_views(model, [images.flip(-1)], seed_variants("competing"), present=present)["refined"]
    torch.testing.assert_close(total, mirrored.flip(-1))


def test_disconnected_regions_do_not_exchange():
    maps, affinity = torch.zeros(1, 1, 2, 2), torch.zeros(1, 4, 4)
    maps[..., 0, :] = 1.0
    affinity[:, :2, :2], affinity[:, 2:, 2:] = torch.rand(2, 2) + 0.1, torch.rand(2, 2)
    refined = refine_with_affinity(maps, affinity)
    assert (refined[..., 0, :] > 0).all()
    assert (refined[..., 1, :] == 0).all()


def test_a_flat_map_is_all_zero_and_not_nan():
    assert (normalized_seeds(np.array([1]), torch.full((1, 3, 3), 0.7), (6, 6)).maps == 0).all()


# ---- Bad input.


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (["cat", "cow"], {}, "unknown class name 'cow'; the model knows cat, dog, horse"),
        (["yak", "cow"], {}, "unknown class name 'cow', 'yak'"),
        ([1, 0], {}, "expected one 0/1 label for each of 3 classes, or class names; got 2 values"),
        (np.ones(20), {}, "expected one 0/1 label for each of 3 classes, or class names; got 20 values"),
        ([0, 2, 1], {}, r"image labels must be 0 or 1, got \[2.0\]"),
        ([0, float("nan"), 1], {}, r"image labels must be 0 or 1, got \[nan\]"),
        (["cat"], {"scales": (0.75, 1.0)}, r"first scale must be 1.0.*got \(0.75, 1.0\)"),
        (["cat"], {"scales": ()}, r"first scale must be 1.0.*got \(\)"),
        (
            ["cat"],
            {"mode": "attention"},
            "mode must be one of fused, fused_sqrt, competing, sc_cam, coarse_cam, got 'attention'",
        ),
    ],
)
def test_wrong_input_is_named(labels: Any, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        seeds_of(labels, **options)


def test_a_large_image_is_worked_on_at_the_processors_bound():
    image = picture(60, 90)
    processor = BiTransImageProcessor(max_side=45)
    seeds = extract_seeds(tiny_model(), image, ["dog"], processor=processor)
    small = extract_seeds(tiny_model(), processor.bounded(image), ["dog"], processor=processor)
    assert seeds.maps.shape == (1, 60, 90)
    assert small.maps.shape == (1, 30, 45)
    enlarged = torch.nn.functional.interpolate(torch.from_numpy(small.maps)[None], (60, 90), mode="bilinear")[0]
    low, high = enlarged.amin(), enlarged.amax()
    torch.testing.assert_close(torch.from_numpy(seeds.maps), (enlarged - low) / (high - low))


def test_a_picture_smaller_than_a_patch_is_refused_at_the_scale_that_makes_it_so():
    with pytest.raises(ValueError, match="smaller than a patch: got 5 x 10 pixels"):
        extract_seeds(tiny_model(), picture(10, 20), ["cat"], processor=BiTransImageProcessor(), scales=(1.0, 0.5))


def test_every_variant_of_a_report_is_a_known_fusion():
    assert {mode for mode, _ in SEED_VARIANTS.values()} <= set(CAM_FUSIONS)
    assert list(SEED_VARIANTS) == ["sc_cam", "coarse_cam", "fused", "refined"]


def test_names_that_look_like_numbers_are_names():
    assert present_class_ids(["1"], {0: "0", 1: "1"}).tolist() == [1]
