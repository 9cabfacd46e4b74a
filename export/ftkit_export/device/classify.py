"""Classify images on a device, or verify that the model works there. Needs numpy, onnxruntime and Pillow only.

python device/classify.py IMAGE...                   what the model says of each image
python device/classify.py --raw ROWS COLUMNS FILE... the same for raw frames in the model's input format
python device/classify.py --watch FOLDER             of each image that appears there, once; until it is stopped
python device/classify.py ... --keep DIR             also collect pictures worth labelling, and a log for `ftkit drift`
python device/classify.py ... --keep DIR --shadow B  ask bundle B too about every 10th, and note where it differs
python device/classify.py --enroll CLASS --out ../NEW IMAGE...   a bundle that also knows CLASS, from a few images
python device/classify.py --self-check               replay the golden vectors, then time the model; exit 0 or 1
python device/classify.py --bench > device.json      every variant's latency here, as `ftkit bench --json` writes it
"""

import argparse
import dataclasses
import json
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.dont_write_bytecode = True  # the bundle is sealed: no file may be added

from ftkit_export.runtime.collect import Collector, stored_test  # noqa: E402
from ftkit_export.runtime.enroll import MAX_DROP  # noqa: E402
from ftkit_export.runtime.errors import FtkitError, ImageError  # noqa: E402
from ftkit_export.runtime.latency import Condition, measure  # noqa: E402
from ftkit_export.runtime.measure import bench_model, find  # noqa: E402  # after the line above on purpose
from ftkit_export.runtime.predict import (  # noqa: E402
    AnyModel,
    Classifier,
    Model,
    Prediction,
    image_files,
    load_model,
    picture_of,
    read_reference,
)
from ftkit_export.runtime.session import PROVIDERS  # noqa: E402
from ftkit_export.runtime.shadow import Shadow  # noqa: E402
from ftkit_export.runtime.verify import sha256, verify  # noqa: E402
from ftkit_export.runtime.watch import POLL_SECONDS, watch  # noqa: E402

BUNDLE = Path(__file__).resolve().parents[1]


