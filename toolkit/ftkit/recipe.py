"""Recipe: the complete training and export plan, as frozen dataclasses.

Each recipe file defines one name, `recipe`; variants use `dataclasses.replace`.

    recipe = load_recipe("lite0")                              # by entry-point name or by file

`resolve` turns a recipe into plain JSON for run.json and `restore` reads it back, so only `ftkit
train` executes a recipe file.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from ftkit_export.runtime.errors import FtkitError, choices
from ftkit_export.runtime.preprocess import INPUT_FORMATS, Preprocess, parse_frame
from ftkit_export.runtime.readout import TASKS
from ftkit_export.runtime.targets import TARGETS

OPTIMIZERS = ("adamw", "adam", "sgd")
SCHEDULES = ("constant", "cosine", "onecycle")
CACHES = ("auto", "off")
INITS = ("ridge", "random")
BALANCES = ("none", "loss", "sample")


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Random augmentation of training views, per sample; everything is off by default.

    - hflip, vflip: enable only if a flipped object keeps its class.
    - scale: smallest share of the canvas area that a crop may keep (1.0 = the evaluation crop).
    - rotate: largest angle in degrees, in either direction.
    - brightness, contrast, saturation: largest relative change, in either direction.
    - erase: probability that a rectangle is blanked (Zhong et al. 2020).
    - mixup, cutmix: alpha of the Beta distribution of the mixing share (Zhang et al. 2018, Yun et
      al. 2019). Both mix pixels, so stages with a feature cache do not apply them.
    """

    hflip: bool = False
    vflip: bool = False
    scale: float = 1.0
    rotate: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        _within(
            "augment",
            self,
            {
                "scale": (0.01, 1),
                "rotate": (0, 180),
                "brightness": (0, 1),
                "contrast": (0, 1),
                "saturation": (0, 1),
                "erase": (0, 1),
                "mixup": (0, 10),
                "cutmix": (0, 10),
            },
        )

    @property
    def mixes(self) -> bool:
        """Whether the pixels of two images are mixed."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training stage: what trains, for how long, and how fast.

    - train: "head", "last:N" (the last N of the backbone's blocks and everything after them),
      "first:N" (everything up to the Nth block, and the head), "all", or a regular expression
      searched for in module names ("attn|head").
    - lr: peak learning rate; "auto" (a cached head stage only) runs a learning-rate search and
      takes the best rate on val.
    - warmup: share of the steps over which the rate rises.
    - layer_decay: factor on the learning rate for each block further from the head.
    - balance: "loss" weights the classes in the loss, "sample" draws them equally often.
    - ema: decay of the averaged weights, 0 = off.
    - clip: largest gradient norm, 0 = off.
    - patience: epochs without a better val score before the stage stops and takes its best epoch; 0
      = run all epochs and take the last.
    - views: random views of each image that a cached stage draws from; view 0 is the evaluation
      crop.
    - batchnorm: whether BatchNorm statistics of the trained part are updated.
    - teacher: folder of a finished run to distil from: its predictions on the same views make up
      half of the loss (Hinton et al. 2015).
    - init: of the head, when the first stage trains it alone: "ridge" fits it to the frozen features
      in closed form, "random" leaves it as drawn.
    """

    train: str = "head"
    epochs: int = 5
    lr: float | Literal["auto"] = 1e-3
    optimizer: str = "adamw"
    schedule: str = "cosine"
    warmup: float = 0.0
    weight_decay: float = 0.0
    layer_decay: float = 1.0
    batch_size: int = 32
    label_smoothing: float = 0.0
    balance: str = "none"
    ema: float = 0.0
    clip: float = 0.0
    patience: int = 0
    views: int = 1
    batchnorm: bool = True
    cache: str = "auto"
    teacher: str | None = None
    init: str = "ridge"

    def __post_init__(self) -> None:
        _one_of("init", self.init, INITS)
        _one_of("optimizer", self.optimizer, OPTIMIZERS)
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("cache", self.cache, CACHES)
        _one_of("balance", self.balance, BALANCES)
        _within(
            "stage",
            self,
            {
                "epochs": (1, 100_000),
                "batch_size": (1, 1 << 20),
                "views": (1, 1000),
                "patience": (0, 100_000),
                "warmup": (0, 1),
                "weight_decay": (0, math.inf),
                "layer_decay": (0, 1),
                "label_smoothing": (0, 0.99),
                "ema": (0, 0.999999),
                "clip": (0, math.inf),
            },
        )

        if self.lr != "auto" and (isinstance(self.lr, str) or not 0 < self.lr < math.inf):
            raise FtkitError(
                f"stage.lr: expected a positive rate or auto, found {self.lr}. Try 1e-3"
            )
        if self.lr == "auto" and self.train != "head":
            raise FtkitError(
                f"stage.lr: expected a rate for train={self.train!r}, found auto. Try lr=1e-3"
            )


