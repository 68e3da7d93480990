"""Every command explains itself: what it does, each flag, and an example that its own parser takes."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

import pytest

from satchel.runtime.cli import main as cli
from satchel.runtime.cli.reference import reference

WITHOUT_JSON = {"completion", "embed", "serve", "shard"}  # print for a shell, JSON always, and nothing


def subparser(name: str) -> argparse.ArgumentParser:
    """The parser of one command, as `satchel NAME` builds it."""
    (commands,) = (
        action for action in cli.build_parser([name])._actions if isinstance(action, argparse._SubParsersAction)
    )
    found: argparse.ArgumentParser = commands.choices[name]
    return found


def examples(epilog: str) -> list[list[str]]:
    """The command lines below "example:", without what the shell does with their output."""
    lines = epilog.split("example:\n", 1)[1].splitlines()
    assert all(line.startswith("  satchel ") for line in lines)
    words = [shlex.split(line) for line in lines]
    return [line[1 : line.index(">")] if ">" in line else line[1:] for line in words]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_and_its_arguments_are_explained(name: str) -> None:
    parser = subparser(name)
    actions = parser._actions
    assert parser.description
    assert cli.COMMANDS[name].help
    assert [action.dest for action in actions if not action.help] == []
    flags = {flag for action in actions for flag in action.option_strings}
    assert {"--quiet", "--verbose", "--help"} <= flags
    assert ("--json" in flags) is (name not in WITHOUT_JSON)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_ends_with_an_example_that_the_parser_takes(name: str) -> None:
    parser = subparser(name)
    assert f"example:\n  satchel {name} " in (parser.epilog or "")
    assert parser.format_help().endswith(f"{parser.epilog}\n")
    for words in examples(parser.epilog or ""):
        assert cli.build_parser(words).parse_args(words).command == words[0]


def test_the_page_of_commands_is_what_the_parsers_say() -> None:
    page = Path(__file__).parents[2] / "docs" / "cli.md"
    assert page.read_text(encoding="utf-8") == reference(), "python -m satchel.runtime.cli.reference > docs/cli.md"


def test_the_list_of_commands_has_an_example_and_a_line_for_each() -> None:
    parser = cli.build_parser([])
    text = parser.format_help()
    assert [name for name in cli.COMMANDS if f"\n    {name}" not in text] == []
    assert parser.epilog is not None
    words = shlex.split(parser.epilog.removeprefix("example: satchel "))
    assert cli.build_parser(words).parse_args(words).command == "run"
