"""Which of two bundles that ran on the same frames is better, and how many labels it takes to tell.

found = compare(Path("collected"))
found.verdict        # "first", "second" or "open"

Frames on which both gave one answer cannot tell them apart. Of the others a fair sample was kept:
collected/shadow/shadow.csv lists them, with a column to fill in. The paired difference in accuracy
over all frames compared has the interval of the int8 decision.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ftkit.field.review import read_labels
from ftkit_export.proof.decision import paired
from ftkit_export.proof.intervals import share_interval
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.files import write_atomically
from ftkit_export.runtime.shadow import FOLDER, read_lines

TABLE = "shadow.csv"


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
    """The paired gain over as many frames as the labelled ones stand for, and the labels it takes."""
    truth = [labels[Path(line["kept"]).name] for line in labelled]
    first = np.array([line["first"] == label for line, label in zip(labelled, truth, strict=True)])
    second = np.array(
        [line["second"] == label for line, label in zip(labelled, truth, strict=True)]
    )
    alike = round(frames * len(labelled) / differing) - len(labelled)
    same = np.ones(max(0, alike), bool)
    found = paired(np.r_[first, same], np.r_[second, same], looks=2)
    enough = found.settled_by(0.0)
    needed = None if enough is None else math.ceil(enough[0] * differing / frames)
    return (-found.drop, -found.high, -found.low), needed


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
