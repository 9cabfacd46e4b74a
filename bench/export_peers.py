"""The same trained network exported by four tools: file, accuracy from the photographs, time, code.

    ftkit train photos --out RUN && python bench/export_peers.py RUN photos      # 8 minutes on 2 cores
    python bench/export_peers.py RUN photos --only ftkit,torch

Each tool has an environment of its own, made in the folder `--envs` and kept there, which sees this
environment's torch and timm. torch.onnx.export gets the trained network as a timm model. Optimum has
no converter for timm's networks ("timm_wrapper model, that is a custom or unsupported architecture"),
and Olive's auto-opt of a Transformers folder ends in a TypeError where there is no attention, so both
get torch's file, whose seconds and lines are counted with theirs; they quantize it as they do without
data. Accuracy is that of the file on the test split, from the image files, preprocessed as
torchvision's documentation has it. Lines: of the user's code shown below, without imports. Times: one
thread, without decoding; ftkit's file resizes and normalises the photograph itself, the others take
prepared pixels.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from int8_peers import environment

from ftkit.training.run import Run, open_run
from ftkit_export.proof.decision import paired
from ftkit_export.runtime.latency import machine
from ftkit_export.runtime.predict import Classifier

ANSWERED = """
import csv, json, sys
import numpy, onnxruntime
session = onnxruntime.InferenceSession(FILE, providers=["CPUExecutionProvider"])
name = session.get_inputs()[0].name
answers = []
for path in json.load(open("images.json")):
    image = PIL.Image.open(path).convert("RGB")
    answers.append(int(session.run(None, {name: prepare(image)})[0].argmax()))
json.dump(answers, open("answers.json", "w"))
"""


PREPARE = """\
import PIL.Image
from torchvision import transforms
pipeline = transforms.Compose([
    transforms.Resize(SIZE),
    transforms.CenterCrop(SIZE),
    transforms.ToTensor(),
    transforms.Normalize(MEAN, STD),
])
def prepare(image):
    return pipeline(image)[None].numpy()
"""
EXPORT = """\
import torch
model = torch.load("model.pt", weights_only=False).eval()
torch.onnx.export(model, (torch.zeros(1, 3, SIZE, SIZE),), "torch/model.onnx", dynamo=True, external_data=False)
"""
TORCH_FILE = "torch/model.onnx"


@dataclass(frozen=True)
class Peer:
    """A tool. command: what makes `file` of torch's, "" for torch itself."""

    needs: tuple[str, ...]
    command: str
    file: str

    @property
    def lines(self) -> int:
        """Lines of code without imports; a command is one."""
        code = [*EXPORT.splitlines(), *PREPARE.splitlines(), *self.command.splitlines()]
        return sum(not line.startswith(("import", "from")) for line in code)


PEERS = {
    "torch": Peer(("onnx", "onnxscript", "onnxruntime"), "", TORCH_FILE),
    "optimum": Peer(
        ("optimum-onnx", "transformers", "onnx", "onnxruntime"),
        "optimum-cli onnxruntime quantize --onnx_model torch --avx512_vnni -o optimum",
        "optimum/model_quantized.onnx",
    ),
    "olive": Peer(
        ("olive-ai", "transformers", "onnx", "onnxscript", "onnxruntime"),
        f"olive auto-opt --model_name_or_path {TORCH_FILE} --device cpu "
        "--provider CPUExecutionProvider --precision int8 --output_path olive",
        "olive/model.onnx",
    ),
}


def _run(command: list[str], folder: Path) -> float:
    """Run a command there; seconds. Raises RuntimeError with its last line."""
    begun = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise RuntimeError(lines[-1][:300] if lines else f"exit {done.returncode}")
    return time.perf_counter() - begun


