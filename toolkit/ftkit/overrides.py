"""Apply --set: change recipe fields by name; a typo raises an error that lists the choices.

recipe = override(recipe, ["stages.1.lr=1e-4", "backbone=resnet18"])
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ftkit.recipe import Augment, Export, Recipe, Stage
from ftkit.utils import console
from ftkit_export.runtime.errors import FtkitError, choices, nearest
from ftkit_export.runtime.preprocess import Preprocess


def override(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """Apply "a.b=c" settings in order.

    Settings of preprocess are applied last and together, since they constrain each other, on top of
    the recipe's own or, without one, the backbone's. Raises FtkitError with the field's choices for
    a typo.
    """
    pixels = {}
    for setting in settings:
        path, equals, text = (part.strip() for part in setting.partition("="))
        if not equals:
            raise FtkitError(
                f"--set {setting}: expected NAME=VALUE, found no '='. Try --set stages.0.lr=1e-3"
            )
        if path.startswith("preprocess."):
            pixels[path.removeprefix("preprocess.")] = (text, setting)
        else:
            recipe = _replace(recipe, path.split("."), text, setting)

    if not pixels:
        return recipe

    parsed = {}
    hints = typing.get_type_hints(Preprocess)

    for name, (text, setting) in pixels.items():
        if name not in hints:
            raise FtkitError(
                f"--set {setting}: expected a field of preprocess, {choices(name, hints)}"
            )
        parsed[name] = _parse(text, hints[name], setting)

    alone = {name: value for name, value in parsed.items() if name not in ("size", "resize")}
    # Report a wrong value before the slow build of the backbone that supplies the other fields
    Preprocess(**alone)

    preprocess = _preprocess(recipe)
    if "size" in parsed and "resize" not in parsed and preprocess.size:
        # With a canvas of the old size, the network would see only its centre.
        parsed["resize"] = preprocess.at(parsed["size"]).resize
        if parsed["resize"] != preprocess.resize:
            console.say(
                f"preprocess.resize: {parsed['resize']}, in proportion to the size (--set sets another)"
            )

    return dataclasses.replace(recipe, preprocess=dataclasses.replace(preprocess, **parsed))


def _preprocess(recipe: Recipe) -> Preprocess:
    if recipe.preprocess:
        return recipe.preprocess
    from ftkit.models.backbones import build  # imports torch, which most settings do not need

    return build(recipe.backbone, 2, "none").preprocess


def _replace(node: Any, path: Sequence[str], text: str, setting: str) -> Any:
    name = path[0]
    rest = path[1:]

    if isinstance(node, tuple):
        if not name.isdigit() or int(name) >= len(node):
            raise FtkitError(
                f"--set {setting}: expected an index, {choices(name, range(len(node)))}"
            )
        at = int(name)
        value = _replace(node[at], rest, text, setting) if rest else _missing(setting)
        return (*node[:at], value, *node[at + 1 :])

    hints = typing.get_type_hints(type(node))
    if name not in hints:
        raise FtkitError(
            f"--set {setting}: expected a field, {_fields(name, path, node, hints, text)}"
        )
    if not rest:
        return dataclasses.replace(node, **{name: _parse(text, hints[name], setting)})

    child = getattr(node, name)
    if not (dataclasses.is_dataclass(child) or isinstance(child, tuple)):
        raise FtkitError(
            f"--set {setting}: expected {name} to have fields, found a plain value. Try {name}=VALUE"
        )

    return dataclasses.replace(node, **{name: _replace(child, rest, text, setting)})


def _fields(name: str, path: Sequence[str], node: Any, hints: Mapping[str, Any], text: str) -> str:
    """End of the error message: the same field elsewhere in the recipe, or similar names."""
    leaf = path[-1]
    for place, fields in _places(node).items():
        if leaf in fields or nearest(leaf, fields):
            field = leaf if leaf in fields else nearest(leaf, fields)
            return f"found {name!r}. Try --set {place}{field}={text}"
    return choices(name, hints)


def _places(node: Any) -> dict[str, list[str]]:
    """Prefix -> field names below it, for a Recipe; empty for any other node."""
    if not isinstance(node, Recipe):
        return {}
    kinds = {"export.": Export, "stages.0.": Stage, "preprocess.": Preprocess, "augment.": Augment}
    return {
        place: [field.name for field in dataclasses.fields(kind)] for place, kind in kinds.items()
    }


def _missing(setting: str) -> Any:
    raise FtkitError(
        f"--set {setting}: expected a field after the index, found none. Try --set stages.0.lr=1e-3"
    )


def _parse(text: str, hint: Any, setting: str) -> Any:
    kinds = (hint,) if typing.get_origin(hint) is tuple else typing.get_args(hint) or (hint,)
    for kind in sorted(kinds, key=lambda kind: kind is str):  # str last: it accepts any text
        try:
            return _as_kind(text, kind)
        except (ValueError, KeyError):
            continue

    wanted = " or ".join(_word(kind) for kind in kinds)
    raise FtkitError(
        f"--set {setting}: expected {wanted}, found {text!r}. Try `ftkit recipes NAME` for its fields"
    )


def _word(kind: Any) -> str:
    if kind is types.NoneType:
        return "none"
    if typing.get_origin(kind) is Literal:
        return " or ".join(typing.get_args(kind))

    if typing.get_origin(kind) is tuple:
        return (
            "three numbers such as 127,127,127"
            if typing.get_args(kind)[0] is float
            else "a field, e.g. stages.0.lr"
        )

    return str(kind) if typing.get_origin(kind) else str(kind.__name__)


def _as_kind(text: str, kind: Any) -> Any:
    """Parse `text` as one type; raises ValueError or KeyError if it does not fit."""
    if kind is types.NoneType:
        return {"none": None}[text.lower()]
    if kind is bool:
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    if kind in (int, float):
        return kind(text)
    if kind is str:
        return text
    if typing.get_origin(kind) is Literal:
        return {choice: choice for choice in typing.get_args(kind)}[text]
    if Ellipsis in typing.get_args(kind):  # stages
        raise ValueError(text)

    values = tuple(float(part) for part in text.strip("()[]").split(","))
    if len(values) != len(typing.get_args(kind)):
        raise ValueError(text)
    return values
