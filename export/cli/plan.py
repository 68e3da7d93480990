"""`satchel plan`: what a model will need and how fast it will be, before anything is exported."""

from __future__ import annotations

import argparse
import json
import math

from satchel.export.config import KV_CACHES
from satchel.export.planning.plan import MOST_DEVICES, make_plan
from satchel.export.planning.report import as_json, as_text
from satchel.export.planning.sources import PLANNED, open_model
from satchel.export.planning.speed import Machine, Network
from satchel.runtime.errors import PromptError

NETWORK, LATENCY, LENGTH = 1.0, 50.0, 512
LARGEST = 1e9
"""No figure of a device or a network, in the units of the flags, is larger."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.description = (
        "Estimate what a model will need and how fast it will be, on one device and on several. Reads sizes only: no "
        "weights are loaded, and nothing is written. Without --bandwidth this machine is measured, which takes seconds."
    )
    parser.epilog = (
        "example:\n  satchel plan model/config.json -p int4\n"
        "  satchel plan model/ -p int4 --devices 4 --memory 8 --bandwidth 10 --network 1 --latency 100"
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a config.json, a checkpoint folder, a GGUF file (needs the extra export) or a bundle",
    )
    parser.add_argument(
        "-p", "--precision", metavar="P", help=f"as satchel export: {', '.join(PLANNED)} (default {PLANNED[0]}; of a "
        "bundle, its own)",
    )  # fmt: skip
    parser.add_argument(
        "--kv-cache", metavar="FORM", help=f"as satchel export: {' or '.join(KV_CACHES)} (default {KV_CACHES[0]})"
    )
    parser.add_argument("--max-context", metavar="N", type=int, help="as satchel export: positions of the bundle")
    parser.add_argument(
        "--length", metavar="N", type=int,
        help=f"tokens in the KV cache when decode is estimated (default {LENGTH}, as far as they fit)",
    )  # fmt: skip
    parser.add_argument(
        "--devices", metavar="N", type=int,
        help=f"how many devices there are (default: the question is how many of {MOST_DEVICES} there should be)",
    )  # fmt: skip
    for flag, unit, what in (
        ("--memory", "GB", "memory of a device (default: that of this machine, if --bandwidth is not given either)"),
        ("--bandwidth", "GB/s", "memory bandwidth of a device (default: that of this machine, measured)"),
        (
            "--compute",
            "GFLOP/s",
            "float32 arithmetic of a device, for prefill (default: that of this machine, measured, if --bandwidth is "
            "not given either)",
        ),
    ):
        parser.add_argument(flag, metavar=unit, type=float, help=what)
    parser.add_argument(
        "--network",
        metavar="Gbit/s",
        type=float,
        default=NETWORK,
        help="bandwidth of a link between two devices (default %(default)g)",
    )
    parser.add_argument(
        "--latency",
        metavar="US",
        type=float,
        default=LATENCY,
        help="microseconds until a message without content arrives (default %(default)g)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")


def main(args: argparse.Namespace) -> int:
    """Plan, and print tables or one JSON object. Raises PromptError for a flag that is not possible."""
    for name in ("memory", "bandwidth", "compute", "network"):
        _check(name, getattr(args, name), above=0)
    _check("latency", args.latency, above=-1)
    if args.devices is not None and not 1 <= args.devices <= 1024:
        raise PromptError(f"--devices {args.devices}: give 1 to 1024")
    model = open_model(args.model, args.precision, args.kv_cache, args.max_context)
    if args.length is not None and not 1 <= args.length <= model.context:
        raise PromptError(f"--length {args.length}: give 1 to {model.context}, the context of the bundle")
    length = min(LENGTH, model.context) if args.length is None else args.length
    network = Network(args.network * 1e9 / 8, max(args.latency, 0) / 1e6)
    plan = make_plan(model, _machine(args), network, length, args.devices)
    print(json.dumps(as_json(plan)) if args.json else as_text(plan))
    return 0


def _check(name: str, value: float | None, above: float) -> None:
    if value is not None and not (above < value <= LARGEST and math.isfinite(value)):
        raise PromptError(
            f"--{name} {value:g}: give a number {'above 0' if above == 0 else 'from 0'} up to {LARGEST:g}"
        )


def _machine(args: argparse.Namespace) -> Machine:
    """The device of the flags; what they leave out is measured here if they do not describe another one."""
    memory = None if args.memory is None else args.memory * 1e9
    compute = None if args.compute is None else args.compute * 1e9
    if args.bandwidth is not None:
        return Machine(args.bandwidth * 1e9, compute, memory)
    from satchel.runtime.tools.bench import bandwidth
    from satchel.runtime.tools.bench.compute import Compute, measure_in_child
    from satchel.runtime.util.memory import system_memory
    from satchel.runtime.util.progress import waiting

    with waiting("measuring this machine", shown=not args.quiet and not args.json):
        found = bandwidth.measure_in_child().gb_per_second * 1e9
        reached = Compute(compute, None) if compute is not None else measure_in_child()
    total = system_memory()[0]
    return Machine(found, reached.floats, total if memory is None else memory, True, reached.int8)
