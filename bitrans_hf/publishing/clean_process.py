"""Open a published folder where this package cannot be imported, and save its outputs.

`folders.check_in_clean_process` runs this file as a program; so it imports nothing of this package.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image


def outputs_of(model: Any, processor: Any, pipe: Any, labels: Any) -> dict[str, Any]:
    """Return all that a network and its pipeline compute for two images, by name.

    Args:
        model: Any of the three networks, in evaluation mode.
        processor: Its image processor.
        pipe: Its pipeline, or None.
        labels: Names of classes to look for; None for a pipeline that takes no labels.
    """
    found = {}
    rng = np.random.default_rng(0)
    for height, width in ((80, 96), (113, 70)):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        picture = coarse.resize((width, height), Image.Resampling.BICUBIC)
        name = f"{height}x{width}"
        pixel_values = processor(picture, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            outputs = model(pixel_values)
        for key, value in outputs.items():
            if isinstance(value, torch.Tensor):
                found[f"{name}.{key}"] = value.float().numpy()
        if pipe is None:
            continue
        for entry in pipe(picture) if labels is None else pipe(picture, candidate_labels=labels):
            found[f"{name}.mask.{entry['label']}"] = np.asarray(entry["mask"])
            found[f"{name}.score.{entry['label']}"] = np.asarray(entry["score"] or 0.0)
    return found


def main(folder: str, out: str, threads: str, auto_class: str, task: str, labels: str) -> None:
    """Write the outputs of the model in `folder` as `.npz`; `labels` is JSON, an empty `task` means no pipeline."""
    torch.set_num_threads(int(threads))  # another number may add in another order
    model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    make_pipeline: Any = transformers.pipeline  # its overloads want the task's name at the time of type checking
    pipe = make_pipeline(task, model=folder, device="cpu", trust_remote_code=True) if task else None
    np.savez(out, **outputs_of(model, processor, pipe, json.loads(labels)))


if __name__ == "__main__":
    sys.modules["bitrans_hf"] = None  # type: ignore[assignment]  # importing it fails, as where it is not installed
    main(*sys.argv[1:])
