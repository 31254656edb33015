"""The documentation names what is there: files, links, recipes, scripts and their options."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from bitrans_hf.cli import build_parser, run_train
from bitrans_hf.stages.evaluate import EvaluationOptions
from bitrans_hf.stages.parse import parse_recipe, parse_recipe_with

REPOSITORY = Path(__file__).resolve().parents[1]

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of every line of a shell block that runs something of this project."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    found.append((page.name, words))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_in_backquotes_are_there(page: Path):
    names = re.findall(r"`((?:training|bitrans_hf|tests|benchmarks|docs)/[\w./-]+)`", page.read_text(encoding="utf-8"))
    for name in names:
        assert (REPOSITORY / name).exists(), name


@pytest.mark.parametrize(("page", "words"), commands(), ids=lambda part: part if isinstance(part, str) else part[-1])
def test_every_command_of_the_pages_is_understood(page: str, words: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(REPOSITORY)
    for word in words:
        if word.startswith(("training/", "benchmarks/")):
            assert Path(word).is_file(), word
    script = next((word for word in words if word.endswith(".py")), None)
    if script is not None:
        arguments = words[words.index(script) + 1 :]
        text = Path(script).read_text(encoding="utf-8")
        stage = re.search(r'run_script\("(bitrans_hf\.[\w.]+)"\)', text)
        if stage is not None:
            text = (REPOSITORY / f"{stage[1].replace('.', '/')}.py").read_text(encoding="utf-8")
        if "parse_recipe(__doc__" in text:
            parse_recipe(None, [word for word in arguments if word != "--dry-run"])  # publish.py's own spelling
        elif "parse_recipe_with(EvaluationOptions, __doc__, arguments)" in text:
            parse_recipe_with(EvaluationOptions, None, arguments)
        else:  # another parser: its options occur in the file
            for option in arguments:
                assert not option.startswith("--") or option.split("=")[0].strip("-").replace("-", "_") in text
    elif words[0] == "make":
        targets = re.findall(r"^([\w-]+):", Path("Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert words[1] in targets
    elif words[1:3] == ["-m", "bitrans_hf.publishing.export"]:
        assert len(words) == 5  # a model and a folder
    elif words[0].endswith("/bitrans"):
        options, others = build_parser().parse_known_args(words[1:])
        if options.run is run_train:
            parse_recipe(None, ["--config", options.config, "--data.root", options.folder, *others])
        else:
            assert not others
    else:
        assert words[:3] in (["python3", "-m", "venv"], [".venv/bin/pip", "install", "-e"]), words


def test_files_in_the_picture_are_there():
    picture = (REPOSITORY / "docs" / "architecture.svg").read_text(encoding="utf-8")
    names = re.findall(r'class="file"[^>]*>([\w/]+\.py)<', picture)
    assert len(names) > 12
    for name in names:
        assert (REPOSITORY / name).exists() or (REPOSITORY / "bitrans_hf" / name).exists(), name


def test_the_examples_in_python_blocks_compile():
    for page in PAGES:
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            compile(block, str(page), "exec")
