"""The README tells the truth: its commands run, its code works."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import TINY, settings

from ftkit.recipe import load

README = (Path(__file__).parents[1] / "README.md").read_text()


def _blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def done(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every console command of the README has run, in order."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(photos, folder / "photos")
    commands = [line[2:] for block in _blocks("console") for line in block.splitlines() if line.startswith("$ ")]
    assert len(commands) >= 5
    for command in commands:
        words = command.split()
        if words[1] == "export":
            words += ["--quick", "--set", "export.variants=fp32"]  # differs in time only: two minutes
        if words[1] == "train":
            words += settings(*TINY)  # likewise
        if words[0] == "ftkit":  # `pip install .` is how this very environment was made
            result = subprocess.run(
                [sys.executable, "-m", *words], cwd=folder, capture_output=True, text=True, check=False
            )
            assert result.returncode == 0, f"{command}\n{result.stderr}"
    return folder


def test_the_commands_leave_a_verified_bundle(done: Path) -> None:
    tree = README.split("    bundle/\n")[1].split("\n\n")[0]
    promised = {word.rstrip("/") for line in tree.splitlines() for word in re.findall(r"^ {6}([\w./]+)", line)}
    assert promised <= {path.name for path in (done / "bundle").iterdir()}


def test_the_five_lines_classify(done: Path) -> None:
    photo = next(iter((done / "photos" / "mono-ok").iterdir()))
    shutil.copy(photo, done / "photo.jpg")
    code = next(block for block in _blocks("python") if "onnxruntime" in block)
    result = subprocess.run([sys.executable, "-c", code], cwd=done, capture_output=True, text=True, check=True)
    assert result.stdout.strip() in {"mono-ok", "mono-defect", "poly-ok", "poly-defect"}


def test_the_workflow_passes_a_release_that_did_not_change(done: Path) -> None:
    """Its own steps, in the shell that GitHub runs them in; the second bundle is the first."""
    shutil.copytree(done / "bundle", done / "released" / "bundle")
    (job,) = yaml.safe_load(_blocks("yaml")[0])["jobs"].values()
    steps = [step["run"] for step in job["steps"] if step.get("run", "").startswith("ftkit ")]
    assert len(steps) == 3
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for step in (step.replace("ftkit bench bundle", "ftkit bench bundle --seconds 60") for step in steps):
        result = subprocess.run(["bash", "-e", "-c", step], cwd=done, env={**os.environ, "PATH": path},
                                capture_output=True, text=True, check=False)  # fmt: skip
        assert result.returncode == 0, f"{step}\n{result.stdout}{result.stderr}"
    assert (done / "bench.json").is_file()


def test_the_tests_of_their_own_run(done: Path) -> None:
    """The first of them; the second is the workflow's gate again."""
    (done / "test_model.py").write_text(next(block for block in _blocks("python") if "latency_budget" in block))
    command = [sys.executable, "-m", "pytest", "-q", "-k", "fast", "test_model.py"]
    result = subprocess.run(command, cwd=done, capture_output=True, text=True, check=False)
    assert "1 passed, 1 deselected" in result.stdout, result.stdout


def test_the_recipe_loads(tmp_path: Path) -> None:
    code = next(block for block in _blocks("python") if "Recipe(" in block)
    (tmp_path / "mine.py").write_text(code)
    assert load(str(tmp_path / "mine.py")).stages[1].train == "last:2"


def test_every_file_of_the_tree_exists() -> None:
    root = Path(__file__).parents[1]
    tree = README.split("## The tree")[1]
    found = {path.name for path in root.rglob("*.py") if ".venv" not in path.parts}
    named = {name.split("/")[-1] for name in re.findall(r"[\w/]+\.py", tree)}
    assert len(named) > 20
    assert named <= found
