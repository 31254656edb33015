"""Recipes that ship with the package: `--config voc_deit_small`, `--config presets/late_affinity`."""

from pathlib import Path

from ..hub.errors import MissingFileError

FOLDER = Path(__file__).resolve().parent


def recipe_names() -> list[str]:
    """Return the names of all shipped recipes, such as "shapes" and "presets/late_affinity", sorted."""
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml"))


def recipe_file(name: str) -> Path:
    """Return the file of a recipe that is given as a path or by the name of a shipped one.

    Raises:
        MissingFileError: there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    if name in recipe_names():
        return FOLDER / f"{name}.yaml"
    raise MissingFileError(f"no recipe {name!r}: no such file, and the shipped ones are {', '.join(recipe_names())}.")


def weights_file(name: str) -> str:
    """Return where the weights that a recipe names are: beside the shipped recipes if there, else as named."""
    return str(FOLDER / name) if not Path(name).exists() and (FOLDER / name).is_file() else name
