"""Does `ftkit bench` name the cause of a slowdown, and none where there is none? Throttling told from both?

    python bench/why.py BUNDLE --what planted      # 20 planted slowdowns: is the guilty one named first?
    python bench/why.py BUNDLE --what equal        # 50 comparisons of a file with itself: is any blamed?
    python bench/why.py BUNDLE --what sustained    # 20 courses: a cap on processor time, or a slower file

BUNDLE: one with an int8 variant, made by `ftkit export`.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ftkit_export.proof.attribution import Explanation, explain
from ftkit_export.proof.endurance import run_on
from ftkit_export.runtime.latency import Condition, machine

EQUAL = 50
COURSES = 20
COURSE_SECONDS = 20.0
BEGINS = 8.0  # seconds until the cap
NEAR_S = (
    2.5  # by which throttling may be found sooner or later; the process takes up to one to begin
)


def _node(model: onnx.ModelProto, weights: str) -> onnx.NodeProto:
    return next(
        node
        for node in model.graph.node
        if node.op_type == "Conv" and node.input[1].startswith(f"{weights}.")
    )


def _after(
    model: onnx.ModelProto, node: onnx.NodeProto, make: Callable[..., list[onnx.NodeProto]]
) -> None:
    """Put nodes behind a node. make: (name of what goes in, name of what comes out) -> nodes."""
    value = node.output[0]
    node.output[0] = f"{value}/plain"
    at = list(model.graph.node).index(node) + 1
    for offset, added in enumerate(make(node.output[0], value)):
        model.graph.node.insert(at + offset, added)


def casts(*places: str) -> Callable[[onnx.ModelProto], None]:
    """Answers of these convolutions go through float16 and back."""

    def change(model: onnx.ModelProto) -> None:
        for place in places:
            _after(
                model,
                _node(model, place),
                lambda source, out: [
                    helper.make_node("Cast", [source], [f"{out}/half"], to=TensorProto.FLOAT16),
                    helper.make_node("Cast", [f"{out}/half"], [out], to=TensorProto.FLOAT),
                ],
            )

    return change


def unfused(place: str) -> Callable[[onnx.ModelProto], None]:
    """A convolution's answer is an output, so that its activation cannot be fused into it."""

    def change(model: onnx.ModelProto) -> None:
        value = _node(model, place).output[0]
        model.graph.output.append(helper.make_tensor_value_info(value, TensorProto.FLOAT, None))

    return change


def transposed(place: str) -> Callable[[onnx.ModelProto], None]:
    """An answer goes through another layout and back."""

    def change(model: onnx.ModelProto) -> None:
        _after(
            model,
            _node(model, place),
            lambda source, out: [
                helper.make_node("Transpose", [source], [f"{out}/t"], perm=[0, 2, 3, 1]),
                helper.make_node(
                    "Sqrt", [f"{out}/t"], [f"{out}/r"]
                ),  # else the pair is optimised away
                helper.make_node("Transpose", [f"{out}/r"], [out], perm=[0, 3, 1, 2]),
            ],
        )

    return change


