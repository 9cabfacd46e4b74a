"""The shipped recipes match their descriptions."""

from pathlib import Path

import pytest
from conftest import ftkit, settings

from ftkit.recipe import load_module, load_recipe, names


@pytest.mark.parametrize("name", names())
def test_a_recipe_says_its_command_and_what_was_measured(name: str) -> None:
    text = load_module(name).__doc__ or ""
    data = "photos" if load_module(name).recipe.task == "auto" else "photos.csv"
    assert f"ftkit train {data}{'' if name == 'lite0' else f' --recipe {name}'}" in text
    assert any(word in text for word in ("unmeasured", "bench/README.md", "2-core"))


def test_gentle_is_a_frozen_base_and_a_new_head_with_adam_at_1e_4_for_5_epochs() -> None:
    (stage,) = load_recipe("gentle").stages
    assert (stage.train, stage.optimizer, stage.lr, stage.epochs, stage.schedule) == (
        "head",
        "adam",
        1e-4,
        5,
        "constant",
    )


def test_staged_resnet50_is_5_epochs_of_head_then_10_of_two_blocks_at_1e_4() -> None:
    recipe = load_recipe("staged_resnet50")
    assert recipe.backbone == "resnet50"
    assert [(stage.train, stage.epochs) for stage in recipe.stages] == [("head", 5), ("last:2", 10)]
    assert recipe.stages[1].lr == 1e-4


def test_the_staged_plan_runs_offline_on_another_backbone(photos: Path, tmp_path: Path) -> None:
    small = ("backbone=efficientnet_lite0", "preprocess.size=64", "preprocess.resize=64")
    result = ftkit(
        "train", photos, "--recipe", "staged_resnet50", "--out", tmp_path / "run", *settings(*small)
    )
    assert result.exit_code == 0, result.output
    epochs = [
        line.split()[:2]
        for line in result.stdout.splitlines()
        if line[:6] in ("head  ", "last:2") and "/" in line
    ]
    assert epochs[:15] == [["head", f"{n}/5"] for n in range(1, 6)] + [
        ["last:2", f"{n}/10"] for n in range(1, 11)
    ]
