"""The end of a training: judge the model once, and write the run folder."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from ftkit.data.canvas import Canvases
from ftkit.data.dataset import Images, below, splits_csv
from ftkit.evaluation.bundle import DIGEST, SPLITS_CSV, TRAINED_ON
from ftkit.evaluation.metrics import Mistake
from ftkit.evaluation.model import (
    HeldOut,
    Inference,
    Outputs,
    evaluate_model,
    familiar,
    outputs_of,
)
from ftkit.evaluation.targets import evaluate_targets
from ftkit.models.freezing import trainable
from ftkit.models.pipeline import Part, describe
from ftkit.models.weights import fingerprint
from ftkit.recipe import resolve
from ftkit.report.build import pictures, save_pictures, write_report
from ftkit.tasks.task import Regression, SingleLabel, headline
from ftkit.training.fold_decision import out_of_fold
from ftkit.training.prepare import Prepared, Request
from ftkit.training.run import (
    FOLD_WEIGHTS,
    OUT_OF_FOLD,
    RUN_SCHEMA,
    environment,
    finish,
    read_metrics,
)
from ftkit.training.validate import detached
from ftkit.training.work import Work
from ftkit.utils import console
from ftkit.utils.cache_folder import LARGE, limit_bytes, trim
from ftkit_export.proof.intervals import ground
from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.files import write_atomically
from ftkit_export.runtime.preprocess import MAX_PIXELS


def write_run(
    work: Work,
    request: Request,
    prepared: Prepared,
    held_out: HeldOut | None,
    fold_weights: Mapping[str, torch.Tensor],
    folder: Path,
) -> None:
    """Evaluate the final weights once, and write the run to `folder`."""
    run = work.state
    canvases = prepared.canvases
    backbone = work.backbone
    backbone.model.cpu().eval()
    if held_out:
        foreign = _foreign_scores(work, prepared, held_out, fold_weights)
        held_out = replace(held_out, foreign=foreign)
    outputs = outputs_of(backbone, canvases, prepared.preprocess, held_out)
    verdict, summary = _judged(work, outputs, canvases)
    seconds = run.spent
    run_json = {
        "schema": RUN_SCHEMA,
        "recipe": resolve(work.recipe),
        "task": work.task.as_json(),
        "classes": list(prepared.images.names),
        "preprocess": asdict(prepared.preprocess),
        **verdict,
        "seed": work.seed,
        "group_by": run.plan["group_by"],
        "audit": prepared.audit,
        "data": str(Path(request.data).resolve()),
        "root": request.root and str(request.root.resolve()),
        "add": request.add and str(request.add.resolve()),
        "max_pixels": os.environ.get(MAX_PIXELS),
        "data_fingerprint": canvases.fingerprint,
        "bad_files": [[str(path), why] for path, why in canvases.bad],
        "splits": {split: len(canvases.rows(split)) for split in ("train", "val", "test")},
        "weights": backbone.weights,
        "model_fingerprint": fingerprint(backbone.model),
        "head_start": run.head_start,
        "folds": _told_folds(work, canvases, held_out),
        "stages": run.stages,
        "not_trained": [stage.train for stage in work.recipe.stages[len(run.stages) :]],
        "pipeline": [asdict(part) for part in _pipeline(work, prepared)],
        "seconds": seconds,
        "environment": environment(),
    }

    if held_out:
        _write_folds(work, held_out, fold_weights, folder)
    _write(folder, run_json, work, canvases)

    _say_cache()
    console.say(f"{summary}; trained in {console.clock(seconds)}")


def _judged(work: Work, outputs: Outputs, canvases: Canvases) -> tuple[dict[str, Any], str]:
    """What run.json says of the evaluation, and a line for the console."""
    if isinstance(work.task, SingleLabel):
        verdict = evaluate_model(outputs, canvases, work.recipe.precision)
        data = {
            **asdict(verdict),
            "mistakes": _named(verdict.mistakes, canvases.images, canvases),
        }
        metrics = asdict(verdict.metrics["test"])
    else:
        data = evaluate_targets(outputs, canvases, work.task, work.recipe)
        for mistake in data["mistakes"]:
            path = canvases.images.images[mistake["row"]].path
            mistake["image"] = below(canvases.images.root, path)
        metrics = data["metrics"]["test"]

    told = f"test {work.task.metric} {console.with_bounds(*headline(metrics))}"
    if isinstance(work.task, Regression) and work.task.unit:
        told += f" {work.task.unit}"
    return data, f"{told} on {ground(metrics['images'], metrics['clusters'])}"


def _pipeline(work: Work, prepared: Prepared) -> list[Part]:
    """The steps of the trained model, with the stages that trained them and were kept."""
    trained = [("ridge", trainable(work.backbone, "head"))] if work.state.head_start else []
    trained += [
        (stage["train"], work.loaders.trained[number])
        for number, stage in enumerate(work.state.stages)
        if stage["kept"]
    ]
    return describe(work.backbone, trained, prepared.preprocess.size)


def outcome_of_folds(
    work: Work, canvases: Canvases
) -> tuple[HeldOut | None, dict[str, torch.Tensor]]:
    """The out-of-fold predictions of what the stages ended with, and the folds' weights as
    "FOLD/NAME". Collective."""
    answers = out_of_fold(work.state) if work.folds else None
    if answers is None or work.folds is None:
        return None, {}

    known = answers.known
    held_out = HeldOut(
        rows=canvases.rows("train")[known],
        logits=answers.logits[known],
        embedding=answers.embedding[known],
        foreign=np.zeros(int(known.sum()), np.float32),  # computed by the rank that writes the run
    )
    weights = {
        f"{fold}/{name}": value.contiguous()
        for fold in range(work.folds.count)
        for name, value in work.state.tensors(f"fold{fold}").items()
    }
    return held_out, weights


def _foreign_scores(
    work: Work, prepared: Prepared, held_out: HeldOut, weights: Mapping[str, torch.Tensor]
) -> Array:
    """Each held-out image's out-of-distribution score among its own model's training images, (n,)."""
    assert work.folds
    backbone = work.backbone
    base = detached(backbone.model.state_dict())
    canvases = prepared.canvases
    train = canvases.rows("train")
    of = work.folds.of[np.isin(train, held_out.rows)]
    scores = np.zeros(len(of), np.float32)

    for fold in np.unique(of):
        prefix = f"{fold}/"
        own = {
            name.removeprefix(prefix): weights[name] for name in weights if name.startswith(prefix)
        }
        backbone.model.load_state_dict(own, strict=False)
        embedding = held_out.embedding[of == fold]
        answers = Inference(backbone, canvases, prepared.preprocess)
        statistics = familiar(answers, canvases, train[work.folds.of != fold], embedding)
        scores[of == fold] = statistics.score(embedding)

    backbone.model.load_state_dict(base)
    return scores


def _told_folds(work: Work, canvases: Canvases, held_out: HeldOut | None) -> dict[str, Any] | None:
    """Folds as run.json has them: their number, and each one's images and accuracy (or the figure of
    another task)."""
    if not work.folds or held_out is None:
        return None

    targets = work.task.targets(canvases).numpy()[held_out.rows]
    of = work.folds.of[np.isin(canvases.rows("train"), held_out.rows)]
    parts = [of == fold for fold in range(work.folds.count)]
    return {
        "count": work.folds.count,
        "images": [int(part.sum()) for part in parts],
        "accuracy": [
            work.task.figure(held_out.logits[part], targets[part]) if part.any() else None
            for part in parts
        ],
    }


def _write_folds(
    work: Work, held_out: HeldOut, weights: Mapping[str, torch.Tensor], folder: Path
) -> None:
    """oof.npz, and each fold's weights where they differ from the shipped ones: an export decides
    on them."""
    assert work.folds
    content = io.BytesIO()
    np.savez_compressed(
        content,
        fold=work.folds.of,
        train_rows=work.loaders.canvases.rows("train"),
        rows=held_out.rows,
        logits=held_out.logits,
        embedding=held_out.embedding.astype(np.float16),
        foreign=held_out.foreign,
    )
    write_atomically(folder / OUT_OF_FOLD, content.getvalue())
    write_atomically(folder / FOLD_WEIGHTS, safetensors.torch.save(dict(weights)))


def _write(folder: Path, run_json: dict[str, Any], work: Work, canvases: Canvases) -> None:
    """Write report, training digests and splits; then weights and run.json, to finish the run."""
    shown = pictures(canvases, run_json["mistakes"])
    save_pictures(folder / "mistakes", shown)
    as_read_back = json.loads(json.dumps(run_json))
    epochs = read_metrics(work.state.folder)
    write_report(folder / "report.html", as_read_back, epochs, shown)

    rows = [row for split in ("train", "val") for row in canvases.rows(split)]
    digests = sorted(canvases.digests[row][:DIGEST] for row in rows)
    write_atomically(folder / TRAINED_ON, "".join(f"{digest}\n" for digest in digests).encode())
    write_atomically(folder / SPLITS_CSV, splits_csv(canvases.images))
    finish(folder, work.backbone.model, run_json)


def _say_cache() -> None:
    """Trim the cache to its limit, and print its size if it is large."""
    left, removed = trim()
    if left > LARGE:
        gone = f"; {removed / 1e9:.1f} GB of the least recently used removed" if removed else ""
        console.say(
            f"cache: {left / 1e9:.1f} GB of at most {limit_bytes() / 1e9:g} (`ftkit cache`){gone}"
        )


def _named(mistakes: Sequence[Mistake], images: Images, canvases: Canvases) -> list[dict[str, Any]]:
    """Mistakes with each image's path in the data and class names."""
    return [
        {
            "image": below(images.root, canvases.images.images[item.row].path),
            "class": images.classes[item.label],
            "said": images.classes[item.said],
            "probability": item.probability,
            "row": item.row,
            "said_label": item.said,
        }
        for item in mistakes
    ]
