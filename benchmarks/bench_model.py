"""Forward pass and training step against timm's DeiT-Small; memory against keeping every head's attention."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from typing import cast

import timm
import torch
import torch.nn.functional as F
from torch import nn

from bitrans_hf import BiTransConfig, BiTransModel
from bitrans_hf.hub.encoder import BiTransLayer
from bitrans_hf.hub.losses import affinity_consistency_loss, class_consistency_loss, classification_loss
from bitrans_hf.hub.views import VIEWS, invert_affinity

from .harness import Options, Row, bytes_kept_for_backward, can_measure_memory, extra_peak_memory, median_times

NUM_CLASSES = 20
MEBIBYTE = 2**20


def make_bitrans(options: Options, initializer_range: float = 0.02) -> BiTransModel:
    """Build DeiT-Small with 20 class tokens and random weights."""
    torch.manual_seed(0)
    id2label = {index: f"class {index}" for index in range(NUM_CLASSES)}
    model = BiTransModel(BiTransConfig(id2label=id2label, initializer_range=initializer_range))
    nn.Module.to(model, options.device)
    return model


def make_timm(options: Options) -> nn.Module:
    """Build timm's DeiT-Small with random weights and a 20-class head."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(
        "deit_small_patch16_224", pretrained=False, num_classes=NUM_CLASSES, drop_path_rate=0.1
    )
    return model.to(options.device)


