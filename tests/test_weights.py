from __future__ import annotations

import argparse
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_models import CLASSES, pixels, tiny_model

from bitrans_hf import BiTransModel
from bitrans_hf.weights import from_mctformer, from_timm, from_timm_state_dict

State = dict[str, torch.Tensor]
DEIT_TINY = Path("weights") / "deit_tiny_patch16_224.in1k.safetensors"


@pytest.fixture
def timm_state() -> State:
    """A random vision transformer with timm's classifier and final norm: 4 x 4 patches of 16 pixels, three heads."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(
            "deit_tiny_patch16_224", pretrained=False, img_size=64, embed_dim=48, depth=3, num_heads=3, num_classes=7
        )
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return dict(model.state_dict())


def from_timm_tiny(weights: State | str | Path, **options: Any) -> BiTransModel:
    return from_timm_state_dict(weights, **{"id2label": CLASSES, "num_attention_heads": 3, **options}).eval()


def mctformer_state(model: BiTransModel, plus: bool = False) -> State:
    """The weights of a model under the names of an MCTformer V2 or MCTformer+ checkpoint."""
    state: State = {}
    for name, value in model.state_dict().items():
        name = re.sub(r"^layers\.", "blocks.", name).replace(".attention.", ".attn.")
        name = name.replace("seg_head.", "head.").replace("patch_embed.", "patch_embed.proj.")
        state[name] = value.clone()
    state["cls_token"] = state.pop("class_tokens")
    positions = [state.pop("class_position"), state.pop("patch_position")]
    if plus:
        state["pos_embed_cls"], state["pos_embed_pat"] = positions
    else:
        state["pos_embed"] = torch.cat(positions, dim=1)
    state["norm.weight"], state["norm.bias"] = torch.ones(24), torch.zeros(24)
    return state


def assert_equal_weights(ours: BiTransModel, theirs: BiTransModel) -> None:
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


# ---- DeiT from timm.


def test_the_sizes_are_read_off_the_shapes(timm_state: State):
    config = from_timm_tiny(timm_state).config
    sizes = (config.image_size, config.patch_size, config.hidden_size, config.num_hidden_layers, config.mlp_ratio)
    assert sizes == (64, 16, 48, 3, 4)
    assert config.id2label == CLASSES


def test_every_class_starts_from_the_one_class_token(timm_state: State):
    model = from_timm_tiny(timm_state)
    for class_id in range(3):
        assert torch.equal(model.class_tokens[:, class_id], timm_state["cls_token"][:, 0])
        assert torch.equal(model.class_position[:, class_id], timm_state["pos_embed"][:, 0])
    assert torch.equal(model.patch_position, timm_state["pos_embed"][:, 1:])
    with torch.no_grad():
        sc_cam = model(pixels(1, 3, 64, 64)).sc_cam
    torch.testing.assert_close(sc_cam[:, 0], sc_cam[:, 2])  # only the loss can tell them apart


def test_class_token_noise_tells_classes_apart_by_its_share_of_the_tokens_spread(timm_state: State):
    many = dict(enumerate(map(str, range(200))))
    exact = from_timm_tiny(timm_state, id2label=many)
    noisy = from_timm_tiny(timm_state, id2label=many, class_token_noise=0.5)
    shift = noisy.class_tokens - exact.class_tokens
    assert shift.std().item() == pytest.approx(0.5 * timm_state["cls_token"].std().item(), rel=0.05)
    assert shift.mean(1).abs().max().item() < 0.3 * shift.std().item()
    assert torch.equal(noisy.class_position, exact.class_position)
    assert_equal_weights(from_timm_tiny(timm_state, id2label=many, class_token_noise=0.5), noisy)
    other = from_timm_tiny(timm_state, id2label=many, class_token_noise=0.5, seed=1)
    assert not torch.equal(other.class_tokens, noisy.class_tokens)


def test_building_a_model_leaves_the_global_random_state_alone(timm_state: State):
    before = torch.random.get_rng_state()
    first = from_timm_tiny(timm_state)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(1)
    assert_equal_weights(from_timm_tiny(timm_state), first)  # the new head too


@pytest.mark.parametrize("image_size", [32, 96])
def test_the_position_grid_is_resized_to_another_training_size(timm_state: State, image_size: int):
    model = from_timm_tiny(timm_state, image_size=image_size)
    side = image_size // 16
    grid = timm_state["pos_embed"][:, 1:].reshape(1, 4, 4, 48)
    expected = F.interpolate(grid.permute(0, 3, 1, 2), size=(side, side), mode="bicubic", align_corners=False)
    torch.testing.assert_close(model.patch_position, expected.permute(0, 2, 3, 1).reshape(1, side * side, 48))
    with torch.no_grad():
        assert model(pixels(1, 3, image_size, image_size)).sc_cam.shape == (1, 3, side, side)


def test_other_fields_of_the_config_are_free(timm_state: State):
    config = from_timm_tiny(timm_state, view="rot90", num_seed_layers=1, pac_weight=0.5).config
    assert (config.view, config.num_seed_layers, config.pac_weight) == ("rot90", 1, 0.5)


def test_the_state_dict_that_was_given_is_not_changed(timm_state: State):
    before = {name: value.clone() for name, value in timm_state.items()}
    from_timm_tiny(timm_state, class_token_noise=0.5)
    assert timm_state.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in timm_state.items())


def test_training_the_model_does_not_reach_the_state_dict_it_came_from(timm_state: State):
    model = from_timm_tiny(timm_state)
    before = timm_state["blocks.0.norm1.weight"].clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert torch.equal(timm_state["blocks.0.norm1.weight"], before)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_files_load_as_their_state_dict_does(timm_state: State, tmp_path: Path, suffix: str):
    path = tmp_path / f"deit{suffix}"
    if suffix == ".pth":  # as the DeiT and MCTformer scripts write it
        torch.save({"model": timm_state, "epoch": 3, "args": argparse.Namespace(lr=1e-4, model="deit")}, path)
    else:
        save_file(timm_state, path)
    assert_equal_weights(from_timm_tiny(path), from_timm_tiny(timm_state))
    assert_equal_weights(from_timm_tiny(str(path)), from_timm_tiny(timm_state))


class Trap:
    """Unpickling this runs a shell command."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("loader", [from_timm_state_dict, from_mctformer])
