"""`satchel run`: continues a prompt, and prints only what is generated."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from satchel.runtime.defaults import MAX_NEW_TOKENS, PROVIDER
from satchel.runtime.errors import PromptError

if TYPE_CHECKING:
    from satchel.runtime.generate import Generation

MIB = 1 << 20


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `satchel run`."""
    parser.description = "Continue a prompt, greedily. The text is taken as it is: no chat template is applied."
    parser.epilog = 'example:\n  satchel run out/smollm2-fp32 "The capital of France is" --max-new-tokens 20'
    parser.add_argument("bundle", metavar="BUNDLE", help="a folder made by satchel export")
    parser.add_argument(
        "prompt",
        metavar="PROMPT",
        nargs="?",
        help="text to continue; without it standard input, less one final newline",
    )
    parser.add_argument(
        "--max-new-tokens",
        metavar="N",
        type=int,
        default=MAX_NEW_TOKENS,
        help="tokens to generate at most (default %(default)s)",
    )
    parser.add_argument(
        "--max-context", metavar="N", type=int, help="positions of prompt and text together (default: the bundle's)"
    )
    parser.add_argument("--threads", metavar="N", type=int, help="CPU threads (default: one per physical core)")
    parser.add_argument(
        "--specialize", action="store_true", help="first make the bundle ready for this machine, if it is not"
    )
    parser.add_argument("--provider", default=PROVIDER, help="execution provider (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object with text, token ids and figures")


def main(args: argparse.Namespace) -> int:
    """Generate and print; one line of figures goes to standard error."""
    from satchel.runtime import session
    from satchel.runtime.generate import Generator

    prompt = _read_standard_input() if args.prompt is None else args.prompt
    session.share_thread_pool(args.threads)
    if args.specialize:
        _specialize(args)
    generator = Generator.open(
        args.bundle,
        provider=args.provider,
        threads=args.threads,
        max_context=args.max_context,
        verbose=args.verbose,
        progress=not args.quiet,
    )
    with generator.stream(prompt, args.max_new_tokens) as stream:
        if args.json:
            print(json.dumps(_as_json(stream.result()), ensure_ascii=False))
            return 0
        try:
            for piece in stream:
                print(piece, end="", flush=True)
        finally:
            print(flush=True)
        if not args.quiet:
            print(_figures(stream.result()), file=sys.stderr)
    return 0


def _specialize(args: argparse.Namespace) -> None:
    from satchel.runtime.progress import stage_printer
    from satchel.runtime.specializing.specialize import specialize_if_needed

    specialize_if_needed(args.bundle, threads=args.threads, progress=stage_printer(shown=not args.quiet))


def _read_standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise PromptError(f"standard input is not UTF-8 text (byte {error.start}): convert it to UTF-8") from None


def _as_json(result: Generation) -> dict[str, object]:
    return {
        "text": result.text,
        "token_ids": list(result.token_ids),
        "finish_reason": result.finish_reason,
        "prompt_tokens": result.prompt_tokens,
        "new_tokens": result.new_tokens,
        "prefill_seconds": result.prefill_seconds,
        "decode_seconds": result.decode_seconds,
        "prefill_tokens_per_second": result.prefill_speed,
        "decode_tokens_per_second": result.decode_speed,
        "kv_bytes": result.kv_bytes,
    }


def _figures(result: Generation) -> str:
    return (
        f"prompt {result.prompt_tokens} tokens at {result.prefill_speed:.1f} tokens/s, "
        f"new {result.new_tokens} tokens at {result.decode_speed:.1f} tokens/s ({result.finish_reason}), "
        f"KV cache {result.kv_bytes / MIB:.1f} MiB"
    )
