"""Recipes and options from YAML files and the command line.

`--config voc_deit_small --train.epochs 3` overrides one value of a shipped recipe or of a file. Unknown keys and
values of the wrong type are errors.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, TypeVar

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser  # type: ignore[attr-defined]  # not in its __all__

from ..hub.errors import InputError
from ..recipes import recipe_file
from .recipe import MODEL_RECIPES, TRANSFORMER_KEYS, PlainRecipe, Recipe, RunOptions

CONFIG_HELP = "YAML file with the keys below, or name of a shipped recipe; a later one changes values of earlier ones"


def parse_recipe(description: str | None, arguments: Sequence[str] | None = None) -> tuple[Recipe, RunOptions]:
    """Read `--config FILE`, `--key value` overrides and the run options from the command line.

    Args:
        description: Of the script, for `--help`.
        arguments: Command-line arguments; None for those of the process.

    Raises:
        SystemExit: unknown key, wrong type or value; the message says which.
    """
    recipe, options, _ = parse_recipe_with(NoOptions, description, arguments)
    return recipe, options


@dataclass(frozen=True)
class NoOptions:
    """For a script without options of its own."""


Group = TypeVar("Group")
Made = TypeVar("Made")


def parse_recipe_with(
    own_options: type[Group], description: str | None, arguments: Sequence[str] | None = None
) -> tuple[Recipe, RunOptions, Group]:
    """Read the recipe as `parse_recipe` does, together with a dataclass of the script's own options."""
    names, words = config_names(sys.argv[1:] if arguments is None else arguments)
    parser = ArgumentParser(description=(description or "").split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile, help=CONFIG_HELP)
    try:
        content = merged_files(names)
        model = MODEL_RECIPES[architecture(content, words)]
    except InputError as error:
        parser.error(str(error))
    for group in (own_options, RunOptions):
        parser.add_class_arguments(group)
    # The model's keys are those of its architecture.
    parser.add_class_arguments(Recipe, skip={"model"})
    parser.add_class_arguments(model, "model")
    values = parser.instantiate(parser.parse_args(["--config", json.dumps(content), *words] if content else words))

    def made(group: type[Made]) -> Made:
        return group(**{key.name: values[key.name] for key in dataclasses.fields(group)})  # type: ignore[arg-type]

    try:
        return made(Recipe), made(RunOptions), made(own_options)
    except InputError as error:
        parser.error(str(error))


def config_names(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into the values of `--config` and all other words."""
    names, others = [], []
    rest = iter(words)
    for word in rest:
        option, equals, value = word.partition("=")
        if option == "--config" and (given := value if equals else next(rest, "")):
            names.append(given)
        else:
            others.append(word)
    return names, others


def merged_files(names: Sequence[str]) -> PlainRecipe:
    """Read recipes and merge them; later ones override earlier ones.

    Raises:
        InputError: a recipe does not exist, or is not a mapping of keys to values.
    """
    merged: PlainRecipe = {}
    for name in names:
        file = recipe_file(name)
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{file} is no YAML file: {error}") from error
        if not isinstance(content, Mapping):
            raise InputError(f"{file} holds {type(content).__name__}, expected keys and values as `name: photos`.")
        before = architecture(merged)
        merged = laid_over(merged, content)
        if architecture(merged) != before:  # what belongs to the other one goes
            for section, keys in TRANSFORMER_KEYS.items():
                given = content.get(section) or {}
                merged[section] = {
                    key: value for key, value in (merged.get(section) or {}).items() if key in given or key not in keys
                }
    return merged


def laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> PlainRecipe:
    """Return `below` overridden by `above`, section by section.

    A section that names another `architecture` replaces the whole section below: the two have different keys.
    """
    result = dict(below)
    for key, value in above.items():
        before = result.get(key)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            same = value.get("architecture") in (None, before.get("architecture", "bitrans"))
            result[key] = laid_over(before, value) if same else value
        else:
            result[key] = value
    return result


def architecture(content: Mapping[str, Any], words: Sequence[str] = ()) -> str:
    """Return the model architecture that files and command line name.

    Raises:
        InputError: there is no such architecture.
    """
    model = content.get("model")
    name = model.get("architecture", "bitrans") if isinstance(model, Mapping) else "bitrans"
    for word, following in zip_longest(words, words[1:], fillvalue=""):
        option, equals, value = word.partition("=")
        if option == "--model.architecture":
            name = value if equals else following
    if name not in MODEL_RECIPES:
        raise InputError(f"model.architecture must be one of {', '.join(MODEL_RECIPES)}, got {name!r}.")
    return str(name)
