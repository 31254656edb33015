from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_resnet38 as reference
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save, save_file
from tiny_models import CLASSES, pixels, tiny_model

from bitrans_hf import (
    AffinityNetConfig,
    AffinityNetModel,
    BiTransImageProcessor,
    BiTransModel,
    DeepLabConfig,
    DeepLabForSemanticSegmentation,
)
from bitrans_hf.checkpoints import read_mxnet_params
from bitrans_hf.hub.errors import InputError, MissingFileError
from bitrans_hf.hub.pipeline_bitrans import PseudoMaskPipeline
from bitrans_hf.hub.weight_files import WeightFileError, load_trained
from bitrans_hf.weights import (
    affinitynet_from_psa,
    deeplab_from_mctformer,
    from_mctformer,
    from_timm,
    from_timm_state_dict,
    load_backbone,
)

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
    with pytest.raises(WeightFileError, match=r"trap\.pth holds more than tensors \(\w+\.system\)"):
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
    words = r"could not get the weights of 'deit_base_patch16_384\.fb_in1k': HF_HUB_OFFLINE is set.*a \.safetensors or"
    with pytest.raises(MissingFileError, match=words):
        from_timm("deit_base_patch16_384.fb_in1k", id2label=CLASSES)


# ---- What trainers leave.


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