def _array(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(item for item in model.graph.initializer if item.name == name)


def wider(block: str, factor: float) -> Callable[[onnx.ModelProto], None]:
    """An inverted residual block with more channels inside."""

    def change(model: onnx.ModelProto) -> None:
        inner = 0
        for layer, axis in (("conv_pw", 0), ("conv_dw", 0), ("conv_pwl", 1)):
            node = _node(model, f"{block}.{layer}")
            for name in node.input[1:]:
                item = _array(model, name)
                values = numpy_helper.to_array(item)
                if layer == "conv_pwl" and values.ndim == 1:
                    continue
                grown = round(values.shape[axis] * factor / 8) * 8
                inner = grown
                rows = np.arange(grown) % values.shape[axis]
                item.CopyFrom(numpy_helper.from_array(np.take(values, rows, axis), name))
            for attribute in node.attribute:
                if attribute.name == "group" and attribute.i > 1:
                    attribute.i = inner

    return change


def larger_kernel(place: str) -> Callable[[onnx.ModelProto], None]:
    """A depthwise convolution with a border of zeros around its kernel."""

    def change(model: onnx.ModelProto) -> None:
        node = _node(model, place)
        item = _array(model, node.input[1])
        values = numpy_helper.to_array(item)
        grown = np.pad(values, ((0, 0), (0, 0), (2, 2), (2, 2)))
        item.CopyFrom(numpy_helper.from_array(grown, item.name))
        for attribute in node.attribute:
            if attribute.name == "kernel_shape":
                attribute.ints[:] = grown.shape[2:]
            if attribute.name == "pads":
                attribute.ints[:] = [value + 2 for value in attribute.ints]

    return change


def in_float(place: str) -> Callable[[onnx.ModelProto], None]:
    """A convolution of an 8-bit file computes in float: its weights and its input are not quantized."""

    def change(model: onnx.ModelProto) -> None:
        made = {name: node for node in model.graph.node for name in node.output}
        node = next(
            node
            for node in model.graph.node
            if node.op_type == "Conv"
            and node.input[1] in made
            and made[node.input[1]].input[0].startswith(f"{place}.")
        )
        stored = made[node.input[1]]
        weights, scale, *_ = (numpy_helper.to_array(_array(model, name)) for name in stored.input)
        shape = (-1, *[1] * (weights.ndim - 1)) if scale.ndim else ()
        values = weights.astype(np.float32) * scale.reshape(shape)
        name = f"{place}.weight"
        model.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
        node.input[1] = name

    return change


def resized_twice(model: onnx.ModelProto) -> None:
    """The frame is resized to twice its size in front of the resize to the network's."""
    at, resize = next(
        (place, node) for place, node in enumerate(model.graph.node) if node.op_type == "Resize"
    )
    own = {item.name: item.i for item in resize.attribute if item.type == onnx.AttributeProto.INT}
    axes = [item for item in resize.attribute if item.name == "axes"]
    scales = [2.0, 2.0] if axes else [1.0, 2.0, 2.0, 1.0]
    model.graph.initializer.append(
        numpy_helper.from_array(np.array(scales, np.float32), "planted/scales")
    )
    added = helper.make_node(
        "Resize",
        [resize.input[0], "", "planted/scales"],
        ["planted/larger"],
        mode="linear",
        antialias=own.get("antialias", 0),
    )
    added.attribute.extend(axes)
    resize.input[0] = "planted/larger"
    model.graph.node.insert(at, added)


@dataclass(frozen=True, kw_only=True)
class Planted:
    """A slowdown. form: of the file; guilty: one of these is in the first cause's words."""

    name: str
    guilty: tuple[str, ...]
    change: Callable[[onnx.ModelProto], None] | None = None
    form: str = "fp32"
    before: dict[str, Any] = field(default_factory=dict)
    now: dict[str, Any] = field(default_factory=dict)


PLANTED = (
    *(
        Planted(name=f"wider {block}", guilty=(f"{block}.conv_",), change=wider(block, 1.5))
        for block in ("blocks.1.0", "blocks.2.1", "blocks.3.1", "blocks.5.2")
    ),
    *(
        Planted(
            name=f"unfused activation of {place}",
            guilty=(f"Clip apart from Conv in {place}",),
            change=unfused(place),
        )
        for place in ("conv_stem", "blocks.1.0.conv_pw", "blocks.2.0.conv_pw", "blocks.1.1.conv_dw")
    ),
    Planted(name="casts in one place", guilty=("new: 2 Cast",), change=casts("blocks.1.0.conv_pw")),
    Planted(
        name="casts in two places",
        guilty=("new: 4 Cast",),
        change=casts("blocks.1.1.conv_pw", "blocks.2.0.conv_pw"),
    ),
    Planted(name="casts behind the stem", guilty=("new: 2 Cast",), change=casts("conv_stem")),
    Planted(
        name="another layout and back",
        guilty=("Transpose", "Sqrt"),
        change=transposed("blocks.1.0.conv_pw"),
    ),
    Planted(
        name="another layout deeper",
        guilty=("Transpose", "Sqrt"),
        change=transposed("blocks.1.1.conv_pw"),
    ),
    *(
        Planted(name=f"larger kernel of {place}", guilty=(place,), change=larger_kernel(place))
        for place in ("blocks.1.1.conv_dw", "blocks.3.1.conv_dw")
    ),
    *(
        Planted(name=f"{place} in float", guilty=(place,), change=in_float(place), form="int8")
        for place in ("blocks.2.1.conv_pw", "blocks.5.1.conv_pw")
    ),
    Planted(name="an unoptimised resize", guilty=("Resize",), change=resized_twice, form="image"),
    Planted(
        name="fewer threads",
        guilty=("threads: 2 before, 1 now",),
        before={"threads": 2},
        now={"threads": 1},
    ),
    Planted(
        name="the optimiser is off",
        guilty=("optimiser: on before, off now",),
        now={"optimised": False},
    ),
)


def _files(bundle: Path) -> dict[str, Path]:
    manifest = json.loads((bundle / "manifest.json").read_text())
    forms = {name: bundle / item["core"] for name, item in manifest["variants"].items()}
    return {**forms, "image": bundle / manifest["variants"]["fp32"]["file"]}


def planted(bundle: Path, only: str) -> None:
    """Print for each planted slowdown what is named first."""
    files = _files(bundle)
    image = bundle / "golden" / "00.png"
    right = 0
    chosen = [case for case in PLANTED if only in case.name]
    for case in chosen:
        old = files[case.form]
        model = onnx.load(old)
        with tempfile.TemporaryDirectory() as scratch:
            new = Path(scratch) / "new.onnx"
            changed = copy.deepcopy(model)
            if case.change:
                case.change(changed)
            onnx.save(changed, new)
            one = {"threads": 1, **case.now}
            other = {"threads": 1, **case.before}
            begun = time.perf_counter()
            found = explain(
                Condition(model=str(new), **one),
                Condition(model=str(old), **other),
                image,
            )
        first = _first(found)
        hit = any(word in first for word in case.guilty)
        right += hit
        print(
            f"{'right' if hit else 'WRONG'}: {case.name} ({found.ms:+.3f} on {found.baseline_ms:.3f} ms): {first} "
            f"({time.perf_counter() - begun:.0f} s)",
            flush=True,
        )
    print(f"the guilty one first in {right} of {len(chosen)}")


def _first(found: Explanation) -> str:
    if not found.blamed:
        return "none"
    cause = found.blamed[0]
    return f"{cause.what} {cause.ms:+.3f} [{cause.low:+.3f}, {cause.high:+.3f}]"


def equal(bundle: Path, count: int) -> None:
    """Print how often a file is blamed against itself."""
    files = _files(bundle)
    image = bundle / "golden" / "00.png"
    blamed = 0
    for number in range(count):
        path = files["int8" if number % 2 and "int8" in files else "fp32"]
        found = explain(
            Condition(model=str(path), threads=1), Condition(model=str(path), threads=1), image
        )
        blamed += bool(found.blamed)
        if found.blamed:
            print(f"blamed: {_first(found)}", flush=True)
    print(f"blamed in {blamed} of {count} comparisons of a file with itself")


def _cap(after: float, seconds: float) -> None:
    """Stop the measuring process for half of every tenth of a second, as a CPU quota would, from
    `after` seconds from now on."""
    time.sleep(after)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        found = _measuring()
        for word, pause in ((signal.SIGSTOP, 0.05), (signal.SIGCONT, 0.05)):
            for process in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, word)
            time.sleep(pause)


