"""The first rank: an engine that lets all other ranks do with their parts of the model what it does with its own.

What happens to caches and what graphs run is told to the others, in one message before each run; scheduling, sampling
and texts are this rank's alone.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from satchel.runtime.bundle.manifest import CacheSpec
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.errors import PromptError
from satchel.runtime.execution.block_pool import BlockPool, PagedCache
from satchel.runtime.execution.cpu import CpuBatch, CpuEngine, CpuState, RowRunner
from satchel.runtime.execution.kv_cache import Cache, KVCache, in_file
from satchel.runtime.execution.paged import Paging, RaggedRunner
from satchel.runtime.execution.ranks.world import World
from satchel.runtime.execution.state import Ids, Logits, State
from satchel.runtime.ort.session import SessionSettings

Held = dict[str, Any]
"""Where the other ranks have their parts of a sequence: in a row of a cache, in blocks of a pool, or in a file."""


class LeadEngine(CpuEngine):
    """As CpuEngine, of all ranks together."""

    def __init__(self, bundle: Bundle, settings: SessionSettings, world: World) -> None:
        super().__init__(bundle, settings)
        self._told, self.stages = Told(world), world.stages
        self._ragged: bool | None = None

    def why_not_ahead(self, adapter: str | None) -> str | None:
        """As for one rank, and where there are no states: those of the other ranks would not go back."""
        if self.bundle.manifest.states:
            return "the states of several ranks cannot go back to an earlier token"
        return super().why_not_ahead(adapter)

    def ragged_session(self) -> ort.InferenceSession | None:
        """As `CpuEngine.ragged_session`, where all ranks have one; with several stages, rows have fixed memory."""
        session = super().ragged_session()
        if self.stages > 1:
            return None
        if self._ragged is None:
            with self._told.world.lock:
                self._told.tell("ragged_everywhere")
                self._ragged = self._told.world.everywhere(session is not None)
        return session if self._ragged else None

    def _new_paging(self, session: ort.InferenceSession) -> Paging:
        return LeadPaging(self, session, self._told)

    def _new_batch(self, rows: int, capacity: int, force: bool) -> CpuBatch:
        manifest = self.bundle.manifest
        cache = LeadCache(self._told, self.bundle, capacity, rows)
        runner = LeadRunner(self._told, self.sessions, cache, manifest, self.adapters)
        return CpuBatch(self, runner, [LeadState(runner, row) for row in range(rows)], force)

    def _run_whole(
        self,
        graph: str,
        output: str,
        tokens: Ids,
        chunk: int | None,
        rows_of: Callable[[slice], Logits],
        adapter: str | None,
    ) -> Iterator[Logits]:
        results, found = self._told.world.results, []
        self.adapters.tensors(adapter)

        def expected(span: slice) -> Logits:
            rows = rows_of(span)
            results.expect(rows)
            return rows

        with self._told.world.lock:
            self._told.tell("whole", graph=graph, tokens=tokens.tolist(), chunk=chunk, adapter=adapter)
            for rows in super()._run_whole(graph, output, tokens, chunk, expected, adapter):
                results.settle(rows)
                found.append(rows.copy())
        yield from found


class Told:
    """Sends what is done here, and what is no longer needed, to the other ranks."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._numbers = itertools.count()
        self._dropped: list[int] = []

    def tell(self, what: str, **details: Any) -> None:
        """Send a message; the lock is held until what it says is done here."""
        dropped, self._dropped = self._dropped, []
        self.world.tell({"do": what, "dropped": dropped, **details})

    def tell_numbers(self, what: str, *numbers: int) -> bool:
        """The same for a step of one token, in a short message. Returns False if more must be told with it."""
        if self._dropped:
            return False
        self.world.tell_numbers(what, *numbers)
        return True  # whatever is dropped meanwhile is told next time

    def number(self, owner: object) -> int:
        """A new number, by which the others know a cache until `owner` is gone."""
        number = next(self._numbers)
        weakref.finalize(owner, self._dropped_later, number).atexit = False
        return number

    def _dropped_later(self, number: int) -> None:
        self._dropped.append(number)


