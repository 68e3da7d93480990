"""Batches whose keys and values are in blocks: one run of the graph holds pieces of prompts and decode tokens."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from functools import partial
from itertools import groupby

import numpy as np
import onnxruntime as ort

from satchel.runtime.bundle.contract import ATTENTION_MASK, BLOCK_TABLE, INPUT_IDS, LOGITS, ROW_OFFSETS
from satchel.runtime.errors import PromptError
from satchel.runtime.execution.adapters import Adapters
from satchel.runtime.execution.batch import TOLERANCE, TRIED_ROWS, TRIED_TOKENS, Batch, Evicts, Feed, Run
from satchel.runtime.execution.block_pool import BLOCK, BlockPool, PagedCache
from satchel.runtime.execution.engine import Engine
from satchel.runtime.execution.kv_cache import Cache, position_bytes
from satchel.runtime.execution.state import Ids, Logits, State
from satchel.runtime.ort.binding import bind_input, bind_output, run_bound

Fed = tuple["PagedState", Ids]


class PagedBatch(Batch):
    """Sequences over one pool of blocks."""

    def __init__(self, engine: Engine, runner: RaggedRunner, rows: int, capacity: int) -> None:
        """`capacity` is the largest number of positions of a sequence."""
        self.runner = runner
        paged = [PagedState(runner, runner.pool.new_cache(capacity, engine.max_context)) for _ in range(rows)]
        super().__init__(engine, paged, np.zeros((0, engine.vocabulary), np.float32))
        self._paged = paged

    @property
    def nbytes(self) -> int:
        """The size of the blocks in use in bytes, those of kept prefixes included."""
        return self.runner.pool.nbytes

    @property
    def logits(self) -> Logits:
        """Those of the rows in use, [rows in use, vocabulary] float32, copied."""
        return np.stack([state.logits for state in self.states[: len(self)]])

    def exchange(self, row: int, other: int) -> None:
        super().exchange(row, other)
        self._paged[row], self._paged[other] = self._paged[other], self._paged[row]

    @property
    def positions(self) -> int:
        return min(super().positions, self.runner.pool.blocks * BLOCK)

    def plan(self, feeds: Sequence[Feed], decoded: int) -> list[Run]:
        """One run for all, or for each adapter."""
        if not feeds:
            return []
        return [Run(tuple(row for row, _ in feeds), partial(self.run, feeds))]

    def is_short_of(self, feeds: Sequence[Feed]) -> bool:
        pool = self.runner.pool
        needed = sum(self._paged[row].paged.missing(len(tokens)) for row, tokens in feeds)
        return needed > pool.blocks - pool.used

    def holds(self, positions: int, prefix_cache: Evicts) -> bool:
        pool = self.runner.pool
        missing = (-(-positions // BLOCK) - (pool.blocks - pool.used)) * pool.block_bytes
        return missing <= 0 or missing <= prefix_cache.nbytes_of(self.owns)

    def owns(self, cache: Cache) -> bool:
        return isinstance(cache, PagedCache) and cache.pool is self.runner.pool

    def run(self, feeds: Sequence[Feed]) -> None:
        """Feed tokens to rows, in one run for each adapter."""
        self.runner.run([(self._paged[row], tokens) for row, tokens in feeds])

    @property
    def widest_ahead(self) -> int:
        return 0 if self._engine.wrong_ahead else max(self._engine.runs_ahead, default=0)

    def decode_ahead(self, feeds: Sequence[Feed]) -> list[Logits]:
        return self.runner.run_ahead([(self._paged[row], tokens) for row, tokens in feeds])

    def _decode(self, tokens: Ids, first: int) -> None:
        self.run([(first + place, tokens[place : place + 1]) for place in range(len(tokens))])


class PagedState(State):
    """One sequence whose keys and values are in blocks. Its logits are overwritten by the next run of its batch."""

    def __init__(self, runner: RaggedRunner, cache: PagedCache) -> None:
        super().__init__(cache, np.zeros(0, np.float32))
        self.paged = cache
        self._runner = runner

    def set_logits(self, logits: Logits) -> None:
        """Those of a run, [vocabulary]."""
        self._logits = logits

    def copy_from(self, other: State, start: int = 0) -> None:
        self.cache.copy_from(other.cache, other.cache.length, start)
        self._logits = other.logits

    def decode_ahead(self, tokens: Ids) -> Logits:
        return self._runner.run_ahead([(self, tokens)])[0]

    def _prefill(self, tokens: Ids) -> None:
        self._runner.run([(self, tokens)])

    def _decode(self, token: int) -> None:
        self._runner.run([(self, np.array([token], np.int64))])


class RaggedRunner:
    """Runs the graph that takes new tokens of several sequences, over one pool."""

    def __init__(self, session: ort.InferenceSession, pool: BlockPool, vocabulary: int, adapters: Adapters) -> None:
        self.pool = pool
        self._session, self._vocabulary, self._adapters = session, vocabulary, adapters
        self._logits: Logits = np.zeros((0, vocabulary), np.float32)
        self._bindings: dict[str | None, ort.IOBinding] = {}

    def run(self, feeds: Sequence[Fed]) -> None:
        """Feed tokens to sequences, each of which has the logits of its last token then."""
        feeds = sorted(feeds, key=lambda fed: (fed[0].cache.adapter or "", len(fed[1]) > 1))  # decode tokens first
        for state, tokens in feeds:
            state.cache.begin(len(tokens))
        logits, first = self.room(len(feeds)), 0
        for adapter, group in groupby(feeds, key=lambda fed: fed[0].cache.adapter):
            own = list(group)
            tables = [state.paged.table for state, _ in own]
            lengths = [state.cache.length + len(tokens) for state, tokens in own]
            part = logits[first : first + len(own)]
            self.step(adapter, tables, lengths, [tokens for _, tokens in own], part)
            first += len(own)
        for (state, tokens), row in zip(feeds, logits, strict=False):
            state.cache.advance(len(tokens))
            state.set_logits(row)

    def run_ahead(self, feeds: Sequence[Fed]) -> list[Logits]:
        """Feed tokens to sequences without an adapter, each token as a decode token of a row of its own.

        Returns the logits of each, [tokens of the sequence, vocabulary], which the next run overwrites.
        """
        for state, tokens in feeds:
            state.cache.begin(len(tokens))
        ids = np.concatenate([tokens for _, tokens in feeds])
        tables = [state.paged.table for state, tokens in feeds for _ in tokens]
        lengths = [state.cache.length + place for state, tokens in feeds for place in range(1, len(tokens) + 1)]
        logits = self.room(len(ids))[: len(ids)]
        self.step(None, tables, lengths, np.split(ids, len(ids)), logits)
        found = np.split(logits, np.cumsum([len(tokens) for _, tokens in feeds])[:-1])
        for (state, tokens), rows in zip(feeds, found, strict=True):
            state.cache.advance(len(tokens))
            state.set_logits(rows[-1])
        return found

    def step(
        self,
        adapter: str | None,
        tables: Sequence[Sequence[int]],
        lengths: Sequence[int],
        tokens: Sequence[Ids],
        logits: Logits,
    ) -> None:
        """One run of sequences with this adapter; `lengths` are those after it. `logits` get each one's last row."""
        ids = np.concatenate(tokens)[None]
        offsets = np.cumsum([0, *map(len, tokens)], dtype=np.int32)
        table = np.full((len(tables), max(map(len, tables))), -1, np.int32)
        for row, blocks in zip(table, tables, strict=True):
            row[: len(blocks)] = blocks
        totals = np.array(lengths, np.int64)[:, None]
        binding = self._binding(adapter)
        for name, array in ((INPUT_IDS, ids), (ATTENTION_MASK, totals), (ROW_OFFSETS, offsets), (BLOCK_TABLE, table)):
            bind_input(binding, name, array, array.shape)
        bind_output(binding, LOGITS, logits, (len(logits), 1, self._vocabulary))
        run_bound(self._session, binding, f"with {ids.size} tokens of {len(tables)} sequences")

    def _binding(self, adapter: str | None) -> ort.IOBinding:
        binding = self._bindings.get(adapter)
        if binding is None:
            binding = self._bindings[adapter] = self._session.io_binding()
            for bind, buffers in ((bind_input, self.pool.past), (bind_output, self.pool.present)):
                for name, buffer in buffers.items():
                    bind(binding, name, buffer, buffer.shape)
            for name, tensor in self._adapters.tensors(adapter).items():
                bind_input(binding, name, tensor, tensor.shape)
        return binding

    def room(self, rows: int) -> Logits:
        """A buffer for logits of so many sequences or more, [rows, vocabulary]."""
        if len(self._logits) < rows:
            self._logits = np.zeros((rows, self._vocabulary), np.float32)
        return self._logits


