"""The first rank: an engine that lets all other ranks do with their parts of the model what it does with its own.

What happens to caches and what graphs run is told to the others, in one message before each run; scheduling, sampling
and texts are this rank's alone.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import numpy as np
import onnxruntime as ort

from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.errors import PromptError
from satchel.runtime.execution.cpu import CpuBatch, CpuEngine, CpuState, RowRunner
from satchel.runtime.execution.kv_cache import Cache, KVCache
from satchel.runtime.execution.ranks.world import World
from satchel.runtime.execution.state import Ids, Logits, State
from satchel.runtime.ort.session import SessionSettings


class LeadEngine(CpuEngine):
    """As CpuEngine, of all ranks together."""

    def __init__(self, bundle: Bundle, settings: SessionSettings, world: World) -> None:
        super().__init__(bundle, settings)
        self._told, self.stages = Told(world), world.stages

    def why_not_ahead(self, adapter: str | None) -> str | None:
        """As for one rank, and where there are no states: those of the other ranks would not go back."""
        if self.bundle.manifest.states:
            return "the states of several ranks cannot go back to an earlier token"
        return super().why_not_ahead(adapter)

    def _ragged_session(self) -> ort.InferenceSession | None:
        return None  # blocks are this rank's own: the others would have to follow each

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

        def expected(span: slice) -> Logits:
            rows = rows_of(span)
            results.expect(rows)
            return rows

        with self._told.world.lock:
            self._told.tell("whole", graph=graph, tokens=tokens.tolist(), chunk=chunk)
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

    def row(self, index: int) -> Self:
        row = super().row(index)
        row.place = self.place[0], index
        return row

    def _tell(self, what: str, **details: Any) -> None:
        self._told.tell(what, place=self.place, length=self._length, long=self.long, **details)

    def copy_from(self, other: Cache, count: int, start: int = 0) -> None:
        if not isinstance(other, LeadCache):
            raise PromptError("a saved state has the keys and values of one rank only: several ranks cannot use it")
        with self._told.world.lock:
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


class LeadRunner(RowRunner):
    """Runs the graphs of all ranks. With several stages, logits are there when `results.settle` has waited for them."""

    def __init__(self, told: Told, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._told, self.results = told, told.world.results

    def _tell(self, what: str, first: int, caches: Sequence[Cache], tokens: Sequence[int]) -> None:
        for cache in caches:
            cache.require(len(tokens) if what != "decode" else 1)
        (number, _) = self.cache.place  # type: ignore[attr-defined]
        self._told.tell(
            what, number=number, first=first, tokens=tokens,
            lengths=[cache.length for cache in caches], long=[cache.long for cache in caches],
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
        with self._told.world.lock:
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
