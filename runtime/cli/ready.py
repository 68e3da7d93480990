"""What happens before `run` and `chat` open BUNDLE: a checkpoint is exported, and a bundle specialized if asked to."""

from __future__ import annotations

import argparse
from pathlib import Path

from satchel.runtime.cli import custom_flags
from satchel.runtime.errors import SatchelError


def add_flag(parser: argparse.ArgumentParser) -> None:
    """Add --specialize and --no-specialize."""
    parser.add_argument(
        "--specialize",
        action=argparse.BooleanOptionalAction,
        help="make the bundle ready for this machine before anything else, or not at all (default: in the background "
        "when it is first used)",
    )


def make_ready(args: argparse.Namespace) -> None:
    """Specialize BUNDLE first where --specialize is given. Raises SatchelError."""
    if not args.specialize:
        return
    if args.require_signature is not None:
        raise SatchelError("--specialize with --require-signature: no signature covers what it makes: remove one")
    from satchel.runtime.optimize.prepare import prepare
    from satchel.runtime.util.progress import stage_printer

    shown = not args.quiet
    prepare(
        Path(args.bundle),
        threads=args.threads,
        custom=custom_flags.custom_of(args),
        shown=shown,
        progress=stage_printer(shown=shown),
        waiting=lambda: None,
    )
