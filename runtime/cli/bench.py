"""`satchel bench`: measures prefill and decode speed, load time and memory of a bundle."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from satchel.runtime.cli import custom_flags, provider_flags, ready
from satchel.runtime.errors import PromptError

if TYPE_CHECKING:
    from satchel.runtime.bundle.reader import Bundle
    from satchel.runtime.execution.engine import Engine
    from satchel.runtime.generation.speculation import Speculation
    from satchel.runtime.ort.providers import ProviderChoice
    from satchel.runtime.tools.bench.bandwidth import Bandwidth
    from satchel.runtime.tools.bench.benchmark import Run, Summary, Workload

PROMPT_TOKENS = 512
PLOTTED_LENGTHS = (128, 256, 512, 1024, 2048)
"""Prompt lengths of `--plot` without `--prompt-lengths`, as far as they fit."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `satchel bench`."""
    parser.description = (
        "Measure the prefill and decode speed of a bundle, its load time and its memory. The prompt is random tokens, "
        "and EOS is ignored. Up to 16 tokens are run as an untimed warm-up. ttft is the time to first token: from the "
        "token ids of the prompt to the first token chosen. load is the time from the first import until the bundle is "
        "ready, once per process."
    )
    parser.epilog = "example:\n  satchel bench out/smollm2-fp32 --prompt-tokens 512 --new-tokens 128 --threads 2 --json"
    parser.add_argument("bundle", metavar="BUNDLE", help="made by satchel export (a folder) or satchel pack (a file)")
    parser.add_argument("-p", "--prompt-tokens", metavar="N", type=int, help=f"prompt length (default {PROMPT_TOKENS})")
    parser.add_argument(
        "-n", "--new-tokens", metavar="N", type=int, default=128, help="tokens to decode (default %(default)s)"
    )
    parser.add_argument(
        "--runs", metavar="N", type=int, default=1, help="timed runs, each on a fresh cache; shows medians (default 1)"
    )
    parser.add_argument(
        "--batch",
        metavar="N",
        type=int,
        default=1,
        help="sequences: prompts are prefilled one after another, then all are decoded together, in one run per step "
        "if that is batch-invariant; speeds are totals over all sequences, ttft ends when each has its first token "
        "(default 1)",
    )
    parser.add_argument(
        "--adapter", metavar="NAME", help="one of the bundle's adapters (default: none, the base model)"
    )
    parser.add_argument(
        "--prompt-lengths",
        metavar="N,N,...",
        help="measure prefill of each of these prompt lengths and decode after it, instead of --prompt-tokens",
    )
    parser.add_argument(
        "--plot",
        metavar="FILE",
        type=Path,
        help="plot both speeds over --prompt-lengths as .png or .svg (default 128 to 2048, as far as they fit; needs "
        "matplotlib)",
    )
    parser.add_argument(
        "--bandwidth",
        action=argparse.BooleanOptionalAction,
        help="then measure the memory bandwidth in a separate process, and the share of it that decode reaches "
        "(default: on, unless --json or another provider than cpu is given)",
    )
    provider_flags.add_threads(parser)
    parser.add_argument("--vocabulary", metavar="N", type=int, help="draw prompt ids below N (default: all)")
    ready.add_speculation(parser, default="off")
    custom_flags.add_flags(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")
    parser.add_argument(
        "--report", metavar="FILE", type=Path, help="write the figures, the machine and all versions as JSON"
    )
    provider_flags.add_flags(parser)


def main(args: argparse.Namespace) -> int:
    """Measure, and print a small table or one JSON object."""
    started = time.perf_counter()  # the import of numpy and ONNX Runtime is part of the load time
    given = _checked_lengths(args)
    from satchel.runtime.bundle.atomic_write import atomic_write, check_target
    from satchel.runtime.execution.engine import Engine
    from satchel.runtime.ort import session
    from satchel.runtime.tools.bench.benchmark import Workload, check_workload, summarize, warm_up
    from satchel.runtime.util.memory import peak_rss_mib, pss_mib
    from satchel.runtime.util.progress import waiting
    from satchel.runtime.util.terminal import tell_written

    shown = not args.quiet
    if args.plot is not None:
        from satchel.runtime.tools.bench.speed_plot import check_plot, write_plot

        check_plot(args.plot)
    if args.report is not None:
        check_target(args.report, "--report")
    choice = provider_flags.choice_of(args)
    session.prepare_process(args.threads)
    bundle = custom_flags.open_bundle_of(args)
    lengths = _lengths(args, given, bundle)
    vocabulary = bundle.manifest.model.vocab_size if args.vocabulary is None else args.vocabulary
    workloads = [Workload(length, args.new_tokens, vocabulary, args.batch, args.adapter) for length in lengths]
    for workload in workloads:
        check_workload(workload, bundle.manifest)
    with waiting("opening the bundle", shown=shown):
        engine = Engine.open(bundle, choice, args.threads, verbose=args.verbose)
        speculation = _speculation(args, engine, choice)
    engine.adapters.check(args.adapter)
    load = time.perf_counter() - started

    several = given is not None or args.plot is not None
    if several and not args.json:
        print(_row(("prompt", "prefill tokens/s", "ttft s", "decode tokens/s"), args.runs))
    with waiting("warming up", shown=shown):
        warm_up(engine, workloads[0])
    summaries = []
    for workload in workloads:
        summaries.append(summarize(_timed_runs(engine, workload, args.runs, shown, speculation)))
        if several and not args.json:
            print(_row((str(workload.prompt_tokens), *_cells(summaries[-1], args.runs)), args.runs), flush=True)
    figures = {"load": load, "rss_mb": peak_rss_mib(), "pss_mb": pss_mib()}
    if not args.json:
        if not several:
            _show_run(workloads[0], summaries[0], args.runs)
        print(f"load     {load:10.3f} s")
        print(f"memory   {_memory(figures['pss_mb'], figures['rss_mb'])}", flush=True)
    share = None
    if args.bandwidth or (args.bandwidth is None and args.provider == "cpu" and not args.json):
        share = _shares(engine, workloads, summaries, shown)
    found = _as_json(args, workloads, summaries, figures, share, several)
    if args.json:
        print(json.dumps(found))
    elif share is not None:
        _show_bandwidth(*share, workloads, several)
    if args.report is not None:
        atomic_write(args.report, json.dumps(_report(args, found), indent=1) + "\n", "--report")
        tell_written(args.report, shown=shown)
    if args.plot is not None:
        threads = session.default_threads() if args.threads is None else args.threads
        title = f"{bundle.folder.resolve().name}, batch {args.batch}, threads {threads}, runs {args.runs}"
        with waiting("drawing the plot", shown=shown):
            write_plot(args.plot, title, lengths, summaries)
        tell_written(args.plot, shown=shown)
    return 0


def _checked_lengths(args: argparse.Namespace) -> list[int] | None:
    """The values of `--prompt-lengths`, or None. Raises PromptError for values that are invalid for every bundle."""
    from satchel.runtime.generation.speculation import check_mode

    check_mode(args.speculate, args.draft)
    if args.speculate != "off" and args.batch > 1:
        raise PromptError(f"--speculate {args.speculate} with --batch {args.batch}: drafts are for one sequence")
    for option, value in (("--runs", args.runs), ("--batch", args.batch)):
        if value < 1:
            raise PromptError(f"{option} {value}: must be 1 or more")
    if args.bandwidth and args.provider != "cpu":
        raise PromptError(f"--bandwidth with --provider {args.provider}: it measures that of the CPU: leave one out")
    if args.prompt_lengths is None:
        return None
    if args.prompt_tokens is not None:
        raise PromptError("--prompt-lengths and --prompt-tokens are mutually exclusive: leave one out")
    parts = [part.strip() for part in args.prompt_lengths.split(",")]
    if not all(part.isascii() and part.isdecimal() and len(part) < 10 and int(part) > 0 for part in parts):
        raise PromptError(
            f"--prompt-lengths {args.prompt_lengths}: must be numbers of 1 or more with commas, such as 128,512"
        )
    return [int(part) for part in parts]


def _lengths(args: argparse.Namespace, given: list[int] | None, bundle: Bundle) -> list[int]:
    """The prompt lengths to measure. Raises PromptError for those that do not fit the context of the bundle."""
    longest = bundle.manifest.model.max_context - args.new_tokens
    limit = f"this bundle's context holds {bundle.manifest.model.max_context}"
    if given is not None:
        if max(given) > longest:
            raise PromptError(
                f"--prompt-lengths {max(given)}: with {args.new_tokens} new tokens this takes "
                f"{max(given) + args.new_tokens} positions, and {limit}: give smaller numbers"
            )
        return given
    if args.plot is None or args.prompt_tokens is not None:
        return [PROMPT_TOKENS if args.prompt_tokens is None else args.prompt_tokens]
    fitting = [length for length in PLOTTED_LENGTHS if length <= longest]
    if not fitting:
        raise PromptError(
            f"--plot: {PLOTTED_LENGTHS[0]} and {args.new_tokens} new tokens are too many, {limit}: --prompt-lengths"
        )
    return fitting


def _speculation(args: argparse.Namespace, engine: Engine, choice: ProviderChoice) -> Speculation | None:
    """What drafts, if --speculate says so."""
    if args.speculate == "off":
        return None
    from satchel.runtime.generation.draft_model import DraftModel
    from satchel.runtime.generation.speculation import Speculation, warn_without_effect

    warn_without_effect(engine, args.speculate, args.draft)
    model = None
    if args.draft is not None:
        model = DraftModel.open(
            args.draft, engine.bundle, choice, args.threads, verbose=args.verbose,
            require_signature=args.require_signature,
        )  # fmt: skip
    return Speculation(engine, model)


def _timed_runs(
    engine: Engine, workload: Workload, count: int, shown: bool, speculation: Speculation | None
) -> list[Run]:
    from satchel.runtime.tools.bench.benchmark import timed_run
    from satchel.runtime.util.progress import waiting

    runs = []
    for number in range(1, count + 1):
        of = "" if count == 1 else f", run {number} of {count}"
        with waiting(f"measuring {workload.prompt_tokens} + {workload.new_tokens} tokens{of}", shown=shown):
            runs.append(timed_run(engine, workload, speculation))
    return runs


def _memory(now: float | None, peak: float | None) -> str:
    known = [(figure, name) for figure, name in ((now, "now (PSS)"), (peak, "peak (RSS)")) if figure is not None]
    text = ", ".join(f"{figure:.1f} MiB {name}" for figure, name in known) or "not reported on this system"
    return " " * max(10 - text.index(" "), 0) + text


def _show_run(workload: Workload, summary: Summary, runs: int) -> None:
    median, lowest, highest = summary.median, summary.lowest, summary.highest
    of = "" if runs == 1 else f"; median of {runs} runs"

    def tokens(count: int, total: float) -> str:
        if workload.batch == 1:
            return f"({count} tokens{of})"
        return f"({workload.batch} x {count} tokens, {total / workload.batch:.1f} each{of})"

    def between(low: str, high: str) -> str:
        return "" if runs == 1 else f"{low} to {high}  "

    for name, count in (("prefill", workload.prompt_tokens), ("decode", workload.new_tokens)):
        total, low, high = (getattr(run, name) for run in (median, lowest, highest))
        print(f"{name:8} {total:10.1f} tokens/s  {between(f'{low:.1f}', f'{high:.1f}')}{tokens(count, total)}")
        if name == "decode" and median.drafted:
            print(f"drafts   {median.drafted:10.0f} tokens, {median.accepted:.0f} accepted and as many runs saved")
        if name == "prefill":
            span = between(f"{lowest.ttft:.3f}", f"{highest.ttft:.3f}")
            print(f"ttft     {median.ttft:10.3f} s  {span}".rstrip())


def _cells(summary: Summary, runs: int) -> list[str]:
    """The cells of a row of the table of prompt lengths: prefill, ttft and decode."""
    cells = []
    for name, digits in (("prefill", 1), ("ttft", 3), ("decode", 1)):
        middle, low, high = (getattr(run, name) for run in (summary.median, summary.lowest, summary.highest))
        spread = "" if runs == 1 else f" ({low:.{digits}f} to {high:.{digits}f})"
        cells.append(f"{middle:.{digits}f}{spread}")
    return cells


def _row(cells: Sequence[str], runs: int) -> str:
    width = 18 if runs == 1 else 30
    return f"{cells[0]:>8}" + "".join(f"{cell:>{width}}" for cell in cells[1:])


def _shares(
    engine: Engine, workloads: Sequence[Workload], summaries: Sequence[Summary], shown: bool
) -> tuple[Bandwidth, list[dict[str, float]]]:
    """The bandwidth of the machine; for each workload the bytes that a decode step reads and the share it reaches."""
    from satchel.runtime.execution.kv_cache import position_bytes
    from satchel.runtime.tools.bench.bandwidth import measure_in_child
    from satchel.runtime.tools.bench.decode_traffic import cache_positions, weight_bytes
    from satchel.runtime.util.progress import waiting

    with waiting("measuring the memory bandwidth", shown=shown):
        found = measure_in_child()
    bundle, shares = engine.bundle, []
    for workload, summary in zip(workloads, summaries, strict=True):
        positions = workload.prompt_tokens + (workload.new_tokens + 1) / 2  # mean over the steps
        positions = cache_positions(bundle, positions)
        manifest = bundle.manifest
        kept = (positions * position_bytes(bundle.kv_cache) + manifest.state_bytes) * workload.batch
        runs = 1 if workload.batch == 1 or engine.invariant_with(workload.adapter) else workload.batch
        adapter = sum(tensor.nbytes for tensor in engine.adapters.tensors(workload.adapter).values())
        step = runs * (weight_bytes(bundle, workload.batch // runs) + adapter) + kept
        per_second = step * summary.median.decode / workload.batch
        shares.append({"bytes_per_step": round(step), "bandwidth_share": per_second / (found.gb_per_second * 1e9)})
    return found, shares


def _show_bandwidth(
    found: Bandwidth, shares: Sequence[dict[str, float]], workloads: Sequence[Workload], several: bool
) -> None:
    from satchel.runtime.util.sizes import decimal

    reached = [
        f"{share['bandwidth_share']:.0%} with {decimal(share['bytes_per_step'])} a step"
        + (f" at {workload.prompt_tokens}" if several else "")
        for share, workload in zip(shares, workloads, strict=True)
    ]
    print(f"bandwidth{found.gb_per_second:10.1f} GB/s, of which decode reaches {', '.join(reached)}")


def _as_json(
    args: argparse.Namespace,
    workloads: Sequence[Workload],
    summaries: Sequence[Summary],
    figures: dict[str, float | None],
    share: tuple[Bandwidth, list[dict[str, float]]] | None,
    several: bool,
) -> dict[str, Any]:
    found, shares = share or (None, [{} for _ in workloads])
    points = [
        {**_point(summary, args.runs, workload.batch), **extra}
        for workload, summary, extra in zip(workloads, summaries, shares, strict=True)
    ]
    bandwidth = {} if found is None else {"bandwidth": dataclasses.asdict(found)}
    if not several:
        speeds = {name: points[0].pop(name) for name in ("prefill", "decode")}
        return {**speeds, **figures, **points[0], **bandwidth}
    rows = [
        {"prompt_tokens": workload.prompt_tokens, **point} for workload, point in zip(workloads, points, strict=True)
    ]
    return {"prompt_lengths": rows, "new_tokens": args.new_tokens, **figures, **bandwidth}


def _report(args: argparse.Namespace, figures: dict[str, Any]) -> dict[str, Any]:
    """The figures of `--json`, with what ran them."""
    from satchel.runtime.evaluation.trial import shared
    from satchel.runtime.tools.doctor import examine

    run = {name: getattr(args, name) for name in ("threads", "runs", "batch", "new_tokens", "provider")}
    machine = {finding.name: finding.facts for finding in shared(examine(args.bundle))}
    return {"bench": {**run, **figures}, "machine": machine}


def _point(summary: Summary, runs: int, batch: int) -> dict[str, Any]:
    def speeds(run: Run, parts: int) -> dict[str, float]:
        return {"prefill": run.prefill / parts, "decode": run.decode / parts}

    point: dict[str, Any] = {**speeds(summary.median, 1), "ttft": summary.median.ttft}
    if summary.highest.drafted:
        point |= {"drafted_tokens": summary.median.drafted, "accepted_tokens": summary.median.accepted}
    if batch > 1:
        point |= {"batch": batch, "per_sequence": speeds(summary.median, batch)}
    if runs > 1:
        lowest, highest = dataclasses.asdict(summary.lowest), dataclasses.asdict(summary.highest)
        names = [name for name in lowest if name not in ("drafted", "accepted")]
        point |= {"runs": runs, "spread": {name: [lowest[name], highest[name]] for name in names}}
    return point
