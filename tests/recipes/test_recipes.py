"""The shipped recipes run as they are."""

from pathlib import Path

from conftest import ftkit, settings


def test_the_staged_plan_runs_offline_on_another_backbone(photos: Path, tmp_path: Path) -> None:
    small = ("backbone=efficientnet_lite0", "preprocess.size=64", "preprocess.resize=64")
    result = ftkit(
        "train", photos, "--recipe", "staged_resnet50", "--out", tmp_path / "run", *settings(*small)
    )
    assert result.exit_code == 0, result.output
    epochs = [
        line.split()[:2]
        for line in result.stdout.splitlines()
        if line[:6] in ("head  ", "last:2") and "/" in line
    ]
    assert epochs[:15] == [["head", f"{n}/5"] for n in range(1, 6)] + [
        ["last:2", f"{n}/10"] for n in range(1, 11)
    ]
