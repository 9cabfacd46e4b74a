"""Recipes load, can be overridden and survive JSON; every mistake lists the valid choices."""

import json
from pathlib import Path

import pytest
from conftest import ftkit

from ftkit.overrides import override
from ftkit.recipe import Recipe, load_recipe, names, resolve, restore


@pytest.mark.parametrize("name", names())
def test_every_recipe_loads_and_survives_json(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert restore(json.loads(json.dumps(resolve(recipe)))) == recipe


def test_the_shipped_recipes_are_there() -> None:
    assert {"lite0", "gentle", "staged_resnet50", "mobilenet_v3_small", "resnet18"} <= set(names())


def test_settings_reach_every_level() -> None:
    recipe = override(
        load_recipe("lite0"),
        [
            "backbone=resnet18",
            "stages.1.lr=1e-4",
            "export.p95_ms=8",
            "augment.vflip=false",
            "preprocess.mean=1,2,3",
            "export.max_accuracy_drop=0.02",
            "stages.0.views=2",
        ],
    )
    assert (recipe.backbone, recipe.stages[1].lr, recipe.export.p95_ms) == ("resnet18", 1e-4, 8.0)
    assert recipe.augment.vflip is False
    assert recipe.preprocess is not None
    assert recipe.preprocess.mean == (1.0, 2.0, 3.0)
    assert (recipe.export.max_accuracy_drop, recipe.stages[0].views) == (0.02, 2)
    assert recipe.stages[0].lr == load_recipe("lite0").stages[0].lr
    assert override(recipe, ["export.p95_ms=none"]).export.p95_ms is None


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (
            "stage.0.lr=1",
            "found 'stage'. Try --set stages.0.lr=1",
        ),
        (
            "stages.0.learning_rate=1",
            "Try lr; there are: balance, batch_size, batchnorm, cache, clip, ema, epochs, init, label_smoothing",
        ),
        ("stages.7.lr=1", "found '7'. Try one of: 0, 1"),
        ("stages.0.lr=fast", "expected float or auto, found 'fast'"),
        ("stages.0.optimizer=lion", "found 'lion'. Try one of: adam, adamw, sgd"),
        ("stages.0.epochs=0", "expected at least 1, found 0"),
        ("stages.1.lr=auto", "expected a rate for train='last:2', found auto"),
        ("stages.0.clip=nan", "stage.clip: expected at least 0, found nan"),
        ("stages.0.teacher=/nowhere", "/nowhere: expected a run"),
        ("augment.mixup=-1", "augment.mixup: expected 0 to 10, found -1.0"),
        ("stages.0=1", "expected a field after the index"),
        ("backbone", "found no '='"),
        ("backbone=nonsuch", "expected a timm or torchvision model, found 'nonsuch'"),
        (
            "stages.0.train=last:99",
            "expected head, all, last:1 to last:7, first:1 to first:7, or a pattern",
        ),
    ],
)
def test_a_typo_is_answered_with_the_choices(
    setting: str, said: str, photos: Path, tmp_path: Path
) -> None:
    result = ftkit("train", photos, "--out", tmp_path / "run", "--set", setting)
    assert (result.exit_code, said in result.stderr) == (2, True), result.stderr
    assert not (tmp_path / "run").exists()


def test_an_unknown_recipe_is_answered_with_the_names(photos: Path) -> None:
    result = ftkit("train", photos, "--recipe", "lite9")
    assert result.exit_code == 2
    assert "found 'lite9'. Try lite2; there are: efficientnet_b0, gentle, lite0" in result.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import nonsuch_module", "found ModuleNotFoundError: No module named 'nonsuch_module'"),
        ("recipe = 3", "expected a name `recipe` of type Recipe"),
        ("def (", "found SyntaxError"),
    ],
)
def test_a_recipe_file_that_does_not_import_says_why(
    text: str, said: str, photos: Path, tmp_path: Path
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text)
    result = ftkit("train", photos, "--recipe", path)
    assert (result.exit_code, said in result.stderr) == (2, True), result.stderr


def test_a_recipe_file_is_loaded_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from dataclasses import replace\nfrom ftkit_recipes.lite0 import recipe as base\n"
        "recipe = replace(base, name='mine')\n"
    )
    recipe = load_recipe(str(path))
    assert isinstance(recipe, Recipe)
    assert recipe.name == "mine"


def test_recipes_prints_the_plan_and_the_blocks() -> None:
    assert "lite0 " in ftkit("recipes").stdout
    shown = ftkit("recipes", "staged_resnet50").stdout
    assert "layer1 layer2 layer3 layer4" in shown
    assert '"lr": 0.0001' in shown
