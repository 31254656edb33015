from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_oldest_versions_that_are_tested_are_the_lower_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    bounds = {}
    for requirement in [*project["dependencies"], *extras["coco"], *extras["crf"], *extras["sbd"]]:
        name, bound = re.fullmatch(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)(?:,.*)?", requirement).groups()
        bounds[name] = bound
    pinned, brought = (ROOT / "tests" / "oldest.txt").read_text(encoding="utf-8").split("\n\n")
    assert dict(re.findall(r"^([\w-]+)==([\d.]+)$", pinned, re.MULTILINE)) == bounds
    assert not set(re.findall(r"^([\w-]+)==", brought, re.MULTILINE)) & set(bounds)
