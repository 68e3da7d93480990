"""All ranks of a run: who they are, whether they fit together, and one message a step from the first to the others."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import socket
import struct
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from satchel.runtime.bundle.digest import claimed_digest, parse_manifest, read_content
from satchel.runtime.bundle.errors import BundleError
from satchel.runtime.bundle.manifest import MANIFEST_NAME
from satchel.runtime.bundle.ranks import MPI, NCCL, RanksFile, rank_folder, read_ranks
from satchel.runtime.errors import SatchelError
from satchel.runtime.execution.ranks import wire
from satchel.runtime.execution.ranks.results import Results, wait
from satchel.runtime.execution.ranks.watch import Watch
from satchel.runtime.kernels import library
from satchel.runtime.ort.collectives import lacking
from satchel.runtime.ort.session import default_threads
from satchel.runtime.util import requirements
from satchel.runtime.util.cpu import usable_cores, usable_cpus

HEADER = 4096
"""Most bytes of a message; the first 8 are the length of its text, of which the rest follows in a second message."""
NUMBERS = struct.Struct("<q8s4q")
"""A message of numbers: -1 where others have their length, the name of what to do, and its numbers."""
IS_NUMBERS = NUMBERS.pack(-1, b"", 0, 0, 0, 0)[:8]
STOP = "stop"


@dataclass(frozen=True)
class Member:
    """What each rank tells the others when it starts. `problem` is why it cannot take part, or None."""

    rank: int
    host: str
    process: int
    satchel: str
    digest: str
    problem: str | None

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


class World:
    """The ranks of this run, from the point of view of one of them."""

    def __init__(
        self, folder: Path, mpi: Any, members: list[Member], local: tuple[int, int], layout: RanksFile
    ) -> None:
        """`folder` is the bundle of this rank; `local` its number among the ranks of this machine, and their count."""
        self.folder = folder
        self.members = members
        self.device, count = local
        """The number of the device that is this rank's, where each has one."""
        self.threads = max(1, default_threads() // count)
        """A fair number of threads for it."""
        _keep_to_own_cores(self.device, count)
        self.collectives = layout.collectives
        self.rank: int = mpi.COMM_WORLD.Get_rank()
        self.lock = threading.RLock()
        """Held from a message to the end of what it starts, so that all ranks do the same in the same order."""
        self.stages = layout.stages
        self.results = Results(mpi.COMM_WORLD.Dup(), (layout.stages - 1) * layout.tensor)
        self._control, self._least = mpi.COMM_WORLD.Dup(), mpi.MIN
        self._watch = Watch(mpi.COMM_WORLD, folder / MANIFEST_NAME)
        self._stopped = False

    def tell(self, message: dict[str, Any]) -> None:
        """Send a message to all other ranks; only for the first one."""
        text = json.dumps(message).encode()
        self._send(len(text).to_bytes(8, "little") + text[: HEADER - 8])
        if len(text) > HEADER - 8:
            self._send(text[HEADER - 8 :])

    def tell_numbers(self, what: str, *numbers: int) -> None:
        """As `tell`, of up to 4 numbers: `hear` returns {"do": what, "numbers": numbers}. It takes less time."""
        self._send(NUMBERS.pack(-1, what.encode(), *numbers))

    def _send(self, data: bytes) -> None:
        # One after the other: for short messages that takes less time than a broadcast of MPI that does not block.
        for request in [self._control.Isend(data, rank) for rank in range(1, self._control.Get_size())]:
            wait(request)

    def hear(self) -> dict[str, Any]:
        """The next message of the first rank."""
        first = self._received(HEADER)
        if first[:8] == IS_NUMBERS:
            _, what, *numbers = NUMBERS.unpack_from(first)
            return {"do": what.rstrip(b"\0").decode(), "numbers": numbers, "dropped": ()}
        length = int.from_bytes(first[:8], "little")
        text = first[8 : 8 + length]
        if length > HEADER - 8:
            text += self._received(length - (HEADER - 8))
        message: dict[str, Any] = json.loads(text)
        return message

    def _received(self, most: int) -> bytes:
        buffer = bytearray(most)
        wait(self._control.Irecv(buffer, 0))
        return bytes(buffer)

    def everywhere(self, holds: bool) -> bool:
        """Whether something holds on all ranks; all call it."""
        found = np.empty(1, np.int8)
        wait(self._control.Iallreduce(np.array([holds], np.int8), found, self._least))
        return bool(found[0])

    def agree(self, number: int) -> int:
        """The number that the first rank has; all call it."""
        if self.rank:
            return int(self.hear()["number"])
        self.tell({"number": number})
        return number

    def stop(self) -> None:
        """End the run of all ranks in order. The first calls it; another one that does waits for the first."""
        if self._stopped:
            return
        self._stopped = True
        if self.rank:
            self.hear()
        else:
            with self.lock:
                self.tell({"do": STOP})
        self.leave()

    def leave(self) -> None:
        """Stop watching the others, which are about to end."""
        self._watch.stop()


def _keep_to_own_cores(rank: int, count: int) -> None:
    """Let this rank, of several on a machine, run on its share of the cores: ranks wait for each other many times a
    token, also while the system moves one to another core. A launcher that has bound them is left alone."""
    cores = usable_cores()
    if count > 1 and len(cores) >= count and usable_cpus() == os.cpu_count():
        own = cores[rank * len(cores) // count : (rank + 1) * len(cores) // count]
        os.sched_setaffinity(0, set().union(*own))


def join(path: Path) -> World:
    """Find the other ranks of a run of the bundles in `path`, which `satchel shard` has written.

    Raises SatchelError: mpi4py or MPI is missing, there is another number of processes, a rank has another bundle or
    another version of satchel. What all ranks find the first one reports, and the others end with SystemExit.
    """
    mpi = _mpi(path)
    world = mpi.COMM_WORLD
    rank: int = world.Get_rank()
    mine = _member(path, rank)
    members = _all(world, mine)
    problem = _problem(path, members, world.Get_size(), mpi)
    if problem is not None:
        if rank:
            raise SystemExit(2)
        raise SatchelError(problem)
    local = world.Split_type(mpi.COMM_TYPE_SHARED)
    among = (local.Get_rank(), local.Get_size())
    local.Free()
    layout = read_ranks(path)
    if layout.collectives == MPI:
        _connect(world, mpi, layout)
    return World(rank_folder(path, rank), mpi, members, among, layout)


def _connect(world: Any, mpi: Any, layout: RanksFile) -> None:
    rank = world.Get_rank()
    group = world.Split(rank // layout.tensor, rank)  # the ranks of one stage
    around = [each if 0 <= each < world.Get_size() else -1 for each in (rank - layout.tensor, rank + layout.tensor)]
    wire.connect(mpi, group, (around[0], around[1]))


def _mpi(path: Path) -> Any:
    try:
        from mpi4py import MPI
    except ModuleNotFoundError:
        raise SatchelError(
            f"{path}: is cut for several ranks, which need mpi4py and MPI: {requirements.install_command('mpi')}"
        ) from None
    except (ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise SatchelError(
            f"{path}: is cut for several ranks, and mpi4py finds no MPI ({reason}): "
            f"{requirements.install_command('mpi')}, or install the MPI of the system"
        ) from None
    return MPI


def _member(path: Path, rank: int) -> Member:
    digest, problem = "", None
    manifest = rank_folder(path, rank) / MANIFEST_NAME
    try:
        name = str(manifest)
        digest = claimed_digest(parse_manifest(read_content(manifest, name), name), name)
        listed = read_ranks(path)
        if rank < len(listed.digests) and listed.digests[rank] != digest:
            problem = f"{manifest}: is of another cut than {path}: copy both again"
    except BundleError as error:
        problem = str(error)
    version = f"{importlib.metadata.version('satchel')} (kernels {library.VERSION})"
    return Member(rank, socket.gethostname(), os.getpid(), version, digest, problem)


def _all(world: Any, mine: Member) -> list[Member]:
    """What each rank says of itself, by rank."""
    text = json.dumps(dataclasses.asdict(mine)).encode()[: HEADER - 1]
    sent = np.frombuffer(text.ljust(HEADER, b"\0"), np.uint8)
    found = np.empty((world.Get_size(), HEADER), np.uint8)
    world.Allgather(sent, found)
    return [Member(**json.loads(row.tobytes().rstrip(b"\0"))) for row in found]


def _problem(path: Path, members: list[Member], size: int, mpi: Any) -> str | None:
    """Why these ranks cannot run together, as far as all of them can tell; None if they can."""
    try:
        layout = read_ranks(path)
    except BundleError as error:
        return str(error)
    if layout.collectives == NCCL and (reason := lacking(path)) is not None:
        return reason
    wanted = len(layout.digests)
    if size != wanted:
        return (
            f"{path}: is cut for {wanted} ranks, and {size} {'runs' if size == 1 else 'run'}: start it with "
            f"mpiexec -n {wanted} (of {mpi.get_vendor()[0]}, which mpi4py uses)"
        )
    for member, digest in zip(members, layout.digests, strict=True):
        if member.satchel != members[0].satchel:
            return (
                f"{member} has satchel {member.satchel}, and {members[0]} has {members[0].satchel}: install the same "
                "version on both"
            )
        if member.problem is not None:
            return f"{member}: {member.problem}"
        if member.digest != digest:
            return f"{member} has another bundle than {path} of {members[0]} names: copy the same folder to both"
    return None
