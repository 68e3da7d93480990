"""Runs the server until a signal ends it."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from satchel.runtime.errors import SatchelError
from satchel.runtime.server.app import make_app
from satchel.runtime.server.guard import LOOPBACK
from satchel.runtime.server.state import State

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name))
"""SIGBREAK, of Ctrl-Break and of a closed console, is of Windows alone."""


class Server(uvicorn.Server):
    """Ends with its requests after a first signal, and at once after a second one."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals while the server runs; they have done their work then, and are not raised again.

        Outside the main thread, where none can be handled, set `should_exit`.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, frame: object) -> None:
            self.force_exit = self.should_exit
            self.should_exit = True

        before = {number: signal.signal(number, handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one. Raises SatchelError if that is not possible."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=2048)
        # asyncio sends small events at once (TCP_NODELAY) only on sockets that say that they are TCP's.
        return socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, fileno=listener.detach())
    except (OSError, OverflowError) as error:
        raise SatchelError(f"--host {host} --port {port}: cannot listen ({error}): choose others") from None


def make_server(state: State, host: str) -> Server:
    """The server of an application, to be run with a socket of `listen` on that host."""
    hosts = frozenset(LOOPBACK) if host in LOOPBACK else None
    config = uvicorn.Config(
        make_app(state, hosts), log_level="error", access_log=False, ws="none", server_header=False, lifespan="on",
        http="h11", loop="asyncio", timeout_keep_alive=30,
    )  # fmt: skip
    return Server(config)
