"""Install bundles on a device: checked, switched at once, and back again where one fails.

    update(Path("new.zip"), Path("/opt/camera"), key=Path("pub.pem"))
    rollback(Path("/opt/camera"))

    /opt/camera/current      a link to the bundle that runs
    /opt/camera/previous     a link to the one before
    /opt/camera/versions/    both of them

A new bundle must be signed, whole, no older, pass its self-check on this very device, and be no
slower there than the one that runs. Only then is `current` replaced, in one atomic step: at any
moment, also after a power cut, it is the old bundle or the new one. A zip may lack files that the
running bundle has (`delta`): they are copied from it, and checked like all others.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftkit_export.bundle.archive import EPOCH, check_signature, extracted
from ftkit_export.runtime.drift import least_images
from ftkit_export.runtime.errors import BundleError, FtkitError
from ftkit_export.runtime.files import flush, folder_beside, replacing
from ftkit_export.runtime.latency import race
from ftkit_export.runtime.predict import read_reference
from ftkit_export.runtime.verify import (
    MANIFEST,
    SIGNATURE,
    check_files,
    check_listed,
    read_manifest,
    sha256,
)

CURRENT = "current"
PREVIOUS = "previous"
VERSIONS = "versions"
PROBATION = "probation.json"
FAILED = "failed.json"
SLOWER = 0.1  # of the running bundle's time that a new one may take longer
FRAMES = 100  # that a new bundle must answer before it is trusted, at least
SELF_CHECK_SECONDS = 600
COUNTING_S = 2.0  # for which the lock may be held by a running bundle that counts its frames


@dataclass(frozen=True, kw_only=True)
class Update:
    """A finished update. version: the bundle's counter. ratio: its time relative to that of the
    bundle before, with its 95 % bounds; None where none ran."""

    folder: Path
    version: int
    replaced: Path | None
    ratio: tuple[float, float, float] | None


def update(
    source: Path,
    into: Path,
    *,
    key: Path | None,
    allow_downgrade: bool = False,
    slower: float = SLOWER,
    threads: int = 1,
) -> Update:
    """Install the bundle in a zip or folder. key: the public key that must have signed it; None
    takes any bundle.

    slower: share of the running bundle's time that it may take longer. Raises BundleError for a
    bundle that is not signed with the key, altered or incomplete; FtkitError for one that is older,
    fails its self-check here, or is slower; also when the disk is full. What ran before still runs
    then.
    """
    try:
        (into / VERSIONS).mkdir(parents=True, exist_ok=True)
        into = into.resolve()
        with _locked(into):
            return _update(source, into, key, allow_downgrade, slower, threads)
    except OSError as error:
        raise FtkitError(
            f"{into}: expected to install {source.name}, found: {error.strerror or error}. The bundle that ran still "
            "runs. Free some disk, or check the path"
        ) from None


def _update(
    source: Path,
    into: Path,
    key: Path | None,
    allow_downgrade: bool,
    slower: float,
    threads: int,
) -> Update:
    running = _whole(current(into))
    beside = folder_beside(into / VERSIONS / "incoming")
    try:
        new = _fetched(source, beside, running, key)
        manifest = read_manifest(new)
        check_files(new, manifest["files"])
        _require_newer(source, manifest, current(into), allow_downgrade)
        if manifest["digest"] in failed(into) and not allow_downgrade:
            raise FtkitError(
                f"{source}: expected a bundle that has not failed here, found one that was rolled back. Try "
                "--allow-downgrade"
            )
        _self_check(source, new)
        ratio = _require_as_fast(source, new, running, slower, threads)

        folder = _place(into, manifest)
        if not folder.exists():
            for path in sorted(new.rglob("*"), reverse=True):
                flush(path)
            flush(new)
            new.rename(folder)
            flush(folder.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)

    replaced = running if running and running != folder.resolve() else None
    if replaced:
        _switch(into, folder, replaced)
    else:
        _point(into / CURRENT, folder)
    _forget(into)
    return Update(folder=folder, version=version_of(manifest), replaced=replaced, ratio=ratio)


def _switch(into: Path, folder: Path, replaced: Path) -> None:
    """Make a new bundle run on probation.

    What to go back to is written with its probation, so that it is known at any moment: the bundle
    replaced or, where that has not proven itself, the one before it.
    """
    pending = probation(into)
    back = (_previous(into) if pending else None) or replaced
    told = {"version": folder.name, "frames": 0, "of": _frames(folder), "back": back.name}
    if pending:  # it goes on, should the disk or the power fail now
        told["pending"] = {name: pending[name] for name in pending if name != "pending"}
    _write(into / PROBATION, told)
    _point(into / CURRENT, folder)
    _point(into / PREVIOUS, back)


def _frames(bundle: Path) -> int:
    """Images that a new bundle must answer: enough for an alarm of its drift test, twice over."""
    try:
        reference = read_reference(bundle)
    except BundleError:  # of a newer ftkit than this device's
        reference = None
    return max(FRAMES, 2 * least_images(reference)) if reference else FRAMES


def _previous(into: Path) -> Path | None:
    """The bundle to go back to; None where there is none."""
    running = current(into)
    link = into / PREVIOUS
    named = (probation(into) or {}).get("back", "")
    places: list[Path] = [link] if not named else [into / VERSIONS / named, link]
    found = [place.resolve() for place in places if place.exists()]
    return next((place for place in found if place != running), None)


def current(into: Path) -> Path | None:
    """The bundle that runs; None before the first."""
    link = into / CURRENT
    return link.resolve() if link.exists() else None


def _whole(bundle: Path | None) -> Path | None:
    """The bundle, or None for one that was damaged since: it is neither a measure for the new one,
    nor what to go back to. Other files beside its own do no harm."""
    if bundle:
        try:
            check_listed(bundle, read_manifest(bundle)["files"])
        except BundleError:
            return None
    return bundle


def version_of(manifest: dict[str, Any]) -> int:
    """A bundle's version counter; 0 for bundles of before there was one."""
    found = manifest.get("version", 0)
    return found if isinstance(found, int) else 0


