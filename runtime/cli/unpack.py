"""`satchel unpack`: extracts a bundle from a packed file or an OCI image layout."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `satchel unpack`."""
    parser.description = (
        "Extract the bundle in a packed file or an OCI image layout into a new folder, byte for byte as it was packed."
    )
    parser.epilog = "example:\n  satchel unpack smollm2.pyz -o out/smollm2"
    parser.add_argument("bundle", metavar="BUNDLE", help="made by satchel pack: a file, or a folder with --oci")
    parser.add_argument("-o", "--output", metavar="FOLDER", type=Path, required=True, help="the folder to create")
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")


def main(args: argparse.Namespace) -> int:
    """Extract, and print the name of the folder, or one JSON object."""
    from satchel.runtime.ort.open_bundle import open_bundle
    from satchel.runtime.tools.oci import is_layout, unpack_oci
    from satchel.runtime.tools.pack import bundle_entries, unpack
    from satchel.runtime.util.progress import waiting

    if is_layout(args.bundle):
        with waiting("unpacking", shown=not args.quiet):
            bundle = unpack_oci(Path(args.bundle), args.output, require_signature=args.require_signature)
        _say(args, bundle.digest, len(bundle_entries(bundle)))
        return 0
    bundle = open_bundle(args.bundle, progress=not args.quiet, require_signature=args.require_signature, custom=None)
    with waiting("unpacking", shown=not args.quiet):
        unpack(bundle, args.output)
    _say(args, bundle.digest, len(bundle.packed or ()))
    return 0


def _say(args: argparse.Namespace, digest: str, files: int) -> None:
    if args.json:
        print(json.dumps({"bundle": args.bundle, "output": str(args.output), "digest": digest}))
    elif not args.quiet:
        print(f"{args.output}: {files} files, digest {digest}")