def _measuring() -> list[int]:
    """The processes that measure now."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if b"ftkit_export.runtime.timing" in place.read_bytes():
                found.append(int(place.parent.name))
    return found


def sustained(bundle: Path, count: int) -> None:
    """Half of the courses are capped to half of the time, half run a slower file."""
    files = _files(bundle)
    image = bundle / "golden" / "00.png"
    baseline = Condition(model=str(files["fp32"]), threads=1)
    slower = onnx.load(files["fp32"])
    for block in ("blocks.1.0", "blocks.1.1", "blocks.2.1", "blocks.3.1"):
        wider(block, 2.0)(slower)
    right = 0
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "slower.onnx"
        onnx.save(slower, path)
        for number in range(count):
            throttle = number % 2 == 0
            candidate = baseline if throttle else Condition(model=str(path), threads=1)
            if throttle:
                threading.Thread(target=_cap, args=(BEGINS, COURSE_SECONDS), daemon=True).start()
            course = run_on(candidate, baseline, image=image, seconds=COURSE_SECONDS)
            found = course.throttled_s
            in_time = found is not None and abs(found - BEGINS) <= NEAR_S
            told = course.verdict == "passed" and in_time
            if not throttle:
                told = course.verdict == "failed" and found is None
            right += told
            after = "no throttling"
            if course.throttled_s is not None:
                after = f"throttled after {course.throttled_s:.1f} s"
            print(
                f"{'right' if told else 'WRONG'}: {'a cap' if throttle else 'a slower file'}: "
                f"{course.verdict}, {after}, ratio {course.ratio:.3f}; {'; '.join(course.why)}",
                flush=True,
            )
    print(f"told apart in {right} of {count}")


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--what", choices=("planted", "equal", "sustained"), required=True)
    parser.add_argument("--only", default="", help="planted ones with this in their name")
    parser.add_argument("--count", type=int)
    options = parser.parse_args()
    print(machine())
    if options.what == "planted":
        planted(options.bundle, options.only)
    elif options.what == "equal":
        equal(options.bundle, options.count or EQUAL)
    else:
        sustained(options.bundle, options.count or COURSES)


if __name__ == "__main__":
    main()
