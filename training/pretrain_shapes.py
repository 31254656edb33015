"""Train the small encoder that the shapes recipe starts from: the demo's stand-in for ImageNet weights.

A plain timm vision transformer learns to name the one object of a drawn picture from its label. First come pictures
cut to 40 x 40 pixels around the object, as ImageNet's are around theirs, then whole ones. No mask is ever trained on,
and no scene of a recipe comes from the streams of these pictures.

    python training/pretrain_shapes.py

writes `shapes_encoder.safetensors` (timm's names, float16) and, beside it, a JSON file that says how it was made.
"""

import argparse
import json
import math
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from tqdm.auto import tqdm

from bitrans_hf.data.shapes import REFERENCE_SIZE, SHAPE_CLASSES, draw_scene
from bitrans_hf.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from bitrans_hf.store import atomic_write
from runtime import provenance

ONE_OBJECT = (1, 1)
PATCH_SIZE = 8
CROP_SIZE = 40
"""Side in pixels of the first pictures: they take a third of the time, and learning starts where nothing else is."""


def main() -> None:
    """Draw, train, score on fresh pictures, save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("training/recipes/shapes_encoder.safetensors"))
    parser.add_argument("--pictures", type=int, default=12000)
    parser.add_argument("--crop-epochs", type=int, default=7)
    parser.add_argument("--epochs", type=int, default=2, help="on whole pictures, at half the learning rate")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--hidden-size", type=int, default=96)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--mlp-ratio", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    started = time.perf_counter()
    torch.manual_seed(options.seed)
    pictures, crops, classes = draw(options.pictures, seed=2 * options.seed)
    encoder = VisionTransformer(
        img_size=CROP_SIZE,
        patch_size=PATCH_SIZE,
        embed_dim=options.hidden_size,
        depth=options.layers,
        num_heads=options.heads,
        mlp_ratio=options.mlp_ratio,
        num_classes=len(SHAPE_CLASSES),
        weight_init="jax",  # timm's usual 0.02 is far too small for narrow layers: nothing is learnt for minutes
    )
    start_where_differences_show(encoder, crops[:1000])
    train(encoder, crops, classes, options.crop_epochs, options.batch_size, options.learning_rate)
    encoder.set_input_size(img_size=(REFERENCE_SIZE, REFERENCE_SIZE))
    train(encoder, pictures, classes, options.epochs, options.batch_size, options.learning_rate / 2)
    fresh, _, fresh_classes = draw(1000, seed=2 * options.seed + 1)
    accuracy = score(encoder, fresh, fresh_classes)

    with atomic_write(options.output) as temporary:
        save_file({name: tensor.half().contiguous() for name, tensor in encoder.state_dict().items()}, temporary)
    record = {
        "command": shlex.join(["python", *sys.argv]),
        **{key: value for key, value in vars(options).items() if key != "output"},
        "accuracy_on_1000_fresh_pictures": round(100 * accuracy, 1),
        "seconds": round(time.perf_counter() - started, 1),
        "megabytes": round(options.output.stat().st_size / 1e6, 2),
        "made_with": provenance(),
    }
    with atomic_write(options.output.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n")
    print(f"{record['accuracy_on_1000_fresh_pictures']} % of fresh pictures named right -> {options.output}")


def draw(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw pictures (count, 3, 64, 64) uint8 of one object each, the same cut around it, and class ids (count,)."""
    pictures = np.empty((count, 3, REFERENCE_SIZE, REFERENCE_SIZE), dtype=np.uint8)
    crops = np.empty((count, 3, CROP_SIZE, CROP_SIZE), dtype=np.uint8)
    classes = np.empty(count, dtype=np.int64)
    for index in tqdm(range(count), desc="draw", mininterval=5):
        scene = draw_scene(seed, index, objects=ONE_OBJECT)
        shape = scene.objects[0]
        pictures[index] = scene.image.transpose(2, 0, 1)
        classes[index] = shape.class_id
        top, left = (min(max(round(at) - CROP_SIZE // 2, 0), REFERENCE_SIZE - CROP_SIZE) for at in shape.centre)
        crops[index] = pictures[index][:, top : top + CROP_SIZE, left : left + CROP_SIZE]
    return torch.from_numpy(pictures), torch.from_numpy(crops), torch.from_numpy(classes)


def normalized(pictures: torch.Tensor) -> torch.Tensor:
    """Scale pictures (B, 3, H, W) uint8 as the image processor does."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (pictures / 255.0 - mean) / std


@torch.no_grad()
def start_where_differences_show(encoder: VisionTransformer, pictures: torch.Tensor) -> None:
    """Start from patch projections that whiten the pictures, and from sines of the position.

    Random projections see little but a patch's mean colour, and random positions are drowned by it; both delay the
    moment when a shape is first seen.
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


def train(
    encoder: VisionTransformer,
    pictures: torch.Tensor,
    classes: torch.Tensor,
    epochs: int,
    batch_size: int,
    learning_rate: float,
) -> None:
    """Train with cross-entropy in bfloat16: AdamW, a short warm-up, a cosine to zero, random turns and flips."""
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    steps_per_epoch = len(pictures) // batch_size
    total, warmup = epochs * steps_per_epoch, 100
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / total)))
    )
    encoder.train()
    right: list[float] = []
    bar = tqdm(total=total, desc="train", mininterval=5)
    for _ in range(epochs):
        order = torch.randperm(len(pictures))
        for batch in order[: steps_per_epoch * batch_size].split(batch_size):
            # One of the eight turns and mirrorings for the whole batch: a shape is the same shape in all of them.
            images = torch.rot90(normalized(pictures[batch]), int(torch.randint(4, ())), dims=(2, 3))
            if torch.rand(()) < 0.5:
                images = images.flip(-1)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                tokens = encoder.forward_features(images)
                # One head reads the class token and the mean patch: Bi-Trans names classes from both.
                logits, patch_logits = encoder.head(tokens[:, 0]), encoder.head(tokens[:, 1:].mean(dim=1))
            loss = torch.stack(
                [F.cross_entropy(part.float(), classes[batch]) for part in (logits, patch_logits)]
            ).sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            bar.update()
            right.append((logits.argmax(dim=1) == classes[batch]).float().mean().item())
        bar.write(f"{100 * sum(right[-steps_per_epoch:]) / steps_per_epoch:.1f} % named right in this epoch")
    bar.close()


@torch.no_grad()
def score(encoder: VisionTransformer, pictures: torch.Tensor, classes: torch.Tensor) -> float:
    """Return the share of pictures that are named right."""
    encoder.eval()
    named = torch.cat([encoder(normalized(part)).argmax(dim=1) for part in pictures.split(100)])
    return float((named == classes).float().mean())


if __name__ == "__main__":
    main()
