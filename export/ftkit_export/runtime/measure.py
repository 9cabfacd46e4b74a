"""Benchmark a model on this machine: one JSON schema for workstations and devices.

    found = bench_model("bundle", providers=["cpu"])   # or any model.onnx; a dict, for JSON
    found["rows"], found["starts"], found["parts"], found["raced"]

Written by `ftkit bench` and `device/classify.py --bench`; read by `ftkit export --latency` and
`ftkit bench --against`.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.latency import (
    Condition,
    Latency,
    Parts,
    Raced,
    Start,
    end_with_children,
    machine,
    measure,
    measure_start,
    parts,
    race,
)
from ftkit_export.runtime.session import PROVIDERS, cores, form_of
from ftkit_export.runtime.targets import here
from ftkit_export.runtime.verify import MANIFEST, check_files, read_manifest, sha256

BENCH_SCHEMA = 3  # 3: frame size; 2: races over several processes
STARTS = 5
QUICK_STARTS = 3
# Field annotation -> types of the value in JSON.
JSON_TYPES: dict[str, tuple[type, ...]] = {
    "float": (float, int),
    "int": (int,),
    "bool": (bool,),
    "str": (str,),
    "tuple": (list, tuple),
}


@dataclass(frozen=True, kw_only=True)
class Model:
    """A bundle or model file to measure.

    files: variant -> image form, the shipped one first (for a single file: "model" -> it). cores:
    variant -> core form. name: the recipe's, or the file's. fingerprint: sha256 of the manifest, or
    of the file. image: input for files exported by ftkit. frame: the size it is resized to,
    "640x480"; "": its own.
    """

    files: Mapping[str, Path]
    cores: Mapping[str, Path]
    name: str
    fingerprint: str
    image: Path | None
    run: str = ""
    frame: str = ""

    def shipped(self, provider: str) -> Path:
        """The file that a device would run on this provider."""
        return next(iter(self.run_by(provider).values()))

    def paths(self) -> list[Path]:
        """All its files, models before the image."""
        return [*self.files.values(), *self.cores.values(), *filter(None, [self.image])]

    def renamed(self) -> Model:
        """A copy with generic file names in one folder, for another machine."""
        return replace(
            self,
            files={name: Path(f"{number}.onnx") for number, name in enumerate(self.files)},
            cores={name: Path(f"{number}-core.onnx") for number, name in enumerate(self.cores)},
            image=Path(f"image{self.image.suffix}") if self.image else None,
        )

    def as_json(self) -> dict[str, Any]:
        """As JSON data for another process; inverse of `from_json`."""
        named = {
            kind: {name: str(path) for name, path in getattr(self, kind).items()}
            for kind in ("files", "cores")
        }
        return {**vars(self), **named, "image": self.image and str(self.image)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Model:
        """Inverse of `as_json`."""
        named = {
            kind: {name: Path(path) for name, path in data[kind].items()}
            for kind in ("files", "cores")
        }
        return Model(**{**data, **named, "image": data["image"] and Path(data["image"])})

    def run_by(self, provider: str) -> Mapping[str, Path]:
        """Variant -> the form that this provider runs; a single file has only one."""
        forms: Mapping[str, Path] = form_of(provider, self.files, self.cores or self.files)
        return {name: forms[name] for name in self.files}


def find(model: str | Path, image: str | Path | None = None, frame: str | None = None) -> Model:
    """Find the variants of a bundle, after checking its files, or a single ONNX file.

    frame: by default the bundle's own, at which its budgets are judged; none with an `image` or a
    single file. Raises BundleError for a bundle that is incomplete or altered, FtkitError when
    there is nothing to measure.
    """
    path = Path(model)
    if path.is_dir():
        manifest = read_manifest(path)
        check_files(path, manifest["files"])
        names = sorted(manifest["variants"], key=lambda name: name != manifest["chosen"])
        pairs = {name: manifest["variants"][name] for name in names}

        return Model(
            files={name: path / pair["file"] for name, pair in pairs.items()},
            cores={name: path / pair["core"] for name, pair in pairs.items()},
            name=str(manifest.get("name", path.name)),
            fingerprint=sha256(path / MANIFEST),
            run=manifest["run"],
            image=Path(image) if image else path / "golden" / "00.png",
            frame=frame or ("" if image else manifest["frame"]),
        )

    if not path.is_file():
        raise FtkitError(
            f"{path}: expected a bundle or an ONNX file, found nothing there. Check the path"
        )

    return Model(
        files={"model": path},
        cores={},
        name=path.name,
        fingerprint=sha256(path),
        image=Path(image) if image else None,
        frame=frame or "",
    )


def conditions(
    path: Path,
    providers: Sequence[str],
    threads: Sequence[int],
    batches: Sequence[int],
    frame: str = "",
) -> list[Condition]:
    """All combinations of provider, threads and batch.

    Several CPU threads are also measured without spinning, GPUs also without copies, CUDA graphs
    only so.
    """
    listed = []
    for provider in providers:
        for count in threads if provider == "cpu" else [1]:
            for batch in batches:
                plain = Condition(
                    model=str(path), provider=provider, threads=count, batch=batch, frame=frame
                )
                if not PROVIDERS[provider].captured:
                    listed.append(plain)
                if provider == "cpu" and count > 1:
                    listed.append(replace(plain, spinning=False))
                if PROVIDERS[provider].gpu:
                    listed.append(replace(plain, copies=False))

    return listed


def starts(condition: Condition, image: Path | None, *, quick: bool = False) -> list[Start]:
    """Measure cold starts and memory, each in a fresh process."""
    return [measure_start(condition, image) for _ in range(QUICK_STARTS if quick else STARTS)]


def bench_model(
    model: str | Path | Model,
    *,
    providers: Sequence[str] = ("cpu",),
    threads: Sequence[int] = (),
    batches: Sequence[int] = (0,),
    image: str | Path | None = None,
    quick: bool = False,
    frame: str | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Measure a bundle, a model file, or a Model from `find`.

    threads: default 1 and all cores. batches: 0 = as fixed in the file, else 1. frame: as in find.
    say: called with a description of each measurement before it starts.

    The result: schema, machine, target, name, run, fingerprint, frame, provider and threads (the
    first of each, to which starts, parts and raced refer; starts also to the first batch), sha256
    (variant -> of the file that ran), quick, rows (one Latency each, with its variant), starts
    (variant -> Starts), parts (variant -> Parts, where both forms run), raced (variant -> Raced,
    relative to fp32). Raises FtkitError for a model that is missing or does not run.
    """
    subject = model if isinstance(model, Model) else find(model, image, frame)
    counts = list(threads) or sorted({1, cores()})
    provider = providers[0]
    first = counts[0] if providers[0] == "cpu" else 1

    rows = []
    cold = {}
    pieces = {}
    running = subject.run_by(provider)
    for name, path in running.items():
        listed = [
            item
            for each in providers
            for item in conditions(
                subject.run_by(each)[name], [each], counts, batches, subject.frame
            )
        ]
        for condition in listed:
            say(f"{name} on {condition.provider}, {condition.threads} threads")
            rows.append({"variant": name, **asdict(measure(condition, subject.image, quick=quick))})

        say(f"{name}: cold starts")
        cold[name] = [asdict(start) for start in starts(listed[0], subject.image, quick=quick)]

        if name in subject.cores and subject.image and path != subject.cores[name]:
            say(f"{name}: decoding, preprocessing, network")
            condition = Condition(
                model=str(path), provider=provider, threads=first, frame=subject.frame
            )
            pieces[name] = asdict(parts(condition, subject.cores[name], subject.image))

    raced = {}
    if subject.image and subject.cores:
        say("variants in turn")
        raced = _race(subject, provider, first)

    return {
        "schema": BENCH_SCHEMA,
        "machine": machine(),
        "target": here(),
        "name": subject.name,
        "run": subject.run,
        "fingerprint": subject.fingerprint,
        "frame": rows[0]["frame"],
        "provider": provider,
        "threads": first,
        "sha256": {name: sha256(path) for name, path in running.items()},
        "quick": quick,
        "rows": rows,
        "starts": cold,
        "parts": pieces,
        "raced": raced,
    }


