"""The flags of `satchel run`, and which of them exclude or require each other. Standard library only."""

from __future__ import annotations

import argparse
from pathlib import Path

from satchel.runtime.cli import custom_flags, grammar_flags, provider_flags, ready
from satchel.runtime.errors import PromptError
from satchel.runtime.generation import options
from satchel.runtime.util.defaults import BATCH_ROWS, PREFIX_CACHE_MIB

STANDARD = "-"  # as a file: standard input or output

EXCLUDES = {
    "--input": (
        "PROMPT", "--json", "--prompt-logprobs", "--num-return-sequences", "--beams", "--load-state", "--save-state",
    ),
    "--save-state": ("--num-return-sequences", "--beams"),
}  # fmt: skip
"""Flags that cannot be combined with a flag; the parser knows further pairs."""

REQUIRES = {
    "--output": ("--input",),
    "--batch": ("--input",),
    "--force-batch": ("--input",),
    "--kv-cache-mib": ("--input",),
    "--length-penalty": ("--beams",),
    "--early-stopping": ("--beams",),
    "--logprobs": ("--json", "--input"),
    "--prompt-logprobs": ("--json",),
}
"""Flags that need another one, or one of two."""

EPILOG = """\
JSON lines: each line of --input is an object with "prompt", a text, or "messages" for the chat template (then "tools",
"arguments" and "template", a name, are allowed too). "raw": true feeds the prompt of that line without the template.
"id", a text or a whole number, names the line (default: its line number). Options such as "max_new_tokens": 20 or
"logit_bias": {"50256": -1} override the flags; "grammar" is an object such as {"json_schema": {...}}. An answer is a
line with "id", "text", "finish_reason", "prompt_tokens", "new_tokens" and "request" (and "logprobs" if asked for), or
with "id", "error" and "request", in the order in which they finish. Run the same command again to resume: lines that
have an answer in --output are skipped; answers to another request, or of another bundle, are computed again. Exit code
1 means that some lines failed.

example:
  satchel run out/smollm2-int8 "What is a satchel?" -n 100"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `satchel run`."""
    parser.description = (
        "Generate text from a prompt or, with --input, from a file of prompts. If the bundle has a chat template, the "
        "prompt is put into it as a question; --raw continues the text as it is. Decoding is greedy by default."
    )
    parser.epilog = EPILOG
    parser.add_argument(
        "bundle",
        metavar="BUNDLE",
        help="made by satchel export or satchel pack; or a checkpoint, which is exported once into the user's cache",
    )
    parser.add_argument(
        "prompt",
        metavar="PROMPT",
        nargs="?",
        help="the prompt, in quotes (default: standard input, without one final newline)",
    )
    parser.add_argument("-p", "--prompt", metavar="TEXT", dest="prompt_flag", help="the same as PROMPT")
    parser.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
    parser.add_argument("--template", metavar="NAME", help="one of the bundle's chat templates (default: default)")
    parser.add_argument(
        "--max-context", metavar="N", type=int, help="maximum positions of prompt and new text (default: the bundle's)"
    )
    provider_flags.add_threads(parser)
    ready.add_flag(parser)
    ready.add_speculation(parser)
    custom_flags.add_flags(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object with text, token ids and figures")
    parser.add_argument(
        "--prompt-logprobs",
        action="store_true",
        help="with --json: the log-probability of each prompt token, and of as many others as --logprobs says",
    )
    options.add_flags(parser)
    grammar_flags.add_flags(parser)
    _add_several(parser)
    _add_lines(parser)
    _add_cache(parser)
    provider_flags.add_flags(parser)


def check(args: argparse.Namespace) -> None:
    """Settle `args.prompt` and `args.grammar`, and raise PromptError for flags that exclude or require each other."""
    args.grammar = grammar_flags.grammar_in(args)
    if args.prompt_flag is not None:
        if args.prompt is not None:
            raise PromptError("--prompt and PROMPT are both given: remove one")
        args.prompt = args.prompt_flag
    for flag, others in EXCLUDES.items():
        wrong = next((other for other in others if _given(args, flag) and _given(args, other)), None)
        if wrong is not None:
            raise PromptError(f"{wrong} cannot be combined with {flag}")
    for flag, others in REQUIRES.items():
        if _given(args, flag) and not any(_given(args, other) for other in others):
            raise PromptError(f"{flag} requires {' or '.join(others)}")
    if args.template is not None and args.raw:
        raise PromptError("--template cannot be combined with --raw, which uses no chat template")
    for flag in ("--load-state", "--save-state"):
        if _given(args, flag) and args.prefix_cache_mib == 0:
            raise PromptError(f"{flag} cannot be combined with --prefix-cache-mib 0: it uses the prefix cache")
    if args.batch is not None and args.batch < 1:
        raise PromptError(f"--batch {args.batch}: must be 1 or more")


def prefix_cache_mib(args: argparse.Namespace) -> int:
    """The size of the prefix cache in MiB: without the flag none for a single prompt, which could not reuse it."""
    if args.prefix_cache_mib is not None:
        return int(args.prefix_cache_mib)
    return PREFIX_CACHE_MIB if any(_given(args, flag) for flag in ("--input", "--load-state", "--save-state")) else 0


def _given(args: argparse.Namespace, flag: str) -> bool:
    value = getattr(args, flag.lower().removeprefix("--").replace("-", "_"))
    return value is not None and value is not False


def _add_several(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "several texts for one prompt", "Without --json they are printed one after another, separated by blank lines."
    )
    kinds = group.add_mutually_exclusive_group()
    kinds.add_argument(
        "--num-return-sequences", metavar="N", type=int, help="sample N texts; requires --temperature above 0"
    )
    kinds.add_argument("--beams", metavar="N", type=int, help="beam search with N beams: the N best texts, best first")
    group.add_argument(
        "--length-penalty",
        metavar="X",
        type=float,
        help="with --beams: divide a text's log-probability by its length to the power of X (default: 1)",
    )
    group.add_argument("--early-stopping", action="store_true", help="with --beams: stop as soon as N texts ended")


def _add_lines(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("many prompts", "The format of the lines is described below.")
    group.add_argument("--input", metavar="FILE", help="read prompts from JSON lines; - is standard input")
    group.add_argument(
        "-o", "--output", metavar="FILE", help="write answers as JSON lines, and resume if FILE has some (default: -)"
    )
    group.add_argument("--batch", metavar="N", type=int, help=f"prompts to run at a time (default: {BATCH_ROWS})")
    group.add_argument(
        "--force-batch",
        action="store_true",
        help="always decode in one batch: faster, even if results then differ from those of each prompt alone",
    )
    add_kv_cache(group)


def add_kv_cache(group: argparse._ArgumentGroup) -> None:
    """Add --kv-cache-mib, of commands that run several requests at a time."""
    group.add_argument(
        "--kv-cache-mib",
        metavar="MIB",
        type=int,
        help="memory of all keys and values, those kept for later prompts included: requests that do not fit wait in "
        "a temporary file (default: room for all rows; needs satchel's kernels)",
    )


def _add_cache(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prefix cache")
    group.add_argument(
        "--prefix-cache-mib",
        metavar="MIB",
        type=int,
        help=f"size of the prefix cache (default: {PREFIX_CACHE_MIB} with --input or a state, else 0)",
    )
    group.add_argument(
        "--load-state", metavar="FILE", type=Path, help="reuse the keys and values of the prefix in this saved state"
    )
    group.add_argument("--save-state", metavar="FILE", type=Path, help="save the state after prompt and text")
