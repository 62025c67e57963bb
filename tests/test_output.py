"""How a command ends: one line on stderr that helps, and its exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import typer

import loaderd.cli
from catalog import cli, cli_export, cli_interpolate, cli_pictures, cli_snapshot, cli_threshold
from catalog.output import RESUMED

Ends = Callable[..., tuple[int, str]]


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ends:
    """Run a whole command line in this process: its exit code and what it says on stderr."""

    def run(main: Callable[[], None], *arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["program", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), capsys.readouterr().err

    return run


GOES_ON = "catalog: interrupted; the same command goes on where this one ended\n"
AGAIN = "catalog: interrupted; run the same command again\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("ingest", "/"), GOES_ON),
        (("measure",), GOES_ON),
        (("export", "v1", "v1.h5", "--to", "hdf5"), GOES_ON),
        (("runs", "retry", "1"), GOES_ON),
        (("runs", "list"), AGAIN),
        (("snapshot", "verify", "v1"), AGAIN),
        (("plot", "areas", "-o", "areas.png"), AGAIN),
        (("threshold", "--outer", "outer"), AGAIN),
        (("interpolate", "--structure", "inner"), AGAIN),
    ],
    ids=lambda one: " ".join(one[:2]) if isinstance(one, tuple) else "",
)
def test_interrupted(arguments: tuple[str, ...], said: str, ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is exit code 130, and only commands that keep what they did say that they go on where they ended."""

    def interrupted(*given: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    for module in (cli, cli_export, cli_interpolate, cli_pictures, cli_snapshot, cli_threshold):
        monkeypatch.setattr(module, "open_database", interrupted)
    monkeypatch.setattr("catalog.cli_keep.open_database", interrupted)
    assert ends(cli.main, *arguments) == (130, said)


def test_resumed_are_commands() -> None:
    """Each command that is said to go on where it ended is there."""
    for one in RESUMED:
        command = typer.main.get_command(cli.app)
        for word in one.split()[1:]:
            command = command.commands[word]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("main", "arguments", "begins", "ends_with"),
    [
        (cli.main, "export v1 v1.zarr --to zarr", "catalog: Invalid value for '--to': 'zarr' is not one of 'hdf5'", "catalog export"),
        (cli.main, "export v1 v1.h5 --to hdf5 --jobs two", "catalog: Invalid value for '--jobs': ", "catalog export"),
        (cli.main, "export v1 v1.h5", "catalog: Missing option '--to'. Choose from: ", "catalog export"),
        (cli.main, "snapshot show", "catalog: Missing argument 'NAME'", "catalog snapshot show"),
        (cli.main, "snapshot nope", "catalog: No such command 'nope'", "catalog snapshot"),
        (cli.main, "nope", "catalog: No such command 'nope'", "catalog"),
        (loaderd.cli.main, "stream list --nope", "loaderd: No such option: --nope", "loaderd stream list"),
    ],
)  # fmt: skip
def test_wrong_arguments(main: Callable[[], None], arguments: str, begins: str, ends_with: str, ends: Ends) -> None:
    """What the parser refuses is one line, exit code 2, without the words of what checks values, and names the help of that command."""
    code, said = ends(main, *arguments.split())
    assert code == 2 and said.startswith(begins) and said.endswith(f"; see `{ends_with} --help`\n"), said
    assert said.count("\n") == 1 and not any(words in said for words in ("Value error", "Input should", "unable to parse")), said
