"""Bundles that are cut for several ranks: what each says of itself, and the file beside them that names them all.

OUT/ranks.json  OUT/rank_0/  OUT/rank_1/  ...
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from satchel.runtime.bundle import strict_json
from satchel.runtime.bundle.digest import read_content
from satchel.runtime.bundle.errors import BundleError
from satchel.runtime.bundle.strict_json import StrictJsonError

RANKS_NAME = "ranks.json"
FORMAT, VERSION = "satchel-ranks", 1
WIRES = {"float32": 32, "int8": 8}
"""How ranks exchange numbers within the layers, by name, and the bits of each number."""
MPI, NCCL = COLLECTIVES = ("mpi", "nccl")
"""The libraries that exchange them: MPI by satchel's own operators, or NCCL by those of ONNX Runtime."""
COLLECTED = {MPI: "cpu", NCCL: "cuda"}
"""The target of bundles whose parts exchange numbers so."""


@dataclass(frozen=True)
class RankSpec:
    """What part of a model a bundle is: that of `rank` of `tensor` x `stages` ranks.

    Ranks with the same number / `tensor` share the same layers, a stage. `shares` are the parts of each layer that they
    have, in proportion; `wire` is one of `WIRES`, `collectives` one of `COLLECTIVES`. `whole` is the digest of the
    bundle that was cut. `layers` are the first of the stage's layers and that behind its last; () for all.
    """

    rank: int
    tensor: int
    stages: int
    shares: tuple[float, ...]
    wire: str
    whole: str
    layers: tuple[int, ...] = ()
    collectives: str = MPI

    @property
    def ranks(self) -> int:
        """The number of all ranks."""
        return self.tensor * self.stages

    @property
    def stage(self) -> int:
        """The number of its stage."""
        return self.rank // self.tensor

    @property
    def part(self) -> int:
        """Which part of the stage's layers it has."""
        return self.rank % self.tensor


@dataclass(frozen=True)
class StageSpec:
    """A stage: its layers, from the first to in front of `end`, and the ranks that share them and sum up among
    themselves."""

    first: int
    end: int
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class RanksFile:
    """The content of `RANKS_NAME`: how many ranks share a layer, how many stages there are, and each rank's digest.

    `layout` has the stages, where there are several. Rank r has part r % `tensor` of stage r // `tensor`. `collectives`
    is one of `COLLECTIVES`.
    """

    tensor: int
    stages: int
    digests: tuple[str, ...]
    layout: tuple[StageSpec, ...] = ()
    collectives: str = MPI

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {"format": FORMAT, "version": VERSION, **strict_json.to_json(self)}


def is_cut(path: str | Path) -> bool:
    """Whether a folder holds bundles of several ranks."""
    return (Path(path) / RANKS_NAME).is_file()


def rank_folder(path: str | Path, rank: int) -> Path:
    """The bundle of a rank."""
    return Path(path) / f"rank_{rank}"


def read_ranks(path: str | Path) -> RanksFile:
    """Read the file that names the bundles of all ranks. Raises BundleError."""
    name = Path(path) / RANKS_NAME
    try:
        document = strict_json.loads(read_content(name, str(name)))
    except ValueError as error:
        raise BundleError(f"{name}: not valid JSON ({error}): cut the bundle again") from None
    known = isinstance(document, dict) and (document.pop("format", None), document.pop("version", None))
    if known != (FORMAT, VERSION):
        raise BundleError(f"{name}: not of version {VERSION}: cut the bundle again with this satchel's satchel shard")
    try:
        found: RanksFile = strict_json.from_json(RanksFile, document)
    except StrictJsonError as error:
        raise BundleError(f"{name}: {error}: cut the bundle again") from None
    if found.tensor < 1 or found.stages < 1 or len(found.digests) != found.tensor * found.stages:
        raise BundleError(f"{name}: the numbers of ranks differ: cut the bundle again")
    if found.collectives not in COLLECTIVES:
        raise BundleError(f"{name}: {found.collectives}: no known way to exchange numbers: cut the bundle again")
    return found


def check_rank(spec: RankSpec) -> None:
    """Check the numbers of a manifest's `rank`. Raises StrictJsonError."""
    right = spec.tensor >= 1 and spec.stages >= 1 and 0 <= spec.rank < spec.ranks and len(spec.shares) == spec.tensor
    right = right and (not spec.layers or (len(spec.layers) == 2 and 0 <= spec.layers[0] < spec.layers[1]))
    right = right and spec.wire in WIRES and spec.collectives in COLLECTIVES
    if not right or min(spec.shares) <= 0:
        raise StrictJsonError(f"rank: {strict_json.to_json(spec)} is no part of a model")