@dataclass(frozen=True, kw_only=True)
class Export:
    """Variants, gates and budgets of the exported file; a budget of None is not gated.

    - max_accuracy_drop: how far accuracy (or macro-AP) may fall below the framework's, as a share
      (0.01 = 1 point): fp32 on test; int8 and fp16 on val, with confidence.
    - max_error_rise: of regression, how much the mean absolute error may rise, as a share of it.
    - min_recall: share of each class's (or label's) test images that must be right, judged by the 95 %
      confidence interval of the least certain one.
    - p50_ms, p95_ms: latency of the image form in milliseconds, at one thread on this machine; must
      hold in each of several processes.
    - frame: "640x480", width and height of the camera's frames, which the file resizes and at which
      latency is measured and judged; None takes the size that 95 % of the data's own images do not
      exceed, by area.
    - size_mb: megabytes (1e6 bytes).
    - memory_mb: peak resident memory of a process that runs the file.
    - target: where the file will run (ftkit_export.runtime.targets); "auto" = this machine.
    - variants: "auto" = what the target offers besides fp32, chosen by measurement; "fp32" = none.
    - calibration: minmax, percentile or entropy, over calibration_images training images.
    - qat_epochs: epochs of quantization-aware training, as a last stage, if no int8 variant keeps
      the accuracy.
    - input_format: pixel format of the device's frames: rgb, bgr, grey or nv12.
    - golden: "images" keeps a few held-out images in the bundle, "synthetic" only ones computed by
      formula.
    """

    max_accuracy_drop: float = 0.01
    max_error_rise: float = 0.02
    min_recall: float | None = None
    p50_ms: float | None = None
    p95_ms: float | None = None
    frame: str | None = None
    size_mb: float | None = None
    memory_mb: float | None = None
    target: str = "auto"
    variants: str = "auto"
    calibration: str = "minmax"
    calibration_images: int = 128
    qat_epochs: int = 0
    input_format: str = "rgb"
    golden: str = "images"

    def __post_init__(self) -> None:
        _one_of("target", self.target, ("auto", *TARGETS), "export")
        _one_of("variants", self.variants, ("auto", "fp32"), "export")
        _one_of("calibration", self.calibration, ("minmax", "percentile", "entropy"), "export")
        _one_of("input_format", self.input_format, INPUT_FORMATS, "export")
        _one_of("golden", self.golden, ("images", "synthetic"), "export")
        _within(
            "export",
            self,
            {
                "max_accuracy_drop": (0, 1),
                "max_error_rise": (0, 1),
                "calibration_images": (8, 100_000),
                "qat_epochs": (0, 1000),
            },
        )

        if self.frame is not None:
            parse_frame(self.frame)
        if self.min_recall is not None:
            _within("export", self, {"min_recall": (0, 1)})
        for name in ("p50_ms", "p95_ms", "size_mb", "memory_mb"):
            if getattr(self, name) is not None:
                _within("export", self, {name: (0, math.inf)})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A complete plan: backbone, stages, augmentation and export.

    - task: "single-label", "multi-label" or "regression"; "auto" goes by the columns of a CSV.
    - preprocess: None takes the backbone's own.
    - cut: a block's name: the network ends behind it; several with + between give the head their
      features together; "": the whole network. pooling: of those features over space: "mean", or
      "mean+max" with the maximum beside it.
    - weights: "pretrained", "none", or a file.
    - precision: share of accepted answers that should be right; low-confidence answers are withheld
      (threshold from val).
    - thresholds: of multi-label, "f1" takes each label's of the highest F1, "precision" the lowest from
      which on `precision` of the images given a label have it.
    - coverage: share of the true values that the intervals of regression should hold.
    - folds: where the data names no val split, decide on out-of-fold predictions of so many folds;
      0: cut a val split. "auto": four, or a val split where no folds can be made.
    """

    name: str
    backbone: str
    stages: tuple[Stage, ...]
    task: str = "auto"
    weights: str = "pretrained"
    preprocess: Preprocess | None = None
    cut: str = ""
    pooling: str = "mean"
    precision: float = 0.95
    thresholds: str = "f1"
    coverage: float = 0.9
    folds: int | Literal["auto"] = "auto"
    augment: Augment = field(default_factory=Augment)
    export: Export = field(default_factory=Export)

    def __post_init__(self) -> None:
        if not self.stages:
            raise FtkitError(
                "recipe.stages: expected at least one stage, found none. Try stages=(Stage(),)"
            )
        _one_of("task", self.task, ("auto", *TASKS), "recipe")
        _one_of("thresholds", self.thresholds, ("f1", "precision"), "recipe")
        _one_of("pooling", self.pooling, ("mean", "mean+max"), "recipe")
        if self.pooling != "mean" and not self.cut:
            raise FtkitError(
                f"recipe.pooling: expected mean without a cut, found {self.pooling}. Try --set cut=BLOCK"
            )
        _within("recipe", self, {"precision": (0, 1), "coverage": (0.5, 0.999)})
        if self.folds not in ("auto", 0) and not 2 <= int(self.folds) <= 100:
            raise FtkitError(
                f"recipe.folds: expected auto, 0, or 2 to 100, found {self.folds}. Try auto"
            )

    @property
    def starts_head(self) -> bool:
        """Whether training starts from a head in closed form."""
        return self.stages[0].train == "head" and self.stages[0].init == "ridge"

    @property
    def patient(self) -> bool:
        """Whether a stage stops early, for which it needs a val split."""
        return any(stage.patience for stage in self.stages)


def _one_of(name: str, value: str, allowed: Sequence[str], where: str = "stage") -> None:
    if value not in allowed:
        raise FtkitError(f"{where}.{name}: expected a known value, {choices(value, allowed)}")


def _within(where: str, item: object, bounds: Mapping[str, tuple[float, float]]) -> None:
    for name, (low, high) in bounds.items():
        value = getattr(item, name)
        if not low <= value <= high:
            limits = (
                f"at least {low}" if high == math.inf or high >= 100_000 else f"{low} to {high}"
            )
            raise FtkitError(
                f"{where}.{name}: expected {limits}, found {value}. Try a value in that range"
            )


def names() -> list[str]:
    """Names of the installed recipes, from the entry-point group `ftkit.recipes`."""
    return sorted(point.name for point in metadata.entry_points(group="ftkit.recipes"))


def load_recipe(name: str) -> Recipe:
    """Load a recipe by entry-point name or file path, or the resolved one of a run.json or a search.

    Raises FtkitError with the choices, or with the reason why it cannot be imported.
    """
    if (Path(name) / "recipe.json").is_file():  # the folder of a search
        return _of_json(Path(name) / "recipe.json")
    if name.endswith(".json"):
        return _of_json(Path(name))

    module = load_module(name)
    recipe = getattr(module, "recipe", None)
    if not isinstance(recipe, Recipe):
        raise FtkitError(
            f"recipe {name}: expected a name `recipe` of type Recipe in it, found none. Try ftkit recipes"
        )

    return recipe


def _of_json(path: Path) -> Recipe:
    """The recipe in a run.json, or in the recipe.json of a report."""
    try:
        data = json.loads(path.read_text())
        return restore(data.get("recipe", data) if isinstance(data, dict) else {})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise FtkitError(
            f"recipe {path}: expected a run.json or a report's recipe.json, found {error}. Check the path"
        ) from None


def load_module(name: str) -> types.ModuleType:
    """Import the module that holds a recipe (its docstring reports what was measured)."""
    try:
        return _import_file(Path(name)) if name.endswith(".py") else _import_entry_point(name)
    except FtkitError:
        raise
    except Exception as error:  # a recipe file may raise anything
        raise FtkitError(
            f"recipe {name}: expected a module that imports, found {type(error).__name__}: {error}. Correct the file"
        ) from error


def _import_file(path: Path) -> types.ModuleType:
    if not path.is_file():
        raise FtkitError(
            f"recipe {path}: expected a file, found none. Check the path, or try `ftkit recipes`"
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader  # a .py file always has both
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _import_entry_point(name: str) -> types.ModuleType:
    for point in metadata.entry_points(group="ftkit.recipes"):
        if point.name == name:
            module: types.ModuleType = point.load()
            return module
    raise FtkitError(f"recipe: expected a known name or a .py file, {choices(name, names())}")


def resolve(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain JSON data."""
    return dataclasses.asdict(recipe)


