"""Images in, normalised tensors out, and the several sizes that seeds are averaged over."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any PIL mode to 8-bit RGB, pixels where they are stored (no EXIF rotation).

    16-bit gray is scaled from [0, 65535] to [0, 255]; transparent images are laid on white, as a viewer shows them.

    Raises:
        ValueError: mode "F", whose range is not defined.
    """
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise ValueError("got a floating-point image (mode F), whose range is not defined; save it as 8 or 16 bit.")
    if image.mode.startswith("I"):
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray((values // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        foreground = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", foreground.size, "white"), foreground).convert("RGB")
    return image.convert("RGB")


class BiTransImageProcessor(TorchvisionBackend):
    """Resize to the training square and normalise as ImageNet; `scaled_views` gives the sizes that seeds need.

    Example:
        >>> from PIL import Image
        >>> processor = BiTransImageProcessor()
        >>> [tuple(view.shape) for view in processor.scaled_views(Image.new("RGB", (90, 60)), scales=(1.0, 0.75))]
        [(1, 3, 60, 90), (1, 3, 45, 68)]
    """

    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"height": 224, "width": 224}  # noqa: RUF012 - transformers reads these as class attributes
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def scaled_views(self, image: Image.Image, scales: Sequence[float] = (1.0,)) -> list[torch.Tensor]:
        """Return the whole image at every scale, normalised: (1, 3, round(H * s), round(W * s)) float32 each.

        Sizes are not rounded to the patch size and PIL resizes, as the reference does, so that seeds agree with it.

        Args:
            image: PIL image of any mode; its stored pixels are used.
            scales: Factors of the image's own height and width, above 0.
        """
        image = to_rgb(image)
        return [self.normalized(scaled(image, scale)).unsqueeze(0) for scale in scales]

    def normalized(self, image: Image.Image) -> torch.Tensor:
        """Turn an RGB PIL image into a normalised tensor (3, H, W) float32 without resizing."""
        pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255.0).permute(2, 0, 1)
        mean = torch.tensor(self.image_mean).view(3, 1, 1)
        return (pixels - mean) / torch.tensor(self.image_std).view(3, 1, 1)


def scaled(image: Image.Image, scale: float) -> Image.Image:
    """Resize a PIL image to round(side * scale) with PIL's bicubic filter; scale 1 returns the image itself.

    Raises:
        ValueError: the scale is not above 0 or leaves less than one pixel.
    """
    size = (round(image.width * scale), round(image.height * scale))
    if min(size) < 1:
        raise ValueError(f"scale {scale} leaves nothing of an image of {image.height} x {image.width} pixels.")
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)
