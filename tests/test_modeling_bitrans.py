from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import set_fused_attn
from timm.utils import AttentionExtract
from tiny_models import CLASSES, picture, pixels, tiny_config, tiny_model
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)

from bitrans_hf import BiTransConfig, BiTransImageProcessor, BiTransModel, BiTransOutput
from bitrans_hf.hub.encoder import RecomputedAttention, attention_with_map, self_similarity
from bitrans_hf.hub.losses import class_consistency_loss
from bitrans_hf.weights import from_timm_state_dict

LABELS = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
TENSORS = (
    "logits", "class_logits", "patch_logits", "sc_cam", "coarse_cam", "pseudo_mask", "affinity", "last_hidden_state",
)  # fmt: skip


def gradients(model: BiTransModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return {name: torch.zeros(()) if grad is None else grad for name, grad in zip(names, found, strict=True)}


def assert_same_gradients(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], **tolerance: float) -> None:
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


# ---- What comes out.


@pytest.mark.parametrize("size", [(32, 32), (40, 24), (37, 45), (8, 8), (33, 64), (32, 35), (8, 80)])
def test_every_image_size_gives_maps_of_its_own_grid(size: tuple[int, int]):
    height, width = size
    h, w = height // 8, width // 8
    with torch.no_grad():
        output = tiny_model()(pixels(2, 3, height, width))
    shapes = {name: tuple(getattr(output, name).shape) for name in TENSORS}
    grid = (2, 3, h, w)
    assert shapes == {
        "logits": (2, 3), "class_logits": (2, 3), "patch_logits": (2, 3), "sc_cam": grid, "coarse_cam": grid,
        "pseudo_mask": grid, "affinity": (2, h * w, h * w), "last_hidden_state": (2, 3 + h * w, 24),
    }  # fmt: skip
    assert all(getattr(output, name).isfinite().all() for name in TENSORS)
    assert output.loss is None
    assert output.losses is None
    assert output.hidden_states is None
    assert output.attentions is None


@pytest.mark.parametrize(("patch_size", "image_size"), [(8, 48), (16, 48), (16, 16), (4, 20)])
def test_patch_and_training_size_are_free(patch_size: int, image_size: int):
    model = tiny_model(patch_size=patch_size, image_size=image_size)
    side = image_size // patch_size
    output = model(pixels(2, 3, image_size, image_size), labels=LABELS)
    assert output.sc_cam.shape == (2, 3, side, side)
    output.loss.backward()
    assert model.patch_position.grad.isfinite().all()


@pytest.mark.parametrize("size", [(32, 32), (37, 45)])
def test_a_row_of_a_batch_is_what_the_image_alone_gives(size: tuple[int, int]):
    model, images = tiny_model(), pixels(3, 3, *size)
    with torch.no_grad():
        together = model(images)
        for index in range(3):
            alone = model(images[index : index + 1])
            for name in TENSORS:
                ours, theirs = getattr(together, name)[index : index + 1], getattr(alone, name)
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_maps_and_logits_follow_from_the_tokens_and_attentions():
    model = tiny_model()
    with torch.no_grad():
        output = model(pixels(2, 3, 24, 40), output_attentions=True, output_hidden_states=True)
    assert [tuple(attention.shape) for attention in output.attentions] == [(2, 18, 18)] * 3
    assert [tuple(state.shape) for state in output.hidden_states] == [(2, 18, 24)] * 4
    attentions = torch.stack(output.attentions)
    torch.testing.assert_close(attentions.sum(-1), torch.ones(3, 2, 18))  # rows are probabilities
    assert attentions.max() > 3 / 18  # and far from uniform: otherwise this test would show nothing
    torch.testing.assert_close(output.affinity, attentions[:, :, 3:, 3:].mean(0))
    torch.testing.assert_close(output.sc_cam, attentions[-2:, :, :3, 3:].mean(0).reshape(2, 3, 3, 5))
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    torch.testing.assert_close(output.class_logits, output.last_hidden_state[:, :3].mean(-1))
    torch.testing.assert_close(output.patch_logits, output.coarse_cam.mean((2, 3)))
    torch.testing.assert_close(output.logits, (output.class_logits + output.patch_logits) / 2)
    torch.testing.assert_close(output.pseudo_mask, output.sc_cam * output.coarse_cam.clamp(min=0))
    assert output.coarse_cam.min() < 0 <= output.pseudo_mask.min()
    assert 0 < output.sc_cam.sum((2, 3)).max() <= 1
    assert output.affinity.sum(-1).max() < 1


