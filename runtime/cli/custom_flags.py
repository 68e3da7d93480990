"""The flags for custom passes and operators, of all commands that run a bundle. Standard library only."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from satchel.runtime.bundle.reader import Bundle
    from satchel.runtime.ort.custom_ops import Custom


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add --custom-ops, --no-custom-ops and --no-custom-passes."""
    add_library_flag(parser)
    parser.add_argument(
        "--no-custom-ops",
        dest="custom_operators",
        action="store_false",
        help="run the graphs without custom operators",
    )
    parser.add_argument(
        "--no-custom-passes",
        dest="custom_passes",
        action="store_false",
        help="run the graphs without the passes of export --pass",
    )


def add_library_flag(parser: argparse.ArgumentParser) -> None:
    """Add --custom-ops alone."""
    parser.add_argument(
        "--custom-ops",
        metavar="LIBRARY",
        type=Path,
        action="append",
        help="a shared library of operators that the bundle was exported with; repeatable",
    )


def custom_of(args: argparse.Namespace) -> Custom:
    """The custom libraries, operators and passes that a parsed command line chose."""
    from satchel.runtime.ort.custom_ops import Custom

    return Custom(
        tuple(args.custom_ops or ()), getattr(args, "custom_operators", True), getattr(args, "custom_passes", True)
    )


def open_bundle_of(args: argparse.Namespace) -> Bundle:
    """Open the bundle that a parsed command line names, to run it. Raises BundleError."""
    from satchel.runtime.ort.open_bundle import open_bundle

    return open_bundle(
        args.bundle, progress=not args.quiet, require_signature=args.require_signature, custom=custom_of(args)
    )
