"""Classify images on a device, or verify that the model works there. Needs numpy, onnxruntime and Pillow only.

python device/classify.py IMAGE...                   class and probability of each image
python device/classify.py --raw ROWS COLUMNS FILE... the same for raw frames in the model's input format
python device/classify.py --self-check               replay the golden vectors, then time the model; exit 0 or 1
python device/classify.py --bench > device.json      every variant's latency here, as `ftkit bench --json` writes it
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.dont_write_bytecode = True  # the bundle is sealed: no file may be added

from ftkit_export.runtime.errors import FtkitError  # noqa: E402
from ftkit_export.runtime.latency import Condition, measure  # noqa: E402
from ftkit_export.runtime.measure import bench_model, find  # noqa: E402  # after the line above on purpose
from ftkit_export.runtime.predict import Classifier, image_files  # noqa: E402
from ftkit_export.runtime.session import PROVIDERS  # noqa: E402
from ftkit_export.runtime.verify import verify  # noqa: E402

BUNDLE = Path(__file__).resolve().parents[1]


def self_check(provider: str, threads: int) -> int:
    """Print verify's results and the latency here; return 0 when all passed, else 1."""
    result = verify(BUNDLE, provider)
    print(f"files        {result.files} unchanged")

    for check in result.checks:
        print(
            f"{check.name:<12} {'ok' if check.passed else 'FAILED'}: {check.images} golden images, worst {check.file} "
            f"at {check.value:.2f} of its tolerance, top-1 equal {check.top1_equal}/{check.images}"
        )

    for gate in result.failed_gates:
        print(f"sealed gate  FAILED: {gate}")

    golden = BUNDLE / "golden" / "00.png"
    bundle = find(BUNDLE)
    condition = Condition(
        model=str(bundle.shipped(provider)), provider=provider, threads=threads, frame=bundle.frame
    )
    latency = measure(condition, golden, quick=True)
    frames = f", frames of {latency.frame}" if latency.frame else ""
    print(
        f"latency      p50 {latency.p50_ms:.1f} ms, p95 {latency.p95_ms:.1f} ms "
        f"({provider}, {latency.threads} threads{frames})"
    )
    print("self-check passed" if result.passed else "self-check FAILED")

    return 0 if result.passed else 1


def raw_frame(path: Path, rows: int, columns: int, channels: int) -> np.ndarray[Any, Any]:
    """A file of bytes -> (rows, columns, channels) uint8."""
    data = np.fromfile(path, np.uint8)
    if rows < 1 or columns < 1 or data.size != rows * columns * channels:
        raise FtkitError(
            f"{path}: expected {rows * columns * channels} bytes, found {data.size}. Check rows and columns"
        )
    return data.reshape(rows, columns, channels)


def main() -> int:
    """Parse, run, print; exit code 0 done, 1 a check failed, 2 bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="image files or folders")
    parser.add_argument(
        "--self-check", action="store_true", help="replay the golden vectors and time the model"
    )
    parser.add_argument("--bench", action="store_true", help="measure all variants, print JSON")
    parser.add_argument(
        "--quick", action="store_true", help="shorter runs with --bench, marked as such"
    )
    parser.add_argument(
        "--raw", nargs=2, type=int, metavar=("ROWS", "COLUMNS"), help="the files are raw frames"
    )
    parser.add_argument("--provider", default="cpu", choices=list(PROVIDERS))
    parser.add_argument("--threads", type=int, default=0, help="0 = all cores")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    if not (options.images or options.self_check or options.bench):
        parser.error("give images, --self-check or --bench")

    try:
        if options.self_check:
            return self_check(options.provider, options.threads)

        if options.bench:
            threads = [options.threads] if options.threads else []
            print(
                json.dumps(
                    bench_model(
                        BUNDLE, providers=[options.provider], threads=threads, quick=options.quick
                    )
                )
            )
            return 0

        classify = Classifier(BUNDLE, provider=options.provider, threads=options.threads)
        channels = 3 if classify.input_format in ("rgb", "bgr") else 1

        for path in map(Path, options.images) if options.raw else image_files(options.images):
            if options.raw:
                answer = classify.frame(raw_frame(path, options.raw[0], options.raw[1], channels))
            else:
                answer = classify(path)
            if options.json:
                print(json.dumps({"image": str(path), **dataclasses.asdict(answer)}))
            else:
                print(f"{path}  {answer.label}  {answer.probability:.3f}  {answer.remark}".rstrip())
    except (FtkitError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)

    return 0


if __name__ == "__main__":
    sys.exit(main())
