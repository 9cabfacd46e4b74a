"""Enrol a class: a new bundle that also knows it, from a few images, without training or old images.

    enrolled = enroll(Path("bundle"), "scratch", images, Path("next"))
    enrolled.folder, enrolled.passed, enrolled.recognised

Every variant's network stays as it is, byte for byte; operators after it decide between the new class
and the old ones (runtime/enroll.py). The new bundle is proven again: golden vectors are computed
anew from the old ones, and replayed; a gate bounds what the old classes lose. What was made for the
old classes alone (plain C, ORT format, browser page, hand-off, class activation maps, the drift
reference) is left out. Numpy and ONNX Runtime suffice, so this runs on a device too.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import ftkit_export
from ftkit_export.bundle.archive import require_key
from ftkit_export.bundle.enrolled_golden import extend_golden
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
    joined,
)
from ftkit_export.runtime.errors import BundleError, FtkitError
from ftkit_export.runtime.groups import group_names
from ftkit_export.runtime.onnx_edit import with_class
from ftkit_export.runtime.out_of_distribution import unit_length
from ftkit_export.runtime.predict import REFERENCE, Classifier, require_single_label
from ftkit_export.runtime.preprocess import from_frame, to_frame
from ftkit_export.runtime.verify import (
    EVIDENCE,
    MALFORMED,
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
LEFT_OUT = (
    "device/c",
    "device/ort",
    "device/web",
    "handoff",
    "variants/explain.onnx",
    REFERENCE,
    EVIDENCE,
)
TRAINED_ON = "trained_on.txt"
DIGEST = 32  # hexadecimal digits, as in TRAINED_ON
GOLDEN_PIXELS = (
    4_000_000  # of an image of the new class; a larger one is kept as the network sees it
)
HALF = 0.5
COUNTER = 1_000_000_000  # a smaller version is a counter, a larger one a time
FORBIDDEN = ("Cc", "Cs", "Zl", "Zp")  # Unicode categories: control characters, line ends
BIDIRECTIONAL = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
CARD = "MODEL_CARD.md"
REPORT = "report.html"


@dataclass(frozen=True, kw_only=True)
class Enrolled:
    """Result of an enrolment, also in the manifest.

    images: different ones of the new class, in so many groups (None: each on its own); recognised: of
    them, each scored by those of other groups, as a share with its two-sided 95 % interval. kept:
    held-out images of the classes that were trained on; lost: of them, answered correctly before
    anything was enrolled, and no longer; drop_low, drop_high: bounds of that loss of accuracy, each at
    95 %. clusters: groups of the kept images, None where they have none. worst: the old class that
    loses the largest share, with the images lost and kept; unseen: old classes of which no image was
    kept. settled: whether the kept images could bound a loss as small as max_drop. golden_changed:
    golden photographs of old classes with another answer. open: gates of the old bundle that have not
    passed. unsigned: whether the old bundle's signature was not renewed.
    """

    name: str
    folder: Path
    verdict: Outcome
    images: int
    groups: int | None
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
    worst: tuple[str, int, int]
    unseen: tuple[str, ...]
    open: tuple[str, ...]
    unsigned: bool

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
        by = f"those of the other {self.groups - 1} groups" if self.groups else "the others"
        lines = [
            f"{self.name}: {self.recognised} of {self.images} images recognised, each by {by}: "
            f"{share:.2f} [{self.recall_low:.2f}, {self.recall_high:.2f}]",
            f"old classes: {100 * self.lost / self.kept:.1f} points lost [{100 * self.drop_low:.1f}, "
            f"{100 * self.drop_high:.1f}], limit {100 * self.max_drop:.1f}, on {ground}; "
            f"{self.golden_changed} of {self.golden} golden photographs answered otherwise",
        ]
        if self.worst[1]:
            lines.append(f"most of them {self.worst[0]}: {self.worst[1]} of {self.worst[2]} images")
        if self.unseen:
            lines.append(f"no held-out image, so nothing is known, of {', '.join(self.unseen)}")
        if share < HALF:
            lines.append(
                f"most images of {self.name} would be answered with an old class: to this network it looks like one. "
                "Train on them instead"
            )
        if self.duplicates:
            lines.append(f"{self.duplicates} images are copies of others, and do not count")
        if not self.settled and self.drop_high < 0.9:
            lines.append(
                f"{ground} cannot settle {100 * self.max_drop:.1f} points. They can settle "
                f"{100 * self.drop_high:.1f}, if you accept that: --max-drop {self.drop_high + 5e-4:.3f}"
            )
        elif not self.settled:
            lines.append(f"{ground} can settle nothing: too few, or in too few groups")
        lines += [f"the old bundle had not passed: {gate}" for gate in self.open]
        if self.unsigned:
            lines.append("not signed, as the old bundle was: --sign KEY")
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
    group_by: str = "",
) -> Enrolled:
    """Write a bundle to `out` that also knows the class `name`, judged and sealed.

    images: files of the new class. max_drop: accuracy that the old classes may lose, in 0..1. key:
    an Ed25519 private key to sign with. version: of the new bundle, by default the time. group_by: as
    in runtime.groups, for paths below the folder that holds all images. Raises BundleError for a
    bundle that is altered or keeps no sample, FtkitError for a name that is taken, too few images or
    groups, or an `out` that is there.
    """
    require_single_label(bundle, "enrolling")
    if out.resolve().is_relative_to(bundle.resolve()):
        raise FtkitError(
            f"{out}: expected a place outside the bundle, which is sealed, found one inside. Try ../{out.name}"
        )
    if not 0 < max_drop < 1:
        raise FtkitError(
            f"--max-drop: expected a share between 0 and 1, found {max_drop}. Try 0.01"
        )
    if key:
        require_key(key)
    manifest = read_manifest(bundle)
    check_files(bundle, manifest["files"])
    try:
        return _enroll(bundle, manifest, name, images, out, max_drop, key, version, group_by)
    except MALFORMED as error:
        raise BundleError(
            f"{bundle}: expected labels, golden vectors and a kept sample that fit each other, found others "
            f"({type(error).__name__}: {error}). Do not trust this bundle"
        ) from None


def _enroll(
    bundle: Path,
    manifest: dict[str, Any],
    name: str,
    images: Sequence[Path],
    out: Path,
    max_drop: float,
    key: Path | None,
    version: int | None,
    group_by: str,
) -> Enrolled:
    _require_new(bundle, name, manifest["labels"])
    sample = KeptSample.read(bundle / FILE)
    classify = Classifier(bundle)
    if classify.familiar is None:
        raise BundleError(
            f"{bundle}: expected out-of-distribution statistics, found none. Export the run again"
        )
    if sample.embedding.shape[1] != classify.familiar.means.shape[1]:
        raise ValueError("a kept sample of another network")

    different = list({sha256(path): path for path in images}.values())
    if len(different) < FEWEST:
        raise FtkitError(
            f"{name}: expected {FEWEST} different images or more, found {len(different)}. Add some"
        )
    groups = _groups(different, group_by) if group_by else None
    seen = [_sight(classify, path) for path in different]
    embedding = np.stack([each for each, _ in seen])
    probabilities = np.stack([answers for _, answers in seen])
    if not np.isfinite(embedding).all():
        raise BundleError(
            f"{bundle}: expected numbers, found an embedding without. Export it again"
        )
    new = fit_class(classify.familiar, sample, embedding, probabilities, max_drop, groups)

    folder = begin_bundle(out)
    try:
        left_out = _copy(bundle, folder)
        _renew_runners(folder)
        _extend_models(folder, manifest, name, new)
        _extend_sample(folder, sample, new, embedding, probabilities)
        picked = spread_evenly(np.arange(len(different)), GOLDEN)
        added = [_golden_image(classify, different[row]) for row in picked]
        golden, changed = extend_golden(bundle, folder, manifest, new, added)
        with (folder / TRAINED_ON).open("a") as file:
            file.writelines(f"{sha256(path)[:DIGEST]}\n" for path in different)

        judged = _judged(name, new, sample, manifest, max_drop)
        gates = [*(_gate(each) for each in manifest["gates"]), judged.gate]
        enrolled = Enrolled(
            name=name,
            folder=out,
            verdict=overall(each.verdict for each in gates),
            images=len(different),
            groups=None if groups is None else int(groups.max()) + 1,
            duplicates=len(images) - len(different),
            recognised=int(new.recognised.sum()),
            recall_low=new.recall_low,
            recall_high=new.recall_high,
            kept=sample.exported,
            clusters=sample.clusters,
            lost=judged.lost,
            drop_low=new.drop_low,
            drop_high=new.drop_high,
            max_drop=max_drop,
            settled=new.settled,
            golden=golden,
            golden_changed=changed,
            left_out=left_out,
            worst=judged.worst,
            unseen=judged.unseen,
            open=tuple(str(each) for each in gates[:-1] if not each.passed),
            unsigned=key is None and (bundle / SIGNATURE).is_file(),
        )
        told = _told(manifest, enrolled, version)
        _describe(folder, enrolled)
        _require_proof(folder, told)
        final = seal(folder, out, told, gates, key)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Enrolled(**{**enrolled.__dict__, "folder": final})


@dataclass(frozen=True, kw_only=True)
class _Judged:
    """What the old classes lose: their gate, the images lost, and as in Enrolled."""

    gate: Gate
    lost: int
    worst: tuple[str, int, int]
    unseen: tuple[str, ...]


def _judged(
    name: str, new: NewClass, sample: KeptSample, manifest: dict[str, Any], max_drop: float
) -> _Judged:
    lost = new.lost[: sample.exported]
    counts = [
        (label, int(new.lost[sample.labels == row].sum()), int((sample.labels == row).sum()))
        for row, label in enumerate(manifest["labels"])
    ]
    return _Judged(
        gate=Gate(
            name=f"accuracy lost by the old classes to {name}, 95 % bounds",
            value=float(lost.mean()),
            limit=max_drop,
            low=new.drop_low,
            high=new.drop_high,
        ),
        lost=int(lost.sum()),
        worst=max(counts, key=lambda each: each[1] / max(1, each[2])),
        unseen=tuple(label for label, _, kept in counts if not kept),
    )


def _groups(paths: Sequence[Path], group_by: str) -> Array:
    """Number of each image's group, (n,), by its path below the folder that holds all of them; one that
    the expression does not match is on its own."""
    folder = os.path.commonpath([path.resolve().parent for path in paths])
    below = [path.resolve().relative_to(folder).as_posix() for path in paths]
    names = [name or f"\0{row}" for row, name in enumerate(group_names(below, group_by))]
    found, numbers = np.unique(names, return_inverse=True)
    if len(found) < 2:
        raise FtkitError(
            f"--group-by {group_by}: expected images of two groups or more, found one ({found[0]}). Add images of "
            "another"
        )
    groups: Array = numbers
    return groups


def _sight(classify: Classifier, path: Path) -> tuple[Array, Array]:
    """(embedding, probabilities) of an image file."""
    frame = to_frame(classify.decode(path), classify.input_format)
    sighting, probabilities = classify.sight(frame, statistics=False)
    return sighting.embedding, probabilities


def _golden_image(classify: Classifier, path: Path) -> Array:
    """An image as the device sees it, (H, W, 3) uint8, and a large one as the network does."""
    frame = to_frame(classify.decode(path), classify.input_format)
    image = from_frame(frame, classify.input_format)
    if image.shape[0] * image.shape[1] <= GOLDEN_PIXELS:
        return image
    return classify.preprocess.canvas(image)


def _require_new(bundle: Path, name: str, labels: Sequence[str]) -> None:
    if name in labels:
        raise FtkitError(
            f"{bundle}: expected a class that it does not know, found {name!r}, which it does. Try another name"
        )
    if not name.strip() or any(
        unicodedata.category(letter) in FORBIDDEN
        or unicodedata.bidirectional(letter) in BIDIRECTIONAL
        for letter in name
    ):
        raise FtkitError(
            f"class: expected a name of one line, found {name!a}. Try one like scratch"
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
    """Add the new images to the kept sample, each as the others see it: a further class then
    says what it takes from this one."""
    known = unit_length(sample.embedding)
    old = joined(sample.probabilities, new.log_odds_of(known))
    own = joined(probabilities, new.log_odds)
    rows = spread_evenly(np.arange(len(own)), max(1, MOST_KEPT // old.shape[1]))
    extended = KeptSample(
        embedding=np.vstack([known, unit_length(embedding)[rows]]).astype(np.float32),
        labels=np.concatenate([sample.labels, np.full(len(rows), old.shape[1] - 1)]),
        probabilities=np.vstack([old, own[rows]]),
        right=np.concatenate([sample.right, new.recognised[rows]]),
        exported=sample.exported,
        independent=sample.independent,
        clusters=sample.clusters,
    )
    (folder / FILE).write_bytes(extended.as_bytes())


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
        "version": _next_version(manifest) if version is None else version,
        "enrolled": [*manifest.get("enrolled", []), entry],
    }


def _next_version(manifest: dict[str, Any]) -> int:
    """One more than a counter; the time, but never less than one more, of a version that is a time."""
    base = int(manifest.get("version", 0))
    return base + 1 if 0 < base < COUNTER else max(base + 1, int(time.time()))


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
