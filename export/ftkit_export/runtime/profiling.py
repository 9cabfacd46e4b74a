"""Time every operator of models that run in turn in one process, by ONNX Runtime's own profiler.

    profiled([Condition(model="old.onnx"), Condition(model="new.onnx")], image, 40, 3.0, folder)

The profiler slows runs down, so verdicts rest on others. Run by timing.py in a process of its own.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.latency import Condition
from ftkit_export.runtime.timing import bound_call, feeds, in_turn, open_session, pin

CONTROL_FLOW = ("If", "Loop", "Scan")
KERNEL = "_kernel_time"  # suffix of an operator's event
TRIMMED = 0.2  # share of the fastest, and of the slowest runs that does not count


def profiled(
    conditions: Sequence[Condition],
    image: str | None,
    rounds: int,
    seconds: float,
    folder: Path,
) -> list[dict[str, Any]]:
    """For each condition: `total_ms` of a run, and its `nodes` in the order in which they run.

    A node: name, op, provider, shape (of its first output) and ms, the trimmed mean over `rounds`
    interleaved runs. folder: gets a folder for each condition, with the optimised graph.
    """
    calls: list[Callable[[], object]] = []
    sessions = []
    for number, condition in enumerate(conditions):
        place = folder / str(number)
        place.mkdir(parents=True)
        session = open_session(condition, shared=True, profile=place)
        sessions.append(session)
        fed = feeds(session, image, condition.batch, condition.frame)
        calls.append(bound_call(session, condition, fed))
    pin(conditions)
    gc.disable()
    times = in_turn(calls, rounds, warm_up=(max(3, rounds // 4), 0), seconds=seconds)
    return [read_profile(session.end_profile(), len(times)) for session in sessions]


def read_profile(path: Path, runs: int) -> dict[str, Any]:
    """What the profiler wrote, of the last `runs` runs. As an entry of `profiled`."""
    events = json.loads(path.read_text(encoding="utf-8"))
    whole = [event["dur"] for event in events if event.get("name") == "model_run"]
    nodes: dict[str, dict[str, Any]] = {}
    for event in sorted(events, key=lambda event: event.get("ts", 0)):
        if event.get("cat") != "Node" or not event["name"].endswith(KERNEL):
            continue
        told = event["args"]
        if told["op_name"] in CONTROL_FLOW:
            raise FtkitError(
                f"--profile: expected a model without control flow, found {told['op_name']}, whose body the profiler "
                "does not tell apart. Try --profile on a part without it"
            )
        node = nodes.setdefault(
            told["node_index"],
            {
                "name": event["name"].removesuffix(KERNEL),
                "op": told["op_name"],
                "provider": told["provider"].removesuffix("ExecutionProvider").lower(),
                "shape": _shape(told.get("output_type_shape") or []),
                "times": [],
            },
        )
        node["times"].append(event["dur"])

    for node in nodes.values():
        node["ms"] = _mean_ms(node.pop("times")[-runs:])
    return {"total_ms": _mean_ms(whole[-runs:]), "nodes": list(nodes.values())}


def _shape(outputs: Sequence[dict[str, list[int]]]) -> str:
    """Of the first output: "1x16x112x112 float"."""
    for kind, sizes in (outputs[0] if outputs else {}).items():
        return f"{'x'.join(map(str, sizes))} {kind}".strip()
    return ""


def _mean_ms(microseconds: Sequence[int]) -> float:
    """Trimmed mean: the profiler counts whole microseconds, which a median would not go below."""
    ordered = np.sort(np.asarray(microseconds, np.float64))
    cut = int(TRIMMED * len(ordered))
    return float(ordered[cut : len(ordered) - cut].mean()) / 1e3
