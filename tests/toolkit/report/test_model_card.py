"""The model card says what the manifest says."""

import json
import re
from pathlib import Path

from ftkit.report.model_card import model_card
from ftkit.training.run import open_run


def test_every_figure_of_the_card_is_the_manifests(bundle: Path, run: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    text = (bundle / "MODEL_CARD.md").read_text()
    file = manifest["evidence"]["accuracy"]["file"]
    low, high = file["accuracy_low"], file["accuracy_high"]
    assert f"Accuracy {file['accuracy']:.3f} [{low:.3f}, {high:.3f}]" in text
    assert text.startswith(f"# {manifest['name']}\n\n{manifest['backbone']}, ")
    assert f"its {manifest['chosen']} variant for {manifest['target']}." in text

    rows = re.findall(r"^\| (.+?) \| (\d+) \| ([\d.]*) \| ([\d.]*) \|$", text, re.M)
    assert [row[0] for row in rows] == file["classes"]
    assert [int(row[1]) for row in rows] == [sum(row) for row in file["confusion"]]
    assert [row[2] for row in rows] == [f"{recall:.3f}" for recall in file["recall"]]

    timed = [
        item for item in manifest["evidence"]["latency"] if item["variant"] == manifest["chosen"]
    ]
    for item in timed:
        assert f"| {item['p50_ms']:.1f} | {item['p95_ms']:.1f} |" in text
    assert f"on val, on {open_run(run).data['metrics']['val']['images']} images" in text

    blocks = [block.splitlines() for block in text.split("\n\n")]
    tables = [block for block in blocks if block[0].startswith("|")]
    assert [len(table) for table in tables] == [2 + len(rows), 2 + len(timed)], "two tables, apart"
    assert all(line.startswith("|") for table in tables for line in table)
    headed = model_card(open_run(run).data, {**manifest, "not_trained": ["last:2"]})
    for card in (text, headed):
        assert all("## " not in "".join(block.splitlines()[1:]) for block in card.split("\n\n"))


def test_a_card_of_a_run_with_folds_names_what_was_decided_on(bundle: Path, run: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    data = {**open_run(run).data, "folds": {"count": 5}}
    data["splits"] = {"train": 96, "val": 0, "test": 24}
    text = model_card(data, manifest)
    assert "96 train, 24 test." in text
    assert "on val" not in text


def test_a_card_is_whole_without_a_threshold_and_with_odd_class_names(
    bundle: Path, run: Path
) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    data = json.loads(json.dumps(open_run(run).data))
    data["abstention"]["threshold"] = None
    file = manifest["evidence"]["accuracy"]["file"]
    file["classes"][0] = "a|b <script>"
    file["recall"][0] = None
    text = model_card(data, manifest)
    assert "- Every answer is marked doubtful" in text
    assert "| a\\|b <script> | 4 |  |" in text, "Markdown is not escaped as HTML"
    for format_, shape in (("grey", "(batch, H, W, 1)"), ("nv12", "(batch, H x 3 / 2, W, 1)")):
        assert f"uint8 {shape}" in model_card(data, {**manifest, "input_format": format_})
