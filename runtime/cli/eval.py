"""`satchel eval`: measures on a text how close the predictions of a bundle are to those of a reference."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from satchel.runtime.bundle.certificate import Window
from satchel.runtime.bundle.manifest import Manifest
from satchel.runtime.cli import custom_flags, provider_flags
from satchel.runtime.errors import BundleError, PromptError, SatchelError

if TYPE_CHECKING:
    from satchel.runtime.bundle.reader import Bundle
    from satchel.runtime.evaluation.fidelity import Fidelity, Ids, Reference
    from satchel.runtime.execution.engine import Engine
    from satchel.runtime.ort.custom_ops import Custom

PORTABLE = "portable"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `satchel eval`."""
    parser.description = (
        "Measure on a text how close the predictions of a bundle are to those of a reference, such as the model that "
        "it was made from: KL(reference || bundle) and its tail, top-1 agreement and both perplexities, for prefill "
        "and decode. Without a reference, only the perplexity of the bundle. A specialized bundle is measured with the "
        "kernels that run it here."
    )
    parser.epilog = (
        "example:\n  satchel eval out/smollm2-fp16 --text book.txt --reference SmolLM2-135M-Instruct/ --json"
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="made by satchel export (a folder) or satchel pack (a file)")
    parser.add_argument("--text", metavar="FILE", type=Path, required=True, help="the UTF-8 text to predict")
    parser.add_argument(
        "--reference",
        metavar="SOURCE",
        help="a bundle, or a checkpoint as for satchel export (needs torch and transformers); --custom-ops may name "
        "the libraries of a reference bundle too",
    )
    parser.add_argument(
        "--adapter",
        metavar="NAME",
        help="one of the bundle's adapters, and of a reference bundle's that has it too (default: the base model)",
    )
    parser.add_argument(
        "--portable",
        action="store_true",
        help="measure the portable graphs, as they run where the bundle is not specialized",
    )
    parser.add_argument(
        "--windows", metavar="N", type=int, default=Window.WINDOWS, help="max windows (default %(default)s)"
    )
    parser.add_argument(
        "--window-tokens", metavar="N", type=int, default=Window.LENGTH, help="tokens per window (default %(default)s)"
    )
    parser.add_argument(
        "--skip",
        metavar="N",
        type=int,
        default=Window.SKIP,
        help="positions not counted at its start (default %(default)s)",
    )
    provider_flags.add_threads(parser)
    custom_flags.add_flags(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")
    provider_flags.add_flags(parser)


def main(args: argparse.Namespace) -> int:
    """Measure, and print a small table or one JSON object."""
    _check_numbers(args)
    choice = provider_flags.choice_of(args)
    text = _read(args.text)
    from satchel.runtime.bundle.reader import read_bundle
    from satchel.runtime.evaluation.fidelity import evaluate
    from satchel.runtime.execution.engine import Engine
    from satchel.runtime.ort import session
    from satchel.runtime.ort.open_bundle import open_bundle
    from satchel.runtime.util.kl import FIGURES, KL_MEANING, grade
    from satchel.runtime.util.progress import progress_bar, waiting

    shown = not args.quiet
    key = args.require_signature
    ours, theirs = _custom_of_both(args, read_bundle(args.bundle, require_signature=key).manifest)
    bundle = open_bundle(args.bundle, progress=shown, require_signature=key, custom=ours)
    if args.portable:
        bundle = dataclasses.replace(bundle, specialized=None)
    with waiting("reading the text", shown=shown):
        windows = _windows(bundle, text, args)
    _check_reference(args.reference, bundle.manifest, len(windows[0]))
    session.prepare_process(args.threads)
    reference = None if args.reference is None else _open_reference(args, theirs)
    with waiting("opening the bundle", shown=shown):
        engine = Engine.open(bundle, choice, args.threads, verbose=args.verbose)
    engine.adapters.check(args.adapter)
    tokens = sum(len(window) for window in windows)
    with progress_bar(tokens, "evaluating", " tokens", shown=shown) as bar:
        fidelity = evaluate(engine, windows, reference, skip=args.skip, adapter=args.adapter, progress=bar.update)
    graphs = _graphs(engine)
    if args.json:
        print(json.dumps(_as_json(fidelity, windows, args) | {"graphs": graphs}, ensure_ascii=False))
        return 0
    print(f"{'':15}{'prefill':>14}{'decode':>14}")
    for label, field, form in FIGURES:
        values = [getattr(phase, field) for phase in (fidelity.prefill, fidelity.decode)]
        if None not in values:
            print(f"{label:15}" + "".join(f"{value:14{form}}" for value in values))
    print(f"{'graphs':15}" + "".join(f"{graphs[phase]:>14}" for phase in ("prefill", "decode")))
    kl = fidelity.prefill.kl_mean
    if kl is not None and shown:
        print(f"{KL_MEANING}. {kl:.5f} is {grade(kl)}.", file=sys.stderr)
    return 0


def _check_numbers(args: argparse.Namespace) -> None:
    if args.windows < 1:
        raise PromptError(f"--windows {args.windows}: must be 1 or more")
    if args.skip < 0:
        raise PromptError(f"--skip {args.skip}: must be 0 or more")
    if args.window_tokens < args.skip + 2:
        raise PromptError(
            f"--window-tokens {args.window_tokens}: must be at least --skip + 2, which is {args.skip + 2}"
        )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise SatchelError(f"{path}: cannot be read ({error.strerror}): give a text file") from None
    except UnicodeDecodeError as error:
        raise SatchelError(f"{path}: not UTF-8 text (byte {error.start}): convert it to UTF-8") from None


def _windows(bundle: Bundle, text: str, args: argparse.Namespace) -> list[Ids]:
    from satchel.runtime.evaluation.fidelity import cut_windows, text_ids
    from satchel.runtime.generation.tokenizer import Tokenizer

    longest = bundle.manifest.model.max_context
    if args.window_tokens > longest:
        raise PromptError(f"--window-tokens {args.window_tokens}: this bundle's context holds {longest}: ask for fewer")
    if bundle.manifest.tokenizer is None:
        raise BundleError(f"{bundle.folder}: has no tokenizer, which a text needs: export it again with --tokenizer")
    ids = text_ids(Tokenizer.open(bundle), text)
    if len(ids) < args.skip + 2:
        raise PromptError(
            f"{args.text}: has {len(ids)} tokens, and --skip {args.skip} needs at least {args.skip + 2}: "
            "give a longer text or lower --skip"
        )
    return cut_windows(ids, args.window_tokens, args.windows)


def _custom_of_both(args: argparse.Namespace, manifest: Manifest) -> tuple[Custom, Custom]:
    """The custom operators of the bundle and of its reference: each gets the libraries that it was made with.

    A library that belongs to neither goes to the bundle, which refuses it.
    """
    from satchel.runtime.bundle.reader import is_bundle, read_bundle
    from satchel.runtime.ort.custom_ops import Custom, digest_of

    given = custom_flags.custom_of(args)
    if args.reference is None or not given.libraries or not is_bundle(args.reference):
        return given, Custom()
    other = {file.sha256 for file in read_bundle(args.reference).manifest.custom_ops}
    own = {file.sha256 for file in manifest.custom_ops} if given.passes and given.operators else set()
    digests = {library: digest_of(library) for library in given.libraries}
    ours = tuple(library for library, digest in digests.items() if digest in own or digest not in other)
    theirs = tuple(library for library, digest in digests.items() if digest in other)
    return dataclasses.replace(given, libraries=ours), Custom(theirs)


def _check_reference(source: str | None, manifest: Manifest, tokens: int) -> None:
    """Raise BundleError for a reference bundle that cannot be compared, before any graph is opened."""
    from satchel.runtime.bundle.reader import is_bundle, read_bundle

    if source is None or not is_bundle(source):
        return
    other = read_bundle(source).manifest.model
    if other.vocab_size != manifest.model.vocab_size:
        raise BundleError(
            f"{source}: its vocabulary has {other.vocab_size} tokens where the bundle's has "
            f"{manifest.model.vocab_size}: give a bundle of the same model"
        )
    if other.max_context < tokens:
        raise BundleError(f"{source}: its context holds {other.max_context}: lower --window-tokens to that")


def _open_reference(args: argparse.Namespace, custom: Custom) -> Reference:
    from satchel.runtime.bundle.reader import is_bundle
    from satchel.runtime.util.progress import waiting

    label, shown = "opening the reference", not args.quiet
    if not is_bundle(args.reference):
        with waiting(label, shown=shown):  # with torch and transformers
            from satchel.export.reference import open_reference

            return open_reference(args.reference)
    from satchel.runtime.execution.engine import Engine
    from satchel.runtime.ort.open_bundle import open_bundle

    # Kernels for one machine round otherwise: what all are compared with is the same everywhere.
    bundle = dataclasses.replace(open_bundle(args.reference, progress=shown, custom=custom), specialized=None)
    with waiting(label, shown=shown):
        engine = Engine.open(bundle, threads=args.threads, verbose=args.verbose)
    same = args.adapter in {adapter.name for adapter in bundle.manifest.adapters}
    return partial(engine.score, adapter=args.adapter if same else None)


def _graphs(engine: Engine) -> dict[str, str]:
    """What was measured: the variant that runs each phase, or the portable graphs."""
    made = engine.bundle.specialized
    decode = None if made is None else made.variant("decode")
    return {"prefill": engine.scored_by or PORTABLE, "decode": decode or PORTABLE}


def _as_json(fidelity: Fidelity, windows: Sequence[Ids], args: argparse.Namespace) -> dict[str, object]:
    return {
        **dataclasses.asdict(fidelity),
        "windows": len(windows),
        "window_tokens": len(windows[0]),
        "skip": args.skip,
        "text": str(args.text),
        "bundle": args.bundle,
        "reference": args.reference,
        **({} if args.adapter is None else {"adapter": args.adapter}),
    }
