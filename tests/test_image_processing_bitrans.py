from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import picture, pixels, tiny_model
from transformers.modeling_outputs import SemanticSegmenterOutput

from bitrans_hf import BiTransImageProcessor, extract_seeds
from bitrans_hf.data import open_image
from bitrans_hf.hub.image_decoding import decoding_notes, to_rgb
from bitrans_hf.hub.image_processing_bitrans import bounded_size, scaled
from bitrans_hf.hub.maps import enlarged_strips, resized
from bitrans_hf.refine.pseudo_labels import seeds_to_label_map

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def normalized(image: Image.Image) -> np.ndarray:
    """(3, H, W), written out."""
    return ((np.asarray(image) / 255.0 - MEAN) / STD).transpose(2, 0, 1)


# ---- Any image to RGB.


def test_an_rgb_picture_is_returned_as_it_is():
    image = picture(5, 7)
    assert to_rgb(image) is image


def test_gray_and_palette_pictures_keep_their_colors():
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    expected = np.repeat(gray[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(np.asarray(to_rgb(Image.fromarray(gray))), expected)
    paletted = Image.fromarray(gray % 3)
    paletted.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    colors = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90]], dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(to_rgb(paletted)), colors[gray % 3])
    assert to_rgb(Image.new("1", (2, 2), 1)).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_gray_is_scaled_and_not_cut_off():
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    rgb = np.asarray(to_rgb(Image.fromarray(values)))
    np.testing.assert_array_equal(rgb[0, :, 0], [0, 1, 128, 255])
    assert (rgb == rgb[:, :, :1]).all()


def test_a_sixteen_bit_png_from_disk_is_scaled(tmp_path: Path):
    Image.fromarray(np.full((4, 5), 65535, dtype=np.uint16)).save(tmp_path / "deep.png")
    with Image.open(tmp_path / "deep.png") as image:
        assert (np.asarray(to_rgb(image)) == 255).all()


def test_transparent_pixels_are_laid_on_white():
    rgba = np.array([[[200, 100, 0, 255], [200, 100, 0, 0], [0, 0, 0, 51]]], dtype=np.uint8)
    rgb = np.asarray(to_rgb(Image.fromarray(rgba)))
    np.testing.assert_array_equal(rgb[0, :2], [[200, 100, 0], [255, 255, 255]])
    np.testing.assert_allclose(rgb[0, 2], 255 * 0.8, atol=1)
    gray_alpha = Image.fromarray(np.array([[[90, 255], [90, 0]]], dtype=np.uint8))
    np.testing.assert_array_equal(np.asarray(to_rgb(gray_alpha))[0, :, 0], [90, 255])


def test_a_transparent_palette_color_is_laid_on_white(tmp_path: Path):
    paletted = Image.fromarray(np.array([[0, 1]], dtype=np.uint8))
    paletted.putpalette([10, 20, 30, 40, 50, 60])
    paletted.save(tmp_path / "sprite.png", transparency=1)
    with Image.open(tmp_path / "sprite.png") as image:
        np.testing.assert_array_equal(np.asarray(to_rgb(image))[0], [[10, 20, 30], [255, 255, 255]])


def test_cmyk_pictures_become_rgb():
    cmyk = Image.new("CMYK", (2, 2), (0, 255, 255, 0))
    assert to_rgb(cmyk).mode == "RGB"
    assert to_rgb(cmyk).getpixel((0, 0)) == (255, 0, 0)


