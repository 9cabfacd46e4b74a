"""Files and folders are whole or not there."""

from pathlib import Path

import pytest

from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.files import folder_beside, replacing, write_atomically


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_atomically(path, b"old")
    with pytest.raises(ZeroDivisionError), replacing(path) as beside:
        beside.write_bytes(b"half")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FtkitError, match=r"file/report\.html: expected to write 0\.0 MB"):
        write_atomically(tmp_path / "file" / "report.html", b"new")


def test_a_folder_is_hidden_until_it_is_renamed_and_two_never_meet(tmp_path: Path) -> None:
    one = folder_beside(tmp_path / "bundle")
    other = folder_beside(tmp_path / "bundle")
    assert one != other
    assert {path.name[0] for path in tmp_path.iterdir()} == {"."}
    one.rename(tmp_path / "bundle")
    assert (tmp_path / "bundle").is_dir()
