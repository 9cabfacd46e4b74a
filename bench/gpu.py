"""What a GPU does for training and for the exported file, and what several processes do; writes bench/gpu.md.

    python bench/gpu.py                                  all that can be measured here (10 minutes on one GPU)
    python bench/gpu.py --what scaling --processes 1,2,4
    python bench/gpu.py --what throughput --device cpu --batch 32 --copies 1      what a CPU can show of it

throughput: full fine-tuning at 224 x 224 through `ftkit train`, against the same step on one resident synthetic batch,
and against the loop of torchvision's tutorial (DataLoader over ImageFolder, float32). demo: the demo's train and
export. provider: its bundle on CUDA. scaling: `torchrun -m ftkit train`, as many images a process. paper: to 64 GPUs,
reckoned.
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import tables
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from ftkit.backbones import build
from ftkit.compute import prepare
from ftkit.demo import SETTINGS, write_elpv
from ftkit.distributed import SOLO, pick_device
from ftkit.feed import Feed, Fetched, set_mode, under
from ftkit.optim import Batch, Moving, make_optimizer
from ftkit.recipe import Recipe, Stage
from ftkit.step import fresh_gradients, run_as
from ftkit.train import train
from ftkit_export.bench import find
from ftkit_export.latency import Condition, begin, measure
from ftkit_export.preprocess import Preprocess
from ftkit_export.session import PROVIDERS, cores

MODELS = {"lite0": "efficientnet_lite0", "mobilenet_v3_small": "mobilenetv3_small_100", "resnet50": "resnet50"}
# images/s, training with AMP in channels_last, batch 512: results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv of
# huggingface/pytorch-image-models
TIMM = {"lite0": 2079.28, "mobilenet_v3_small": 8035.08, "resnet50": 1218.01}
EPOCHS, STEPS = 3, 60
SIZE = 224


@contextmanager
def cached_in(folder: Path) -> Iterator[None]:
    """ftkit's cache in `folder`, empty."""
    before = os.environ.get("FTKIT_CACHE")
    os.environ["FTKIT_CACHE"] = str(folder)
    yield
    os.environ.pop("FTKIT_CACHE")
    if before:
        os.environ["FTKIT_CACHE"] = before


def many_photographs(out: Path, copies: int) -> Path:
    """out/CLASS, each of the demo's photographs so many times under other names."""
    write_elpv(out, split=False)
    for path in sorted(out.rglob("*.png")):
        for number in range(1, copies):
            shutil.copyfile(path, path.with_name(f"{path.stem}-{number}.png"))
    return out


def recipe_of(name: str, batch: int, epochs: int) -> Recipe:
    """Full fine-tuning, nothing frozen, nothing cached but the canvases."""
    stage = Stage(train="all", epochs=epochs, lr=1e-4, batch_size=batch, cache="off")
    weights = "pretrained" if name == "lite0" else "none"
    preprocess = Preprocess(size=SIZE, resize=SIZE)
    return Recipe(name=name, backbone=MODELS[name], weights=weights, preprocess=preprocess, stages=(stage,))


def through_ftkit(name: str, data: Path, scratch: Path, batch: int, device: str) -> float:
    """Images/s of the best epoch after the first, which holds the warm-up."""
    out = train(recipe_of(name, batch, EPOCHS), data, scratch / f"run-{name}", device=device)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return max(float(line["images_per_s"]) for line in lines[1:])


