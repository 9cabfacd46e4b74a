"""Scaling of time, peak memory and disk with the number of images; speed of decoding.

    python bench/growth.py               # training at 1, 4, 16 times the images, cached and live
    python bench/growth.py --canvases    # decoding: images/s beside other decoders, and memory
    python bench/growth.py --what audit,train,search --counts 1000,10000   # whole commands
    python bench/growth.py --what search --counts 1850 --backbones efficientnet_lite0,efficientnet_lite2
    python bench/growth.py --what train --counts 1000 --disk-mb 20         # as root: a cache that holds part

Photographs: ELPV, listed repeatedly in a CSV; every entry is decoded, cached and trained on
separately. With --what: pictures of 128 pixels made of them, each of its own piece, turn, levels and
noise. Their training takes lite0 at 96 pixels in the recipe's stages, without folds; their search one
pass each at 96 and 128 pixels, no finalist.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from elpv_dataset import __file__ as elpv_file
from PIL import Image

BASE = 240  # train photographs at 1x
PREPROCESS = {"size": 224, "resize": 224}


def files(count: int) -> list[tuple[Path, str]]:
    """`count` photographs with their class, repeated as needed."""
    folder = Path(elpv_file).parent / "data"
    rows = [line.split() for line in (folder / "labels.csv").read_text().splitlines()]
    certain = [
        (folder / name, f"{kind}-{share}")
        for name, share, kind in rows
        if float(share) in (0.0, 1.0)
    ]
    mixed = [certain[i] for i in np.random.default_rng(0).permutation(len(certain))[: BASE + 80]]

    return [mixed[i % len(mixed)] for i in range(count)]


def write_csv(path: Path, times: int) -> None:
    """BASE x times train rows, 40 val, 40 test."""
    listed = files(BASE + 80)
    rows = ["path,label,split"]
    rows += [f"{file},{label},train" for file, label in listed[:BASE]] * times
    rows += [f"{file},{label},val" for file, label in listed[BASE : BASE + 40]]
    rows += [f"{file},{label},test" for file, label in listed[BASE + 40 :]]
    path.write_text("\n".join(rows) + "\n")


def in_process(code: str, **environment: str) -> dict[str, float]:
    """Run `code` in its own process; return the result it prints, with its peak memory in MB."""
    tail = "\nimport json, re\nhigh = int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1e3\n"
    whole = code + tail + "print(json.dumps({**result, 'peak_mb': high}))\n"
    done = subprocess.run(
        [sys.executable, "-c", whole],
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
        text=True,
    )

    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def training() -> None:
    """Table: size, cached or live, seconds per epoch of last:1, total seconds, peak memory."""
    print(
        "| images | feed | seconds an epoch | ms an image | seconds in all | peak MB |\n|---|---|---|---|---|---|"
    )
    for cache in ("auto", "off"):
        for times in (1, 4, 16):
            with tempfile.TemporaryDirectory() as scratch:
                write_csv(Path(scratch) / "data.csv", times)
                code = f"""
import json, time
from pathlib import Path
from ftkit.recipe import Recipe, Stage
from ftkit.training.train import train
from ftkit_export.runtime.preprocess import Preprocess
recipe = Recipe(name="growth", backbone="efficientnet_lite0", preprocess=Preprocess(size=224, resize=224),
                stages=(Stage(train="last:1", epochs=2, cache="{cache}"),))
begun = time.time()
run = train(recipe, "{scratch}/data.csv", Path("{scratch}/run"))
lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
result = dict(epoch={BASE * times} / lines[-1]["images_per_s"], whole=time.time() - begun)
"""

                found = in_process(code, FTKIT_CACHE=f"{scratch}/cache")
                print(
                    f"| {BASE * times} | {'cached' if cache == 'auto' else 'live'} | {found['epoch']:.1f} "
                    f"| {1e3 * found['epoch'] / BASE / times:.1f} "
                    f"| {found['whole']:.0f} | {found['peak_mb']:.0f} |",
                    flush=True,
                )


def _one(path: str) -> int:
    from ftkit_export.runtime.preprocess import Preprocess, decode

    return int(Preprocess(**PREPROCESS).canvas(decode(Path(path))).sum())


def canvases(count: int = 2000) -> None:
    """Decoding speed: a Pillow loop, torchvision's decode and resize, a process pool, ftkit."""
    import torch
    from torchvision.io import ImageReadMode, decode_image, read_file
    from torchvision.transforms.v2.functional import resize

    paths = [path for path, _ in files(count)]

    def pillow() -> None:
        for path in paths:
            np.asarray(
                Image.open(path).convert("RGB").resize((224, 224), Image.Resampling.BILINEAR)
            )

    def torchvision() -> None:
        for path in paths:
            resize(
                decode_image(read_file(str(path)), ImageReadMode.RGB), [224, 224], antialias=True
            )

    def processes() -> None:
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_one, map(str, paths), chunksize=32))

    torch.set_num_threads(os.cpu_count() or 1)
    print("| decoder | images/s | peak MB |\n|---|---|---|")

    for name, work in (
        ("one Pillow loop", pillow),
        ("torchvision", torchvision),
        ("pool of processes", processes),
    ):
        begun = time.perf_counter()
        work()
        print(f"| {name} | {count / (time.perf_counter() - begun):.0f} | |", flush=True)

    for total in (count, 4 * count):
        with tempfile.TemporaryDirectory() as scratch:
            (Path(scratch) / "data.csv").write_text(
                "path,label,split\n"
                + "".join(
                    f"{path},{label},{'val' if i == 1 else 'test' if i == 2 else 'train'}\n"
                    for i, (path, label) in enumerate(files(total))
                )
            )

            found = in_process(
                f"""
import time
from ftkit.data.canvas import build_canvases
from ftkit.data.dataset import read_images
from ftkit_export.runtime.preprocess import Preprocess
images = read_images("{scratch}/data.csv")
begun = time.perf_counter()
build_canvases(images, Preprocess(size=224, resize=224))
result = dict(seconds=time.perf_counter() - begun)
""",
                FTKIT_CACHE=f"{scratch}/cache",
            )
            print(
                f"| ftkit, {total} images to disk | {total / found['seconds']:.0f} | {found['peak_mb']:.0f} |",
                flush=True,
            )


