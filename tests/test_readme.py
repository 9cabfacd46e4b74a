"""Commands and code in the README and the pages it links to work."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import TINY, settings
from PIL import Image

from ftkit.recipe import load_recipe
from ftkit_export.runtime.predict import Classifier

ROOT = Path(__file__).parents[1]


def _blocks(kind: str, page: str = "README.md") -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def done(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every console command of the README has been run, in order."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(photos, folder / "photos")
    commands = [
        line[2:]
        for block in _blocks("console")
        for line in block.splitlines()
        if line.startswith("$ ")
    ]
    assert len(commands) >= 5
    for command in commands:
        words = command.split()
        if words[1] == "export":
            # Only saves two minutes
            words += [
                "--quick",
                "--set",
                "export.variants=fp32",
            ]
        if words[1] == "train":
            words += settings(*TINY)  # only saves time
        if words[0] == "ftkit":  # this environment was made by `pip install .`
            result = subprocess.run(
                [sys.executable, "-m", *words],
                cwd=folder,
                capture_output=True,
                text=True,
                check=False,
            )
            assert result.returncode == 0, f"{command}\n{result.stderr}"
    return folder


def test_the_commands_leave_a_verified_bundle(done: Path) -> None:
    tree = (ROOT / "docs" / "bundle.md").read_text().split("    bundle/\n")[1].split("\n\n")[0]
    promised = {
        word.rstrip("/")
        for line in tree.splitlines()
        for word in re.findall(r"^ {6}([\w./]+)", line)
    }
    assert promised <= {path.name for path in (done / "bundle").iterdir()}


def _transparent(photo: Path, target: Path) -> None:
    """The lower half is transparent black, which must not be visible."""
    pixels = np.asarray(Image.open(photo).convert("RGBA")).copy()
    pixels[len(pixels) // 2 :] = 0
    Image.fromarray(pixels).save(target, "PNG")


def _rotated(photo: Path, target: Path) -> None:
    """Stored rotated by 90 degrees, with the EXIF tag that turns it upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    half = Image.open(photo).convert("RGB").crop((0, 0, 300, 120))
    half.save(target, "JPEG", exif=exif)


@pytest.mark.parametrize("make", [_transparent, _rotated])
def test_the_plain_lines_answer_as_ftkit_does(
    done: Path, make: Callable[[Path, Path], None]
) -> None:
    """Regression: ignoring transparency and EXIF orientation changed 163 of 400 labels."""
    make(next(iter((done / "photos" / "mono-ok").iterdir())), done / "photo.jpg")
    code = next(block for block in _blocks("python", "docs/bundle.md") if "onnxruntime" in block)
    script = code + "print(json.dumps(probabilities[0].tolist()))"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=done, capture_output=True, text=True, check=True
    )
    label, values = result.stdout.splitlines()
    answer = Classifier(done / "bundle")(done / "photo.jpg")
    assert label == answer.label
    assert json.loads(values) == pytest.approx(list(answer.probabilities.values()), abs=1e-5)
    careless = np.asarray(Image.open(done / "photo.jpg").convert("RGB"))
    other = Classifier(done / "bundle").probabilities(careless)
    assert np.abs(other - list(answer.probabilities.values())).max() > 0.01, (
        "the picture tells them apart"
    )


def test_the_workflow_passes_a_release_that_did_not_change(done: Path) -> None:
    """Runs the workflow's own steps in bash, with a copy of the bundle as the baseline."""
    shutil.copytree(done / "bundle", done / "released" / "bundle")
    (job,) = yaml.safe_load(_blocks("yaml", "docs/regression-gate.md")[0])["jobs"].values()
    steps = [
        step["run"]
        for step in job["steps"]
        if "ftkit " in step.get("run", "") and "pip" not in step["run"]
    ]
    assert len(steps) == 3
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for step in (
        step.replace("ftkit bench bundle", "ftkit bench bundle --seconds 60") for step in steps
    ):
        result = subprocess.run(
            ["bash", "-e", "-c", step],
            cwd=done,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, f"{step}\n{result.stdout}{result.stderr}"
    assert (done / "bench.json").is_file()


def test_the_tests_of_their_own_run(done: Path) -> None:
    """Only the first test, with limits any machine meets; the second is the gate tested above."""
    code = next(
        block for block in _blocks("python", "docs/regression-gate.md") if "latency_budget" in block
    )
    (done / "test_model.py").write_text(re.sub(r"=(\d+)", r"=\g<1>0", code))
    command = [sys.executable, "-m", "pytest", "-q", "-k", "budgets", "test_model.py"]
    result = subprocess.run(command, cwd=done, capture_output=True, text=True, check=False)
    assert "1 passed, 1 deselected" in result.stdout, result.stdout


def test_the_recipe_loads(tmp_path: Path) -> None:
    code = next(block for block in _blocks("python", "docs/recipes.md") if "recipe = " in block)
    (tmp_path / "mine.py").write_text(code)
    assert load_recipe(str(tmp_path / "mine.py")).stages[1].train == "last:2"


def test_every_place_that_contributing_names_exists() -> None:
    tree = (
        (ROOT / "CONTRIBUTING.md")
        .read_text()
        .split("## Where things are")[1]
        .split("## How to add")[0]
    )
    base, named = ROOT, []
    for line in tree.splitlines():
        if top := re.match(r"^ {4}((?:recipes|toolkit|export)/\w+)/", line):
            base = ROOT / top[1]
            named.append(base)
        elif inner := re.match(r"^ {6}([\w.]+)/? ", line):
            named.append(base / inner[1])
    assert len(named) > 15
    assert [path for path in named if not path.exists()] == []
    packages = {path.parent for path in ROOT.glob("*/ftkit*/*/__init__.py")}
    assert packages <= set(named), "none is left out"


def test_every_link_of_the_readme_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / "README.md").read_text())
    assert len(links) > 15
    assert [link for link in links if not (ROOT / link).exists()] == []
