"""Enrol a class: a new bundle that also knows it, from a few images, without training or old images.

    enrolled = enroll(Path("bundle"), "scratch", images, Path("next"))
    enrolled.folder, enrolled.passed, enrolled.recognised

Every variant's network stays as it is, byte for byte; operators after it decide between the new class
and the old ones (runtime/enroll.py). The new bundle is proven again: golden vectors are computed
anew from the old ones, and replayed; a gate bounds what the old classes lose. What was made for the
old classes alone (plain C, ORT format, hand-off, class activation maps, the drift reference) is left
out. Numpy and ONNX Runtime suffice, so this runs on a device too.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import ftkit_export
from ftkit_export.bundle.archive import require_key
from ftkit_export.bundle.seal import Gate, begin_bundle, overall, seal
from ftkit_export.runtime.arrays import Array, spread_evenly
from ftkit_export.runtime.enroll import (
    FEWEST,
    FILE,
    MAX_DROP,
    MOST_KEPT,
    KeptSample,
    NewClass,
    fit_class,
)
from ftkit_export.runtime.errors import BundleError, FtkitError
from ftkit_export.runtime.onnx_edit import tensor, with_class
from ftkit_export.runtime.out_of_distribution import unit_length
from ftkit_export.runtime.predict import REFERENCE, Classifier, softmax
from ftkit_export.runtime.preprocess import Preprocess, from_frame, to_frame
from ftkit_export.runtime.session import Session
from ftkit_export.runtime.verify import (
    EVIDENCE,
    MANIFEST,
    MANIFEST_SCHEMA,
    SIGNATURE,
    Outcome,
    check_files,
    read_manifest,
    replay_golden,
    sha256,
)

GOLDEN = 4  # images of the new class among the golden ones
# Made for the old classes, or by a tool that is not here
LEFT_OUT = ("device/c", "device/ort", "handoff", "explain.onnx", REFERENCE, EVIDENCE)
TRAINED_ON = "trained_on.txt"
DIGEST = 32  # hexadecimal digits, as in TRAINED_ON
HALF = 0.5
ROUNDING = 2e-6  # of a probability, in float32
RESIZED = 0.05  # of a probability: most that another resizer may move it, as at export
SAME_ANSWER = 1e-3  # between the old file's answer and the new file's, for the old classes
CARD = "MODEL_CARD.md"
REPORT = "report.html"


@dataclass(frozen=True, kw_only=True)
class Enrolled:
    """Result of an enrolment, also in the manifest.

    images: different ones of the new class; recognised: of them, each scored by the others, as a
    share with its two-sided 95 % interval. kept: held-out images of the old classes; lost: of them,
    answered correctly before and as the new class now; drop_low, drop_high: bounds of that loss of
    accuracy, each at 95 %. clusters: groups of the kept images, None where they have none. settled:
    whether the kept images could bound a loss as small as max_drop. golden_changed: golden
    photographs of old classes with another answer.
    """

    name: str
    folder: Path
    verdict: Outcome
    images: int
    duplicates: int
    recognised: int
    recall_low: float
    recall_high: float
    kept: int
    clusters: int | None
    lost: int
    drop_low: float
    drop_high: float
    max_drop: float
    settled: bool
    golden: int
    golden_changed: int
    left_out: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """True when every gate passed, those of the old bundle too."""
        return self.verdict == "passed"

    def as_text(self) -> str:
        """A few lines for people."""
        share = self.recognised / self.images
        ground = f"{self.kept} held-out images"
        if self.clusters:
            ground += f" in {self.clusters} groups"
        lines = [
            f"{self.name}: {self.recognised} of {self.images} images recognised, each by the others: "
            f"{share:.2f} [{self.recall_low:.2f}, {self.recall_high:.2f}]",
            f"old classes: {100 * self.lost / self.kept:.1f} points lost [{100 * self.drop_low:.1f}, "
            f"{100 * self.drop_high:.1f}], limit {100 * self.max_drop:.1f}, on {ground}; "
            f"{self.golden_changed} of {self.golden} golden photographs answered otherwise",
        ]
        if share < HALF:
            lines.append(
                f"most images of {self.name} would be answered with an old class: to this network it looks like one. "
                "Train on them instead"
            )
        if self.duplicates:
            lines.append(f"{self.duplicates} images are copies of others, and do not count")
        if not self.settled:
            lines.append(
                f"{ground} cannot settle {100 * self.max_drop:.1f} points. They can settle "
                f"{100 * self.drop_high:.1f}, if you accept that: --max-drop {self.drop_high + 5e-4:.3f}"
            )
        if self.left_out:
            lines.append(f"left out, as made for the old classes: {', '.join(self.left_out)}")
        return "\n".join(lines)


def enroll(
    bundle: Path,
    name: str,
    images: Sequence[Path],
    out: Path,
    *,
    max_drop: float = MAX_DROP,
    key: Path | None = None,
    version: int | None = None,
) -> Enrolled:
    """Write a bundle to `out` that also knows the class `name`, judged and sealed.

    images: files of the new class. max_drop: accuracy that the old classes may lose, in 0..1. key:
    an Ed25519 private key to sign with. version: of the new bundle, by default the time. Raises
    BundleError for a bundle that is altered or keeps no sample, FtkitError for a name that is taken,
    too few images, or an `out` that is there.
    """
    manifest = read_manifest(bundle)
    check_files(bundle, manifest["files"])
    _require_new(bundle, name, manifest["labels"])
    if not 0 < max_drop < 1:
        raise FtkitError(
            f"--max-drop: expected a share between 0 and 1, found {max_drop}. Try 0.01"
        )
    if key:
        require_key(key)
    sample = KeptSample.read(bundle / FILE)
    classify = Classifier(bundle)
    if classify.familiar is None:
        raise BundleError(
            f"{bundle}: expected out-of-distribution statistics, found none. Export the run again"
        )

    different = list({sha256(path): path for path in images}.values())
    if len(different) < FEWEST:
        raise FtkitError(
            f"{name}: expected {FEWEST} different images or more, found {len(different)}. Add some"
        )
    frames = [to_frame(classify.decode(path), classify.input_format) for path in different]
    seen = [classify.sight(frame, statistics=False) for frame in frames]
    embedding = np.stack([sighting.embedding for sighting, _ in seen])
    probabilities = np.stack([answers for _, answers in seen])
    if not np.isfinite(embedding).all():
        raise BundleError(
            f"{bundle}: expected numbers, found an embedding without. Export it again"
        )
    new = fit_class(classify.familiar, sample, embedding, probabilities, max_drop)

    folder = begin_bundle(out)
    try:
        left_out = _copy(bundle, folder)
        _renew_runners(folder)
        _extend_models(folder, manifest, name, new)
        _extend_sample(folder, sample, new, embedding, probabilities)
        picked = spread_evenly(np.arange(len(frames)), GOLDEN)
        added = [from_frame(frames[row], classify.input_format) for row in picked]
        golden, changed = _extend_golden(folder, manifest, new, added)
        with (folder / TRAINED_ON).open("a") as file:
            file.writelines(f"{sha256(path)[:DIGEST]}\n" for path in different)

        gate = Gate(
            name=f"accuracy lost by the old classes to {name}, 95 % bounds",
            value=float(new.lost.mean()),
            limit=max_drop,
            low=new.drop_low,
            high=new.drop_high,
        )
        gates = [*(_gate(each) for each in manifest["gates"]), gate]
        enrolled = Enrolled(
            name=name,
            folder=out,
            verdict=overall(each.verdict for each in gates),
            images=len(different),
            duplicates=len(images) - len(different),
            recognised=int(new.recognised.sum()),
            recall_low=new.recall_low,
            recall_high=new.recall_high,
            kept=len(new.lost),
            clusters=sample.clusters,
            lost=int(new.lost.sum()),
            drop_low=new.drop_low,
            drop_high=new.drop_high,
            max_drop=max_drop,
            settled=new.settled,
            golden=golden,
            golden_changed=changed,
            left_out=left_out,
        )
        told = _told(manifest, enrolled, version)
        _describe(folder, enrolled)
        _require_proof(folder, told)
        final = seal(folder, out, told, gates, key)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Enrolled(**{**enrolled.__dict__, "folder": final})


def _require_new(bundle: Path, name: str, labels: Sequence[str]) -> None:
    if name in labels:
        raise FtkitError(
            f"{bundle}: expected a class that it does not know, found {name!r}, which it does. Try another name"
        )
    if not name.strip() or any(ord(letter) < 32 or letter in "\x7f\u2028\u2029" for letter in name):
        raise FtkitError(
            f"class: expected a name of one line, found {name!r}. Try one like scratch"
        )


def _copy(bundle: Path, folder: Path) -> tuple[str, ...]:
    """Copy the bundle, but for what is made for the old classes; return what was left out."""
    left_out = tuple(name for name in LEFT_OUT if (bundle / name).exists())
    for path in sorted(bundle.rglob("*")):
        place = path.relative_to(bundle)
        if place.as_posix() in (MANIFEST, SIGNATURE) or not path.is_file():
            continue
        if any(place.is_relative_to(name) for name in left_out):
            continue
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / place)
    return left_out


def _renew_runners(folder: Path) -> None:
    """Replace the runners by this package's: an older bundle's do not know what is enrolled.

    On a device the bundle's own are running.
    """
    package = Path(ftkit_export.__file__).parent
    if not (package / "device").is_dir():
        return
    from ftkit_export.bundle.write import add_runners

    device = folder / "device"
    for name in ("ftkit_export", "cpp"):
        shutil.rmtree(device / name, ignore_errors=True)
    add_runners(folder)


def _extend_models(folder: Path, manifest: dict[str, Any], name: str, new: NewClass) -> None:
    """Add the class to both forms of every variant, and to labels.txt."""
    labels = [*manifest["labels"], name]
    metadata = {
        "labels": json.dumps(labels, ensure_ascii=False),
        "out_of_domain": new.statistics.to_text(),
    }
    for forms in manifest["variants"].values():
        for form in ("file", "core"):
            path = folder / forms[form]
            temperature = float(manifest["temperature"])
            path.write_bytes(
                with_class(path.read_bytes(), new.weights, new.bias, temperature, metadata)
            )
    (folder / "labels.txt").write_text("\n".join(labels) + "\n", encoding="utf-8")


def _extend_sample(
    folder: Path, sample: KeptSample, new: NewClass, embedding: Array, probabilities: Array
) -> None:
    """Add the new images to the kept sample, each as the others see it, so that a further class is
    judged on this one too."""
    known = unit_length(sample.embedding)
    old = _joined(sample.probabilities, (known @ new.weights.T + new.bias).min(1))
    own = _joined(probabilities, new.log_odds)
    rows = spread_evenly(np.arange(len(own)), max(1, MOST_KEPT // old.shape[1]))
    extended = KeptSample(
        embedding=np.vstack([known, unit_length(embedding)[rows]]).astype(np.float32),
        labels=np.concatenate([sample.labels, np.full(len(rows), old.shape[1] - 1)]),
        probabilities=np.vstack([old, own[rows]]),
        independent=sample.independent + len(rows),
        clusters=sample.clusters and sample.clusters + len(rows),
    )
    (folder / FILE).write_bytes(extended.as_bytes())


def _joined(probabilities: Array, log_odds: Array) -> Array:
    """(n, classes) and the new class's log-odds (n,) -> (n, classes + 1)."""
    share = 1 / (1 + np.exp(-np.clip(log_odds, -700, 700)))[:, None]
    joined: Array = np.hstack([probabilities * (1 - share), share])
    return joined


