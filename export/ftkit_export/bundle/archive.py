"""Pack a bundle into a reproducible zip, sign it, and open untrusted ones safely.

    pack(bundle, Path("bundle.zip"))
    with opened(Path("bundle.zip")) as bundle: ...        # a folder; a zip is unpacked into a temporary one
    sign(bundle, Path("key.pem")); check_signature(bundle, Path("key.pub.pem"))

The signature is Ed25519 (RFC 8032) over manifest.json, which holds the hash of every other file.
"""

from __future__ import annotations

import errno
import lzma
import shutil
import stat
import subprocess
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import util
from pathlib import Path, PurePosixPath
from typing import Any

from ftkit_export.runtime.errors import BundleError, FtkitError
from ftkit_export.runtime.files import replacing
from ftkit_export.runtime.verify import MANIFEST, SIGNATURE, check_files, read_manifest

# The earliest date a zip can hold, for every file: two archives do not differ by dates
EPOCH = (
    1980,
    1,
    1,
    0,
    0,
    0,
)
LARGEST_ARCHIVE = 4 << 30  # bytes unpacked
MOST_FILES = 10_000
# Raised by zipfile for a damaged or malicious archive.
BROKEN_ZIP = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    ValueError,
    RuntimeError,
    EOFError,
    OSError,
)
LARGEST_MANIFEST = 64 << 20
LARGEST_SIGNATURE = 4096


def pack(bundle: Path, out: Path) -> None:
    """Write `bundle` as a zip, atomically.

    Names are sorted, dates fixed; all files are under the folder's name.
    """
    try:
        with replacing(out) as beside:
            _write_zip(bundle, beside)
    except OSError as error:
        raise FtkitError(
            f"{out}: expected to write a zip, found {error.strerror}. Free some disk"
        ) from None


