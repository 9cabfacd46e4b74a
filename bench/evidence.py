"""What folds bring: questions settled, and accuracy of a refit on all images against train only.

    python bench/evidence.py                 # 10 seeds, random split: about 20 minutes on 2 cores
    python bench/evidence.py --group         # by module
    python bench/evidence.py --digits        # scikit-learn's digits as pictures, ten classes

Each seed cuts another test split of the photographs, at 128 pixels; the recipe is trained with
a val split (`--folds 0`) and with folds, and the run with folds is exported. A stage is settled when
it is surely better, worse, or within the limit; int8 when its best form is accepted or refused. Time
and size: of int8's whole file over fp32's, one thread.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from search import write_digits

from ftkit.cli.demo import GROUPS, SETTINGS, write_elpv

SMALL = ("--set", "preprocess.size=128", "--set", "preprocess.resize=128")


def _ftkit(*arguments: object) -> None:
    command = [sys.executable, "-m", "ftkit", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stderr)


def _decided(out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rows of fp32 and of the int8 form that the export decided on, of the bundle whatever its
    verdict."""
    manifest = next(iter(sorted(out.parent.glob(f"{out.name}*/manifest.json"))))
    rows = json.loads(manifest.read_text())["evidence"]["decision"]
    order = ("accepted", "inconclusive", "refused")
    row: dict[str, Any] = min(rows[1:], key=lambda row: order.index(row["verdict"]))
    return rows[0], row


def main() -> None:
    """Print a row per seed, and what they come to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="the first seed, to go on with")
    parser.add_argument("--group", action="store_true")
    parser.add_argument("--digits", action="store_true")
    options = parser.parse_args()
    if options.digits and options.group:
        parser.error("digits have no groups: give one of --digits and --group")
    gains = []
    print(
        "| seed | val split: test | seconds | folds: test | seconds | stages | int8 | images | drop | time | size |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")

    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        if options.digits:
            write_digits(place / "photos")
            plan = SMALL
        else:
            write_elpv(place / "photos", split=False)
            plan = (*SETTINGS, *SMALL, *(GROUPS if options.group else ()))
        for seed in range(options.first, options.first + options.seeds):
            row = []
            for folds in ("0", "auto"):
                run = place / f"{seed}-{folds}"
                begun = time.perf_counter()
                seeded = ("--folds", folds, "--seed", seed)
                _ftkit("train", place / "photos", "--out", run, *seeded, *plan)
                data = json.loads((run / "run.json").read_text())
                row += [data["metrics"]["test"]["accuracy"], time.perf_counter() - begun]

            gains.append(row[2] - row[0])
            stages = ", ".join(
                f"{stage['verdict']} {100 * stage['gain'][0]:+.1f}" for stage in data["stages"]
            )
            _ftkit("export", run, "--out", place / f"{seed}", "--quick")
            fp32, int8 = _decided(place / f"{seed}")
            drop = int8["paired"]
            print(
                f"| {seed} | {row[0]:.4f} | {row[1]:.0f} | {row[2]:.4f} | {row[3]:.0f} | {stages} | {int8['verdict']} "
                f"({int8['name']}) | {drop['images']} | {100 * drop['drop']:+.1f} [{100 * drop['low']:+.1f}, "
                f"{100 * drop['high']:+.1f}] | {int8['ratio']:.2f} | "
                f"{int8['size_bytes'] / fp32['size_bytes']:.2f} |",
                flush=True,
            )

    if len(gains) < 2:
        return
    error = np.std(gains, ddof=1) / np.sqrt(len(gains))
    half = stats.t.ppf(0.975, len(gains) - 1) * error
    print(
        f"\nfolds and refit over a val split: {100 * np.mean(gains):+.2f} points +-{100 * half:.2f}"
    )


if __name__ == "__main__":
    main()