def _extend_golden(
    folder: Path, manifest: dict[str, Any], new: NewClass, added: Sequence[Array]
) -> tuple[int, int]:
    """Compute the golden vectors anew, and add images (H, W, 3) uint8 of the new class.

    Returns how many golden photographs of old classes there are, and how many of them are answered
    otherwise.
    """
    place = folder / "golden"
    entries = json.loads((place / "golden.json").read_text())["images"]
    with np.load(place / "expected.npz", allow_pickle=False) as stored:
        expected = {name: stored[name].astype(np.float64) for name in stored.files}

    old = len(entries)
    photographs = [row for row, entry in enumerate(entries) if entry["group"] == "photographs"]
    for image in added:
        name = f"{len(entries):02d}.png"
        Image.fromarray(image).save(place / name)
        entries.append({"file": name, "group": "enrolled"})

    temperature = float(manifest["temperature"])
    answers = {
        name: _answers(folder, manifest, forms, entries)
        for name, forms in manifest["variants"].items()
    }
    _require_same(answers, expected, old)

    by_core, by_image, embedding = answers["fp32"]
    resizers = np.abs(softmax(by_core / temperature) - by_image).max(1)[:old]
    _widen(entries[:old], expected, new, temperature, resizers)
    for entry in entries[old:]:
        entry["tolerance"] = entries[photographs[0] if photographs else 0]["tolerance"]

    written = {
        **_with_new(expected, new, temperature),
        "embedding": np.vstack([expected["embedding"], embedding[old:]]),
    }
    for name, (logits, probabilities, _) in answers.items():
        for form, values in (("logits", logits), ("probabilities", probabilities)):
            if name == "fp32":
                written[form] = np.vstack([written[form], values[old:]])
            else:  # judged against its own outputs, as when it was exported
                written[f"{name}/{form}"] = values

    np.savez(place / "expected.npz", **written)  # type: ignore[arg-type]  # numpy's stub mistakes ** for a flag
    (place / "golden.json").write_text(json.dumps({"images": entries}, indent=1) + "\n")
    _extend_flat(folder, manifest, written, entries)

    before = expected["probabilities"].argmax(1)
    after = written["probabilities"].argmax(1)
    return len(photographs), sum(int(after[row] != before[row]) for row in photographs)


