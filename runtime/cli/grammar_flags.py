"""The flags for what a text must match. Standard library only."""

from __future__ import annotations

import argparse
from pathlib import Path

from satchel.runtime.errors import PromptError
from satchel.runtime.generation.grammar import Grammar


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags, of which one may be given."""
    group = parser.add_argument_group(
        "what the text must match", "Needs the extra grammar (llguidance). A model that reasons may do so first."
    )
    kinds = group.add_mutually_exclusive_group()
    kinds.add_argument("--json-schema", metavar="FILE", help="JSON that is valid by this JSON schema")
    kinds.add_argument("--json-object", action="store_true", help="any JSON object")
    kinds.add_argument("--regex", metavar="EXPR", help="a regular expression, for the whole text")
    kinds.add_argument("--lark", metavar="FILE", help="a grammar in llguidance's dialect of Lark")


def grammar_in(args: argparse.Namespace) -> Grammar | None:
    """The grammar that the flags give. Raises PromptError for a file that cannot be read, and for no JSON in it."""
    if args.json_object:
        return Grammar.of({"json_object": True})
    if args.regex is not None:
        return Grammar.of({"regex": args.regex}, "--regex")
    for flag, kind, path in (("--json-schema", "json_schema", args.json_schema), ("--lark", "lark", args.lark)):
        if path is not None:
            try:
                return Grammar.of({kind: Path(path).read_text("utf-8")}, f"{flag} {path}")
            except OSError as error:
                raise PromptError(f"{flag} {path}: cannot be read ({error.strerror})") from None
            except UnicodeDecodeError:
                raise PromptError(f"{flag} {path}: is not UTF-8 text: convert it") from None
    return None