def test_the_config_may_ask_for_attentions_and_hidden_states():
    model = tiny_model(output_attentions=True, output_hidden_states=True)
    with torch.no_grad():
        output = model(pixels(1, 3, 32, 32))
        assert (len(output.attentions), len(output.hidden_states)) == (3, 4)
        assert model(pixels(1, 3, 32, 32), output_attentions=False).attentions is None


def test_with_labels_the_fields_speak_of_the_first_view_only():
    model, images = tiny_model(), pixels(2, 3, 32, 32)
    with torch.no_grad():
        plain = model(images, output_attentions=True, output_hidden_states=True)
        trained = model(images, labels=LABELS, output_attentions=True, output_hidden_states=True)
    for name in TENSORS:
        torch.testing.assert_close(getattr(trained, name), getattr(plain, name), atol=1e-5, rtol=1e-4)
    for name in ("attentions", "hidden_states"):
        for ours, theirs in zip(getattr(trained, name), getattr(plain, name), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_return_dict_false_gives_a_plain_tuple_with_the_loss_first():
    model = tiny_model()
    with torch.no_grad():
        as_tuple = model(pixels(2, 3, 32, 32), labels=LABELS, return_dict=False)
        output = model(pixels(2, 3, 32, 32), labels=LABELS)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], output.loss)
    assert torch.equal(as_tuple[1], output.logits)


def test_inputs_come_back_unchanged():
    images, labels = pixels(2, 3, 32, 32), LABELS.clone()
    tiny_model()(images, labels=labels).loss.backward()
    assert torch.equal(images, pixels(2, 3, 32, 32))
    assert torch.equal(labels, LABELS)


# ---- Agreement with timm.


@pytest.fixture
def timm_vit() -> Iterator[timm.models.VisionTransformer]:
    set_fused_attn(False)  # the attention maps are nodes of the graph only then
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(
            "deit_tiny_patch16_224", pretrained=False, img_size=64, embed_dim=48, depth=4, num_heads=3, num_classes=0
        )
        for name, parameter in model.named_parameters():  # at init scale attention is uniform
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    yield model.eval()
    set_fused_attn(True)


def test_with_one_class_the_encoder_is_timms_vision_transformer(timm_vit: timm.models.VisionTransformer):
    model = from_timm_state_dict(timm_vit.state_dict(), id2label={0: "thing"}, num_attention_heads=3).eval()
    images = pixels(2, 3, 64, 64)
    maps = AttentionExtract(timm_vit, method="fx")(images)
    timm_vit.norm = torch.nn.Identity()
    with torch.no_grad():
        output = model(images, output_attentions=True)
        torch.testing.assert_close(output.last_hidden_state, timm_vit.forward_features(images), atol=2e-5, rtol=1e-4)
    assert len(maps) == 4
    for ours, theirs in zip(output.attentions, maps.values(), strict=True):
        torch.testing.assert_close(ours, theirs.mean(1), atol=2e-5, rtol=1e-4)
    assert output.attentions[-1].max() > 0.2


# ---- Attention maps that are computed again in the backward pass.


def attention_inputs(dtype: torch.dtype = torch.float32, length: int = 5) -> list[torch.Tensor]:
    return [pixels(2, 3, length, 4, seed=seed).to(dtype).requires_grad_() for seed in range(3)]


def test_attention_with_map_is_softmax_attention():
    query, key, value = attention_inputs()
    mixed, attention_map = attention_with_map(query, key, value)
    weights = torch.softmax(torch.einsum("bhid,bhjd->bhij", query, key) / 2.0, dim=-1)
    torch.testing.assert_close(mixed, torch.einsum("bhij,bhjd->bhid", weights, value))
    torch.testing.assert_close(attention_map, weights.mean(1))


