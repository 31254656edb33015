from __future__ import annotations

import ast
import graphlib
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny_models import tiny_model
from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports

import bitrans_hf.data

PACKAGE = Path(__file__).parents[1] / "bitrans_hf"

# The package is read from top to bottom: a file or folder imports only from those above it.
ORDER = (
    "lazy",
    "hub",
    "auto_classes",
    "progress",
    "commands",
    "file_names",
    "files",
    "hub_errors",
    "pool",
    "store",
    "metrics",
    "data",
    "checkpoints",
    "weights",
    "refine",
    "recipes",
    "report",
    "publishing",
    "stages",
    "mask_folder",
    "app",
    "cli",
    "__main__",
)

# These files travel to the Hub as remote code, where neither this package nor its other dependencies are installed.
HUB = PACKAGE / "hub"
HUB_FILES = sorted(file.stem for file in HUB.glob("*.py") if file.stem != "__init__")
OPENED_BY_TRANSFORMERS = ("configuration_", "image_processing_", "modeling_", "pipeline_")
HUB_MODULES = frozenset(f"bitrans_hf.hub.{name}" for name in HUB_FILES)
HUB_LIBRARIES = frozenset({"torch", "torchvision", "transformers", "numpy", "PIL"}) | sys.stdlib_module_names

ENTRIES = tuple(
    name for name in ORDER if (PACKAGE / f"{name}.py").exists() or (PACKAGE / name / "__init__.py").exists()
)


def files_of(entry: str) -> list[Path]:
    """The module `entry`.py, or every file of the folder of that name."""
    folder = PACKAGE / entry
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{entry}.py"]