def as_python(recipe: Recipe) -> str:
    """The recipe as the source of a recipe file, without the fields that have their default."""
    classes: dict[str, set[str]] = {}

    def written(value: Any, indent: str) -> str:
        inner = indent + "    "
        if dataclasses.is_dataclass(value):
            kind = type(value)
            classes.setdefault(kind.__module__, set()).add(kind.__name__)
            fields = [
                f"{inner}{each.name}={written(getattr(value, each.name), inner)},\n"
                for each in dataclasses.fields(value)
                if getattr(value, each.name) != _default(each)
            ]
            return (
                f"{kind.__name__}(\n{''.join(fields)}{indent})" if fields else f"{kind.__name__}()"
            )
        if isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
            items = "".join(f"{inner}{written(each, inner)},\n" for each in value)
            return f"(\n{items}{indent})"
        return repr(value)

    body = f"recipe = {written(recipe, '')}\n"
    imports = "".join(
        f"from {module} import {', '.join(sorted(names))}\n"
        for module, names in sorted(classes.items())
    )
    return f"{imports}\n{body}"


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def restore(data: dict[str, Any]) -> Recipe:
    """Rebuild a recipe from `resolve`'s data.

    Raises FtkitError if fields are unknown, as when a newer ftkit wrote them.
    """
    try:
        return Recipe(
            **{
                **data,
                "stages": tuple(Stage(**stage) for stage in data["stages"]),
                "preprocess": data["preprocess"] and restore_preprocess(data["preprocess"]),
                "augment": Augment(**data["augment"]),
                "export": Export(**data["export"]),
            }
        )
    except (TypeError, KeyError) as error:
        raise FtkitError(
            f"run.json: expected a recipe of this ftkit, found {error}. Try the ftkit that made it"
        ) from None


def restore_preprocess(data: dict[str, Any]) -> Preprocess:
    """Rebuild a Preprocess from JSON, where tuples became lists."""
    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in data.items()
    }
    return Preprocess(**fields)
