"""`satchel verify`: checks the certificate of a bundle on this machine."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from satchel.runtime.cli import custom_flags, provider_flags
from satchel.runtime.errors import BundleError

if TYPE_CHECKING:
    from satchel.runtime.bundle.certificate import Certificate, GoldenPrompt
    from satchel.runtime.bundle.reader import Bundle
    from satchel.runtime.evaluation.certify import Replay

EXIT_MISMATCH = 1


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `satchel verify`."""
    parser.description = (
        "Check on this machine the accuracy that was recorded when the bundle was made: run the prompts of its "
        "certificate again, and compare with the recorded figures within the margins stated there. Exits with 1 on a "
        "mismatch."
    )
    parser.epilog = "example:\n  satchel verify out/smollm2-fp32 --threads 2"
    parser.add_argument("bundle", metavar="BUNDLE", help="made by satchel export (a folder) or satchel pack (a file)")
    provider_flags.add_threads(parser)
    custom_flags.add_flags(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")
    provider_flags.add_flags(parser)


def main(args: argparse.Namespace) -> int:
    """Print recorded and measured figures with the verdict, or one JSON object. Returns 0 or 1."""
    from satchel.runtime.evaluation.certify import mismatches, replay
    from satchel.runtime.execution.engine import Engine
    from satchel.runtime.ort import session
    from satchel.runtime.util.progress import progress_bar, waiting

    choice, shown = provider_flags.choice_of(args), not args.quiet
    bundle = custom_flags.open_bundle_of(args)
    certificate = bundle.manifest.certificate
    if certificate is None:
        raise BundleError(f"{bundle.folder}: has no certificate: export it again without --no-certificate")
    session.prepare_process(args.threads)
    with waiting("opening the bundle", shown=shown):
        engine = Engine.open(bundle, choice, args.threads, verbose=args.verbose)
    replays = []
    with progress_bar(len(certificate.prompts), "replaying", " prompts", shown=shown) as bar:
        for prompt in certificate.prompts:
            replays.append(replay(engine, prompt))
            bar.update(1)
    with waiting("checking the tokenizer", shown=shown):
        lines = _tokenizer_mismatch(bundle) + mismatches(certificate, replays)
    if args.json:
        print(json.dumps(_as_json(args, certificate, replays, lines), ensure_ascii=False))
    else:
        _show(certificate, replays, lines, args.provider)
    return EXIT_MISMATCH if lines else 0


def _tokenizer_mismatch(bundle: Bundle) -> list[str]:
    """The error of opening the tokenizer, which encodes the texts recorded at export and compares their ids."""
    from satchel.runtime.generation.tokenizer import Tokenizer

    if bundle.manifest.tokenizer is None:
        return []
    try:
        Tokenizer.open(bundle)
    except BundleError as error:
        return [f"tokenizer: {error}"]
    return []


def _show(certificate: Certificate, replays: Sequence[Replay], lines: Sequence[str], provider: str) -> None:
    import onnxruntime

    from satchel.runtime.evaluation.certify import mean_kl
    from satchel.runtime.util.cpu import processor_name

    print(f"recorded  ONNX Runtime {certificate.onnxruntime}, {certificate.provider}, {certificate.processor}")
    print(f"here      ONNX Runtime {onnxruntime.__version__}, {provider}, {processor_name()}")
    print(f"{'':15}{'KL recorded':>12}{'KL found':>12}{'same tokens':>14}")
    for number, (prompt, found) in enumerate(zip(certificate.prompts, replays, strict=True), start=1):
        same = f"{_same_tokens(prompt, found)} of {len(prompt.greedy_ids)}"
        print(f"{f'prompt {number}':15}{prompt.kl:12.5f}{found.kl:12.5f}{same:>14}")
    print(f"{'all prompts':15}{mean_kl(certificate.prompts):12.5f}{mean_kl(replays):12.5f}")
    for line in _explained(certificate, replays):
        print(line)
    for line in lines:
        print(f"MISMATCH {line}")
    if not lines:
        print("OK")


def _explained(certificate: Certificate, replays: Sequence[Replay]) -> Iterator[str]:
    """What the figures mean, and why texts that differ from the recorded ones may be within the certificate."""
    from satchel.runtime.evaluation.certify import first_difference, gap_at, mean_kl
    from satchel.runtime.util.kl import KL_MEANING, NEAR_TIES, grade, near_tie

    kl = mean_kl(replays)
    yield f"{KL_MEANING}. {kl:.5f} is {grade(kl)}."
    ties = []
    for number, (prompt, found) in enumerate(zip(certificate.prompts, replays, strict=True), start=1):
        step = first_difference(prompt, found)
        if step is not None and (gap := gap_at(prompt, found, step)) < certificate.margin.logit:
            ties.append(near_tie(number, step + 1, gap, certificate.margin.logit))
    yield from ties
    if ties:
        yield f"{NEAR_TIES}."


def _same_tokens(prompt: GoldenPrompt, found: Replay) -> int:
    """How many greedy tokens are the recorded ones, before the first that differs."""
    from satchel.runtime.evaluation.certify import first_difference

    step = first_difference(prompt, found)
    return len(prompt.greedy_ids) if step is None else step


def _as_json(
    args: argparse.Namespace, certificate: Certificate, replays: Sequence[Replay], lines: Sequence[str]
) -> dict[str, object]:
    import onnxruntime

    from satchel.runtime.evaluation.certify import mean_kl
    from satchel.runtime.util.cpu import processor_name

    return {
        "bundle": args.bundle,
        "ok": not lines,
        "mismatches": list(lines),
        "kl": {"recorded": mean_kl(certificate.prompts), "found": mean_kl(replays)},
        "prompts": [
            {
                "kl": {"recorded": prompt.kl, "found": found.kl},
                "same_tokens": _same_tokens(prompt, found),
                "new_tokens": len(prompt.greedy_ids),
            }
            for prompt, found in zip(certificate.prompts, replays, strict=True)
        ],
        "onnxruntime": {"recorded": certificate.onnxruntime, "found": onnxruntime.__version__},
        "provider": {"recorded": certificate.provider, "found": args.provider},
        "processor": {"recorded": certificate.processor, "found": processor_name()},
    }
