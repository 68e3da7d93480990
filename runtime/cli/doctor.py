"""`satchel doctor`: checks the installation, this machine and a bundle."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from satchel.runtime.cli import provider_flags
from satchel.runtime.errors import PromptError, SatchelWarning

if TYPE_CHECKING:
    from satchel.runtime.tools.doctor import Finding

EXIT_BROKEN = 1


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `satchel doctor`."""
    parser.description = (
        "Show what is installed, what this machine can do, whether satchel's kernels run on it, and for a bundle "
        "whether it is specialized for this machine. With --report it also runs the bundle: placement of all nodes, "
        "the prompts of the certificate, and the speed of both phases at three lengths and with a batch. Exits with 1 "
        "if something is broken, and with 2 if the bundle cannot be tried at all: it does not open, or the provider is "
        "not here or not for its target."
    )
    parser.epilog = "example:\n  satchel doctor out/smollm2-int8 --report laptop.json"
    parser.add_argument("bundle", metavar="BUNDLE", nargs="?", help="made by satchel export or satchel pack")
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")
    parser.add_argument(
        "--report",
        metavar="FILE",
        type=Path,
        help="run the bundle too, and write all findings as JSON and as a page: FILE with the extensions .json and "
        ".html; no path of this machine is in them",
    )
    provider_flags.add_threads(parser)
    provider_flags.add_flags(parser)


def main(args: argparse.Namespace) -> int:
    """Print a line for each finding, or one JSON object; write the report. Returns 1 if something is broken."""
    from satchel.runtime.util.terminal import printable

    findings = []
    for finding in _findings(args):
        findings.append(finding)
        if not args.json:
            mark = "" if finding.works else "BROKEN: "
            print(f"{finding.name:12} {mark}{printable(finding.text)}", flush=True)
    works = all(finding.works for finding in findings)
    if args.json:
        print(json.dumps({"works": works, **{finding.name: finding.facts for finding in findings}}))
    if args.report is not None:
        _write(args, findings)
    return 0 if works else EXIT_BROKEN


def _findings(args: argparse.Namespace) -> Iterator[Finding]:
    """All findings. Raises SatchelError before the first of them where what is asked for cannot be done here."""
    from satchel.runtime.bundle.atomic_write import check_target
    from satchel.runtime.tools.doctor import check_provider, examine

    choice = provider_flags.choice_of(args)
    if args.report is None:
        check_provider(choice, args.bundle)
        yield from examine(args.bundle)
        return
    if args.bundle is None:
        raise PromptError(f"--report {args.report}: name the bundle that is to be tried")
    for path in _paths(args.report):
        check_target(path, "--report")
    from satchel.runtime.evaluation.trial import try_bundle
    from satchel.runtime.ort.open_bundle import open_bundle

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SatchelWarning)  # a finding says it
        bundle = open_bundle(args.bundle, progress=not args.quiet)
    check_provider(choice, args.bundle)
    works = True
    for finding in examine(args.bundle):
        works = works and finding.works
        yield finding
    if works:
        yield from try_bundle(bundle, choice, args.threads)


def _paths(report: Path) -> tuple[Path, Path]:
    """The JSON file and the page."""
    return report.with_suffix(".json"), report.with_suffix(".html")


def _write(args: argparse.Namespace, findings: list[Finding]) -> None:
    from satchel.runtime.bundle.atomic_write import atomic_write
    from satchel.runtime.evaluation.trial import as_json, as_page
    from satchel.runtime.util.terminal import tell_written

    title = f"{Path(args.bundle).resolve().name} on {args.provider}"
    for path, content in zip(_paths(args.report), (as_json(findings), as_page(findings, title)), strict=True):
        atomic_write(path, content, "--report")
        tell_written(path, shown=not args.quiet)
