"""Benchmarks of training and of the exported file on a GPU; writes bench/gpu.md.

    python bench/gpu.py                 everything this machine can measure (10 minutes on one GPU)
    python bench/gpu.py --what throughput --device cpu --batch 32 --copies 1        part for a CPU

throughput: full fine-tuning at 224 x 224 through `ftkit train`, compared with the same step on one
resident synthetic batch, and with the loop of torchvision's tutorial (DataLoader over ImageFolder,
float32). demo: the demo's train and export. provider: its bundle on CUDA. Several processes are in
scaling.py.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import tables
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from ftkit.cli.demo import SETTINGS, write_elpv
from ftkit.models.backbones import build
from ftkit.models.freezing import set_mode, under
from ftkit.options import TrainOptions
from ftkit.recipe import Recipe, Stage
from ftkit.tasks.losses import Batch
from ftkit.training.loader import Fetched, Loader
from ftkit.training.optimizer import StepState, make_optimizer
from ftkit.training.precision import prepare
from ftkit.training.step import fresh_gradients, run_as
from ftkit.training.train import train
from ftkit.utils.distributed import SOLO, pick_device
from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.latency import Condition, measure, measure_start
from ftkit_export.runtime.measure import find
from ftkit_export.runtime.preprocess import Preprocess
from ftkit_export.runtime.session import PROVIDERS, cores

MODELS = {
    "lite0": "efficientnet_lite0",
    "mobilenet_v3_small": "mobilenetv3_small_100",
    "resnet50": "resnet50",
}
# images/s, training with AMP in channels_last, batch 512: results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv of
# huggingface/pytorch-image-models
TIMM = {"lite0": 2079.28, "mobilenet_v3_small": 8035.08, "resnet50": 1218.01}
EPOCHS, STEPS = 3, 60
SIZE = 224


@contextmanager
def cached_in(folder: Path) -> Iterator[None]:
    """Use `folder`, which is empty, as ftkit's cache."""
    before = os.environ.get("FTKIT_CACHE")
    os.environ["FTKIT_CACHE"] = str(folder)
    yield
    os.environ.pop("FTKIT_CACHE")
    if before:
        os.environ["FTKIT_CACHE"] = before


def many_photographs(out: Path, copies: int) -> Path:
    """Write out/CLASS with `copies` of each of the demo's photographs under different names."""
    write_elpv(out, split=False)
    for path in sorted(out.rglob("*.png")):
        for number in range(1, copies):
            shutil.copyfile(path, path.with_name(f"{path.stem}-{number}.png"))
    return out


def recipe_of(name: str, batch: int, epochs: int) -> Recipe:
    """Recipe for full fine-tuning: nothing frozen, nothing cached except the decoded images."""
    stage = Stage(train="all", epochs=epochs, lr=1e-4, batch_size=batch, cache="off")
    weights = "pretrained" if name == "lite0" else "none"
    preprocess = Preprocess(size=SIZE, resize=SIZE)
    return Recipe(
        name=name,
        backbone=MODELS[name],
        weights=weights,
        preprocess=preprocess,
        stages=(stage,),
        folds=0,
    )


def through_ftkit(name: str, data: Path, scratch: Path, batch: int, device: str) -> float:
    """Images/s of the best epoch, not counting the first, which includes the warm-up."""
    out = train(
        recipe_of(name, batch, EPOCHS), data, scratch / f"run-{name}", TrainOptions(device=device)
    )
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return max(float(line["images_per_s"]) for line in lines[1:])


class _Fixed(Loader):
    """Loader that returns the same batch at every step, already on the device."""

    def __init__(self, net: torch.nn.Module, batch: Batch):
        super().__init__(
            net=net,
            eval_net=net,
            labels=batch.targets,
            device=batch.targets.device,
            how="",
            kind="live",
        )
        self.batch = batch

    def fetch(self, positions: Array, generator: torch.Generator, part: slice) -> Fetched:
        """Return nothing."""
        return Fetched(tensors=[], labels=torch.zeros(0))

    def prepare(self, fetched: Fetched) -> Batch:
        """Return the batch."""
        return self.batch

    def seen(self, positions: Array) -> tuple[torch.Tensor, ...]:
        """Nothing."""
        return ()

    def val(self, positions: Array) -> tuple[torch.Tensor, ...]:
        """Return nothing."""
        return ()


