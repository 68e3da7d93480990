"""Hands the functions of MPI to satchel's operators, which exchange what ranks compute without Python in between."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from satchel.runtime.errors import SatchelError
from satchel.runtime.kernels import library

FUNCTIONS = ("MPI_Iallreduce", "MPI_Igatherv", "MPI_Iallgatherv", "MPI_Isend", "MPI_Irecv", "MPI_Test")
"""In the order of `Ranks` in runtime/kernels/ranks.h."""
MAILBOX = 64 + 2 * (1 << 18)
"""The bytes of a `Mailbox` there."""
HANDLES = ("real", "byte", "sum", "group", "world")


class _Ranks(ctypes.Structure):
    """`Ranks` of runtime/kernels/ranks.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in FUNCTIONS),
        *((name, ctypes.c_ssize_t) for name in HANDLES),
        ("rank", ctypes.c_int32),
        ("ranks", ctypes.c_int32),
        ("previous", ctypes.c_int32),
        ("next", ctypes.c_int32),
        ("mailboxes", ctypes.c_void_p),
    )


class _Traffic(ctypes.Structure):
    """`Traffic` of runtime/kernels/ranks.h."""

    _fields_ = (("nanoseconds", ctypes.c_int64), ("calls", ctypes.c_int64), ("bytes", ctypes.c_int64))


@dataclass(frozen=True)
class Traffic:
    """What the operators of this rank have exchanged: the seconds that they took and waited, calls, and bytes sent."""

    seconds: float
    calls: int
    bytes: int


def connect(mpi: Any, group: Any, around: tuple[int, int]) -> None:
    """Let satchel's operators exchange numbers among the ranks of `group`, a communicator of the module `mpi`.

    `around` are the ranks, among all, that have the same part of the stages before and behind; -1 for none.

    Raises SatchelError where satchel's kernels cannot be used, or MPI's functions cannot be found.
    """
    path = library.library()
    if path is None:
        raise SatchelError(
            f"a bundle that is cut for several ranks runs on satchel's own kernels, which {library.reason()}"
        )
    try:
        functions = ctypes.CDLL(mpi.__file__)  # looks in what it depends on, too
        found = [ctypes.cast(getattr(functions, name), ctypes.c_void_p).value for name in FUNCTIONS]
    except (OSError, AttributeError) as error:
        raise SatchelError(f"mpi4py has no functions of MPI to call ({error}): install mpi4py again") from None
    handles = [mpi._handleof(each) for each in (mpi.FLOAT, mpi.BYTE, mpi.SUM, group, mpi.COMM_WORLD)]
    ranks = _Ranks(*found, *handles, group.Get_rank(), group.Get_size(), *around, _mailboxes(mpi, group))
    ctypes.CDLL(str(path)).satchel_join(ctypes.byref(ranks))


_kept: list[object] = []
"""What satchel's library reads as long as the process lives."""


def _mailboxes(mpi: Any, group: Any) -> int | None:
    """The address of the addresses of all mailboxes of a group; None if its ranks are on several machines."""
    near = group.Split_type(mpi.COMM_TYPE_SHARED)
    together, size = near.Get_size() == group.Get_size(), group.Get_size()
    near.Free()
    if not together or size == 1:
        return None
    window = mpi.Win.Allocate_shared(MAILBOX, 1, comm=group)
    own, _ = window.Shared_query(group.Get_rank())
    ctypes.memset(own.address, 0, MAILBOX)
    group.Barrier()
    addresses = (ctypes.c_void_p * size)(*(window.Shared_query(rank)[0].address for rank in range(size)))
    _kept.extend((window, addresses))
    return ctypes.addressof(addresses)


def traffic() -> Traffic:
    """What has been exchanged since the last call."""
    path = library.library()
    if path is None:
        return Traffic(0.0, 0, 0)
    ask = ctypes.CDLL(str(path)).satchel_traffic
    ask.restype = _Traffic
    found = ask()
    return Traffic(found.nanoseconds / 1e9, found.calls, found.bytes)
