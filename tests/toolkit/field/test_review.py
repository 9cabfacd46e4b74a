"""What was collected is ordered, labelled on a local page, and trained on with the old data."""

import csv
import json
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, ftkit, settings
from PIL import Image, ImageEnhance

from ftkit.data.dataset import read_images
from ftkit.exporting.export import held_out
from ftkit.field.label_page import labelling
from ftkit.field.review import _informative_first, ordered, write_review
from ftkit.training.run import open_run
from ftkit_export.runtime.errors import FtkitError


@pytest.fixture
def collected(elpv: list[tuple[Path, str]], tmp_path: Path) -> Path:
    """Twelve pictures: two corners of the embedding, and a near duplicate of the most doubtful."""
    root = tmp_path / "collected"
    lines = []
    for number in range(12):
        why = "doubtful" if number < 6 else "control"
        path = f"{why}/{number:03d}.png"
        (root / why).mkdir(parents=True, exist_ok=True)
        with Image.open(elpv[1000 + 3 * number][0]) as image:
            image.save(root / path)
        corner = [10.0 * (number % 2), 0.01 * number]
        lines.append(_line(path, 0.5 + 0.04 * number, corner))
    with Image.open(root / "doubtful" / "000.png") as image:
        ImageEnhance.Brightness(image).enhance(1.05).save(root / "doubtful" / "copy.png")
    lines.append(_line("doubtful/copy.png", 0.55, [0.0, 0.0, 0.0]))  # of another bundle
    lines.append(_line("doubtful/evicted.png", 0.1, [0.0, 0.0]))
    with Image.open(elpv[1500][0]) as image:
        image.save(root / "control" / "unlogged.png")  # its line has rotated away
    (root / "log.jsonl").write_text("\n".join(lines) + "\n")
    return root


def _line(kept: str, probability: float, coordinates: list[float]) -> str:
    told = {"label": "mono-ok", "probability": probability, "score": 1.0}
    return json.dumps(
        {"time": 0, "bundle": "", "coordinates": coordinates, "frame": [0], "kept": kept, **told}
    )


def test_what_stands_for_many_comes_before_an_outlier() -> None:
    draw = np.random.default_rng(0)
    middles = np.repeat([[0.0, 0.0], [4.0, 0.0]], 20, axis=0)
    coordinates = np.vstack([middles + 0.3 * draw.standard_normal((40, 2)), [[2.0, 30.0]]])
    order = _informative_first(coordinates, np.ones(41))
    assert sorted(order) == list(range(41))
    assert {row // 20 for row in order[:2]} == {0, 1}, "one of each crowd, not the outlier"
    unsure = np.where(np.arange(41) < 20, 0.0, 1.0)
    assert _informative_first(coordinates, unsure)[0] // 20 == 1


def test_duplicates_are_folded_and_both_corners_come_first(collected: Path) -> None:
    pictures = ordered(collected)
    assert len(pictures) + sum(len(picture.alike) for picture in pictures) == 14
    assert pictures[0].path == "doubtful/000.png"
    assert "doubtful/copy.png" in pictures[0].alike
    assert int(Path(pictures[1].path).stem) % 2 == 1, "of the other corner"
    with pytest.raises(FtkitError, match="found none"):
        ordered(collected / "doubtful")


def test_labels_are_given_on_a_page_that_only_this_machine_reaches(collected: Path) -> None:
    pictures = ordered(collected)
    table = write_review(collected, pictures)

    def post(url: str, told: object, **headers: str) -> int:
        request = urllib.request.Request(f"{url}label", json.dumps(told).encode(), headers=headers)
        try:
            with urllib.request.urlopen(request) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            error.close()
            return error.code

    with labelling(collected, pictures, ["mono-ok"]) as url:
        own = {"Origin": url.rstrip("/")}
        third = {"number": 2, "path": pictures[2].path, "label": "x"}
        assert (
            post(url, {"number": 0, "path": pictures[0].path, "label": "scratch, deep"}, **own)
            == 200
        )
        assert post(url, {"number": 1, "path": pictures[1].path, "label": "خط‌خورده"}, **own) == 200
        assert post(url, {"number": 1, "path": pictures[1].path, "label": ""}, **own) == 200
        assert post(url, third) == 403
        assert (
            post(
                url,
                third,
                Origin="http://elsewhere.example",
            )
            == 403
        )
        assert (
            post(
                url,
                third,
                **own,
                Host="elsewhere.example",
            )
            == 403
        )
        assert post(url, {"number": 99, "path": pictures[2].path, "label": "x"}, **own) == 400
        stale = {"number": 2, "path": pictures[3].path, "label": "x"}
        assert post(url, stale, **own) == 400, (
            "a page of another review, whose pictures had another order"
        )
        with urllib.request.urlopen(f"{url}picture/0") as picture:
            assert picture.read() == (collected / pictures[0].path).read_bytes()
        for path in ("picture/99", "../log.jsonl", "log.jsonl"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(url + path)

    given = table.read_text()
    for spoilt in (
        given.replace(",", ";").encode(),
        given.replace("scratch", "kratzer ü").encode("cp1252"),
    ):
        table.write_bytes(spoilt)
        with pytest.raises(FtkitError, match="Save it as"):
            write_review(collected, pictures)
        assert table.read_bytes() == spoilt, "labels are not overwritten"
    table.write_text(given)
    write_review(collected, ordered(collected))  # again: labels stay
    with table.open(newline="") as file:
        labels = {row["path"]: row["label"] for row in csv.DictReader(file) if row["label"]}
    assert labels == {f"../{pictures[0].path}": "scratch, deep"}


def test_labelled_pictures_are_trained_on_and_the_test_split_stays(
    photos: Path, collected: Path, tmp_path: Path
) -> None:
    done = ftkit("review", collected)
    assert done.exit_code == 0, done.output
    table = collected / "review" / "review.csv"
    nothing = ftkit("train", photos, "--add", table, "--out", tmp_path / "none")
    assert (nothing.exit_code, "Fill in the label" in nothing.stderr) == (2, True)

    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows[:8]):
        row["label"] = "mono-ok" if number < 4 else "scratched"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)

    before, after = read_images(photos), read_images(photos, add=table)
    assert [image.path for image in before.of("test")] == [image.path for image in after.of("test")]
    assert len(after.of("train")) == len(before.of("train")) + 8
    assert set(after.classes) == {*before.classes, "scratched"}

    quick = settings(*TINY, "stages.0.epochs=1", "stages.1.epochs=1")
    run = tmp_path / "run"
    done = ftkit("train", photos, "--add", table, "--out", run, *quick)
    assert done.exit_code == 0, done.output
    assert "scratched" in open_run(run).classes
    again = held_out(open_run(run), None)  # as an export reads them
    assert len(again.images.images) == len(after.images)

    twice = tmp_path / "twice.csv"
    path = min(photos.glob("*/*.png"))
    twice.write_text(f"path,label\n{path},mono-ok\n")
    done = ftkit("train", photos, "--add", twice, "--out", tmp_path / "other")
    assert (done.exit_code, "which the data has" in done.stderr) == (2, True)
    assert np.isfinite(open_run(run).data["metrics"]["test"]["accuracy"])
