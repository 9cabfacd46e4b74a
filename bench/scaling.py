"""Measured scaling over several processes, and a calculation for 64 GPUs; writes bench/gpu.md.

    python bench/scaling.py                     GPUs if any, else gloo on a CPU (7 min, 2 cores)
    python bench/scaling.py --processes 1,2

`torchrun -m ftkit train`, full fine-tuning of lite0 at 224 x 224, with the same number of images
per process; then the same number of independent processes, without communication.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tables
import torch
from gpu import MODELS, TIMM, many_photographs

from ftkit.models.backbones import build

PAPER_BATCH = 256  # images per GPU and step

REDUCE = """
import sys, time, torch, torch.distributed as dist
from ftkit.utils.distributed import joined
with joined(sys.argv[1]) as (device, ranks):
    gradients, times = torch.ones(int(sys.argv[2]), device=device), []
    for what in (lambda: ranks.sum(gradients), lambda: ranks.largest(0)):
        for step in range(25):
            dist.barrier()
            begun = time.perf_counter()
            what()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
    if ranks.main:
        print(sorted(times[5:25])[10] * 1e3, sorted(times[30:])[10] * 1e3)
"""


def _subset(data: Path, wanted: int) -> Path:
    """Write a CSV of `wanted` training photographs, and 40 for evaluation."""
    files = random.Random(0).sample(sorted(data.rglob("*.png")), min(wanted + 40, 2223))
    lines = [
        f"{path},{path.parent.name},{'train' if n < wanted else ('val', 'test')[n % 2]}"
        for n, path in enumerate(files)
    ]
    table = data / f"{wanted}.csv"
    table.write_text("\n".join(["path,label,split", *lines]) + "\n")
    return table


def _best(run: Path) -> float:
    """Images/s of the best epoch, not counting the first."""
    epochs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return max(float(epoch["images_per_s"]) for epoch in epochs[1:])


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where and on what processes train: a folder for their runs, photographs, device, environment."""

    scratch: Path
    data: Path
    device: str
    environment: Mapping[str, str]

    def command(self, name: str, batch: int) -> list[str]:
        """Arguments of Python for a run of this name, with `batch` images a step."""
        recipe = self.scratch / f"full-{batch}.py"
        recipe.write_text(
            "from ftkit.recipe import Recipe, Stage\nrecipe = Recipe(name='full', backbone="
            "'efficientnet_lite0', weights='none', stages=(Stage(train='all', epochs=3, lr=1e-4, "
            f"batch_size={batch}, cache='off'),))\n"
        )
        table = _subset(self.data, batch * (40 if self.device == "cuda" else 5))
        plan = ["--recipe", str(recipe), "--device", self.device, "--out", str(self.scratch / name)]
        return ["-m", "ftkit", "train", str(table), *plan]

    def together(self, count: int, each: int) -> float:
        """Images/s of `count` processes that train one model."""
        command = self.command(f"run-{count}", each * count)
        subprocess.run([*_torchrun(count), *command], check=True, env=self.environment)
        return _best(self.scratch / f"run-{count}")

    def apart(self, count: int, each: int) -> float:
        """Images/s in all of `count` processes that train a model each, at once."""
        names = [f"apart-{count}-{number}" for number in range(count)]
        running = [
            subprocess.Popen(
                [sys.executable, *self.command(name, each)],
                env={**self.environment, "CUDA_VISIBLE_DEVICES": str(number)},
            )
            for number, name in enumerate(names)
        ]
        codes = [process.wait() for process in running]
        assert not any(codes)
        return sum(_best(self.scratch / name) for name in names)

    def all_reduce(self, count: int, parameters: int) -> list[str]:
        """Time of an all-reduce of so many gradients, and of a flag."""
        script = self.scratch / "reduce.py"
        script.write_text(REDUCE)
        done = subprocess.run(
            [*_torchrun(count), str(script), self.device, str(parameters)],
            check=True,
            env=self.environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        return [f"{float(word):.2f} ms" for word in done.stdout.split()[-2:]]


def _torchrun(count: int) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc-per-node", str(count)]


def scaling(scratch: Path, processes: Sequence[int], device: str, each: int) -> str:
    """Full fine-tuning of lite0 with `each` images per process and step.

    Measured for processes that train together, for as many independent ones, and for an all-reduce
    of the gradients.
    """
    setting = Setting(
        scratch=scratch,
        data=many_photographs(scratch / "scaling", 1),
        device=device,
        environment={
            **os.environ,
            "FTKIT_CACHE": str(scratch / "cache"),
            "OMP_NUM_THREADS": "1",
        },
    )
    sized = sum(p.numel() for p in build("efficientnet_lite0", 4, "none").model.parameters())
    lines = [
        "| processes | images/s in all | of one, times N | of N apart | all-reduce of the gradients | of a flag |",
        "|---|---|---|---|---|---|",
    ]
    alone = 0.0
    for count in processes:
        speed = setting.together(count, each)
        alone = alone or speed / count
        apart = setting.apart(count, each) if count > 1 else speed
        spent = setting.all_reduce(count, sized) if count > 1 else ["", ""]
        lines.append(
            f"| {count} | {speed:.1f} | {speed / (alone * count):.0%} | {speed / apart:.0%} "
            f"| {spent[0]} | {spent[1]} |"
        )
    return "\n".join(lines)


def paper() -> str:
    """Data-parallel efficiency, calculated from timm's published step time; nothing is measured.

    Ring all-reduce: 2 (N - 1) / N x bytes at the slowest link, and 2 (N - 1) hops; BatchNorm over
    the global batch: a gather forward and a sum backward each, log2(N) hops; the flag of a step:
    log2(N) hops by TCP.
    """
    # Bytes/s per GPU: 2/3 of NVLink 4's 450 GB/s, 80 % of a 400 Gbit/s adapter
    inside, between = (
        300e9,
        40e9,
    )
    lines = [
        "| model | gradients | step, one GPU | GPUs | all-reduce | BatchNorm | efficiency | all-reduce hidden |",
        "|---|---|---|---|---|---|---|---|",
    ]

    for name in MODELS:
        model = build(MODELS[name], 1000, "none").model
        size = 4 * sum(p.numel() for p in model.parameters())
        norms = sum(
            isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in model.modules()
        )
        step = PAPER_BATCH / TIMM[name]

        for count in (8, 64):
            bandwidth, hop = (inside, 5e-6) if count <= 8 else (between, 15e-6)
            rounds = (count - 1).bit_length()
            reduce = 2 * (count - 1) / count * size / bandwidth + 2 * (count - 1) * hop
            synced, flag = 2 * norms * rounds * hop, rounds * 50e-6
            bare, hidden = (
                step / (step + reduce + synced + flag),
                step / (max(step, reduce) + synced + flag),
            )
            lines.append(
                f"| {name} | {size / 1e6:.0f} MB | {step * 1e3:.0f} ms | {count} | {reduce * 1e3:.1f} ms | "
                f"{synced * 1e3:.1f} ms | {bare:.1%} | {hidden:.1%} |"
            )

    return "\n".join(lines)


def main() -> None:
    """Measure, calculate, and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"]
    )
    parser.add_argument("--processes", default="1,2,4")
    parser.add_argument("--each", type=int, default=16, help="images a process and step")
    parser.add_argument("--paper", action="store_true", help="only reckon")
    options = parser.parse_args()
    tables.write("paper", paper(), tables.GPU)

    if options.paper:
        return

    gpus = options.device == "cuda"
    counts = [int(word) for word in options.processes.split(",")]
    counts = [count for count in counts if not gpus or count <= torch.cuda.device_count()]

    with tempfile.TemporaryDirectory() as folder:
        found = scaling(Path(folder), counts, options.device, options.each)

    tables.write("scaling-gpu" if gpus else "scaling-cpu", found, tables.GPU)


if __name__ == "__main__":
    main()
