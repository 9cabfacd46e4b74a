"""Shared fixtures: one small real run and its bundle, made with real photographs and weights."""

import atexit
import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Two workers of two threads each would wait for each other on two cores: set before torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Set before any ftkit import, so that tests never touch the user's cache.
os.environ["FTKIT_CACHE"] = tempfile.mkdtemp(prefix="ftkit-test-cache-")

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from elpv_dataset import __file__ as elpv_file
from filelock import FileLock
from torch import nn

from ftkit.cli.demo import NOTICE
from ftkit.cli.main import main
from ftkit.exporting import evidence, export, int8
from ftkit.models.weights import fingerprint
from ftkit_export.conversion.convert import Trace
from ftkit_export.runtime.verify import with_digest

atexit.register(shutil.rmtree, os.environ["FTKIT_CACHE"], ignore_errors=True)

WORKER = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
# A worker's own are a part of those of the process that started it
CORES = (
    os.sched_getaffinity(os.getppid() if WORKER else 0)
    if hasattr(os, "sched_getaffinity")
    else set[int]()
)


def _own_cores() -> set[int]:
    """This worker's share of the cores: others' threads would keep its own waiting, for a fifth more time."""
    return set(sorted(CORES)[int(WORKER) :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])]) or CORES


OWN = _own_cores() if WORKER else CORES
if OWN != CORES:
    os.sched_setaffinity(0, OWN)

PER_CLASS = 30
SMALL = (
    "preprocess.size=96",
    "preprocess.resize=96",
    "stages.0.epochs=6",
    "stages.1.epochs=2",
    "stages.1.train=last:1",
    "stages.0.views=2",
    "stages.1.views=2",
    "stages.1.batch_size=16",
)
TINY = ("folds=0", *SMALL)

# The real command, saving after every step, so that a kill hits a save or the step after it.
COMMAND = (
    "import ftkit.training.checkpoint as s; s.SAVE_EVERY = s.SAVE_SHARE = 0; "
    "from ftkit.cli.main import main; main()"
)


def ftkit(*arguments: object) -> Result:
    """Run the real command line in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def settings(*changes: str) -> list[str]:
    """--set arguments for the given changes."""
    return [part for change in changes for part in ("--set", change)]


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here: make test installs it"
)


def open_page(browser: Any, url: str, width: int = 1280, **more: Any) -> tuple[Any, list[str]]:
    """Open a page; return it with the list of its errors."""
    page, wrong = browser.new_page(viewport={"width": width, "height": 900}, **more), []
    page.on("console", lambda said: said.type == "error" and wrong.append(said.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda request: wrong.append(request.url))
    page.goto(url)
    return page, wrong


def needs(*programs: str) -> pytest.MarkDecorator:
    """Skip a test where one of the programs is missing."""
    missing = [name for name in programs if shutil.which(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed here: {', '.join(missing)}")


def run_(*command: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command; what it printed and its exit code."""
    return subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, check=False, cwd=cwd
    )


def built_cpp(bundle: Path, sdk: Path, build: Path) -> Path:
    """The C++ runner of a bundle, built without a warning."""
    sources = bundle / "device" / "cpp"
    configured = run_("cmake", "-S", sources, "-B", build, f"-DONNXRUNTIME_ROOT={sdk}")
    assert configured.returncode == 0, configured.stderr
    built = run_("cmake", "--build", build)
    assert (built.returncode, "warning" in built.stderr) == (0, False), built.stderr
    return build / "classify"


def bare(folder: Path, *arguments: str) -> Path:
    """Python of a fresh virtual environment that contains only what `pip install` installs."""
    venv.create(folder)
    python = folder / "bin" / "python"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "--disable-pip-version-check",
        "--quiet",
    ]
    subprocess.run([*pip, "install", "--no-compile", *arguments], check=True, capture_output=True)
    return python