def make_batch(batch_size: int, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (B, 3, 224, 224) of noise and multi-hot labels (B, 20)."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, 224, 224, generator=generator)
    labels = (torch.rand(batch_size, NUM_CLASSES, generator=generator) < 0.1).float()
    return images.to(options.device), labels.to(options.device)


class EveryHeadKept(nn.Module):
    """The encoder, maps and losses of `BiTransModel`, with every layer's (2B, heads, T, T) attention kept to the end.

    This is how the public MCTformer code makes its maps: a list of all attentions, averaged after the last layer.
    """

    def __init__(self, model: BiTransModel):
        super().__init__()
        self.model = model

    def maps(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return class logits (B, C), Coarse-CAM (B, C, h, w), SC-CAM (B, C, h, w) and affinity (B, N, N)."""
        model, config = self.model, self.model.config
        h, w = images.shape[2] // config.patch_size, images.shape[3] // config.patch_size
        patches = model.patch_embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([model.class_tokens.expand(len(images), -1, -1), patches], dim=1)
        tokens = tokens + model.position_embedding(images.shape[2], images.shape[3])
        kept = []
        for module in model.layers:
            layer = cast(BiTransLayer, module)
            attention = layer.attention
            batch, length, width = tokens.shape
            qkv = attention.qkv(layer.norm1(tokens)).reshape(batch, length, 3, attention.num_heads, -1)
            query, key, value = qkv.permute(2, 0, 3, 1, 4)
            weights = (query @ key.transpose(2, 3) * (width // attention.num_heads) ** -0.5).softmax(dim=-1)
            kept.append(weights)
            mixed = (weights @ value).transpose(1, 2).reshape(batch, length, width)
            tokens = tokens + layer.drop_path(attention.proj(mixed))
            hidden = layer.mlp.fc1(layer.norm2(tokens))  # kept as any plain layer keeps it, GELU's output too
            tokens = tokens + layer.drop_path(layer.mlp.fc2(F.gelu(hidden)))
        heads_averaged = torch.stack([weights.mean(dim=1) for weights in kept])
        sc_cam = heads_averaged[-config.num_seed_layers :, :, :NUM_CLASSES, NUM_CLASSES:].mean(dim=0)
        affinity = heads_averaged[:, :, NUM_CLASSES:, NUM_CLASSES:].mean(dim=0)
        coarse_cam = model.seg_head(tokens[:, NUM_CLASSES:].transpose(1, 2).unflatten(2, (h, w)))
        return tokens[:, :NUM_CLASSES].mean(dim=-1), coarse_cam, sc_cam.unflatten(2, (h, w)), affinity

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the total loss (Eq. 12) of the batch and its mirror image."""
        view = VIEWS["hflip"]
        class_logits, coarse_cam, sc_cam, affinity = self.maps(torch.cat([images, view.apply(images)]))
        (first, second), (rows, rows_second) = sc_cam.chunk(2), affinity.chunk(2)
        both = labels.repeat(2, 1)
        return (
            classification_loss(class_logits, both)
            + classification_loss(coarse_cam.mean(dim=(2, 3)), both)
            + class_consistency_loss(first, view.invert(second))
            + affinity_consistency_loss(rows, invert_affinity(view, rows_second, (sc_cam.shape[2], sc_cam.shape[3])))
        )


def training_step(
    model: nn.Module, loss_of: Callable[[], torch.Tensor], autocast: torch.dtype | None, options: Options
) -> Callable[[], None]:
    """Return a function that runs forward, backward and one AdamW step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(options.device, autocast) if autocast else nullcontext():
            loss = loss_of()
        loss.backward()
        optimizer.step()

    return step


def settings(options: Options) -> list[tuple[str, torch.dtype | None, bool]]:
    """(name, autocast type, compiled) to measure: what people train with on this device."""
    if options.device == "cpu":
        return [("fp32", None, False)]
    return [("fp32", None, False), ("bf16", torch.bfloat16, False), ("bf16 compiled", torch.bfloat16, True)]


def forward_with_maps(options: Options) -> list[Row]:
    """Evaluation forward with SC-CAM, Coarse-CAM and affinity against timm's plain forward."""
    batch_size = 8
    images, _ = make_batch(batch_size, options)
    rows = []
    for name, autocast, compiled in settings(options):
        ours, plain = make_bitrans(options).eval(), make_timm(options).eval()
        run_ours = torch.compile(ours, fullgraph=True) if compiled else ours
        run_plain = torch.compile(plain, fullgraph=True) if compiled else plain

        def run(
            model: Callable[[torch.Tensor], object], autocast: torch.dtype | None = autocast
        ) -> Callable[[], object]:
            def forward() -> object:
                with torch.no_grad(), torch.autocast(options.device, autocast) if autocast else nullcontext():
                    return model(images)

            return forward

        times = median_times({"ours": run(run_ours), "timm": run(run_plain)}, options)
        rows.append(
            Row(
                f"forward with maps, batch {batch_size}, {name}",
                times["ours"],
                times["timm"],
                "timm deit_small",
                "ms",
                1.15,
            )
        )
    return rows


def bi_branch_step(options: Options) -> list[Row]:
    """Two views with SCC and PAC, forward, backward and AdamW, against timm's step on one view."""
    batch_size = 8 if options.device == "cpu" else 64
    images, labels = make_batch(batch_size, options)
    rows = []
    for name, autocast, compiled in settings(options):
        ours, plain = make_bitrans(options).train(), make_timm(options).train()
        run_ours = torch.compile(ours, fullgraph=True) if compiled else ours
        run_plain = torch.compile(plain, fullgraph=True) if compiled else plain

        def loss_of_ours(model: Callable[..., object] = run_ours) -> torch.Tensor:
            loss: torch.Tensor = model(images, labels=labels).loss  # type: ignore[attr-defined]
            return loss

        def loss_of_timm(model: Callable[[torch.Tensor], torch.Tensor] = run_plain) -> torch.Tensor:
            return F.multilabel_soft_margin_loss(model(images).float(), labels)

        times = median_times(
            {
                "ours": training_step(ours, loss_of_ours, autocast, options),
                "timm": training_step(plain, loss_of_timm, autocast, options),
            },
            options,
        )
        rows.append(
            Row(
                f"training step, two views with SCC and PAC, batch {batch_size}, {name}",
                times["ours"],
                times["timm"],
                "timm's single-view step",
                "ms",
                2.25,
            )
        )
    return rows


def memory_of_step(keep_every_head: bool, options: Options) -> tuple[int, int, float]:
    """Return bytes kept for backward, extra bytes at the peak of a step, and the loss, of one way to train.

    Without stochastic depth, so that the losses of both ways can be compared.
    """
    torch.set_num_threads(options.threads)
    batch_size = 8 if options.device == "cpu" else 64
    model = make_bitrans(options).eval()
    every_head = EveryHeadKept(model)

    def loss_of(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = every_head(images, labels) if keep_every_head else model(images, labels=labels).loss
        return loss

    batch = make_batch(batch_size, options)
    kept = bytes_kept_for_backward(lambda: loss_of(*batch), list(model.parameters()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def step(images: torch.Tensor, labels: torch.Tensor) -> float:
        loss = loss_of(images, labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    step(*make_batch(1, options))  # allocates gradients and optimizer state, which both ways need alike
    losses: list[float] = []
    peak = extra_peak_memory(lambda: losses.append(step(*batch)), options)
    return kept, peak, losses[0]


def memory(options: Options) -> list[Row]:
    """Memory of the two-view step against the same step with every layer's per-head attention kept."""
    if not can_measure_memory(options):
        return []
    results = []
    for keep_every_head in (False, True):
        # A fresh process each: the CPU's high-water mark counts memory that an earlier run left with the allocator.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            results.append(pool.submit(memory_of_step, keep_every_head, options).result())
    (kept, peak, loss), (baseline_kept, baseline_peak, baseline_loss) = results
    if abs(loss - baseline_loss) > 1e-3:
        raise RuntimeError(f"the two ways to train must have one loss, got {loss} and {baseline_loss}.")
    name = "keeping every head's attention"
    return [
        Row("two-view step, peak memory", peak / MEBIBYTE, baseline_peak / MEBIBYTE, name, "MiB", 0.6),
        Row("two-view step, kept for backward", kept / MEBIBYTE, baseline_kept / MEBIBYTE, name, "MiB"),
    ]
