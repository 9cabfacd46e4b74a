"""What is kept on a device is bounded and fair, and a failure ends the collecting alone."""

import json
from pathlib import Path

import numpy as np
import pytest

from ftkit_export.runtime import collect
from ftkit_export.runtime.collect import Collector, Sighting, logs
from ftkit_export.runtime.errors import FtkitError


def _sighting(**changes: object) -> Sighting:
    plain = {
        "label": "a",
        "probability": 0.9,
        "doubtful": False,
        "foreign": False,
        "score": 1.0,
        "coordinates": np.zeros(2),
        "frame": np.zeros(5),
        "embedding": np.zeros(8),
    }
    return Sighting(**{**plain, **changes})


def _picture(size: int = 1000) -> tuple[bytes, str]:
    return bytes(size), ".png"


def test_each_reason_keeps_a_fair_sample_within_its_number(tmp_path: Path) -> None:
    collector = Collector(tmp_path, control=0.5, most=90, seed=0)
    for number in range(3000):
        collector.offer(
            _sighting(doubtful=number % 3 == 0, foreign=number % 3 == 1),
            lambda number=number: (number.to_bytes(4), ".png"),
        )
    collector.close()
    for reason in ("foreign", "doubtful", "control"):
        kept = [int.from_bytes(path.read_bytes()) for path in (tmp_path / reason).iterdir()]
        assert len(kept) == 30
        assert 1000 < np.mean(kept) < 2000, "neither the first nor the last alone"
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3000
    line = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert set(line) == {
        "time",
        "bundle",
        "label",
        "probability",
        "score",
        "coordinates",
        "frame",
        "kept",
    }


def test_bytes_are_bounded_and_the_oldest_control_goes_first(tmp_path: Path) -> None:
    collector = Collector(tmp_path, control=1.0, megabytes=0.01, seed=0)
    for _ in range(10):
        collector.offer(_sighting(), _picture)
    controls = sorted((tmp_path / "control").iterdir())
    collector._control = 0.0
    collector.offer(_sighting(foreign=True), lambda: _picture(2000))
    assert sorted((tmp_path / "control").iterdir()) == controls[2:]
    for _ in range(50):
        collector.offer(_sighting(doubtful=True), _picture)
    kept = list(tmp_path.rglob("*.png"))
    assert sum(path.stat().st_size for path in kept) <= 10_000
    assert not list((tmp_path / "control").iterdir())
    assert collector.offer(_sighting(foreign=True), lambda: _picture(20_000)) == ""
    collector.close()
    assert not collector.stopped, "a picture larger than all the space is left out, and only that"


def test_a_sample_that_bytes_bound_is_fair_too(tmp_path: Path) -> None:
    collector = Collector(tmp_path, control=0.0, megabytes=0.04, seed=0)
    for number in range(2000):
        content = number.to_bytes(1000)
        collector.offer(_sighting(doubtful=True), lambda content=content: (content, ".png"))
    collector.close()
    kept = [int.from_bytes(path.read_bytes()) for path in (tmp_path / "doubtful").iterdir()]
    assert len(kept) == 40
    assert 700 < np.mean(kept) < 1300


def test_a_restart_counts_on_and_clears_what_a_kill_left(tmp_path: Path) -> None:
    first = Collector(tmp_path, control=1.0, most=30, seed=0)
    with pytest.raises(FtkitError, match="in use"):
        Collector(tmp_path)
    for _ in range(5):
        first.offer(_sighting(), _picture)
    first.close()
    (tmp_path / "control" / ".half.tmp").write_bytes(b"x")
    (tmp_path / "state.json").write_text("{")  # damaged: counted anew

    again = Collector(tmp_path, control=1.0, most=30, seed=0)
    for _ in range(20):
        again.offer(_sighting(), _picture)
    again.close()
    assert len(list((tmp_path / "control").iterdir())) == 10
    counted = json.loads((tmp_path / "state.json").read_text())["seen"]["control"]
    assert counted == 25, "those that are there were seen, too"


def test_nothing_is_removed_for_a_picture_that_is_not_taken(tmp_path: Path) -> None:
    collector = Collector(tmp_path, control=0.0, megabytes=0.01, seed=0)
    for _ in range(900):
        collector.offer(_sighting(foreign=True), _picture)
    collector._control = 1.0
    collector._remove("foreign", next(iter(collector._kept["foreign"])))
    assert collector.offer(_sighting(), lambda: _picture(500)) == "control"
    (control,) = (tmp_path / "control").iterdir()
    collector._control = 0.0
    for _ in range(3):  # one in a hundred would be taken
        assert collector.offer(_sighting(foreign=True), lambda: _picture(1001)) == ""
    assert control.is_file()
    collector._control = 1.0
    assert collector.offer(_sighting(), lambda: _picture(5000)) == ""
    assert control.is_file()
    collector.close()


def test_a_picture_of_a_full_sample_goes_only_for_one_that_is_taken(tmp_path: Path) -> None:
    collector = Collector(tmp_path, control=0.0, most=30, megabytes=0.012, seed=0)
    for _ in range(9):
        collector.offer(_sighting(foreign=True), _picture)
    collector.offer(_sighting(foreign=True), _picture)  # ten: the most
    before = set((tmp_path / "foreign").iterdir())
    assert len(before) == 10
    collector._random.random = lambda: 0.0  # type: ignore[method-assign]  # every draw takes it
    assert collector.offer(_sighting(foreign=True), lambda: _picture(20_000)) == ""
    assert set((tmp_path / "foreign").iterdir()) == before
    collector.offer(_sighting(foreign=True), lambda: _picture(2500))
    kept = list((tmp_path / "foreign").iterdir())
    assert len(kept) <= 10
    assert sum(path.stat().st_size for path in kept) <= 12_000
    collector.close()


def test_a_picture_that_was_taken_away_is_passed_over(tmp_path: Path) -> None:
    collector = Collector(tmp_path, control=1.0)

    def gone() -> tuple[bytes, str]:
        return (tmp_path / "gone.png").read_bytes(), ".png"

    assert collector.offer(_sighting(), gone) == ""
    assert collector.offer(_sighting(), _picture) == "control"
    assert not collector.stopped
    collector.close()
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


def test_the_log_rotates_and_the_oldest_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect, "LOG_BYTES", 2000)
    collector = Collector(tmp_path, control=0.0)
    for number in range(200):
        collector.offer(_sighting(score=number), _picture)
    collector.close()
    scores = [
        json.loads(line)["score"]
        for path in logs(tmp_path)
        for line in path.read_text().splitlines()
    ]
    assert len(logs(tmp_path)) == 4
    assert scores == list(range(200))[-len(scores) :]
    assert len(scores) < 100


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_ends_the_collecting_and_not_the_classifying(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    collector = Collector(tmp_path, control=1.0)
    for _ in range(3):
        assert collector.offer(_sighting(), _picture) == ""
    assert "No space left" in collector.stopped
    said = capsys.readouterr().err
    assert said.count("collecting stops, classifying goes on") == 1
    collector.close()


def test_impossible_bounds_are_refused(tmp_path: Path) -> None:
    for bounds in ({"control": 1.5}, {"most": 2}, {"megabytes": 0}):
        with pytest.raises(FtkitError, match="control share"):
            Collector(tmp_path, **bounds)
    (tmp_path / "file").write_text("")
    with pytest.raises(FtkitError, match="expected a folder to collect in"):
        Collector(tmp_path / "file")
