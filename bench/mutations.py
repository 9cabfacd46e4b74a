"""Damaged input files must be used, or rejected in one sentence; never a traceback or a crash.

python bench/mutations.py BUNDLE PHOTOS RUN [--count 10000] [--seed 0] [--only images,csv,onnx,manifest,cache,json,run]

Each file is mutated (bits, bytes, spans, truncation; in JSON also single values), and read as its
command reads it.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ODD = [
    None,
    -1,
    0,
    1e308,
    "",
    "x" * 500,
    "\ud83d\ude00",
    [],
    {},
    [None],
    True,
    "nan",
    1 << 70,
    "../../etc/passwd",
]
BATCH = 250  # mutations per process: a crash ends only one process, and is counted


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Damage the data in one to three places, more often near the ends (headers and metadata)."""
    spoiled = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not spoiled:
            return bytes(spoiled)

        near = rng.random()
        span = len(spoiled) if near < 0.4 else min(len(spoiled), 4096)
        at = rng.randrange(span) if near < 0.7 else len(spoiled) - 1 - rng.randrange(span)
        length = rng.choice((1, 2, 4, 16, 64, 1024))

        kind = rng.randrange(6)
        if kind == 0:
            spoiled[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            spoiled[at] = rng.randrange(256)
        elif kind == 2:
            del spoiled[at : at + length]
        elif kind == 3:
            spoiled[at:at] = rng.randbytes(length)
        elif kind == 4:
            spoiled[at:at] = spoiled[at : at + length]
        else:
            del spoiled[at:]

    return bytes(spoiled)


def mutated_json(text: str, rng: random.Random) -> str:
    """The same document with a value replaced, a key removed, or a list entry duplicated."""
    document = json.loads(text)
    places: list[tuple[Any, Any]] = []

    def visit(node: Any) -> None:
        items = (
            node.items()
            if isinstance(node, dict)
            else enumerate(node)
            if isinstance(node, list)
            else ()
        )
        for key, value in items:
            places.append((node, key))
            visit(value)

    visit(document)
    if not places:
        return "null"

    node, key = rng.choice(places)
    kind = rng.randrange(4)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, list):
        node.insert(key, node[key])
    else:
        node[key] = rng.choice(ODD)

    return json.dumps(document, indent=1) + "\n"


def images(photos: Path, folder: Path) -> Iterator[Callable[[random.Random], object]]:
    """Decode images of every supported format."""
    from PIL import Image

    from ftkit_export.runtime.preprocess import decode

    picture = Image.open(next(photos.rglob("*.png"))).convert("RGB").resize((60, 40))

    files = []
    kinds = (
        "PNG RGB",
        "PNG I;16",
        "PNG P",
        "PNG RGBA",
        "JPEG RGB",
        "GIF P",
        "TIFF RGB",
        "TIFF F",
        "BMP RGB",
        "WEBP RGB",
        "PPM L",
    )
    for name, mode in map(str.split, kinds):
        buffer = io.BytesIO()
        picture.convert("L" if mode == "I;16" else mode).convert(mode).save(buffer, name)
        files.append(buffer.getvalue())

    while True:
        yield lambda rng: decode(mutated(rng.choice(files), rng))


def tables(photos: Path, folder: Path) -> Iterator[Callable[[random.Random], object]]:
    """A CSV of paths, labels, splits and groups."""
    from ftkit.data.dataset import labelled, read_images

    paths = sorted(photos.rglob("*.png"))[:40]
    lines = [
        "path,label,split,group",
        *(f"{path},{path.parent.name},,g{i // 4}" for i, path in enumerate(paths)),
    ]
    lines += [f"{path},{path.parent.name},test," for path in sorted(photos.rglob("*.png"))[-40:]]

    data, target = "\n".join(lines).encode(), folder / "set.csv"

    def use(rng: random.Random) -> object:
        target.write_bytes(mutated(data, rng))
        return rng.choice((read_images, labelled))(target)

    while True:
        yield use