def test_recomputed_gradients_pass_the_numerical_check():
    inputs = attention_inputs(torch.float64)
    assert torch.autograd.gradcheck(RecomputedAttention.apply, inputs)


@pytest.mark.parametrize("which", [0, 1])
def test_recomputed_gradients_pass_the_numerical_check_through_one_output_alone(which: int):
    inputs = attention_inputs(torch.float64)
    assert torch.autograd.gradcheck(lambda *args: RecomputedAttention.apply(*args)[which], inputs)


@pytest.mark.parametrize("view", ["hflip", "none"])
def test_recomputing_the_maps_changes_neither_outputs_nor_gradients(view: str, monkeypatch: pytest.MonkeyPatch):
    model, images = tiny_model(view=view), pixels(2, 3, 32, 32)
    ours = model(images, labels=LABELS)
    our_gradients = gradients(model, ours.loss)
    keep_all_maps(monkeypatch)
    theirs = model(images, labels=LABELS)
    assert torch.equal(ours.loss, theirs.loss)
    assert torch.equal(ours.affinity, theirs.affinity)
    assert_same_gradients(our_gradients, gradients(model, theirs.loss), atol=1e-5, rtol=1e-4)


def keep_all_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let autograd itself keep what it needs of the attention maps."""
    monkeypatch.setattr(RecomputedAttention, "apply", attention_with_map)


def test_maps_of_single_heads_are_not_kept_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch):
    def kept_bytes() -> int:
        model = tiny_model(view="none", image_size=64, patch_size=4).train()
        storages: dict[int, tuple[torch.UntypedStorage, int]] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = (storage, storage.nbytes())  # held, so that no address is used twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(pixels(2, 3, 64, 64), labels=LABELS)
        return sum(size for _, size in storages.values())

    per_head_maps = 3 * 2 * 3 * 259 * 259 * 4  # layers, images, heads, tokens squared, bytes
    recompute = kept_bytes()
    keep_all_maps(monkeypatch)
    eager = kept_bytes()
    assert eager > per_head_maps
    assert recompute < eager - 0.95 * per_head_maps
    assert recompute < 0.5 * eager


# ---- Training.


@pytest.mark.parametrize("view", ["hflip", "vflip", "rot90", "rot180", "none"])
def test_every_parameter_gets_a_gradient(view: str):
    model = tiny_model(view=view).train()
    model(pixels(2, 3, 32, 32), labels=LABELS).loss.backward()
    without = [name for name, parameter in model.named_parameters() if not parameter.grad.abs().sum() > 0]
    assert not without


@pytest.mark.parametrize("view", ["hflip", "none"])
def test_distributed_training_meets_no_unused_parameter(view: str, tmp_path: Path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = DistributedDataParallel(tiny_model(view=view).train())
        for _ in range(2):  # an unused parameter is noticed at the second step
            model(pixels(2, 3, 32, 32), labels=LABELS).loss.backward()
        del model
        gc.collect()
    finally:
        torch.distributed.destroy_process_group()


def test_gradients_of_the_consistency_losses_reach_the_network_through_both_views():
    model, images = tiny_model(), pixels(2, 3, 32, 32)
    output = model(images, labels=LABELS)
    first, second = model(images).sc_cam, model(images.flip(-1)).sc_cam
    by_hand = class_consistency_loss(first, second.flip(-1))
    torch.testing.assert_close(output.losses["scc"], by_hand, atol=1e-5, rtol=1e-4)
    ours = gradients(model, output.losses["scc"])
    assert_same_gradients(ours, gradients(model, by_hand), atol=1e-4, rtol=1e-3)
    half = gradients(model, class_consistency_loss(first, second.detach().flip(-1)))
    assert not torch.allclose(ours["class_tokens"], half["class_tokens"], atol=1e-4, rtol=1e-3)


def test_stochastic_depth_drops_whole_images_and_keeps_the_mean():
    model = tiny_model(drop_path_rate=0.5)
    assert [layer.drop_path_rate for layer in model.layers] == [0.0, 0.25, 0.5]
    layer, branch = model.layers[2], torch.ones(4000, 2, 3)
    assert torch.equal(layer.drop_path(branch), branch)  # evaluation
    layer.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dropped = layer.drop_path(branch)
    assert set(dropped.flatten().tolist()) == {0.0, 2.0}
    assert torch.equal(dropped.amin((1, 2)), dropped.amax((1, 2)))
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.05)


def test_views_that_share_stochastic_depth_differ_by_nothing_else():
    images, mirrored = pixels(6, 3, 32, 32), pixels(6, 3, 32, 32).flip(-1)
    for share in (False, True):
        model = tiny_model(drop_path_rate=0.5, share_drop_path=share, initializer_range=0.1).train()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            both = model.layers[2](pixels(6, 4, 24).repeat(2, 1, 1), True, 2)[0]
        assert torch.equal(*both.chunk(2)) == share
        assert model(images, labels=LABELS.repeat(3, 1)).loss.isfinite()
        assert model(mirrored).loss is None  # one view of it, in training mode


def test_the_affinity_may_come_from_the_last_layers_alone(tmp_path: Path):
    model, images = tiny_model(initializer_range=0.1), pixels(2, 3, 32, 32)
    model.save_pretrained(tmp_path)
    last_two = BiTransModel.from_pretrained(tmp_path, num_affinity_layers=2)  # chosen when the model is used
    layers = model(images, output_attentions=True).attentions
    rows = [attention[:, 3:, 3:] for attention in layers]
    torch.testing.assert_close(model(images).affinity, sum(rows) / 3)
    torch.testing.assert_close(last_two(images).affinity, (rows[1] + rows[2]) / 2)
    assert torch.equal(last_two(images).sc_cam, model(images).sc_cam)


def test_self_similarity_is_the_softmax_of_the_mean_score_of_patches_with_themselves():
    query, key = pixels(2, 3, 10, 8), pixels(2, 3, 10, 8, seed=1)
    scores = [features @ features.transpose(2, 3) / 8**0.5 for features in (query, key)]
    wanted = torch.softmax(torch.cat(scores, dim=1).mean(dim=1), dim=-1)
    torch.testing.assert_close(self_similarity(query, key), wanted)


@pytest.mark.parametrize("num_layers", [2, 3])
def test_the_affinity_may_come_from_self_similarity_or_from_both(num_layers: int, tmp_path: Path):
    model, images = tiny_model(initializer_range=0.2), pixels(2, 3, 24, 32)
    model.save_pretrained(tmp_path)
    attention, similarity, joint = (
        BiTransModel.from_pretrained(tmp_path, num_affinity_layers=num_layers, affinity_source=source)(images)
        for source in ("attention", "similarity", "joint")
    )
    output = model(images, output_hidden_states=True)
    maps = []
    for layer, tokens in list(zip(model.layers, output.hidden_states, strict=False))[-num_layers:]:
        query, key, _ = layer.attention.qkv(layer.norm1(tokens)).unflatten(2, (3, 3, 8)).permute(2, 0, 3, 1, 4)
        scores = [features @ features.transpose(2, 3) / 8**0.5 for features in (query[:, :, 3:], key[:, :, 3:])]
        maps.append(torch.softmax(torch.cat(scores, dim=1).mean(dim=1), dim=-1))
    assert similarity.affinity.shape == (2, 12, 12)
    torch.testing.assert_close(similarity.affinity, sum(maps) / num_layers)
    rows = attention.affinity / attention.affinity.sum(2, keepdim=True)
    torch.testing.assert_close(joint.affinity, (rows + similarity.affinity) / 2)
    torch.testing.assert_close(joint.affinity.sum(2), torch.ones(2, 12))
    for other in (similarity, joint):
        assert torch.equal(other.sc_cam, attention.sc_cam)
        assert torch.equal(other.logits, attention.logits)


def test_self_similarity_trains_too():
    model = tiny_model(affinity_source="joint", num_affinity_layers=2)
    losses = model(pixels(2, 3, 32, 32), labels=LABELS).losses
    losses["pac"].backward()
    gradients = [layer.attention.qkv.weight.grad for layer in model.layers[1:]]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


def test_ranked_pooling_weighs_patches_by_their_rank():
    model = tiny_model(patch_pooling="ranked")
    output = model(pixels(2, 3, 24, 32))
    for image in range(2):
        for class_id in range(3):
            scores = sorted(output.coarse_cam[image, class_id].flatten().tolist(), reverse=True)
            weights = [0.996**rank for rank in range(12)]
            wanted = sum(score * weight for score, weight in zip(scores, weights, strict=True)) / sum(weights)
            assert output.patch_logits[image, class_id].item() == pytest.approx(wanted, abs=1e-6)


def test_without_a_patch_loss_the_tags_are_the_class_tokens():
    model, images = tiny_model(patch_weight=0.0), pixels(2, 3, 32, 32)
    output = model(images, labels=LABELS)
    assert torch.equal(output.logits, output.class_logits)
    grads = gradients(model, output.loss)
    assert grads["seg_head.weight"].abs().max() == 0
    assert grads["class_tokens"].abs().max() > 0


def test_the_final_layer_norm_is_applied_to_what_both_branches_read(tmp_path: Path):
    plain, model = tiny_model(), tiny_model(final_layer_norm=True)
    model.load_state_dict(plain.state_dict(), strict=False)
    raw, normed = (each(pixels(2, 3, 32, 32)).last_hidden_state for each in (plain, model))
    torch.testing.assert_close(torch.nn.functional.layer_norm(raw, raw.shape[-1:], eps=1e-6), normed)
    model.save_pretrained(tmp_path)
    assert torch.equal(BiTransModel.from_pretrained(tmp_path)(pixels(2, 3, 32, 32)).last_hidden_state, normed)
    network = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=12, depth=2, num_heads=3, num_classes=0
    )
    torch.nn.init.normal_(network.norm.weight)
    options = {"id2label": {0: "cat", 1: "dog"}, "num_attention_heads": 3, "num_seed_layers": 1}
    loaded = from_timm_state_dict(network.state_dict(), final_layer_norm=True, **options)
    assert torch.equal(loaded.norm.weight, network.norm.weight)
    assert from_timm_state_dict(network.state_dict(), **options).norm is None


@pytest.mark.parametrize("kwargs", [{}, {"gradient_checkpointing_kwargs": {"use_reentrant": True}}])
def test_activation_checkpointing_changes_neither_loss_nor_gradients(kwargs: dict[str, Any]):
    plain, checkpointed = (tiny_model().train() for _ in range(2))
    # Under its older name where transformers does not know the new one.
    word = "activation" if hasattr(checkpointed, "activation_checkpointing_enable") else "gradient"
    getattr(checkpointed, f"{word}_checkpointing_enable")(*kwargs.values())
    assert getattr(checkpointed, f"is_{word}_checkpointing")
    images = pixels(2, 3, 32, 32)
    for model in (plain, checkpointed):
        model(images, labels=LABELS).loss.backward()
    for (name, ours), theirs in zip(checkpointed.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=0, rtol=0, msg=name)


def test_bfloat16_trains_with_maps_in_float32():
    exact = tiny_model(initializer_range=0.1)
    model = tiny_model(initializer_range=0.1).to(torch.bfloat16).train()
    images = pixels(2, 3, 32, 32)
    output = model(images, labels=LABELS)
    assert {output.sc_cam.dtype, output.affinity.dtype, output.coarse_cam.dtype, output.loss.dtype} == {torch.float32}
    assert output.last_hidden_state.dtype == torch.bfloat16
    reference = exact(images, labels=LABELS)
    torch.testing.assert_close(output.loss, reference.loss, atol=0.02, rtol=0.02)
    torch.testing.assert_close(output.affinity, reference.affinity, atol=5e-3, rtol=0.1)
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_autocast_stays_close_to_full_precision():
    model, images = tiny_model(initializer_range=0.1).train(), pixels(2, 3, 32, 32)
    reference = model(images, labels=LABELS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(images, labels=LABELS)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, reference.loss, atol=0.02, rtol=0.02)
    ours, theirs = gradients(model, output.loss), gradients(model, reference.loss)
    for name, grad in theirs.items():
        assert ours[name].dtype == torch.float32
        assert (ours[name] - grad).norm() < 0.1 * grad.norm() + 1e-3, name


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch 2.6's own tracing
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
def test_torch_compile_takes_the_whole_training_step_as_one_graph():
    check_compiled("aot_eager")


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
@pytest.mark.slow
def test_torch_compile_with_inductor_agrees_with_eager():
    check_compiled("inductor")


def check_compiled(backend: str) -> None:
    torch._dynamo.reset()
    model, images = tiny_model(num_hidden_layers=2).train(), pixels(2, 3, 32, 32)
    compiled: Callable[..., BiTransOutput] = torch.compile(model, fullgraph=True, backend=backend)
    ours, theirs = compiled(images, labels=LABELS), model(images, labels=LABELS)
    torch.testing.assert_close(ours.loss, theirs.loss, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.pseudo_mask, theirs.pseudo_mask, atol=1e-5, rtol=1e-4)
    expected = gradients(model, theirs.loss)
    ours.loss.backward()
    actual = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_same_gradients(actual, expected, atol=1e-5, rtol=1e-3)
    torch._dynamo.reset()


def test_a_few_steps_of_training_lower_the_loss():
    model, images = tiny_model(initializer_range=0.1).train(), pixels(2, 3, 32, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = model(images, labels=LABELS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# ---- Saving and loading.


def test_a_saved_model_comes_back_bit_identical(tmp_path: Path):
    model, images = tiny_model(view="rot90"), pixels(2, 3, 40, 24)
    model.save_pretrained(tmp_path)
    back = BiTransModel.from_pretrained(tmp_path)
    assert back.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in back.state_dict().items())
    assert not back.training
    with torch.no_grad():
        ours, theirs = back(images), model(images)
    assert all(torch.equal(getattr(ours, name), getattr(theirs, name)) for name in TENSORS)


def test_parameters_that_a_checkpoint_lacks_are_initialised(tmp_path: Path):
    """The model is built on the meta device: what nothing initializes would be whatever memory held."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {"layers.0.mlp.fc1.weight": torch.full_like(weights["layers.0.mlp.fc1.weight"], 7.0)}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    torch.manual_seed(0)  # three biases drawn near 0 would look as if nothing had drawn them
    back = BiTransModel.from_pretrained(tmp_path)
    for name, value in back.named_parameters():
        if name in kept:
            assert torch.equal(value, kept[name])
        elif "norm" in name:
            assert torch.equal(value, torch.full_like(value, float(name.endswith("weight")))), name
        elif name.endswith("bias") and name.startswith("layers"):
            assert torch.equal(value, torch.zeros_like(value)), name
        elif name.startswith(("patch_embed", "seg_head")):  # uniform in +-1 / sqrt(inputs)
            bound = (3 * 8 * 8 if name.startswith("patch_embed") else 24 * 9) ** -0.5
            assert 0.5 * bound < value.abs().max() <= bound, name
        else:  # a normal distribution cut off at 2
            assert 0.2 < value.std() < 0.4, name
            assert value.abs().max() <= 2, name


