"""Commands under mpiexec: the first rank runs the command, and the others follow it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from satchel.runtime.bundle.ranks import NCCL, is_cut
from satchel.runtime.errors import SatchelError
from satchel.runtime.util.sizes import decimal

LEADABLE = ("run", "chat", "serve", "bench", "eval", "profile", "verify", "embed")
"""Commands that several ranks can run together."""

TIMED = ("run", "bench", "profile")
"""Those after which a line says how long ranks have exchanged numbers."""


Run = Callable[[argparse.Namespace], int]


def together(args: argparse.Namespace, command: Run) -> Run:
    """The command itself, or where BUNDLE is cut for several ranks, of which this process is one, that of all."""
    if not any(is_cut(path) for path, _ in _bundles(args)):
        return command
    from satchel.runtime.cli.guardian import guarded

    return lambda args: guarded(lambda: run(args, command))


def _bundles(args: argparse.Namespace) -> list[tuple[str, str]]:
    """The path of each BUNDLE, and the name of its model."""
    given = [getattr(args, "bundle", None), *(getattr(args, "bundles", None) or ())]
    named = [each.rpartition("=") for each in given if isinstance(each, str)]
    return [(path, name or Path(path).name) for name, _, path in named]


def run(args: argparse.Namespace, command: Run) -> int:
    """Run a command on all ranks together. Returns its exit code; other ranks return 0 when the first one has ended.

    Raises SatchelError: the command or its flags are not for several ranks, or they do not fit together.
    """
    from satchel.runtime.execution.engine import follow_rank, join_ranks, rank_traffic
    from satchel.runtime.ort.open_bundle import open_bundle
    from satchel.runtime.ort.session import SessionSettings, prepare_process

    ((path, name), *others) = _bundles(args)
    if args.command not in LEADABLE or others:
        raise SatchelError(f"{path}: is cut for several ranks, which run {', '.join(LEADABLE)} of one model only")
    world = join_ranks(Path(path))
    if world.collectives == NCCL:
        from satchel.runtime.cli import in_step

        return in_step.run(args, command, world)
    if getattr(args, "threads", None) is None:
        args.threads = world.threads
    if world.rank:
        bundle = open_bundle(world.folder, require_signature=args.require_signature)
        prepare_process(args.threads)
        follow_rank(world, bundle, SessionSettings(threads=args.threads, verbose=args.verbose))
        return 0
    args.specialize = False
    if getattr(args, "bundles", None):
        args.bundles = [f"{name}={world.folder}"]
    else:
        args.bundle = str(world.folder)
    try:
        code = command(args)
    finally:
        world.stop()
    if not args.quiet and args.command in TIMED:
        found = rank_traffic()
        print(
            f"{len(world.members)} ranks: {found.seconds:.2f} s of exchange, waiting for others included: "
            f"{found.calls:,} exchanges, {decimal(found.bytes)} sent",
            file=sys.stderr,
        )
    return code