def on_synthetic(name: str, batch: int, device: str, steps: int) -> float:
    """Images/s of the very same step, on one batch of noise that lies on the device. steps: as many as the stage has,
    for they decide whether another way to run it is tried."""
    recipe, place = recipe_of(name, batch, 1), pick_device(device)
    compute, stage = prepare(place, False), recipe.stages[0]
    backbone = build(recipe.backbone, 4, "none")
    model = backbone.model.to(place).to(memory_format=torch.channels_last)
    names = tuple(child for child, _ in model.named_children())
    set_mode(model, names, True)
    pixels = torch.randn(batch, 3, SIZE, SIZE, device=place).contiguous(memory_format=torch.channels_last)
    fixed = Batch(inputs=(pixels,), targets=torch.zeros(batch, dtype=torch.long, device=place))
    nothing = Fetched(tensors=[], labels=torch.zeros(0))
    feed = Feed(net=model, eval_net=model, fetch=lambda *_: nothing, prepare=lambda _: fixed, val=lambda _: (),
                how="", kind="live")  # fmt: skip
    optimizer = make_optimizer(backbone, stage, fused=place.type == "cuda")
    for group in optimizer.param_groups:
        group["lr"] = 1e-9
    moving = Moving(model, under(names), stage, optimizer, compute)
    net, _ = run_as(feed, stage, compute, SOLO, batch, lambda: nothing, steps)
    steps, warm = (STEPS, 10) if place.type == "cuda" else (3, 1)
    begun = 0.0
    for step in range(warm + steps):
        if step == warm:
            _wait(place)
            begun = time.perf_counter()
        tally, net, _ = fresh_gradients(net, feed, fixed, moving, None, batch)
        moving.step(step + 1, tally)
    _wait(place)
    return steps * batch / (time.perf_counter() - begun)


