"""`satchel check`: checks operator coverage of a bundle for an execution provider, before it ships."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HTML_OPTION = "--html"

EXAMPLE = """\
example:
  satchel check out/smollm2-cann --provider cann
  satchel check out/smollm2-cuda --provider cuda --ort-version 1.24.4 --strict --html check.html"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.description = (
        "Check which nodes of a bundle's graphs an execution provider supports, and why it does not support the "
        "others, rule by rule. Nothing is run, and the provider need not be installed. Exits with 1 if a node would "
        "fail or silently run on the CPU."
    )
    parser.epilog = EXAMPLE
    parser.add_argument("bundle", metavar="BUNDLE", help="a folder made by satchel export")
    parser.add_argument("--provider", metavar="NAME", required=True, help="cann, cuda or cpu")
    parser.add_argument(
        "--ort-version",
        metavar="V",
        help="the ONNX Runtime version to check for (default: 1.24.4 for cann, the newest known for cuda)",
    )
    parser.add_argument("--strict", action="store_true", help="exit with 1 on warnings too")
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")
    parser.add_argument(HTML_OPTION, metavar="FILE", type=Path, help="also write an HTML page with every finding")


def main(args: argparse.Namespace) -> int:
    """Check, and print a report or one JSON object. Returns 1 if the bundle is not ready."""
    from satchel.runtime.bundle.atomic_write import atomic_write, check_target
    from satchel.runtime.bundle.reader import read_bundle
    from satchel.runtime.ort.open_bundle import open_bundle
    from satchel.runtime.util.progress import waiting
    from satchel.runtime.util.terminal import tell_written

    if args.require_signature is None:
        bundle = read_bundle(args.bundle)
    else:
        bundle = open_bundle(args.bundle, progress=not args.quiet, require_signature=args.require_signature)
    if args.html is not None:
        check_target(args.html, HTML_OPTION)
    with waiting("checking the graphs", shown=not args.quiet):
        from satchel.export.checking.check import check_bundle
        from satchel.export.checking.report import as_page, as_text, is_ready
        from satchel.export.checking.tables import provider_of

        result = check_bundle(bundle, provider_of(args.provider, args.ort_version))
        if args.html is not None:
            atomic_write(args.html, as_page(result, args.strict), HTML_OPTION)
            tell_written(args.html, shown=not args.quiet)
    ready = is_ready(result, args.strict)
    if args.json:
        print(json.dumps({"ready": ready, **result.to_json()}))
    else:
        print(as_text(result, args.strict))
    return 0 if ready else 1
