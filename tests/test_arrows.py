"""Import rules: recipes -> toolkit -> export, and a fixed package order inside each."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "export/ftkit_export": {"ftkit_export"},
    "toolkit/ftkit": {"ftkit", "ftkit_export"},
    "recipes/ftkit_recipes": {"ftkit", "ftkit_export", "ftkit_recipes"},
}

# Top layer first; a package imports only from lower layers and from itself.
FLOORS = {
    "toolkit/ftkit": (
        ("__main__",),
        ("cli",),
        ("__init__",),
        ("api",),
        ("searching", "field"),
        ("exporting",),
        ("training",),
        ("report", "evaluation"),
        ("tasks",),
        ("benchmark", "data", "overrides"),
        ("models", "options"),
        ("recipe", "utils"),
    ),
    "export/ftkit_export": (
        ("device",),
        ("bundle",),
        ("proof",),
        ("conversion",),
        ("runtime",),
        ("__init__",),
    ),
}


def _imported(tree: ast.AST, package: str) -> set[str]:
    """Folders and modules of `package` that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package:
            parts = (node.module or "").split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            parts = [alias.name.split(".") for alias in node.names]
            found |= {each[1] for each in parts if each[0] == package and len(each) > 1}
    return found


@pytest.mark.parametrize("folder", FLOORS)
def test_no_import_runs_upward(folder: str) -> None:
    floor = {name: number for number, names in enumerate(FLOORS[folder]) for name in names}
    package = folder.split("/")[1]
    wrong = []
    for path in (ROOT / folder).rglob("*.py"):
        own = path.relative_to(ROOT / folder).parts[0].removesuffix(".py")
        assert own in floor, f"{path}: on no floor"
        for name in _imported(ast.parse(path.read_text()), package) & set(floor) - {own}:
            if floor[name] <= floor[own]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []


@pytest.mark.parametrize("folder", ALLOWED)
def test_a_package_imports_only_what_lies_below_it(folder: str) -> None:
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                names = [node.module or ""]
            own = {name.split(".")[0] for name in names if name.split(".")[0].startswith("ftkit")}
            assert own <= ALLOWED[folder], f"{path} imports {own - ALLOWED[folder]}"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("ftkit.cli.main", ("torch", "onnxruntime", "onnx", "numpy")),
        ("ftkit_export.runtime.predict", ("torch", "onnx", "onnxruntime")),
        ("ftkit_export.runtime.verify", ("torch", "onnx", "onnxruntime")),
    ],
)
def test_light_modules_import_nothing_heavy(module: str, absent: tuple[str, ...]) -> None:
    code = f"import {module}, sys; print([name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
