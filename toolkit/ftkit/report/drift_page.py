"""The course of a drift test as a page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ftkit.report.charts import lines
from ftkit.report.pages import Table, render
from ftkit.report.pictures import picture_source
from ftkit_export.runtime.files import write_atomically

COLOURS = ("--one", "--two", "--good", "--faint", "--ink")


def write_drift(out: Path, told: Mapping[str, Any]) -> None:
    """Write the page. told: the fields of field.drift.Drift."""
    course: Mapping[str, Sequence[float]] = told["course"]
    series = [
        (name, colour, [math.log10(max(stake, 1e-6)) for stake in stakes])
        for (name, stakes), colour in zip(course.items(), COLOURS, strict=True)
    ]
    each = told["images"] / max(1, len(told["marks"]))
    classes = told["reference"]["classes"]
    folder = Path(told["folder"]).resolve()
    page = render(
        "drift.html",
        told=told,
        shown={
            picture: picture_source(folder / picture)
            for alarm in told["alarms"]
            for picture in alarm["pictures"]
        },
        chart=lines(
            "Evidence for drift (log10; an alarm at 2)",
            series,
            x_name=f"{each:.0f} images a mark",
        ),
        alarms=Table(
            ("stream", "what", "since", "sure at image"),
            [
                (alarm["stream"], alarm["what"], alarm["since_time"], alarm["at"])
                for alarm in told["alarms"]
            ],
        ),
        days=Table(
            ("day", "images", "median score", "mean confidence", *classes),
            [
                (
                    day["date"],
                    day["images"],
                    f"{day['median_score']:.2f}",
                    f"{day['mean_probability']:.3f}",
                    *(f"{day['answers'].get(name, 0):.0%}" for name in classes),
                )
                for day in told["days"]
            ],
        ),
    )
    write_atomically(out, page.encode())
