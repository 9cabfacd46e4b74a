"""The examples in docs/ are what their readers' tools would accept."""

import re
import shlex
import subprocess
from pathlib import Path

import click
import yaml

from ftkit.cli import main
from ftkit.distributed import FRESH_STORE

PAGE = (Path(__file__).parents[1] / "docs" / "several-gpus.md").read_text()


def _blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)


def _accepted(words: list[str]) -> None:
    """`ftkit train ...` as click reads it, without running it."""
    command = main.commands[words[0]]
    command.make_context(words[0], [word for word in words[1:] if word != "\n"], parent=click.Context(main))


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
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert container["command"][0] == "torchrun"
    assert dict(zip(("name", "value"), FRESH_STORE.split("="), strict=True)) in container["env"]
    _torchrun(container["command"][1:])
