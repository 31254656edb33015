"""Images in, normalized tensors out; scores of a network in, label maps at the image's size out."""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tvF
from transformers import BatchFeature
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import ImagesKwargs, Unpack

from .errors import InputError
from .image_decoding import to_rgb
from .maps import CAM_FUSIONS, THRESHOLD, fusion_of, min_max_normalized, refine_with_affinity, resized, strongest_row

MAX_SIDE = 640
"""Longest side in pixels that images are worked on at, unless set otherwise; VOC and COCO images pass as they are."""

MAX_ASPECT = 10
"""Side ratio from which on an image is a panorama, whose longer side may exceed the bound: see `bounded_size`."""


class BiTransImageProcessorKwargs(ImagesKwargs, total=False):
    """What may be given to `BiTransImageProcessor` and its calls, besides the usual options of image processors.

    Attributes:
        max_side: Longest side, in pixels, of images that are not resized to `size`: larger ones are reduced to it,
            so that the memory of attention maps (quadratic in the number of patches) stays bounded. It says how large
            an image `bounded`, and with it the pseudo-mask pipeline, works on, and counts in a call with
            `do_resize=False`. None: no bound.
    """

    max_side: int | None


class BiTransImageProcessor(TorchvisionBackend):
    """Resize to the training square and normalize as ImageNet; `scaled_views` gives the sizes that seeds need.

    A call takes images of any PIL mode, stored pixels, and with `segmentation_maps` also label maps of the same
    sizes (palette or gray PIL images, or arrays (H, W)), which come back as `labels` (B, h, w) int64, resized to the
    nearest pixel, every id kept: 0 background, class id + 1, 255 ignored.

    Args:
        max_side: Longest side in pixels of images that keep their own size, see `BiTransImageProcessorKwargs`; the
            default lets VOC and COCO images through as they are. The other arguments are those of every image
            processor of transformers: `size`, `do_resize`, `do_normalize`, `image_mean`, `image_std`, ...

    Example:
        >>> from PIL import Image
        >>> processor = BiTransImageProcessor()
        >>> [tuple(view.shape) for view in processor.scaled_views(Image.new("RGB", (90, 60)), scales=(1.0, 0.75))]
        [(1, 3, 60, 90), (1, 3, 45, 68)]
        >>> batch = processor(Image.new("RGB", (90, 60)), Image.new("L", (90, 60), 3), return_tensors="pt")
        >>> tuple(batch["pixel_values"].shape), tuple(batch["labels"].shape), batch["labels"].unique().tolist()
        ((1, 3, 224, 224), (1, 224, 224), [3])
    """

    valid_kwargs = BiTransImageProcessorKwargs
    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"height": 224, "width": 224}  # noqa: RUF012 - transformers reads these as class attributes
    max_side: int | None = MAX_SIDE
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def __init__(self, **kwargs: Unpack[BiTransImageProcessorKwargs]):
        super().__init__(**kwargs)  # type: ignore[misc]  # the base class is typed for its own options alone

    # ---- Images to tensors.

    def preprocess(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None = None,
        **kwargs: Unpack[BiTransImageProcessorKwargs],
    ) -> BatchFeature:
        """Prepare images, and label maps if given, for a network.

        Args:
            images: One image or a list of them: PIL images of any mode, or arrays.
            segmentation_maps: As many label maps (H, W), each of its image's size.
            **kwargs: Replace the processor's own settings for this call.

        Returns:
            `pixel_values` (B, 3, h, w) float32 and, with label maps, `labels` (B, h, w) int64; lists of tensors
            unless `return_tensors="pt"`, which needs equal sizes.

        Raises:
            ValueError: numbers or sizes of images and label maps differ, or a label map has several channels.
        """
        batch: BatchFeature = super().preprocess(images, segmentation_maps, **kwargs)
        return batch

    def _preprocess_image_like_inputs(  # type: ignore[override]  # as transformers' own processors with maps do
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None,
        do_convert_rgb: bool,
        input_data_format: ChannelDimension | None,
        return_tensors: str | None,
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        pictures = self._prepare_image_like_inputs(
            images, do_convert_rgb=do_convert_rgb, input_data_format=input_data_format, device=device
        )
        data = {"pixel_values": self._preprocess(pictures, **kwargs, return_tensors=None)["pixel_values"]}
        if segmentation_maps is not None:
            maps = self._prepare_image_like_inputs(
                segmentation_maps, expected_ndims=2, do_convert_rgb=False, input_data_format=ChannelDimension.FIRST
            )
            check_label_maps(pictures, maps)
            untouched = {"resample": tvF.InterpolationMode.NEAREST_EXACT, "do_rescale": False, "do_normalize": False}
            resized = self._preprocess(maps, **{**kwargs, **untouched}, return_tensors=None)["pixel_values"]
            data["labels"] = [label_map.squeeze(0).to(torch.int64) for label_map in resized]
        return BatchFeature(data=data, tensor_type=return_tensors)

    def process_image(  # type: ignore[override]  # the rest is passed on
        self, image: Any, do_convert_rgb: bool | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Turn one image into a tensor (C, H, W); PIL images become RGB as `to_rgb` does it."""
        if do_convert_rgb and isinstance(image, Image.Image):
            image = to_rgb(image)
        if isinstance(image, np.ndarray) and not image.flags.writeable:
            image = image.copy()  # torch warns of arrays that are views of a PIL image
        tensor: torch.Tensor = super().process_image(image, do_convert_rgb=do_convert_rgb, **kwargs)
        return tensor

    def _preprocess(  # type: ignore[override]  # the rest is passed on
        self, images: list[torch.Tensor], do_resize: bool, max_side: int | None, resample: Any, **kwargs: Any
    ) -> BatchFeature:
        if not do_resize and max_side is not None:
            images = [
                image
                if (size := bounded_size(image.shape[-2:], max_side)) == image.shape[-2:]
                else self.resize(image, SizeDict(height=size[0], width=size[1]), resample=resample)
                for image in images
            ]
        batch: BatchFeature = super()._preprocess(images, do_resize=do_resize, resample=resample, **kwargs)
        return batch

    def bounded(self, image: Image.Image, max_side: int | None = None) -> Image.Image:
        """Return an image as RGB, reduced with PIL's bicubic filter if its longer side exceeds `max_side`.

        Args:
            image: PIL image of any mode; its stored pixels are used.
            max_side: In pixels, instead of the processor's own.
        """
        image = to_rgb(image)
        max_side = self.max_side if max_side is None else max_side
        return image if max_side is None else bounded_image(image, max_side)

    def scaled_views(self, image: Image.Image, scales: Sequence[float] = (1.0,)) -> list[torch.Tensor]:
        """Return the whole image at every scale, normalized: (1, 3, round(H * s), round(W * s)) float32 each.

        Sizes are not rounded to the patch size and PIL resizes, as the reference does, so that seeds agree with it.

        Args:
            image: PIL image of any mode; its stored pixels are used.
            scales: Factors of the image's own height and width, above 0.
        """
        image = to_rgb(image)
        return [self.normalized(scaled(image, scale)).unsqueeze(0) for scale in scales]

    def normalized(self, image: Image.Image) -> torch.Tensor:
        """Turn an RGB PIL image into a normalized tensor (3, H, W) float32 without resizing."""
        pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255.0).permute(2, 0, 1)
        mean = torch.tensor(self.image_mean).view(3, 1, 1)
        return (pixels - mean) / torch.tensor(self.image_std).view(3, 1, 1)

    # ---- Scores to label maps.

    def post_process_semantic_segmentation(
        self, outputs: Any, target_sizes: Sequence[tuple[int, int]] | torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """Turn the logits of a segmentation network into label maps.

        Args:
            outputs: With `logits` (B, L, h, w), row 0 being the background.
            target_sizes: (H, W) of each image; the logits are resized to it bilinearly, one row at a time. None
                leaves the label maps at (h, w).

        Returns:
            B label maps (H, W) int64 with values in [0, L).

        Raises:
            ValueError: not as many sizes as images.
        """
        logits = outputs.logits
        sizes = sizes_of_batch(target_sizes, logits)
        return [
            strongest_row(range(len(scores)), (resized(row, size) for row in scores)).long()
            for scores, size in zip(logits, sizes, strict=True)
        ]

    def post_process_pseudo_masks(
        self,
        outputs: Any,
        labels: torch.Tensor | Sequence[Sequence[int]],
        target_sizes: Sequence[tuple[int, int]] | torch.Tensor | None = None,
        threshold: float = THRESHOLD,
        *,
        mode: str = "fused",
        refine: bool = True,
    ) -> list[torch.Tensor]:
        """Turn the maps of one forward pass of a `BiTransModel` into pseudo masks of the classes that are present.

        Each present class' map is fused (Eq. 8), refined (Eq. 10), resized to the image and min-max normalized; a
        pixel takes the class with the highest value above the threshold. The pseudo-mask pipeline adds scales, flips
        and stronger refinement to this.

        Args:
            outputs: A `BiTransOutput` of B images.
            labels: Multi-hot image-level labels (B, C), 0 or 1.
            target_sizes: (H, W) of each image; None leaves the masks on the token grid.
            threshold: Background score in [0, 1].
            mode: "fused" (SC-CAM x ReLU(Coarse-CAM)), its root "fused_sqrt", "competing"
                (the classes of the image share its patches), "sc_cam" or "coarse_cam".
            refine: Spread the maps along the patch affinity once.

        Returns:
            B label maps (H, W) int64: 0 background, class id + 1 for objects. Memory does not grow with the number of
            classes.

        Raises:
            ValueError: threshold or mode out of range, labels that are not (B, C), not as many sizes as images.
        """
        if not 0 <= threshold <= 1:
            raise InputError(f"threshold must be in [0, 1], got {threshold}.")
        if mode not in CAM_FUSIONS:
            raise InputError(f"mode must be one of {', '.join(CAM_FUSIONS)}, got {mode!r}.")
        multi_hot, shape = torch.as_tensor(labels), tuple(outputs.coarse_cam.shape[:2])
        if multi_hot.shape != shape:
            raise InputError(f"labels must be multi-hot of shape {shape}, got {tuple(multi_hot.shape)}.")
        maps = fusion_of(outputs, mode, multi_hot)
        if refine:
            maps = refine_with_affinity(maps, outputs.affinity)
        label_maps = []
        for class_maps, present, size in zip(maps, multi_hot, sizes_of_batch(target_sizes, maps), strict=True):
            class_ids = present.nonzero().flatten().tolist()
            background = torch.full(size, threshold, dtype=torch.float32, device=maps.device)
            rows = (min_max_normalized(resized(class_maps[class_id].float(), size)) for class_id in class_ids)
            label_ids = [0, *(class_id + 1 for class_id in class_ids)]
            label_maps.append(strongest_row(label_ids, chain([background], rows)).long())
        return label_maps


def sizes_of_batch(
    target_sizes: Sequence[tuple[int, int]] | torch.Tensor | None, maps: torch.Tensor
) -> Iterator[tuple[int, int]]:
    """Return (H, W) of each image of a batch of maps (B, C, h, w): the given sizes, or (h, w) for all."""
    batch, (h, w) = len(maps), maps.shape[-2:]
    if target_sizes is None:
        return iter([(h, w)] * batch)
    if len(target_sizes) != batch:
        raise InputError(f"target_sizes must hold one (height, width) for each of {batch} images, got {target_sizes}.")
    return ((int(height), int(width)) for height, width in target_sizes)


def check_label_maps(pictures: Sequence[torch.Tensor], label_maps: Sequence[torch.Tensor]) -> None:
    """Check that label maps (1, H, W) belong to images (3, H, W).

    Raises:
        ValueError: their numbers or sizes differ, or a label map has several channels.
    """
    if len(pictures) != len(label_maps):
        raise InputError(f"got {len(label_maps)} segmentation maps for {len(pictures)} images, expected as many.")
    for index, (picture, label_map) in enumerate(zip(pictures, label_maps, strict=True)):
        if len(label_map) != 1:
            raise InputError(
                f"segmentation map {index} has {len(label_map)} channels, expected one of label ids; "
                "convert its colors to ids (0 background, 1 for the first class)."
            )
        if label_map.shape[-2:] != picture.shape[-2:]:
            raise InputError(
                f"segmentation map {index} is {label_map.shape[-2]} x {label_map.shape[-1]} (height x width) and its "
                f"image {picture.shape[-2]} x {picture.shape[-1]}; give both at the same size and orientation."
            )


def bounded_size(size: Sequence[int], max_side: int) -> tuple[int, int]:
    """Return (height, width) reduced so that the longer side is at most `max_side`, proportions kept.

    The longer side of a panorama, which is more than ten times the shorter one, may exceed `max_side`: its shorter
    side keeps a tenth of `max_side`, so that patches fit in, as long as the area is at most `max_side` squared.

    Raises:
        ValueError: `max_side` is below 1.
    """
    if max_side < 1:
        raise InputError(f"max_side must be at least 1 pixel, got {max_side}.")
    longest, shortest = max(size), min(size)
    if longest <= max_side:
        return cast(tuple[int, int], tuple(size))
    if longest <= MAX_ASPECT * shortest:
        height, width = (max(1, round(side * max_side / longest)) for side in size)
    else:
        scale = min(1.0, max_side / (MAX_ASPECT * shortest), max_side / (longest * shortest) ** 0.5)
        height, width = (max(1, round(side * scale)) for side in size)
    return height, width


def patch_problem(
    size: tuple[int, int], working: tuple[int, int], scales: Sequence[float], patch_size: int, option_prefix: str = ""
) -> str:
    """Say that an image does not hold a patch at its smallest scale, and what helps; "" where it does.

    Args:
        size: (height, width) of the image.
        working: (height, width) that it is reduced to.
        scales: Factors of that size that the network sees.
        patch_size: In pixels.
        option_prefix: Of the options that are named, such as "seeds.".
    """
    smallest = min(scales)
    if round(min(working) * smallest) >= patch_size:
        return ""
    if min(size) < patch_size:
        remedy = "enlarge it or leave it out"
    elif round(min(size) * smallest) < patch_size:
        remedy = f"leave out the small factors of {option_prefix}scales, or enlarge the image"
    else:
        remedy = f"raise {option_prefix}max_side, or cut the image into pieces"
    reduced = f", worked on at {working[0]} x {working[1]}" if working != size else ""
    return (
        f"smaller than a patch: {size[0]} x {size[1]} pixels (height x width){reduced}, at scale {smallest}; "
        f"expected at least {patch_size} x {patch_size}: {remedy}."
    )


def bounded_image(image: Image.Image, max_side: int) -> Image.Image:
    """Return an RGB image reduced to `bounded_size` with PIL's bicubic filter; a small one as it is."""
    height, width = bounded_size((image.height, image.width), max_side)
    return image if (width, height) == image.size else image.resize((width, height), Image.Resampling.BICUBIC)


def scaled(image: Image.Image, scale: float) -> Image.Image:
    """Resize a PIL image to round(side * scale) with PIL's bicubic filter; scale 1 returns the image itself.

    Raises:
        ValueError: the scale is not above 0 or leaves less than one pixel.
    """
    size = (round(image.width * scale), round(image.height * scale))
    if min(size) < 1:
        raise InputError(f"scale {scale} leaves nothing of an image of {image.height} x {image.width} pixels.")
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


# A saved folder carries this code, so that it opens, with trust_remote_code, where the package is not installed.
BiTransImageProcessor.register_for_auto_class()
