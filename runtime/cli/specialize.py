"""`satchel specialize`: makes a bundle ready for this machine, so that it loads and runs faster."""

from __future__ import annotations

import argparse
import json
import sys

from satchel.runtime.cli import custom_flags

MIB = 1 << 20


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `satchel specialize`."""
    parser.description = (
        "Make a bundle load and run faster on this machine: write optimized graphs, and weights in the form that this "
        "processor's kernels want, into its folder. They fit this version of ONNX Runtime on processors with the same "
        "extensions; elsewhere the bundle's portable graphs run, as before."
    )
    parser.epilog = "example:\n  satchel specialize out/smollm2-int8"
    parser.add_argument("bundle", metavar="BUNDLE", help="a folder made by satchel export")
    parser.add_argument("--threads", metavar="N", type=int, help="CPU threads (default: one per physical core)")
    parser.add_argument(
        "--prefill",
        choices=("stored", "int8"),
        default="stored",
        help="weights of prefill: as they are stored, or int8 made of those in 4 bits, which is faster for more memory "
        "and disk, and a little less exact (default %(default)s)",
    )
    parser.add_argument(
        "--decode",
        choices=("auto", "stored", "blocks"),
        default="auto",
        help="weights of decode: as they are stored, which prefill has too; the same int8 numbers in blocks, which "
        "some processors multiply faster, for the memory of the products' weights once more; or the faster of both as "
        "timed here, blocks only where a step takes less than 0.95 of the time, and only of bundles in which decode "
        "has a session of its own, as int8 (default %(default)s)",
    )
    parser.add_argument(
        "--kernels",
        choices=("auto", "own", "onnxruntime"),
        default="auto",
        help="what multiplies and attends: satchel's own kernels, in one graph for both phases, where they are built "
        "and the processor has AVX-512 VNNI; ONNX Runtime's; or the faster of both as timed here, ONNX Runtime's where "
        "--prefill or --decode asks for a form of theirs (default %(default)s)",
    )
    custom_flags.add_library_flag(parser)
    parser.add_argument("--remove", action="store_true", help="take out what an earlier call added")
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")


def main(args: argparse.Namespace) -> int:
    """Specialize a bundle, and print what it took, or one JSON object."""
    import time
    import warnings

    from satchel.runtime.bundle import strict_json
    from satchel.runtime.errors import SatchelWarning
    from satchel.runtime.optimize.blocks import blocks_bytes
    from satchel.runtime.optimize.specialize import remove, specialize
    from satchel.runtime.ort import session
    from satchel.runtime.ort.open_bundle import open_bundle
    from satchel.runtime.util.progress import stage_printer

    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SatchelWarning)  # files that do not fit are replaced
        bundle = open_bundle(
            args.bundle,
            progress=not args.quiet,
            require_signature=args.require_signature,
            custom=custom_flags.custom_of(args),
        )

    def say(line: str) -> None:
        if not args.quiet:
            print(f"{args.bundle}: {line}", file=sys.stderr)

    if args.remove:
        manifest = remove(bundle)
    else:
        session.share_thread_pool(args.threads)
        manifest = specialize(
            bundle,
            int8_prefill=args.prefill == "int8",
            decode=args.decode,
            kernels=args.kernels,
            threads=args.threads,
            progress=stage_printer(shown=not args.quiet),
            say=say,
        )
    made, seconds = manifest.specialized, round(time.perf_counter() - started, 1)
    size = 0 if made is None else sum(record.bytes for record in made.files.values())
    if args.json:
        specialized = None if made is None else strict_json.to_json(made)
        print(json.dumps({"bundle": args.bundle, "specialized": specialized, "bytes": size, "seconds": seconds}))
    elif made is not None:
        own = blocks_bytes(bundle) / MIB if made.decode_blocks else 0
        memory = f", at least {own:,.0f} MiB more in memory for decode alone" if own else ""
        say(
            f"specialized for {made.processor}, ONNX Runtime {made.onnxruntime}: {size / MIB:,.0f} MiB more on disk"
            f"{memory}, in {seconds} s"
        )
    return 0
