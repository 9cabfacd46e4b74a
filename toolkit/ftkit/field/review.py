"""Order what devices have collected for labelling: the most informative first.

pictures = ordered(Path("collected"))
write_review(Path("collected"), pictures)      # collected/review/review.csv and contact sheets

Near duplicates are folded: one of each set is to be labelled. The next picture is the one that is
most like those of which the model is unsure, and which none before it is like, along the embedding's
directions (facility location, weighted by doubt). Not the farthest from those before it, as k-centre
would take: outliers teach little, and labelling them was worse than labelling at random
(bench/README.md).
"""

from __future__ import annotations

import csv
import heapq
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from ftkit.data.audit import THUMB, near_duplicates
from ftkit.field.drift import read_log
from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.collect import REASONS
from ftkit_export.runtime.errors import FtkitError, ImageError
from ftkit_export.runtime.files import write_atomically
from ftkit_export.runtime.preprocess import decode

FOLDER = "review"
TABLE = "review.csv"
COLUMNS = ("path", "label", "suggested", "probability", "why", "alike")
ACROSS = 8
DOWN = 6
TILE = 150
SHARPNESS = 3.0  # of similarity, in median distances; 9 does as well
LEAST_DOUBT = 0.25  # weight of a picture of which the model is sure


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A collected picture to label. path: below the collected folder. suggested: the model's answer,
    "" where the log no longer has it; probability: of it. why: one of collect.REASONS. alike: paths
    of near duplicates folded into it."""

    path: str
    suggested: str
    probability: float
    why: str
    alike: tuple[str, ...]


def ordered(collected: Path) -> list[Picture]:
    """The pictures of a collected folder, the most informative first.

    Raises FtkitError when there is none.
    """
    logged = {line["kept"]: line for line in read_log(collected) if line["kept"]}
    width = min((len(line["coordinates"]) for line in logged.values()), default=0)
    found: list[tuple[str, Array]] = []
    for path in sorted(
        path.relative_to(collected).as_posix()
        for reason in REASONS
        for path in (collected / reason).glob("[!.]*")
    ):
        thumb = _thumbnail(collected / path)
        if thumb is not None:
            found.append((path, thumb))
            # The log holds fewer images than the folders: nothing is known then but why it was kept
            unknown = {"kept": path, "label": "", "probability": 0.0, "coordinates": [0.0] * width}
            logged.setdefault(path, unknown)
    if not found:
        raise FtkitError(
            f"{collected}: expected pictures that `classify.py --keep` collected, found none. Check the folder"
        )

    lines = [logged[path] for path, _ in found]
    doubt = np.array([_doubt(line) for line in lines])
    firsts = _folded(np.stack([thumb for _, thumb in found]), doubt)
    rows = list(firsts)
    # After an update, another bundle's pictures may have another number of directions
    coordinates = np.array([lines[row]["coordinates"][:width] for row in rows], float)
    return [
        Picture(
            path=found[rows[place]][0],
            suggested=lines[rows[place]]["label"],
            probability=lines[rows[place]]["probability"],
            why=found[rows[place]][0].split("/")[0],
            alike=tuple(found[row][0] for row in firsts[rows[place]]),
        )
        for place in _informative_first(coordinates, doubt[rows])
    ]


def _thumbnail(path: Path) -> Array | None:
    """(32, 32) grey levels; None for a picture that cannot be decoded."""
    try:
        grey = PIL.Image.fromarray(decode(path)).convert("L")
    except ImageError:
        return None
    return np.asarray(grey.resize((THUMB, THUMB), PIL.Image.Resampling.BOX), np.float32)


def _doubt(line: dict[str, Any]) -> float:
    """0 to 1: how little the answer can be trusted."""
    if not line["label"]:  # not in the log
        return {"foreign": 1.0, "doubtful": 0.5, "control": 0.0}[line["kept"].split("/")[0]]
    return 1.0 if line["kept"].startswith("foreign/") else 1 - float(line["probability"])


def _folded(thumbs: Array, doubt: Array) -> dict[int, list[int]]:
    """Row to label -> rows folded into it. Of near duplicates, the most doubtful is to be labelled."""
    by_doubt = np.argsort(-doubt, kind="stable")
    firsts: dict[int, list[int]] = {int(row): [] for row in by_doubt}
    for alike in near_duplicates(thumbs, by_doubt):
        first, *others = alike.rows
        if first in firsts:
            for row in others:
                if row in firsts:
                    firsts[first] += [row, *firsts.pop(row)]
    return firsts


def _informative_first(coordinates: Array, doubt: Array) -> list[int]:
    """Order of the rows (n, K): next is the one that stands for most of what none before stands for.

    Greedy facility location (Nemhauser et al. 1978): a row stands for another by their similarity,
    exp(-SHARPNESS distance / median distance), and every row counts by how doubtful it is.
    """
    scaled = coordinates / np.maximum(coordinates.std(0), 1e-9)
    squares = (scaled**2).sum(1)
    distance = np.sqrt(np.maximum(squares[:, None] + squares - 2 * scaled @ scaled.T, 0))
    similar = np.exp(-SHARPNESS * distance / max(float(np.median(distance)), 1e-9))
    weight = LEAST_DOUBT + doubt
    covered = np.zeros(len(doubt))

    def gain(row: int) -> float:
        return float(weight @ np.maximum(similar[row] - covered, 0))

    # A gain only falls as others are chosen, so one that is still the largest is (Minoux 1978)
    waiting = [(-gain(row), row) for row in range(len(doubt))]
    heapq.heapify(waiting)
    order: list[int] = []
    while waiting:
        _, row = heapq.heappop(waiting)
        now = -gain(row)
        if waiting and now > waiting[0][0]:
            heapq.heappush(waiting, (now, row))
            continue
        order.append(row)
        covered = np.maximum(covered, similar[row])
    return order


def write_review(collected: Path, pictures: Sequence[Picture]) -> Path:
    """Write review.csv, with labels given before, and the contact sheets; returns the CSV."""
    folder = collected / FOLDER
    folder.mkdir(exist_ok=True)
    table = folder / TABLE
    write_table(table, pictures, read_labels(table))
    each = ACROSS * DOWN
    for sheet in folder.glob("sheet-*.jpg"):  # of a longer review, with numbers of its own
        sheet.unlink()
    for number in range(math.ceil(len(pictures) / each)):
        part = pictures[number * each : (number + 1) * each]
        _sheet(folder / f"sheet-{number + 1}.jpg", collected, part, number * each)
    return table


def read_labels(table: Path) -> dict[str, str]:
    """Labels given so far, by the path in the CSV.

    Raises FtkitError for a file that a spreadsheet wrote in another form, before it is overwritten.
    """
    if not table.is_file():
        return {}
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            columns = list(reader.fieldnames or ())
    except (UnicodeDecodeError, csv.Error) as error:
        raise FtkitError(
            f"{table}: expected a CSV in UTF-8, found {error}. Save it as that"
        ) from None
    if not {"path", "label"} <= set(columns):
        raise FtkitError(
            f"{table}: expected the columns path and label with commas between, found {', '.join(columns) or 'none'}. "
            "Save it as a CSV with commas"
        )
    return {row["path"]: row["label"] for row in rows if row["path"] and row["label"]}


def write_table(table: Path, pictures: Sequence[Picture], labels: dict[str, str]) -> None:
    """A row a picture: path relative to the CSV, its label or "", and what the model said.

    Rows of pictures that are gone keep their label while the file is there.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for picture in pictures:
        path = f"../{picture.path}"
        writer.writerow(
            (
                path,
                labels.get(path, ""),
                picture.suggested,
                f"{picture.probability:.3f}" if picture.suggested else "",
                picture.why,
                len(picture.alike),
            )
        )
    listed = {f"../{picture.path}" for picture in pictures}
    for path, label in labels.items():
        if path not in listed and (table.parent / path).is_file():
            writer.writerow((path, label, "", "", "", ""))
    write_atomically(table, text.getvalue().encode())


def _sheet(path: Path, collected: Path, pictures: Sequence[Picture], before: int) -> None:
    """A contact sheet: each picture with its place in the order and what the model said."""
    font = PIL.ImageFont.load_default(12)
    rows = math.ceil(len(pictures) / ACROSS)
    sheet = PIL.Image.new("RGB", (ACROSS * (TILE + 4) + 4, rows * (TILE + 34) + 4), "white")
    draw = PIL.ImageDraw.Draw(sheet)
    for number, picture in enumerate(pictures):
        x = 4 + number % ACROSS * (TILE + 4)
        y = 4 + number // ACROSS * (TILE + 34)
        image = PIL.Image.fromarray(decode(collected / picture.path))
        image.thumbnail((TILE, TILE))
        sheet.paste(image, (x, y))
        said = f"{before + number + 1}  {picture.why}"
        if picture.alike:
            said += f", {len(picture.alike)} alike"
        draw.text((x, y + TILE), said, "black", font)
        answer = f"{picture.suggested[:16]} {picture.probability:.2f}" if picture.suggested else ""
        draw.text((x, y + TILE + 14), answer, "dimgrey", font)
    content = io.BytesIO()
    sheet.save(content, "JPEG", quality=80)
    write_atomically(path, content.getvalue())