# What is found is `state`; `other` is another network of the same shapes, which must not be taken.
WRAPPERS: dict[str, Any] = {
    "module.": lambda state, other: prefixed("module.", state),
    "_orig_mod.": lambda state, other: prefixed("_orig_mod.module.", state),
    "backbone. beside a head": lambda state, other: {
        **prefixed("model.backbone.", state),
        "model.fc.bias": torch.ones(2),
    },
    "encoder. within state_dict": lambda state, other: {"state_dict": prefixed("net.encoder.", state), "epoch": 3},
    "a name nobody knows": lambda state, other: {"result": [{"weights": prefixed("visual_tower.", state)}]},
    "model and optimizer": lambda state, other: {
        "model": state,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
        "args": argparse.Namespace(lr=0.1),
        "best": np.float64(0.5),
        "losses": [np.float32(1), np.int64(2)],
    },
    "model_ema": lambda state, other: {"model": other, "model_ema": state},
    "state_dict_ema": lambda state, other: {"state_dict_ema": prefixed("module.", state), "state_dict": other},
    "teacher and student": lambda state, other: {
        "student": prefixed("module.backbone.", other),
        "teacher": prefixed("backbone.", state),
    },
    "the same twice": lambda state, other: {"encoder": state, "trainer": prefixed("encoder.", state)},
    "parameters": lambda state, other: {name: torch.nn.Parameter(value) for name, value in state.items()},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_network_is_found_in_whatever_a_trainer_wrapped_it(wrapper: str, timm_state: State, tmp_path: Path):
    other = {name: value + 1 for name, value in timm_state.items()}
    wrapped = WRAPPERS[wrapper](timm_state, other)
    expected = from_timm_tiny(timm_state)
    torch.save(wrapped, tmp_path / "checkpoint.pth")
    assert_equal_weights(from_timm_tiny(tmp_path / "checkpoint.pth"), expected)
    assert_equal_weights(from_timm_tiny(wrapped), expected)


@pytest.mark.parametrize("wrapper", ["module.", "model and optimizer", "encoder. within state_dict", "model_ema"])
def test_every_loader_finds_its_network(wrapper: str):
    wrap = WRAPPERS[wrapper]
    mctformer = mctformer_state(tiny_model())
    found = from_mctformer(wrap(mctformer, {}), id2label=CLASSES, num_attention_heads=3)
    assert torch.equal(found.seg_head.weight, mctformer["head.weight"])
    psa = reference.state(more=reference.affinity_shapes())
    trunk = affinitynet_from_psa(wrap(psa, {})).backbone.network
    assert torch.equal(trunk.b7.conv_branch1.weight, psa["b7.conv_branch1.weight"])
    segmentation = reference.state(more=reference.segmentation_shapes(4))
    assert torch.equal(
        deeplab_from_mctformer(wrap(segmentation, {})).head.fc8_seg_conv2.weight, segmentation["fc8_seg_conv2.weight"]
    )
    donor = timm.create_model("test_resnet", pretrained=False, num_classes=7)
    model = AffinityNetModel(AffinityNetConfig(backbone="test_resnet"))
    load_backbone(model, wrap(dict(donor.state_dict()), {}))
    ours = model.backbone.network._backbone.state_dict()
    assert all(torch.equal(value, donor.state_dict()[name]) for name, value in ours.items())


def test_two_networks_between_which_nothing_decides_are_named(timm_state: State):
    other = {name: value + 1 for name, value in timm_state.items()}
    with pytest.raises(InputError, match=r"the weights holds 2 networks, 'encoder_k\.' and 'encoder_q\.'; save the"):
        from_timm_tiny({**prefixed("encoder_q.", timm_state), **prefixed("encoder_k.", other)})


@pytest.mark.parametrize(
    ("content", "suffix"), [("safetensors", ".pth"), ("torch", ".safetensors"), ("torch", ".bin")]
)
def test_the_content_of_a_file_decides_not_its_name(content: str, suffix: str, timm_state: State, tmp_path: Path):
    path = tmp_path / f"deit{suffix}"
    if content == "torch":
        torch.save({"model": timm_state}, path)
    else:
        save_file(timm_state, path)
    assert_equal_weights(from_timm_tiny(path), from_timm_tiny(timm_state))


def zip_of(state: State) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def pickle_of(state: State) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def archive_of(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, b"x")
    return buffer.getvalue()


SMALL = {"a": torch.arange(400.0)}
NO_WEIGHTS = {
    "empty": (b"", "is empty; download or copy it again"),
    "cut zip": (zip_of(SMALL)[:-300], "is cut short or damaged"),
    "cut old file": (pickle_of(SMALL)[:-300], "is cut short or damaged"),
    "old file, cut early": (pickle_of(SMALL)[:60], "is cut short or damaged"),
    "cut safetensors": (save(SMALL)[:-4], "is cut short or damaged: 1,672 bytes were expected, 1,668"),
    "safetensors, cut in its header": (save(SMALL)[:20], "is cut short or damaged"),
    "safetensors with more": (save(SMALL) + b"more", "is cut short or damaged: 1,672 bytes were expected, 1,676"),
    "safetensors, header damaged": (save(SMALL).replace(b'"dtype"', b'"dtype ', 1), "its header cannot be read"),
    "git-lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        "a pointer of git-lfs.*lfs pull",
    ),
    "web page": (b"\n<!DOCTYPE html><html>Sign in</html>", "is a web page, not the weights; download the file"),
    "plain pickle": (pickle.dumps({"a": 1}, protocol=4), "is a plain pickle, which may run code"),
    "gzip": (gzip.compress(b"weights"), "packed by gzip; unpack it"),
    "archive": (archive_of("weights.pth"), r"is a zip archive of weights\.pth, not weights"),
    "TorchScript": (
        archive_of("model/constants.pkl"),
        "is a TorchScript program; save its weights alone",
    ),
    "text": (b"epoch,loss\n1,2\n", "is no file of weights: it starts with b'epoch,loss"),
    "no tensors": (zip_of([1, 2]), "holds no tensors; expected the state dict"),
    "another network": (zip_of(SMALL), "lacks 'cls_token'; expected a vision transformer in timm's names.*, found a"),
}


