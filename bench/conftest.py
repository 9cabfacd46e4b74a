"""Options of the latency suite: `pytest bench --bundle BUNDLE [--against BASELINE]`."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --bundle and --against."""
    group = parser.getgroup("ftkit")
    group.addoption(
        "--bundle", metavar="BUNDLE", help="a bundle, or any ONNX file, for bench/test_latency.py"
    )
    group.addoption(
        "--against", metavar="BASELINE", help="an earlier one, or the JSON of `ftkit bench`"
    )
