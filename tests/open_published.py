"""Open published models by name alone and run them; also a program for a process where the package is absent.

python open_published.py SOURCES.json OUT.npz
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.modules["bitrans_hf"] = None  # type: ignore[assignment]  # importing it fails, as if it were not installed

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    pipeline,
)


def blobs(height: int, width: int) -> Image.Image:
    """An image of coarse random blobs."""
    coarse = np.random.default_rng(3).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def run_published(
    sources: dict[str, dict[str, str]], *, trust_remote_code: bool, pipeline_class: Any = None
) -> dict[str, np.ndarray]:
    """Open every source and return all that it computes, by name.

    Args:
        sources: "bitrans", "affinitynet..." and "deeplab..." -> `{"path": folder or repository}`, and "revision" if
            it is not the newest.
        trust_remote_code: False where the package is imported: then no call needs trust. (None would make the stock
            pipelines of transformers 5.23 ask: they look for a video processor in the folder.)
        pipeline_class: Class of the own pipeline, where it is not to be taken from the source.
    """
    found: dict[str, Any] = {}
    options = {"trust_remote_code": trust_remote_code}
    own_task = "pseudo-mask-generation" if pipeline_class else None  # a source names its task itself
    with torch.no_grad():
        for name, source in sources.items():
            path, given = source["path"], {**options, **{key: source[key] for key in ("revision",) if key in source}}
            processor = AutoImageProcessor.from_pretrained(path, **given)
            pixel_values = processor(blobs(40, 56), return_tensors="pt", size=(32, 48))["pixel_values"]
            found[f"{name}.pixel_values"] = pixel_values
            if name.startswith("bitrans"):
                model = AutoModel.from_pretrained(path, **given).eval()
                classifier = AutoModelForImageClassification.from_pretrained(path, **given).eval()
                assert type(model).__name__ == type(classifier).__name__ == "BiTransModel"
                assert AutoConfig.from_pretrained(path, **given).to_dict() == model.config.to_dict()
                labels = torch.eye(model.config.num_labels)[:1]
                outputs = model(pixel_values, labels=labels, output_hidden_states=True, output_attentions=True)
                found |= {f"{name}.{key}": value for key, value in outputs.items()}
                found[f"{name}.classifier"] = classifier(pixel_values).logits
                segmenter = pipeline(own_task, path, device="cpu", pipeline_class=pipeline_class, **given)
                assert segmenter.task == "pseudo-mask-generation"
                masks = segmenter(blobs(40, 56), candidate_labels=["cat", "horse"], scales=(1.0, 0.75), refiner="par")
                for entry in masks:
                    found[f"{name}.mask.{entry['label']}"] = np.append(np.asarray(entry["mask"]), entry["score"])
                tags = pipeline("image-classification", model=path, device="cpu", **given)(blobs(40, 56))
                found |= {f"{name}.tag.{tag['label']}": np.array(tag["score"]) for tag in tags}
                assert {tag["label"] for tag in tags} == set(model.config.label2id)
            elif name.startswith("affinitynet"):
                model = AutoModel.from_pretrained(path, **given).eval()
                found[f"{name}.pairs"] = model(pixel_values).pair_affinity
                found[f"{name}.matrix"] = model.affinity(pixel_values)[0].to_dense()
            else:
                model = AutoModelForSemanticSegmentation.from_pretrained(path, **given).eval()
                found[f"{name}.logits"] = model(pixel_values).logits
                segmenter = pipeline("image-segmentation", model=path, device="cpu", **given)
                for entry in segmenter(blobs(40, 56)):
                    assert entry["mask"].size == (56, 40)
                    found[f"{name}.segment.{entry['label']}"] = np.asarray(entry["mask"])
            assert type(model).__module__.startswith("transformers_modules") == (__name__ == "__main__")
    return dict(flat(found))


def open_without_the_package(
    sources: dict[str, Any], folder: Path, environment: dict[str, str]
) -> dict[str, np.ndarray]:
    """Open the sources in a process of its own, which cannot import the package."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sources.json").write_text(json.dumps(sources))
    own = {"HF_HOME": str(folder), "HF_MODULES_CACHE": str(folder / "modules")}
    done = subprocess.run(
        [sys.executable, __file__, str(folder / "sources.json"), str(folder / "out.npz")],
        env={**os.environ, **own, **environment}, cwd=folder, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with np.load(folder / "out.npz") as stored:
        return dict(stored)


def flat(found: dict[str, Any]) -> Any:
    """(name, array) of every tensor, also of those in tuples and dictionaries."""
    for name, value in found.items():
        if isinstance(value, dict):
            yield from flat({f"{name}.{key}": inner for key, inner in value.items()})
        elif isinstance(value, tuple):
            yield from flat({f"{name}.{index}": inner for index, inner in enumerate(value)})
        else:
            yield name, np.asarray(value)


if __name__ == "__main__":
    wanted = json.loads(Path(sys.argv[1]).read_text())
    np.savez(sys.argv[2], **run_published(wanted, trust_remote_code=True))
