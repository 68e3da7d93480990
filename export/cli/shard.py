"""`satchel shard`: cuts a bundle for several ranks, which run it together over MPI."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from satchel.runtime.bundle.ranks import COLLECTIVES, MPI, NCCL

if TYPE_CHECKING:
    from satchel.graphs.shard.shard import Division

EXAMPLE = """\
example:
  satchel shard BUNDLE --tensor-parallel 2 -o OUT
  satchel shard BUNDLE --tensor-parallel 3 --shares 2,1,1 -o OUT
  satchel shard BUNDLE --pipeline-parallel 2 -o OUT
  satchel shard BUNDLE --tensor-parallel 2 --pipeline-parallel 2 -o OUT
  satchel shard CUDA_BUNDLE --tensor-parallel 2 --collectives nccl -o OUT"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.description = (
        "Cut a bundle for several devices or processes, which run it together over MPI: the heads of attention, the "
        "channels of MLPs and the vocabulary are divided among them, or the layers, or both, and each gets a bundle of "
        "its own. "
        "`mpiexec -n N satchel chat OUT` runs them."
    )
    parser.epilog = EXAMPLE
    parser.add_argument("bundle", metavar="BUNDLE", help="a folder made by satchel export")
    parser.add_argument("-o", "--output", metavar="OUT", type=Path, required=True, help="the folder to create")
    add_division(parser)
    parser.add_argument("--force", action="store_true", help="replace OUT, if it was made by this command")


def add_division(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how to cut."""
    parser.add_argument(
        "--tensor-parallel", metavar="N", type=int, help="among how many ranks each layer is divided (default: 1)"
    )
    parser.add_argument(
        "--pipeline-parallel",
        metavar="M",
        type=int,
        help="among how many stages the layers are divided, each of N ranks (default: 1)",
    )
    parser.add_argument(
        "--shares",
        metavar="A,B,...",
        type=_shares,
        help="what part of each layer each rank gets, or of all layers each stage, in proportion (default: equal)",
    )
    parser.add_argument(
        "--wire", choices=("float32", "int8"), default="float32",
        help="how ranks exchange activations; int8 takes a quarter of the bytes and rounds (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--collectives", choices=COLLECTIVES, default=MPI,
        help="what exchanges them: mpi for bundles for cpu; nccl for those for cuda, whose graphs then have ONNX "
        "Runtime's AllReduce and AllGather, which few builds of it have (default: %(default)s)",
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

    division = division_of(args)
    bundle = open_bundle(args.bundle, progress=not args.quiet, require_signature=args.require_signature, custom=None)
    cut_bundle(bundle.folder, division, args.output, force=args.force, quiet=args.quiet)
    return 0


def is_asked(args: argparse.Namespace) -> bool:
    """Whether a bundle is to be cut."""
    return args.tensor_parallel is not None or args.pipeline_parallel is not None


def division_of(args: argparse.Namespace) -> Division:
    """How to cut. Raises SatchelError where the flags do not say that."""
    from satchel.graphs.shard.shard import Division
    from satchel.runtime.errors import SatchelError
    from satchel.runtime.kernels import library

    counts = {"--tensor-parallel": args.tensor_parallel, "--pipeline-parallel": args.pipeline_parallel}
    given = {flag: count for flag, count in counts.items() if count is not None}
    if not given:
        raise SatchelError("say how to cut the bundle: --tensor-parallel N, --pipeline-parallel M, or both")
    for flag, count in given.items():
        if count < 1 or (count == 1 and len(given) == 1):
            raise SatchelError(f"{flag} {count}: give 2 or more")
    shares = {flag: (1.0,) * (count or 1) for flag, count in counts.items()}
    if args.shares is not None:
        if len(given) > 1:
            raise SatchelError(
                "--shares: are of ranks with --tensor-parallel and of stages with --pipeline-parallel: with both, each "
                "gets an equal part"
            )
        (flag,) = given
        if len(args.shares) != given[flag]:
            raise SatchelError(f"--shares: {len(args.shares)} numbers for {flag} {given[flag]}: give one for each")
        shares[flag] = args.shares
    if max(map(len, shares.values())) == 1:
        raise SatchelError("one rank and one stage are the whole bundle: give 2 or more of either")
    if args.collectives == NCCL and (args.pipeline_parallel or 1) > 1:
        raise SatchelError("--collectives nccl: sums are over all ranks: leave --pipeline-parallel out")
    if args.collectives == NCCL and args.wire != "float32":
        raise SatchelError(f"--wire {args.wire}: NCCL sends numbers as the graph has them: leave it out")
    stages = shares["--pipeline-parallel"]
    return Division(shares["--tensor-parallel"], library.VERSION, args.wire, stages, args.collectives)


def cut_bundle(folder: Path, division: Division, output: Path, *, force: bool = False, quiet: bool = False) -> None:
    """Cut a bundle that was checked into a folder that is there once it is whole.

    Raises:
        SatchelError: The bundle cannot be cut, or the folder cannot be written.
    """
    import sys

    from satchel.export.writing.bundle_writer import write_adapter
    from satchel.export.writing.publish import staged
    from satchel.graphs.shard.shard import AdapterFiles, shard_bundle
    from satchel.runtime.bundle.atomic_write import cannot_write
    from satchel.runtime.bundle.ranks import RANKS_NAME
    from satchel.runtime.bundle.reader import read_bundle
    from satchel.runtime.execution.adapters import Adapters

    def say(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr)

    try:
        with staged(output, force, RANKS_NAME) as stage:
            bundle = read_bundle(folder)
            files = AdapterFiles(Adapters(bundle).tensors, write_adapter)
            layout = shard_bundle(bundle, division, stage, files, say)
    except OSError as error:
        raise cannot_write(output, "-o", error) from None
    flags = " --provider cuda" if layout.collectives == NCCL else ""
    say(f"{output}: start it with mpiexec -n {len(layout.digests)} satchel run {output}{flags}")
