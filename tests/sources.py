"""The code under test as syntax trees, for tests of how it is written."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]


def programs() -> Iterator[tuple[Path, ast.Module]]:
    """Give every Python file of the package and of `training`, with its tree."""
    for folder in ("bitrans_hf", "training"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path, ast.parse(path.read_text(encoding="utf-8"))