def write_pictures(folder: Path, count: int) -> Path:
    """`count` JPEGs of 128 pixels in four classes, made from the cells; the CSV that lists them."""
    listed = files(BASE)
    cells = [np.asarray(Image.open(path).convert("L")) for path, _ in listed]
    rng = np.random.default_rng(0)
    rows = ["path,label,split"]
    for number in range(count):
        cell, (_, label) = cells[number % len(cells)], listed[number % len(cells)]
        side = int(rng.integers(200, 290))
        top, left = rng.integers(0, 300 - side, 2)
        piece = np.rot90(cell[top : top + side, left : left + side], int(rng.integers(4)))
        small = np.asarray(Image.fromarray(piece).resize((128, 128)), np.float32)
        levels = small * rng.uniform(0.6, 1.0) + rng.normal(0, 4, small.shape)
        path = folder / str(number // 1000) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(levels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        rows.append(f"{path},{label},{'test' if number % 10 == 9 else 'train'}")
    (folder / "data.csv").write_text("\n".join(rows) + "\n")
    return folder / "data.csv"


@contextmanager
def _cache(folder: Path, megabytes: int) -> Iterator[Path]:
    """A folder for the cache, if asked on a file system of its own of that size."""
    folder.mkdir()
    if megabytes:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder]
        subprocess.run(mount, check=True)
    try:
        yield folder
    finally:
        if megabytes:
            subprocess.run(["umount", folder], check=True)
        shutil.rmtree(folder, ignore_errors=True)


def commands(what: list[str], counts: list[int], backbones: str, sizes: str, room: int) -> None:
    """Table: command, pictures, seconds, ms a picture, peak memory, disk of the cache."""
    small = ("--set", "preprocess.size=96", "--set", "preprocess.resize=96", "--set", "folds=0")
    told = {
        "audit": ("data",),
        "train": ("train", "--out", "run", *small),
        "search": (
            *("search", "--out", "search", "--finalists", "0"),
            *("--backbones", backbones, *(("--sizes", sizes) if sizes else ())),
        ),
    }
    print("| command | pictures | seconds | ms a picture | peak MB | MB on disk |")
    print("|---|---|---|---|---|---|")
    for count in counts:
        with tempfile.TemporaryDirectory() as scratch:
            place = Path(scratch)
            data = write_pictures(place / "pictures", count)
            for name in what:
                command, *options = told[name]
                cache = place / f"cache-{name}"
                code = f"""
import os, time
os.chdir({scratch!r})
from ftkit.cli.main import main
begun = time.perf_counter()
try:
    main({[command, str(data), *options]!r})
except SystemExit as ended:
    assert ended.code in (0, 1), ended.code
result = dict(seconds=time.perf_counter() - begun)
"""
                with _cache(cache, room):
                    found = in_process(code, FTKIT_CACHE=str(cache))
                    disk = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
                print(
                    f"| {name} | {count} | {found['seconds']:.0f} | {1e3 * found['seconds'] / count:.1f} "
                    f"| {found['peak_mb']:.0f} | {disk / 1e6:.0f} |",
                    flush=True,
                )


def main() -> None:
    """Run the benchmark that was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--canvases", action="store_true")
    parser.add_argument("--what", help="of audit, train and search, with commas")
    parser.add_argument("--counts", default="1000,10000", help="of pictures, for --what")
    parser.add_argument("--backbones", default="efficientnet_lite0", help="of the search")
    parser.add_argument("--sizes", default="96,128", help="of the search")
    parser.add_argument("--disk-mb", type=int, default=0, help="for the cache, with --what")
    options = parser.parse_args()
    if options.what:
        counts = [int(count) for count in options.counts.split(",")]
        what = options.what.split(",")
        commands(what, counts, options.backbones, options.sizes, options.disk_mb)
    elif options.canvases:
        canvases()
    else:
        training()


if __name__ == "__main__":
    main()
