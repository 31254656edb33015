"""Exported graphs compute what torch computes, at sizes and batches they were not traced with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import picture, pixels, tiny_model

from bitrans_hf import BiTransImageProcessor, extract_seeds
from bitrans_hf.hub.seeds import normalized_seeds, sum_over_views
from bitrans_hf.publishing.export import (
    ExportError,
    SeedNetwork,
    TraceableBiTrans,
    check_sizes,
    compare,
    export_model,
    onnx_runner,
    to_exported_program,
)


@pytest.mark.parametrize(
    ("height", "width"), [(32, 32), (32, 39), (39, 39), (40, 40), (32, 40), (8, 8), (72, 16), (101, 43)]
)
def test_one_formula_gives_the_position_embedding_of_every_size(height: int, width: int):
    model = tiny_model()
    traceable = TraceableBiTrans(model.config)
    traceable.load_state_dict(model.state_dict())
    expected, actual = (each.position_embedding(height, width) for each in (model, traceable))
    torch.testing.assert_close(actual, expected, atol=3e-6, rtol=0)
    if (height, width) == (32, 32):
        assert torch.equal(actual, expected), "the training size is not resized"


@pytest.mark.parametrize("reading", [{}, {"fusion": "competing", "affinity_source": "joint", "refine_steps": 3}])
@pytest.mark.parametrize("flip", [True, False])
def test_the_network_gives_the_seeds_of_extract_seeds_and_the_models_tags(flip: bool, reading: dict[str, Any]):
    model, processor = tiny_model(**reading), BiTransImageProcessor()
    image = picture(41, 58)
    (pixel_values,) = processor.scaled_views(image)
    logits, seeds, affinity = SeedNetwork(model, flip=flip)(pixel_values)
    if reading:  # without labels, classes share patches as probably as they are there
        variants = {"": (reading["fusion"], True)}
        total = sum_over_views(model, [pixel_values], variants, flip=flip, refine_steps=reading["refine_steps"])[""]
        expected = normalized_seeds(np.array([0, 2]), total[0, [0, 2]], (41, 58))
    else:
        expected = extract_seeds(model, image, [1, 0, 1], processor=processor, flip=flip)
    np.testing.assert_allclose(seeds[0, [0, 2]].numpy(), expected.maps, atol=2e-5)
    with torch.no_grad():
        image_alone, mirrored = model(pixel_values), model(pixel_values.flip(-1))
    torch.testing.assert_close(affinity, image_alone.affinity, atol=1e-5, rtol=0)
    tags = (image_alone.logits + mirrored.logits) / 2 if flip else image_alone.logits
    torch.testing.assert_close(logits, tags, atol=1e-5, rtol=0)


# One step: three leave the maps of an untrained network all but flat, and normalizing them magnifies rounding.
@pytest.mark.parametrize("reading", [{}, {"affinity_source": "joint", "fusion": "competing"}])
def test_both_graphs_equal_torch_whatever_the_batch_and_the_size(reading: dict[str, Any], tmp_path: Path):
    import onnx

    model = tiny_model(
        hidden_size=8,
        num_attention_heads=1,
        num_hidden_layers=1,
        num_seed_layers=1,
        **reading,
    )
    description = export_model(model, BiTransImageProcessor(), tmp_path, flip=False)
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.pt2", "export.json"}
    assert json.loads((tmp_path / "export.json").read_text()) == description
    assert description["classes"] == ["cat", "dog", "horse"]

    # Read back from disk, at sizes that were neither traced nor checked when they were written.
    sizes = [(1, 16, 16), (4, 32, 32), (2, 57, 90)]
    assert not set(sizes) & set(check_sizes(model))
    content = (tmp_path / "model.onnx").read_bytes()
    for run in (onnx_runner(content), torch.export.load(tmp_path / "model.pt2").module()):
        assert max(compare(model, run, flip=False, sizes=sizes).values()) < 1e-5
    properties = {entry.key: entry.value for entry in onnx.load_from_string(content).metadata_props}
    assert json.loads(properties["classes"]) == ["cat", "dog", "horse"]


def test_a_graph_that_differs_from_torch_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = tiny_model(hidden_size=8, num_attention_heads=1, num_hidden_layers=1, num_seed_layers=1)
    other = tiny_model(1, hidden_size=8, num_attention_heads=1, num_hidden_layers=1, num_seed_layers=1)
    monkeypatch.setattr(
        "bitrans_hf.publishing.export.to_exported_program", lambda *_, **__: to_exported_program(other, flip=False)
    )
    monkeypatch.setattr("bitrans_hf.publishing.export.to_onnx", lambda *_: b"")
    monkeypatch.setattr("bitrans_hf.publishing.export.onnx_runner", lambda _: SeedNetwork(model, flip=False))
    with pytest.raises(ExportError, match=r"model\.pt2 differs from torch by .* at .*; nothing was written"):
        export_model(model, BiTransImageProcessor(), tmp_path / "out", flip=False)
    assert not (tmp_path / "out").exists()


def test_nan_counts_as_a_difference():
    model = tiny_model()

    def broken(pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits, seeds, affinity = SeedNetwork(model, flip=False)(pixel_values)
        return logits, seeds * float("nan"), affinity

    (difference,) = compare(model, broken, flip=False, sizes=[(1, 32, 32)]).values()
    assert not difference <= 1.0


def test_a_missing_extra_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from bitrans_hf.publishing.export import main

    tiny_model(hidden_size=8, num_attention_heads=1, num_hidden_layers=1, num_seed_layers=1).save_pretrained(tmp_path)
    BiTransImageProcessor().save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(
        SystemExit, match=r"onnxscript is needed for ONNX; install it with: pip install 'bitrans-hf\[export\]'"
    ):
        main([str(tmp_path), str(tmp_path / "out")])


@pytest.mark.slow
def test_the_console_exports_a_saved_model(tmp_path: Path):
    tiny_model().save_pretrained(tmp_path / "model")
    BiTransImageProcessor(image_mean=[0.5, 0.5, 0.5]).save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "bitrans_hf.publishing.export", str(tmp_path / "model"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "model.onnx: differs from torch by" in done.stdout
    description = json.loads((tmp_path / "out" / "export.json").read_text())
    assert description["flip"] is True
    assert description["input"]["mean"] == [0.5, 0.5, 0.5]
    run = onnx_runner((tmp_path / "out" / "model.onnx").read_bytes())
    logits, seeds, affinity = run(pixels(2, 3, 48, 33))
    assert (tuple(logits.shape), tuple(seeds.shape), tuple(affinity.shape)) == ((2, 3), (2, 3, 48, 33), (2, 24, 24))

    failed = subprocess.run([*command[:3], str(tmp_path / "nowhere"), str(tmp_path)], capture_output=True, text=True)
    assert failed.returncode != 0
    assert failed.stderr.startswith("error: ")
