"""Which of two bundles that ran on the same frames is better, and how many labels it takes to tell.

found = compare(Path("collected"))
found.verdict        # "first", "second" or "open"

Frames on which both gave one answer cannot tell them apart. Of the others a fair sample was kept:
collected/shadow/shadow.csv lists them in a random order, with a column to fill in, so that the first
labelled stand for all. Labels come in bit by bit, and each time the question is asked again: the
bounds hold for all these looks together (a confidence sequence: the evidence against a share of right
answers is what a bet against it has won, Ville 1939, spread evenly over all alternatives).
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import special

from ftkit.field.review import read_labels
from ftkit_export.proof.intervals import share_interval
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.files import write_atomically
from ftkit_export.runtime.shadow import FOLDER, read_lines

TABLE = "shadow.csv"
ERROR = 0.05  # of the bounds


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two bundles on the same frames. others: frames logged of other pairs. differing: share of the
    frames with different answers, with its 95 % interval. kept: pictures of these; labelled: those
    with a label. gain: accuracy of the second less that of the first over all frames, with its
    bounds; None without labels. needed: labels that would settle which is better, as far as those
    given tell; None where it is not known.
    """

    frames: int
    others: int
    differing: float
    low: float
    high: float
    kept: int
    labelled: int
    gain: tuple[float, float, float] | None
    needed: int | None
    table: Path

    @property
    def verdict(self) -> str:
        """ "first" or "second" where one is surely better, else "open"."""
        if self.gain is None or self.gain[1] <= 0 <= self.gain[2]:
            return "open"
        return "second" if self.gain[1] > 0 else "first"


def compare(collected: Path) -> Comparison:
    """Compare what `classify.py --shadow` logged of the last two bundles compared, with the labels in
    shadow.csv, and write that anew.

    Raises FtkitError where nothing was compared.
    """
    everything = read_lines(collected)
    if not everything:
        raise FtkitError(
            f"{collected}: expected what `classify.py --keep --shadow` compared, found none. Check the folder"
        )

    lines = [line for line in everything if line["pair"] == everything[-1]["pair"]]
    differ = np.array([line["first"] != line["second"] for line in lines])
    low, high, _ = share_interval(differ)
    table = collected / FOLDER / TABLE
    kept = [line for line in lines if line["kept"] and (collected / line["kept"]).is_file()]
    kept.sort(key=lambda line: hashlib.sha256(str(line["kept"]).encode()).digest())
    labels = read_labels(table)
    _write(table, kept, labels)

    labelled = [line for line in kept if labels.get(Path(line["kept"]).name)]
    gain = needed = None
    if labelled:
        gain, needed = _gain(labelled, labels, int(differ.sum()), len(lines))
    return Comparison(
        frames=len(lines),
        others=len(everything) - len(lines),
        differing=float(differ.mean()),
        low=low,
        high=high,
        kept=len(kept),
        labelled=len(labelled),
        gain=gain,
        needed=needed,
        table=table,
    )


def _gain(
    labelled: Sequence[dict[str, Any]], labels: dict[str, str], differing: int, frames: int
) -> tuple[tuple[float, float, float], int | None]:
    """What the second bundle gains over all frames, with bounds that hold however often it is asked; and
    the labels that would settle its sign at this rate."""
    truth = [labels[Path(line["kept"]).name] for line in labelled]
    first = sum(line["first"] == label for line, label in zip(labelled, truth, strict=True))
    second = sum(line["second"] == label for line, label in zip(labelled, truth, strict=True))
    one_right = first + second
    weight = differing / frames  # of all frames, those on which they differ
    bounds = [
        weight * share * (2 * second_right - 1)
        for share in share_bounds(one_right, len(labelled), ERROR / 2)
        for second_right in share_bounds(second, one_right, ERROR / 2)
    ]
    needed = None
    for count in (math.ceil(one_right * 1.1**step) for step in range(100)):
        if not one_right or second == first:
            break
        low, high = share_bounds(second * count / one_right, count, ERROR / 2)
        if low > 0.5 or high < 0.5:
            needed = math.ceil(count * len(labelled) / one_right)
            break
    return (weight * (second - first) / len(labelled), min(bounds), max(bounds)), needed


def share_bounds(hits: float, of: float, error: float = ERROR) -> tuple[float, float]:
    """Bounds of a share after `hits` of `of` draws, which hold for all numbers of draws together."""
    shares = np.linspace(0.0005, 0.9995, 1000)
    log_bet = special.betaln(hits + 1, of - hits + 1)
    log_chance = hits * np.log(shares) + (of - hits) * np.log1p(-shares)
    held = shares[log_bet - log_chance < math.log(1 / error)]
    low = float(held[0]) if hits and len(held) else 0.0
    high = float(held[-1]) if hits < of and len(held) else 1.0
    return low, high


def _write(table: Path, kept: Sequence[dict[str, Any]], labels: dict[str, str]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("path", "label", "first", "second"))
    for line in kept:
        name = Path(line["kept"]).name
        writer.writerow((name, labels.get(name, ""), line["first"], line["second"]))
    # Labels of bundles compared before, and of lines that the log no longer holds
    listed = {Path(line["kept"]).name for line in kept}
    for name, label in labels.items():
        if name not in listed and label and (table.parent / name).is_file():
            writer.writerow((name, label, "", ""))
    write_atomically(table, text.getvalue().encode())


def as_text(found: Comparison) -> str:
    """The comparison as lines."""
    lines = [
        f"{found.frames} frames compared: {found.differing:.1%} differ [{found.low:.1%}, {found.high:.1%}]",
        f"to label: {found.table} ({found.labelled} of {found.kept} are)",
    ]
    if found.others:
        lines.append(f"left out: {found.others} frames on which other bundles were compared")
    if found.gain:
        gain, low, high = (100 * value for value in found.gain)
        lines.append(f"the second bundle: {gain:+.2f} points [{low:+.2f}, {high:+.2f}]")
    if found.verdict != "open":
        lines.append(f"the {found.verdict} is better")
    elif found.needed:
        lines.append(f"open; about {found.needed} labels would settle which is better")
    else:
        lines.append("open; label some, or more, to tell which is better")
    return "\n".join(lines)
