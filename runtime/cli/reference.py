"""Renders docs/cli.md from the parsers of all commands: `python -m satchel.runtime.cli.reference > docs/cli.md`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from satchel.runtime.cli.main import COMMANDS, HelpFormatter, Parser, build_full_parser, subparsers

INTRODUCTION = """\
# Command line

`satchel COMMAND --help` says the same in a terminal. Flags cannot be abbreviated. Exit codes: 0 done, 1 a check failed,
2 wrong input (one line on standard error says what), 130 interrupted. Results go to standard output, everything
else to standard error.

This page is generated from the parsers: `python -m satchel.runtime.cli.reference > docs/cli.md`.
"""

COMMON = ("help", "quiet", "verbose", "require_signature")
"""Arguments, by destination, that most commands have: they are listed once."""


def reference() -> str:
    """The page, in Markdown."""
    parser = build_full_parser()
    parsers = subparsers(parser)
    lines = [INTRODUCTION, "| command | |", "| --- | --- |"]
    lines += [f"| [{name}](#{name}) | {command.help} |" for name, command in COMMANDS.items()]
    run = parsers["run"]
    common = [action for action in run._actions if action.dest in COMMON]
    lines += ["", "All commands take these flags; `--require-signature` is for those that open a bundle.", ""]
    lines += _table(run, common)
    for name in COMMANDS:
        lines += ["", f"## {name}", "", *_section(name, parsers[name])]
    return "\n".join(lines) + "\n"


def _section(name: str, parser: Parser) -> Iterator[str]:
    own = [action for action in parser._actions if action.dest not in COMMON]
    needed = [_needed(action) for action in own if action.required or not action.option_strings]
    yield parser.description or ""
    yield ""
    yield "```"
    yield " ".join(["satchel", name, *needed, "[flags]"])
    yield "```"
    plain = ("positional arguments", "options")
    tables = {
        "": [action for group in parser._action_groups if group.title in plain for action in group._group_actions]
    }
    for group in parser._action_groups:
        if group.title not in plain:
            tables[f"{str(group.title).capitalize()}. {group.description or ''}".rstrip()] = group._group_actions
    for title, group_actions in tables.items():
        yield from ("", title, "") if title else ("",)
        yield from _table(parser, [action for action in group_actions if action in own])
    text, _, example = (parser.epilog or "").rpartition("example:\n")
    if text.strip():
        yield from ("", "```text", text.strip(), "```")
    yield from ("", "Example:", "", "```", *(line.removeprefix("  ") for line in example.splitlines()), "```")


def _table(parser: Parser, actions: list[argparse.Action]) -> Iterator[str]:
    formatter = HelpFormatter(parser.prog)
    yield "| argument | |"
    yield "| --- | --- |"
    for action in actions:
        text = formatter._expand_help(action) if action.help else ""
        default = action.default
        named = "default" in text or f"({default})" in text
        if action.nargs != 0 and default not in (None, [], (), argparse.SUPPRESS) and not named:
            text += f" (default {default})"
        yield f"| {_name(action)} | {text} |".replace("<", "\\<")


def _name(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"`{action.metavar}`"
    value = "" if action.nargs == 0 else f" {_value(action)}"
    flags = sorted(action.option_strings, key=lambda flag: flag.startswith("--"))
    return ", ".join(f"`{flag}{value}`" for flag in flags)


def _value(action: argparse.Action) -> str:
    if action.metavar is None and action.choices is not None:
        return "{" + ",".join(map(str, action.choices)) + "}"
    return str(action.metavar or action.dest.upper())


def _needed(action: argparse.Action) -> str:
    if action.option_strings:
        return f"{action.option_strings[-1]} {_value(action)}"
    return f"[{action.metavar}]" if action.nargs == "?" else str(action.metavar)


if __name__ == "__main__":
    sys.stdout.write(reference())
