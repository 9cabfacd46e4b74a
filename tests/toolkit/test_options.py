"""Options are given by keyword, once for Python and the command line."""

import inspect

import click
import pytest

import ftkit
from ftkit.cli.main import main
from ftkit.options import BenchOptions, ExportOptions, SearchOptions, TrainOptions, by_keyword


def test_a_function_takes_the_fields_of_its_options_by_keyword() -> None:
    @by_keyword(BenchOptions)
    def spent(model: str, options: BenchOptions) -> tuple[str, BenchOptions]:
        return model, options

    assert spent("a", quick=True) == ("a", BenchOptions(quick=True))
    assert spent(model="a") == ("a", BenchOptions())  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="sedonds"):
        spent("a", sedonds=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="missing"):
        spent()  # type: ignore[call-arg]
    assert list(inspect.signature(spent).parameters)[:3] == ["model", "against", "providers"]


@pytest.mark.parametrize(
    ("command", "options", "apart"),
    [
        ("train", TrainOptions, {"data", "gpus", "help"}),
        ("export", ExportOptions, {"run", "help"}),
        ("search", SearchOptions, {"data", "gpus", "as_json", "help"}),
    ],
)
def test_a_command_has_an_option_for_every_field(
    command: str, options: type, apart: set[str]
) -> None:
    """But for `known`, which the command line decides itself."""
    parameters = main.commands[command].get_params(click.Context(main))
    exposed = {item.name for item in parameters if item.expose_value}
    fields = set(inspect.signature(options).parameters) - {"known"}
    assert exposed - apart == fields


def test_an_unknown_option_of_python_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="lr"):
        ftkit.train("photos", lr=1e-3)  # type: ignore[call-arg]