def imports_of(file: Path) -> list[tuple[int, str]]:
    """(line, absolute dotted name) of every import anywhere in the file, function bodies included."""
    found = []
    own_package = ["bitrans_hf", *file.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = own_package[: len(own_package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "bitrans_hf":  # `from . import x`: each name may be a file
                found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
            else:
                found.append((node.lineno, module))
    return found


def entries_imported_by(file: Path) -> list[tuple[int, str]]:
    found = [(line, name.split(".")[1]) for line, name in imports_of(file) if name.startswith("bitrans_hf.")]
    return [(line, name) for line, name in found if name != "__version__"]


def test_every_package_file_has_a_place_in_the_order():
    present = {
        path.stem if path.is_file() else path.name
        for path in PACKAGE.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert present - {"__init__"} <= set(ORDER), "give each new file its place in ORDER"


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_file_imports_only_from_those_above_it(entry: str):
    allowed = set(ORDER[: ORDER.index(entry)]) | ({entry} if (PACKAGE / entry).is_dir() else set())
    wrong = [
        f"{file.name}:{line} imports {name}"
        for file in files_of(entry)
        for line, name in entries_imported_by(file)
        if name not in allowed
    ]
    assert not wrong


def test_no_files_import_each_other_in_a_circle():
    # Imports inside functions count: they only hide a circle. The `__init__` files load names when they are asked for.
    files = [file for file in PACKAGE.rglob("*.py") if file.stem != "__init__"]
    named = {".".join(["bitrans_hf", *file.relative_to(PACKAGE).with_suffix("").parts]): file for file in files}
    graph = {module: {name for _, name in imports_of(file) if name in named} for module, file in named.items()}
    assert list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


@pytest.mark.parametrize("entry", HUB_FILES)
def test_a_file_for_the_hub_imports_only_what_the_hub_has(entry: str):
    file = HUB / f"{entry}.py"
    wrong = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            # transformers copies the files that its regular expressions find: `from .flat_name import x` only.
            if node.level != 1 or node.module is None or node.module not in HUB_FILES:
                wrong.append(f"line {node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            if any(name.split(".")[0] not in HUB_LIBRARIES for name in names):
                wrong.append(f"line {node.lineno}: {ast.unparse(node)}")
    assert not wrong


@pytest.mark.parametrize("entry", HUB_FILES)
def test_transformers_finds_the_same_files_to_copy_as_python_imports(entry: str):
    # transformers reads the text with regular expressions: a docstring line may fool it, `from . import x` escapes it.
    copied = {Path(name).stem for name in get_relative_import_files(HUB / f"{entry}.py")} - {entry}
    reached: set[str] = set()
    to_visit = [entry]
    while to_visit:
        imported = {name for _, name in imports_of(HUB / f"{to_visit.pop()}.py")}
        new = {name.rpartition(".")[2] for name in imported & HUB_MODULES} - reached
        reached |= new
        to_visit += new
    assert copied == reached


@pytest.mark.parametrize("entry", sorted(name for name in HUB_FILES if name.startswith(OPENED_BY_TRANSFORMERS)))
def test_a_file_that_transformers_opens_names_all_that_it_reaches(entry: str):
    # Versions before 5.23 copy out of a local folder what the opened file names, and nothing that those files name.
    file = HUB / f"{entry}.py"
    reached = {Path(name).stem for name in get_relative_import_files(file)} - {entry}
    assert reached == set(get_relative_imports(file)) - {entry}


def test_importing_the_package_prints_nothing_and_leaves_evaluate_alone(tmp_path: Path):
    code = "import sys, bitrans_hf, bitrans_hf.metrics; assert 'evaluate' not in sys.modules"
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["masks", "--help"], ["masks"], ["check", "FOLDER", "--quiet"], ["check", "no such folder"]],
    ids=" ".join,
)
def test_help_and_check_answer_without_importing_torch_transformers_or_datasets(arguments: list[str], tmp_path: Path):
    for name, color in (("cat", "red"), ("dog", "blue")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), color).save(tmp_path / "photos" / name / "a.png")
    words = [str(tmp_path / "photos") if word == "FOLDER" else word for word in arguments]
    code = f"""
import sys
from bitrans_hf.cli import main
try:
    main({words!r})
finally:
    print("heavy:", sorted({{"torch", "transformers", "datasets", "pandas", "pyarrow"}} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "heavy: []", result.stderr


def test_every_public_name_is_imported_when_it_is_used_and_typed_as_what_it_is():
    for package in (bitrans_hf, bitrans_hf.data):
        typed = {
            alias.name: f"{package.__name__}.{node.module}"
            for node in ast.walk(ast.parse(Path(package.__file__).read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom) and node.level and node.module not in {"lazy", "auto_classes"}
            for alias in node.names
        }
        assert sorted(typed) == sorted(package.__all__)
        for name, module in typed.items():
            assert getattr(package, name) is getattr(importlib.import_module(module), name)
        assert set(package.__all__) <= set(dir(package))
        with pytest.raises(AttributeError, match="has no attribute 'Dense'"):
            _ = package.Dense


@pytest.mark.parametrize(
    "imports",
    [
        "import bitrans_hf\nfrom transformers import AutoModel, pipeline",
        "from transformers import AutoModel, pipeline\nimport bitrans_hf",
        "from bitrans_hf.hub.pipeline_bitrans import PseudoMaskPipeline\nfrom transformers import AutoModel, pipeline",
    ],
    ids=["ours first", "transformers first", "one of our modules first"],
)
def test_the_auto_classes_know_the_models_in_whatever_order_the_libraries_are_imported(imports: str, tmp_path: Path):
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "modeling_bitrans.py").unlink()  # so that only the installed package can open the folder
    code = f"""
{imports}
model = AutoModel.from_pretrained({str(tmp_path)!r})
from bitrans_hf import BiTransImageProcessor, BiTransModel
assert type(model) is BiTransModel
BiTransImageProcessor().save_pretrained({str(tmp_path)!r})
print(type(pipeline("pseudo-mask-generation", model={str(tmp_path)!r})).__name__)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1:] == ["PseudoMaskPipeline"], result.stderr