class LeadCache(KVCache):
    """A cache that all ranks have, each for its part of the model."""

    def __init__(self, told: Told, bundle: Bundle, capacity: int, rows: int = 1) -> None:
        manifest = bundle.manifest
        super().__init__(bundle.kv_cache, capacity, manifest.model.max_context, rows, None, manifest.states)
        self._told, self._bundle = told, bundle
        self._owner = _Owner()
        self.place = told.number(self._owner), 0
        with told.world.lock:
            told.tell("cache", number=self.place[0], capacity=capacity, rows=rows)

    @property
    def held(self) -> Held:
        """Where the others have their parts."""
        return {"row": self.place, "length": self._length}

    def row(self, index: int) -> Self:
        row = super().row(index)
        row.place = self.place[0], index
        return row

    def _tell(self, what: str, **details: Any) -> None:
        self._told.tell(what, place=self.place, length=self._length, kind=self.kind, **details)

    def copy_from(self, other: Cache, count: int, start: int = 0) -> None:
        with self._told.world.lock:
            if not isinstance(other, LeadCache):
                self._told.tell("move", source=_held(other), target=self.held, count=count)
                super().copy_from(other, count, start)
                return
            self._tell("copy", source=other.place, held=other.length, count=count, start=start)
            super().copy_from(other, count, start)

    def kept(self, count: int) -> LeadCache:
        """A cache of all ranks with the first `count` positions."""
        kept = LeadCache(self._told, self._bundle, count)
        kept.copy_from(self, count)
        return kept

    def exchange(self, other: KVCache) -> None:
        if isinstance(other, LeadCache):
            with self._told.world.lock:
                self._tell("exchange", other=other.place, held=other.length)
                super().exchange(other)

    def take_snapshot(self) -> None:
        with self._told.world.lock:
            self._tell("snapshot")
            super().take_snapshot()

    def clear(self, adapter: str | None = None) -> None:
        with self._told.world.lock:
            self._tell("clear")
            super().clear(adapter)


class _Owner:
    """What all rows of a cache refer to."""


class LeadPool(BlockPool):
    """A pool that all ranks have, each for its part of the model; this one says which blocks are whose."""

    def __init__(self, told: Told, spec: CacheSpec, blocks: int) -> None:
        super().__init__(spec, blocks)
        self.told, self.number = told, told.number(self)
        with told.world.lock:
            told.tell("pool", number=self.number, blocks=blocks)

    def new_cache(self, capacity: int, limit: int) -> PagedCache:
        return LeadPagedCache(self, capacity, limit)

    def copy_of(self, block: int, positions: int) -> int:
        with self.told.world.lock:
            copied = super().copy_of(block, positions)
            self.told.tell("block", number=self.number, source=block, target=copied, positions=positions)
        return copied


class LeadPagedCache(PagedCache):
    """A sequence in blocks that all ranks have."""

    pool: LeadPool

    @property
    def held(self) -> Held:
        """Where the others have their parts."""
        return {"pool": self.pool.number, "blocks": list(self.table), "length": self._length}

    def swapped_out(self, spec: CacheSpec) -> Cache:
        told, owner = self.pool.told, _Owner()
        with told.world.lock:
            number = told.number(owner)
            told.tell("file", number=number, source=self.held)
            return LeadFile(in_file(spec, self), {"file": number, "length": self._length}, owner)

    def _write(self, other: Cache, count: int) -> None:
        with self.pool.told.world.lock:
            self.pool.told.tell("move", source=_held(other), target=self.held, count=count)
            super()._write(other, count)


class LeadFile(Cache):
    """A sequence that all ranks have in files."""

    def __init__(self, own: KVCache, held: Held, owner: _Owner) -> None:
        super().__init__(own.capacity, own.capacity)
        self.set_length(own.length, own.kind)
        self.held, self._own, self._owner = held, own, owner

    @property
    def past(self) -> Mapping[str, NDArray[Any]]:
        return self._own.past

    @property
    def nbytes(self) -> int:
        return self._own.nbytes

    def copy_from(self, other: Cache, count: int, start: int = 0) -> None:
        raise NotImplementedError("a file is written once")


