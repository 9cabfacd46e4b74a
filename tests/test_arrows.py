"""Arrows run one way: recipes -> toolkit -> export."""

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
