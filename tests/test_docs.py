"""Code examples in docs/ parse: shell, ftkit options, Python, YAML."""

import json
import re
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import yaml

from ftkit.cli.main import main
from ftkit.utils.distributed import FRESH_STORE
from ftkit_export.runtime import errors

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
PAGE = (ROOT / "docs" / "several-gpus.md").read_text()


def _blocks(kind: str, page: str = PAGE) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL)


def _accepted(words: list[str]) -> None:
    """Parse `ftkit train ...` with click, without running it."""
    command = main.commands[words[0]]
    command.make_context(
        words[0], [word for word in words[1:] if word != "\n"], parent=click.Context(main)
    )


def _torchrun(words: list[str]) -> None:
    from torch.distributed.run import parse_args

    options = parse_args([re.sub(r"\$\{?\w+\}?", "2", word) for word in words])
    assert options.module
    assert options.training_script == "ftkit"
    _accepted(options.training_script_args)


def test_every_torchrun_and_ftkit_command_is_accepted() -> None:
    seen = []
    for block in _blocks("sh"):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["ftkit"]:
                _accepted(words[1:])
            elif "torchrun" in words:
                _torchrun(words[words.index("torchrun") + 1 :])
            else:
                continue
            seen.append(words[0])
    assert seen == ["ftkit", "torchrun", FRESH_STORE, "srun"], "the elastic example has it"


def test_the_pytorchjob_mounts_what_it_declares_and_runs_what_there_is() -> None:
    (block,) = _blocks("yaml")
    job = yaml.safe_load(block)
    assert (job["kind"], job["apiVersion"]) == ("PyTorchJob", "kubeflow.org/v1")
    pod = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch", "the operator looks for this very name"
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    assert container["command"][0] == "torchrun"
    assert dict(zip(("name", "value"), FRESH_STORE.split("="), strict=True)) in container["env"]
    _torchrun(container["command"][1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_every_example_is_one_that_runs(page: Path) -> None:
    """bash parses the shell, click its ftkit lines; Python compiles; YAML loads."""
    text = page.read_text()
    for block in _blocks("sh", text):
        parsed = subprocess.run(
            ["bash", "-n"], input=block, text=True, capture_output=True, check=False
        )
        assert parsed.returncode == 0, f"{block}\n{parsed.stderr}"
        for line in re.sub(r"\\\n", " ", block).splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["ftkit"]:
                stop = next(
                    (i for i, word in enumerate(words) if word in ("|", "||", "&&", ">", "<", ";")),
                    len(words),
                )
                _accepted(words[1:stop])
    for block in _blocks("python", text):
        compile(block, str(page), "exec")
    for block in _blocks("yaml", text):
        assert isinstance(yaml.safe_load(block), dict), block


def test_every_error_class_and_exit_code_is_documented() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.FtkitError)
    ]
    assert len(kinds) > 4
    assert [kind.__name__ for kind in kinds if f"`{kind.__name__}`" not in page] == []
    table = dict(re.findall(r"^\| ([\d, ]+) \| (.+) \|$", page, re.MULTILINE))
    assert {"0", "1", "2", "3", "130, 143"} <= set(table)
    assert {str(kind.exit_code) for kind in kinds} <= set(table)


def test_the_readers_of_metrics_hand_over_every_figure(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within five lines; MLflow and Weights & Biases are mocked, and their calls are checked."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    got: list[dict[str, Any]] = []

    class Opened:
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    mlflow = SimpleNamespace(
        start_run=lambda run_name: Opened(), log_metrics=lambda values, step: got.append(values)
    )
    wandb = SimpleNamespace(init=lambda project: Opened(), log=got.append)
    monkeypatch.chdir(run.parent)
    (run.parent / "run").symlink_to(run)
    page = (ROOT / "docs" / "python.md").read_text()
    for name, module, keys in (
        ("mlflow", mlflow, {"loss", "lr", "val_accuracy"}),
        ("wandb", wandb, set(lines[0])),
    ):
        (code,) = (block for block in _blocks("python", page) if name in block)
        body = code.split("\n\n", 1)[1]
        assert len(body.strip().splitlines()) <= 5
        got.clear()
        exec(body, {"json": json, name: module})
        assert [values["loss"] for values in got] == [line["loss"] for line in lines]
        assert keys <= set(got[0])