def _with_new(expected: dict[str, Array], new: NewClass, temperature: float) -> dict[str, Array]:
    """The framework's logits and probabilities (n, old classes), with the new class in float64."""
    log_odds = (unit_length(expected["embedding"]) @ new.weights.T + new.bias).min(1)
    logits = expected["logits"]
    largest = logits.max(1)
    total = np.log(np.exp((logits - largest[:, None]) / temperature).sum(1))
    logit = largest + temperature * (total + log_odds)
    return {
        "logits": np.hstack([logits, logit[:, None]]),
        "probabilities": _joined(expected["probabilities"], log_odds),
    }


def _widen(
    entries: Sequence[dict[str, Any]],
    expected: dict[str, Array],
    new: NewClass,
    temperature: float,
    resizers: Array,
) -> None:
    """Widen the tolerances by what the new class adds to an image's rounding.

    The new logit is a sum of many terms, taken to be as wrong, relative to the largest value, as the
    old logits may be. resizers (n,): what another resizer moves a probability by; twice that is
    allowed, as at export.
    """
    terms = unit_length(expected["embedding"])[:, None] * new.weights  # (n, old classes, D)
    sums = temperature * np.sqrt((terms**2).sum(2)).max(1)
    largest = np.abs(expected["logits"]).max(1)
    for row, entry in enumerate(entries):
        for variant, limits in entry["tolerance"].items():
            for limit in limits.values():
                logits = limit["logits"] * max(1.0, float(sums[row] / largest[row]))
                limit["probabilities"] += (logits - limit["logits"]) / temperature + ROUNDING
                if variant == "fp32":
                    limit["probabilities"] += 2 * min(float(resizers[row]), RESIZED)
                limit["logits"] = logits


