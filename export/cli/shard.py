"""`satchel shard`: cuts a bundle for several ranks, which run it together over MPI."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLE = """\
example:
  satchel shard BUNDLE --tensor-parallel 2 -o OUT
  satchel shard BUNDLE --tensor-parallel 3 --shares 2,1,1 -o OUT"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.description = (
        "Cut a bundle for several devices or processes, which run it together over MPI: the heads of attention, the "
        "channels of MLPs and the vocabulary are divided among them, and each gets a bundle of its own. "
        "`mpiexec -n N satchel chat OUT` runs them."
    )
    parser.epilog = EXAMPLE
    parser.add_argument("bundle", metavar="BUNDLE", help="a folder made by satchel export")
    parser.add_argument("-o", "--output", metavar="OUT", type=Path, required=True, help="the folder to create")
    add_division(parser, required=True)
    parser.add_argument("--force", action="store_true", help="replace OUT, if it was made by this command")


def add_division(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Add the flags that say how to cut."""
    parser.add_argument(
        "--tensor-parallel", metavar="N", type=int, required=required, help="among how many ranks each layer is divided"
    )
    parser.add_argument(
        "--shares",
        metavar="A,B,...",
        type=_shares,
        help="what part each rank gets, in proportion (default: equal parts)",
    )
    parser.add_argument(
        "--wire", choices=("float32", "int8"), default="float32",
        help="how ranks exchange activations; int8 takes a quarter of the bytes and rounds (default: %(default)s)",
    )  # fmt: skip


def _shares(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: give numbers with commas between, such as 2,1,1") from None
    if not all(0 < share < float("inf") for share in found):
        raise argparse.ArgumentTypeError(f"{text}: each must be above 0")
    return found


def main(args: argparse.Namespace) -> int:
    """Cut the bundle, and print where its parts are."""
    from satchel.runtime.ort.open_bundle import open_bundle

    shares = shares_of(args)
    bundle = open_bundle(args.bundle, progress=not args.quiet, require_signature=args.require_signature, custom=None)
    cut_bundle(bundle.folder, shares, args.wire, args.output, force=args.force, quiet=args.quiet)
    return 0


def shares_of(args: argparse.Namespace) -> tuple[float, ...]:
    """The shares of all ranks. Raises SatchelError where they are not as many as there are ranks."""
    from satchel.runtime.errors import SatchelError

    if args.tensor_parallel < 2:
        raise SatchelError(f"--tensor-parallel {args.tensor_parallel}: give 2 or more")
    shares: tuple[float, ...] = args.shares or (1.0,) * args.tensor_parallel
    if len(shares) != args.tensor_parallel:
        raise SatchelError(f"--shares: {len(shares)} numbers for {args.tensor_parallel} ranks: give one for each")
    return shares


def cut_bundle(
    folder: Path, shares: tuple[float, ...], wire: str, output: Path, *, force: bool = False, quiet: bool = False
) -> None:
    """Cut a bundle that was checked into a folder that is there once it is whole.

    Raises:
        SatchelError: The bundle cannot be cut, or the folder cannot be written.
    """
    import sys

    from satchel.export.writing.publish import staged
    from satchel.graphs.shard.shard import Division, shard_bundle
    from satchel.runtime.bundle.atomic_write import cannot_write
    from satchel.runtime.bundle.ranks import RANKS_NAME
    from satchel.runtime.bundle.reader import read_bundle
    from satchel.runtime.kernels import library

    def say(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr)

    try:
        with staged(output, force, RANKS_NAME) as stage:
            shard_bundle(read_bundle(folder), Division(shares, library.VERSION, wire), stage, say)
    except OSError as error:
        raise cannot_write(output, "-o", error) from None
    say(f"{output}: start it with mpiexec -n {len(shares)} satchel run {output}")