def models(bundle: Path, folder: Path) -> Iterator[Callable[[random.Random], object]]:
    """The exported file: loaded, and run on an image."""
    import numpy as np
    import onnx

    from ftkit_export.runtime.predict import Classifier

    data = (bundle / "model.onnx").read_bytes()
    target, picture = folder / "model.onnx", np.full((50, 70, 3), 90, np.uint8)

    def use(rng: random.Random) -> object:
        if rng.random() < 0.5:
            target.write_bytes(mutated(data, rng))
        else:
            model = onnx.load_from_string(data)
            item = rng.choice(model.metadata_props)
            if item.value[:1] in "[{" and rng.random() < 0.7:
                item.value = mutated_json(item.value, rng)
            else:
                item.value = mutated(item.value.encode(), rng).decode(errors="replace")
            target.write_bytes(model.SerializeToString())

        return Classifier(target)(picture).remark

    while True:
        yield use


def manifests(bundle: Path, folder: Path) -> Iterator[Callable[[random.Random], object]]:
    """A manifest, damaged, or altered with a recomputed digest."""
    from ftkit_export.runtime.measure import find
    from ftkit_export.runtime.verify import MANIFEST, replay_golden, with_digest

    copy = folder / "bundle"
    shutil.copytree(bundle, copy)

    original = (bundle / MANIFEST).read_text()

    def use(rng: random.Random) -> object:
        if rng.random() < 0.3:
            (copy / MANIFEST).write_bytes(mutated(original.encode(), rng))
        else:
            document = json.loads(mutated_json(original, rng))
            document.pop("digest", None)
            (copy / MANIFEST).write_bytes(with_digest(json.dumps(document, indent=1) + "\n"))

        model = find(copy)
        if rng.random() < 0.02:
            from ftkit_export.runtime.verify import verify

            return verify(copy)

        return model.fingerprint, replay_golden

    while True:
        yield use


def caches(photos: Path, folder: Path) -> Iterator[Callable[[random.Random], object]]:
    """Shards of decoded images, their lists of bad files, and cached activations of a prefix."""
    os.environ["FTKIT_CACHE"] = str(folder / "cache")
    import torch
    from torch import nn

    from ftkit.data.canvas import build_canvases
    from ftkit.data.dataset import read_images
    from ftkit.data.prefetch import Source
    from ftkit.recipe import Augment
    from ftkit.training.feature_cache import Views, fill
    from ftkit_export.runtime.preprocess import Preprocess

    preprocess = Preprocess(size=8, resize=8)
    few = folder / "few"

    for place in sorted(photos.iterdir()):
        if place.is_dir():
            shutil.copytree(place, few / place.name, ignore=lambda _, names: sorted(names)[8:])

    net = nn.AdaptiveAvgPool2d(2)

    def whole() -> object:
        canvases = build_canvases(read_images(few), preprocess)
        source = Source(canvases.array, len(canvases.slots), 1, torch.device("cpu"))
        views = Views(
            canvases=canvases,
            preprocess=preprocess,
            augment=Augment(),
            count=2,
            seed=0,
            source=source,
        )

        return canvases.array(range(len(canvases.slots))).sum(), fill(net, "key", ["values"], views)

    whole()

    def use(rng: random.Random) -> object:
        files = sorted(path for path in (folder / "cache").rglob("*") if path.is_file())
        victim = rng.choice(files)
        victim.write_bytes(mutated(victim.read_bytes(), rng))
        return whole()

    while True:
        yield use


