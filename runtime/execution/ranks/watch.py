"""Ends the run of all ranks within seconds when one of them dies, is stopped, or loses its disk.

MPI itself notices a dead process late or never, and one that is stopped not at all: the others wait for it forever. So
each rank has a connection to the first one beside MPI, over which both send a byte every half second.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import signal
import socket
import struct
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from satchel.runtime.errors import SatchelError

BEAT, SILENCE = 0.5, 3.0
"""Seconds between two signs of life, and without one until a rank counts as lost."""

ALIVE, LEAVING, LOST = b"a\n", b"l\n", b"x"
EXIT_LOST = 2
WELCOME = 512
CONNECT = 10.0
SIOCGIFADDR = 0x8915
"""Of <linux/sockios.h>: the address of an interface."""


@dataclass
class _Peer:
    """A rank at the other end of a connection."""

    rank: int
    host: str
    process: int
    connection: socket.socket
    heard: float = field(default_factory=time.monotonic)
    rest: bytes = b""
    leaving: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (process {self.process})"


class Watch:
    """Watches the other ranks from a thread of its own, until `stop`."""

    def __init__(self, world: Any, disk: Path) -> None:
        """Connect to the first rank, or all others to this one; `disk` is a file that must stay readable.

        Raises SatchelError where a rank cannot be reached.
        """
        self._rank: int = world.Get_rank()
        self._disk = disk
        self._peers = _accept(world) if self._rank == 0 else [_connect(world)]
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="satchel-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the watch: this rank and the others are about to end in order."""
        self._ending.set()
        for peer in self._peers:
            with suppress(OSError):
                peer.connection.sendall(LEAVING)

    def _run(self) -> None:
        due = last = time.monotonic()
        while not self._ending.is_set():
            open_ones = [peer for peer in self._peers if not peer.leaving]
            ready, _, _ = select.select([peer.connection for peer in open_ones], [], [], BEAT / 2)
            now = time.monotonic()
            if now - last > SILENCE / 2:  # this process itself was held up: what it has not read is no silence
                for peer in open_ones:
                    peer.heard = now
            last = now
            for peer in open_ones:
                if peer.connection in ready:
                    self._read(peer)
                elif now - peer.heard > SILENCE:
                    self._lost(peer, f"has not answered for {SILENCE:g} seconds")
            if now >= due:
                due = now + BEAT
                self._beat()

    def _beat(self) -> None:
        message = ALIVE
        try:
            with self._disk.open("rb") as file:
                os.stat(file.fileno())
        except OSError as error:
            if self._ending.is_set():
                return
            reason = f"{self._disk}: cannot be read any more ({error.strerror})"
            if self._rank == 0:
                self._end(f"rank 0: {reason}", shown=True)
            message = LOST + reason.encode() + b"\n"
        for peer in self._peers:
            with suppress(OSError):  # the next read notices
                peer.connection.sendall(message)

    def _read(self, peer: _Peer) -> None:
        try:
            data = peer.connection.recv(4096)
        except OSError:
            data = b""
        if not data:
            if not peer.leaving and not self._ending.is_set():
                self._lost(peer, "has ended before the others")
            return
        peer.heard = time.monotonic()
        *lines, peer.rest = (peer.rest + data).split(b"\n")
        for line in lines:
            if line == LEAVING[:-1]:
                peer.leaving = True
            elif line.startswith(LOST):
                reason = line[len(LOST) :].decode("utf-8", "replace")
                self._end(reason if self._rank else f"{peer}: {reason}", shown=self._rank == 0)

    def _lost(self, peer: _Peer, how: str) -> None:
        """Report a rank that is gone, see to it that it is, and end this one."""
        # The first rank reports all others; it is reported by the next one.
        reason = f"{peer} {how}"
        self._show(reason, shown=self._rank <= 1)
        if peer.host == socket.gethostname():
            with suppress(OSError):
                os.kill(peer.process, signal.SIGKILL)  # one that is stopped does not end by itself
        self._end(reason, shown=False)

    def _show(self, reason: str, *, shown: bool) -> None:
        if shown:  # at once: the launcher, too, may have noticed, and ends this process
            os.write(sys.stderr.fileno(), f"\nsatchel: error: {reason}: the run of all ranks has ended\n".encode())

    def _end(self, reason: str, *, shown: bool) -> None:
        self._show(reason, shown=shown)
        if self._rank == 0:
            for peer in self._peers:
                with suppress(OSError):
                    peer.connection.sendall(LOST + reason.encode() + b"\n")
        os._exit(EXIT_LOST)  # the main thread waits inside MPI, for what will not come


def _accept(world: Any) -> list[_Peer]:
    """The connections of all other ranks to this one, the first."""
    token, count = secrets.token_hex(16), world.Get_size() - 1
    with socket.create_server(("", 0), backlog=count + 16) as listener:
        welcome = json.dumps({"port": listener.getsockname()[1], "places": _places(), "token": token})
        world.Bcast(np.frombuffer(welcome.encode().ljust(WELCOME, b" "), np.uint8), 0)
        listener.settimeout(CONNECT)
        peers: list[_Peer] = []
        while len(peers) < count:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                raise SatchelError(
                    f"{count - len(peers)} ranks cannot connect to {socket.gethostname()} over TCP: let them through "
                    "its firewall"
                ) from None
            connection.settimeout(CONNECT)
            peer = _greeted(connection, token)
            if peer is None:
                connection.close()
            else:
                peers.append(peer)
    return peers


def _greeted(connection: socket.socket, token: str) -> _Peer | None:
    """The rank at the other end, or None for one that does not know the token."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        line = b""
        while not line.endswith(b"\n") and len(line) < WELCOME:
            data = connection.recv(WELCOME - len(line))
            if not data:
                return None
            line += data
        said = json.loads(line)
        if secrets.compare_digest(str(said["token"]), token):
            return _Peer(int(said["rank"]), str(said["host"]), int(said["process"]), connection)
    return None


def _connect(world: Any) -> _Peer:
    """A connection to the first rank."""
    buffer = np.empty(WELCOME, np.uint8)
    world.Bcast(buffer, 0)
    welcome = json.loads(buffer.tobytes())
    greeting = {"token": welcome["token"], "rank": world.Get_rank()}
    greeting |= {"host": socket.gethostname(), "process": os.getpid()}
    host, process, *addresses = welcome["places"]
    local = ["127.0.0.1"] if host == socket.gethostname() else []
    for address in (*local, *addresses, host):
        with suppress(OSError):
            connection = socket.create_connection((address, welcome["port"]), timeout=CONNECT / 4)
            connection.sendall(json.dumps(greeting).encode() + b"\n")
            return _Peer(0, host, int(process), connection)
    raise SatchelError(f"rank 0 on {host} cannot be reached over TCP: let this machine through its firewall")


def _places() -> list[str]:
    """The name of this host, the process, and the addresses under which others may reach it."""
    name = socket.gethostname()
    found = _interfaces()
    with suppress(OSError):
        found += [str(each[4][0]) for each in socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)]
    return [name, str(os.getpid()), *(each for each in dict.fromkeys(found) if not each.startswith("127."))][:12]


def _interfaces() -> list[str]:
    """The IPv4 addresses of this host's interfaces, on Linux: many hosts know only a loopback address by their name."""
    if sys.platform != "linux":
        return []
    import fcntl  # not on all systems

    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # one without an address
                answer = fcntl.ioctl(asking.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found.append(socket.inet_ntoa(answer[20:24]))
    return found
