"""All ranks but the first: each does with its part of the model what the first one tells it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.errors import BundleError
from satchel.runtime.execution.block_pool import BlockPool
from satchel.runtime.execution.cpu import CpuEngine, RowRunner
from satchel.runtime.execution.kv_cache import Cache, Kind, KVCache, in_file
from satchel.runtime.execution.paged import RaggedRunner
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
        self._ragged: dict[int, RaggedRunner] = {}
        self._files: dict[int, KVCache] = {}
        self._return: Callable[[Logits], None] = lambda found: None

    def run(self, world: World) -> None:
        """Do what the first rank says until it ends the run."""
        self._world, self._return = world, world.results.send
        while (message := world.hear())["do"] != STOP:
            for number in message["dropped"]:
                self._drop(number)
            getattr(self, f"_{message['do']}")(message)
        world.leave()

    def _drop(self, number: int) -> None:
        runner = self._runners.pop(number, None)
        for row in range(runner.cache.rows) if runner is not None else ():
            del self._rows[number, row]
        self._ragged.pop(number, None)
        self._files.pop(number, None)

    def _cache(self, message: Message) -> None:
        bundle, rows = self._engine.bundle, message["rows"]
        manifest, capacity = bundle.manifest, message["capacity"]
        cache = KVCache(bundle.kv_cache, capacity, manifest.model.max_context, rows, None, manifest.states)
        number = message["number"]
        self._runners[number] = RowRunner(self._engine.sessions, cache, manifest, self._engine.adapters)
        for row in range(rows):
            self._rows[number, row] = cache.row(row)

    def _at(self, place: list[int], length: int, kind: Kind) -> KVCache:
        """The row of a cache, of this length and kind."""
        row = self._rows[place[0], place[1]]
        row.set_length(length, kind)
        return row

    def _copy(self, message: Message) -> None:
        source = self._at(message["source"], message["held"], message["kind"])
        self._row(message).copy_from(source, message["count"], message["start"])

    def _row(self, message: Message) -> KVCache:
        return self._at(message["place"], message["length"], message["kind"])

    def _exchange(self, message: Message) -> None:
        self._row(message).exchange(self._at(message["other"], message["held"], message["kind"]))

    def _snapshot(self, message: Message) -> None:
        self._row(message).take_snapshot()

    def _clear(self, message: Message) -> None:
        self._row(message).clear()

    def _ragged_everywhere(self, message: Message) -> None:
        self._world.everywhere(self._engine.ragged_session() is not None)

    def _pool(self, message: Message) -> None:
        session, bundle = self._engine.ragged_session(), self._engine.bundle
        if session is None:
            raise BundleError(f"{bundle.folder}: has no graph for rows that share memory: specialize it again")
        pool = BlockPool(bundle.kv_cache, message["blocks"])
        self._ragged[message["number"]] = RaggedRunner(session, pool, self._engine.vocabulary, self._engine.adapters)

    def _block(self, message: Message) -> None:
        pool = self._ragged[message["number"]].pool
        pool.copy_positions(message["source"], message["target"], message["positions"])

    def _file(self, message: Message) -> None:
        self._files[message["number"]] = in_file(self._engine.bundle.kv_cache, self._held(message["source"]))

    def _move(self, message: Message) -> None:
        source, target, count = self._held(message["source"]), message["target"], message["count"]
        if "pool" in target:
            self._ragged[target["pool"]].pool.write(target["blocks"], source.past, count)
        else:
            self._at(target["row"], target["length"], source.kind).copy_from(source, count)

    def _held(self, place: Message) -> Cache:
        """What this rank has of a sequence, to copy from."""
        length = place["length"]
        if "row" in place:
            return self._at(place["row"], length, (None, False))
        if "file" in place:
            return self._files[place["file"]]
        return _InBlocks(self._ragged[place["pool"]].pool, place["blocks"], length)

    def _step(self, message: Message) -> None:
        runner, tokens = self._ragged[message["number"]], [np.array(ids, np.int64) for ids in message["tokens"]]
        logits = runner.room(len(tokens))[: len(tokens)]
        runner.step(message["adapter"], message["tables"], message["lengths"], tokens, logits)

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

    def _one(self, message: Message) -> None:
        number, row, token, length = message["numbers"]
        runner = self._runners[number]
        runner.decode_one(row, self._at([number, row], length, (None, False)), token)
        self._return(runner.logits[row : row + 1])

    def _ahead(self, message: Message) -> None:
        (cache,), tokens = self._caches(message), np.array(message["tokens"], np.int64)
        self._return(self._runners[message["number"]].decode_ahead(message["first"], cache, tokens))

    def _caches(self, message: Message) -> list[KVCache]:
        sizes = zip(message["lengths"], message["kinds"], strict=True)
        return [
            self._at([message["number"], message["first"] + place], length, kind)
            for place, (length, kind) in enumerate(sizes)
        ]

    def _whole(self, message: Message) -> None:
        tokens = np.array(message["tokens"], np.int64)
        for found in self._engine.run_whole(message["graph"], tokens, message["chunk"], message["adapter"]):
            self._return(found)


class _InBlocks(Cache):
    """A sequence in blocks that the first rank names, to copy from."""

    def __init__(self, pool: BlockPool, blocks: list[int], length: int) -> None:
        super().__init__(length, length)
        self.set_length(length, (None, False))
        self._past = {name: pool.gathered(name, blocks, length) for name in pool.past}

    @property
    def past(self) -> Mapping[str, NDArray[Any]]:
        return self._past

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._past.values())

    def copy_from(self, other: Cache, count: int, start: int = 0) -> None:
        raise NotImplementedError("the first rank says what is written")
