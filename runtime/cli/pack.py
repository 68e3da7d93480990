"""`satchel pack`: packs a bundle and the runner into one file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `satchel pack`."""
    parser.description = (
        "Pack a bundle and the runner into one file. python FILE 'prompt' runs it wherever numpy, onnxruntime and "
        "a tokenizer library are; every command takes it as BUNDLE. Weights are not compressed, and are mapped from "
        "the file. Specialized graphs are left out, since they are for one kind of machine."
    )
    parser.epilog = "example:\n  satchel pack out/smollm2-int8 -o smollm2.pyz"
    parser.add_argument("bundle", metavar="BUNDLE", help="a folder made by satchel export")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, required=True, help="the file to write (.pyz)")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")


def main(args: argparse.Namespace) -> int:
    """Pack, and print the file's size, or one JSON object."""
    import os
    import warnings

    from satchel.runtime.bundle.atomic_write import check_target
    from satchel.runtime.bundle.reader import read_bundle
    from satchel.runtime.errors import SatchelError, SatchelWarning
    from satchel.runtime.ort.open_bundle import open_bundle
    from satchel.runtime.tools.pack import pack
    from satchel.runtime.util.progress import waiting
    from satchel.runtime.util.sizes import decimal

    check_target(args.output, "--output")
    if os.path.lexists(args.output) and not args.force:
        raise SatchelError(f"--output {args.output}: already exists: choose another path, or replace it with --force")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SatchelWarning)  # about specialized graphs, which are left out
        bundle = open_bundle(
            args.bundle, progress=not args.quiet, require_signature=args.require_signature, custom=None
        )
    with waiting("packing", shown=not args.quiet):
        pack(bundle, args.output)
    size, digest = args.output.stat().st_size, read_bundle(args.output).digest
    if args.json:
        print(json.dumps({"bundle": args.bundle, "output": str(args.output), "bytes": size, "digest": digest}))
    elif not args.quiet:
        left = "; specialized graphs stay behind: the file gets its own when it first runs"
        print(f"{args.output}: {decimal(size)}, digest {digest}{left if bundle.manifest.specialized else ''}")
    return 0
