"""Classify images on a device, or prove that the model works there. Needs numpy, onnxruntime and Pillow only.

python device/classify.py IMAGE...        class and probability of each image
python device/classify.py --self-check    replay the golden vectors, then time the model; exit 0 or 1
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

sys.dont_write_bytecode = True  # the bundle is sealed: nothing may appear in it

from ftkit_export.errors import FtkitError  # noqa: E402  # after the line above on purpose
from ftkit_export.latency import measure  # noqa: E402
from ftkit_export.predict import Classifier, image_files  # noqa: E402
from ftkit_export.session import PROVIDERS  # noqa: E402
from ftkit_export.verify import verify  # noqa: E402

BUNDLE = Path(__file__).resolve().parents[1]


def self_check(provider: str, threads: int) -> int:
    """Print what verify found and the latency measured here; 0 when all passed, 1 when a gate failed."""
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
    latency = measure(BUNDLE / "model.onnx", golden, provider=provider, threads=threads, quick=True)
    print(
        f"latency      p50 {latency.p50_ms:.1f} ms, p95 {latency.p95_ms:.1f} ms ({provider}, {latency.threads} threads)"
    )
    print("self-check passed" if result.passed else "self-check FAILED")
    return 0 if result.passed else 1


def main() -> int:
    """Parse, run, print; exit code 0 done, 1 a check failed, 2 bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="image files or folders")
    parser.add_argument("--self-check", action="store_true", help="replay the golden vectors and time the model")
    parser.add_argument("--provider", default="cpu", choices=list(PROVIDERS))
    parser.add_argument("--threads", type=int, default=0, help="0 = all cores")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    if not options.images and not options.self_check:
        parser.error("give images, or --self-check")
    try:
        if options.self_check:
            return self_check(options.provider, options.threads)
        classify = Classifier(BUNDLE, provider=options.provider, threads=options.threads)
        for path in image_files(options.images):
            answer = classify(path)
            if options.json:
                print(json.dumps({"image": str(path), **dataclasses.asdict(answer)}))
            else:
                print(f"{path}  {answer.label}  {answer.probability:.3f}  {answer.remark}".rstrip())
    except FtkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