def test_a_fresh_model_is_initialised_as_the_baseline():
    model = tiny_model(initializer_range=0.02, hidden_size=96)
    for name in ("class_tokens", "class_position", "patch_position"):
        assert getattr(model, name).std().item() == pytest.approx(0.02, rel=0.2), name
    assert model.layers[0].attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not torch.equal(model.class_tokens[0, 0], model.class_tokens[0, 1])


def test_weights_load_in_the_precision_asked_for(tmp_path: Path):
    tiny_model().save_pretrained(tmp_path)
    model = BiTransModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_the_auto_classes_load_it_by_its_folder(tmp_path: Path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    BiTransImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), BiTransConfig)
    assert isinstance(AutoImageProcessor.from_pretrained(tmp_path), BiTransImageProcessor)
    for auto in (AutoModel, AutoModelForImageClassification):
        back = auto.from_pretrained(tmp_path)
        assert isinstance(back, BiTransModel)
        assert torch.equal(back.class_tokens, model.class_tokens)


# ---- In other people's hands: Trainer and pipeline.


class Photos(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": pixels(3, 32, 32, seed=index), "labels": LABELS[index % 2]}


def test_the_stock_trainer_trains_it_and_gathers_only_the_logits(tmp_path: Path):
    model = tiny_model(initializer_range=0.1)
    before = model.class_tokens.detach().clone()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, per_device_eval_batch_size=4,
        learning_rate=1e-3, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Photos(), eval_dataset=Photos())
    trainer.train()
    assert not torch.equal(model.class_tokens, before)
    assert trainer.evaluate()["eval_loss"] > 0
    predictions = trainer.predict(Photos())
    assert predictions.predictions.shape == (6, 3)
    assert predictions.label_ids.shape == (6, 3)
    with torch.no_grad():
        logits = model.eval()(torch.stack([Photos()[index]["pixel_values"] for index in range(6)])).logits
    torch.testing.assert_close(torch.from_numpy(predictions.predictions), logits, atol=1e-5, rtol=1e-4)


