"""Time the candidates of a search on this device. Needs numpy, onnxruntime and Pillow only.

python time_candidates.py > times.json      then, at home: ftkit search DATA --target TARGET --latency times.json
"""

import json
import sys
from pathlib import Path

sys.dont_write_bytecode = True

from ftkit_export.runtime.errors import FtkitError  # noqa: E402  # after the line above on purpose
from ftkit_export.runtime.latency import (  # noqa: E402
    Condition,
    machine,
    measure_start,
    race_in_parts,
)
from ftkit_export.runtime.targets import here  # noqa: E402

FOLDER = Path(__file__).resolve().parent


def main() -> int:
    """Race all files beside this one, start each once more, and print the times as JSON."""
    told = json.loads((FOLDER / "candidates.json").read_text(encoding="utf-8"))
    image = FOLDER / told["image"]
    files = {name: FOLDER / file for name, file in told["files"].items()}
    try:
        raced = race_in_parts(list(files.values()), image, frame=told["frame"])
        times = {}
        for name, path in files.items():
            start = measure_start(
                Condition(model=str(path), threads=1, frame=told["frame"]), image, steady=False
            )
            times[name] = {
                "p50_ms": raced[path].p50_ms,
                "p95_ms": raced[path].p95_ms,
                "peak_rss_bytes": start.peak_rss_bytes,
                "cold_ms": start.cold_ms,
            }
    except (FtkitError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    found = {"target": here(), "frame": told["frame"], "machine": machine(), "times": times}
    print(json.dumps({**found, "search": told["search"]}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
