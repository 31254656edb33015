from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from bitrans_hf.stages.recipe import (
    AffinityRecipe,
    BiTransRecipe,
    CamRecipe,
    PredictionRecipe,
    PseudoLabelsRecipe,
    Recipe,
    SeedsRecipe,
    SegmentationRecipe,
)
from bitrans_hf.stages.records import recipe_differences

RECIPE = Recipe(
    affinity=AffinityRecipe(weights="scratch"),
    pseudo_labels=PseudoLabelsRecipe(),
    segmentation=SegmentationRecipe(),
    prediction=PredictionRecipe(),
)


def stored(**changes: dict[str, Any]) -> dict[str, Any]:
    """The recipe as it is stored, with keys of its sections changed or added."""
    return {
        name: {**value, **changes[name]} if name in changes else value
        for name, value in dataclasses.asdict(RECIPE).items()
    }


def test_a_recipe_equals_itself_whatever_its_values_are():
    assert recipe_differences(stored(), dataclasses.asdict(RECIPE)) == []


@pytest.mark.parametrize(
    "older",
    [
        {"train": {"num_workers": 8, "log_every": 50, "checkpoint_every": 7, "trackers": ["tensorboard"]}},
        {"segmentation": {"num_workers": 8}, "affinity": {"log_every": 3}},
        {"seeds": {"fusion": None, "refine_steps": None, "normalize_affinity": None}},
        {"train": {"optimizer": None, "momentum": None, "consistency_warmup_epochs": None}},
        {"data": {"drop_empty": None, "allow_empty": None}},
        {"model": {"architecture": None, "backbone": None, "options": None}},
        {"prediction": {"crf_classes": "predicted"}},
        {"model": {"scc_classes": "all", "detach_second_view": False, "attention_map_mode": "eager"}},
        {"model": {"scc_classes": None, "scc_maps": None, "detach_second_view": None, "attention_map_mode": None}},
        {"pseudo_labels": {"keep_scores": True}},
    ],
    ids=lambda older: ", ".join(older),
)
def test_an_older_recipe_of_the_same_result_is_the_same(older: dict[str, dict[str, Any]]):
    assert recipe_differences(stored(**older), dataclasses.asdict(RECIPE)) == []


@pytest.mark.parametrize(
    ("older", "different"),
    [
        ({"prediction": {"crf_classes": "all"}}, ["prediction.crf_classes"]),
        ({"seeds": {"refine_steps": 2}}, ["seeds.refine_steps"]),
        ({"train": {"epochs": 1, "num_workers": 8}}, ["train.epochs"]),
        ({"model": {"scc_classes": "present"}}, ["model.scc_classes"]),
        ({"model": {"detach_second_view": True}}, ["model.detach_second_view"]),
    ],
)
def test_an_older_recipe_of_another_result_is_named(older: dict[str, dict[str, Any]], different: list[str]):
    assert recipe_differences(stored(**older), dataclasses.asdict(RECIPE)) == different


def test_weights_that_ship_with_a_recipe_were_named_with_their_folder():
    recipe = dataclasses.replace(RECIPE, model=BiTransRecipe(weights="shapes_encoder.safetensors"))
    older = stored(model={"weights": "training/recipes/shapes_encoder.safetensors"})
    assert recipe_differences(older, dataclasses.asdict(recipe)) == []


def test_a_cnns_section_had_the_transformers_keys_too():
    seeds = SeedsRecipe(variant="coarse_cam")
    recipe = dataclasses.asdict(Recipe(model=CamRecipe(weights="timm"), seeds=seeds))
    nulls = dict.fromkeys({each.name for each in dataclasses.fields(BiTransRecipe)} - {"weights", "architecture"})
    older = {**recipe, "model": {**nulls, "class_token_noise": 0.0, **recipe["model"]}}
    assert recipe_differences(older, recipe) == []
