"""Docstrings name the arguments and fields that exist, all of them."""

import ast
import re
from collections.abc import Iterator

import pytest
from sources import ROOT, programs


def documented(docstring: str | None, section: str) -> list[str]:
    """Return the names that a section of a docstring explains, in its order."""
    inside = re.search(rf"^{section}:\n((?: {{4}}.*(?:\n|\Z)|\n)+)", docstring or "", re.MULTILINE)
    return re.findall(r"^ {4}\*{0,2}(\w+):", inside.group(1), re.MULTILINE) if inside else []


def nodes(kind: type[ast.AST]) -> Iterator[tuple[str, ast.AST]]:
    """Give every class or function, with its place."""
    for path, tree in programs():
        for node in ast.walk(tree):
            if isinstance(node, kind):
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node  # type: ignore[attr-defined]


def test_sections_are_found():
    docstring = "Cut.\n\nArgs:\n    image: To\n        cut.\n    **options: Other.\n\nReturns:\n    size: Not one."
    assert documented(docstring, "Args") == ["image", "options"]
    assert documented(docstring, "Attributes") == []


def names_of(node: ast.ClassDef) -> set[str]:
    """Return all that a class has by name: methods, and what it or its instances are assigned."""
    targets = {getattr(each.target, "id", "") for each in node.body if isinstance(each, ast.AnnAssign)}
    methods = {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
    stored = [each for each in ast.walk(node) if isinstance(getattr(each, "ctx", None), ast.Store)]
    return targets | methods | {getattr(each, "attr", getattr(each, "id", "")) for each in stored}


def test_attributes_of_a_class_are_its_own():
    wrong, seen = [], 0
    for place, node in nodes(ast.ClassDef):
        assert isinstance(node, ast.ClassDef)
        names = documented(ast.get_docstring(node), "Attributes")
        seen += len(names)
        wrong += [f"{place}: {name} is documented and does not exist" for name in names if name not in names_of(node)]
        if names and not node.bases:
            fields = [getattr(each.target, "id", "") for each in node.body if isinstance(each, ast.AnnAssign)]
            wrong += [f"{place}: {name} is not documented" for name in fields if name not in names]
    assert not wrong, "\n".join(wrong)
    assert seen > 300


def test_arguments_of_a_function_are_its_own():
    wrong, seen = [], 0
    for place, node in nodes(ast.FunctionDef):
        assert isinstance(node, ast.FunctionDef)
        names = documented(ast.get_docstring(node), "Args")
        given = node.args
        arguments = [
            each.arg
            for each in [*given.posonlyargs, *given.args, *given.kwonlyargs]
            if each.arg not in ("self", "cls")
        ]
        starred = [each.arg for each in (given.vararg, given.kwarg) if each is not None]
        seen += len(names)
        wrong += [
            f"{place}: {name} is documented and does not exist" for name in names if name not in arguments + starred
        ]
        if names:
            wrong += [f"{place}: {name} is not documented" for name in arguments if name not in names]
    assert not wrong, "\n".join(wrong)
    assert seen > 500


@pytest.mark.parametrize(
    ("docstring", "names"), [(None, []), ("No sections.", []), ("A.\n\nArgs:\n    one: It.\n", ["one"])]
)
def test_a_docstring_may_lack_a_section(docstring: str | None, names: list[str]):
    assert documented(docstring, "Args") == names
