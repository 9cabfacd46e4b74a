"""Zipped bundles: reproducible, opened without trust, signed, never altered by new evidence."""

import json
import shutil
import stat
import zipfile
from pathlib import Path

import pytest
from conftest import ftkit, rewrite

import ftkit_export.bundle.archive as archives
from ftkit_export.bundle.archive import opened, pack
from ftkit_export.runtime.errors import BundleError
from ftkit_export.runtime.verify import verify


def test_a_zip_verifies_and_is_the_same_each_time(bundle: Path, tmp_path: Path) -> None:
    zipped = bundle.with_name(bundle.name + ".zip")
    assert ftkit("verify", zipped).exit_code == 0
    pack(bundle, tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == zipped.read_bytes()


@pytest.mark.parametrize(
    "name", ["../outside.txt", "/outside.txt", "b/../../outside.txt", "b\\..\\outside.txt", "C:x"]
)
def test_a_name_that_leads_outside_is_refused_and_nothing_is_written(
    tmp_path: Path, name: str
) -> None:
    path = tmp_path / "in" / "evil.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("b/manifest.json", "{}")
        info = zipfile.ZipInfo("x")
        info.filename = name
        archive.writestr(info, "outside")
    with pytest.raises(BundleError, match="expected names inside it"), opened(path):
        pass
    assert not list(tmp_path.rglob("outside*"))


def test_an_archive_that_declares_more_than_4_gb_is_refused_before_it_is_unpacked(
    tmp_path: Path,
) -> None:
    """Two entries of 3 GB each, as the directory has it; the file itself has 400 bytes."""
    path = tmp_path / "huge.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("b/manifest.json", "{}")
        for name in ("b/one.onnx", "b/two.onnx"):
            archive.writestr(name, "x")
            archive.filelist[-1].file_size = 3 << 30
    assert path.stat().st_size < 1000
    with pytest.raises(BundleError, match="expected at most 4 GB"), opened(path):
        pass
    assert list(tmp_path.iterdir()) == [path]


def test_links_bombs_and_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "evil.zip"
    link = zipfile.ZipInfo("b/model.onnx")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(BundleError, match="found the link"), opened(path):
        pass

    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("b/manifest.json", bytes(50_000_000))
    raw = path.read_bytes()  # the zip directory declares 10 bytes, the stream holds 50 million
    promised = (50_000_000).to_bytes(4, "little")
    path.write_bytes(raw.replace(promised, (10).to_bytes(4, "little")))
    with pytest.raises(BundleError), opened(path):
        pass

    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("b/manifest.json", "{}" * 500)
    whole = path.read_bytes()
    for place in range(46, 52):  # in the deflated stream
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        with pytest.raises(BundleError), opened(path):
            pass

    for number, content in enumerate((b"junk", b"")):
        path.write_bytes(content)
        result = ftkit("verify", path)
        assert (result.exit_code, "expected a zipped bundle" in result.stderr) == (2, True), number
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("photo.jpg", b"x")
    assert "expected one bundle in it, found 0" in ftkit("verify", path).stderr


def test_the_promised_size_bounds_what_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "huge.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(10_001):
            archive.writestr(f"b/{number}", b"")
    with pytest.raises(BundleError, match="at most 4 GB and 10,000 files"), opened(path):
        pass


def test_a_signature_holds_for_its_key_and_its_manifest_only(
    bundle: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    assert "signed with pub.pem" in ftkit("verify", bundle, "--key", keys[1]).stdout
    result = ftkit("verify", bundle, "--key", keys[0])
    assert (result.exit_code, "expected an Ed25519 public key in PEM" in result.stderr) == (2, True)
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    rewrite(copy / "manifest.json", {"name": "another"})
    assert ftkit("verify", copy).exit_code == 0, "hashes alone do not protect the manifest"
    result = ftkit("verify", copy, "--key", keys[1])
    assert (
        result.exit_code,
        "expected a signature by pub.pem, found another" in result.stderr,
    ) == (2, True)
    (copy / "manifest.sig").unlink()
    assert "expected a signature, found none" in ftkit("verify", copy, "--key", keys[1]).stderr


def test_a_key_that_cannot_sign_stops_an_export_before_it_begins(run: Path, tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_text("no key")
    result = ftkit("export", run, "--out", tmp_path / "b", "--sign", tmp_path / "key.pem")
    assert (result.exit_code, "expected an Ed25519 private key" in result.stderr) == (2, True)
    assert not (tmp_path / "b").exists()


def test_new_evidence_goes_into_a_copy(bundle: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    copy = tmp_path / "copy"
    for _ in range(2):
        assert ftkit("verify", bundle, "--add-to", copy).exit_code == 0
    (evidence,) = (copy / "evidence").iterdir()
    found = json.loads(evidence.read_text())
    assert (found["passed"], found["provider"], found["machine"]["onnxruntime"] != "") == (
        True,
        "cpu",
        True,
    )
    assert verify(copy).passed, "evidence does not break the seal"
    assert before == {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    for wrong in (bundle, tmp_path):
        assert ftkit("verify", bundle, "--add-to", wrong).exit_code == 2
    (copy / "evidence" / "run.sh").write_text("")
    assert "expected only files the manifest lists" in ftkit("verify", copy).stderr


def _stranger(bundle: Path, keys: tuple[Path, Path], folder: Path) -> Path:
    """A zip whose manifest was altered after signing, and which unpacks to a lot of data."""
    copy = Path(shutil.copytree(bundle, folder / "copy"))
    rewrite(copy / "manifest.json", {"name": "another"})
    (copy / "padding").write_bytes(bytes(200_000_000))
    pack(copy, folder / "stranger.zip")
    return folder / "stranger.zip"


@pytest.mark.parametrize("command", ["verify", "predict", "eval", "bench"])
def test_a_zip_that_is_not_signed_with_the_key_is_refused_before_it_is_unpacked(
    bundle: Path,
    keys: tuple[Path, Path],
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    zipped = _stranger(bundle, keys, tmp_path)
    unpacked = []
    monkeypatch.setattr(archives, "_unpack", lambda *paths: unpacked.append(paths))
    more = {"predict": [min(photos.rglob("*.png"))], "eval": [photos]}.get(command, [])
    result = ftkit(command, zipped, *more, "--key", keys[1])
    assert (
        result.exit_code,
        "expected a signature by pub.pem, found another" in result.stderr,
    ) == (2, True)
    assert not unpacked


def test_every_command_that_opens_a_bundle_can_ask_for_its_signature(
    bundle: Path, keys: tuple[Path, Path], photos: Path, tmp_path: Path
) -> None:
    zipped, image = bundle.with_name(bundle.name + ".zip"), min(photos.rglob("*.png"))
    for where in (bundle, zipped):
        assert ftkit("predict", where, image, "--key", keys[1]).exit_code == 0
    assert ftkit("predict", bundle / "model.onnx", image, "--key", keys[1]).exit_code == 2, (
        "a file has no signature"
    )
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    (copy / "labels.txt").write_text("cat\n")
    result = ftkit("predict", copy, image, "--key", keys[1])
    assert (result.exit_code, "labels.txt: expected sha256" in result.stderr) == (2, True), (
        "the hashes count too"
    )