def test_the_stored_pixels_are_used_and_not_turned_by_exif(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me right"
    picture(20, 30).save(tmp_path / "turned.jpg", exif=exif)
    with Image.open(tmp_path / "turned.jpg") as image:
        assert to_rgb(image).size == (30, 20)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_twelve_bits_in_larger_numbers_are_not_black(dtype: type, tmp_path: Path):
    values = np.array([[0, 1023, 2048, 4095]], dtype=dtype)
    Image.fromarray(values).save(tmp_path / "deep.tif")
    with Image.open(tmp_path / "deep.tif") as image:
        np.testing.assert_array_equal(np.asarray(to_rgb(image))[0, :, 0], [0, 64, 128, 255])


@pytest.mark.parametrize(
    ("values", "seen"),
    [
        (np.array([0, 100, 255], dtype=np.uint16), [0, 100, 255]),
        (np.array([0, 1023], dtype=np.uint16), [0, 255]),
        (np.array([0, 16383], dtype=np.uint16), [0, 255]),
        (np.array([0, 16384], dtype=np.uint16), [0, 63]),
        (np.array([-1000, 0, 1000], dtype=np.int32), [0, 128, 255]),
        (np.array([0, 2_000_000], dtype=np.int32), [0, 255]),
        (np.array([0, 0.25, 1], dtype=np.float32), [0, 64, 255]),
        (np.array([0, 100, 255], dtype=np.float32), [0, 100, 255]),
        (np.array([-1, 0, 3], dtype=np.float32), [0, 64, 255]),
        (np.array([np.nan, 0.5, np.inf], dtype=np.float32), [0, 128, 255]),
        (np.array([0, 0], dtype=np.float32), [0, 0]),
        (np.array([-7, -7], dtype=np.int32), [0, 0]),
    ],
)
def test_gray_values_of_more_than_eight_bits_are_scaled_by_the_bits_in_use(values: np.ndarray, seen: list[int]):
    np.testing.assert_array_equal(np.asarray(to_rgb(Image.fromarray(values[None])))[0, :, 0], seen)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (Image.fromarray(np.array([[0, 4095]], dtype=np.uint16)), [r"lie in \[0, 4095\], which is guessed"]),
        (Image.fromarray(np.array([[0, 65535]], dtype=np.uint16)), []),
        (Image.fromarray(np.array([[0, 1]], dtype=np.float32)), [r"lie in \[0, 1\], which is guessed"]),
        (Image.new("RGB", (4, 4), (255, 0, 7)), ["nearly constant"]),
        (Image.new("1", (4, 4), 1), [r"nearly constant, its values lie in \[255, 255\]"]),
        (picture(8, 8), []),
    ],
)
def test_what_is_guessed_about_an_image_is_said(image: Image.Image, words: list[str]):
    notes = decoding_notes(image, to_rgb(image))
    assert len(notes) == len(words)
    assert all(re.search(expected, note) for note, expected in zip(notes, words, strict=True))


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.tif"])
def test_of_several_frames_or_pages_the_first_is_used_and_said(name: str, tmp_path: Path):
    frames = [Image.new("RGB", (16, 16), color) for color in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    for frame in frames:
        frame.paste((255, 255, 255), (0, 0, 8, 8))
    options = {"lossless": True} if name == "a.webp" else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    with Image.open(tmp_path / name) as image:
        rgb = to_rgb(image).copy()
        assert decoding_notes(image, rgb) == ["it has 3 frames or pages, of which the first is used"]
    assert rgb.getpixel((12, 12)) == (250, 0, 0)


@pytest.mark.parametrize("size", [1, 3])
def test_an_image_with_too_many_pixels_to_open_is_one_sentence(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    picture(10, 10 * size).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)  # PIL warns above, and refuses above twice of it
    if size == 1:
        assert open_image(tmp_path / "huge.png").size == (10, 10)
        return
    with pytest.raises(ValueError, match=r"huge\.png has more than 178 million pixels.*save a smaller copy"):
        open_image(tmp_path / "huge.png")


# ---- Sizes that seeds need.


@pytest.mark.parametrize("size", [(60, 90), (45, 31), (33, 33)])
def test_scaled_views_are_pils_bicubic_normalized(size: tuple[int, int]):
    height, width = size
    image, scales = picture(height, width), (1.0, 0.75, 1.25, 0.5)
    views = BiTransImageProcessor().scaled_views(image, scales)
    for scale, view in zip(scales, views, strict=True):
        expected_size = (round(width * scale), round(height * scale))
        resized = image if scale == 1.0 else image.resize(expected_size, Image.Resampling.BICUBIC)
        assert view.dtype == torch.float32
        assert tuple(view.shape) == (1, 3, expected_size[1], expected_size[0])
        np.testing.assert_allclose(view[0].numpy(), normalized(resized), atol=1e-5)


def test_scale_one_does_not_touch_the_pixels():
    image = picture(9, 8)
    assert scaled(image, 1.0) is image


def test_a_scale_that_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match=r"scale 0.01 leaves nothing of an image of 20 x 300 pixels"):
        BiTransImageProcessor().scaled_views(picture(20, 300), (0.01,))


