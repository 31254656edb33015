from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import picture

from bitrans_hf import BiTransImageProcessor
from bitrans_hf.image_processing_bitrans import scaled, to_rgb

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def normalized(image: Image.Image) -> np.ndarray:
    """(3, H, W), written out."""
    return ((np.asarray(image) / 255.0 - MEAN) / STD).transpose(2, 0, 1)


# ---- Any picture to RGB.


def test_an_rgb_picture_is_returned_as_it_is():
    image = picture(5, 7)
    assert to_rgb(image) is image


def test_gray_and_palette_pictures_keep_their_colours():
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    expected = np.repeat(gray[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(np.asarray(to_rgb(Image.fromarray(gray))), expected)
    paletted = Image.fromarray(gray % 3)
    paletted.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    colours = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90]], dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(to_rgb(paletted)), colours[gray % 3])
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


def test_a_transparent_palette_colour_is_laid_on_white(tmp_path: Path):
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


def test_a_floating_point_picture_is_refused():
    with pytest.raises(ValueError, match=r"got a floating-point image \(mode F\).*save it as 8 or 16 bit"):
        to_rgb(Image.new("F", (2, 2)))


# ---- Sizes that seeds need.


@pytest.mark.parametrize("size", [(60, 90), (45, 31), (33, 33)])
def test_scaled_views_are_pils_bicubic_normalised(size: tuple[int, int]):
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


def test_a_call_resizes_to_the_square_and_normalises():
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
