"""Kill and resume runs repeatedly; compare the result with an uninterrupted run, bit for bit.

    python bench/resume.py --kills 30

Each run is killed (SIGKILL) up to three times, at random moments between the first and the last
save; the state is saved after every step, so that kills also interrupt saves.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import safetensors.torch
import torch
from accuracy import write_random_split

COMMAND = (
    "import ftkit.training.checkpoint as s; s.SAVE_EVERY = s.SAVE_SHARE = 0; "
    "from ftkit.cli.main import main; main()"
)
SETTINGS = (
    "preprocess.size=96",
    "preprocess.resize=96",
    "stages.0.epochs=3",
    "stages.0.views=2",
    "stages.1.views=2",
    "stages.1.epochs=2",
    "augment.vflip=true",
)


def begin(data: Path, out: Path, *more: str) -> subprocess.Popen[bytes]:
    """Start `ftkit train` in a separate process."""
    command = [sys.executable, "-c", COMMAND, "train", str(data), "--out", str(out), *more]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def ended(out: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, object]]]:
    """Weights and metrics of a finished run, without its speeds."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return safetensors.torch.load_file(out / "model.safetensors"), [
        {**line, "images_per_s": 0} for line in lines
    ]


def main() -> None:
    """Print one line per run, then the count."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=30)
    options, rng = parser.parse_args(), random.Random(0)

    with tempfile.TemporaryDirectory() as scratch:
        os.environ["FTKIT_CACHE"] = f"{scratch}/cache"
        whole, data = Path(scratch) / "whole", Path(scratch) / "elpv"
        write_random_split(data)

        for folder in (data / "train").iterdir():  # 160 photographs are enough
            for path in sorted(folder.iterdir())[40:]:
                path.unlink()

        chosen = [part for setting in SETTINGS for part in ("--set", setting)]
        begin(data, whole, *chosen).wait()
        begun = time.monotonic()
        begin(data, Path(scratch) / "again", *chosen).wait()
        seconds, expected = time.monotonic() - begun, ended(whole)

        kills = runs = equal = 0
        while kills < options.kills:
            out, runs = Path(scratch) / f"run-{runs}", runs + 1
            here = 0
            while here < 3 and kills < options.kills:
                process = begin(
                    data,
                    out,
                    *(["--resume"] if (out / "state").exists() else [*chosen, "--resume"]),
                )
                try:
                    process.wait(timeout=rng.uniform(0.4, 1.0) * seconds)
                    break  # it finished before the kill
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    kills, here = kills + 1, here + 1

            begin(data, out, *([] if (out / "state").exists() else chosen), "--resume").wait()
            weights, lines = ended(out)
            same = lines == expected[1] and all(
                torch.equal(value, expected[0][name]) for name, value in weights.items()
            )
            equal += same
            print(f"run {runs}: {here} kills, {'equal' if same else 'NOT EQUAL'}", flush=True)

        print(f"{kills} kills in {runs} runs; {equal} of {runs} ended bit-equal")


if __name__ == "__main__":
    main()