def baselines(bundle: Path, folder: Path) -> Iterator[Callable[[random.Random], object]]:
    """Output of `ftkit bench --json`, read as a baseline and checked against budgets."""
    from ftkit.benchmark import budgets
    from ftkit_export.runtime.measure import bench_model, read_bench

    path = folder / "bench.json"

    text = json.dumps(bench_model(bundle, threads=[1], quick=True), indent=1)

    def use(rng: random.Random) -> object:
        path.write_bytes(
            mutated(text.encode(), rng) if rng.random() < 0.5 else mutated_json(text, rng).encode()
        )
        return budgets.as_tables(read_bench(path)), budgets.judge_bench(
            read_bench(path), {"p95_ms": 5.0, "size_mb": 10.0}
        )

    while True:
        yield use


def runs(run: Path, folder: Path) -> Iterator[Callable[[random.Random], object]]:
    """run.json of a finished run, which contains its own digest."""
    from ftkit.training.run import open_run

    copy = folder / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("report.html", "mistakes"))

    text = (run / "run.json").read_text()

    def use(rng: random.Random) -> object:
        (copy / "run.json").write_bytes(
            mutated(text.encode(), rng) if rng.random() < 0.5 else mutated_json(text, rng).encode()
        )
        opened = open_run(copy)
        return opened.metrics, opened._repr_html_()

    while True:
        yield use


def work(kind: str, arguments: argparse.Namespace, first: int, count: int) -> None:
    """In a separate process: print a JSON line per traceback, and a last line."""
    import warnings

    from ftkit_export.runtime.errors import FtkitError

    warnings.simplefilter("ignore")
    makers = {
        "images": (images, arguments.photos),
        "csv": (tables, arguments.photos),
        "onnx": (models, arguments.bundle),
        "manifest": (manifests, arguments.bundle),
        "cache": (caches, arguments.photos),
        "json": (baselines, arguments.bundle),
        "run": (runs, arguments.run),
    }

    make, source = makers[kind]
    answers: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        uses = make(Path(source), Path(scratch))
        for number in range(first, first + count):
            rng = random.Random(f"{arguments.seed}/{kind}/{number}")
            try:
                next(uses)(rng)
                answers["used"] += 1
            except FtkitError as error:
                answers["refused"] += 1
                if "\n" in str(error).strip():
                    print(json.dumps({"number": number, "error": f"several lines: {error}"}))
            except Exception:
                answers["traceback"] += 1
                print(json.dumps({"number": number, "error": traceback.format_exc()}))

    print(json.dumps(answers))


def main() -> int:
    """Print one row per kind of file; exit code 1 if any caused a traceback or a crash."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("bundle", "photos", "run"):
        parser.add_argument(name)

    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--only", default="images,csv,onnx,manifest,cache,json,run")
    parser.add_argument("--batch", help=argparse.SUPPRESS)

    arguments = parser.parse_args()
    if arguments.batch:
        kind, first, count = arguments.batch.split(",")
        work(kind, arguments, int(first), int(count))
        return 0

    bad = 0
    print(
        "| file | mutated | used | refused in a sentence | traceback | crash | seconds |\n|---|---|---|---|---|---|---|"
    )

    kinds = arguments.only.split(",")
    for kind in kinds:
        begun = time.perf_counter()

        total: Counter[str] = Counter()
        share = arguments.count // len(kinds)
        for first in range(0, share, BATCH):
            count = min(BATCH, share - first)
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--batch", f"{kind},{first},{count}"],
                capture_output=True,
                text=True,
                check=False,
            )

            lines = done.stdout.splitlines()
            if done.returncode:
                total["crash"] += 1
                print(
                    f"{kind} {first}: exit code {done.returncode}: {done.stderr[-2000:]}",
                    file=sys.stderr,
                )
                continue

            total.update(json.loads(lines[-1]))
            for line in lines[:-1]:
                print(
                    f"{kind}: {json.loads(line)['number']}\n{json.loads(line)['error']}",
                    file=sys.stderr,
                )

        bad += total["traceback"] + total["crash"]
        print(
            f"| {kind} | {share} | {total['used']} | {total['refused']} | {total['traceback']} | {total['crash']} "
            f"| {time.perf_counter() - begun:.0f} |",
            flush=True,
        )

    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