def on_synthetic(name: str, batch: int, device: str, steps: int) -> float:
    """Images/s of the same training step on one batch of noise that stays on the device.

    steps: number of steps of the stage, which decides whether a CUDA graph or torch.compile is
    tried.
    """
    recipe, place = recipe_of(name, batch, 1), pick_device(device)
    compute, stage = prepare(place, False), recipe.stages[0]
    backbone = build(recipe.backbone, 4, "none")
    model = backbone.model.to(place).to(memory_format=torch.channels_last)
    names = tuple(child for child, _ in model.named_children())
    set_mode(model, names, True)
    pixels = torch.randn(batch, 3, SIZE, SIZE, device=place).contiguous(
        memory_format=torch.channels_last
    )
    fixed = Batch(inputs=(pixels,), targets=torch.zeros(batch, dtype=torch.long, device=place))
    nothing = Fetched(tensors=[], labels=torch.zeros(0))
    loader = _Fixed(model, fixed)

    optimizer = make_optimizer(backbone, stage, fused=place.type == "cuda")
    for group in optimizer.param_groups:
        group["lr"] = 1e-9

    moving = StepState(model, under(names), stage, optimizer, compute)
    with compute.searching():
        net, _ = run_as(loader, stage, compute, SOLO, batch, lambda: nothing, steps)
    steps, warm = (STEPS, 10) if place.type == "cuda" else (3, 1)

    begun = 0.0
    for step in range(warm + steps):
        if step == warm:
            _wait(place)
            begun = time.perf_counter()
        with compute.searching():
            tally, net, _ = fresh_gradients(net, model, fixed, moving, None, batch)
        moving.step(step + 1, tally)

    _wait(place)
    return steps * batch / (time.perf_counter() - begun)


def _apart(measure: Callable[..., float], *arguments: object) -> float:
    """In a fresh process, with torch's own settings: training here has changed TF32's."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def by_tutorial(name: str, data: Path, batch: int, device: str) -> float:
    """Images/s of torchvision's tutorial loop: every image decoded at every step, float32."""
    place, model = pick_device(device), build(MODELS[name], 4, "none").model
    model.to(place).train()
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, scale=(0.9, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )

    loader = DataLoader(
        ImageFolder(str(data), transform), batch, shuffle=True, num_workers=cores(), drop_last=True
    )
    optimizer, seen, begun = torch.optim.AdamW(model.parameters(), lr=1e-4), -1, 0.0
    limit = 10.0  # seconds

    for images, labels in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(images.to(place)), labels.to(place)).backward()
        optimizer.step()
        seen += 1
        if seen == 0:  # the workers have started
            _wait(place)
            begun = time.perf_counter()
        elif time.perf_counter() - begun > limit:
            break

    _wait(place)
    return seen * batch / (time.perf_counter() - begun)


def _wait(place: torch.device) -> None:
    if place.type == "cuda":
        torch.cuda.synchronize(place)


def throughput(scratch: Path, models: Sequence[str], batch: int, copies: int, device: str) -> str:
    """Table for the section `throughput`."""
    data = many_photographs(scratch / "photos", copies)
    if device == "cpu":  # only 16 batches; all images would take hours
        files = sorted(data.rglob("*.png"))
        for path in set(files) - set(random.Random(0).sample(files, 16 * batch)):
            path.unlink()

    lines = [
        "| model, batch | ftkit, img/s | same step, synthetic | share | tutorial loop | factor | timm, RTX 3090 |",
        "|---|---|---|---|---|---|---|",
    ]
    with cached_in(scratch / "cache"):
        for name in models:
            ours = through_ftkit(name, data, scratch, batch, device)
            # Three quarters are train
            steps = EPOCHS * (len(list(data.rglob("*.png"))) * 3 // 4 // batch)
            limit, loop = (
                on_synthetic(name, batch, device, steps),
                _apart(by_tutorial, name, data, batch, device),
            )
            lines.append(
                f"| {name}, {batch} | {ours:.0f} | {limit:.0f} | {ours / limit:.1%} | {loop:.0f} | "
                f"{ours / loop:.1f}x | {TIMM[name]:.0f} |"
            )

    return "\n".join(lines)


def demo(scratch: Path, device: str) -> tuple[str, Path]:
    """Seconds of the demo's commands, and the bundle."""
    data, run, bundle = (scratch / name for name in ("demo", "demo-run", "demo-bundle"))
    write_elpv(data, split=True)
    providers = "cpu,cuda,cuda-tf32" if device == "cuda" else "cpu"
    environment = {**os.environ, "FTKIT_CACHE": str(scratch / "demo-cache")}
    lines = ["| command | seconds |", "|---|---|"]

    for command in (
        ["train", data, "--out", run, "--device", device, *SETTINGS],
        ["export", run, "--out", bundle, "--quick", "--providers", providers],
    ):
        begun = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "ftkit", *map(str, command)], check=True, env=environment
        )
        lines.append(f"| `ftkit {command[0]}` | {time.perf_counter() - begun:.1f} |")

    metrics = json.loads((run / "run.json").read_text())["metrics"]["test"]
    lines.append(
        f"| test accuracy | {metrics['accuracy']:.4f} [{metrics['accuracy_low']:.3f}, "
        f"{metrics['accuracy_high']:.3f}] |"
    )
    return "\n".join(lines), bundle


