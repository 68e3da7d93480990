"""`satchel specialize`: optimizes a bundle for this machine, so that it loads and runs faster."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from satchel.runtime.cli import custom_flags, provider_flags


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `satchel specialize`."""
    parser.description = (
        "Make a bundle load and run faster on this machine: write optimized graphs, and weights in the layout that "
        "this processor's kernels read, into its folder; for a packed file or a folder that cannot be written, into "
        "the user's cache. They fit this version of ONNX Runtime on processors with the same extensions; elsewhere "
        "the portable graphs run. The first run or chat does the same in the background."
    )
    parser.epilog = "example:\n  satchel specialize out/smollm2-int8"
    parser.add_argument("bundle", metavar="BUNDLE", help="made by satchel export (a folder) or satchel pack (a file)")
    provider_flags.add_threads(parser)
    parser.add_argument(
        "--kernels",
        choices=("auto", "satchel", "onnxruntime"),
        default="auto",
        help="kernels for matmuls and attention: satchel's own, if they are built and the processor supports them; "
        "ONNX Runtime's; or the faster of both, as timed on this machine (default %(default)s)",
    )
    parser.add_argument(
        "--layout",
        choices=("auto", "stored", "groups", "int8"),
        default="auto",
        help="weight layout for ONNX Runtime's kernels: as stored; a copy in groups of inputs for decode, faster on "
        "some processors for more memory; an int8 copy of 4-bit weights for prefill, faster for more memory and "
        "slightly less accurate; or auto, the faster of stored and groups as timed here (default %(default)s)",
    )
    custom_flags.add_library_flag(parser)
    parser.add_argument(
        "--force", action="store_true", help="specialize again even if the bundle is specialized already"
    )
    parser.add_argument("--remove", action="store_true", help="remove the specialized graphs of this bundle")
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")


def main(args: argparse.Namespace) -> int:
    """Specialize a bundle, and print what was made and what runs each phase, or one JSON object."""
    import time

    from satchel.runtime.bundle import strict_json
    from satchel.runtime.bundle.oms import OMS_NAME
    from satchel.runtime.errors import SatchelError
    from satchel.runtime.optimize.prepare import prepare, remove
    from satchel.runtime.ort import session
    from satchel.runtime.tools.doctor import phases
    from satchel.runtime.util.progress import stage_printer
    from satchel.runtime.util.sizes import binary

    path, started = Path(args.bundle), time.perf_counter()

    def say(line: str) -> None:
        if not args.quiet:
            print(f"{args.bundle}: {line}", file=sys.stderr)

    if args.require_signature is not None:
        raise SatchelError("--require-signature: a signature does not cover specialized graphs: leave it out")
    if (path / OMS_NAME).exists() and not args.remove:
        raise SatchelError(
            f"{args.bundle}: is signed by {OMS_NAME}, which would no longer hold: specialize a copy without it, or "
            "run the bundle, which keeps specialized graphs in the user's cache"
        )
    if args.remove:
        remove(path, custom_flags.custom_of(args))
        document = {"bundle": args.bundle, "made": False, "specialized": None, "bytes": 0}
        say("runs its portable graphs again")
    else:
        session.prepare_process(args.threads)
        found = prepare(
            path,
            layout=args.layout,
            kernels=args.kernels,
            force=args.force,
            threads=args.threads,
            custom=custom_flags.custom_of(args),
            shown=not args.quiet,
            progress=stage_printer(shown=not args.quiet),
            say=say,
            waiting=lambda: say("another process is specializing it: waiting"),
        )
        specialized = found.bundle.specialized
        size = 0 if specialized is None else sum(record.bytes for record in specialized.files.values())
        document = {
            "bundle": args.bundle,
            "made": found.made,
            "folder": str(found.bundle.folder),
            "specialized": None if specialized is None else strict_json.to_json(specialized),
            "bytes": size,
        }
        where = "" if found.bundle.folder == path else f" in {found.bundle.folder}"
        seconds = time.perf_counter() - started
        made = f"specialized for this machine, {binary(size)}{where}, in {seconds:.1f} s"
        say(made if found.made else f"already specialized for this machine{where} (--force makes it again)")
        if specialized is not None:
            say("; ".join(f"{phase}: {runs}" for phase, runs in phases(found.bundle).items()))
            if found.made and specialized.variants:
                say("texts may differ from before: other kernels round differently, within the bundle's certificate")
    if args.json:
        print(json.dumps({**document, "seconds": round(time.perf_counter() - started, 1)}))
    return 0
