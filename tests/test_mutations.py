"""Damaged files are used or rejected in one sentence: a short run of bench/mutations.py."""

import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[1] / "bench" / "mutations.py"


def test_no_mutated_file_ends_in_a_traceback_or_a_crash(
    bundle: Path, photos: Path, run: Path
) -> None:
    """Regression: 17 of 150 mutated models did, and a truncated cache entry in all later runs."""
    done = subprocess.run(
        [sys.executable, BENCH, bundle, photos, run, "--count", "700", "--seed", "suite"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}"
    rows = [line.split("|") for line in done.stdout.splitlines()[2:]]
    assert {row[1].strip(): int(row[2]) for row in rows} == dict.fromkeys(
        ("images", "csv", "onnx", "manifest", "cache", "json", "run"), 100
    )
    assert all(int(row[4]) > 10 for row in rows if row[1].strip() != "cache"), "damage is seen"
