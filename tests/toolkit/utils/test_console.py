"""Figures and tables as people read them."""

import pytest

from ftkit.utils import console


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.02679, "0.02679"),
        (6.5e-6, "6.5e-6"),
        (0.0, "0"),
        (123456.0, "1.235e+05"),
        (-2e-4, "-2.0e-4"),
    ],
)
def test_a_figure_is_short_and_still_tells_its_size(value: float, text: str) -> None:
    assert console.short(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.8424, "0.842"),
        (0.0, "0.000"),
        (0.000245, "0.000245"),
        (-0.0034567, "-0.00346"),
        (5e5, "5e+05"),
    ],
)
def test_a_figure_with_its_interval_is_never_rounded_to_nothing(value: float, text: str) -> None:
    assert console.figure(value) == text


def test_a_table_lines_up_and_ends_no_line_in_spaces() -> None:
    lines = console.table([("name", "ms", ""), ("fp32", "10.5", ""), ("a longer one", "9", "x")])
    rows = lines.splitlines()
    assert [row.index(cell) for row, cell in zip(rows, ("ms", "10.5", "9"), strict=True)] == [
        14
    ] * 3
    assert all(row == row.rstrip() for row in rows)


def test_a_quiet_process_says_nothing_but_warns(capsys: pytest.CaptureFixture[str]) -> None:
    console.hush(True)
    try:
        console.say("a line")
        console.warn("a warning")
    finally:
        console.hush(False)
    assert capsys.readouterr() == ("", "warning: a warning\n")


def test_seconds_are_minutes_and_seconds() -> None:
    assert [console.clock(seconds) for seconds in (0, 75.2, 3600)] == ["0:00", "1:15", "60:00"]