# ---- The training square.


def test_a_call_resizes_to_the_square_and_normalizes():
    processor = BiTransImageProcessor(size={"height": 32, "width": 48})
    smooth = picture(64, 96)
    batch = processor([smooth, Image.new("RGB", (10, 20), (255, 128, 0))], return_tensors="pt").pixel_values
    assert batch.shape == (2, 3, 32, 48)
    resized = smooth.resize((48, 32), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(batch[0].numpy(), normalized(resized), atol=0.05)  # torch rounds otherwise than PIL
    plain = (np.array([255, 128, 0]) / 255.0 - MEAN) / STD
    np.testing.assert_allclose(batch[1].mean((1, 2)).numpy(), plain, atol=1e-3)


def test_the_default_square_is_the_models():
    assert BiTransImageProcessor()(picture(30, 40), return_tensors="pt").pixel_values.shape == (1, 3, 224, 224)


def test_a_saved_processor_comes_back_equal(tmp_path: Path):
    processor = BiTransImageProcessor(size={"height": 64, "width": 64}, image_mean=[0.5, 0.5, 0.5])
    processor.save_pretrained(tmp_path)
    back = BiTransImageProcessor.from_pretrained(tmp_path)
    image = picture(40, 50)
    views = [one.scaled_views(image, (1.0, 0.5)) for one in (back, processor)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*views, strict=True))
    ours, theirs = (one(image, return_tensors="pt").pixel_values for one in (back, processor))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("image", [picture(40, 56).convert("RGBA"), Image.new("I;16", (56, 40), 40_000)])
def test_a_call_turns_any_mode_into_rgb_as_the_views_do(image: Image.Image):
    ours = BiTransImageProcessor()(image, return_tensors="pt").pixel_values
    assert torch.equal(ours, BiTransImageProcessor()(to_rgb(image), return_tensors="pt").pixel_values)


# ---- Label maps beside images.


def label_map_picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """A palette image of the ids 0, 3 and 255 in blocks."""
    ids = np.array([0, 3, 255], dtype=np.uint8)[np.random.default_rng(seed).integers(0, 3, (3, 4))]
    image = Image.fromarray(ids).resize((width, height), Image.Resampling.NEAREST)
    image.putpalette(list(range(256)) * 3)
    return image


