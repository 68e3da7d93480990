"""A server in this process, on a free port, in a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from satchel.runtime.generation.generator import Generator
from satchel.runtime.server.models import Models
from satchel.runtime.server.records import Metrics
from satchel.runtime.server.run import listen, make_server
from satchel.runtime.server.settings import Settings
from satchel.runtime.server.state import State

PATIENCE = 20.0  # seconds to wait for what happens at once on an idle machine


@dataclass
class Served:
    """A running server: its address, and what it is made of."""

    url: str
    state: State

    def get(self, path: str, **more: Any) -> httpx2.Response:
        return httpx2.get(self.url + path, timeout=PATIENCE, **more)

    def post(self, path: str, body: Any = None, **more: Any) -> httpx2.Response:
        content = {"json": body} if "content" not in more else {}
        return httpx2.post(self.url + path, timeout=PATIENCE, **content, **more)

    def refuses(self, path: str, body: Any = None, status: int = 400, **more: Any) -> dict[str, Any]:
        """The error, in OpenAI's form, with which a request is refused."""
        answer = self.post(path, body, **more)
        assert answer.status_code == status, answer.text
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert "\n" not in error["message"]
        return error

    @property
    def generator(self) -> Generator:
        return next(iter(self.state.models.loaded.values())).generator

    def wait_until_idle(self) -> None:
        """Wait until no request is left, in the scheduler of any model."""
        end = time.monotonic() + PATIENCE
        while any(each.scheduler.running or each.scheduler.waiting for each in self.state.models.loaded.values()):
            assert time.monotonic() < end, "requests are left"
            time.sleep(0.01)


@contextmanager
def serving(
    paths: Path | Mapping[str, Path], *, open_more: Mapping[str, Any] | None = None, **settings: Any
) -> Iterator[Served]:
    """Serve bundles; one is named by its folder. `settings` are the fields of `Settings`."""
    named = {paths.name: paths} if isinstance(paths, Path) else paths
    given = Settings(**{"quiet": True, **settings})
    models = Models(
        {name: str(path) for name, path in named.items()},
        lambda path: Generator.open(path, threads=1, **(open_more or {})),
        given,
    )
    models.load_first()
    state = State(models, given, Metrics())
    listener = listen("127.0.0.1", 0)
    server = make_server(state, "127.0.0.1")
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}", state)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive(), "the server does not end"
        models.close(drain=False)
        listener.close()
