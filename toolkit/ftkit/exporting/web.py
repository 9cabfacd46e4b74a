"""Web page that runs a bundle's model.onnx locally in the browser, with ONNX Runtime Web.

    add_page(bundle, runtime())            # BUNDLE/device/web, all files local
    with serving("bundle", files) as url:  # 127.0.0.1 only

The runtime is the npm package onnxruntime-web at one version, checked by its hash, fetched once by
npm or given as the .tgz that `npm pack` writes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

from ftkit.utils.cache_folder import cache_folder, clear_abandoned, publish
from ftkit.utils.local_server import listening, names_this_machine
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.predict import load_model
from ftkit_export.runtime.verify import read_manifest

VERSION = "1.30.0"
SHA512 = (
    "ab4cbe26baedba45d2cec05610c71c55fa97db92d19a8b171c5f8269126683ca"
    "590a5cdc57bb2f35ce2b298de32f4d956fb42644c0ecd528a0a91e025c07ca61"
)
FILES = (
    "ort.wasm.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
    "ort.webgpu.min.mjs",
    "ort-wasm-simd-threaded.asyncify.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
)
PAGE = "device/web"
CONTENT_TYPES = {
    ".mjs": "text/javascript",
    ".js": "text/javascript",
    ".wasm": "application/wasm",
    ".json": "application/json",
}
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",  # with the next one, WASM may use threads
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Content-Security-Policy": "default-src 'self' 'wasm-unsafe-eval' blob: data:; style-src 'self' 'unsafe-inline'",
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
}


def runtime(package: Path | None = None) -> Path:
    """Folder with ONNX Runtime Web's files: cached, from `package` (a .tgz), or fetched by npm.

    Raises FtkitError when npm is missing or fails, or `package` is not the expected one.
    """
    folder = cache_folder() / "web" / f"onnxruntime-web-{VERSION}"
    if folder.is_dir():
        return folder

    folder.parent.mkdir(parents=True, exist_ok=True)
    clear_abandoned(folder.parent)

    beside = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
    try:
        _unpack(package or _fetched(beside), beside)
        publish(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)

    return folder


def _fetched(folder: Path) -> Path:
    wanted = f"onnxruntime-web@{VERSION}"
    npm = shutil.which("npm") or shutil.which("npm", path=str(Path(sys.executable).parent))
    if npm is None:
        raise FtkitError(
            f"--web: expected npm to fetch {wanted}, found none. Try `pip install 'ftkit[web]'`, or "
            f"`npm pack {wanted}` elsewhere and --runtime FILE.tgz"
        )

    done = subprocess.run(
        [npm, "pack", wanted, "--silent"], cwd=folder, capture_output=True, text=True, check=False
    )
    packages = list(folder.glob("*.tgz"))
    if done.returncode or not packages:
        said = next(
            (line for line in done.stderr.splitlines() if line.strip()),
            f"exit code {done.returncode}",
        )
        raise FtkitError(
            f"--web: expected npm to fetch {wanted}, found: {said}. Try again with a network, or "
            f"`npm pack {wanted}` elsewhere and --runtime FILE.tgz"
        )

    return packages[0]


def _unpack(package: Path, folder: Path) -> None:
    wrong = f"{package}: expected onnxruntime-web {VERSION} as `npm pack` writes it, found"
    if not package.is_file():
        raise FtkitError(f"{wrong} no file. Check the path")

    content = package.read_bytes()
    if hashlib.sha512(content).hexdigest() != SHA512:
        raise FtkitError(f"{wrong} other bytes. Try `npm pack onnxruntime-web@{VERSION}`")

    with tarfile.open(package) as archive:
        for name in FILES:
            member = archive.extractfile(f"package/dist/{name}")
            assert member  # guaranteed by the hash
            (folder / name).write_bytes(member.read())

    for path in folder.glob("*.tgz"):
        path.unlink()


def add_page(bundle: Path, files: Path, folder: Path | None = None) -> None:
    """Write the page, the runtime's `files` and model.json into `folder`.

    folder: by default the bundle's device/web. model.json: name, labels, readout, input_format,
    abstain_threshold, out_of_domain, as in the file's metadata, which a browser cannot read.
    """
    folder = folder or bundle / PAGE
    folder.mkdir(parents=True, exist_ok=True)
    import ftkit_export

    for source in (Path(ftkit_export.__file__).parent / "device" / "web").iterdir():
        shutil.copyfile(source, folder / source.name)
    for name in FILES:
        shutil.copyfile(files / name, folder / name)

    model = load_model(bundle)
    metadata: dict[str, Any] = model.session.metadata
    domain = metadata.get("out_of_domain")
    told = {
        "name": json.loads(metadata.get("recipe", "{}")).get("name", bundle.name),
        "labels": model.labels,
        "readout": model.readout.as_json(),
        "input_format": model.input_format,
        "abstain_threshold": float(metadata.get("abstain_threshold", 0)),
        "out_of_domain": json.loads(domain) if domain else None,
    }
    (folder / "model.json").write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")


class _Handler(SimpleHTTPRequestHandler):
    """Serve the bundle's files, and the page from another folder, to local browsers only."""

    def __init__(self, *args: Any, page: Path, **more: Any):
        self._page = page
        self.extensions_map = {**SimpleHTTPRequestHandler.extensions_map, **CONTENT_TYPES}
        super().__init__(*args, **more)

    def send_head(self) -> Any:
        """Send one file; / redirects to the page.

        Requests that name another host than this machine get 403, links out of the served folders
        404.
        """
        if not names_this_machine(self.headers):
            self.send_error(403)
        elif self.path == "/":
            self.send_response(302)
            self.send_header("Location", f"/{PAGE}/")
            self.end_headers()
        elif not self._served():
            self.send_error(404)
        else:
            return super().send_head()

        return None

    def _served(self) -> bool:
        """Whether the request is for a file of the bundle or the page, or for the page itself."""
        try:
            place = Path(self.translate_path(self.path)).resolve()
        except ValueError:  # a NUL
            return False
        page = self._page.resolve()
        inside = place.is_relative_to(Path(self.directory).resolve()) or place.is_relative_to(page)
        return inside and (place == page or not place.is_dir())

    def list_directory(self, path: Any) -> None:
        """Refuse directory listings."""
        self.send_error(404)

    def translate_path(self, path: str) -> str:
        """Path of the file that a request asks for."""
        path_here = Path(super().translate_path(path))
        own = Path(self.directory) / PAGE
        return (
            str(self._page / path_here.relative_to(own))
            if path_here.is_relative_to(own)
            else str(path_here)
        )

    def end_headers(self) -> None:
        """Add the headers that every response has."""
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: the terminal is left to the user."""


@contextmanager
def serving(bundle: Path, files: Path, port: int = 0) -> Iterator[str]:
    """Serve the page for `bundle` on 127.0.0.1 while the block runs; yields its address.

    port 0: any free port. Raises FtkitError when the port is taken, BundleError when `bundle` is
    not a bundle.
    """
    read_manifest(bundle)
    with tempfile.TemporaryDirectory() as name:
        page = Path(name)
        add_page(bundle, files, page)

        handler = partial(_Handler, directory=str(bundle), page=page)
        with listening(handler, port) as number:
            yield f"http://127.0.0.1:{number}/{PAGE}/"
