"""Every page and text that ftkit writes for people, rendered from templates/ by Jinja2.

    html = render("report.html", name="lite0", ...)
    html = table_html(Table(("gate", "value"), rows))

HTML is escaped by the templates; only `Markup` (charts) is shown as it is.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jinja2
from markupsafe import Markup

from ftkit.utils.console import short

GROUPED = 10_000  # numbers from here on are written as 10,000


@dataclass(frozen=True)
class Table:
    """A header and rows of equal length. caption: also its name for screen readers."""

    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""

    @property
    def label(self) -> str:
        """Name for screen readers."""
        return self.caption or " ".join(self.head[:2])

    @property
    def numeric(self) -> list[bool]:
        """Whether each column holds numbers, which stand on the right."""
        return [any(_is_number(row[place]) for row in self.rows) for place in range(len(self.head))]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def cell(value: Any) -> Any:
    """A cell's text, or its markup."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and abs(value) >= GROUPED:
        return f"{value:,}"
    return short(value) if isinstance(value, float) else value


def three_decimals(value: float | None) -> str:
    """Three decimals; nothing where there is no value."""
    return "" if value is None else f"{value:.3f}"


def where_judged(run: Mapping[str, Any]) -> str:
    """Where a run (run.json) was decided on, as text."""
    return "out of fold" if run.get("folds") else "on val"  # not in older runs


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ftkit.report"),
        autoescape=jinja2.select_autoescape(("html",)),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = cell
    environment.filters["figure"] = three_decimals
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode()
    return environment


def render(template: str, **values: Any) -> str:
    """A whole page or text."""
    return _environment().get_template(template).render(**values)


def table_html(table: Table) -> Markup:
    """The table alone, for a notebook."""
    return Markup(_macros().table(table))


def verdict(word: str) -> Markup:
    """passed, failed or inconclusive, in its colour."""
    return Markup(_macros().verdict(word))


def _macros() -> Any:
    return _environment().get_template("macros.html").module
