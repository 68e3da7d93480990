"""`satchel run --input`: answers prompts from JSON lines in batches, into a file that a later run can resume."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from satchel.runtime.cli.answer_file import AnswerFile, PrintedAnswers
from satchel.runtime.cli.generation_json import answer_json
from satchel.runtime.cli.prompt_lines import Chat, PromptLine, located, read_lines
from satchel.runtime.cli.run_flags import STANDARD
from satchel.runtime.errors import PromptError, SatchelError
from satchel.runtime.generation.generation_config import stored_rules
from satchel.runtime.generation.options import CHAT_DEFAULTS, GenerationOptions, in_chat
from satchel.runtime.util.defaults import BATCH_ROWS
from satchel.runtime.util.progress import progress_bar

if TYPE_CHECKING:
    from satchel.runtime.generation.generator import Generator
    from satchel.runtime.generation.request import Request
    from satchel.runtime.generation.result import Generation


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What holds for each line that says nothing else: options, whether prompts are raw, and the template's name."""

    options: Mapping[str, Any]
    raw: bool
    template: str | None = None

    def raw_of(self, line: PromptLine) -> bool:
        """Whether the text of a line is used without the chat template."""
        return not isinstance(line.prompt, Chat) and (self.raw if line.raw is None else line.raw)

    def template_of(self, line: PromptLine) -> str | None:
        """The name of the chat template of a line; None for the default choice."""
        own = line.prompt.template if isinstance(line.prompt, Chat) else None
        return self.template if own is None else own

    def options_of(self, line: PromptLine) -> GenerationOptions:
        """The effective options of a line."""
        given = {**self.options, **line.options}
        if not self.raw_of(line):
            given = in_chat(given)
        base = {} if self.raw_of(line) else CHAT_DEFAULTS
        options = GenerationOptions(**{**base, **self.options}).updated(line.options)
        return dataclasses.replace(options, grammar=given.get("grammar"))


class Tally:
    """Counts and times of the lines of one run."""

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
    """Answer the lines of `args.input`; `options` are those of the command line. Returns 1 if some failed.

    Raises SatchelError for an input, output or bundle that cannot be used, and for wrong options of the command line.
    """
    from satchel.runtime.bundle.reader import read_bundle
    from satchel.runtime.generation.templates.chat_template import template_files

    lines = read_lines(_read(args.input, args.output))
    bundle = read_bundle(args.bundle, require_signature=args.require_signature)
    defaults = Defaults(stored_rules(bundle, options) | options, args.raw or not template_files(bundle), args.template)
    defaults.options_of(PromptLine(0, 0, "")).check_all(bundle.manifest.model.vocab_size)
    context = args.max_context or bundle.manifest.model.max_context
    common = (bundle.fingerprint, context, args.force_batch)
    digests = {line.number: request_digest(line, defaults, common) for line in lines}
    to_file = args.output not in (None, STANDARD)
    with AnswerFile(Path(args.output), lines, digests) if to_file else PrintedAnswers() as answers:
        pending = [line for line in lines if line.number not in answers.done]
        if not args.quiet:
            for message in _beginning(args, len(lines), len(pending), answers.stale):
                print(message, file=sys.stderr)
        failed = answers.failed
        if pending:
            tally = answer_lines(open_generator(), pending, defaults, digests, args, answers)
            failed += tally.failed
            if not args.quiet:
                print(tally, file=sys.stderr)
    if failed:
        place = f"of {args.output}" if to_file else "of standard output"
        print(f'satchel: {failed} of {len(lines)} prompts failed: see "error" in the rows {place}', file=sys.stderr)
    return 1 if failed else 0


def request_digest(line: PromptLine, defaults: Defaults, common: Sequence[Any]) -> str:
    """A digest of everything an answer depends on: the prompt and effective options of a line, and shared settings."""
    prompt = dataclasses.asdict(line.prompt) if isinstance(line.prompt, Chat) else line.prompt
    request: list[Any] = [line.error]
    if line.error is None:
        options = defaults.options_of(line)
        fields = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
        grammar = fields.pop("grammar")
        fields |= {} if grammar is None else {"grammar": dataclasses.astuple(grammar)}
        fields |= {"logit_bias": dict(options.logit_bias), "template": defaults.template_of(line)}
        request = [*common, prompt, defaults.raw_of(line), fields]
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode("ascii")).hexdigest()[:32]


def answer_lines(
    generator: Generator,
    lines: Sequence[PromptLine],
    defaults: Defaults,
    digests: Mapping[int, str],
    args: argparse.Namespace,
    answers: AnswerFile | PrintedAnswers,
) -> Tally:
    """Write a row for each line: first for those that cannot run, then for the others as they end.

    A row is what the line gives alone, whatever else is in its batch. Raises SatchelError where a row cannot be
    written.
    """
    tokenizer = generator.need_tokenizer()
    tally = Tally()
    runnable: list[PromptLine] = []
    requests: list[Request] = []

    with progress_bar(len(lines), "answering", " prompts", shown=not args.quiet) as bar:

        def write(line: PromptLine, row: dict[str, Any]) -> None:
            answers.write(row | {"request": digests[line.number]})
            bar.update(1)

        def fail(line: PromptLine, message: str) -> None:
            tally.failed += 1
            write(line, {"id": line.id, "error": located(line.number, message)})

        for line in lines:
            try:
                requests.append(_request(generator, line, defaults))
            except SatchelError as error:
                fail(line, str(error))
            else:
                runnable.append(line)
        running = generator.run_requests(
            requests, rows=args.batch or BATCH_ROWS, force_batch=args.force_batch, kv_cache_mib=args.kv_cache_mib
        )
        for index, outcome in running:
            if isinstance(outcome, SatchelError):
                fail(runnable[index], str(outcome))
            else:
                tally.add(outcome)
                write(runnable[index], answer_json(runnable[index].id, outcome, tokenizer))
    return tally


def _request(generator: Generator, line: PromptLine, defaults: Defaults) -> Request:
    """The request of a line. Raises SatchelError if it is invalid."""
    from satchel.runtime.generation.request import Request

    if line.prompt is None:
        raise PromptError(str(line.error))
    options = defaults.options_of(line)
    options.check_all(generator.engine.vocabulary, f"line {line.number}")
    if isinstance(line.prompt, Chat):
        chat = line.prompt
        ids = generator.encode_chat(
            chat.messages, tools=chat.tools, arguments=chat.arguments, template=defaults.template_of(line)
        )
        return Request(ids, options)
    if defaults.raw_of(line):
        return Request(line.prompt, options)
    return Request(generator.encode_chat(line.prompt, template=defaults.template_of(line)), options)


def _read(source: str, target: str | None) -> bytes:
    if source == STANDARD:
        return sys.stdin.buffer.read()
    path = Path(source)
    try:
        if target not in (None, STANDARD) and Path(target).exists() and path.samefile(target):
            raise PromptError(f"--output {target}: is also the file of --input: choose another path")
        return path.read_bytes()
    except OSError as error:
        raise PromptError(f"--input {source}: cannot be read ({error.strerror})") from None


def _beginning(args: argparse.Namespace, total: int, pending: int, stale: int) -> Iterator[str]:
    if stale:
        yield f"{stale} answers in {args.output} are to another request or of another bundle: they are computed again"
    if not total:
        yield f"there are no prompts in {args.input}"
    elif not pending:
        yield f"all {total} prompts are answered already"
    elif pending < total:
        yield f"resuming: {total - pending} of {total} prompts are answered"
