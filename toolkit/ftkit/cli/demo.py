"""`ftkit demo`: write sample photographs, run the user's commands on them, print a summary.

The photographs come from the package elpv-dataset (Deitsch et al., Solar Energy 185, 2019): 300 x
300 grey electroluminescence images of solar cells, monocrystalline or polycrystalline, intact or
defective.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from importlib import resources, util
from pathlib import Path

from ftkit.data.dataset import read_images
from ftkit.utils import console
from ftkit_export.proof.intervals import ground
from ftkit_export.runtime.errors import FtkitError

GROUP = 60  # consecutive cells: one module, roughly
NOTICE = (
    "The photographs are the ELPV data set by ZAE Bayern (Buerhop-Lutz et al. 2018; Deitsch et al. 2019),\n"
    "licensed CC BY-NC-SA 4.0: not for commercial use. A model trained on them is for trying ftkit out."
)
# A solar cell has no upright side, so a flipped one is as real as the original.
SETTINGS = ("--set", "augment.vflip=true")
# Cells of one module are correlated: 375 cells of 7 modules carry less information than 375 cells
# of 375 modules.
GROUPS = ("--group-by", "module[0-9]+")


def write_elpv(out: Path, *, split: bool) -> int:
    """Write the photographs with a certain label into class folders; return their number.

    out: folder to make. Files are named by module and cell. split=True: out/{train,test}/CLASS
    as `ftkit train` would split them by group, each run of 60 consecutive cells in one split;
    False: out/CLASS. Raises FtkitError when the package is not installed.
    """
    if util.find_spec("elpv_dataset") is None:
        raise FtkitError(
            "demo: expected the package elpv-dataset, found it not installed. Try `pip install 'ftkit[demo]'`"
        )

    with resources.as_file(resources.files("elpv_dataset") / "data") as source:
        lines = ["path,label,group"]
        for line in (source / "labels.csv").read_text().splitlines():
            name, probability, kind = line.split()
            if float(probability) in (0.0, 1.0):  # else the experts were not certain
                module = (int(Path(name).stem[4:]) - 1) // GROUP  # cell0123.png
                lines.append(
                    f"{source / name},{kind}-{'defect' if float(probability) else 'ok'},{module}"
                )

        out.mkdir(parents=True, exist_ok=True)
        table = out / "photos.csv"
        table.write_text("\n".join(lines) + "\n")
        images = read_images(table, cut_val=False)
        table.unlink()

        for image in images.images:
            folder = out / (image.split if split else "") / images.classes[image.label]
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(image.path, folder / f"module{int(image.group):02d}-{image.path.name}")

    (out / "LICENSE.txt").write_text(NOTICE + "\n")
    return len(images.images)


def run_demo(out: Path) -> None:
    """Write the data, run the user's commands, print a summary table.

    Raises FtkitError when a step fails.
    """
    if out.exists():
        raise FtkitError(
            f"{out}: expected a new folder, found one there already. Try --out another, or remove it"
        )

    started = time.perf_counter()
    data = out / "photos"
    run = out / "run"
    bundle = out / "bundle"
    console.say(NOTICE)
    count = write_elpv(data, split=True)
    console.say(
        f"{count} photographs written to {data}; runs of {GROUP} consecutive cells (about one module) kept together"
    )
    _step("train", str(data), "--out", str(run), *SETTINGS, *GROUPS)
    _step("export", str(run), "--out", str(bundle), "--quick")
    _step("verify", str(bundle))
    shown = [next(iter(sorted(folder.iterdir()))) for folder in sorted((data / "test").iterdir())]
    _step("predict", str(bundle), *map(str, shown))
    console.say()
    console.say(_summary(bundle))
    console.say()
    console.say(f"report  {bundle / 'report.html'}\nmodel   {bundle / 'model.onnx'}")
    console.say(
        f"device  python {shlex.quote(str(bundle / 'device' / 'classify.py'))} --self-check"
    )
    console.say(f"try it  ftkit try {shlex.quote(str(bundle))}")
    words = [
        "ftkit",
        "search",
        str(data),
        *SETTINGS,
        *GROUPS,
        "--p50-ms",
        f"{_p50_ms(bundle) / 2:.1f}",
    ]
    console.say(
        f"faster  {shlex.join(words)}\n        (what half of this file's time costs in accuracy)"
    )
    console.say(f"done in {console.clock(time.perf_counter() - started)}")


def _step(*arguments: str) -> None:
    console.say(f"\n$ ftkit {shlex.join(arguments)}")
    done = subprocess.run([sys.executable, "-m", "ftkit", *arguments], check=False)
    if done.returncode:
        raise FtkitError(
            f"demo: expected `ftkit {arguments[0]}` to succeed, found exit code {done.returncode}. See above"
        )


def _p50_ms(bundle: Path) -> float:
    """Of the chosen file, in the first condition it was timed in."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    timed = manifest["evidence"]["latency"]
    return float(next(each["p50_ms"] for each in timed if each["variant"] == manifest["chosen"]))


def _summary(bundle: Path) -> str:
    manifest = json.loads((bundle / "manifest.json").read_text())
    evidence = manifest["evidence"]
    accuracy = evidence["accuracy"]["file"]
    rows = [("what", "measured")]
    interval = f"[{accuracy['accuracy_low']:.3f}, {accuracy['accuracy_high']:.3f}]"
    rows.append(
        (
            "accuracy",
            f"{accuracy['accuracy']:.3f} {interval} on {ground(accuracy['images'], accuracy['clusters'])}",
        )
    )

    for item in evidence["parity"]:
        logits = max(
            (c for c in item["checks"] if c["floor"] is not None),
            key=lambda c: c["value"] / c["limit"],
        )
        rows.append(
            (
                "parity",
                f"{'passed' if item['passed'] else 'FAILED'} on {item['provider']}: logits within "
                f"{logits['value'] / logits['floor']:.1f} x the framework's own float32 error",
            )
        )

    rows.append(("chosen", f"{manifest['chosen']} for {manifest['target']}"))
    for item in (item for item in evidence["latency"] if item["variant"] == manifest["chosen"]):
        rows.append(
            (
                "latency",
                f"p50 {item['p50_ms']:.1f} ms, p95 {item['p95_ms']:.1f} ms on "
                f"{console.condition(item)}, {console.frames(manifest['frame'])}",
            )
        )

    rows.append(("size", f"{item['size_bytes'] / 1e6:.1f} MB"))
    return console.table(rows)
