"""`satchel verify`: replays on this machine what a bundle was certified for."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from satchel.runtime.cli import custom_flags, provider_flags
from satchel.runtime.errors import BundleError

if TYPE_CHECKING:
    from satchel.runtime.bundle.certificate import Certificate
    from satchel.runtime.bundle.reader import Bundle
    from satchel.runtime.evaluation.certify import Replay

EXIT_MOVED = 1


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `satchel verify`."""
    parser.description = (
        "Check that a bundle still gives on this machine what was recorded when it was made: run the prompts of its "
        "certificate again, and compare within the margins stated there. Exits with 1 if something moved."
    )
    parser.epilog = "example:\n  satchel verify out/smollm2-fp32 --threads 2"
    parser.add_argument("bundle", metavar="BUNDLE", help="made by satchel export (a folder) or satchel pack (a file)")
    parser.add_argument("--threads", metavar="N", type=int, help="CPU threads (default: one per physical core)")
    custom_flags.add_flags(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")
    provider_flags.add_flags(parser)


def main(args: argparse.Namespace) -> int:
    """Replay, and print recorded and found figures with the verdict, or one JSON object. Returns 0 or 1."""
    from satchel.runtime.evaluation.certify import moved, replay
    from satchel.runtime.execution.engine import Engine
    from satchel.runtime.ort import session
    from satchel.runtime.ort.open_bundle import open_bundle
    from satchel.runtime.util.progress import progress_bar, waiting

    choice, shown = provider_flags.choice_of(args), not args.quiet
    bundle = open_bundle(
        args.bundle,
        progress=shown,
        require_signature=args.require_signature,
        custom=custom_flags.custom_of(args),
    )
    certificate = bundle.manifest.certificate
    if certificate is None:
        raise BundleError(f"{bundle.folder}: has no certificate: export it again without --no-certificate")
    session.share_thread_pool(args.threads)
    with waiting("opening the bundle", shown=shown):
        engine = Engine.open(bundle, choice, args.threads, verbose=args.verbose)
    replays = []
    with progress_bar(len(certificate.prompts), "replaying", " prompts", shown=shown) as bar:
        for prompt in certificate.prompts:
            replays.append(replay(engine, prompt))
            bar.update(1)
    with waiting("checking the tokenizer", shown=shown):
        lines = _moved_tokenizer(bundle) + moved(certificate, replays)
    if args.json:
        print(json.dumps(_as_json(args, certificate, replays, lines), ensure_ascii=False))
    else:
        _show(certificate, replays, lines, args.provider)
    return EXIT_MOVED if lines else 0


def _moved_tokenizer(bundle: Bundle) -> list[str]:
    """What opening the tokenizer complains of: it encodes the texts recorded at export and compares their ids."""
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
        same = f"{_same_tokens(prompt.greedy_ids, found.greedy_ids)} of {len(prompt.greedy_ids)}"
        print(f"{f'prompt {number}':15}{prompt.kl:12.5f}{found.kl:12.5f}{same:>14}")
    print(f"{'all prompts':15}{mean_kl(certificate.prompts):12.5f}{mean_kl(replays):12.5f}")
    for line in lines:
        print(f"moved: {line}")
    if not lines:
        print("holds")


def _same_tokens(recorded: Sequence[int], found: Sequence[int]) -> int:
    """How many greedy tokens are the recorded ones before the first that is not."""
    pairs = zip(recorded, found, strict=True)
    return next((step for step, (left, right) in enumerate(pairs) if left != right), len(recorded))


def _as_json(
    args: argparse.Namespace, certificate: Certificate, replays: Sequence[Replay], lines: Sequence[str]
) -> dict[str, object]:
    import onnxruntime

    from satchel.runtime.evaluation.certify import mean_kl
    from satchel.runtime.util.cpu import processor_name

    return {
        "bundle": args.bundle,
        "holds": not lines,
        "moved": list(lines),
        "kl": {"recorded": mean_kl(certificate.prompts), "found": mean_kl(replays)},
        "prompts": [
            {
                "kl": {"recorded": prompt.kl, "found": found.kl},
                "same_tokens": _same_tokens(prompt.greedy_ids, found.greedy_ids),
                "new_tokens": len(prompt.greedy_ids),
            }
            for prompt, found in zip(certificate.prompts, replays, strict=True)
        ],
        "onnxruntime": {"recorded": certificate.onnxruntime, "found": onnxruntime.__version__},
        "provider": {"recorded": certificate.provider, "found": args.provider},
        "processor": {"recorded": certificate.processor, "found": processor_name()},
    }
