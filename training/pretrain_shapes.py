"""Train the small encoder that the shapes recipe starts from: the demo's stand-in for ImageNet weights.

A plain timm vision transformer sees collages of four drawn images of one object each, cut around their object as
ImageNet's are around theirs. Its patch tokens learn to name the image that they lie in, its class token which shapes
the collage holds. So a token learns to speak of its own surroundings, which a network that is trained from scratch on
whole scenes need not do: with attention over everything, any token can carry the evidence of any object.

No mask is trained on; the labels are one word for each image, and the place of the four images is known. No scene
of a recipe comes from the streams of these images.

    python training/pretrain_shapes.py

writes `shapes_encoder.safetensors` (timm's names, float16) and, beside it, a JSON file that says how it was made.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from bitrans_hf.commands import run_script

    run_script("pretrain_shapes")

import argparse
import json
import math
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from bitrans_hf.data.shapes import REFERENCE_SIZE, SHAPE_CLASSES, draw_scene
from bitrans_hf.files import atomic_write
from bitrans_hf.hub.image_processing_bitrans import BiTransImageProcessor
from bitrans_hf.progress import progress, say_result
from bitrans_hf.stages.records import provenance

ONE_OBJECT = (1, 1)
PATCH_SIZE = 8
SPLITS = (24, 32, 40)
"""Where a collage may be divided, in pixels from its top or left: at edges of patches."""


def main() -> None:
    """Draw, train, score on fresh images, save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("bitrans_hf/recipes/shapes_encoder.safetensors"))
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--hidden-size", type=int, default=96)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--mlp-ratio", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    started, made_with = time.perf_counter(), provenance()
    torch.manual_seed(options.seed)
    pool = draw(options.images, seed=2 * options.seed)
    encoder = VisionTransformer(
        img_size=REFERENCE_SIZE,
        patch_size=PATCH_SIZE,
        embed_dim=options.hidden_size,
        depth=options.layers,
        num_heads=options.heads,
        mlp_ratio=options.mlp_ratio,
        num_classes=len(SHAPE_CLASSES),
        weight_init="jax",  # timm's usual 0.02 is far too small for narrow layers: nothing is learnt for minutes
    )
    patch_head = torch.nn.Linear(options.hidden_size, len(SHAPE_CLASSES))
    start_where_differences_show(encoder, pool.images[:1000])
    train(encoder, patch_head, pool, options.steps, options.batch_size, options.learning_rate)
    accuracy = score(encoder, patch_head, draw(1000, seed=2 * options.seed + 1))

    with atomic_write(options.output) as temporary:
        save_file({name: tensor.half().contiguous() for name, tensor in encoder.state_dict().items()}, temporary)
    record = {
        "command": shlex.join(["python", *sys.argv]),
        **{key: value for key, value in vars(options).items() if key != "output"},
        "fresh_pictures_of_collages_named_right_percent": round(100 * accuracy, 1),
        "seconds": round(time.perf_counter() - started, 1),
        "megabytes": round(options.output.stat().st_size / 1e6, 2),
        "made_with": made_with,
    }
    with atomic_write(options.output.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"{100 * accuracy:.1f} % of the images in fresh collages named right -> {options.output}")


QUERY_GAIN = 1.3
"""Makes a token's attention to its like start some hundred times stronger than to an unrelated token."""


@dataclass(frozen=True)
class Pool:
    """Images of one object each.

    Attributes:
        images: (n, 3, 64, 64) uint8.
        centers: (n, 2) row and column of the object, in pixels.
        classes: (n,) class ids.
    """

    images: torch.Tensor
    centers: torch.Tensor
    classes: torch.Tensor


