"""Saved folders open where this package is not installed, and compute the same to the last bit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from open_published import blobs, open_without_the_package, run_published
from tiny_models import tiny_model
from transformers import AutoModel, AutoModelForImageClassification, PreTrainedModel, pipeline

from bitrans_hf import (
    AffinityNetConfig,
    AffinityNetModel,
    BiTransImageProcessor,
    BiTransModel,
    DeepLabConfig,
    DeepLabForSemanticSegmentation,
    PseudoMaskPipeline,
)

SMALL_RESNET38 = {"width_multiplier": 1 / 32}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One saved folder for each kind of network, those on the Bi-Trans encoder among them."""
    root, processor = tmp_path_factory.mktemp("published"), BiTransImageProcessor()
    pipe = pipeline("pseudo-mask-generation", model=tiny_model(), image_processor=processor, device="cpu")
    pipe.save_pretrained(root / "bitrans")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        networks: dict[str, PreTrainedModel] = {
            "affinitynet_resnet38": AffinityNetModel(AffinityNetConfig(backbone_config=SMALL_RESNET38, radius=3)),
            "affinitynet_bitrans": AffinityNetModel.from_bitrans(tiny_model(), relation="irn", radius=3),
            "deeplab_resnet38": DeepLabForSemanticSegmentation(
                DeepLabConfig(num_labels=3, backbone_config=SMALL_RESNET38, preset="deeplab-v1")
            ),
            "deeplab_bitrans": DeepLabForSemanticSegmentation.from_bitrans(tiny_model()),
        }
    for name, network in networks.items():
        network.eval().save_pretrained(root / name)
        processor.save_pretrained(root / name)
    return {name: root / name for name in ("bitrans", *networks)}


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[str, np.ndarray]:
    """What every folder computes in this process, where the package is installed: no call needs trust."""
    return run_published(
        {name: {"path": str(path)} for name, path in folders.items()},
        trust_remote_code=False,
        pipeline_class=PseudoMaskPipeline,
    )


def assert_equal_bits(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert set(actual) == set(expected)
    different = [name for name, value in expected.items() if not np.array_equal(actual[name], value)]
    assert not different


def test_a_folder_opens_without_the_package(folders: dict[str, Path], expected: dict[str, np.ndarray], tmp_path: Path):
    sources = {name: {"path": str(path)} for name, path in folders.items()}
    assert_equal_bits(open_without_the_package(sources, tmp_path, {}), expected)
    # The comparison would see a change: all these differ between images, and none is constant.
    assert sum(value.size > 1 and value.min() < value.max() for value in expected.values()) > 30


def test_the_folder_holds_what_its_code_needs_and_no_more(folders: dict[str, Path]):
    code = {name: {path.stem for path in folder.glob("*.py")} for name, folder in folders.items()}
    assert code["bitrans"] == {
        "confidence", "configuration_bitrans", "encoder", "errors", "image_decoding",
        "image_processing_bitrans", "labels", "losses",
        "maps", "modeling_bitrans", "par", "pipeline_bitrans", "refiners", "seeds", "views", "weight_files",
    }  # fmt: skip
    assert "pipeline_bitrans" not in code["deeplab_resnet38"]
    for folder in folders.values():
        assert {path.suffix for path in folder.iterdir()} == {".py", ".json", ".safetensors"}


def test_saving_again_keeps_both_auto_classes(folders: dict[str, Path], tmp_path: Path):
    AutoModelForImageClassification.from_pretrained(folders["bitrans"]).save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "configuration_bitrans.BiTransConfig",
        "AutoModel": "modeling_bitrans.BiTransModel",
        "AutoModelForImageClassification": "modeling_bitrans.BiTransModel",
    }
    assert isinstance(AutoModel.from_pretrained(tmp_path), BiTransModel)


def test_with_the_package_the_own_pipeline_opens_a_folder_without_asking(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked for trust"))
    pipe = pipeline(model=str(folders["bitrans"]), pipeline_class=PseudoMaskPipeline, device="cpu")
    assert (pipe.task, type(pipe.model)) == ("pseudo-mask-generation", BiTransModel)


def test_the_stock_classifier_gives_each_class_its_own_probability(expected: dict[str, np.ndarray]):
    tags = np.array([expected[f"bitrans.tag.{name}"] for name in ("cat", "dog", "horse")])
    assert abs(tags.sum() - 1) > 0.05, "a softmax would sum to 1"
    with torch.no_grad():
        pixel_values = BiTransImageProcessor()(blobs(40, 56), return_tensors="pt")["pixel_values"]
        logits = tiny_model()(pixel_values).logits[0]
    np.testing.assert_allclose(tags, logits.sigmoid().numpy(), atol=1e-6)