def _race(model: Model, provider: str, threads: int) -> dict[str, dict[str, Any]]:
    """Variant -> its Raced, relative to fp32, which comes first."""
    assert model.image  # every form accepts an image
    running = model.run_by(provider)
    order = sorted(running, key=lambda name: name != "fp32")
    results = race(
        [running[name] for name in order],
        model.image,
        provider=provider,
        threads=threads,
        frame=model.frame,
    )
    return {name: asdict(item) for name, item in zip(order, results, strict=True)}


def read_bench(path: str | Path) -> dict[str, Any]:
    """Read the JSON of a benchmark.

    Raises FtkitError when the file is something else, or has another schema.
    """
    try:
        data = json.loads(Path(path).read_text())
    except (OSError, ValueError):
        data = None
    return checked(data, str(path))


def fits(kind: Any, data: Mapping[str, Any]) -> bool:
    """Whether `data` has a dataclass's fields and no others, each of its type and finite."""
    for item in fields(kind):
        if item.name not in data and item.default is MISSING:
            return False

        value = data.get(item.name, item.default)
        word = str(item.type).split(" ")[0].split("[")[0]
        kinds = JSON_TYPES[word]

        if "None" in str(item.type) and value is None:
            continue
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            return False
        if isinstance(value, float) and not math.isfinite(value):
            return False
        if isinstance(value, list | tuple) and not all(type(each) is int for each in value):
            return False

    return set(data) <= {item.name for item in fields(kind)}


