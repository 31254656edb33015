from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from tiny_models import tiny_config

from bitrans_hf import BiTransConfig
from bitrans_hf.hub.views import VIEWS

DEFAULTS = {
    "image_size": 224,
    "patch_size": 16,
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4.0,
    "layer_norm_eps": 1e-6,
    "drop_path_rate": 0.1,
    "num_seed_layers": 3,
    "view": "hflip",
    "scc_weight": 1.0,
    "pac_weight": 1.0,
}


def test_the_defaults_are_deit_small_and_the_papers_losses():
    config = BiTransConfig()
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS


def test_id2label_alone_sets_the_number_of_classes_and_the_way_back():
    config = BiTransConfig(id2label={0: "cat", 1: "dog", 2: "tree"})
    assert config.num_labels == 3
    assert config.label2id == {"cat": 0, "dog": 1, "tree": 2}
    assert config.problem_type == "multi_label_classification"


def test_a_saved_config_comes_back_equal(tmp_path: Path):
    config = tiny_config(view="rot90", share_drop_path=True, drop_path_rate=0.2)
    config.save_pretrained(tmp_path)
    back = BiTransConfig.from_pretrained(tmp_path)
    assert back.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}
    assert back.id2label == {0: "cat", 1: "dog", 2: "horse"}


def test_whole_numbers_are_welcome_where_a_float_is_expected():
    config = tiny_config(mlp_ratio=4, drop_path_rate=0, scc_weight=0, pac_weight=2)
    assert (config.mlp_ratio, config.pac_weight) == (4, 2)


@pytest.mark.parametrize("view", ["hflip", "vflip", "rot90", "rot180", "none"])
def test_each_view_is_accepted(view: str):
    assert tiny_config(view=view).view == view


WRONG_VALUES: list[tuple[dict[str, Any], str]] = [
    ({"id2label": {}}, "id2label must name at least one object class, got none"),
    ({"image_size": 0}, "image_size must be at least 1, got 0"),
    ({"patch_size": -8}, "patch_size must be at least 1, got -8"),
    ({"num_channels": 0}, "num_channels must be at least 1, got 0"),
    ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
    ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
    ({"image_size": 30}, "image_size must be a multiple of patch_size 8, got 30; use 32"),
    ({"image_size": 4}, "image_size must be a multiple of patch_size 8, got 4; use 8"),
    ({"num_attention_heads": 5}, "hidden_size 24 must be a multiple of num_attention_heads, got 5"),
    ({"num_attention_heads": 0}, "hidden_size 24 must be a multiple of num_attention_heads, got 0"),
    ({"num_seed_layers": 0}, r"num_seed_layers must be in \[1, num_hidden_layers = 3\], got 0"),
    ({"num_affinity_layers": 0}, r"num_affinity_layers must be in \[1, num_hidden_layers = 3\], got 0"),
    ({"num_affinity_layers": 4}, r"num_affinity_layers must be in \[1, num_hidden_layers = 3\], got 4"),
    ({"num_seed_layers": 4}, r"num_seed_layers must be in \[1, num_hidden_layers = 3\], got 4"),
    ({"affinity_source": "keys"}, "affinity_source must be one of attention, similarity, joint, got 'keys'"),
    ({"fusion": "sum"}, "fusion must be one of fused, fused_sqrt, competing, sc_cam, coarse_cam, got 'sum'"),
    ({"refine_steps": 0}, "refine_steps must be at least 1, got 0"),
    ({"threshold": 1.5}, r"threshold must be in \[0, 1\], got 1.5"),
    ({"drop_path_rate": 1.0}, r"drop_path_rate must be in \[0, 1\), got 1.0"),
    ({"drop_path_rate": -0.1}, r"drop_path_rate must be in \[0, 1\), got -0.1"),
    ({"mlp_ratio": 0}, "mlp_ratio and layer_norm_eps must be above 0"),
    ({"layer_norm_eps": 0.0}, "mlp_ratio and layer_norm_eps must be above 0"),
    ({"initializer_range": -1.0}, "initializer_range at least 0"),
    ({"view": "flip"}, f"view must be one of {', '.join(VIEWS)}, got 'flip'"),
    ({"scc_weight": -1.0}, "scc_weight must be a finite number of at least 0, got -1.0"),
    ({"pac_weight": float("nan")}, "pac_weight must be a finite number of at least 0, got nan"),
    ({"pac_weight": float("inf")}, "pac_weight must be a finite number of at least 0, got inf"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG_VALUES, ids=[str(wrong) for wrong, _ in WRONG_VALUES])
def test_a_value_out_of_range_is_named_with_what_is_allowed(wrong: dict[str, Any], message: str):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        tiny_config(**wrong)


@pytest.mark.parametrize("wrong", [{"hidden_size": "24"}, {"view": None}, {"share_drop_path": "yes"}])
def test_a_value_of_the_wrong_type_is_named(wrong: dict[str, Any]):
    with pytest.raises(StrictDataclassFieldValidationError, match=next(iter(wrong))):
        tiny_config(**wrong)


def test_a_value_made_wrong_later_is_noticed_before_it_is_saved(tmp_path: Path):
    config = tiny_config()
    config.num_seed_layers = 9
    with pytest.raises(StrictDataclassClassValidationError, match="num_seed_layers"):
        config.save_pretrained(tmp_path)