def by_tutorial(name: str, data: Path, batch: int, device: str) -> float:
    """Images/s of torchvision's tutorial loop: every image decoded at every step, float32."""
    place, model = pick_device(device), build(MODELS[name], 4, "none").model
    model.to(place).train()
    transform = transforms.Compose([
        transforms.RandomResizedCrop(SIZE, scale=(0.9, 1.0)), transforms.RandomHorizontalFlip(),
        transforms.ToTensor(), transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ])  # fmt: skip
    loader = DataLoader(ImageFolder(str(data), transform), batch, shuffle=True, num_workers=cores(), drop_last=True)
    optimizer, seen, begun = torch.optim.AdamW(model.parameters(), lr=1e-4), -1, 0.0
    limit = 30.0 if place.type == "cuda" else 10.0
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
    """The table of section `throughput`."""
    data = many_photographs(scratch / "photos", copies)
    if device == "cpu":  # 16 batches; all of them would take hours
        files = sorted(data.rglob("*.png"))
        for path in set(files) - set(random.Random(0).sample(files, 16 * batch)):
            path.unlink()
    lines = ["| model, batch | ftkit, img/s | same step, synthetic | share | tutorial loop | factor | timm, RTX 3090 |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    with cached_in(scratch / "cache"):
        for name in models:
            ours = through_ftkit(name, data, scratch, batch, device)
            steps = EPOCHS * (len(list(data.rglob("*.png"))) * 3 // 4 // batch)  # three quarters train
            limit, loop = on_synthetic(name, batch, device, steps), by_tutorial(name, data, batch, device)
            lines.append(f"| {name}, {batch} | {ours:.0f} | {limit:.0f} | {ours / limit:.1%} | {loop:.0f} | "
                         f"{ours / loop:.1f}x | {TIMM[name]:.0f} |")  # fmt: skip
    return "\n".join(lines)


def demo(scratch: Path, device: str) -> tuple[str, Path]:
    """Seconds of the demo's commands, and its bundle."""
    data, run, bundle = (scratch / name for name in ("demo", "demo-run", "demo-bundle"))
    write_elpv(data, split=True)
    providers = "cpu,cuda,cuda-tf32" if device == "cuda" else "cpu"
    environment = {**os.environ, "FTKIT_CACHE": str(scratch / "demo-cache")}
    lines = ["| command | seconds |", "|---|---|"]
    for command in (["train", data, "--out", run, "--device", device, *SETTINGS],
                    ["export", run, "--out", bundle, "--quick", "--providers", providers]):  # fmt: skip
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-m", "ftkit", *map(str, command)], check=True, env=environment)
        lines.append(f"| `ftkit {command[0]}` | {time.perf_counter() - begun:.1f} |")
    metrics = json.loads((run / "run.json").read_text())["metrics"]["test"]
    lines.append(f"| test accuracy | {metrics['accuracy']:.4f} [{metrics['accuracy_low']:.3f}, "
                 f"{metrics['accuracy_high']:.3f}] |")  # fmt: skip
    return "\n".join(lines), bundle


def provider(bundle: Path) -> str:
    """Parity as sealed, then latencies of each way to run CUDA, and of TensorRT where it opens."""
    manifest, found = json.loads((bundle / "manifest.json").read_text()), find(bundle)
    lines = ["| parity | group | value | limit |", "|---|---|---|---|"]
    for item in (*manifest["evidence"]["parity"], *({"provider": name, "checks": checks} for name, checks in
                                                    manifest["evidence"]["agreement"].items())):  # fmt: skip
        lines += [f"| {item['provider']}: {check['name']} | {check['group']} | {check['value']:.3g} | "
                  f"{check['limit']:.3g} |" for check in item["checks"] if item["provider"] != "cpu"]  # fmt: skip
    lines += ["", "| variant on provider | batch | copies | p50 ms | p95 ms | first run ms | GPU MB |",
              "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name in [name for name, row in PROVIDERS.items() if row.gpu]:
        batches = (1, 8, 64) if name in ("cuda", "cuda-graph") else (1,)
        for variant, path in found.run_by(name).items():
            for batch in batches:
                for copies in (False,) if PROVIDERS[name].captured else (True, False):
                    condition = Condition(model=str(path), provider=name, threads=1, batch=batch, copies=copies)
                    try:
                        row, start = measure(condition, found.image, quick=True), begin(condition, found.image)
                    except Exception as error:
                        lines.append(f"| {variant} on {name} | {batch} | {copies} | {str(error)[:80]} | | | |")
                        continue
                    kept = (row.gpu_bytes or 0) / 1e6
                    lines.append(f"| {variant} on {name} | {batch} | {'yes' if copies else 'no'} | {row.p50_ms:.2f} | "
                                 f"{row.p95_ms:.2f} | {start.first_run_ms:.0f} | {kept:.0f} |")  # fmt: skip
    return "\n".join(lines)


REDUCE = """
import sys, time, torch, torch.distributed as dist
from ftkit.distributed import joined
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
    """A CSV of so many training photographs, and 40 to judge."""
    files = random.Random(0).sample(sorted(data.rglob("*.png")), min(wanted + 40, 2223))
    lines = [f"{path},{path.parent.name},{'train' if n < wanted else ('val', 'test')[n % 2]}"
             for n, path in enumerate(files)]  # fmt: skip
    table = data / f"{wanted}.csv"
    table.write_text("\n".join(["path,label,split", *lines]) + "\n")
    return table


def _best(run: Path) -> float:
    """Images/s of the best epoch after the first."""
    epochs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return max(float(epoch["images_per_s"]) for epoch in epochs[1:])


def scaling(scratch: Path, processes: Sequence[int], device: str, each: int) -> str:
    """`each` images a process and step, full fine-tuning of lite0: together, and as many that tell each other nothing;
    and what an all-reduce of the gradients takes."""
    data = many_photographs(scratch / "scaling", 1)
    sized = sum(p.numel() for p in build("efficientnet_lite0", 4, "none").model.parameters())
    (scratch / "reduce.py").write_text(REDUCE)
    lines = ["| processes | images/s in all | of one, times N | of N apart | all-reduce of the gradients | of a flag |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    environment, alone = {**os.environ, "FTKIT_CACHE": str(scratch / "cache"), "OMP_NUM_THREADS": "1"}, 0.0

    def command(name: str, batch: int, place: str) -> list[str]:
        recipe = scratch / f"full-{batch}.py"
        recipe.write_text("from ftkit.recipe import Recipe, Stage\nrecipe = Recipe(name='full', backbone="
                          "'efficientnet_lite0', weights='none', stages=(Stage(train='all', epochs=3, lr=1e-4, "
                          f"batch_size={batch}, cache='off'),))\n")  # fmt: skip
        table = _subset(data, batch * (40 if device == "cuda" else 5))
        return ["-m", "ftkit", "train", str(table), "--recipe", str(recipe), "--out", str(scratch / name),
                "--device", place]  # fmt: skip

    for count in processes:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        subprocess.run([*start, *command(f"run-{count}", each * count, device)], check=True, env=environment)
        speed, spent = _best(scratch / f"run-{count}"), ["", ""]
        alone, apart = alone or speed / count, speed
        if count > 1:
            running = [subprocess.Popen([sys.executable, *command(f"apart-{count}-{number}", each, device)],
                                        env={**environment, "CUDA_VISIBLE_DEVICES": str(number)})
                       for number in range(count)]  # fmt: skip
            assert not any(process.wait() for process in running)
            apart = sum(_best(scratch / f"apart-{count}-{number}") for number in range(count))
            done = subprocess.run([*start, str(scratch / "reduce.py"), device, str(sized)], check=True, env=environment,
                                  stdout=subprocess.PIPE, text=True)  # fmt: skip
            spent = [f"{float(word):.2f} ms" for word in done.stdout.split()[-2:]]
        lines.append(f"| {count} | {speed:.1f} | {speed / (alone * count):.0%} | {speed / apart:.0%} | {spent[0]} | "
                     f"{spent[1]} |")  # fmt: skip
    return "\n".join(lines)


def paper(batch: int) -> str:
    """Data-parallel efficiency, reckoned from timm's published step: nothing of it is measured.

    Ring all-reduce: 2 (N - 1) / N x bytes at the slowest link, and 2 (N - 1) hops; BatchNorm over the global batch: a
    gather forward and a sum backward each, log2(N) hops; the flag of a step: log2(N) hops by TCP.
    """
    inside, between = 300e9, 40e9  # bytes/s a GPU: 2/3 of NVLink 4's 450 GB/s, 80 % of a 400 Gbit/s adapter
    lines = ["| model | gradients | step, one GPU | GPUs | all-reduce | BatchNorm | efficiency | all-reduce hidden |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name in MODELS:
        model = build(MODELS[name], 1000, "none").model
        size = 4 * sum(p.numel() for p in model.parameters())
        norms = sum(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in model.modules())
        step = batch / TIMM[name]
        for count in (8, 64):
            bandwidth, hop = (inside, 5e-6) if count <= 8 else (between, 15e-6)
            rounds = (count - 1).bit_length()
            reduce = 2 * (count - 1) / count * size / bandwidth + 2 * (count - 1) * hop
            synced, flag = 2 * norms * rounds * hop, rounds * 50e-6
            bare, hidden = step / (step + reduce + synced + flag), step / (max(step, reduce) + synced + flag)
            lines.append(f"| {name} | {size / 1e6:.0f} MB | {step * 1e3:.0f} ms | {count} | {reduce * 1e3:.1f} ms | "
                         f"{synced * 1e3:.1f} ms | {bare:.1%} | {hidden:.1%} |")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    """Measure what can be, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", default="throughput,demo,provider,scaling,paper")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--copies", type=int, default=4, help="of each of the demo's 2,223 photographs")
    parser.add_argument("--processes", default="1,2,4")
    parser.add_argument("--each", type=int, default=16, help="images a process and step, for scaling")
    options = parser.parse_args()
    wanted, bundle = options.what.split(","), None
    gpu = options.device == "cuda"
    counts = [int(number) for number in options.processes.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if "throughput" in wanted:
            found = throughput(scratch, options.models.split(","), options.batch, options.copies, options.device)
            tables.write("throughput" if gpu else "throughput-cpu", found, tables.GPU)
        if "demo" in wanted or "provider" in wanted:
            found, bundle = demo(scratch, options.device)
            _keep("demo", found, gpu)
        if "provider" in wanted and bundle and gpu:
            _keep("provider", provider(bundle), gpu)
        if "scaling" in wanted:
            name = "scaling-gpu" if gpu else "scaling-cpu"
            counts = [count for count in counts if not gpu or count <= torch.cuda.device_count()]
            tables.write(name, scaling(scratch, counts, options.device, options.each), tables.GPU)
        if "paper" in wanted:
            tables.write("paper", paper(options.batch), tables.GPU)


def _keep(name: str, table: str, gpu: bool) -> None:
    """Into gpu.md what a GPU measured; a trial on a CPU is only printed."""
    if gpu:
        tables.write(name, table, tables.GPU)
    else:
        print(table)


if __name__ == "__main__":
    main()
