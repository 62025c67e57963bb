"""What is written for users is true of the program."""

import ast
import inspect
import re
from pathlib import Path

import pytest
import typer.main

import catalog.cli
import loaderd
import loaderd.cli

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text()

COMMANDS = [
    pytest.param(program, name, command, id=f"{program} {name}")
    for program, app in (("catalog", catalog.cli.app), ("loaderd", loaderd.cli.app))
    for name, command in typer.main.get_command(app).commands.items()  # type: ignore[attr-defined]
]


@pytest.mark.parametrize(("program", "name", "command"), COMMANDS)
def test_every_command_explains_itself_and_is_in_the_readme(program: str, name: str, command: typer.core.TyperCommand) -> None:
    """Each command has help, so has each argument and option of it, and README.md mentions it."""
    assert command.help
    assert [parameter.name for parameter in command.params if not getattr(parameter, "help", None)] == []
    assert re.search(rf"\b{program} {name}\b", README), f"README.md does not mention `{program} {name}`"


def test_the_readme_names_what_exists() -> None:
    """Each `make` target, command and environment variable that README.md names is there."""
    targets = set(re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:^|`)make ([a-z]+)\b", README, re.M)) <= targets
    known = {(parameter.values[0], parameter.values[1]) for parameter in COMMANDS}
    assert {("catalog", "ingest"), ("catalog", "sql")} <= known
    for block in re.findall(r"```(?:sh|bash|console)\n(.*?)```", README, re.S):
        for pair in re.findall(r"^(?:\$ )?(catalog|loaderd) ([a-z]+)", block, re.M):
            assert pair in known
    places = ("catalog/*.py", "loaderd/*.py", "examples/*.py", "docker-compose.yml")
    sources = "".join(path.read_text() for place in places for path in REPOSITORY.glob(place))
    for variable in set(re.findall(r"\b(?:CATALOG|LOADERD|POSTGRES)_[A-Z_]+\b", README)):
        assert variable in sources, variable


def test_the_readme_s_python_is_python() -> None:
    """Each Python block of README.md parses, and calls Feed and batches with arguments that they have."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    has = set(inspect.signature(loaderd.Feed).parameters)
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("Feed", "batches"):
                takes = has | {"epochs"} if ast.unparse(node.func).endswith("batches") else has
                assert {keyword.arg for keyword in node.keywords} - {None} <= takes, ast.unparse(node)


def test_the_other_pages_are_there() -> None:
    """The changelog knows this version's changes, and the decisions are written down."""
    assert re.search(r"^## \[?(Unreleased|0\.1\.0)", (REPOSITORY / "CHANGELOG.md").read_text(), re.M)
    assert (REPOSITORY / "docs" / "decisions.md").read_text().count("\n## ") >= 3
