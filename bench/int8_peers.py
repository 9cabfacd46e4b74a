"""8-bit quantizers side by side, on one fp32 file and the same calibration images.

    ftkit train photos --out RUN && python bench/int8_peers.py RUN         # 10 minutes on 2 cores
    python bench/int8_peers.py RUN --only ftkit,nncf                       # some of them

Each has an environment of its own, made in the folder `--envs` and kept there. It gets the run's core
form as a file and 128 training images as an array, and writes a file. All files then run in the same
ONNX Runtime: answers of the test split paired with fp32's, and one-thread times, interleaved over
processes. Lines: of the user's code that is shown below, without imports; of ftkit, one command.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import time
import venv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from int8 import context_of

from ftkit.exporting.candidates import calibration_rows, logits_of, ranges_of
from ftkit.exporting.int8 import CORRECTION_IMAGES
from ftkit_export.conversion.quantize import heavy_nodes, int8, sqnr
from ftkit_export.proof.decision import paired
from ftkit_export.runtime.latency import machine, race

PREPARED = """\
import numpy, onnx, time
pixels = numpy.load("pixels.npy")
batches = [pixels[start:start + 8] for start in range(0, len(pixels), 8)]
begun = time.perf_counter()
"""
FINISHED = """
print("seconds", time.perf_counter() - begun)
"""

ORT_READER = """\
class Reader(CalibrationDataReader):
    def __init__(self):
        self.batches = iter(batches)
    def get_next(self):
        batch = next(self.batches, None)
        return None if batch is None else {"pixels": batch}
"""


@dataclass(frozen=True)
class Peer:
    """A quantizer. needs: packages of its environment; imports and code: as its documentation has it."""

    needs: tuple[str, ...]
    imports: str
    code: str

    @property
    def lines(self) -> int:
        """Lines of code without imports."""
        return len([line for line in self.code.splitlines() if line.strip()])


ORT = ("onnxruntime", "onnx", "sympy")
PEERS = {
    "ort-default": Peer(
        ORT,
        "from onnxruntime.quantization import CalibrationDataReader, quantize_static",
        ORT_READER + 'quantize_static("core.onnx", "out.onnx", Reader())\n',
    ),
    "ort-recommended": Peer(
        ORT,
        "from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static\n"
        "from onnxruntime.quantization.shape_inference import quant_pre_process",
        ORT_READER
        + """\
quant_pre_process("core.onnx", "prepared.onnx")
quantize_static(
    "prepared.onnx", "out.onnx", Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
    activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)
""",
    ),
    "nncf": Peer(
        ("nncf", "onnx", "onnxruntime"),
        "import nncf",
        """\
dataset = nncf.Dataset(batches, lambda batch: {"pixels": batch})
made = nncf.quantize(onnx.load("core.onnx"), dataset, subset_size=len(batches))
onnx.save(made, "out.onnx")
""",
    ),
    "nncf-careful": Peer(
        ("nncf", "onnx", "onnxruntime"),
        "import nncf",
        """\
dataset = nncf.Dataset(batches, lambda batch: {"pixels": batch})
made = nncf.quantize(
    onnx.load("core.onnx"), dataset, subset_size=len(batches), target_device=nncf.TargetDevice.CPU,
    preset=nncf.QuantizationPreset.MIXED, fast_bias_correction=False)
onnx.save(made, "out.onnx")
""",
    ),
    "onnx-neural-compressor": Peer(
        ("onnx-neural-compressor", "prettytable", "scipy", "onnx", "onnxruntime"),
        "from onnx_neural_compressor import data_reader\n"
        "from onnx_neural_compressor.quantization import config, quantize",
        """\
class Reader(data_reader.CalibrationDataReader):
    def __init__(self):
        self.rewind()
    def get_next(self):
        batch = next(self.batches, None)
        return None if batch is None else {"pixels": batch}
    def rewind(self):
        self.batches = iter(batches)
quantize("core.onnx", "out.onnx", config.StaticQuantConfig(calibration_data_reader=Reader()))
""",
    ),
    "aimet-adaround": Peer(
        ("aimet-onnx",),
        "import aimet_onnx",
        """\