class Paging:
    """Batches of one engine over a pool of blocks, which the next batch takes over with what is kept in it."""

    def __init__(self, engine: Engine, session: ort.InferenceSession) -> None:
        """`session` has the graph that takes new tokens of several sequences."""
        self._engine, self._session = engine, session
        self._spec = engine.bundle.kv_cache
        self._pool: BlockPool | None = None
        self._works: bool | None = None
        self._lock = threading.Lock()

    @property
    def works(self) -> bool:
        """Whether sequences that run together get the logits that each gets alone; tried once, on first use."""
        with self._lock:
            if self._works is None:
                self._works = runs_agree(self._engine, self._batch(self._new_blocks(TRIED_ROWS), TRIED_ROWS, BLOCK))
            return self._works

    def new_batch(self, rows: int, capacity: int, kept: int, limit: int | None) -> PagedBatch:
        """As `Engine.new_pool`."""
        if rows < 1:
            raise PromptError(f"--batch {rows}: must be 1 or more")
        self._engine.check_capacity(capacity)
        block = BLOCK * position_bytes(self._spec)
        blocks = rows * (-(-capacity // BLOCK) + 1) + -(-kept // block)
        if limit is not None:
            blocks = min(blocks, limit // block)
        if blocks < 1:
            raise PromptError(
                f"--kv-cache-mib {(limit or 0) >> 20}: {BLOCK} positions take {-(-block >> 20)} MiB: give at least that"
            )
        with self._lock:
            pool = self._pool
            if pool is None or pool.blocks < blocks or (limit is not None and pool.blocks > blocks) or pool.is_taken:
                pool = self._pool = self._new_blocks(blocks)
            batch = self._batch(pool, rows, capacity)
            pool.user = weakref.ref(batch)
            return batch

    def _batch(self, pool: BlockPool, rows: int, capacity: int) -> PagedBatch:
        return PagedBatch(self._engine, self._new_runner(pool), rows, capacity)

    def _new_blocks(self, blocks: int) -> BlockPool:
        return BlockPool(self._spec, blocks)

    def _new_runner(self, pool: BlockPool) -> RaggedRunner:
        return RaggedRunner(self._session, pool, self._engine.vocabulary, self._engine.adapters)


def runs_agree(engine: Engine, batch: PagedBatch) -> bool:
    """Compare runs that hold a prompt and decode tokens of other rows with the same steps of each row alone.

    Operators that are not satchel's may differ: see `rows_agree`.
    """
    length = min(TRIED_TOKENS, engine.max_context - TRIED_ROWS)
    if length < 2:
        return False
    ids = np.array([(7 * i + 1) % engine.vocabulary for i in range(length + 2 * TRIED_ROWS)], np.int64)
    alone = [engine.new_state(length + TRIED_ROWS) for _ in batch.states]
    for step in range(TRIED_ROWS + 1):
        feeds = [(row, ids[length + step + row :][:1]) for row in range(min(step, TRIED_ROWS))]
        if step < TRIED_ROWS:
            feeds.append((step, ids[step : step + max(2, length - step)]))
        batch.run(feeds)
        for row, tokens in feeds:
            expected = (
                engine.prefill(alone[row], tokens) if len(tokens) > 1 else engine.decode(alone[row], int(tokens[0]))
            )
            found = batch.states[row].logits
            if not np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max():
                return False
    return True