def checked(data: Any, where: str) -> dict[str, Any]:
    """Return `data` if it is a complete result of bench_model, else raise FtkitError."""
    try:
        rows = [
            (row["variant"], {key: value for key, value in row.items() if key != "variant"})
            for row in data["rows"]
        ]
        cold = {
            name: [fits(Start, start) for start in starts]
            for name, starts in data["starts"].items()
        }
        others = [
            *(fits(Parts, part) for part in data["parts"].values()),
            *(fits(Raced, raced) for raced in data["raced"].values()),
        ]
        numbers = [data["threads"]]
        numbers += [row[key] for row in data["rows"] for key in ("p50_ms", "p95_ms", "size_bytes")]
        whole = (
            data["schema"] == BENCH_SCHEMA
            and all(fits(Latency, row) for _, row in rows)
            and {name for name, _ in rows} == set(cold)
            and all(len(starts) > 1 and all(starts) for starts in cold.values())
            and all(others)
            and isinstance(data["machine"]["fingerprint"], str)
            and isinstance(data["provider"], str)
            and isinstance(data["frame"], str)
            and isinstance(data["sha256"], dict)
            and "quick" in data
            and all(isinstance(number, int | float) and 0 < number < math.inf for number in numbers)
        )
    except (KeyError, IndexError, TypeError, AttributeError):
        whole = False

    if not whole:
        raise FtkitError(
            f"{where}: expected what `ftkit bench --json` writes (schema {BENCH_SCHEMA}), found something else. "
            "Measure it again, or export the bundle again"
        )

    return dict(data)


def _main() -> int:
    """`python -m ftkit_export.runtime.measure JSON`: measure files in this folder, print JSON."""
    end_with_children()
    job = json.loads(sys.argv[1])
    threads = [job["threads"]] if job["threads"] else []
    try:
        result = bench_model(
            Model.from_json(job["model"]),
            providers=[job["provider"]],
            threads=threads,
            quick=job["quick"],
        )
    except FtkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code

    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(_main())
