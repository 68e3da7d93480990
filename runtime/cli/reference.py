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

SHARED = 5
"""A flag that so many commands have, with the same words, is listed once."""

Row = tuple[str, str]
Tables = dict[str, list[Row]]


def reference() -> str:
    """The page, in Markdown."""
    parsers = subparsers(build_full_parser())
    tables = {name: _tables(parsers[name]) for name in COMMANDS}
    owners: dict[Row, list[str]] = {}
    for name, groups in tables.items():
        for row in (row for rows in groups.values() for row in rows):
            owners.setdefault(row, []).append(name)
    shared = {row: names for row, names in owners.items() if len(names) >= SHARED and row[0].startswith("`-")}
    lines = [INTRODUCTION, "| command | |", "| --- | --- |"]
    lines += [f"| [{name}](#{name}) | {command.help} |" for name, command in COMMANDS.items()]
    lines += ["", "## Flags of several commands", "", "| argument | | commands |", "| --- | --- | --- |"]
    lines += [f"| {flag} | {text} | {_named(names)} |" for (flag, text), names in shared.items()]
    shown: dict[str, tuple[str, list[Row]]] = {}
    for name in COMMANDS:
        lines += ["", f"## {name}", "", *_section(name, parsers[name])]
        for title, rows in tables[name].items():
            own = [row for row in rows if row not in shared]
            if own and title and shown.get(title, ("", []))[1] == own:
                lines += ["", f"{title} The same as those of [{shown[title][0]}](#{shown[title][0]})."]
            elif own:
                lines += ["", *([title, ""] if title else []), "| argument | |", "| --- | --- |"]
                lines += [f"| {flag} | {text} |" for flag, text in own]
                shown.setdefault(title, (name, own))
        if notes := (parsers[name].epilog or "").rpartition("example:\n")[0].strip():
            lines += ["", "```text", notes, "```"]
    return "\n".join(lines) + "\n"


def _named(names: list[str]) -> str:
    others = [name for name in COMMANDS if name not in names]
    if len(others) < len(names):
        return f"all but {', '.join(others)}" if others else "all"
    return ", ".join(names)


def _section(name: str, parser: Parser) -> Iterator[str]:
    """What a command does, how it is called, and examples."""
    needed = [_needed(action) for action in parser._actions if action.required or not action.option_strings]
    examples = (parser.epilog or "").rpartition("example:\n")[2].splitlines()
    yield from (parser.description or "", "", "```", " ".join(["satchel", name, *needed, "[flags]"]), "")
    yield from (*(line.removeprefix("  ") for line in examples), "```")


def _tables(parser: Parser) -> Tables:
    """The arguments of a command by the title of their table."""
    tables: Tables = {}
    for group in parser._action_groups:
        plain = group.title in ("positional arguments", "options")
        title = "" if plain else f"{str(group.title).capitalize()}. {group.description or ''}".rstrip()
        tables.setdefault(title, []).extend(_rows(parser, group._group_actions))
    return tables


def _rows(parser: Parser, actions: list[argparse.Action]) -> Iterator[Row]:
    formatter = HelpFormatter(parser.prog)
    for action in actions:
        text = formatter._expand_help(action) if action.help else ""
        default = action.default
        named = "default" in text or f"({default})" in text
        if action.nargs != 0 and default not in (None, [], (), argparse.SUPPRESS) and not named:
            text += f" (default {default})"
        yield _name(action), text.replace("<", "\\<")


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