def self_check(provider: str, threads: int, keep: Path | None) -> int:
    """Print verify's results, the latency here and the drift test's state in `keep`; return 0 when
    the bundle passed, else 1."""
    result = verify(BUNDLE, provider)
    print(f"files        {result.files} unchanged")

    for check in result.checks:
        print(
            f"{check.name:<12} {'ok' if check.passed else 'FAILED'}: {check.images} golden images, worst {check.file} "
            f"at {check.value:.2f} of its tolerance, decided alike {check.top1_equal}/{check.images}"
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
    if keep:
        print(f"drift        {_drift_state(keep)}")
    print("self-check passed" if result.passed else "self-check FAILED")

    return 0 if result.passed else 1


def _drift_state(keep: Path) -> str:
    """What the drift test says of the images logged in `keep`, as last saved there."""
    reference = read_reference(BUNDLE)
    if reference is None:
        return "not watched: this bundle has no reference"
    test = stored_test(keep, reference)
    said = "; ".join(
        f"{name} since image {alarm['since']}: {alarm['what']}"
        for name, alarm in test.alarms.items()
    )
    nothing = "too few to say" if test.verdict == 3 else "none"
    return f"{said or nothing}, in {test.images} images"


def raw_frame(path: Path, rows: int, columns: int, channels: int) -> np.ndarray[Any, Any]:
    """A file of bytes -> (rows, columns, channels) uint8."""
    data = np.fromfile(path, np.uint8)
    if rows < 1 or columns < 1 or data.size != rows * columns * channels:
        raise FtkitError(
            f"{path}: expected {rows * columns * channels} bytes, found {data.size}. Check rows and columns"
        )
    return data.reshape(rows, columns, channels)


def classify_all(options: argparse.Namespace) -> None:
    """Classify the images given, or those that appear, and print a line for each."""
    collector = None
    if options.keep:
        collector = Collector(
            options.keep,
            read_reference(BUNDLE),
            control=options.control,
            most=options.keep_most,
            megabytes=options.keep_mb,
        )
    try:
        classify = _loaded(options, collector)
        shadow = _shadow(options) if options.shadow else None
        for path in _paths(options):
            try:
                answer = _classified(classify, path, options.raw)
            except ImageError as error:
                if not options.watch:
                    raise
                print(f"error: {error}", file=sys.stderr)
                continue
            if shadow and isinstance(answer, Prediction):
                _compare(shadow, answer, path, options.raw)
            if options.json:
                text = json.dumps({"image": str(path), **dataclasses.asdict(answer)})
            else:
                text = f"{path}  {answer.text}"
            print(text, flush=bool(options.watch))
    finally:
        if collector:
            collector.close()


def enroll_class(options: argparse.Namespace) -> int:
    """Write a bundle that knows one more class, and print what it costs; 0 passed, 1 failed, 3 open."""
    from ftkit_export.bundle.enroll import enroll

    enrolled = enroll(
        BUNDLE,
        options.enroll,
        image_files(options.images),
        options.out,
        max_drop=options.max_drop,
        key=options.sign,
        version=options.bundle_version,
        group_by=options.group_by,
    )
    print(enrolled.as_text())
    print(f"bundle: {enrolled.folder}")
    return {"passed": 0, "failed": 1, "inconclusive": 3}[enrolled.verdict]


def _shadow(options: argparse.Namespace) -> Shadow | None:
    """The second bundle; None, and a line on standard error, where it cannot be had: the first must
    classify all the same."""
    try:
        second = Classifier(options.shadow, provider=options.provider, threads=options.threads)
        pair = " and ".join(sha256(path)[:12] for path in (_file(BUNDLE), _file(options.shadow)))
        return Shadow(second, pair, options.keep, options.shadow_every)
    except (FtkitError, OSError) as error:
        print(f"shadow: nothing is compared: {error}", file=sys.stderr)
        return None


def _loaded(options: argparse.Namespace, collector: Collector | None) -> AnyModel:
    """The model; one that collects has a single label."""
    if collector is None:
        return load_model(BUNDLE, provider=options.provider, threads=options.threads)
    return Classifier(BUNDLE, provider=options.provider, threads=options.threads, keep=collector)


def _classified(classify: Model[Any], path: Path, raw: list[int] | None) -> Any:
    if not raw:
        return classify(path)
    channels = 3 if classify.input_format in ("rgb", "bgr") else 1
    return classify.frame(raw_frame(path, raw[0], raw[1], channels))


def _file(model: Path) -> Path:
    return model / "model.onnx" if model.is_dir() else model


def _compare(shadow: Shadow, answer: Prediction, path: Path, raw: list[int] | None) -> None:
    """Ask the second bundle about the same image, if it is its turn."""

    def picture() -> tuple[bytes, str]:
        if not raw:
            return picture_of(None, path, shadow.second.input_format)
        channels = 3 if shadow.second.input_format in ("rgb", "bgr") else 1
        frame = raw_frame(path, raw[0], raw[1], channels)
        return picture_of(frame, None, shadow.second.input_format)

    shadow.offer(answer, lambda second: _classified(second, path, raw), picture)


def _paths(options: argparse.Namespace) -> Iterator[Path]:
    """The images given; then those that appear, until a signal ends it."""
    yield from map(Path, options.images) if options.raw else image_files(options.images)
    if options.watch:
        stopped = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stopped.set())
        for path in watch(options.watch, lambda: not stopped.wait(POLL_SECONDS)):
            yield path
            if stopped.is_set():  # not before the image at hand is answered
                return


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
    parser.add_argument("--watch", type=Path, metavar="FOLDER", help="classify what appears there")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="collect in this folder")
    parser.add_argument(
        "--control", type=float, default=0.01, help="share of all images to keep (0.01)"
    )
    parser.add_argument("--keep-most", type=int, default=2000, help="pictures at most (2000)")
    parser.add_argument("--keep-mb", type=float, default=500, help="megabytes at most (500)")
    parser.add_argument("--shadow", type=Path, metavar="BUNDLE", help="compare it; needs --keep")
    parser.add_argument("--shadow-every", type=int, default=10, help="every Nth image (10)")
    parser.add_argument("--enroll", metavar="CLASS", help="add this class; needs --out")
    parser.add_argument("--out", type=Path, metavar="NEW", help="the bundle to write")
    parser.add_argument(
        "--max-drop",
        type=float,
        default=MAX_DROP,
        help="accuracy the old classes may lose to it (0.01)",
    )
    parser.add_argument(
        "--group-by", default="", metavar="REGEX", help="groups in the paths of the new images"
    )
    parser.add_argument("--sign", type=Path, metavar="KEY", help="private key to sign NEW with")
    parser.add_argument(
        "--bundle-version", type=int, metavar="N", help="of NEW (one more, or the time)"
    )
    parser.add_argument("--provider", default="cpu", choices=list(PROVIDERS))
    parser.add_argument("--threads", type=int, default=0, help="0 = all cores")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    if not (options.images or options.watch or options.self_check or options.bench):
        parser.error("give images, --watch, --self-check or --bench")
    if options.shadow and (options.keep is None or options.shadow_every < 1):
        parser.error("--shadow needs --keep, and --shadow-every of 1 or more")

    if (options.enroll is None) != (options.out is None) or (
        options.enroll is not None and (not options.images or options.raw or options.watch)
    ):
        parser.error("--enroll takes image files and --out, and neither --raw nor --watch")
    if options.watch and options.raw:
        parser.error("--watch takes image files, and --raw none. Give one of them")

    for stream in (sys.stdout, sys.stderr):  # a file's name may be no text
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        if options.enroll is not None:
            return enroll_class(options)

        if options.self_check:
            return self_check(options.provider, options.threads, options.keep)

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

        classify_all(options)
    except (FtkitError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)

    return 0


if __name__ == "__main__":
    sys.exit(main())
