"""Speed of start-up, decoding, training, export and prediction, and a breakdown of the demo's time.

    python bench/speed.py        (about 5 minutes on 2 cores; `make bench` runs it and writes both tables of README.md)

The demo's commands run in this process with an empty cache, and each of their parts is timed;
start-up and prediction are whole processes, measured by pytest-benchmark (test_startup.py).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import tables

from ftkit.cli.demo import SETTINGS, write_elpv
from ftkit.cli.main import main as ftkit
from ftkit.utils import console
from ftkit_export.runtime.latency import Condition, parts


def timed(command: tuple[str, ...]) -> tuple[float, dict[str, float]]:
    """Seconds of one command, and of each of its parts."""
    console.spent.clear()
    begun, found = time.perf_counter(), Counter[str]()

    try:
        code = ftkit(command, standalone_mode=False)
    except SystemExit as done:
        code = done.code

    assert not code, command
    whole = time.perf_counter() - begun

    for label, seconds in console.spent.items():
        found[re.sub(r" \d+/\d+$", "", label)] += seconds  # type: ignore[assignment]
    return whole, dict(found.most_common())


def startup(scratch: Path) -> dict[str, float]:
    """Median times of whole processes in ms."""
    out = scratch / "startup.json"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            Path(__file__).with_name("test_startup.py"),
            f"--benchmark-json={out}",
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return {
        item["name"]: 1e3 * item["stats"]["median"]
        for item in json.loads(out.read_text())["benchmarks"]
    }


def main() -> None:
    """Measure, print and write the results."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        starts = startup(scratch)
        os.environ["FTKIT_CACHE"] = f"{scratch}/cache"
        data, run, bundle = (scratch / name for name in ("photos", "run", "bundle"))
        write_elpv(data, split=True)
        rows, spent = ["| part | seconds |", "|---|---|"], {}

        for command in (
            ("train", str(data), "--out", str(run), *SETTINGS),
            ("export", str(run), "--out", str(bundle), "--quick"),
            ("verify", str(bundle)),
        ):
            whole, found = timed(command)
            spent[command[0]] = {"whole": whole, **found}
            rows.append(f"| **ftkit {command[0]}** | **{whole:.1f}** |")
            rows += [f"| {label} | {seconds:.1f} |" for label, seconds in found.items()]
            rows.append(f"| the rest of {command[0]} | {whole - sum(found.values()):.1f} |")

        epochs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        rates = {epoch["train"]: epoch["images_per_s"] for epoch in epochs}
        manifest = json.loads((bundle / "manifest.json").read_text())
        files = manifest["variants"]["fp32"]
        pieces = parts(
            Condition(model=str(bundle / files["file"]), threads=1),
            bundle / files["core"],
            bundle / "golden" / "00.png",
        )

    images = 2223
    tables.write(
        "speed",
        "\n".join(
            [
                "| what | measured |",
                "|---|---|",
                f"| start-up: `ftkit --help`, whole process | {starts['test_help']:.0f} ms |",
                f"| prediction: `ftkit predict` of one photograph, whole process | "
                f"{starts['test_predict_one_photograph']:.0f} ms |",
                f"| canvases: {images} photographs decoded, hashed, written | "
                f"{images / spent['train']['decoding']:.0f} images/s |",
                f"| training, head stage | {rates['head']:.0f} images/s |",
                f"| training, last:2 on the cached prefix | {rates['last:2']:.0f} images/s |",
                f"| training, whole `ftkit train` | {spent['train']['whole']:.0f} s |",
                f"| export, whole `ftkit export --quick` with int8 | {spent['export']['whole']:.0f} s |",
                f"| preprocessing in the file, one thread | {pieces.preprocess_ms:.2f} ms (Pillow and numpy "
                f"{pieces.pillow_ms:.2f}) |",
                f"| network, one thread | {pieces.network_ms:.2f} ms |",
            ]
        ),
    )
    tables.write("demo", "\n".join(rows))


if __name__ == "__main__":
    main()
