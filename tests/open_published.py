"""Open published models by name alone and run them; also a program for a process where the package is absent.

python open_published.py SOURCES.json OUT.npz
"""

from __future__ import annotations

import json
import sys
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
    """A picture of coarse random blobs."""
    coarse = np.random.default_rng(3).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def run_published(sources: dict[str, dict[str, str]], **options: Any) -> dict[str, np.ndarray]:
    """Open every source and return all that it computes, by name.

    Args:
        sources: "bitrans", "affinitynet..." and "deeplab..." -> `{"path": folder or repository}`, and "revision" if
            it is not the newest.
        **options: `trust_remote_code`, and `pipeline_class` for the own pipeline.
    """
    found: dict[str, Any] = {}
    own_pipeline = {"pipeline_class": options.pop("pipeline_class")} if "pipeline_class" in options else {}
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
                segmenter = pipeline(model=path, device="cpu", **given, **own_pipeline)
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
    with open(sys.argv[1], encoding="utf-8") as file:  # noqa: PTH123 - pathlib would be one more import
        np.savez(sys.argv[2], **run_published(json.load(file), trust_remote_code=True))