def provider(bundle: Path) -> str:
    """Sealed parity, then latencies of each CUDA configuration, and TensorRT if available."""
    manifest, found = json.loads((bundle / "manifest.json").read_text()), find(bundle)
    lines = ["| parity | group | value | limit |", "|---|---|---|---|"]

    for item in (
        *manifest["evidence"]["parity"],
        *(
            {"provider": name, "checks": checks}
            for name, checks in manifest["evidence"]["agreement"].items()
        ),
    ):
        lines += [
            f"| {item['provider']}: {check['name']} | {check['group']} | {check['value']:.3g} | "
            f"{check['limit']:.3g} |"
            for check in item["checks"]
            if item["provider"] != "cpu"
        ]

    lines += [
        "",
        "| variant on provider | batch | copies | p50 ms | p95 ms | first run ms | GPU MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in [name for name, row in PROVIDERS.items() if row.gpu]:
        batches = (1, 8, 64) if name in ("cuda", "cuda-graph") else (1,)
        for variant, path in found.run_by(name).items():
            for batch in batches:
                # Copies are the same for every way to run the network
                for copies in (True, False) if name == "cuda" and batch == 1 else (False,):
                    condition = Condition(
                        model=str(path), provider=name, threads=1, batch=batch, copies=copies
                    )
                    try:
                        row, start = (
                            measure(condition, found.image, quick=True),
                            measure_start(condition, found.image),
                        )
                    except Exception as error:
                        lines.append(
                            f"| {variant} on {name} | {batch} | {copies} | {str(error)[:80]} | | | |"
                        )
                        continue

                    kept = (row.gpu_bytes or 0) / 1e6
                    lines.append(
                        f"| {variant} on {name} | {batch} | {'yes' if copies else 'no'} | {row.p50_ms:.2f} | "
                        f"{row.p95_ms:.2f} | {start.first_run_ms:.0f} | {kept:.0f} |"
                    )
                    print(lines[-1], flush=True)  # in case time ends before the table does

    return "\n".join(lines)


def main() -> None:
    """Run the benchmarks that are possible here and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--what", default="throughput,demo,provider")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"]
    )
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument(
        "--copies", type=int, default=4, help="of each of the demo's 2,223 photographs"
    )
    options = parser.parse_args()
    wanted, bundle = options.what.split(","), None
    gpu = options.device == "cuda"

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if "throughput" in wanted:
            found = throughput(
                scratch, options.models.split(","), options.batch, options.copies, options.device
            )
            tables.write("throughput" if gpu else "throughput-cpu", found, tables.GPU)
        if "demo" in wanted or "provider" in wanted:
            found, bundle = demo(scratch, options.device)
            _keep("demo", found, gpu)
        if "provider" in wanted and bundle and gpu:
            _keep("provider", provider(bundle), gpu)


def _keep(name: str, table: str, gpu: bool) -> None:
    """Write results measured on a GPU into gpu.md; only print those of a CPU trial."""
    if gpu:
        tables.write(name, table, tables.GPU)
    else:
        print(table)


if __name__ == "__main__":
    main()
