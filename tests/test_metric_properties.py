"""Properties of `MeanIoU` over random maps: the community's arithmetic, written out plainly, is the measure."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from bitrans_hf.metrics import MeanIoU

few = settings(max_examples=60, deadline=None, derandomize=True)


def plain_mean_iou(predictions, references, num_labels, ignore_index, label_map=None, reduce_labels=False):
    """The community `mean_iou`, pixel by pixel; `label_map` replaces all ids at once."""
    intersection, predicted, true = (np.zeros(num_labels) for _ in range(3))
    for prediction, reference in zip(predictions, references, strict=True):
        for p, t in zip(np.asarray(prediction).ravel().tolist(), np.asarray(reference).ravel().tolist(), strict=True):
            t = (label_map or {}).get(t, t)
            if reduce_labels:
                t = {0: 255, 255: 255}.get(t, t - 1)
            if t == ignore_index:
                continue
            intersection[p] += p == t
            predicted[p] += 1
            true[t] += 1
    with np.errstate(invalid="ignore", divide="ignore"):
        iou, accuracy = intersection / (predicted + true - intersection), intersection / true
        overall = intersection.sum() / true.sum()
    return {
        "mean_iou": np.nan if np.isnan(iou).all() else np.nanmean(iou),
        "mean_accuracy": np.nan if np.isnan(accuracy).all() else np.nanmean(accuracy),
        "overall_accuracy": overall,
        "per_category_iou": iou,
        "per_category_accuracy": accuracy,
    }


@st.composite
def cases(draw):
    """Maps of up to 5 labels, some of which may be absent, with every setting."""
    num_labels = draw(st.integers(1, 5))
    reduce_labels = draw(st.booleans())
    ignore_index = draw(st.sampled_from([255, 0, num_labels - 1]))
    first = 1 if reduce_labels else 0
    stored = st.sampled_from([*range(first, num_labels + first), *([0, 255] if reduce_labels else [])])
    if ignore_index == 255 and not reduce_labels:
        stored = stored | st.just(255)
    elif reduce_labels and ignore_index != 255:
        stored = st.integers(1, num_labels)
    label_map = None
    if draw(st.booleans()):
        ids = list(range(first, num_labels + first))
        label_map = dict(zip(ids, draw(st.permutations(ids)), strict=True))
    shapes = draw(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4))
    predictions = [draw(arrays.arrays(np.uint8, shape, elements=st.integers(0, num_labels - 1))) for shape in shapes]
    references = [draw(arrays.arrays(np.uint8, shape, elements=stored)) for shape in shapes]
    rules = {"ignore_index": ignore_index, "label_map": label_map, "reduce_labels": reduce_labels}
    return predictions, references, num_labels, rules


def assert_same(scores, expected) -> None:
    for key, value in expected.items():
        np.testing.assert_allclose(scores[key], value, atol=1e-12, err_msg=key)


@few
@given(cases(), st.booleans())
def test_scores_equal_the_plain_arithmetic_wherever_the_settings_are_given(case, at_compute):
    predictions, references, num_labels, rules = case
    before = [reference.copy() for reference in references]
    for map_ in (*predictions, *references):
        map_.flags.writeable = False
    metric = MeanIoU(num_labels, **({} if at_compute else rules))
    scores = metric.compute(predictions=predictions, references=references, **(rules if at_compute else {}))
    assert_same(scores, plain_mean_iou(predictions, references, num_labels, **rules))
    assert all((old == new).all() for old, new in zip(before, references, strict=True))


@few
@given(cases(), st.lists(st.integers(0, 4), max_size=3))
def test_scores_do_not_depend_on_batches_processes_or_kinds_of_maps(case, cuts):
    predictions, references, num_labels, rules = case
    kinds = (np.asarray, torch.from_numpy, Image.fromarray, lambda map_: map_.tolist(), lambda map_: map_.astype(int))
    edges = [0, *sorted(min(cut, len(predictions)) for cut in cuts), len(predictions)]
    parts = [MeanIoU(num_labels, **rules) for _ in edges[1:]]
    for number, part in enumerate(parts):
        batch = slice(edges[number], edges[number + 1])
        kind = kinds[number % len(kinds)]
        part.add_batch(predictions=map(kind, predictions[batch]), references=map(kind, references[batch]))
    for part in parts[1:]:
        parts[0].merge(part)
    assert_same(parts[0].compute(), plain_mean_iou(predictions, references, num_labels, **rules))


@few
@given(st.integers(0, 3), st.integers(0, 3))
def test_unequal_numbers_of_maps_are_refused_and_count_nothing(num_predictions, num_references):
    metric, map_ = MeanIoU(2), np.zeros((2, 2), int)
    if num_predictions == num_references:
        return
    more = "predictions than references" if num_predictions > num_references else "references than predictions"
    number = min(num_predictions, num_references)
    for call in (metric.add_batch, metric.compute):
        with pytest.raises(ValueError, match=f"more {more}, of which there are {number};"):
            call(predictions=[map_] * num_predictions, references=iter([map_] * num_references))
    assert len(metric) == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((2, 3), int), "predictions is one label map .* put it in a list"),
        (Image.new("P", (3, 2)), "predictions is one label map .* put it in a list"),
        ([Image.new("RGB", (3, 2))], r"prediction has shape \(2, 3, 3\)"),
        ([torch.zeros(2, 3, requires_grad=True)], "dtype float32; .* cast whole numbers to integers"),
        ([np.full((2, 3), 2)], r"prediction holds label id 2; expected ids in \[0, 2\)"),
        ([np.zeros((3, 2), int)], "bring the prediction to the size of the target"),
    ],
)
def test_maps_that_do_not_fit_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        MeanIoU(2).compute(predictions=given, references=[np.zeros((2, 3), int)])


def test_every_index_mode_of_pil_is_counted_as_its_numbers():
    reference = np.array([[0, 1, 1]])
    maps = [
        Image.fromarray(reference.astype(bool)),
        Image.fromarray(reference.astype(np.uint16)),
        Image.fromarray(reference.astype(np.int32)),
        Image.fromarray(reference.astype(np.uint8)).convert("P"),
        reference.astype(bool),
    ]
    scores = MeanIoU(2).compute(predictions=maps, references=[reference] * len(maps))
    assert scores["mean_iou"] == 1.0


def test_a_compute_that_fails_counts_nothing_and_names_the_settings_of_an_earlier_batch():
    metric = MeanIoU(2)
    metric.add(prediction=[[0, 1]], reference=[[0, 1]])
    with pytest.raises(ValueError, match="target holds label id 7"):
        metric.compute(predictions=[[[0]]], references=[[[7]]])
    assert metric.compute(predictions=[[[0]]], references=[[[7]]], out_of_range="miss")["overall_accuracy"] == 1.0
    with pytest.raises(ValueError, match="must be given where num_labels was"):
        metric.add(prediction=[[0]], reference=[[-100]])


@pytest.mark.parametrize("wrong", [{"num_labels": "2"}, {"num_labels": 2.5}, {"num_labels": 2, "label_map": {"0": 1}}])
def test_settings_of_another_type_are_named(wrong):
    with pytest.raises(ValueError, match=r"must be an integer|must give ids for ids"):
        MeanIoU(**wrong)