def draw(count: int, seed: int) -> Pool:
    """Draw `count` images of one object each."""
    images = np.empty((count, 3, REFERENCE_SIZE, REFERENCE_SIZE), dtype=np.uint8)
    centers = np.empty((count, 2), dtype=np.float32)
    classes = np.empty(count, dtype=np.int64)
    for index in progress(range(count), desc="draw", unit="image"):
        scene = draw_scene(seed, index, objects=ONE_OBJECT)
        images[index] = scene.image.transpose(2, 0, 1)
        centers[index], classes[index] = scene.objects[0].center, scene.objects[0].class_id
    return Pool(torch.from_numpy(images), torch.from_numpy(centers), torch.from_numpy(classes))


def collages(pool: Pool, size: int) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
    """Compose collages (size, 3, 64, 64) uint8 of four images, all divided at one random place.

    Returns:
        The collages, the class ids (size, 4) of the images (upper left, upper right, lower left, lower right), and
        the row and column of the division in pixels.
    """
    row, column = (SPLITS[int(torch.randint(len(SPLITS), ()))] for _ in range(2))
    chosen = torch.randint(len(pool.classes), (size, 4))
    images = torch.empty(size, 3, REFERENCE_SIZE, REFERENCE_SIZE, dtype=torch.uint8)
    for number, (rows, columns) in enumerate(cells(row, column)):
        extent = torch.tensor([rows.stop - rows.start, columns.stop - columns.start])
        jitter = torch.randint(-4, 5, (size, 2))
        corners = (pool.centers[chosen[:, number]] - extent / 2).round().long() + jitter
        corners = corners.clamp(min=0).minimum(REFERENCE_SIZE - extent)
        for index, (top, left) in enumerate(corners.tolist()):
            cut = pool.images[chosen[index, number], :, top : top + extent[0], left : left + extent[1]]
            images[index, :, rows, columns] = cut
    return images, pool.classes[chosen], (row, column)


def cells(row: int, column: int) -> list[tuple[slice, slice]]:
    """Return rows and columns of the four parts of a collage that is divided at (row, column)."""
    edges = [(slice(0, at), slice(at, REFERENCE_SIZE)) for at in (row, column)]
    return [(rows, columns) for rows in edges[0] for columns in edges[1]]