@contextmanager
def file_system(place: Path, options: str) -> Iterator[Path]:
    """A tmpfs with these options, mounted at a new folder; skips where one cannot be: it needs root."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", place]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        yield place
    finally:
        # Lazily: what was mapped there may still be held
        subprocess.run(["umount", "--lazy", place], check=True)


def rewrite(manifest: Path, change: dict[str, Any]) -> None:
    """Alter a manifest and recompute its digest, as a deliberate attacker would."""
    data = {**json.loads(manifest.read_text()), **change}
    del data["digest"]
    manifest.write_bytes(with_digest(json.dumps(data, indent=1) + "\n"))


def steps_done(out: Path) -> int:
    """Stage * 1000 + step of the last save; -1 before the first save."""
    try:
        data = json.loads((out / "state" / "state.json").read_text())
    except (OSError, ValueError):
        return -1
    return int(data["stage"]) * 1000 + int(data["step"])


# Files that take minutes, the slowest first, so that no process is left alone with one of them at the end
SLOW = (
    "test_tasks.py",
    "test_bundle.py",
    "test_folds.py",
    "test_distributed.py",
    "test_update.py",
    "test_qat.py",
    "test_ssh.py",
    "test_search.py",
    "test_resume.py",
    "test_attribution.py",
    "test_runners.py",
    "test_budgets.py",
    "test_readme.py",
    "test_bench.py",
    "test_parity.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of slow files first."""
    rank = {name: place for place, name in enumerate(SLOW)}
    items.sort(key=lambda item: rank.get(item.path.name, len(SLOW)))


