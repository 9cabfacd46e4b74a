"""Code of a measuring process: open a model under a condition, feed it, time each run.

`python -m ftkit_export.runtime.timing JSON` does one of `WORK` and prints JSON; latency.py starts
it.
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit_export.runtime import nvidia
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.latency import Condition, Latency, Parts, end_with_children, race

if TYPE_CHECKING:
    from ftkit_export.runtime.session import Session

WARM_UP_RUNS = 20
WARM_UP_S = 1.0
RUNS = 200
WARM_SECONDS = 10.0
QUICK_RUNS = 50
QUICK_SECONDS = 0.5
# Warm-up of quick runs, and of interleaved runs, where noise affects all models alike
BRIEF = (
    WARM_UP_RUNS,
    WARM_UP_S / 4,
)
BINS = 40
PART_ROUNDS = 60
# runs at each size
SIZE_WARM_UP = 5
SIZE_RUNS = 40
ANSWERED = 8  # images per run
LARGEST_INPUT = 1 << 30  # bytes of a generated input
FREE = 224  # value for free dimensions, other than the first: the batch


def peak_rss_bytes() -> int:
    """Peak resident memory of this process so far, in bytes (0 if it is not reported)."""
    status = Path("/proc/self/status")
    # Not ru_maxrss, which on Linux a child inherits from the process that started it
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024

    try:
        import resource
    except ImportError:  # Windows
        return 0

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def feeds(session: Session, image: str | None, batch: int, frame: str = "") -> list[Any]:
    """Inputs for a session: the image, or a frame of noise, for files exported by ftkit, else noise by
    signature.

    frame: size that the image is resized to, "640x480". Raises FtkitError for an input that cannot
    be generated, with another batch size, or of another file with a frame, whose size it would not have.
    """
    if "preprocess" in session.metadata and (image or frame):
        return [_from_image(session, image, batch, frame)]
    if frame:
        raise FtkitError(
            f"--frame {frame}: expected a file that ftkit exported, which takes frames of any size, found another. "
            "Leave it out, or compare with figures of such a file"
        )
    if not session.inputs:
        raise FtkitError("model: expected inputs, found none. There is nothing to measure")
    first, *others = session.inputs
    # A batch that is asked for is that of the first; tables and the like may be fixed
    return [
        _noise(first.name, first.type, first.shape, batch),
        *(_noise(each.name, each.type, each.shape, batch, free=True) for each in others),
    ]


def _from_image(session: Session, image: str | None, batch: int, frame: str) -> Any:
    import numpy as np

    from ftkit_export.runtime.preprocess import Preprocess, parse_frame, scaled, to_frame

    preprocess = Preprocess(**json.loads(session.metadata["preprocess"]))
    if image:
        picture = preprocess.decode(image)
    else:
        width, height = parse_frame(frame)
        picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    # The image form takes a frame, the core form normalised pixels
    if session.input_names[0] != "pixels":
        camera = to_frame(scaled(picture, frame), session.metadata.get("input_format", "rgb"))
        return np.repeat(camera[None], batch or 1, axis=0)

    return np.repeat(preprocess.pixels(preprocess.canvas(picture)[None]), batch or 1, axis=0)


def _noise(
    name: str, kind: str, shape: Sequence[int | str | None], batch: int, *, free: bool = False
) -> Any:
    """free: whether a fixed first side may differ from the batch."""
    import numpy as np

    types = {"float": "float32", "double": "float64", "bool": "bool_"}
    word = kind.removeprefix("tensor(").removesuffix(")")

    dtype = getattr(np, types.get(word, word), None)
    if not isinstance(dtype, type) or not issubclass(dtype, np.number | np.bool_):
        raise FtkitError(
            f"input {name}: expected numbers, found {kind}. Only tensors of numbers can be generated"
        )

    sizes = [size if isinstance(size, int) and size > 0 else FREE for size in shape]
    if shape and not isinstance(shape[0], int):
        sizes[0] = batch or 1
    elif shape and batch and sizes[0] != batch and not free:
        raise FtkitError(
            f"input {name}: expected batch {batch}, found {shape[0]} in the file. Try without --batch"
        )

    if math.prod(sizes) * np.dtype(dtype).itemsize > LARGEST_INPUT:
        raise FtkitError(
            f"input {name}: expected at most 1 GB with free sizes as {FREE}, found {sizes}. "
            "Try a file with fixed sizes"
        )

    rng = np.random.default_rng(0)
    if dtype is np.uint8:
        return rng.integers(0, 256, sizes, np.uint8)
    if issubclass(dtype, np.floating):
        return rng.standard_normal(sizes).astype(dtype)

    return np.zeros(sizes, dtype)  # 0 is a valid index for any table


def open_session(
    condition: Condition, *, shared: bool = False, profile: Path | None = None
) -> Session:
    """Open a session under this condition. shared: others run between its runs. profile: a folder
    for its profile."""
    from ftkit_export.runtime.session import Session

    return Session(
        condition.model,
        provider=condition.provider,
        threads=condition.threads,
        spinning=condition.spinning,
        optimised=condition.optimised,
        shared=shared,
        profile=profile,
    )


def bound_call(session: Session, condition: Condition, fed: Sequence[Any]) -> Callable[[], object]:
    """Return a call that runs the model once on inputs prepared by `feeds`."""
    from ftkit_export.runtime.session import PROVIDERS

    copies = condition.copies and not PROVIDERS[condition.provider].captured
    return (lambda: session.run(*fed)) if copies else session.bound(*fed)


def in_turn(
    calls: Sequence[Callable[[], object]],
    rounds: int,
    *,
    warm_up: tuple[int, float],
    seconds: float,
) -> Any:
    """Time calls in interleaved rounds -> (rounds, calls) ms.

    Each round runs every call once; the order is rotated and reversed from round to round. warm_up:
    minimum number of rounds, and of seconds, cut short after `seconds`. Ends early after as many again, but
    not before 3 rounds.
    """
    import numpy as np

    warm(lambda: [call() for call in calls], *warm_up, most=seconds)
    times = np.zeros((rounds, len(calls)))

    begun = time.perf_counter()
    for number in range(rounds):
        shift = number // 2 % len(calls)
        order = [*range(shift, len(calls)), *range(shift)]
        for which in reversed(order) if number % 2 else order:
            start = time.perf_counter()
            calls[which]()
            times[number, which] = (time.perf_counter() - start) * 1e3
        if number >= 2 and time.perf_counter() - begun > seconds:
            return times[: number + 1]

    return times


def warm(call: Callable[[], object], runs: int, seconds: float, most: float = float("inf")) -> None:
    """Call it at least `runs` times, and for at least `seconds`; but for no more than `most` seconds,
    once called."""
    begun = time.perf_counter()
    count = 0
    while count < runs or time.perf_counter() - begun < seconds:
        call()
        count += 1
        if time.perf_counter() - begun > most:
            return


def _timed(call: Callable[[], object], runs: int, seconds: float) -> Any:
    import numpy as np

    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < runs or time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return np.array(times)


@dataclass(frozen=True, kw_only=True)
class _Begun:
    """A model after its first run.

    call: runs it again; frame: size of an image form's input, "640x480"; start: times in ms up to
    the first answer: import, session, first run.
    """

    call: Callable[[], object]
    batch: int
    frame: str
    placement: str
    start: dict[str, float]


def _begun(condition: Condition, image: str | None) -> _Begun:
    started = time.perf_counter()
    from ftkit_export.runtime.session import offered

    offered()  # imports ONNX Runtime and numpy
    imported = time.perf_counter()
    session = open_session(condition)
    ready = time.perf_counter()
    fed = feeds(session, image, condition.batch, condition.frame)
    call = bound_call(session, condition, fed)
    before = time.perf_counter()
    call()
    start = {
        "import_ms": (imported - started) * 1e3,
        "session_ms": (ready - imported) * 1e3,
        "first_run_ms": (time.perf_counter() - before) * 1e3,
    }

    return _Begun(
        call=call,
        batch=fed[0].shape[0] if fed and fed[0].ndim else 1,
        frame=_frame(session, fed),
        placement=session.placement,
        start=start,
    )


def _frame(session: Session, fed: Sequence[Any]) -> str:
    """Width and height of the camera frame fed to an image form; "" for other files."""
    if "preprocess" not in session.metadata or session.input_names[0] == "pixels":
        return ""
    rows, columns = fed[0].shape[1:3]
    return f"{columns}x{rows * 2 // 3 if session.metadata.get('input_format') == 'nv12' else rows}"


def _measure_here(
    conditions: Sequence[Condition], image: str | None, quick: bool
) -> dict[str, Any]:
    (condition,), before = conditions, nvidia.used_bytes()
    begun = _begun(condition, image)
    call = begun.call
    import numpy as np

    from ftkit_export.runtime.session import PROVIDERS, cores

    gc.disable()
    warm(call, *(BRIEF if quick else (WARM_UP_RUNS, WARM_UP_S)))
    times = _timed(call, *((QUICK_RUNS, QUICK_SECONDS) if quick else (RUNS, WARM_SECONDS)))
    p50, p90, p95, p99 = (float(value) for value in np.percentile(times, (50, 90, 95, 99)))
    low = float(times.min())
    high = max(p99, float(times.min()) * 1.001)
    histogram = np.histogram(np.minimum(times, high), bins=BINS, range=(low, high))[0]
    provider = PROVIDERS[condition.provider]
    after = nvidia.used_bytes()
    latency = Latency(
        provider=condition.provider,
        threads=condition.threads or cores(),
        batch=begun.batch,
        spinning=condition.spinning,
        copies=condition.copies and not provider.captured,
        runs=len(times),
        quick=quick,
        p50_ms=p50,
        p90_ms=p90,
        p95_ms=p95,
        p99_ms=p99 if len(times) >= 1000 else None,
        **begun.start,
        peak_rss_bytes=peak_rss_bytes(),
        size_bytes=Path(condition.model).stat().st_size,
        low_ms=low,
        high_ms=high,
        histogram=tuple(int(count) for count in histogram),
        placement=begun.placement,
        frame=begun.frame,
        gpu_bytes=None
        if before is None or after is None or not provider.gpu
        else max(0, after - before),
    )

    return asdict(latency)


def _begin_here(conditions: Sequence[Condition], image: str | None, steady: bool) -> dict[str, Any]:
    begun = _begun(conditions[0], image)
    if not steady:
        return {**begun.start, "peak_rss_bytes": peak_rss_bytes()}

    import numpy as np

    warm(begun.call, *BRIEF)
    p50, p95 = np.percentile(_timed(begun.call, QUICK_RUNS, 0), (50, 95))

    return {
        **begun.start,
        "p50_ms": float(p50),
        "p95_ms": float(p95),
        "peak_rss_bytes": peak_rss_bytes(),
    }


def pin(conditions: Sequence[Condition]) -> None:
    """Keep the calling thread off processors that the sessions' threads are pinned to, if any."""
    from ftkit_export.runtime.session import processors

    if processors() and any(condition.threads != 1 for condition in conditions):
        os.sched_setaffinity(0, {processors()[0]})


