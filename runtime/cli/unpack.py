"""`satchel unpack`: extracts a packed bundle."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `satchel unpack`."""
    parser.description = "Extract the bundle in a packed file into a new folder, byte for byte as it was packed."
    parser.epilog = "example:\n  satchel unpack smollm2.pyz -o out/smollm2"
    parser.add_argument("bundle", metavar="BUNDLE", help="a file made by satchel pack")
    parser.add_argument("-o", "--output", metavar="FOLDER", type=Path, required=True, help="the folder to create")
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")


def main(args: argparse.Namespace) -> int:
    """Extract, and print the name of the folder, or one JSON object."""
    from satchel.runtime.ort.open_bundle import open_bundle
    from satchel.runtime.tools.pack import unpack
    from satchel.runtime.util.progress import waiting

    bundle = open_bundle(args.bundle, progress=not args.quiet, require_signature=args.require_signature, custom=None)
    with waiting("unpacking", shown=not args.quiet):
        unpack(bundle, args.output)
    if args.json:
        print(json.dumps({"bundle": args.bundle, "output": str(args.output), "digest": bundle.digest}))
    elif not args.quiet:
        print(f"{args.output}: {len(bundle.packed or ())} files, digest {bundle.digest}")
    return 0
