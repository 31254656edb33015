"""Records beside every result: the parts of the recipe that it depends on, scores, and where they were measured."""

import dataclasses
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
import transformers
from accelerate import Accelerator

from .. import __version__
from ..files import atomic_write
from ..metrics.scores import Record
from .precision import SHOWN
from .recipe import MODEL_RECIPES, PlainRecipe, Recipe, TrainingRecipe

# ---- JSON.


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object."""
    return dict(json.loads(path.read_text(encoding="utf-8")))


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file by atomic rename; nan, the score of an absent class, becomes null: JSON knows no nan."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(_plain(content), indent=2) + "\n", encoding="utf-8")


def _plain(content: Any) -> Any:
    if isinstance(content, Record):
        return _plain(content.to_json())
    if isinstance(content, Mapping):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    return None if isinstance(content, float) and math.isnan(content) else content


# ---- Recipes.


def recipe_parts(recipe: Recipe, depends_on: Sequence[str]) -> PlainRecipe:
    """Return the named fields of a recipe as plain values."""
    resolved = dataclasses.asdict(recipe)
    return {key: resolved[key] for key in depends_on}


def recipe_differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return the dotted names of the keys that differ between parts of recipes, sorted."""
    return sorted(_differences(up_to_date(stored), wanted, ""))


def _differences(stored: Any, wanted: Any, prefix: str) -> Iterator[str]:
    if isinstance(stored, Mapping) and isinstance(wanted, Mapping):
        for key in stored.keys() | wanted.keys():
            yield from _differences(stored.get(key), wanted.get(key), f"{prefix}.{key}" if prefix else key)
    elif stored != wanted:
        yield prefix


OPTIONS_NOW = ("num_workers", "log_every", "checkpoint_every", "trackers")
"""Former keys of sections that train: no result depends on them."""

ONLY_WAY_NOW: Mapping[str, Mapping[str, str | bool]] = {
    "model": {"scc_classes": "all", "scc_maps": "attention", "detach_second_view": False},
    "prediction": {"crf_classes": "predicted"},
}
"""Removed keys with the only value that is left; other values gave other results."""

CHANGED_NO_RESULT = {"model": ("attention_map_mode",), "pseudo_labels": ("keep_scores",)}
"""Removed keys that did not change a result: extra files, and memory saved in training."""


def up_to_date(stored: Mapping[str, Any]) -> PlainRecipe:
    """Convert parts of a recipe from an older version to the form of this version.

    Removed keys, and keys that are options now, are dropped if no result depends on them. Missing keys get the
    default, and so does null where it used to mean the default.
    """
    sections = {each.name for each in dataclasses.fields(Recipe)}
    return {
        name: _section_up_to_date(name, value) if name in sections and isinstance(value, Mapping) else value
        for name, value in stored.items()
    }


def _section_up_to_date(name: str, stored: Mapping[str, Any]) -> PlainRecipe:
    section = section_type(name, stored)
    hints, gone = get_type_hints(section), ONLY_WAY_NOW.get(name, {})
    dropped = {*CHANGED_NO_RESULT.get(name, ()), *(OPTIONS_NOW if issubclass(section, TrainingRecipe) else ())}
    dropped |= {key for key, value in gone.items() if stored.get(key) in (None, value)}
    # A CNN's section had the transformer's keys too, all of them null, and the other way round.
    dropped |= {key for key, value in stored.items() if name == "model" and key not in hints and value in (None, 0.0)}
    result = {key: value for key, value in stored.items() if key not in dropped}
    for each in dataclasses.fields(section):
        if result.get(each.name) is None:
            result[each.name] = None if type(None) in get_args(hints[each.name]) else getattr(section(), each.name)
    if name == "model":  # weights that ship with a recipe are named without their folder
        result["weights"] = result["weights"].removeprefix("training/recipes/")
    return result


def section_type(name: str, settings: Mapping[str, Any]) -> type[Any]:
    """Return the dataclass of a recipe's section."""
    if name == "model":
        return MODEL_RECIPES[settings.get("architecture") or "bitrans"]
    hint: type[Any] = get_type_hints(Recipe)[name]
    return next((each for each in get_args(hint) if each is not type(None)), hint)


# ---- Where a number was measured.


def provenance(accelerator: Accelerator | None = None) -> dict[str, str]:
    """Return the code's commit, the versions and the hardware that a number was measured with.

    Args:
        accelerator: Its device and precision are recorded; None for CPU-only work.
    """
    device = f"{os.cpu_count()} CPU cores"
    if accelerator is not None and accelerator.device.type == "cuda":
        device = torch.cuda.get_device_name(accelerator.device)
    elif accelerator is not None and accelerator.device.type != "cpu":
        device = str(accelerator.device)
    record = {
        "commit": commit_of(Path(__file__).resolve().parents[2]),
        "bitrans_hf": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": device,
    }
    return record if accelerator is None else {**record, "precision": SHOWN[accelerator.mixed_precision]}


def commit_of(checkout: Path) -> str:
    """Return the commit of a checkout, with "-modified" if files differ from it; "unknown" if there is none.

    An installed package has no commit, even if it lies inside another project's checkout.
    """
    if not (checkout / ".git").exists():
        return "unknown"
    try:
        commit = _git(checkout, "rev-parse", "--short=12", "HEAD")
        return commit + ("-modified" if _git(checkout, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
