"""`satchel run --input`: answers prompts from JSON lines, many together, in a file that a later run can go on with."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from satchel.runtime.cli.answer_file import AnswerFile, PrintedAnswers
from satchel.runtime.cli.generation_json import answer_json
from satchel.runtime.cli.prompt_lines import Chat, PromptLine, located, read_lines
from satchel.runtime.cli.run_flags import STANDARD
from satchel.runtime.errors import PromptError, SatchelError
from satchel.runtime.generation.options import GenerationOptions
from satchel.runtime.util.defaults import BATCH_ROWS
from satchel.runtime.util.progress import progress_bar

if TYPE_CHECKING:
    from satchel.runtime.execution.engine import TokenIds
    from satchel.runtime.generation.generator import Generator, Request
    from satchel.runtime.generation.result import Generation

Render = Callable[["Generator", Chat], "TokenIds"]
"""Gives the token ids of a conversation. Raises SatchelError where the template refuses it."""


class Tally:
    """What the lines of one run gave and cost."""

    def __init__(self) -> None:
        self.failed = 0
        self.prompts = 0
        self.prompt_tokens = 0
        self.reused_tokens = 0
        self.new_tokens = 0
        self._start = time.perf_counter()

    def add(self, result: Generation) -> None:
        """Count an answer."""
        self.prompts += 1
        self.prompt_tokens += result.prompt_tokens
        self.reused_tokens += result.reused_tokens
        self.new_tokens += result.new_tokens

    def __str__(self) -> str:
        seconds = time.perf_counter() - self._start
        reused = f", {self.reused_tokens} reused" if self.reused_tokens else ""
        return (
            f"{self.prompts} prompts of {self.prompt_tokens} tokens{reused}, new {self.new_tokens} tokens at "
            f"{self.new_tokens / seconds:.1f} tokens/s, {seconds:.1f} s"
        )


def main(args: argparse.Namespace, options: dict[str, Any], open_generator: Callable[[], Generator]) -> int:
    """Answer the lines of `args.input`; `options` are those of the command line. Returns 1 where some failed.

    Raises SatchelError for an input or output that cannot be used, and for wrong options of the command line.
    """
    lines = read_lines(_read(args.input, args.output))
    to_file = args.output not in (None, STANDARD)
    with AnswerFile(Path(args.output), lines) if to_file else PrintedAnswers() as answers:
        pending = [line for line in lines if line.number not in answers.done]
        if not args.quiet and (answers.done or not lines):
            print(_beginning(args, len(lines), len(pending)), file=sys.stderr)
        failed = answers.failed
        if pending:
            tally = answer_lines(open_generator(), pending, options, args, answers)
            failed += tally.failed
            if not args.quiet:
                print(tally, file=sys.stderr)
    if failed:
        place = f"of {args.output}" if to_file else "of standard output"
        print(f'satchel: {failed} of {len(lines)} prompts failed: see "error" in the rows {place}', file=sys.stderr)
    return 1 if failed else 0


def answer_lines(
    generator: Generator,
    lines: Sequence[PromptLine],
    options: dict[str, Any],
    args: argparse.Namespace,
    answers: AnswerFile | PrintedAnswers,
    render: Render | None = None,
) -> Tally:
    """Write a row for each line: first those that cannot run, then the others as they end.

    A row is what the line gives alone, whatever runs beside it. `render` takes the place of the bundle's chat template.
    Raises SatchelError for wrong options of the command line, and where a row cannot be written.
    """
    defaults = GenerationOptions(**options)
    defaults.check_all(generator.engine.vocabulary)
    tokenizer = generator.need_tokenizer()
    tally = Tally()
    runnable: list[PromptLine] = []
    requests: list[Request] = []

    with progress_bar(len(lines), "answering", " prompts", shown=not args.quiet) as bar:

        def fail(line: PromptLine, message: str) -> None:
            answers.write({"id": line.id, "error": located(line.number, message)})
            tally.failed += 1
            bar.update(1)

        for line in lines:
            try:
                requests.append(_request(generator, line, defaults, render or _render))
            except SatchelError as error:
                fail(line, str(error))
            else:
                runnable.append(line)
        running = generator.run_requests(requests, rows=args.batch or BATCH_ROWS, together=args.together or None)
        for index, outcome in running:
            if isinstance(outcome, SatchelError):
                fail(runnable[index], str(outcome))
                continue
            answers.write(answer_json(runnable[index].id, outcome, tokenizer))
            tally.add(outcome)
            bar.update(1)
    return tally


def _request(generator: Generator, line: PromptLine, defaults: GenerationOptions, render: Render) -> Request:
    """What a line asks for. Raises SatchelError for what is wrong with it."""
    from satchel.runtime.generation.generator import Request

    if line.prompt is None:
        raise PromptError(str(line.error))
    options = defaults.updated(line.options)
    options.check_all(generator.engine.vocabulary, f"line {line.number}")
    prompt = render(generator, line.prompt) if isinstance(line.prompt, Chat) else line.prompt
    return Request(prompt, options)


def _render(generator: Generator, chat: Chat) -> TokenIds:
    from satchel.runtime.generation.conversation import chat_ids

    return chat_ids(generator, chat.messages, tools=chat.tools, arguments=chat.arguments)


def _read(source: str, target: str | None) -> bytes:
    if source == STANDARD:
        return sys.stdin.buffer.read()
    path = Path(source)
    try:
        if target not in (None, STANDARD) and Path(target).exists() and path.samefile(target):
            raise PromptError(f"--output {target}: is the file of --input: name another file")
        return path.read_bytes()
    except OSError as error:
        raise PromptError(f"--input {source}: cannot be read ({error.strerror}): name another file") from None


def _beginning(args: argparse.Namespace, total: int, pending: int) -> str:
    if not total:
        return f"there are no prompts in {args.input}"
    if not pending:
        return f"all {total} prompts are done already"
    return f"resuming: {total - pending} of {total} are done"
