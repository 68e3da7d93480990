"""`satchel embed`: texts in, one JSON line with a vector for each out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from satchel.runtime.cli import provider_flags
from satchel.runtime.cli.answer_file import as_line
from satchel.runtime.cli.prompt_lines import PromptLine, located, read_lines
from satchel.runtime.cli.run_flags import STANDARD
from satchel.runtime.errors import PromptError

if TYPE_CHECKING:
    from satchel.runtime.generation.generator import Generator

EPILOG = """\
JSON lines: each line of --input is an object with "prompt", a text, and maybe "id" and "adapter", as for satchel run. A
line of the output has "id", "embedding" (a list of numbers) and "prompt_tokens", or "id" and "error", in the order of
the input. Exit code 1 means that some lines failed.

example:
  satchel embed out/qwen3-embedding-int8 "What is a satchel?" """.rstrip()


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `satchel embed`."""
    parser.description = (
        "Turn texts into vectors, with a bundle that was exported with --embeddings mean or last: one line of JSON for "
        "each text. Vectors have length 1, so that the product of two is the cosine of their angle."
    )
    parser.epilog = EPILOG
    parser.add_argument("bundle", metavar="BUNDLE", help="made by satchel export (a folder) or satchel pack (a file)")
    parser.add_argument("prompt", metavar="TEXT", nargs="?", help="one text, in quotes (default: standard input)")
    parser.add_argument("--input", metavar="FILE", help="read texts from JSON lines; - is standard input")
    parser.add_argument("-o", "--output", metavar="FILE", help="write the lines into a file (default: -)")
    parser.add_argument("--no-normalize", action="store_true", help="vectors as they are, not of length 1")
    parser.add_argument(
        "--adapter", metavar="NAME", help="one of the bundle's adapters (default: none, the base model)"
    )
    provider_flags.add_threads(parser)


def main(args: argparse.Namespace) -> int:
    """Print or write a line for each text. Returns 1 if some failed."""
    from satchel.runtime.bundle.atomic_write import check_target, write_parts
    from satchel.runtime.generation.generator import Generator
    from satchel.runtime.ort import session
    from satchel.runtime.util.progress import progress_bar

    if args.input is not None and args.prompt is not None:
        raise PromptError("TEXT cannot be combined with --input")
    to_file = args.output not in (None, STANDARD)
    if to_file:
        check_target(Path(args.output), "--output")
    lines = read_lines(_content(args.input)) if args.input is not None else [PromptLine(1, 1, _text(args))]
    session.prepare_process(args.threads)
    generator = Generator.open(
        args.bundle, threads=args.threads, prefix_cache_mib=0, verbose=args.verbose, progress=not args.quiet,
        require_signature=args.require_signature, specialize=False,
    )  # fmt: skip
    generator.engine.check_embeddings()
    generator.engine.adapters.check(args.adapter)
    failed = 0
    with progress_bar(len(lines), "embedding", " texts", shown=not args.quiet and to_file) as bar:

        def rows() -> Iterator[str]:
            nonlocal failed
            for line in lines:
                try:
                    row = _row(generator, line, args)
                except PromptError as error:
                    if args.input is None:
                        raise
                    failed += 1
                    row = {"id": line.id, "error": located(line.number, str(error))}
                bar.update(1)
                yield as_line(row)

        if to_file:
            write_parts(Path(args.output), (row.encode() for row in rows()), "--output")
        else:
            for row in rows():
                print(row, end="", flush=True)
    if failed:
        print(f'satchel: {failed} of {len(lines)} texts failed: see "error" in the rows', file=sys.stderr)
    return 1 if failed else 0


def _row(generator: Generator, line: PromptLine, args: argparse.Namespace) -> dict[str, Any]:
    if line.error is not None:
        raise PromptError(line.error)
    if not isinstance(line.prompt, str) or line.raw is not None or set(line.options) - {"adapter"}:
        raise PromptError('must have "prompt", a text, and nothing but "id" and "adapter" beside it')
    ids = generator.encode(line.prompt)
    adapter = line.options.get("adapter", args.adapter)
    (vector,) = generator.embed([ids], normalize=not args.no_normalize, adapter=adapter)
    # As short as a float32 can be written.
    return {"id": line.id, "embedding": [float(str(number)) for number in vector], "prompt_tokens": len(ids)}


def _text(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        return str(args.prompt)
    try:
        return _content(STANDARD).decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise PromptError(f"standard input is not UTF-8 text (byte {error.start}): convert it to UTF-8") from None


def _content(source: str) -> bytes:
    if source == STANDARD:
        return sys.stdin.buffer.read()
    try:
        return Path(source).read_bytes()
    except OSError as error:
        raise PromptError(f"--input {source}: cannot be read ({error.strerror})") from None
