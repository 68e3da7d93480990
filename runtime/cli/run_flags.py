"""The flags of `satchel run`, and which of them make no sense together. Standard library only."""

from __future__ import annotations

import argparse
from pathlib import Path

from satchel.runtime.cli import custom_flags, provider_flags
from satchel.runtime.errors import PromptError
from satchel.runtime.generation import options
from satchel.runtime.util.defaults import BATCH_ROWS, PREFIX_MIB

STANDARD = "-"  # as a file: standard input or output

EXCLUSIVE = (
    ("PROMPT", "--input", "prompts come from one place"),
    ("--samples", "--beams", "beams are no samples"),
    ("--samples", "--input", "a line of JSON gets one answer"),
    ("--beams", "--input", "a line of JSON gets one answer"),
    ("--prompt-logprobs", "--input", "lines of JSON have those of answers only"),
    ("--load-state", "--input", "a state belongs to one prompt"),
    ("--save-state", "--input", "a state belongs to one prompt"),
    ("--json", "--input", "its answers are JSON anyway"),
    ("--save-state", "--samples", "a state has one continuation"),
    ("--save-state", "--beams", "a state has one continuation"),
)
"""Pairs of which a command line may have one, and why."""

DEPENDENT = (
    ("--output", ("--input",)),
    ("--batch", ("--input",)),
    ("--together", ("--input",)),
    ("--length-penalty", ("--beams",)),
    ("--early-stopping", ("--beams",)),
    ("--logprobs", ("--json", "--input")),
    ("--prompt-logprobs", ("--json",)),
)
"""Flags that mean nothing without another one, or one of two."""

EPILOG = """\
JSON lines: each line of --input is an object with "prompt", a text, or "messages" for the bundle's chat template (and,
for that, "tools" and "arguments"). It may have an "id", a text or a whole number (without it, the number of its line),
and any of the options above, such as "max_new_tokens": 20 or "logit_bias": {"50256": -1}, which go before the flags.
Each answer is a line with "id", "text", "finish_reason", "prompt_tokens" and "new_tokens" (and "logprobs" where asked
for), or with "id" and "error". Answers come in the order in which they end. When a run was stopped, the same command
goes on: lines that have a row in --output are not run again, errors included. Exit code 1: there are errors.

example:
  satchel run out/smollm2-fp32 "The capital of France is" --max-new-tokens 20"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `satchel run`."""
    parser.description = (
        "Continue a prompt, or many from a file, by the most likely token each time unless options say otherwise. A "
        "prompt is taken as it is: no chat template is applied."
    )
    parser.epilog = EPILOG
    parser.add_argument("bundle", metavar="BUNDLE", help="made by satchel export (a folder) or satchel pack (a file)")
    parser.add_argument(
        "prompt",
        metavar="PROMPT",
        nargs="?",
        help="text to continue; without it standard input, less one final newline",
    )
    parser.add_argument(
        "--max-context", metavar="N", type=int, help="positions of prompt and text together (default: the bundle's)"
    )
    parser.add_argument("--threads", metavar="N", type=int, help="CPU threads (default: one per physical core)")
    parser.add_argument(
        "--specialize", action="store_true", help="first make the bundle ready for this machine, if it is not"
    )
    custom_flags.add_flags(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object with text, token ids and figures")
    parser.add_argument(
        "--prompt-logprobs",
        action="store_true",
        help="with --json: the log-probabilities of the prompt's tokens, too, with as many others as --logprobs says",
    )
    options.add_flags(parser)
    _add_several(parser)
    _add_lines(parser)
    _add_memory(parser)
    provider_flags.add_flags(parser)


def check(args: argparse.Namespace) -> None:
    """Raise PromptError, naming both, for flags that make no sense together."""
    given = {flag for pair in EXCLUSIVE for flag in pair[:2] if _given(args, flag)}
    for flag, other, reason in EXCLUSIVE:
        if {flag, other} <= given:
            raise PromptError(f"{flag} with {other}: {reason}: leave one of them out")
    for flag, needed in DEPENDENT:
        if _given(args, flag) and not any(_given(args, other) for other in needed):
            names = " or ".join(needed)
            raise PromptError(f"{flag} without {names}: means nothing: give {names} too, or leave {flag} out")
    for flag, value in (("--load-state", args.load_state), ("--save-state", args.save_state)):
        if value is not None and args.prefix_memory == 0:
            raise PromptError(f"{flag} with --prefix-memory 0: a state needs that memory: leave one of them out")
    if args.batch is not None and args.batch < 1:
        raise PromptError(f"--batch {args.batch}: must be 1 or more")


def prefix_mib(args: argparse.Namespace) -> int:
    """The memory for prompts that begin alike, in MiB: none unless asked for, where there is but one prompt."""
    if args.prefix_memory is not None:
        return int(args.prefix_memory)
    several = (args.input, args.load_state, args.save_state)
    return PREFIX_MIB if any(value is not None for value in several) else 0


def _given(args: argparse.Namespace, flag: str) -> bool:
    value = getattr(args, flag.lower().removeprefix("--").replace("-", "_"))
    return value is not None and value is not False


def _add_several(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "several texts of one prompt", "Without --json they are printed one after the other, a blank line between them."
    )
    group.add_argument("--samples", metavar="N", type=int, help="draw N texts; needs a --temperature above 0")
    group.add_argument("--beams", metavar="N", type=int, help="the likeliest texts that N beams find, best first")
    group.add_argument(
        "--length-penalty",
        metavar="X",
        type=float,
        help="with --beams: divide a text's log-probability by its length to the power of X (default 1)",
    )
    group.add_argument(
        "--early-stopping", action="store_true", help="with --beams: be content with the first N texts that end"
    )


def _add_lines(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("many prompts", "See below for what the lines look like.")
    group.add_argument("--input", metavar="FILE", help="read prompts from JSON lines; - is standard input")
    group.add_argument(
        "--output", metavar="FILE", help="write answers as JSON lines, and go on with those that are there (default: -)"
    )
    group.add_argument("--batch", metavar="N", type=int, help=f"prompts to run at a time (default {BATCH_ROWS})")
    group.add_argument(
        "--together",
        action="store_true",
        help="decode them in one run even where they then round otherwise than alone: faster, with other texts",
    )


def _add_memory(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what was seen before")
    group.add_argument(
        "--prefix-memory",
        metavar="MIB",
        type=int,
        help=f"memory for prompts that begin alike (default {PREFIX_MIB} with --input or a state, else 0)",
    )
    group.add_argument(
        "--load-state", metavar="FILE", type=Path, help="do not feed what a prompt has in common with this saved state"
    )
    group.add_argument("--save-state", metavar="FILE", type=Path, help="save the state after prompt and text")