def test_a_file_that_would_run_code_is_refused(timm_state: State, tmp_path: Path, loader: Any):
    torch.save({"model": timm_state, "args": Trap(f"touch {tmp_path / 'owned'}")}, tmp_path / "trap.pth")
    with pytest.raises(pickle.UnpicklingError, match=r"[Ww]eights.only"):
        loader(tmp_path / "trap.pth", id2label=CLASSES)
    assert not (tmp_path / "owned").exists()


def test_the_real_deit_tiny_gives_timms_features(shared_data: Path):
    state = load_file(shared_data / DEIT_TINY)
    model = from_timm_state_dict(shared_data / DEIT_TINY, id2label={0: "thing"}).eval()
    assert (model.config.hidden_size, model.config.num_attention_heads, model.config.image_size) == (192, 3, 224)
    timm_model = timm.create_model("deit_tiny_patch16_224", pretrained=False).eval()
    timm_model.load_state_dict(state)
    timm_model.norm = torch.nn.Identity()
    images = pixels(1, 3, 224, 224)
    with torch.no_grad():
        expected = timm_model.forward_features(images)
        torch.testing.assert_close(model(images).last_hidden_state, expected, atol=1e-4, rtol=1e-4)


def test_a_timm_model_by_name_is_the_same_as_its_state_dict(shared_data: Path, monkeypatch: pytest.MonkeyPatch):
    create_model = timm.create_model

    def from_disk(name: str, **options: Any) -> torch.nn.Module:
        return create_model(name, pretrained_cfg_overlay={"file": str(shared_data / DEIT_TINY)}, **options)

    monkeypatch.setattr(timm, "create_model", from_disk)
    model = from_timm("deit_tiny_patch16_224.fb_in1k", id2label=CLASSES, view="vflip", class_token_noise=0.5)
    assert (model.config.num_attention_heads, model.config.view) == (3, "vflip")
    expected = from_timm_state_dict(shared_data / DEIT_TINY, id2label=CLASSES, class_token_noise=0.5)
    assert_equal_weights(model, expected)


