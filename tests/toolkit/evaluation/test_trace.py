"""`ftkit predict --trace`: one image on its way through the file."""

import json
import re
from pathlib import Path

from conftest import ftkit

from ftkit_export.runtime.predict import Classifier


def test_the_steps_of_an_image_end_in_its_answer(bundle: Path, photos: Path) -> None:
    image = min(photos.glob("mono-ok/*.png"))
    done = ftkit("predict", bundle, image, "--trace")
    assert done.exit_code == 0, done.output
    manifest = json.loads((bundle / "manifest.json").read_text())
    lines = done.stdout.splitlines()
    answer = Classifier(bundle)(image)
    assert lines[-1].startswith(f"{answer.label}  {answer.probability:.3f}")
    best = max(answer.probabilities.values())
    assert f"{answer.label} {best:.3f}" in done.stdout

    steps = [line.split("  ")[0] for line in lines[2:]]
    assert steps[:2] == ["image", "preprocess"]
    for part in manifest["pipeline"]:
        (row,) = (line for line in lines if line.startswith(f"{part['name']}: "))
        assert f"{part['parameters']:,}" in row
        assert str(tuple(part["shape"])) in row
        assert float(re.split(r"\s{2,}", row)[-1]) > 0, "each part has a time of its own"
    assert sum(part["parameters"] for part in manifest["pipeline"]) > 3_000_000
    assert max(map(len, lines[1:])) <= 100


def test_a_bad_image_is_named_and_other_ways_to_answer_are_refused(
    bundle: Path, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "cut.png").write_bytes(b"\x89PNG")
    image = min(photos.glob("mono-ok/*.png"))
    done = ftkit("predict", bundle, tmp_path / "cut.png", image, "--trace")
    assert done.exit_code == 2
    assert "cut.png" in done.stderr
    assert "softmax at temperature" in done.stdout, "the other one is shown"
    refused = ftkit("predict", bundle, image, "--trace", "--json")
    assert (refused.exit_code, "--json: expected no such option" in refused.stderr) == (2, True)