def _held(cache: Cache) -> Held:
    """Where the other ranks have their parts of a cache. Raises PromptError for one of this rank alone."""
    if not isinstance(cache, LeadCache | LeadPagedCache | LeadFile):
        raise PromptError("a saved state has the keys and values of one rank only: several ranks cannot use it")
    return cache.held


class LeadPaging(Paging):
    """As Paging, of all ranks together."""

    def __init__(self, engine: LeadEngine, session: ort.InferenceSession, told: Told) -> None:
        super().__init__(engine, session)
        self._told = told

    def _new_blocks(self, blocks: int) -> BlockPool:
        return LeadPool(self._told, self._spec, blocks)

    def _new_runner(self, pool: BlockPool) -> RaggedRunner:
        return LeadRaggedRunner(self._session, pool, self._engine.vocabulary, self._engine.adapters)


class LeadRaggedRunner(RaggedRunner):
    """Runs the graphs of all ranks over the pools of all."""

    def step(
        self,
        adapter: str | None,
        tables: Sequence[Sequence[int]],
        lengths: Sequence[int],
        tokens: Sequence[Ids],
        logits: Logits,
    ) -> None:
        self._adapters.tensors(adapter)
        told, number = self.pool.told, self.pool.number  # type: ignore[attr-defined]
        with told.world.lock:
            told.tell(
                "step", number=number, adapter=adapter, tables=[list(table) for table in tables], lengths=list(lengths),
                tokens=[each.tolist() for each in tokens],
            )  # fmt: skip
            super().step(adapter, tables, lengths, tokens, logits)


class LeadRunner(RowRunner):
    """Runs the graphs of all ranks. With several stages, logits are there when `results.settle` has waited for them."""

    def __init__(self, told: Told, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._told, self.results = told, told.world.results

    def _tell(self, what: str, first: int, caches: Sequence[Cache], tokens: Sequence[int]) -> None:
        for cache in caches:
            cache.require(len(tokens) if what != "decode" else 1)
            self._adapters.tensors(cache.adapter)  # an error in its file comes before others wait for this rank
        (number, _) = self.cache.place  # type: ignore[attr-defined]
        self._told.tell(
            what, number=number, first=first, tokens=tokens,
            lengths=[cache.length for cache in caches], kinds=[cache.kind for cache in caches],
        )  # fmt: skip
        if what != "ahead":
            self.results.expect(self.logits[first : first + len(caches)])

    def prefill(self, row: int, cache: Cache, tokens: Ids) -> None:
        with self._told.world.lock:
            self._tell("prefill", row, [cache], tokens.tolist())
            super().prefill(row, cache, tokens)

    def decode(self, first: int, caches: Sequence[Cache], tokens: Sequence[int] | Ids) -> None:
        with self._told.world.lock:
            self._tell("decode", first, caches, np.asarray(tokens).tolist())
            super().decode(first, caches, tokens)

    def decode_one(self, row: int, cache: Cache, token: int) -> None:
        number = self.cache.place[0]  # type: ignore[attr-defined]
        with self._told.world.lock:
            cache.require(1)
            plain = cache.kind == (None, False)
            if plain and self._told.tell_numbers("one", number, row, token, cache.length):
                self.results.expect(self.logits[row : row + 1])
            else:
                self._tell("decode", row, [cache], [token])
            super().decode_one(row, cache, token)

    def decode_ahead(self, row: int, cache: Cache, tokens: Ids) -> Logits:
        with self._told.world.lock:
            self._tell("ahead", row, [cache], tokens.tolist())
            found = super().decode_ahead(row, cache, tokens)
            self.results.expect(found)
        self.results.settle(found)
        return found


class LeadState(CpuState):
    """A row of a cache that all ranks have. Its logits may still be on their way from the last stage."""

    def __init__(self, runner: LeadRunner, row: int) -> None:
        super().__init__(runner, row)
        self._results = runner.results

    @property
    def logits(self) -> Logits:
        """As `State.logits`; waits for them."""
        self._results.settle(self._logits)
        return self._logits

    def copy_from(self, other: State, start: int = 0) -> None:
        self._results.settle(self._logits)
        super().copy_from(other, start)

    def exchange(self, other: CpuState) -> None:
        for state in (self, other):
            self._results.settle(state._logits)
        super().exchange(other)