@pytest.mark.parametrize("fault", NO_WEIGHTS)
def test_a_file_that_holds_no_weights_is_told_by_name(fault: str, tmp_path: Path):
    content, words = NO_WEIGHTS[fault]
    for name in ("weights.pth", "weights.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=words) as caught:
            from_timm_tiny(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_a_whole_pickled_module_is_refused_with_what_to_save_instead(tmp_path: Path):
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Flatten()), tmp_path / "whole.pth")
    words = r"whole\.pth holds more than tensors \(torch\.nn\.modules\.container\.Sequential\).*model\.state_dict\(\)"
    with pytest.raises(WeightFileError, match=words):
        from_timm_tiny(tmp_path / "whole.pth")


def test_a_folder_in_place_of_a_file_is_told_with_what_it_holds(timm_state: State, tmp_path: Path):
    save_file(timm_state, tmp_path / "model.safetensors")
    with pytest.raises(MissingFileError, match=r"is a folder, expected a file.*holds \['model\.safetensors'\]"):
        from_timm_tiny(tmp_path)


def test_a_fault_that_is_not_of_the_network_is_not_told_as_one(monkeypatch: pytest.MonkeyPatch):
    model = DeepLabForSemanticSegmentation(DeepLabConfig(backbone="test_resnet", num_labels=3))
    model.config.output_stride = 5
    with pytest.raises((AssertionError, ValueError)):
        load_backbone(model, timm.create_model("test_resnet", pretrained=False).state_dict())

    def broken(name: str, **options: Any) -> None:
        raise KeyError("our own bug")

    monkeypatch.setattr(timm, "create_model", broken)
    with pytest.raises(KeyError, match="our own bug"):
        from_timm("deit_tiny_patch16_224.fb_in1k", id2label=CLASSES)


# ---- Folders of whole models.


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "model")
    BiTransImageProcessor().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_trained_folder_opens_as_the_model_it_was(model_folder: Path):
    assert_equal_weights(load_trained(BiTransModel, model_folder), tiny_model())


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def deepened(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 9}))


def widened(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "id2label": {str(i): str(i) for i in range(7)}}))


FOLDERS: dict[str, Any] = {
    "without weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        r"has no model\.safetensors, so",
    ),
    "cut weights": (cut, r"model\.safetensors is cut short or damaged"),
    "empty weights": (lambda folder: (folder / "model.safetensors").write_bytes(b""), r"model\.safetensors is empty"),
    "a pointer of git-lfs": (
        lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        r"model\.safetensors is a pointer of git-lfs",
    ),
    "weights of another network": (
        lambda folder: save_file({"fc.weight": torch.ones(2)}, folder / "model.safetensors"),
        r"the weights in .*model are not those of its config\.json",
    ),
    "a config with more layers": (deepened, "are not those of its config.json: .* are missing, first 'layers"),
    "a config with more classes": (widened, "are not those of its config.json: .* are mismatched, first 'class_"),
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        r"model has no config\.json, so it is no folder of a trained",
    ),
    "a broken config": (lambda folder: (folder / "config.json").write_text("{"), "no model at .*model"),
    "another kind of model": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "vit"}'),
        "holds a model of the kind 'vit', expected 'bitrans'",
    ),
    "no image processor": (lambda folder: (folder / "preprocessor_config.json").unlink(), "lacks its image processor"),
}