def _answers(
    folder: Path,
    manifest: dict[str, Any],
    forms: dict[str, str],
    entries: Sequence[dict[str, Any]],
) -> tuple[Array, Array, Array]:
    """The file's logits, probabilities and embedding for every golden image, (n, ...) float64."""
    preprocess = Preprocess(**manifest["preprocess"])
    image_form = Session(folder / forms["file"])
    core = Session(folder / forms["core"])
    rows: list[tuple[Array, Array, Array]] = []
    for entry in entries:
        with Image.open(folder / "golden" / entry["file"]) as image:
            frame = to_frame(np.asarray(image.convert("RGB")), manifest["input_format"])
        canvas = preprocess.canvas(from_frame(frame, manifest["input_format"]))
        logits, embedding = core.run(preprocess.pixels(canvas[None]))
        rows.append((logits[0], image_form.run(frame[None])[0][0], embedding[0]))
    logits, probabilities, embedding = (
        np.stack([row[part] for row in rows]).astype(np.float64) for part in range(3)
    )
    return logits, probabilities, embedding


def _require_same(
    answers: dict[str, tuple[Array, Array, Array]], expected: dict[str, Array], old: int
) -> None:
    """Raise BundleError where the new files do not give the old classes the old answers."""
    for name, (_, probabilities, _) in answers.items():
        kept = probabilities[:old, :-1] / np.maximum(1 - probabilities[:old, -1:], 1e-12)
        certain = probabilities[:old, -1] < 0.99  # else little is left to divide by
        known = expected["probabilities" if name == "fp32" else f"{name}/probabilities"]
        apart = np.abs(kept - known)[certain]
        # fp32's are the framework's, on Pillow's pixels
        limit = 0.1 if name == "fp32" else SAME_ANSWER
        if apart.size and apart.max() > limit:
            raise BundleError(
                f"{name}: expected the old answers from the new file, found {apart.max():.2g} between them. "
                "Verify the bundle on this machine first"
            )