def logits_of_parts(
    encoder: VisionTransformer, patch_head: torch.nn.Module, images: torch.Tensor, division: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Name what collages hold: (B, 4, C) by the mean patch token of each part, and (B, C) by the class token."""
    tokens = encoder.forward_features(normalized(images))
    side = REFERENCE_SIZE // PATCH_SIZE
    grid = tokens[:, 1:].unflatten(1, (side, side))
    row, column = division
    parts = [grid[:, r.start // PATCH_SIZE : r.stop // PATCH_SIZE, c.start // PATCH_SIZE : c.stop // PATCH_SIZE]
             for r, c in cells(row, column)]  # fmt: skip
    means = torch.stack([part.mean(dim=(1, 2)) for part in parts], dim=1)
    return patch_head(means).float(), encoder.head(tokens[:, 0]).float()


def normalized(pictures: torch.Tensor) -> torch.Tensor:
    """Scale images (B, 3, H, W) uint8 as the image processor does."""
    mean, std = (
        torch.tensor(values).view(3, 1, 1)
        for values in (BiTransImageProcessor.image_mean, BiTransImageProcessor.image_std)
    )
    return (pictures / 255.0 - mean) / std


@torch.no_grad()
def start_where_differences_show(encoder: VisionTransformer, pictures: torch.Tensor) -> None:
    """Start from patch projections that whiten the images, sines of the position, and attention to what is alike.

    Random projections see little but a patch's mean color, and random positions are drowned by it; both delay the
    moment when a shape is first seen. Keys that equal the queries let a token attend to tokens that look like it and
    lie near it, as trained transformers do (Trockman & Kolter, "Mimetic initialization of self-attention layers", ICML
    2023); from random ones, attention stays nearly uniform and says nothing about which patches belong together.
    """
    width: int = encoder.embed_dim
    patches = F.unfold(normalized(pictures), PATCH_SIZE, stride=PATCH_SIZE).transpose(1, 2).flatten(0, 1)
    mean = patches.mean(dim=0)
    variance, directions = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    variance, directions = variance[-width:], directions[:, -width:]  # ascending
    projection = 0.5 * (directions / (variance + 0.02).sqrt()).T
    encoder.patch_embed.proj.weight.copy_(projection.unflatten(1, (3, PATCH_SIZE, PATCH_SIZE)))
    encoder.patch_embed.proj.bias.copy_(-projection @ mean)

    grid = torch.arange(pictures.shape[-1] // PATCH_SIZE)
    frequencies = math.pi / 16 * torch.logspace(0, 3, width // 4, base=2)
    waves = torch.cat([(grid[:, None] * frequencies).sin(), (grid[:, None] * frequencies).cos()], dim=1)
    rows, columns = waves[:, None].expand(-1, len(grid), -1), waves[None].expand(len(grid), -1, -1)
    # Turned at random, so that no direction holds both a position and one of the strongest projections.
    turn = torch.linalg.qr(torch.randn(width, width)).Q
    assert encoder.pos_embed is not None  # only a model built without positions has none
    encoder.pos_embed[0, 1:] = 0.5 * torch.cat([rows, columns], dim=-1).flatten(0, 1) @ turn
    for name, weight in encoder.named_parameters():
        if name.endswith("attn.qkv.weight"):
            weight[: 2 * width] = QUERY_GAIN * weight[:width].repeat(2, 1)


def train(
    encoder: VisionTransformer,
    patch_head: torch.nn.Module,
    pool: Pool,
    steps: int,
    batch_size: int,
    learning_rate: float,
) -> None:
    """Train in bfloat16: AdamW, a short warm-up, a cosine to zero, random turns and flips."""
    parameters = [*encoder.parameters(), *patch_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 100, 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    encoder.train()
    right: list[float] = []
    for step in progress(range(steps), desc="train", unit="step"):
        images, classes, (row, column) = collages(pool, batch_size)
        # Each image of the pool is met in many orientations: a shape is the same shape in all of them.
        if torch.rand(()) < 0.5:
            images, classes = images.flip(3), classes[:, [1, 0, 3, 2]]
            column = REFERENCE_SIZE - column
        if torch.rand(()) < 0.5:
            images, classes = images.flip(2), classes[:, [2, 3, 0, 1]]
            row = REFERENCE_SIZE - row
        if torch.rand(()) < 0.5:
            images, classes = images.transpose(2, 3), classes[:, [0, 2, 1, 3]]
            row, column = column, row
        with torch.autocast("cpu", dtype=torch.bfloat16):
            part_logits, logits = logits_of_parts(encoder, patch_head, images, (row, column))
        present = F.one_hot(classes, len(SHAPE_CLASSES)).amax(dim=1).float()
        part_loss = F.cross_entropy(part_logits.flatten(0, 1), classes.flatten())
        loss = part_loss + F.multilabel_soft_margin_loss(logits, present)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        right.append((part_logits.argmax(dim=2) == classes).float().mean().item())
        if (step + 1) % 250 == 0:
            named = 100 * sum(right[-250:]) / 250
            loss_of_class_token = (loss - part_loss).item()
            say_result(f"step {step + 1}: {named:.1f} % named right, class token's loss {loss_of_class_token:.3f}")


@torch.no_grad()
def score(encoder: VisionTransformer, patch_head: torch.nn.Module, pool: Pool) -> float:
    """Return the share of images in 50 x 20 collages that their patch tokens name right."""
    encoder.eval()
    right = []
    for _ in range(50):
        images, classes, division = collages(pool, 20)
        logits, _ = logits_of_parts(encoder, patch_head, images, division)
        right.append((logits.argmax(dim=2) == classes).float().mean())
    return float(torch.stack(right).mean())