@pytest.mark.parametrize("fault", FOLDERS)
def test_a_folder_that_is_no_whole_model_is_told_in_one_sentence(fault: str, model_folder: Path):
    spoil, words = FOLDERS[fault]
    spoil(model_folder)
    with pytest.raises(InputError, match=words) as caught:
        PseudoMaskPipeline.from_pretrained(model_folder, "cpu")
    assert "\n" not in str(caught.value)


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
    with pytest.raises(ValueError, match=r"lacks 'cls_token'; expected a vision transformer.*found conv1\.weight\."):
        from_timm_tiny({"conv1.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match="lacks 'pos_embed'; expected a vision transformer"):
        from_timm_tiny(without(timm_state, "pos_embed"))
    with pytest.raises(ValueError, match=r"holds 'blocks\.0\.ls1\.gamma', which the model has no place for"):
        from_timm_tiny({**timm_state, "blocks.0.ls1.gamma": torch.ones(48)})


def test_incomplete_weights_are_told_by_what_they_lack(timm_state: State):
    lacking = without(timm_state, "blocks.1.attn.proj.bias", "blocks.2.norm1.weight")
    with pytest.raises(ValueError, match=r"lacks 2 tensors, first 'layers\.1\.attention\.proj\.bias'"):
        from_timm_tiny(lacking)
    with pytest.raises(ValueError, match=r"lacks 2 tensors, first 'seg_head\.weight'"):
        from_mctformer(without(mctformer_state(tiny_model()), "head.weight", "head.bias"), id2label=CLASSES)


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(timm_state: State):
    wrong = {**timm_state, "blocks.1.norm1.bias": torch.zeros(7)}
    with pytest.raises(ValueError, match=r"layers.1.norm1.bias has shape \(7,\), expected \(48,\)"):
        from_timm_tiny(wrong)


def test_a_size_that_the_weights_fix_cannot_be_given_another_value(timm_state: State):
    with pytest.raises(ValueError, match="hidden_size is 48 in the weights, got 96; leave it out"):
        from_timm_tiny(timm_state, hidden_size=96)
    assert from_timm_tiny(timm_state, hidden_size=48).config.hidden_size == 48


def test_each_loader_knows_the_others_weights(timm_state: State):
    state = mctformer_state(tiny_model())
    with pytest.raises(ValueError, match="expected one class token, got 3; use from_mctformer"):
        from_timm_state_dict(state, id2label=CLASSES)
    with pytest.raises(ValueError, match="the weights: 3 classes, id2label names 2"):
        from_mctformer(state, id2label={0: "cat", 1: "dog"})


# ---- ResNet38 networks: PSA's, MCTformer's and MXNet's names.

NARROW = {"width_multiplier": 1 / 32}


def narrow_deeplab() -> DeepLabForSemanticSegmentation:
    return DeepLabForSemanticSegmentation(DeepLabConfig(num_labels=4, backbone_config=NARROW)).eval()


def saved(state: State, path: Path, form: str) -> Path:
    """Write a state dict as the public scripts did, or do."""
    if form == "safetensors":
        save_file(state, path)
    elif form == "data parallel":
        torch.save({f"module.{name}": value for name, value in state.items()}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    return path


@pytest.mark.parametrize("form", ["zip", "before torch 1.6", "data parallel", "safetensors"])
def test_a_checkpoint_of_psas_affinitynet_gives_its_features(form: str, tmp_path: Path):
    state = reference.state(more=reference.affinity_shapes())
    path = saved(state, tmp_path / ("aff.safetensors" if form == "safetensors" else "aff.pth"), form)
    model = affinitynet_from_psa(path, radius=4).eval()
    assert (model.config.backbone, model.config.backbone_config, model.config.radius) == ("resnet38", NARROW, 4)
    images = pixels(1, 3, 64, 72)
    with torch.no_grad():
        expected = reference.affinity_features(state, images)
        torch.testing.assert_close(model(images).features, expected, atol=1e-5, rtol=1e-4)


def test_a_checkpoint_of_mctformers_segmentation_network_gives_its_logits(tmp_path: Path):
    state = reference.state(more=reference.segmentation_shapes(21))
    # Later versions of torch count batches; the count is read as well.
    state["bn7.num_batches_tracked"] = torch.tensor(7)
    model = deeplab_from_mctformer(saved(state, tmp_path / "model_29.pth", "zip")).eval()
    assert model.config.id2label[20] == "tvmonitor"
    assert model.backbone.network.bn7.num_batches_tracked == 7
    images = pixels(1, 3, 64, 71)
    with torch.no_grad():
        expected = reference.segmentation_logits(state, images)
        torch.testing.assert_close(model(images).logits, expected, atol=1e-4, rtol=1e-4)
    named = deeplab_from_mctformer(state, id2label={0: "background", **dict.fromkeys(range(1, 21), "thing")})
    assert named.config.id2label[20] == "thing"


@pytest.mark.parametrize("network", ["classifier", "affinitynet", "segmentation"])
def test_the_trunk_of_any_public_checkpoint_becomes_a_backbone(network: str):
    more = {
        "classifier": {"fc8.weight": (20, 128, 1, 1)},  # res38_cls.pth
        "affinitynet": reference.affinity_shapes(),
        "segmentation": reference.segmentation_shapes(21),
    }[network]
    state = reference.state(more=more)
    model, images = narrow_deeplab(), pixels(1, 3, 40, 48)
    head = {name: value.clone() for name, value in model.head.state_dict().items()}
    load_backbone(model, state)
    with torch.no_grad():
        torch.testing.assert_close(
            model.backbone(images)[0], reference.trunk(state, images)["conv6"], atol=1e-5, rtol=1e-4
        )
    assert all(torch.equal(value, head[name]) for name, value in model.head.state_dict().items())


# MXNet's type numbers (mshadow/base.h).
MXNET_TYPES = {"float32": 0, "float64": 1, "float16": 2, "uint8": 3, "int32": 4, "int8": 5, "int64": 6}


def mxnet_bytes(arrays: dict[str, np.ndarray], version: int) -> bytes:
    """A list of arrays as MXNet's `NDArray::Save` writes it; `version` 0 is the form before V1."""
    chunks = [struct.pack("<QQQ", 0x112, 0, len(arrays))]
    for array in arrays.values():
        if version == 0:
            chunks.append(struct.pack(f"<I{array.ndim}I", array.ndim, *array.shape))
        else:
            chunks.append(struct.pack("<I", {1: 0xF993FAC8, 2: 0xF993FAC9, 3: 0xF993FACA}[version]))
            if version > 1:
                chunks.append(struct.pack("<i", 0))  # dense
            chunks.append(struct.pack(f"<I{array.ndim}q", array.ndim, *array.shape))
        chunks.append(struct.pack("<iii", 2, 0, MXNET_TYPES[array.dtype.name]))  # GPU 0
        chunks.append(array.tobytes())
    chunks.append(struct.pack("<Q", len(arrays)))
    for name in arrays:
        chunks.append(struct.pack("<Q", len(name)) + name.encode())
    return b"".join(chunks)


def mxnet_arrays(state: State) -> dict[str, np.ndarray]:
    """The trunk under the names of `ilsvrc-cls_rna-a1_cls1000_ep-0001.params`, with ImageNet's classifier."""
    parts = {"weight": ("arg", "gamma"), "bias": ("arg", "beta"), "running_mean": ("aux", "moving_mean")}
    parts["running_var"] = ("aux", "moving_var")
    arrays = {"arg:linear1000_weight": np.ones((10, 128), np.float32), "arg:linear1000_bias": np.ones(10, np.float32)}
    for name, value in state.items():
        layer, part = name.rsplit(".", 1)
        kind, mxnet_part = parts[part]
        if layer == "conv1a":
            key = "arg:conv1a_weight"
        elif layer == "bn7":
            key = f"{kind}:bn7_{mxnet_part}"
        else:
            block, branch = layer.split(".")
            stage, _, number = block[1:].partition("_")
            place = f"{stage}b{number}" if number else f"{stage}a"
            if branch.startswith("conv"):
                key = f"arg:res{place}_{branch.removeprefix('conv_')}_weight"
            else:
                key = f"{kind}:bn{place}_{branch.removeprefix('bn_')}_{mxnet_part}"
        arrays[key] = value.numpy()
    return arrays


@pytest.mark.parametrize("version", [0, 1, 2, 3])
def test_arrays_of_every_version_of_mxnets_format_are_read(version: int, tmp_path: Path):
    rng = np.random.default_rng(0)
    arrays = {
        f"arg:{dtype}_{len(shape)}": (rng.normal(size=shape) * 50).astype(dtype)
        for dtype in MXNET_TYPES
        for shape in [(3,), (2, 5), (4, 3, 2, 2)]
    }
    (tmp_path / "net.params").write_bytes(mxnet_bytes(arrays, version))
    tensors = read_mxnet_params(tmp_path / "net.params")
    assert list(tensors) == list(arrays)
    for name, array in arrays.items():
        assert np.array_equal(tensors[name].numpy(), array)
        assert tensors[name].numpy().dtype == array.dtype


def test_mxnets_imagenet_weights_become_a_backbone(tmp_path: Path):
    state = reference.state(seed=1)
    path = tmp_path / "ilsvrc-cls_rna-a1_cls1000_ep-0001.params"
    path.write_bytes(mxnet_bytes(mxnet_arrays(state), version=0))
    assert {"arg:res2a_branch1_weight", "arg:res4b5_branch2b1_weight", "aux:bn6a_branch2b2_moving_var"} <= set(
        read_mxnet_params(path)
    )
    model, images = AffinityNetModel(AffinityNetConfig(backbone_config=NARROW)).eval(), pixels(1, 3, 40, 48)
    load_backbone(model, path)
    with torch.no_grad():
        expected = reference.trunk(state, images)
        for ours, name in zip(model.backbone(images), ("conv4", "conv5", "conv6"), strict=True):
            torch.testing.assert_close(ours, expected[name], atol=1e-5, rtol=1e-4)
    path.unlink()  # nothing reads the file any more
    assert model.backbone.network.conv1a.weight.sum().isfinite()


GOOD = mxnet_bytes({"arg:a_weight": np.ones((2, 3), np.float32)}, version=2)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", r"bad\.params ends early: 8 bytes are missing after byte 0, 0 are left"),
        (GOOD[:60], r"bad\.params ends early: 4 bytes are missing after byte 60, 0 are left"),
        (GOOD[:-3], "ends early: 12 bytes are missing"),
        (b"PK\x03\x04" + bytes(60), "no list of MXNet arrays: it does not start with 0x112"),
        (GOOD + b"more", "1 arrays, 1 names and 4 bytes more"),
        (GOOD.replace(struct.pack("<Ii", 0xF993FAC9, 0), struct.pack("<Ii", 0xF993FAC9, 1)), "a sparse array"),
        (
            GOOD.replace(struct.pack("<iii", 2, 0, 0), struct.pack("<iii", 2, 0, 99)),
            "MXNet's type 99; expected 0 to 7",
        ),
        (struct.pack("<QQQI", 0x112, 0, 1, 5000), "an array of 5000 dimensions; expected at most 32"),
        (GOOD.replace(struct.pack("<qq", 2, 3), struct.pack("<qq", 2**40, 3)), "ends early"),
    ],
    ids=["empty", "cut", "cut name", "other format", "more", "sparse", "type", "dimensions", "huge"],
)
def test_a_file_that_is_no_list_of_mxnet_arrays_is_told(content: bytes, words: str, tmp_path: Path):
    (tmp_path / "bad.params").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_mxnet_params(tmp_path / "bad.params")


def test_a_timm_backbone_takes_timms_weights(shared_data: Path):
    config = DeepLabConfig(backbone="deit_tiny_patch16_224", num_labels=3, out_indices=[-2])
    model, images = DeepLabForSemanticSegmentation(config).eval(), pixels(1, 3, 224, 224)
    load_backbone(model, shared_data / DEIT_TINY)
    donor = timm.create_model("deit_tiny_patch16_224", pretrained=False).eval()
    donor.load_state_dict(load_file(shared_data / DEIT_TINY))
    with torch.no_grad():
        tokens = donor.forward_intermediates(images, indices=[10], norm=False, intermediates_only=True)[0]
        expected = F.layer_norm(tokens.permute(0, 2, 3, 1), (192,)).permute(0, 3, 1, 2)
        torch.testing.assert_close(model.backbone(images)[0], expected, atol=1e-5, rtol=1e-4)


def test_a_timm_pyramid_takes_timms_weights_with_statistics_and_dilation():
    donor = timm.create_model("test_resnet", pretrained=False, num_classes=7)
    for name, buffer in donor.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 2)
    model = AffinityNetModel(AffinityNetConfig(backbone="test_resnet", output_stride=8))
    load_backbone(model, donor.state_dict())
    ours, theirs = model.backbone.network._backbone.state_dict(), donor.state_dict()
    assert ours.keys() <= theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize(
    ("load", "words"),
    [
        (
            lambda: affinitynet_from_psa({"fc.weight": torch.zeros(1)}),
            "lacks 'conv1a.weight'; expected a network on",
        ),
        (lambda: affinitynet_from_psa(reference.state()), r"lacks 4 tensors, first 'feature_head\.f8_3\.weight'"),
        (
            lambda: affinitynet_from_psa(reference.state(more={"fc8.weight": (20, 128, 1, 1)})),
            r"holds 'fc8\.weight', which a AffinityNetModel has no place for",
        ),
        (lambda: deeplab_from_mctformer(reference.state()), r"lacks 'fc8_seg_conv2\.weight'; expected MCTformer's"),
        (
            lambda: deeplab_from_mctformer(
                reference.state(more=reference.segmentation_shapes(21)), id2label={0: "background", 1: "cat"}
            ),
            "the weights: got 21 labels, id2label names 2",
        ),
        (lambda: load_backbone(narrow_deeplab(), reference.state(width=1 / 16)), r"conv1a\.weight has shape \(4, 3"),
        (lambda: load_backbone(narrow_deeplab(), without(reference.state(), "bn7.bias")), r"first 'bn7\.bias'"),
        (
            lambda: load_backbone(narrow_deeplab(), {**reference.state(), "arg:res9a_branch7_weight": torch.zeros(1)}),
            r"holds 'b9\.conv_branch7\.weight', which ResNet38 has no place for",
        ),
        (lambda: load_backbone(narrow_deeplab()), "backbone 'resnet38' takes no such weights; give a file"),
        (
            lambda: load_backbone(AffinityNetModel.from_bitrans(tiny_model()), reference.state()),
            "backbone 'bitrans' takes no such weights.*from_bitrans",
        ),
        (
            lambda: load_backbone(
                AffinityNetModel(AffinityNetConfig(backbone="test_resnet")), {"conv1.weight": torch.zeros(1)}
            ),
            "the weights do not fit 'test_resnet'",
        ),
    ],
)
def test_weights_of_another_network_are_told(load: Any, words: str):
    with pytest.raises(ValueError, match=words):
        load()


def test_weights_out_of_reach_are_told():
    with pytest.raises(OSError, match=r"could not get the weights of 'test_resnet'.*go online once"):
        load_backbone(AffinityNetModel(AffinityNetConfig(backbone="test_resnet")))
    with pytest.raises(FileNotFoundError, match=r"absent\.params; expected a \.params file of MXNet"):
        read_mxnet_params("absent.params")
    with pytest.raises(MissingFileError, match=r"no weights file at absent\.params"):
        load_backbone(narrow_deeplab(), "absent.params")


def test_a_checkpoint_that_would_run_code_is_refused_by_every_loader(tmp_path: Path):
    torch.save({"conv1a.weight": Trap(f"touch {tmp_path / 'owned'}")}, tmp_path / "trap.pth")
    for load in (affinitynet_from_psa, deeplab_from_mctformer, lambda path: load_backbone(narrow_deeplab(), path)):
        with pytest.raises(WeightFileError, match=r"trap\.pth holds more than tensors \(\w+\.system\)"):
            load(tmp_path / "trap.pth")
    assert not (tmp_path / "owned").exists()
