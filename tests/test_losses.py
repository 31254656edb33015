"""The terms of Eq. 12 against a straight transcription in NumPy, and the model's sum of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny_models import pixels, tiny_model

from bitrans_hf.hub.losses import (
    affinity_consistency_loss,
    class_consistency_loss,
    class_contrast_loss,
    classification_loss,
)

LABELS = np.array([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]], dtype=np.float32)

# f^-1 of a grid whose last two axes are rows and columns.
INVERSE = {
    "hflip": lambda grid: grid[..., :, ::-1],
    "vflip": lambda grid: grid[..., ::-1, :],
    "rot90": lambda grid: np.rot90(grid, -1, (-2, -1)),
    "rot180": lambda grid: grid[..., ::-1, ::-1],
}


def eq_5(logits: np.ndarray, labels: np.ndarray) -> float:
    """-(1 / C) sum_c [y log sigmoid(x) + (1 - y) log(1 - sigmoid(x))], averaged over the batch."""
    batch, num_classes = logits.shape
    total = 0.0
    for i in range(batch):
        for c in range(num_classes):
            probability = 1.0 / (1.0 + math.exp(-float(logits[i, c])))
            total -= math.log(probability) if labels[i, c] else math.log(1.0 - probability)
    return total / (batch * num_classes)


def eq_3(first: np.ndarray, second: np.ndarray) -> float:
    """Mean over the batch of the mean over classes of || M_c - f^-1(M'_c) ||_1."""
    batch, num_classes, h, w = first.shape
    per_image = []
    for i in range(batch):
        terms = []
        for c in range(num_classes):
            distance = 0.0
            for row in range(h):
                for column in range(w):
                    distance += abs(float(first[i, c, row, column]) - float(second[i, c, row, column]))
            terms.append(distance)
        per_image.append(sum(terms) / len(terms) if terms else 0.0)
    return sum(per_image) / batch


def eq_11(first: np.ndarray, second: np.ndarray) -> float:
    """Sum over keys, mean over queries and batch, of | A - f^-1(A') |."""
    batch, num_patches, _ = first.shape
    total = 0.0
    for i in range(batch):
        for query in range(num_patches):
            for key in range(num_patches):
                total += abs(float(first[i, query, key]) - float(second[i, query, key]))
    return total / (batch * num_patches)


def attention_rows(*shape: int, seed: int) -> np.ndarray:
    """Positive numbers whose last axis sums to 0.9."""
    values = np.random.default_rng(seed).random(shape, dtype=np.float32) ** 4
    return 0.9 * values / values.sum(axis=-1, keepdims=True)


def test_classification_loss_is_eq_5_with_its_minus_sign():
    logits = np.random.default_rng(0).normal(0, 3, (3, 3)).astype(np.float32)
    ours = classification_loss(torch.from_numpy(logits), torch.from_numpy(LABELS))
    assert float(ours) == pytest.approx(eq_5(logits, LABELS), rel=1e-5)
    assert float(classification_loss(torch.tensor([[20.0, -20.0]]), torch.tensor([[1.0, 0.0]]))) < 1e-6


def test_classification_loss_stays_finite_at_extreme_logits():
    loss = classification_loss(torch.tensor([[1e4, -1e4]]), torch.tensor([[0.0, 1.0]]))
    assert float(loss) == pytest.approx(1e4)


def test_class_consistency_loss_is_eq_3():
    first = attention_rows(3, 3, 12, seed=0).reshape(3, 3, 3, 4)
    second = attention_rows(3, 3, 12, seed=1).reshape(3, 3, 3, 4)
    ours = class_consistency_loss(torch.from_numpy(first), torch.from_numpy(second))
    assert float(ours) == pytest.approx(eq_3(first, second), rel=1e-5)


def test_affinity_consistency_loss_is_eq_11():
    first, second = attention_rows(2, 9, 9, seed=0), attention_rows(2, 9, 9, seed=1)
    ours = affinity_consistency_loss(torch.from_numpy(first), torch.from_numpy(second))
    assert float(ours) == pytest.approx(eq_11(first, second), rel=1e-5)


def test_consistency_losses_do_not_depend_on_the_number_of_patches():
    """Moving a tenth of each row's weight costs the same on every grid."""
    losses = []
    for num_patches in (4, 64):
        first = torch.full((1, num_patches, num_patches), 1.0 / num_patches)
        second = first.clone()
        second[:, :, 0] += 0.1
        second[:, :, 1] -= 0.1
        grid = (1, num_patches, 2, num_patches // 2)
        losses.append(float(affinity_consistency_loss(first, second)))
        losses.append(float(class_consistency_loss(first.reshape(grid), second.reshape(grid))))
    assert losses == pytest.approx([0.2] * 4, rel=1e-4)


def test_equal_views_cost_nothing():
    maps = torch.rand(2, 3, 4, 4)
    assert float(class_consistency_loss(maps, maps.clone())) == 0.0
    assert float(affinity_consistency_loss(maps.flatten(2), maps.flatten(2).clone())) == 0.0


def test_losses_are_float32_whatever_comes_in():
    maps = torch.rand(2, 3, 4, 4, dtype=torch.bfloat16)
    assert class_consistency_loss(maps, maps).dtype == torch.float32
    assert affinity_consistency_loss(maps.flatten(2), maps.flatten(2)).dtype == torch.float32
    assert classification_loss(maps[:, :, 0, 0], torch.ones(2, 3, dtype=torch.int64)).dtype == torch.float32


@pytest.mark.parametrize("view", list(INVERSE))
def test_the_models_loss_is_eq_12_of_two_separate_forward_passes(view: str):
    # An image at a time and one view at a time, without labels: nothing is shared with the 2B batch but the weights.
    model = tiny_model(view=view, scc_weight=0.7, pac_weight=1.3)
    images = pixels(3, 3, 32, 32)
    second_images = {
        "hflip": images.flip(3),
        "vflip": images.flip(2),
        "rot90": torch.rot90(images, 1, (2, 3)),
        "rot180": torch.rot90(images, 2, (2, 3)),
    }[view]
    output = model(images, labels=torch.from_numpy(LABELS))
    totals = dict.fromkeys(("class", "patch", "scc", "pac"), 0.0)
    for image, second_image, labels in zip(images, second_images, LABELS, strict=True):
        with torch.no_grad():
            first, second = model(image[None]), model(second_image[None])
        labels = labels[None]
        totals["class"] += (eq_5(first.class_logits, labels) + eq_5(second.class_logits, labels)) / 2
        totals["patch"] += (eq_5(first.patch_logits, labels) + eq_5(second.patch_logits, labels)) / 2
        sc_cam_back = INVERSE[view](second.sc_cam.numpy())
        totals["scc"] += eq_3(first.sc_cam.numpy(), sc_cam_back)
        keys_back = INVERSE[view](second.affinity.numpy().reshape(1, 16, 4, 4)).reshape(1, 16, 16)
        both_back = INVERSE[view](keys_back.transpose(0, 2, 1).reshape(1, 16, 4, 4)).reshape(1, 16, 16)
        totals["pac"] += eq_11(first.affinity.numpy(), both_back.transpose(0, 2, 1))
    totals = {name: total / 3 for name, total in totals.items()}
    assert {name: loss.item() for name, loss in output.losses.items()} == pytest.approx(totals, rel=1e-4)
    expected = totals["class"] + totals["patch"] + 0.7 * totals["scc"] + 1.3 * totals["pac"]
    assert output.loss.item() == pytest.approx(expected, rel=1e-4)
    assert totals["scc"] > 0.01
    assert totals["pac"] > 0.01


def test_without_a_second_view_the_loss_is_the_two_classification_terms():
    model = tiny_model(view="none")
    images = pixels(3, 3, 32, 32)
    output = model(images, labels=torch.from_numpy(LABELS))
    with torch.no_grad():
        plain = model(images)
    expected = {"class": eq_5(plain.class_logits, LABELS), "patch": eq_5(plain.patch_logits, LABELS)}
    assert {name: loss.item() for name, loss in output.losses.items()} == pytest.approx(expected, rel=1e-5)
    assert output.loss.item() == pytest.approx(sum(expected.values()), rel=1e-5)


# ---- Beyond the paper.


def test_contrast_wants_each_present_class_token_to_resemble_itself_alone():
    rng = np.random.default_rng(4)
    layers = rng.normal(size=(2, 3, 3, 6)).astype(np.float32)  # layers, images, classes, width
    per_image = []
    for i, labels in enumerate(LABELS):
        terms = []
        for c in range(3):
            if not labels[c]:
                continue
            for tokens in layers[:, i]:
                unit = [token / math.sqrt(float(token @ token)) for token in tokens]
                scores = [math.exp(float(unit[c] @ other)) for other in unit]
                terms.append(-math.log(scores[c] / sum(scores)))
        per_image.append(sum(terms) / len(terms) if terms else 0.0)
    loss = class_contrast_loss([torch.from_numpy(tokens) for tokens in layers], torch.from_numpy(LABELS))
    assert loss.item() == pytest.approx(sum(per_image) / 3, abs=1e-5)


def test_the_total_loss_weighs_what_was_added_to_eq_12():
    options = {"scc_weight": 0.5, "pac_weight": 2.0, "patch_weight": 0.25, "class_contrast_weight": 3.0}
    model = tiny_model(**options)
    output = model(pixels(3, 3, 32, 32), labels=torch.from_numpy(LABELS), consistency_scale=0.1)
    terms = {name: term.item() for name, term in output.losses.items()}
    wanted = (
        terms["class"] + 0.25 * terms["patch"] + 3 * terms["contrast"] + 0.1 * (0.5 * terms["scc"] + 2 * terms["pac"])
    )
    assert output.loss.item() == pytest.approx(wanted, rel=1e-5)
    assert "contrast" not in tiny_model()(pixels(3, 3, 32, 32), labels=torch.from_numpy(LABELS)).losses
