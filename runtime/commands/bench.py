"""`satchel bench`: measures prefill and decode speed, load time and memory of a bundle."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time

from satchel.runtime.defaults import PROVIDER


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `satchel bench`."""
    parser.description = "Measure a bundle: batch 1, random prompt tokens, then greedy tokens that no end token stops."
    parser.epilog = "example:\n  satchel bench out/smollm2-fp32 --prompt-tokens 512 --new-tokens 128 --threads 2 --json"
    parser.add_argument("bundle", metavar="BUNDLE", help="a folder made by satchel export")
    parser.add_argument("--prompt-tokens", metavar="N", type=int, default=512, help="prompt length (%(default)s)")
    parser.add_argument("--new-tokens", metavar="N", type=int, default=128, help="tokens to decode (%(default)s)")
    parser.add_argument("--threads", metavar="N", type=int, help="CPU threads (default: one per physical core)")
    parser.add_argument("--vocabulary", metavar="N", type=int, help="prompt ids are below N (default: the bundle's)")
    parser.add_argument("--provider", default=PROVIDER, help="execution provider (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")


def main(args: argparse.Namespace) -> int:
    """Measure, and print a small table or one JSON object."""
    started = time.perf_counter()  # before numpy and ONNX Runtime: their import is part of the load time
    from satchel.runtime import session
    from satchel.runtime.benchmark import Workload, measure
    from satchel.runtime.bundle import open_bundle
    from satchel.runtime.engine import Engine

    session.share_thread_pool(args.threads)
    bundle = open_bundle(args.bundle, progress=not args.quiet)
    engine = Engine.open(bundle, args.provider, args.threads, verbose=args.verbose)
    workload = Workload(args.prompt_tokens, args.new_tokens, args.vocabulary or engine.vocabulary)
    figures = measure(engine, workload, load=time.perf_counter() - started)
    if args.json:
        print(json.dumps(dataclasses.asdict(figures)))
        return 0
    print(f"prefill  {figures.prefill:10.1f} tokens/s  ({workload.prompt_tokens} tokens)")
    print(f"decode   {figures.decode:10.1f} tokens/s  ({workload.new_tokens} tokens)")
    print(f"load     {figures.load:10.3f} s")
    print(f"memory   {figures.pss_mb:10.1f} MiB now (PSS), {figures.rss_mb:.1f} MiB at most (RSS)")
    return 0
