"""`satchel profile`: shows the time per operator, layer and node."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from satchel.runtime.cli import custom_flags, provider_flags
from satchel.runtime.errors import SatchelError

if TYPE_CHECKING:
    from satchel.runtime.tools.profiling.profiling import PhaseProfile

TRACE_OPTION = "--trace"
OUTSIDE = "before: embedding, positions, masks; after: final norm and head"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `satchel profile`."""
    parser.description = (
        "Run a prompt of random tokens, then new tokens, under ONNX Runtime's profiler, and show the time per "
        "operator, layer and node. The profiler slows the run down: use satchel bench to measure speed."
    )
    parser.epilog = "example:\n  satchel profile out/smollm2-int8 --prompt-tokens 256 --threads 2 --trace trace.json"
    parser.add_argument("bundle", metavar="BUNDLE", help="made by satchel export (a folder) or satchel pack (a file)")
    parser.add_argument(
        "-p", "--prompt-tokens", metavar="N", type=int, default=512, help="prompt length (default %(default)s)"
    )
    parser.add_argument(
        "-n", "--new-tokens", metavar="N", type=int, default=32, help="tokens to decode (default %(default)s)"
    )
    provider_flags.add_threads(parser)
    parser.add_argument("--top", metavar="N", type=int, default=10, help="slowest nodes to list (default %(default)s)")
    custom_flags.add_flags(parser)
    parser.add_argument(
        TRACE_OPTION, metavar="FILE", type=Path, help="also write a trace of all runs for Perfetto or chrome://tracing"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")
    provider_flags.add_flags(parser)


def main(args: argparse.Namespace) -> int:
    """Profile, and print tables or one JSON object."""
    from satchel.runtime.bundle.atomic_write import atomic_write, check_target
    from satchel.runtime.ort import session
    from satchel.runtime.tools.profiling.layer_names import layer_count
    from satchel.runtime.tools.profiling.profiling import record, summarize, trace
    from satchel.runtime.util.progress import waiting
    from satchel.runtime.util.terminal import tell_written

    if args.top < 0:
        raise SatchelError(f"--top {args.top}: must be 0 or more")
    if args.trace is not None:
        check_target(args.trace, TRACE_OPTION)
    choice = provider_flags.choice_of(args)
    session.prepare_process(args.threads)
    bundle = custom_flags.open_bundle_of(args)
    settings = session.SessionSettings(choice, args.threads, args.verbose)
    layers = layer_count(bundle.manifest)
    with waiting("profiling", shown=not args.quiet):
        recordings = record(bundle, settings, args.prompt_tokens, args.new_tokens)
        if args.trace is not None:
            atomic_write(args.trace, trace(recordings, layers), TRACE_OPTION)
            tell_written(args.trace, shown=not args.quiet)
        profiles = {phase: summarize(recording, layers, args.top) for phase, recording in recordings.items()}
    if args.json:
        threads = session.default_threads() if args.threads is None else args.threads
        print(json.dumps(_as_json(args, threads, profiles)))
    else:
        print("\n".join(_lines(args, profiles)))
    return 0


def _as_json(args: argparse.Namespace, threads: int, profiles: Mapping[str, PhaseProfile]) -> dict[str, object]:
    import onnxruntime

    facts = {"bundle": args.bundle, "onnxruntime": onnxruntime.__version__, "threads": threads}
    work = {"prompt_tokens": args.prompt_tokens, "new_tokens": args.new_tokens}
    return {**facts, **work, **{phase: dataclasses.asdict(profile) for phase, profile in profiles.items()}}


def _lines(args: argparse.Namespace, profiles: Mapping[str, PhaseProfile]) -> list[str]:
    from satchel.runtime.util.terminal import columns, printable

    lines = []
    steps = {"prefill": f"a prompt of {args.prompt_tokens:,} tokens", "decode": "a token"}
    for phase, profile in profiles.items():
        lines.append(f"{phase}: {steps[phase]} takes {profile.ms:,.2f} ms in {_runs(profile.runs)}, {_mean(profile)}")
        rows: list[tuple[str, ...]] = [("operator", "kernels", "ms", "share")]
        rows += [(printable(row.operator), f"{row.count:g}", *_time(row.ms, row.share)) for row in profile.operators]
        between = profile.ms - profile.kernels_ms
        rows.append(("between kernels", "", *_time(between, between / max(profile.ms, 1e-9))))
        lines += [*_indented(columns(rows, right=(1, 2, 3))), ""]
    rows = [("layer", *(title for phase in profiles for title in (f"{phase} ms", "share")))]
    rows += _layer_rows(list(profiles.values()))
    lines += [*columns(rows, right=range(1, 5)), OUTSIDE, *map(_placed, profiles, profiles.values())]
    for phase, profile in profiles.items() if args.top else ():
        rows = [("node", "operator", "layer", "ms", "share")]
        rows += [
            (printable(row.name), printable(row.operator), str(row.layer), *_time(row.ms, row.share))
            for row in profile.nodes
        ]
        lines += ["", f"slowest nodes in {phase}", *_indented(columns(rows, right=(3, 4)))]
    return lines


def _layer_rows(profiles: Sequence[PhaseProfile]) -> list[tuple[str, ...]]:
    """A row per layer, with the time and share of each phase."""
    by_layer = [{row.layer: row for row in profile.layers} for profile in profiles]
    longest = max(profiles, key=lambda profile: len(profile.layers))
    rows = []
    for layer in [row.layer for row in longest.layers]:
        found = [table.get(layer) for table in by_layer]
        cells = [cell for row in found for cell in (_time(row.ms, row.share) if row else ("", ""))]
        rows.append((str(layer), *cells))
    return rows


def _placed(phase: str, profile: PhaseProfile) -> str:
    outside = max(1 - profile.by_name - profile.by_position, 0.0)
    return (
        f"{phase}: {profile.by_name:.1%} of the kernel time is in nodes that name their layer, "
        f"{profile.by_position:.1%} in nodes between those, {outside:.1%} outside the layers"
    )


def _runs(count: int) -> str:
    return "1 run of the graph" if count == 1 else f"{count} runs of the graph"


def _mean(profile: PhaseProfile) -> str:
    return f"mean of {profile.steps}" if profile.steps > 1 else "measured once"


def _time(ms: float, share: float) -> tuple[str, str]:
    return f"{ms:.3f}", f"{share:.1%}"


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"  {line}" for line in lines]
