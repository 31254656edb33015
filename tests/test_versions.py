from __future__ import annotations

import ast
import re
import sys
import tomllib

from sources import ROOT, programs

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
PACKAGE_OF = {"PIL": "pillow", "yaml": "pyyaml", "pydensecrf": "pydensecrf2", "huggingface-hub": "huggingface_hub"}
"""Names to import that are not the package's."""


def test_the_oldest_versions_that_are_tested_are_the_lower_bounds():
    bounds = {}
    for requirement in [*PROJECT["dependencies"], *EXTRAS["coco"], *EXTRAS["crf"], *EXTRAS["sbd"]]:
        name, bound = re.fullmatch(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)(?:[,;].*)?", requirement).groups()
        bounds[name] = bound
    pinned, brought = (ROOT / "tests" / "oldest.txt").read_text(encoding="utf-8").split("\n\n")
    assert dict(re.findall(r"^([\w-]+)==([\d.]+)$", pinned, re.MULTILINE)) == bounds
    assert not set(re.findall(r"^([\w-]+)==", brought, re.MULTILINE)) & set(bounds)


def test_every_library_that_is_imported_is_declared():
    requirements = [*PROJECT["dependencies"], *(one for extra in EXTRAS.values() for one in extra)]
    declared = {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}
    imported = set()
    for path, tree in programs():
        beside = {"bitrans_hf", *(other.stem for other in path.parent.glob("*.py"))}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                imported |= {name.name.partition(".")[0] for name in node.names} - beside
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported |= {node.module.partition(".")[0]} - beside
    imported -= sys.stdlib_module_names
    assert {"torch", "pyarrow", "PIL", "gradio"} <= imported
    assert {PACKAGE_OF.get(name, name) for name in imported} - declared == set()


def test_every_text_file_is_read_and_written_as_utf_8():
    """The default on Windows is a code page."""
    calls = [
        (f"{path.relative_to(ROOT)}:{node.lineno}", node)
        for path, tree in programs()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute | ast.Name)
        and (node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id)
        in ("open", "read_text", "write_text", "NamedTemporaryFile", "fdopen")
    ]
    assert len(calls) > 50
    text = [(place, node) for place, node in calls if not of_bytes(node)]
    assert [place for place, node in text if "encoding" not in {option.arg for option in node.keywords}] == []


def of_bytes(call: ast.Call) -> bool:
    """Return whether a call opens an image, an archive, or a file of bytes, or is our own `read_text`."""
    said = ast.unparse(call)
    return said.startswith(("Image.open(", "PILImage.open(", "tarfile.open(", "read_text(")) or bool(
        re.search(r"open\(.*'[rwa]b'", said)
    )