def _write_zip(bundle: Path, beside: Path) -> None:
    with zipfile.ZipFile(beside, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for path in sorted(path for path in bundle.rglob("*") if path.is_file()):
            info = zipfile.ZipInfo(
                (PurePosixPath(bundle.name) / path.relative_to(bundle).as_posix()).as_posix(), EPOCH
            )
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = 0o644 << 16
            archive.writestr(info, path.read_bytes())


@contextmanager
def opened(bundle: Path, key: Path | None = None) -> Iterator[Path]:
    """Yield a bundle's folder; a zip is unpacked for the duration of the block.

    key: public key that must have signed the manifest; for a zip this is checked before unpacking.
    Raises BundleError for another signature, and for a zip that would write outside its folder,
    contains links, or unpacks to more than 4 GB or 10,000 files.
    """
    if not bundle.is_file():
        if key:
            check_signature(bundle, key)
        yield bundle
        return

    with tempfile.TemporaryDirectory() as scratch:
        yield extracted(bundle, Path(scratch), key)


def extracted(source: Path, into: Path, key: Path | None = None) -> Path:
    """Unpack a zip into a folder, and return the bundle's folder in it.

    key and errors: as in `opened`. The files' hashes are not checked.
    """
    if key:
        _check_signature_inside(source, key)
    _unpack(source, into)
    manifests = [path.parent for path in into.glob(f"**/{MANIFEST}")]
    if len(manifests) != 1:
        raise BundleError(
            f"{source}: expected one bundle in it, found {len(manifests)}. Try `ftkit export --zip`"
        )
    return manifests[0]


@contextmanager
def unpacked(path: str | Path, key: Path | None = None) -> Iterator[Path]:
    """Yield the unpacked bundle if `path` is a .zip, else `path` itself: a folder or ONNX file.

    key: public key that must have signed the bundle; every file's hash is then checked too. Raises
    BundleError when any of them does not match.
    """
    where = Path(path)
    if key and where.is_file() and where.suffix != ".zip":
        raise BundleError(
            f"{where}: expected a signed bundle, found a single file. Try the bundle's folder or zip"
        )

    with opened(where, key) if key or where.suffix == ".zip" else nullcontext(where) as folder:
        if key:
            check_files(folder, read_manifest(folder)["files"])
        yield folder


def _check_signature_inside(source: Path, key: Path) -> None:
    """Check the signature of the one manifest in a zip, without unpacking the rest."""
    try:
        with zipfile.ZipFile(source) as archive:
            entries = [
                entry
                for entry in archive.infolist()
                if PurePosixPath(entry.filename).name == MANIFEST
            ]
            if len(entries) != 1 or entries[0].file_size > LARGEST_MANIFEST:
                raise BundleError(
                    f"{source}: expected one manifest, found {len(entries)}, or a huge one. "
                    "Do not trust it"
                )

            place = PurePosixPath(entries[0].filename).with_name(SIGNATURE).as_posix()
            signature = (
                archive.open(place).read(LARGEST_SIGNATURE) if place in archive.namelist() else None
            )
            _check(archive.read(entries[0]), signature, key, f"{source}: {place}")
    except BROKEN_ZIP as error:
        raise BundleError(
            f"{source}: expected a zipped bundle, found: {error}. Copy it again"
        ) from None


def _unpack(source: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(source) as archive:
            entries = archive.infolist()
            if (
                len(entries) > MOST_FILES
                or sum(entry.file_size for entry in entries) > LARGEST_ARCHIVE
            ):
                raise BundleError(
                    f"{source}: expected at most 4 GB and 10,000 files, found more. Do not trust it"
                )

            for entry in entries:
                name = PurePosixPath(entry.filename)
                if (
                    name.is_absolute()
                    or ".." in name.parts
                    or "\\" in entry.filename
                    or ":" in entry.filename
                ):
                    raise BundleError(
                        f"{source}: expected names inside it, found {entry.filename!r}. Do not trust it"
                    )

                if stat.S_ISLNK(entry.external_attr >> 16):
                    raise BundleError(
                        f"{source}: expected plain files, found the link {entry.filename!r}. Do not trust it"
                    )
                if entry.is_dir():
                    continue

                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)

                with archive.open(entry) as content, path.open("xb") as file:
                    _copy(content, file, entry.file_size, f"{source}: {entry.filename}")
    except BROKEN_ZIP as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:  # not the zip's fault
            raise
        raise BundleError(
            f"{source}: expected a zipped bundle, found: {error}. Copy it again"
        ) from None


def _copy(content: Any, file: Any, size: int, where: str) -> None:
    """Copy `size` bytes, as declared by the zip. Raises BundleError when the stream holds more."""
    left = size
    while block := content.read(min(1 << 20, left + 1)):
        left -= len(block)
        if left < 0:
            raise BundleError(
                f"{where}: expected {size} bytes as promised, found more. Do not trust it"
            )
        file.write(block)


def sign(bundle: Path, key: Path) -> None:
    """Write manifest.sig.

    key: PEM file with an Ed25519 private key (`openssl genpkey -algorithm ed25519`).
    """
    private = _load(key, "load_pem_private_key", "Ed25519PrivateKey", "private")
    (bundle / SIGNATURE).write_bytes(private.sign((bundle / MANIFEST).read_bytes()))


def check_signature(bundle: Path, key: Path) -> None:
    """Check the bundle's signature against a public key (PEM).

    Raises BundleError when it is missing, or made with another key.
    """
    path = bundle / SIGNATURE
    manifest = bundle / MANIFEST
    if not manifest.is_file():
        raise BundleError(
            f"{bundle}: expected a bundle, found no {MANIFEST}. Try `ftkit export RUN`"
        )
    _check(manifest.read_bytes(), path.read_bytes() if path.is_file() else None, key, str(path))


def _check(manifest: bytes, signature: bytes | None, key: Path, where: str) -> None:
    if signature is None:
        raise BundleError(
            f"{where}: expected a signature, found none. Ask for a bundle made with --sign"
        )

    if not _signed_by(manifest, signature, key):
        raise BundleError(
            f"{where}: expected a signature by {key.name}, found another. Do not trust this bundle"
        )


def _signed_by(manifest: bytes, signature: bytes, key: Path) -> bool:
    """By the package cryptography or, on a device without it, by OpenSSL 3's command."""
    if util.find_spec("cryptography") is None and shutil.which("openssl"):
        return _signed_by_openssl(manifest, signature, key)

    public = _load(key, "load_pem_public_key", "Ed25519PublicKey", "public")
    from cryptography.exceptions import InvalidSignature

    try:
        public.verify(signature, manifest)
    except InvalidSignature:
        return False
    return True


def _signed_by_openssl(manifest: bytes, signature: bytes, key: Path) -> bool:
    def openssl(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=False)

    version = openssl("version").stdout
    if not version.startswith("OpenSSL 3"):
        raise FtkitError(
            f"{key}: expected the package cryptography or OpenSSL 3 to check a signature, found {version.strip()}. Try "
            "`pip install cryptography`"
        )
    if (
        "ED25519"
        not in openssl("pkey", "-pubin", "-in", str(key), "-noout", "-text").stdout.upper()
    ):
        raise _bad_key(key, "public")
    with tempfile.TemporaryDirectory() as scratch:
        for name, content in (("manifest", manifest), ("signature", signature)):
            (Path(scratch) / name).write_bytes(content)
        files = ("-in", f"{scratch}/manifest", "-sigfile", f"{scratch}/signature")
        done = openssl("pkeyutl", "-verify", "-pubin", "-inkey", str(key), "-rawin", *files)
    return done.returncode == 0


def require_key(key: Path) -> None:
    """Raises FtkitError when `key` cannot sign, so that an export fails early."""
    _load(key, "load_pem_private_key", "Ed25519PrivateKey", "private")


def _load(key: Path, loader: str, kind: str, half: str) -> Any:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise FtkitError(
            f"{key}: expected the package cryptography, found none. Try `pip install 'ftkit[sign]'`"
        ) from None

    try:
        data = key.read_bytes()
        loaded = (
            getattr(serialization, loader)(data, None)
            if half == "private"
            else getattr(serialization, loader)(data)
        )
        if not isinstance(loaded, getattr(ed25519, kind)):
            raise ValueError
    except (OSError, ValueError, TypeError):
        raise _bad_key(key, half) from None

    return loaded


def _bad_key(key: Path, half: str) -> FtkitError:
    return FtkitError(
        f"{key}: expected an Ed25519 {half} key in PEM without a password, found none. "
        "Try `openssl genpkey -algorithm ed25519 -out key.pem`"
    )


def add_evidence(bundle: Path, copy: Path, name: str, evidence: str) -> Path:
    """Write evidence/NAME.json into `copy`, a copy of `bundle` made if missing; return its path.

    The sealed files are not changed. Raises BundleError when `copy` is not a copy of `bundle`.
    """
    if copy.resolve() == bundle.resolve():
        raise BundleError(
            f"{copy}: expected a copy, found the sealed bundle itself. Try another folder"
        )

    if not copy.exists():
        shutil.copytree(bundle, copy)
    elif (
        not (copy / MANIFEST).is_file()
        or (copy / MANIFEST).read_bytes() != (bundle / MANIFEST).read_bytes()
    ):
        raise BundleError(
            f"{copy}: expected a copy of {bundle}, found something else. Try a new folder"
        )

    path = copy / "evidence" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(evidence)

    return path
