"""A file that appears in a watched folder is taken once."""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import file_system

from ftkit_export.runtime.collect import Collector
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.watch import watch


def _looks(*steps: Callable[[], object]) -> Callable[[], object]:
    """Each step happens between two looks; the last look ends the watch."""
    waiting = iter([*steps, lambda: None])
    return lambda: next(waiting, lambda: False)()


def test_a_file_is_taken_once_when_it_no_longer_grows_also_after_a_restart(tmp_path: Path) -> None:
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    one.write_bytes(b"1")
    (tmp_path / "notes.txt").write_text("")

    def grow() -> None:
        with two.open("ab") as file:
            file.write(b"2")

    taken = list(watch(tmp_path, _looks(grow, grow, grow, lambda: None)))
    assert taken == [one, two]
    assert list(watch(tmp_path, _looks())) == []

    two.write_bytes(b"another")
    os.utime(one, ns=(1, 1))  # another file of the same name
    assert list(watch(tmp_path, _looks())) == [one, two]

    one.unlink()
    list(watch(tmp_path, _looks()))
    assert "one.png" not in (tmp_path / ".taken").read_text(), "the ledger does not grow for ever"


def test_a_file_that_ends_the_process_is_not_taken_again(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"1")
    first = next(watch(tmp_path, _looks()))
    assert [path.name for path in itertools.chain([first], watch(tmp_path, _looks()))] == [
        "a.png",
        "b.png",
    ]


def test_a_name_that_is_no_text_is_taken_once_too(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff.png")
    (tmp_path / name).write_bytes(b"1")
    (tmp_path / "two\nlines.png").write_bytes(b"1")
    (tmp_path / "two\rlines.png").write_bytes(b"1")
    (tmp_path / "itself.png").symlink_to("itself.png")
    assert list(watch(tmp_path, _looks())) == [tmp_path / name]
    assert list(watch(tmp_path, _looks())) == []


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FtkitError, match="expected a folder to watch"):
        next(watch(tmp_path / "none"))


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own without room for another file or byte."""
    with file_system(tmp_path / "disk", "size=64k,nr_inodes=3") as place:
        (place / "a.png").write_bytes(b"1")
        # The third inode, after the folder's
        with contextlib.suppress(OSError), (place / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        yield place


def test_on_a_full_disk_images_are_taken_and_nothing_is_collected(
    full_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def more() -> None:
        (full_disk / "a.png").rename(full_disk / "b.png")

    taken = watch(full_disk, _looks(lambda: None, lambda: None, more, lambda: None, lambda: None))
    assert [path.name for path in taken] == ["a.png", "b.png"], "each once"
    assert capsys.readouterr().err.count("cannot be noted") == 1

    collector = Collector(full_disk / "collected")
    assert "No space left" in collector.stopped
    collector.close()


def test_the_ledger_stays_small_without_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ftkit_export.runtime.watch.MOST_GONE", 5)
    numbers = iter(range(40))

    def arrives() -> bool:
        for path in tmp_path.glob("*.png"):  # the one before was taken
            if path.name in (tmp_path / ".taken").read_text():
                path.unlink()
                if (number := next(numbers, None)) is None:
                    return False
                (tmp_path / f"{number:03d}.png").write_bytes(b"x")
        return True

    (tmp_path / "first.png").write_bytes(b"x")
    taken = [path.name for path in watch(tmp_path, arrives)]
    assert len(taken) == len(set(taken)) == 41
    assert len((tmp_path / ".taken").read_text().splitlines()) <= 8