def test_the_stock_image_classification_pipeline_tags_pictures():
    model = tiny_model()
    processor = BiTransImageProcessor(size={"height": 32, "width": 32})
    tagger = pipeline("image-classification", model=model, image_processor=processor)
    pictures = [picture(60, 90, seed=0), picture(45, 30, seed=1)]
    for image, tags in zip(pictures, tagger(pictures), strict=True):
        with torch.no_grad():
            logits = model(processor(image, return_tensors="pt").pixel_values).logits[0]
        expected = {CLASSES[class_id]: score for class_id, score in enumerate(logits.sigmoid().tolist())}
        assert {tag["label"]: tag["score"] for tag in tags} == pytest.approx(expected, abs=1e-5)


# ---- Bad input.

WRONG_INPUTS: list[tuple[dict[str, Any], tuple[int, ...], torch.Tensor | None, str]] = [
    ({}, (1, 3, 7, 20), None, r"smaller than a patch: got 7 x 20 pixels \(height x width\), expected at least 8 x 8"),
    ({}, (1, 3, 20, 7), None, r"smaller than a patch: got 20 x 7 pixels"),
    ({}, (3, 32, 32), None, r"pixel_values must be \(B, 3, H, W\), got \(3, 32, 32\)"),
    ({}, (1, 4, 32, 32), None, r"pixel_values must be \(B, 3, H, W\), got \(1, 4, 32, 32\)"),
    ({}, (2, 3, 32, 32), torch.zeros(2, 4), r"labels must be multi-hot of shape \(2, 3\) for 3 classes, got \(2, 4\)"),
    ({}, (2, 3, 32, 32), torch.zeros(1, 3), r"labels must be multi-hot of shape \(2, 3\) for 3 classes, got \(1, 3\)"),
    ({}, (2, 3, 32, 32), torch.tensor([0, 2]), r"labels must be multi-hot of shape \(2, 3\).*got \(2,\)"),
    ({"view": "rot90"}, (2, 3, 32, 40), torch.zeros(2, 3), "'rot90' exchanges height and width.*got 32 x 40"),
]


