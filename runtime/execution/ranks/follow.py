"""All ranks but the first: each does with its part of the model what the first one tells it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.execution.cpu import CpuEngine, RowRunner
from satchel.runtime.execution.kv_cache import KVCache
from satchel.runtime.execution.ranks.world import STOP, World
from satchel.runtime.execution.state import Logits
from satchel.runtime.ort.session import SessionSettings

Message = dict[str, Any]


class Follower:
    """The part of a model that this rank has, and the caches that the first rank asked for."""

    def __init__(self, bundle: Bundle, settings: SessionSettings) -> None:
        """Raises BundleError and ProviderError."""
        self._engine = CpuEngine(bundle, settings)
        self._runners: dict[int, RowRunner] = {}
        self._rows: dict[tuple[int, int], KVCache] = {}
        self._return: Callable[[Logits], None] = lambda found: None

    def run(self, world: World) -> None:
        """Do what the first rank says until it ends the run."""
        self._return = world.results.send
        while (message := world.hear())["do"] != STOP:
            for number in message["dropped"]:
                self._drop(number)
            getattr(self, f"_{message['do']}")(message)
        world.leave()

    def _drop(self, number: int) -> None:
        runner = self._runners.pop(number)
        for row in range(runner.cache.rows):
            del self._rows[number, row]

    def _cache(self, message: Message) -> None:
        bundle, rows = self._engine.bundle, message["rows"]
        manifest, capacity = bundle.manifest, message["capacity"]
        cache = KVCache(bundle.kv_cache, capacity, manifest.model.max_context, rows, None, manifest.states)
        number = message["number"]
        self._runners[number] = RowRunner(self._engine.sessions, cache, manifest, self._engine.adapters)
        for row in range(rows):
            self._rows[number, row] = cache.row(row)

    def _at(self, place: list[int], length: int, long: bool) -> KVCache:
        """The row of a cache, of this length."""
        row = self._rows[place[0], place[1]]
        row.set_length(length, long)
        return row

    def _copy(self, message: Message) -> None:
        source = self._at(message["source"], message["held"], message["long"])
        self._row(message).copy_from(source, message["count"], message["start"])

    def _row(self, message: Message) -> KVCache:
        return self._at(message["place"], message["length"], message["long"])

    def _exchange(self, message: Message) -> None:
        self._row(message).exchange(self._at(message["other"], message["held"], message["long"]))

    def _snapshot(self, message: Message) -> None:
        self._row(message).take_snapshot()

    def _clear(self, message: Message) -> None:
        self._row(message).clear()

    def _prefill(self, message: Message) -> None:
        (cache,), runner, row = self._caches(message), self._runners[message["number"]], message["first"]
        runner.prefill(row, cache, np.array(message["tokens"], np.int64))
        self._return(runner.logits[row : row + 1])

    def _decode(self, message: Message) -> None:
        caches, runner, first = self._caches(message), self._runners[message["number"]], message["first"]
        if len(caches) == 1:
            runner.decode_one(first, caches[0], message["tokens"][0])
        else:
            runner.decode(first, caches, message["tokens"])
        self._return(runner.logits[first : first + len(caches)])

    def _ahead(self, message: Message) -> None:
        (cache,), tokens = self._caches(message), np.array(message["tokens"], np.int64)
        self._return(self._runners[message["number"]].decode_ahead(message["first"], cache, tokens))

    def _caches(self, message: Message) -> list[KVCache]:
        sizes = zip(message["lengths"], message["long"], strict=True)
        return [
            self._at([message["number"], message["first"] + place], length, long)
            for place, (length, long) in enumerate(sizes)
        ]

    def _whole(self, message: Message) -> None:
        tokens = np.array(message["tokens"], np.int64)
        for found in self._engine.run_whole(message["graph"], tokens, message["chunk"]):
            self._return(found)
