"""`satchel inspect`: shows the contents of a bundle, from its manifest."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from satchel.runtime.bundle.reader import Bundle

HTML_OPTION = "--html"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `satchel inspect`."""
    parser.description = (
        "Show the contents of a bundle: sizes, the precision of each layer, the passes that made its graphs, the "
        "certificate. Reads only the manifest and file sizes. It does not run the bundle, and checks hashes only with "
        "--require-signature; satchel verify does both."
    )
    parser.epilog = "example:\n  satchel inspect out/smollm2-int8 --html bundle.html"
    parser.add_argument("bundle", metavar="BUNDLE", help="made by satchel export (a folder) or satchel pack (a file)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")
    parser.add_argument(HTML_OPTION, metavar="FILE", type=Path, help="also write an HTML page of all layers and passes")


def main(args: argparse.Namespace) -> int:
    """Inspect, and print tables or one JSON object.

    Opens the bundle with `read_bundle`: a file that is missing or cut short is an error, and gigabytes are not hashed
    to print a table.
    """
    from satchel.runtime.bundle.atomic_write import atomic_write
    from satchel.runtime.tools.inspection.inspection import inspect_bundle
    from satchel.runtime.tools.inspection.report import as_page, as_text
    from satchel.runtime.util.progress import waiting
    from satchel.runtime.util.terminal import tell_written

    with waiting("reading the manifest", shown=not args.quiet):
        found = inspect_bundle(_open(args))
        if args.html is not None:
            atomic_write(args.html, as_page(found), HTML_OPTION)
            tell_written(args.html, shown=not args.quiet)
    print(json.dumps(found.to_json()) if args.json else as_text(found))
    return 0


def _open(args: argparse.Namespace) -> Bundle:
    from satchel.runtime.bundle.reader import read_bundle
    from satchel.runtime.ort.open_bundle import open_bundle

    if args.require_signature is None:
        return read_bundle(args.bundle)
    return open_bundle(args.bundle, progress=not args.quiet, require_signature=args.require_signature, custom=None)
