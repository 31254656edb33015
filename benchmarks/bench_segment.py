"""The segmentation network: training in bf16 and channels last against the plain form, and testing with a CRF."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image

from bitrans_hf import BiTransImageProcessor, DeepLabConfig, DeepLabForSemanticSegmentation
from bitrans_hf.pool import ImagePool, available_cores
from bitrans_hf.refine.crf import CrfJob, CrfNotInstalledError, check_crf_installed, dense_crf
from bitrans_hf.stages.multi_scale import TEST_PRESETS, multi_scale_scores
from bitrans_hf.stages.precision import has_native_bf16

from .harness import Options, Row, median_times

NUM_LABELS = 21
NUM_CRF_LABELS = 3
"""Background and two classes, about what a VOC image holds."""


def make_network(options: Options, width_multiplier: float) -> DeepLabForSemanticSegmentation:
    """Make MCTformer's DeepLab on a ResNet38, on the CPU a narrower one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DeepLabForSemanticSegmentation(DeepLabConfig(backbone_config={"width_multiplier": width_multiplier}))
    model.to(options.device)  # type: ignore[arg-type]  # transformers hides the overloads
    return model


def training_step(options: Options) -> list[Row]:
    """One optimizer step on crops of 321 pixels, on the CPU of 129 with a quarter of the channels.

    Not fewer: below 16 channels oneDNN overwrites memory in strided 1x1 convolutions, channels last.
    """
    crop, batch, width = (129, 2, 1 / 4) if options.device == "cpu" else (321, 4, 1.0)
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(batch, 3, crop, crop, generator=generator).to(options.device)
    labels = torch.randint(NUM_LABELS, (batch, crop, crop), generator=generator).to(options.device)

    def step(*, bf16: bool, channels_last: bool) -> Callable[[], object]:
        model = make_network(options, width).train()
        if channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-arg]  # transformers hides the overloads
        optimizer = torch.optim.SGD(model.parameter_groups(), lr=1e-6)

        def run() -> None:
            with torch.autocast(options.device, torch.bfloat16, enabled=bf16):
                loss = model(pixel_values, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    candidates = {
        "float32": step(bf16=False, channels_last=False),
        "channels last": step(bf16=False, channels_last=True),
    }
    if has_native_bf16(torch.device(options.device)):  # elsewhere nobody trains in it
        candidates["bf16"] = step(bf16=True, channels_last=False)
        candidates["bf16, channels last"] = step(bf16=True, channels_last=True)
    per_image = {name: time / batch for name, time in median_times(candidates, options).items()}
    plain = per_image.pop("float32")
    network = f"DeepLab on ResNet38{'' if width == 1 else f' of {width:g} width'}, {crop} px"
    return [
        Row(f"segmentation training, {network}, {name}", time, plain, "float32", "ms an image")
        for name, time in per_image.items()
    ]


def testing(options: Options) -> list[Row]:
    """MCTformer's test of a few images of 375 x 500 pixels: five scales, then its CRF, on one core and on all.

    The network has a sixteenth of its channels on the CPU. Its scores are cut to as many classes as an image holds.
    """
    try:
        check_crf_installed()
    except CrfNotInstalledError as error:
        print(f"segmentation testing: left out, {error}", flush=True)
        return []
    model = make_network(options, 1 / 16 if options.device == "cpu" else 1.0).eval()
    images = [smooth_picture(seed) for seed in range(2 if options.device == "cpu" else 16)]
    processor = BiTransImageProcessor()

    def jobs() -> Iterator[tuple[str, CrfJob]]:
        for number, image in enumerate(images):
            pixel_values = processor.normalized(image).to(options.device)
            scores = multi_scale_scores(model, pixel_values, **TEST_PRESETS["mctformer"])
            yield f"{number}", CrfJob(np.array(image), scores[:NUM_CRF_LABELS].cpu().numpy())

    cores = available_cores()
    with ImagePool(1) as alone, ImagePool(cores) as all_cores:
        candidates: dict[str, Callable[[], object]] = {
            "network": lambda: list(jobs()),
            "one process": lambda: list(alone.run(refine, jobs(), strict=True)),
            "pool": lambda: list(all_cores.run(refine, jobs(), strict=True)),
        }
        # Seconds each, so a few repeats tell; processor time would miss that of the pool.
        few = dataclasses.replace(options, repeats=min(3, options.repeats), clock="wall")
        per_image = {name: time / len(images) for name, time in median_times(candidates, few).items()}
    title = "segmentation test, five scales of 375x500"
    return [
        Row(f"{title}, without CRF", per_image["network"], per_image["one process"], "with CRF", "ms an image"),
        Row(
            f"{title}, CRF in {cores} processes beside the network",
            per_image["pool"],
            per_image["one process"],
            "one process",
            "ms an image",
        ),
    ]


def refine(job: CrfJob) -> np.ndarray:
    """Refine as MCTformer's test does."""
    return dense_crf(job.image, job.scores, preset="mctformer")


def smooth_picture(seed: int) -> Image.Image:
    """Make an image of soft blobs: a CRF takes longer on noise than on photographs."""
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