def _exported(name: str, folder: Path, envs: Path, run: Run) -> tuple[Path, float]:
    """A peer's file, and the seconds it took, with torch's before it; answers.json: its answers."""
    installed = sysconfig.get_paths()["purelib"]
    pythons = {
        each: environment(f"export-{each}", PEERS[each].needs, envs, installed)
        for each in {"torch", name}
    }
    preprocess = run.preprocess
    mean, std = ([value / 255 for value in each] for each in (preprocess.mean, preprocess.std))
    settings = f"SIZE, MEAN, STD = {preprocess.size}, {mean}, {std}\n"

    (folder / TORCH_FILE).parent.mkdir(exist_ok=True)
    seconds = _run([str(pythons["torch"]), "-c", settings + EXPORT], folder)
    if command := PEERS[name].command:
        first, *rest = command.split()
        seconds += _run([str(pythons[name].parent / first), *rest], folder)
    file = folder / PEERS[name].file
    if not file.is_file():
        raise RuntimeError("it wrote no ONNX file")
    program = f"{settings}FILE = {str(file)!r}\n{PREPARE}{ANSWERED}"
    _run([str(pythons[name]), "-c", program], folder)
    return file, seconds


def main() -> None:
    """Print a row for each tool."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--only", default="", help="names, with commas between")
    parser.add_argument("--envs", default="peer-envs", type=Path)
    options = parser.parse_args()
    wanted = [name for name in options.only.split(",") if name] or ["ftkit", *PEERS]
    run = open_run(options.run)

    with (options.run / "splits.csv").open(newline="") as file:
        test = [row for row in csv.DictReader(file) if row["split"] == "test"]
    images = [str((options.photos / row["path"]).resolve()) for row in test]
    true = np.array([run.classes.index(row["label"]) for row in test])
    groups = [row.get("group", "") for row in test]
    files: dict[str, Path] = {}
    right: dict[str, np.ndarray] = {}
    seconds: dict[str, float] = {}

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        torch.save(run.backbone().model.eval(), folder / "model.pt")
        (folder / "images.json").write_text(json.dumps(images))
        for name in wanted:
            try:
                if name == "ftkit":
                    seconds[name] = _run(
                        [
                            sys.executable,
                            "-m",
                            "ftkit",
                            "export",
                            str(options.run.resolve()),
                            "--out",
                            "bundle",
                        ],
                        folder,
                    )
                    classify = Classifier(folder / "bundle")
                    files[name] = folder / "bundle" / "model.onnx"
                    said = np.array([run.classes.index(classify(path).label) for path in images])
                else:
                    files[name], seconds[name] = _exported(
                        name, folder, options.envs.resolve(), run
                    )
                    said = np.array(json.loads((folder / "answers.json").read_text()))
            except RuntimeError as error:
                print(f"{name}: no file: {error}", flush=True)
                continue
            right[name] = said == true
            print(f"{name}: {right[name].mean():.4f}", flush=True)

        print(machine())
        print(
            f"{len(test)} test images; the framework's own accuracy {run.metrics['test']['accuracy']:.4f}"
        )
        print("| tool | accuracy of the file | against ftkit's | p50, ms | MB | seconds | lines |")
        print("|---|---|---|---|---|---|---|")
        for name, file in files.items():
            took = _p50(file, images[0])
            against = paired(right["ftkit"], right[name], groups)
            lines = PEERS[name].lines if name in PEERS else 1
            size = file.stat().st_size / 1e6
            print(
                f"| {name} | {right[name].mean():.4f} | {100 * against.drop:+.1f} [{100 * against.low:+.1f}, "
                f"{100 * against.high:+.1f}] | {took:.2f} | {size:.1f} | {seconds[name]:.0f} | {lines} |"
            )


TIMED = """
import sys, time
import numpy, onnxruntime, PIL.Image
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
given = session.get_inputs()[0]
image = numpy.asarray(PIL.Image.open(sys.argv[2]).convert("RGB"))[None]
if given.type != "tensor(uint8)":
    image = numpy.random.default_rng(0).standard_normal(given.shape, numpy.float32)
times = []
while len(times) < 300:
    begun = time.perf_counter()
    session.run(None, {given.name: image})
    times.append(time.perf_counter() - begun)
print(1e3 * numpy.median(times[30:]))
"""


def _p50(file: Path, image: str) -> float:
    """Milliseconds on one thread, the least of three processes: Olive's file has operators that ftkit's
    own timing refuses."""
    command = [sys.executable, "-c", TIMED, str(file), image]
    return min(
        float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    )


if __name__ == "__main__":
    main()