def failed(into: Path) -> list[str]:
    """Digests of the manifests of bundles that failed their probation here."""
    try:
        return [str(digest) for digest in json.loads((into / FAILED).read_text())]
    except (OSError, ValueError, TypeError):
        return []


def rollback(into: Path, *, bad: bool = False, of: Path | None = None) -> Path:
    """Make the bundle before the running one run again, and return it.

    bad: the running one has failed, and is not installed again, nor gone back to. of: the bundle to go
    back from; waits for an update that is at work, and changes nothing where another runs after it.
    Raises FtkitError when there is none before.
    """
    into = into.resolve()
    with _locked(into, wait=of is not None):
        running = current(into)
        if of is not None and running and running != of:
            return running
        link = into / PREVIOUS
        before = _whole(_previous(into))
        if before is None:
            raise FtkitError(
                f"{into}: expected a whole bundle to go back to, found none. Try an update with --allow-downgrade"
            )
        _point(into / CURRENT, before)
        if bad:
            link.unlink(missing_ok=True)
        elif running:
            _point(link, running)
        (into / PROBATION).unlink(missing_ok=True)
        if bad and running:
            with suppress(BundleError, OSError):  # the disk may be full: what runs matters more
                _write(into / FAILED, [*failed(into), read_manifest(running)["digest"]])
        return before