@pytest.mark.parametrize(("overrides", "shape", "labels", "message"), WRONG_INPUTS)
def test_a_wrong_input_is_named_with_what_was_expected(
    overrides: dict[str, Any], shape: tuple[int, ...], labels: torch.Tensor | None, message: str
):
    with pytest.raises(ValueError, match=message):
        tiny_model(**overrides)(torch.zeros(shape), labels=labels)


def test_a_quarter_turn_view_tags_images_of_any_shape_without_labels():
    with torch.no_grad():
        assert tiny_model(view="rot90")(pixels(1, 3, 24, 40)).sc_cam.shape == (1, 3, 3, 5)


@pytest.mark.parametrize("view", ["hflip", "vflip", "rot180"])
def test_the_other_views_train_on_images_of_any_shape(view: str):
    assert tiny_model(view=view)(pixels(2, 3, 24, 40), labels=LABELS).loss.isfinite()


def test_the_documented_sizes_of_deit_small_are_right():
    with torch.device("meta"):
        model = BiTransModel(BiTransConfig(id2label=dict(enumerate(map(str, range(20))))))
    # The reference counts 21,749,396 with the final LayerNorm (2 x 384) that is never applied.
    assert sum(parameter.numel() for parameter in model.parameters()) == 21_749_396 - 768
    assert tiny_config().num_labels == 3
