"""`satchel specialize`: makes a bundle ready for this machine, so that it loads and runs faster."""

from __future__ import annotations

import argparse
import sys

MIB = 1 << 20


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `satchel specialize`."""
    parser.description = (
        "Write optimised graphs and weights in the form that this processor's kernels want into the bundle. They are "
        "mapped at load. They fit this ONNX Runtime on processors with the same extensions; elsewhere the bundle's "
        "portable graphs run, as before."
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
    parser.add_argument("--remove", action="store_true", help="take out what an earlier call added")


def main(args: argparse.Namespace) -> int:
    """Specialise a bundle, and print what it took."""
    import time
    import warnings

    from satchel.runtime import session
    from satchel.runtime.bundle import open_bundle
    from satchel.runtime.errors import SatchelWarning
    from satchel.runtime.progress import stage_printer
    from satchel.runtime.specializing.specialize import remove, specialize

    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SatchelWarning)  # files that do not fit are replaced
        bundle = open_bundle(args.bundle, progress=not args.quiet)
    if args.remove:
        remove(bundle)
        return 0
    session.share_thread_pool(args.threads)
    progress = stage_printer(shown=not args.quiet)
    made = specialize(bundle, int8_prefill=args.prefill == "int8", threads=args.threads, progress=progress).specialized
    if made is not None and not args.quiet:
        size = sum(record.bytes for record in made.files.values())
        print(
            f"{args.bundle}: specialised for {made.processor}, ONNX Runtime {made.onnxruntime}: {size / MIB:,.0f} MiB "
            f"more on disk, in {time.perf_counter() - started:.1f} s",
            file=sys.stderr,
        )
    return 0