def _fetched(source: Path, beside: Path, running: Path | None, key: Path | None) -> Path:
    """The new bundle, in a folder below `beside`, with what the running one has of it."""
    new = beside / "bundle"
    if not source.exists():
        raise FtkitError(f"{source}: expected a bundle, found nothing there. Check the path")
    if source.is_dir():
        read_manifest(source)
        shutil.copytree(source, new, symlinks=True)
        for path in new.rglob("*"):
            if path.is_symlink():
                raise BundleError(
                    f"{source}: expected plain files, found the link {path.name!r}. Do not trust it"
                )
        if key:
            check_signature(new, key)
    else:
        extracted(source, beside / "zip", key).rename(new)

    files = read_manifest(new)["files"]
    missing = {name: digest for name, digest in files.items() if not (new / name).exists()}
    if missing and running:
        there = {digest: name for name, digest in read_manifest(running)["files"].items()}
        for name, digest in missing.items():
            if digest in there:
                (new / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(running / there[digest], new / name)
    return new


def _place(into: Path, manifest: dict[str, Any]) -> Path:
    """The folder of this bundle: one that is there and whole, or a name that is free."""
    name = f"{version_of(manifest)}-{manifest['digest'][:12]}"
    number = 1
    while True:
        folder = into / VERSIONS / (name if number == 1 else f"{name}-{number}")
        if not folder.exists():
            return folder
        try:
            if read_manifest(folder)["digest"] == manifest["digest"]:
                check_files(folder, manifest["files"])
                return folder
            number += 1
        except (
            BundleError
        ):  # damaged since; it may be the one that runs, and stays until it does not
            number += 1


def _require_newer(
    source: Path, manifest: dict[str, Any], running: Path | None, allow_downgrade: bool
) -> None:
    if running is None or allow_downgrade:
        return
    try:
        here = version_of(read_manifest(running))
    except BundleError:  # damaged since
        return
    if version_of(manifest) < here:
        raise FtkitError(
            f"{source}: expected version {here} or newer, which runs here, found {version_of(manifest)}. Try "
            "--allow-downgrade"
        )


def _self_check(source: Path, new: Path) -> None:
    """Run the bundle's own self-check, and start its update.py, which installs the next one."""
    python = [sys.executable, "-B"]
    try:
        for command in (("classify.py", "--self-check"), ("update.py", "--help")):
            done = subprocess.run(
                [*python, str(new / "device" / command[0]), command[1]],
                capture_output=True,
                text=True,
                check=False,
                timeout=SELF_CHECK_SECONDS,
            )
            if done.returncode:
                break
    except subprocess.TimeoutExpired:
        raise FtkitError(
            f"{source}: expected its self-check to end within {SELF_CHECK_SECONDS} s here, found it running. It is "
            "not installed"
        ) from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise FtkitError(
            f"{source}: expected its self-check to pass on this device, found: {said}. It is not installed"
        )


def _require_as_fast(
    source: Path, new: Path, running: Path | None, slower: float, threads: int
) -> tuple[float, float, float] | None:
    """Interleaved runs of both files on the new one's golden image."""
    if running is None:
        return None
    models = [running / "model.onnx", new / "model.onnx"]
    if sha256(models[0]) == sha256(models[1]):
        return None
    _, raced = race(models, new / "golden" / "00.png", threads=threads)
    if raced.ratio_low > 1 + slower:
        raise FtkitError(
            f"{source}: expected at most {1 + slower:.2f} of the running bundle's time, found {raced.ratio:.2f} "
            f"[{raced.ratio_low:.2f}, {raced.ratio_high:.2f}]. Try --slower {raced.ratio - 0.9:.1f}"
        )
    return raced.ratio, raced.ratio_low, raced.ratio_high


def _point(link: Path, folder: Path) -> None:
    """Make a link point to a folder below its own, atomically."""
    beside = link.with_name(f".{link.name}.new")
    beside.unlink(missing_ok=True)
    beside.symlink_to(folder.relative_to(link.parent.resolve()), target_is_directory=True)
    beside.replace(link)
    flush(link.parent)


def _write(path: Path, told: object) -> None:
    with replacing(path) as beside:
        beside.write_text(json.dumps(told))


def _forget(into: Path) -> None:
    """Remove all versions but the running one and the one before."""
    kept = {link.resolve() for link in (into / CURRENT, into / PREVIOUS) if link.exists()}
    kept |= {place for place in [_previous(into)] if place}
    for folder in (into / VERSIONS).iterdir():
        if folder.resolve() not in kept:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(into: Path, wait: bool = False) -> Iterator[None]:
    """One update at a time. wait: until another has ended."""
    with (into / ".lock").open("w") as file:
        ends = time.monotonic() + COUNTING_S
        while True:
            try:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except ImportError:  # Windows
                pass
            except OSError:
                if time.monotonic() < ends:
                    time.sleep(0.05)
                    continue
                raise FtkitError(
                    f"{into}: expected no other update at work, found one. Wait for it"
                ) from None
            break
        yield


def delta(old: Path, new: Path, out: Path) -> int:
    """Write a zip of `new` without the files that `old` has too; return the bytes left out.

    It can be installed where `old` runs. The manifest and signature are those of `new`.
    """
    before = set(read_manifest(old)["files"].values())
    manifest = read_manifest(new)
    check_files(new, manifest["files"])
    sent = [name for name, digest in manifest["files"].items() if digest not in before]
    names = [MANIFEST, *([SIGNATURE] if (new / SIGNATURE).is_file() else []), *sent]
    try:
        with (
            replacing(out) as beside,
            zipfile.ZipFile(beside, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive,
        ):
            for name in sorted(names):
                info = zipfile.ZipInfo(f"{new.resolve().name}/{name}", EPOCH)
                info.compress_type = zipfile.ZIP_DEFLATED
                info.external_attr = 0o644 << 16
                archive.writestr(info, (new / name).read_bytes())
    except OSError as error:
        raise FtkitError(
            f"{out}: expected to write a zip, found {error.strerror}. Free some disk"
        ) from None
    return sum((new / name).stat().st_size for name in manifest["files"] if name not in sent)


def probation(into: Path) -> dict[str, Any] | None:
    """What a new bundle has still to show, {"version", "frames", "of", "back"}; None where it is
    trusted. back: the version to go back to."""
    try:
        found: dict[str, Any] = json.loads((into / PROBATION).read_text())
    except (OSError, ValueError):
        return None
    running = current(into)
    # Where the update after it did not come to its end, that of the running one
    for each in (found, found.get("pending")):
        if running and each and each.get("version") == running.name:
            return dict(each)
    return None


def answered(into: Path, version: str, frames: int) -> None:
    """Note how many frames a new bundle has answered; the last ends its probation. version: the name of its
    folder; another one's frames do not count."""
    with _locked(into, wait=True):
        found = probation(into)
        if found is None or found["version"] != version:
            return
        if frames >= found["of"]:
            (into / PROBATION).unlink(missing_ok=True)
        else:
            _write(into / PROBATION, {**found, "frames": frames})
