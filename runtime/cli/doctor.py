"""`satchel doctor`: checks the installation, this machine and a bundle."""

from __future__ import annotations

import argparse
import json

EXIT_BROKEN = 1


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `satchel doctor`."""
    parser.description = (
        "Show what is installed, what this machine can do, whether satchel's kernels run on it, and for a bundle "
        "whether it is specialized for this machine. Exits with 1 if something is broken."
    )
    parser.epilog = "example:\n  satchel doctor out/smollm2-int8"
    parser.add_argument("bundle", metavar="BUNDLE", nargs="?", help="made by satchel export or satchel pack")
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")


def main(args: argparse.Namespace) -> int:
    """Print a line for each finding, or one JSON object. Returns 1 if something is broken."""
    from satchel.runtime.tools.doctor import examine
    from satchel.runtime.util.terminal import printable

    findings = []
    for finding in examine(args.bundle):
        findings.append(finding)
        if not args.json:
            mark = "" if finding.works else "BROKEN: "
            print(f"{finding.name:12} {mark}{printable(finding.text)}", flush=True)
    works = all(finding.works for finding in findings)
    if args.json:
        print(json.dumps({"works": works, **{finding.name: finding.facts for finding in findings}}))
    return 0 if works else EXIT_BROKEN
