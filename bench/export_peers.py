"""The same trained network exported by four tools: file, accuracy from the photographs, time, code.

    ftkit train photos --out RUN && python bench/export_peers.py RUN photos      # 15 minutes on 2 cores
    python bench/export_peers.py RUN photos --only ftkit,torch

Each tool has an environment of its own, made in the folder `--envs` and kept there, which sees this
environment's torch and timm. It gets the trained network, as a timm model or as a Transformers folder
(TimmWrapper), and writes ONNX. Accuracy is that of the file on the test split, from the image files,
preprocessed as the tool's own documentation has it. Lines: of the user's code shown below, without
imports. Times: one thread, without decoding; ftkit's file resizes and normalises the photograph itself, the
others take prepared pixels.
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
from safetensors.torch import save_file

from ftkit.training.run import Run, open_run
from ftkit_export.proof.decision import paired
from ftkit_export.runtime.latency import Condition, machine, measure
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


@dataclass(frozen=True)
class Peer:
    """A tool. export: a program, or the words of a command, that writes `file`; prepare: its
    preprocessing, a function from an image to what the file takes."""

    needs: tuple[str, ...]
    export: str
    prepare: str
    file: str
    command: bool = False

    @property
    def lines(self) -> int:
        """Lines of code without imports; a command is one."""
        code = [self.prepare, "" if self.command else self.export]
        own = [line for part in code for line in part.splitlines()]
        written = [line for line in own if line.strip() and not line.startswith(("import", "from"))]
        return len(written) + self.command


PROCESSOR = """\
import PIL.Image
from transformers import AutoImageProcessor
processor = AutoImageProcessor.from_pretrained("hf")
def prepare(image):
    return processor(image, return_tensors="pt")["pixel_values"].numpy()
"""

PEERS = {
    "torch": Peer(
        ("onnx", "onnxscript"),
        """\
import torch
model = torch.load("model.pt", weights_only=False).eval()
torch.onnx.export(model, (torch.zeros(1, 3, SIZE, SIZE),), "torch.onnx", dynamo=True)
""",
        """\
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
""",
        "torch.onnx",
    ),
    "optimum": Peer(
        ("optimum-onnx", "transformers", "onnx", "onnxruntime"),
        "optimum-cli export onnx --model hf --task image-classification optimum",
        PROCESSOR,
        "optimum/model.onnx",
        command=True,
    ),
    "olive": Peer(
        ("olive-ai", "transformers", "onnx", "onnxscript", "onnxruntime", "optimum-onnx"),
        "olive auto-opt --model_name_or_path hf --task image-classification --device cpu "
        "--provider CPUExecutionProvider --precision int8 --output_path olive",
        PROCESSOR,
        "olive/model.onnx",
        command=True,
    ),
}


def write_network(run: Run, folder: Path) -> None:
    """The trained network as model.pt, and as the Transformers folder hf."""
    model = run.backbone().model.eval()
    torch.save(model, folder / "model.pt")
    place = folder / "hf"
    place.mkdir()
    named = {f"timm_model.{name}": value.contiguous() for name, value in model.state_dict().items()}
    save_file(named, place / "model.safetensors", metadata={"format": "pt"})
    preprocess = run.preprocess
    told = {
        "architecture": run.recipe.backbone,
        "architectures": ["TimmWrapperForImageClassification"],
        "model_type": "timm_wrapper",
        "num_classes": len(run.classes),
        "label_names": list(run.classes),
        "pretrained_cfg": {
            "input_size": [3, preprocess.size, preprocess.size],
            "mean": [value / 255 for value in preprocess.mean],
            "std": [value / 255 for value in preprocess.std],
            "crop_pct": preprocess.size / preprocess.resize,
            "interpolation": "bilinear",
            "num_classes": len(run.classes),
        },
        "torch_dtype": "float32",
    }
    (place / "config.json").write_text(json.dumps(told, indent=1))


def _run(command: list[str], folder: Path) -> float:
    """Run a command there; seconds. Raises RuntimeError with its last line."""
    begun = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise RuntimeError(lines[-1][:300] if lines else f"exit {done.returncode}")
    return time.perf_counter() - begun


def _exported(name: str, peer: Peer, folder: Path, envs: Path, run: Run) -> tuple[Path, float]:
    """A peer's file, and the seconds it took."""
    python = environment(f"export-{name}", peer.needs, envs, sysconfig.get_paths()["purelib"])
    preprocess = run.preprocess
    mean, std = ([value / 255 for value in each] for each in (preprocess.mean, preprocess.std))
    settings = f"SIZE, MEAN, STD = {preprocess.size}, {mean}, {std}\n"
    if peer.command:
        first, *rest = peer.export.split()
        seconds = _run([str(python.parent / first), *rest], folder)
    else:
        seconds = _run([str(python), "-c", settings + peer.export], folder)
    file = next(iter(sorted(folder.glob(peer.file))), None)
    if file is None:
        file = next(iter(sorted((folder / peer.file).parent.rglob("*.onnx"))), None)
    if file is None:
        raise RuntimeError("it wrote no ONNX file")
    program = f"{settings}FILE = {str(file)!r}\n{peer.prepare}{ANSWERED}"
    _run([str(python), "-c", program], folder)
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
        write_network(run, folder)
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
                        name, PEERS[name], folder, options.envs.resolve(), run
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
            took = _p50(file, Path(images[0]), folder / "bundle")
            against = paired(right["ftkit"], right[name], groups)
            lines = PEERS[name].lines if name in PEERS else 1
            print(
                f"| {name} | {right[name].mean():.4f} | {100 * against.drop:+.1f} [{100 * against.low:+.1f}, "
                f"{100 * against.high:+.1f}] | {took:.2f} | {_megabytes(file):.1f} | {seconds[name]:.0f} | {lines} |"
            )


def _megabytes(file: Path) -> float:
    """Size of a file with its weights, which may lie beside it."""
    beside = [path for path in file.parent.glob(f"{file.name}*") if path != file]
    return sum(path.stat().st_size for path in (file, *beside)) / 1e6


def _p50(file: Path, image: Path, bundle: Path) -> float:
    """Of a file alone; the bundle's core forms are not what a device runs."""
    own = image if file.is_relative_to(bundle) else None
    return measure(Condition(model=str(file), threads=1), own).p50_ms


if __name__ == "__main__":
    main()
