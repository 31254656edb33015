"""A finished run with every stage, made in a second: tiny networks, and numbers that nobody measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_models import CLASSES, tiny_model

from bitrans_hf import AffinityNetModel, BiTransImageProcessor, DeepLabForSemanticSegmentation
from bitrans_hf.refine.pseudo_labels import write_label_png

MADE_WITH = {"commit": "0123456789ab", "torch": "9.8.7", "transformers": "6.5.4", "device": "2 CPU cores"}
RECIPE: dict[str, Any] = {
    "seed": 3,
    "data": {"source": "voc", "root": "/home/somebody/VOC2012", "train_split": "train_aug", "val_split": "val",
             "classes": list(CLASSES.values()), "table": None},
    "model": {"weights": "timm:deit_tiny_patch16_224.fb_in1k", "view": "hflip", "pac_weight": 0.125},
    "train": {"epochs": 17, "learning_rate": 0.00025},
    "seeds": {"splits": ["train", "val"], "threshold": 0.4, "scales": [1.0, 0.75]},
    "affinity": {"backbone": "bitrans", "radius": 3},
    "pseudo_labels": {"beta": 8.0},
    "segmentation": {"backbone": "bitrans", "val_split": "val"},
    "prediction": {"splits": ["val"]},
}  # fmt: skip
METRICS: dict[str, dict[str, Any]] = {
    "train": {"map_class": 46.5604, "map_patch": 91.0796, "seconds": 2312.3},
    "seeds": {
        "threshold": {"refined": 0.31},
        "splits": {
            split: {
                "images": 437 - shift, "scored": 437 - shift,
                "miou": {"sc_cam": 74.28 - shift, "coarse_cam": 48.53, "fused": 73.1, "refined": 75.27 - shift},
                "threshold": {"sc_cam": 0.09, "coarse_cam": 0.03, "fused": 0.05, "refined": 0.31},
            }
            for split, shift in (("train", 0), ("val", 2))
        },
        "seconds": 61.0,
    },
    "affinity": {"loss": 0.5, "seconds": 77.4},
    "pseudo_labels": {
        "miou": 77.77,
        "splits": {"train": {"images": 2, "scored": 2, "steps": {"seed": 71.4, "walk": 74.25, "refined": 77.77}}},
        "seconds": 12.6,
    },
    "segmentation": {"miou": 66.66, "seconds": 812.0},
    "predictions": {"miou": 68.18, "splits": {"val": {}}, "seconds": 31.2},
}  # fmt: skip
SECTIONS = {
    "train": ("seed", "data", "model", "train"),
    "seeds": ("seed", "data", "model", "train", "seeds"),
    "affinity": ("seed", "data", "affinity"),
    "pseudo_labels": ("seed", "data", "affinity", "pseudo_labels"),
    "segmentation": ("seed", "data", "segmentation"),
    "predictions": ("seed", "data", "segmentation", "prediction"),
}


def write_run(folder: Path, stages: tuple[str, ...] = tuple(METRICS), recipe: dict[str, Any] | None = None) -> Path:
    """Write `folder` as a run that has finished these stages, with its networks and pseudo labels."""
    for stage in stages:
        (folder / stage).mkdir(parents=True)
        chosen = {key: (recipe or RECIPE)[key] for key in SECTIONS[stage]}
        files = {
            "recipe": chosen,
            "metrics": {**METRICS[stage], "made_with": MADE_WITH},
            "done": {"stage": stage, "finished": "2026-11-24 10:00:00"},
        }
        for name, content in files.items():
            (folder / stage / f"{name}.json").write_text(json.dumps(content))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        networks = {
            "train": tiny_model(),
            "affinity": AffinityNetModel.from_bitrans(tiny_model(), radius=3),
            "segmentation": DeepLabForSemanticSegmentation.from_bitrans(tiny_model()),
        }
    for stage in set(networks) & set(stages):
        networks[stage].eval().save_pretrained(folder / stage / "model")
        BiTransImageProcessor(do_resize=stage != "segmentation").save_pretrained(folder / stage / "model")
    if "pseudo_labels" in stages:
        for number, image_id in enumerate(("2007_000032", "folder/a b")):
            label_map = np.random.default_rng(number).choice([0, 1, 3, 255], (9, 7 + number)).astype(np.uint8)
            write_label_png(folder / "pseudo_labels" / "train" / "labels" / f"{image_id}.png", label_map)
    return folder