def test_an_unknown_timm_name_is_named():
    with pytest.raises(ValueError, match="timm has no pretrained model 'deit_minute'; name one such as"):
        from_timm("deit_minute", id2label=CLASSES)


def test_timm_weights_out_of_reach_are_told_with_a_way_out():
    with pytest.raises(OSError, match=r"could not get the weights of 'deit_base_patch16_384\.fb_in1k'.*safetensors"):
        from_timm("deit_base_patch16_384.fb_in1k", id2label=CLASSES)


# ---- MCTformer.


@pytest.mark.parametrize("plus", [False, True])
def test_an_mctformer_checkpoint_comes_back_as_the_model_it_was(plus: bool, tmp_path: Path):
    model = tiny_model()
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": mctformer_state(model, plus), "args": argparse.Namespace(batch_size=64)}, path)
    back = from_mctformer(path, id2label=CLASSES, num_attention_heads=3, num_seed_layers=2).eval()
    assert_equal_weights(back, model)
    with torch.no_grad():
        ours, theirs = back(pixels(1, 3, 32, 40)), model(pixels(1, 3, 32, 40))
    assert torch.equal(ours.pseudo_mask, theirs.pseudo_mask)


# ---- Bad input.


def without(state: State, *names: str) -> State:
    return {name: value for name, value in state.items() if name not in names}


def test_a_missing_file_is_named(tmp_path: Path):
    for loader in (from_timm_state_dict, from_mctformer):
        with pytest.raises(FileNotFoundError, match=r"no weights file at .*absent\.pth; expected a \.safetensors or"):
            loader(tmp_path / "absent.pth", id2label=CLASSES)


def test_weights_that_are_no_vision_transformer_are_refused(timm_state: State):
    with pytest.raises(ValueError, match="no 'cls_token'; expected a vision transformer"):
        from_timm_tiny({"conv1.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match="no 'pos_embed'; expected a vision transformer"):
        from_timm_tiny(without(timm_state, "pos_embed"))
    with pytest.raises(ValueError, match=r"hold 'blocks\.0\.ls1\.gamma', which the model has no place for"):
        from_timm_tiny({**timm_state, "blocks.0.ls1.gamma": torch.ones(48)})


def test_incomplete_weights_are_told_by_what_they_lack(timm_state: State):
    lacking = without(timm_state, "blocks.1.attn.proj.bias", "blocks.2.norm1.weight")
    with pytest.raises(ValueError, match=r"lack 2 tensors, first 'layers\.1\.attention\.proj\.bias'"):
        from_timm_tiny(lacking)
    with pytest.raises(ValueError, match=r"lack 2 tensors, first 'seg_head\.weight'"):
        from_mctformer(without(mctformer_state(tiny_model()), "head.weight", "head.bias"), id2label=CLASSES)


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(timm_state: State):
    wrong = {**timm_state, "blocks.1.norm1.bias": torch.zeros(7)}
    with pytest.raises(ValueError, match=r"layers.1.norm1.bias has shape \(7,\) in the weights, expected \(48,\)"):
        from_timm_tiny(wrong)


def test_a_size_that_the_weights_fix_cannot_be_given_another_value(timm_state: State):
    with pytest.raises(ValueError, match="hidden_size is 48 in the weights, got 96; leave it out"):
        from_timm_tiny(timm_state, hidden_size=96)
    assert from_timm_tiny(timm_state, hidden_size=48).config.hidden_size == 48


def test_each_loader_knows_the_others_weights(timm_state: State):
    state = mctformer_state(tiny_model())
    with pytest.raises(ValueError, match="expected one class token, got 3; use from_mctformer"):
        from_timm_state_dict(state, id2label=CLASSES)
    with pytest.raises(ValueError, match="the checkpoint has 3 classes, id2label names 2"):
        from_mctformer(state, id2label={0: "cat", 1: "dog"})