inputs = [{"pixels": batch} for batch in batches]
sim = aimet_onnx.QuantizationSimModel(onnx.load("core.onnx"), param_type="int8", activation_type="int8")
aimet_onnx.apply_adaround(sim, inputs, num_iterations=50)
sim.compute_encodings(inputs)
onnx.save(sim.to_onnx_qdq(), "out.onnx")
""",
    ),
}


def environment(name: str, needs: tuple[str, ...], folder: Path, behind: str = "") -> Path:
    """Python of an environment with these packages, made where it is missing. behind: a folder whose
    packages it sees, too, behind its own."""
    place = folder / name
    python = place / "bin" / "python"
    if not (place / "done").is_file():
        venv.create(place, with_pip=True, clear=True)
        _see(place, behind)
        subprocess.run([python, "-m", "pip", "install", "-q", *needs], check=True)
        (place / "done").touch()
    _see(place, behind)  # which may have moved since
    return python


def _see(place: Path, behind: str) -> None:
    own = next((place / "lib").glob("python*/site-packages"))
    (own / "behind.pth").write_text(f"{behind}\n")


def _made_by(peer: Peer, python: Path, folder: Path) -> tuple[onnx.ModelProto, float]:
    """A peer's model, and the seconds it took."""
    program = f"{peer.imports}\n{PREPARED}{peer.code}{FINISHED}"
    done = subprocess.run(
        [python, "-c", program], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    seconds = float(done.stdout.split("seconds")[-1])
    made = onnx.load(folder / "out.onnx")
    used = {node.domain for node in made.graph.node}
    for item in [item for item in made.opset_import if item.domain not in used]:
        made.opset_import.remove(item)  # an import that nothing uses
    return made, seconds


def main() -> None:
    """Print a row for each quantizer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--only", default="", help="names, with commas between")
    parser.add_argument("--envs", default="peer-envs", type=Path)
    options = parser.parse_args()
    wanted = [name for name in options.only.split(",") if name] or ["ftkit", *PEERS]

    context, core = context_of(options.run)
    rows = calibration_rows(context)
    pixels = context.pixels(rows)
    test = context.canvases.rows("test")
    logits = logits_of(core.model, context, test)
    labels = context.canvases.labels[test]
    groups = context.canvases.groups(test)
    forms = {"fp32": core.model}
    seconds = {"fp32": 0.0}

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        onnx.save(core.model, folder / "core.onnx")
        np.save(folder / "pixels.npy", pixels)
        for name in wanted:
            if name == "ftkit":
                begun = time.perf_counter()
                forms[name] = int8(
                    core.model,
                    ranges_of(core.model, context),
                    context.target,
                    keep=heavy_nodes(core.model)[:3],
                    correct_on=pixels[:CORRECTION_IMAGES],
                )
                seconds[name] = time.perf_counter() - begun
                continue
            (folder / "out.onnx").unlink(missing_ok=True)
            peer = PEERS[name]
            try:
                python = environment(name.split("-careful")[0], peer.needs, options.envs)
                forms[name], seconds[name] = _made_by(peer, python, folder)
            except (RuntimeError, subprocess.CalledProcessError) as error:
                print(f"{name}: no file: {error}", flush=True)

        files = [folder / f"{number}.onnx" for number in range(len(forms))]
        for path, form in zip(files, forms.values(), strict=True):
            onnx.save(form, path)
        raced = race(files, context.photograph)

        print(machine())
        right = logits.argmax(1) == labels
        print(f"fp32: {right.mean():.4f} of {len(right)} test images, {raced[0].p50_ms:.2f} ms")
        print(
            "| quantizer | SQNR, dB | answers changed | drop, points [one-sided 95 %] | time [95 %] "
            "| size | seconds | lines |"
        )
        print("|---|---|---|---|---|---|---|---|")
        for place, (name, form) in enumerate(forms.items()):
            if name == "fp32":
                continue
            answers = logits_of(form, context, test)
            against = paired(right, answers.argmax(1) == labels, groups)
            times = raced[place]
            lines = PEERS[name].lines if name in PEERS else 1
            print(
                f"| {name} | {sqnr(logits, answers):.1f} "
                f"| {100 * (answers.argmax(1) != logits.argmax(1)).mean():.1f} % "
                f"| {against.drop * 100:+.2f} [{against.low * 100:+.2f}, {against.high * 100:+.2f}] "
                f"| {times.ratio:.3f} [{times.ratio_low:.3f}, {times.ratio_high:.3f}] "
                f"| {files[place].stat().st_size / files[0].stat().st_size:.2f} "
                f"| {seconds[name]:.0f} | {lines} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
