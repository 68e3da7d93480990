"""`satchel run`: generates text from a prompt, and prints nothing else; or from many prompts in JSON lines."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from satchel.runtime.cli import ready, run_flags
from satchel.runtime.errors import PromptError, SatchelWarning
from satchel.runtime.generation.generation_config import stored_rules
from satchel.runtime.generation.options import CHAT_DEFAULTS, given_in, in_chat
from satchel.runtime.util.sizes import binary

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from satchel.runtime.generation.generator import Generator
    from satchel.runtime.generation.result import Generation

    Ids = NDArray[np.int64]


configure = run_flags.configure


def main(args: argparse.Namespace) -> int:
    """Generate and print text; one line of figures goes to standard error."""
    run_flags.check(args)
    options = given_in(args)
    if args.input is not None:
        from satchel.runtime.cli import answers

        return answers.main(args, options, lambda: ready.open_generator(args, run_flags.prefix_cache_mib(args)))
    if args.save_state is not None:
        from satchel.runtime.bundle.atomic_write import check_target

        check_target(args.save_state, "--save-state")
    prompt = _read_standard_input(args) if args.prompt is None else args.prompt
    generator = ready.open_generator(args, run_flags.prefix_cache_mib(args))
    if args.load_state is not None:
        generator.load_state(args.load_state, progress=not args.quiet, adapter=args.adapter)
    if not prompt:
        raise PromptError("the prompt is empty: give some text")
    templated = generator.has_template and not args.raw
    ids = generator.encode_chat(prompt, template=args.template) if templated else generator.encode(prompt)
    options = stored_rules(generator.engine.bundle, options, beams=args.beams is not None) | options
    if templated:
        options = in_chat(options)
    if args.num_return_sequences is None and args.beams is None:
        result = _run_single(args, generator, ids, CHAT_DEFAULTS | options if templated else options, templated)
        if args.save_state is not None:
            _save_state(args, generator, [*ids.tolist(), *result.token_ids])
    else:
        if templated:
            options = {"max_new_tokens": CHAT_DEFAULTS["max_new_tokens"]} | options
        _run_several(args, generator, ids, options, templated)
    return 0


def _run_single(
    args: argparse.Namespace, generator: Generator, ids: Ids, options: dict[str, Any], templated: bool
) -> Generation:
    from satchel.runtime.cli.generation_json import single_json
    from satchel.runtime.util.progress import progress_bar

    with (
        progress_bar(len(ids), "reading the prompt", " tokens", shown=not args.quiet) as bar,
        generator.stream(ids, progress=_until(len(ids), bar), **options) as stream,
    ):
        if args.json:
            result = stream.result()
            bar.close()
            _print_json(args, generator, ids, single_json(result, generator.need_tokenizer()), templated)
            return result
        try:
            for piece in stream:
                bar.close()
                print(piece, end="", flush=True)
        finally:
            bar.close()
            print(flush=True)
        result = stream.result()
    if not args.quiet:
        print(_figures([result], result.decode_speed, templated, _state_bytes(generator)), file=sys.stderr)
    return result


def _save_state(args: argparse.Namespace, generator: Generator, ids: list[int]) -> None:
    saved = generator.save_state(args.save_state, ids, progress=not args.quiet, adapter=args.adapter)
    if saved < len(ids) - 1:  # the last token was never fed
        warnings.warn(
            f"--save-state {args.save_state}: only the first {saved} of {len(ids)} tokens are saved: "
            "raise --prefix-cache-mib to save all",
            SatchelWarning,
            stacklevel=2,
        )


def _run_several(
    args: argparse.Namespace, generator: Generator, ids: Ids, options: dict[str, Any], templated: bool
) -> None:
    from satchel.runtime.cli.generation_json import decode_speed, several_json
    from satchel.runtime.util.progress import waiting

    with waiting("generating", shown=not args.quiet):
        if args.num_return_sequences is not None:
            results = generator.samples(ids, args.num_return_sequences, **options)
        else:
            search = {"early_stopping": args.early_stopping}
            if args.length_penalty is not None:
                search["length_penalty"] = args.length_penalty
            results = generator.beam_search(ids, args.beams, **search, **options)
    if args.json:
        _print_json(args, generator, ids, several_json(results, generator.need_tokenizer()), templated)
        return
    print("\n\n".join(result.text for result in results), flush=True)
    if not args.quiet:
        print(_figures(results, decode_speed(results), templated, _state_bytes(generator)), file=sys.stderr)


def _print_json(
    args: argparse.Namespace, generator: Generator, ids: Ids, document: dict[str, Any], templated: bool
) -> None:
    from satchel.runtime.cli.generation_json import logprobs_json
    from satchel.runtime.util.progress import waiting

    document["chat_template"] = templated
    if args.prompt_logprobs:
        with waiting("scoring the prompt", shown=not args.quiet):
            entries = generator.prompt_logprobs(ids, args.logprobs or 0, args.adapter)
        document["prompt_logprobs"] = logprobs_json(ids.tolist(), entries, generator.need_tokenizer())
    print(json.dumps(document, ensure_ascii=False))


def _until(total: int, bar: Any) -> Callable[[int], None]:
    """A callback that advances a bar, and clears it once it is full."""
    done = 0

    def update(count: int) -> None:
        nonlocal done
        done += count
        bar.update(count)
        if done >= total:
            bar.close()

    return update


def _read_standard_input(args: argparse.Namespace) -> str:
    if sys.stdin.isatty() and not args.quiet:
        print("reading the prompt from standard input: Ctrl-D ends it", file=sys.stderr)
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise PromptError(f"standard input is not UTF-8 text (byte {error.start}): convert it to UTF-8") from None


def _state_bytes(generator: Generator) -> int:
    return generator.engine.bundle.manifest.state_bytes


def _speculation(results: Sequence[Generation]) -> str:
    """How many drafted tokens were right, each of which saved a run of the graph; empty without any draft."""
    drafted = sum(result.drafted_tokens for result in results)
    accepted = sum(result.accepted_tokens for result in results)
    return f", {accepted} of {drafted} drafted tokens accepted, {accepted} runs saved" if drafted else ""


def _figures(results: Sequence[Generation], speed: float, templated: bool, state_bytes: int) -> str:
    first, states = results[0], state_bytes * len(results)
    reused = f", {first.reused_tokens} reused" if first.reused_tokens else ""
    reasons = Counter(result.finish_reason for result in results)
    ends = ", ".join(reason if len(results) == 1 else f"{reason} {count}" for reason, count in reasons.items())
    texts = "" if len(results) == 1 else f" in {len(results)} texts"
    speculation, cache = _speculation(results), sum(result.kv_bytes for result in results) - states
    kept = [f"{name} {binary(size)}" for name, size in (("KV cache", cache), ("states", states)) if size]
    return (
        f"{'chat template' if templated else 'raw'}: prompt {first.prompt_tokens} tokens at "
        f"{first.prefill_speed:.1f} tokens/s{reused}, new {sum(result.new_tokens for result in results)} tokens{texts} "
        f"at {speed:.1f} tokens/s ({ends}){speculation}, {', '.join(kept)}"
    )
