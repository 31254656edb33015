"""Models and images that are small enough to run in milliseconds, for the tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from bitrans_hf import BiTransConfig, BiTransModel

CLASSES = {0: "cat", 1: "dog", 2: "horse"}


def tiny_config(**overrides: Any) -> BiTransConfig:
    """Three classes, a 4 x 4 grid of 8-pixel patches, three layers of three heads, no stochastic depth."""
    sizes: dict[str, Any] = {
        "id2label": CLASSES,
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "mlp_ratio": 2.0,
        "drop_path_rate": 0.0,
        "num_seed_layers": 2,
        # At the usual 0.02 attention is uniform, and nearly every mistake in it would go unseen.
        "initializer_range": 0.3,
    }
    return BiTransConfig(**{**sizes, **overrides})


def tiny_model(seed: int = 0, **overrides: Any) -> BiTransModel:
    """A randomly initialized `tiny_config` model in evaluation mode; equal seeds give equal weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BiTransModel(tiny_config(**overrides)).eval()


def pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normally distributed pixel values of the given shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """An RGB image of random blobs, smooth enough that resizing it makes sense."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)