def nearest(ids: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize (h, w) by taking the pixel under each new pixel's center."""
    rows = ((np.arange(height) + 0.5) * ids.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * ids.shape[1] / width).astype(int)
    return ids[rows][:, columns]


def test_label_maps_are_resized_to_the_nearest_pixel_and_keep_their_ids():
    processor = BiTransImageProcessor(size={"height": 31, "width": 45})
    maps = [label_map_picture(64, 90), label_map_picture(33, 70, seed=1)]
    batch = processor([picture(64, 90), picture(33, 70)], maps, return_tensors="pt")
    assert batch.pixel_values.shape == (2, 3, 31, 45)
    assert batch["labels"].dtype == torch.int64
    for labels, label_map in zip(batch["labels"], maps, strict=True):
        np.testing.assert_array_equal(labels.numpy(), nearest(np.asarray(label_map), 31, 45))


def test_pictures_come_out_the_same_with_and_without_label_maps():
    both = BiTransImageProcessor()(picture(64, 90), segmentation_maps=label_map_picture(64, 90), return_tensors="pt")
    assert torch.equal(both.pixel_values, BiTransImageProcessor()(picture(64, 90), return_tensors="pt").pixel_values)
    alone = BiTransImageProcessor()(picture(64, 90), np.asarray(label_map_picture(64, 90)), return_tensors="pt")
    assert torch.equal(both["labels"], alone["labels"])


@pytest.mark.parametrize(
    ("label_maps", "words"),
    [
        ([Image.new("L", (30, 20))] * 2, "got 2 segmentation maps for 1 images"),
        ([Image.new("L", (20, 30))], r"map 0 is 30 x 20 \(height x width\) and its image 20 x 30"),
        ([Image.new("RGB", (30, 20))], "has 3 channels, expected one of label ids"),
    ],
)
def test_label_maps_that_do_not_belong_to_the_pictures_are_refused(label_maps: list[Image.Image], words: str):
    with pytest.raises(ValueError, match=words):
        BiTransImageProcessor()([picture(20, 30)], label_maps)


# ---- A bound on large images.


@pytest.mark.parametrize(
    ("size", "bounded"), [((90, 60), (48, 32)), ((20, 96), (10, 48)), ((48, 31), (48, 31)), ((96, 10), (48, 5))]
)
def test_the_longer_side_is_bounded_and_proportions_stay(size: tuple[int, int], bounded: tuple[int, int]):
    processor, image = BiTransImageProcessor(max_side=48), picture(*size)
    ours = processor.bounded(image)
    assert (ours.height, ours.width) == bounded
    expected = image if size == bounded else image.resize((bounded[1], bounded[0]), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(expected))
    assert processor(image, do_resize=False, return_tensors="pt").pixel_values.shape[2:] == bounded


@pytest.mark.parametrize(
    ("size", "bounded"),
    [
        ((150, 8000), (64, 3413)),  # a tenth of the bound is left of the shorter side
        ((3000, 30), (3000, 30)),  # less than that: nothing is reduced
        ((500, 6000), (64, 768)),
        ((600, 6000), (64, 640)),
        ((20, 8000), (20, 8000)),
        ((150, 100000), (25, 16525)),  # no larger an area than a square of the bound has
        ((1, 3000), (1, 3000)),
    ],
)
def test_the_shorter_side_of_a_panorama_stays_large_enough_for_patches(
    size: tuple[int, int], bounded: tuple[int, int]
):
    assert bounded_size(size, 640) == bounded
    assert bounded_size(size[::-1], 640) == bounded[::-1]
    assert bounded[0] * bounded[1] <= 1.01 * 640**2


def test_maps_enlarged_in_strips_are_those_enlarged_at_once(monkeypatch: pytest.MonkeyPatch):
    maps = torch.rand(3, 13, 17, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("bitrans_hf.hub.maps.STRIP_VALUES", 3 * 50 * 7)  # seven rows a strip
    strips = list(enlarged_strips(maps, (40, 50)))
    assert [(rows.start, rows.stop) for rows, _ in strips] == [(0, 7), (7, 14), (14, 21), (21, 28), (28, 35), (35, 40)]
    torch.testing.assert_close(torch.cat([strip for _, strip in strips], dim=1), resized(maps, (40, 50)))
    assert max(strip.max() for _, strip in strips) <= maps.max()


def test_maps_of_the_right_size_come_back_as_they_are():
    maps = torch.rand(2, 5, 6)
    ((rows, strip),) = enlarged_strips(maps, (5, 6))
    assert strip is maps
    assert rows == slice(0, 5)


def test_no_maps_have_strips_too():
    assert [strip.shape for _, strip in enlarged_strips(torch.zeros(0, 5, 6), (10, 12))] == [(0, 10, 12)]


def test_the_bound_can_be_set_for_a_call_and_is_saved(tmp_path: Path):
    assert BiTransImageProcessor().max_side == 640
    BiTransImageProcessor(max_side=100).save_pretrained(tmp_path)
    processor = BiTransImageProcessor.from_pretrained(tmp_path)
    assert processor.bounded(picture(150, 200)).size == (100, 75)
    assert processor.bounded(picture(150, 200), max_side=20).size == (20, 15)
    pixels = processor(picture(150, 200), do_resize=False, max_side=40, return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 30, 40)
    with pytest.raises(ValueError, match="max_side must be at least 1 pixel, got 0"):
        processor.bounded(picture(150, 200), max_side=0)


def test_an_unknown_option_is_refused():
    with pytest.raises(TypeError, match="maxside"):
        BiTransImageProcessor()(picture(20, 30), maxside=10)


# ---- Scores to label maps.


def test_semantic_maps_are_the_argmax_of_the_resized_logits():
    logits = torch.randn(2, 5, 6, 7, generator=torch.Generator().manual_seed(0))
    output = SemanticSegmenterOutput(logits=logits)
    processor = BiTransImageProcessor()
    plain = processor.post_process_semantic_segmentation(output)
    assert [label_map.dtype for label_map in plain] == [torch.int64] * 2
    np.testing.assert_array_equal(torch.stack(plain).numpy(), logits.numpy().argmax(1))
    sizes = [(13, 9), (40, 50)]
    for given in (sizes, torch.tensor(sizes)):
        for index, label_map in enumerate(processor.post_process_semantic_segmentation(output, target_sizes=given)):
            larger = torch.nn.functional.interpolate(logits[index : index + 1], size=sizes[index], mode="bilinear")
            np.testing.assert_array_equal(label_map.numpy(), larger[0].numpy().argmax(0))


def test_equal_scores_go_to_the_first_class():
    logits = torch.zeros(1, 3, 2, 2)
    assert (
        BiTransImageProcessor()
        .post_process_semantic_segmentation(SemanticSegmenterOutput(logits=logits))[0]
        .eq(0)
        .all()
    )


@pytest.mark.parametrize("size", [(32, 40), (25, 57)])
@pytest.mark.parametrize(
    "options", [{}, {"refine": False, "threshold": 0.7}, {"mode": "sc_cam"}, {"mode": "coarse_cam", "refine": False}]
)
def test_pseudo_masks_are_the_cut_seeds_of_one_view(size: tuple[int, int], options: dict[str, Any]):
    model, processor, image = tiny_model(), BiTransImageProcessor(), picture(*size)
    with torch.no_grad():
        output = model(torch.cat(processor.scaled_views(image) * 2))
    labels = torch.tensor([[1, 0, 1], [0, 0, 0]])
    ours = processor.post_process_pseudo_masks(output, labels, [size, (8, 9)], **options)
    assert ours[1].shape == (8, 9)
    assert ours[1].eq(0).all()
    threshold = options.pop("threshold", 0.4)
    seeds = extract_seeds(model, image, labels[0], processor=processor, flip=False, **options)
    assert ours[0].dtype == torch.int64
    assert (ours[0].numpy() != seeds_to_label_map(seeds, threshold)).mean() < 0.002
    assert set(ours[0].unique().tolist()) == {0, 1, 3}


def test_pseudo_masks_without_a_size_stay_on_the_token_grid():
    with torch.no_grad():
        output = tiny_model()(pixels(2, 3, 40, 24))
    masks = BiTransImageProcessor().post_process_pseudo_masks(output, torch.ones(2, 3))
    assert [tuple(mask.shape) for mask in masks] == [(5, 3)] * 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threshold": 2}, r"threshold must be in \[0, 1\], got 2"),
        ({"mode": "cam"}, "mode must be one of fused, fused_sqrt, competing, sc_cam, coarse_cam, got 'cam'"),
        ({"labels": torch.ones(2, 2)}, r"multi-hot of shape \(2, 3\), got \(2, 2\)"),
        ({"target_sizes": [(4, 4)]}, r"\(height, width\) for each of 2 images"),
    ],
)
def test_pseudo_masks_refuse_what_does_not_fit(options: dict[str, Any], words: str):
    with torch.no_grad():
        output = tiny_model()(pixels(2, 3, 40, 24))
    with pytest.raises(ValueError, match=words):
        BiTransImageProcessor().post_process_pseudo_masks(output, **{"labels": torch.ones(2, 3), **options})