def _extend_flat(
    folder: Path,
    manifest: dict[str, Any],
    expected: dict[str, Array],
    entries: Sequence[dict[str, Any]],
) -> None:
    """Rewrite the vectors for C and C++, and those for onnxruntime_perf_test."""
    raw = folder / "golden" / "raw"
    chosen = manifest["chosen"]
    head, *lines = (raw / "index.txt").read_text().splitlines()
    picks = [int(line.split(".")[0]) for line in lines]
    images, classes, size, channels, _ = head.split()
    tolerances = [entries[row]["tolerance"] for row in picks]
    most = max(limits["fp32"]["cpu"]["logits"] for limits in tolerances)
    listed = [f"{images} {int(classes) + 1} {size} {channels} {most:.6g}"]
    for line, limits in zip(lines, tolerances, strict=True):
        allowed = limits[chosen].get("cpu", limits[chosen].get("any"))["probabilities"]
        listed.append(f"{line.rsplit(' ', 1)[0]} {allowed:.6g}")
    (raw / "index.txt").write_text("\n".join(listed) + "\n")
    own = "probabilities" if chosen == "fp32" else f"{chosen}/probabilities"
    (raw / "logits.f32").write_bytes(expected["logits"][picks].astype("<f4").tobytes())
    (raw / "probabilities.f32").write_bytes(expected[own][picks].astype("<f4").tobytes())

    path = folder / "golden" / entries[picks[0]]["file"]
    with Image.open(path) as image:
        frame = to_frame(np.asarray(image.convert("RGB")), manifest["input_format"])
    values = Session(folder / "model.onnx").run(frame[None])
    for number, (name, value) in enumerate(
        zip(("probabilities", "embedding"), values, strict=True)
    ):
        content = tensor(name, value.astype(np.float32))
        (folder / "test_data_set_0" / f"output_{number}.pb").write_bytes(content)


def _gate(told: dict[str, Any]) -> Gate:
    """A gate of the old bundle, as sealed."""
    fields = ("name", "value", "limit", "low", "high", "unsettled")
    return Gate(**{field: told[field] for field in fields if field in told})


def _told(manifest: dict[str, Any], enrolled: Enrolled, version: int | None) -> dict[str, Any]:
    """The manifest of the new bundle, but for verdict, gates and files."""
    own = ("schema", "digest", "files", "gates", "verdict")
    entry = {key: value for key, value in asdict(enrolled).items() if key != "folder"}
    entry |= {"base": manifest["digest"], "time": int(time.time())}
    return {
        **{key: value for key, value in manifest.items() if key not in own},
        "labels": [*manifest["labels"], enrolled.name],
        "version": int(time.time()) if version is None else version,
        "enrolled": [*manifest.get("enrolled", []), entry],
    }


def _describe(folder: Path, enrolled: Enrolled) -> None:
    """Say it in the model card and at the top of the report, which speak of the old classes."""
    lines = enrolled.as_text().splitlines()
    card = folder / CARD
    if card.is_file():
        name = _escaped(enrolled.name)
        items = "".join(f"- {_escaped(line)}\n" for line in lines)
        with card.open("a", encoding="utf-8") as file:
            file.write(
                f"\n## Enrolled later: {name}\n\nAdded without training; the figures above are of the classes "
                f"before.\n\n{items}"
            )

    report = folder / REPORT
    if report.is_file():
        told = "".join(f"<p>{_html(line)}</p>" for line in lines)
        banner = (
            f"<section><h2>Enrolled later: {_html(enrolled.name)}</h2><p>The class was added without training. "
            f"Everything below was measured before, on the classes before.</p>{told}</section>"
        )
        text = report.read_text(encoding="utf-8")
        report.write_text(
            re.sub(r"(<body[^>]*>)", lambda body: body[0] + banner, text, count=1), encoding="utf-8"
        )


def _html(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _escaped(text: str) -> str:
    """For Markdown."""
    return re.sub(r"([\\`*_\[\]#<>|])", r"\\\1", text)


def _require_proof(folder: Path, manifest: dict[str, Any]) -> None:
    """Replay the golden vectors on this machine's CPU. Raises BundleError when any fails."""
    listed = {
        path.relative_to(folder).as_posix(): "" for path in folder.rglob("*") if path.is_file()
    }
    checks, _ = replay_golden(
        folder, {**manifest, "schema": MANIFEST_SCHEMA, "files": listed}, "cpu"
    )
    for check in checks:
        if not check.passed:
            raise BundleError(
                f"{check.name}: expected the golden vectors within their tolerance, found {check.file} at "
                f"{check.value:.2f} of it. Verify the old bundle on this machine first"
            )