def _pairs_here(
    conditions: Sequence[Condition], image: str | None, rounds: int, seconds: float
) -> list[list[float]]:
    """Interleaved times in ms, a row per round, a column per condition, for `regression`.

    Takes about `seconds` in all.
    """
    begun = time.perf_counter()
    calls = []
    batches = []
    for condition in conditions:
        session = open_session(condition, shared=True)
        fed = feeds(session, image, condition.batch, condition.frame)
        batches.append(fed[0].shape[0] if fed[0].ndim else 1)
        calls.append(bound_call(session, condition, fed))
    if len({condition.batch for condition in conditions}) == 1 and len(set(batches)) > 1:
        found = " and ".join(map(str, sorted(set(batches))))
        raise FtkitError(
            f"--against: expected files for one batch size, found {found}. Export both alike"
        )
    pin(conditions)
    gc.disable()

    for _ in range(rounds // 4):
        for call in calls:
            call()
        if time.perf_counter() - begun > seconds / 4:
            break

    times = in_turn(calls, rounds, warm_up=(0, 0), seconds=seconds - (time.perf_counter() - begun))
    return [[float(value) for value in row] for row in times]


def _race_here(conditions: Sequence[Condition], image: str) -> list[dict[str, Any]]:
    """latency.race in a process of its own, as requested from another machine."""
    first = conditions[0]
    models = [condition.model for condition in conditions]
    return [
        asdict(item)
        for item in race(
            models, image, provider=first.provider, threads=first.threads, frame=first.frame
        )
    ]


def _answers_here(conditions: Sequence[Condition], image: str) -> list[list[float]]:
    """Logits of a core form, one row per image.

    image: an .npy file of canvases (n, R, R, 3) uint8.
    """
    import numpy as np

    from ftkit_export.runtime.preprocess import Preprocess

    session = open_session(conditions[0])
    preprocess = Preprocess(**json.loads(session.metadata["preprocess"]))
    canvases = np.load(image, mmap_mode="r", allow_pickle=False)

    return [
        row
        for start in range(0, len(canvases), ANSWERED)
        for row in session.run(preprocess.pixels(canvases[start : start + ANSWERED]))[0].tolist()
    ]


def _parts_here(conditions: Sequence[Condition], image: str) -> dict[str, Any]:
    import numpy as np

    from ftkit_export.runtime.preprocess import Preprocess, scaled

    sessions = [open_session(condition, shared=True) for condition in conditions]
    data = Path(image).read_bytes()
    preprocess = Preprocess(**json.loads(sessions[1].metadata["preprocess"]))
    pixels = scaled(preprocess.decode(data), conditions[0].frame)
    calls: list[Callable[[], object]] = [
        lambda: preprocess.decode(data),
        lambda: preprocess.pixels(preprocess.canvas(pixels)[None]),
    ]
    calls += [
        bound_call(session, condition, feeds(session, image, 1, condition.frame))
        for session, condition in zip(sessions, conditions, strict=True)
    ]
    gc.disable()
    times = in_turn(calls, PART_ROUNDS, warm_up=BRIEF, seconds=WARM_SECONDS)
    decoding, pillow, together, network = (float(value) for value in np.median(times, axis=0))
    parts = Parts(
        decode_ms=decoding,
        pillow_ms=pillow,
        network_ms=network,
        together_ms=together,
        preprocess_ms=float(np.median(times[:, 2] - times[:, 3])),
    )

    return asdict(parts)


def _sizes_here(conditions: Sequence[Condition], image: str) -> list[list[float]]:
    """p50 and p95 in ms of one model at each condition's frame size."""
    import numpy as np

    session = open_session(conditions[0])
    gc.disable()

    percentiles = []
    for condition in conditions:
        call = bound_call(session, condition, feeds(session, image, 1, condition.frame))
        warm(call, SIZE_WARM_UP, 0)
        percentiles.append(
            [float(value) for value in np.percentile(_timed(call, SIZE_RUNS, 0), (50, 95))]
        )

    return percentiles


def _profile_here(
    conditions: Sequence[Condition], image: str | None, rounds: int, seconds: float, folder: str
) -> list[dict[str, Any]]:
    from ftkit_export.runtime.profiling import profiled

    return profiled(conditions, image, rounds, seconds, Path(folder))


def _sustained_here(
    conditions: Sequence[Condition], image: str | None, seconds: float
) -> dict[str, Any]:
    from ftkit_export.runtime.sustained import windows

    return windows(conditions, image, seconds)


WORK: dict[str, Callable[..., Any]] = {
    "measure": _measure_here,
    "begin": _begin_here,
    "pairs": _pairs_here,
    "race": _race_here,
    "parts": _parts_here,
    "answers": _answers_here,
    "sizes": _sizes_here,
    "profile": _profile_here,
    "sustained": _sustained_here,
}


def _main() -> int:
    end_with_children()
    job = json.loads(sys.argv[1])
    conditions = [Condition(**item) for item in job.pop("conditions")]
    try:
        result = WORK[job.pop("what")](conditions, job.pop("image"), **job)
    except FtkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except Exception as error:
        # From ONNX Runtime or numpy: one line is more useful than the traceback
        reason = (str(error) or type(error).__name__).split("\n")[0]
        print(
            f"error: {conditions[0].model}: expected to run, found: {reason}. Try `ftkit doctor`",
            file=sys.stderr,
        )
        return 2

    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(_main())