@pytest.fixture(scope="session", autouse=True)
def converted_once() -> Iterator[None]:
    """Trace each architecture, and quantize the shared run, build its float64 reference and time which of
    its operators stay in float, once for all exports."""

    def once(make: Callable[..., Any]) -> Callable[..., Any]:
        made: dict[str, Any] = {}

        def again(model: nn.Module, *rest: object) -> Any:
            key = fingerprint(model) + repr(rest)
            if key not in made:
                made[key] = make(model, *rest)
            return copy.deepcopy(made[key])  # so that tests cannot affect each other

        return again

    traced: dict[str, Trace] = {}

    def traced_once(model: nn.Module, size: int) -> Trace:
        shapes = [(name, value.shape) for name, value in model.state_dict().items()]
        key = f"{model} {shapes} {size}"
        if key not in traced:
            traced[key] = Trace(model, size)
        return traced[key]

    quantized: dict[str, onnx.ModelProto] = {}
    quantize = int8.int8

    def quantized_once(core: onnx.ModelProto, ranges: Any, *rest: Any, **more: Any) -> Any:
        told = hashlib.sha256(core.SerializeToString(deterministic=True))
        told.update(repr(sorted((name, vars(each)) for name, each in ranges.items())).encode())
        for value in (*rest, *more.values()):
            told.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
        key = told.hexdigest() + repr(list(more))
        if key not in quantized:
            quantized[key] = quantize(core, ranges, *rest, **more)
        return copy.deepcopy(quantized[key])

    kept: dict[str, list[str]] = {}
    first_in_float = int8._first_in_float

    def timed_once(core: onnx.ModelProto, ranges: Any, context: Any) -> Any:
        if not context.here:  # it asks a device, or nobody
            return first_in_float(core, ranges, context)
        key = hashlib.sha256(core.SerializeToString(deterministic=True)).hexdigest()
        key += context.target_name + str(context.frame)
        if key not in kept:
            kept[key] = first_in_float(core, ranges, context)
        return list(kept[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence, "SIZES", ("320x240", "640x480"))  # the largest take 30 s
        patch.setattr(export, "Trace", traced_once)
        patch.setattr(export, "Reference", once(export.Reference))
        patch.setattr(int8, "int8", quantized_once)
        patch.setattr(int8, "_first_in_float", timed_once)
        yield


@pytest.fixture(scope="session")
def elpv() -> list[tuple[Path, str]]:
    """Every ELPV photograph with a certain label, and its class."""
    folder = Path(elpv_file).parent / "data"
    rows = [line.split() for line in (folder / "labels.csv").read_text().splitlines()]
    return [
        (folder / name, f"{kind}-{'defect' if float(share) else 'ok'}")
        for name, share, kind in rows
        if float(share) in (0.0, 1.0)
    ]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """What a test makes of torch's threads ends with it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@contextmanager
def on_every_core() -> Iterator[None]:
    """Threads and processes that start here may use all cores, as without xdist."""
    if CORES:
        os.sched_setaffinity(0, CORES)
    try:
        yield
    finally:
        if CORES:
            os.sched_setaffinity(0, OWN)


@pytest.fixture
def every_core() -> Iterator[None]:
    """`on_every_core`, for a test."""
    with on_every_core():
        yield


def shared(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that one of the processes which run the tests makes, and all of them read."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    made = root / f"{name}.made"
    with FileLock(root / f"{name}.lock"):
        if not made.exists():
            shutil.rmtree(root / name, ignore_errors=True)  # of one that failed
            (root / name).mkdir()
            make(root / name)
            made.touch()
    return root / name


@pytest.fixture(scope="session")
def sdk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ONNX Runtime's headers from a newer Debian release, its library from the installed wheel."""
    root = shared(tmp_path_factory, "sdk", _fetch_sdk)
    if not (root / "lib").is_dir():
        pytest.skip(f"ONNX Runtime's headers are not to be had: {(root / 'why').read_text()}")
    return root


def _fetch_sdk(root: Path) -> None:
    for name in ("parts", "lists/partial", "cache/archives/partial"):
        (root / name).mkdir(parents=True)
    sources = [Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("debian*")]
    for path in filter(Path.is_file, sources):
        kind = path.suffix if path.suffix in (".list", ".sources") else ".list"
        (root / "parts" / f"{path.stem}{kind}").write_text(
            path.read_text().replace("bookworm", "trixie")
        )
    settings = (
        "Dir::Etc::sourcelist=/dev/null",
        f"Dir::Etc::sourceparts={root}/parts",
        "Debug::NoLocking=1",
        f"Dir::State::lists={root}/lists",
        f"Dir::Cache={root}/cache",
        "APT::Sandbox::User=",
    )
    options = [part for setting in settings for part in ("-o", setting)]
    run_("apt-get", *options, "update")
    fetched = run_("apt-get", *options, "download", "libonnxruntime-dev", cwd=root)
    if not list(root.glob("*.deb")):
        (root / "why").write_text(fetched.stderr[-200:])
        return
    run_("dpkg", "-x", min(root.glob("*.deb")), root)
    (root / "lib").mkdir(exist_ok=True)
    library = next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*"))
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (root / "lib" / name).symlink_to(library)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium with a camera that shows a test picture; None where there is no Chromium."""
    if CHROMIUM is None:
        yield None
        return
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        fake = [
            "--no-sandbox",
            "--use-fake-device-for-media-stream",
            "--use-fake-ui-for-media-stream",
        ]
        opened = play.chromium.launch(executable_path=CHROMIUM, args=fake)
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def photos(elpv: list[tuple[Path, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class folder of 4 x 30 photographs, in a path with a space."""

    def make(place: Path) -> None:
        root = place / "solar cells"
        for label in sorted({label for _, label in elpv}):
            folder = root / label
            folder.mkdir(parents=True)
            for path in [path for path, its in elpv if its == label][:PER_CLASS]:
                (folder / path.name).write_bytes(path.read_bytes())
        (root / "LICENSE.txt").write_text(NOTICE)

    return shared(tmp_path_factory, "my photos", make) / "solar cells"


@pytest.fixture(scope="session")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the default recipe at 96 pixels."""

    def make(place: Path) -> None:
        out = place / "small run"
        result = ftkit("train", photos, "--out", out, *settings(*TINY))
        assert result.exit_code == 0, result.output
        (out / "trace.txt").write_text(result.stdout)

    return shared(tmp_path_factory, "runs", make) / "small run"


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An Ed25519 key pair in PEM: private, public."""

    def make(folder: Path) -> None:
        private = Ed25519PrivateKey.generate()
        pem = serialization.Encoding.PEM
        plain, info = serialization.NoEncryption(), serialization.PublicFormat.SubjectPublicKeyInfo
        (folder / "key.pem").write_bytes(
            private.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
        )
        (folder / "pub.pem").write_bytes(private.public_key().public_bytes(pem, info))

    folder = shared(tmp_path_factory, "keys", make)
    return folder / "key.pem", folder / "pub.pem"


@pytest.fixture(scope="session")
def bundle(run: Path, keys: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's bundle, with every optional part of an export."""
    return (
        shared(tmp_path_factory, "bundles", lambda place: _export_all(run, place, keys[0]))
        / "small bundle"
    )


@pytest.fixture(scope="session")
def benched(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A copy of the bundle that has checked and measured itself, where Python writes bytecode as it does by
    default; and what it measured."""
    place = shared(tmp_path_factory, "benched", lambda place: _bench_itself(bundle, place))
    return place / "bundle", json.loads((place / "device.json").read_text())


def _bench_itself(bundle: Path, place: Path) -> None:
    shutil.copytree(bundle, place / "bundle")
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    for what in (["--self-check"], ["--bench", "--quick", "--threads", "1"]):
        done = subprocess.run(
            [sys.executable, place / "bundle" / "device" / "classify.py", *what],
            env=clean,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        (place / "device.json").write_text(done.stdout)


def _export_all(run: Path, place: Path, key: Path) -> None:
    out = place / "small bundle"
    with on_every_core():  # its latencies are of one thread and of two
        result = ftkit(
            "export",
            run,
            "--out",
            out,
            "--quick",
            "--c",
            "--ort",
            "--handoff",
            "--zip",
            "--sign",
            key,
        )
    assert result.exit_code == 0, result.output
    (place / "export.txt").write_text(result.stdout)
