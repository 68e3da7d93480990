"""`satchel pack`: packs a bundle and the runner into one file, or a bundle into an OCI image layout."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `satchel pack`."""
    parser.description = (
        "Pack a bundle and the runner into one file. python FILE 'prompt' runs it wherever numpy, onnxruntime and "
        "a tokenizer library are; every command takes it as BUNDLE. Weights are not compressed, and are mapped from "
        "the file. Specialized graphs are left out, since they are for one kind of machine. With --oci, the bundle "
        "becomes a folder that tools for container registries copy to a registry and back (OCI image layout, CNCF "
        "ModelPack)."
    )
    parser.epilog = (
        "example:\n  satchel pack out/smollm2-int8 -o smollm2.pyz\n  satchel pack out/smollm2-int8 --oci -o smollm2-oci"
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="a folder made by satchel export")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, required=True, help="the file to write (.pyz)")
    parser.add_argument(
        "--oci", action="store_true", help="write an OCI image layout, a new folder, without the runner"
    )
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
    from satchel.runtime.tools.oci import pack_oci
    from satchel.runtime.tools.pack import pack
    from satchel.runtime.util.progress import waiting
    from satchel.runtime.util.sizes import decimal

    if args.oci and args.force:
        raise SatchelError("--force: does not go with --oci, which makes a new folder: remove the old one first")
    if not args.oci:
        check_target(args.output, "--output")
    if os.path.lexists(args.output) and not args.force:
        instead = "" if args.oci else ", or replace it with --force"
        raise SatchelError(f"--output {args.output}: already exists: choose another path{instead}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SatchelWarning)  # about specialized graphs, which are left out
        bundle = open_bundle(
            args.bundle, progress=not args.quiet, require_signature=args.require_signature, custom=None
        )
    facts: dict[str, object] = {"bundle": args.bundle, "output": str(args.output)}
    with waiting("packing", shown=not args.quiet):
        if args.oci:
            facts["oci_manifest"] = pack_oci(bundle, args.output)
            size, digest = sum(path.stat().st_size for path in args.output.rglob("*") if path.is_file()), bundle.digest
        else:
            pack(bundle, args.output)
            size, digest = args.output.stat().st_size, read_bundle(args.output).digest
    if args.json:
        print(json.dumps({**facts, "bytes": size, "digest": digest}))
    elif not args.quiet:
        left = "; specialized graphs stay behind: it gets its own when it first runs"
        print(f"{args.output}: {decimal(size)}, digest {digest}{left if bundle.manifest.specialized else ''}")
    return 0
