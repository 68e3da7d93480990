"""The executor for the CPU: graphs for any number of rows and tokens, which write the KV cache and states in place."""

from __future__ import annotations

import functools
import itertools
import mmap
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnxruntime as ort

from satchel.runtime.bundle.contract import (
    ATTENTION_MASK,
    EMBED,
    HIDDEN_STATES,
    INPUT_IDS,
    LOGITS,
    TEXT_LENGTH,
    TOP_IDS,
    TOP_LOGITS,
)
from satchel.runtime.bundle.manifest import CacheSpec, Manifest
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.execution.adapters import Adapters
from satchel.runtime.execution.batch import Batch
from satchel.runtime.execution.engine import Engine
from satchel.runtime.execution.kv_cache import Cache, KVCache
from satchel.runtime.execution.paged import Paging
from satchel.runtime.execution.spans import OWN_CHUNK, PREFILL_CHUNK, chunks
from satchel.runtime.execution.state import Ids, Logits, State, TopTokens
from satchel.runtime.ort.binding import bind_input, bind_output, run_bound
from satchel.runtime.ort.score_graph import SCORE, of_every_token, scored_by
from satchel.runtime.ort.session import SessionSettings, open_both, open_session, specialized_for

MAX_SPARE = 64 << 20  # bytes
PREFILL, DECODE = 0, 1

Sessions = tuple[ort.InferenceSession, ort.InferenceSession]


class CpuEngine(Engine):
    """The prefill, decode and score graphs of `manifest.graphs` on the CPU."""

    def __init__(self, bundle: Bundle, settings: SessionSettings) -> None:
        """Open prefill and decode, in one session if the manifest says so. Raises BundleError and ProviderError."""
        super().__init__(bundle, settings)
        self._sessions = open_both(bundle, settings)
        self._whole: dict[str, ort.InferenceSession] = {}  # those that return something of each token
        self._whole_lock = threading.Lock()
        self._spare: mmap.mmap | None = None
        self._spare_lock = threading.Lock()
        self._paging: Paging | None = None
        self._paging_lock = threading.Lock()

    @property
    def sessions(self) -> Sessions:
        """Those of prefill and of decode: the same one twice if both phases share it."""
        return self._sessions

    def sessions_for(self, count: int | None) -> tuple[ort.InferenceSession, ...]:
        return self._sessions[1:] if count is None else self._sessions[:1]

    @property
    def supports_batch(self) -> bool:
        """False if the decode graph takes a fixed number of rows, or is made for a device: fixed mask, top tokens."""
        manifest = self.bundle.manifest
        decode = manifest.graph("decode")
        fixed = any(isinstance(tensor.shape[0], int) for tensor in decode.inputs)
        return not (fixed or manifest.has_fixed_mask or decode.top_tokens)

    def why_not_ahead(self, adapter: str | None) -> str | None:
        """None where satchel's own kernels decode, and there is no adapter and no border."""
        manifest, made = self.bundle.manifest, self.bundle.specialized
        if manifest.model.rotary_border:
            return "its rotary angles depend on the length of the text"
        name = made.variant("decode") if made is not None else None
        if name is None or manifest.variant(name).kernel_abi is None or manifest.has_fixed_mask:
            return "it does not run on satchel's own attention here (see satchel specialize)"
        return None if adapter is None else "adapters take one token of a sequence in a run"

    def new_cache(self, capacity: int, rows: int = 1, spec: CacheSpec | None = None) -> KVCache:
        """An empty KV cache of `capacity` positions for each of `rows` sequences.

        Without `spec`, it is that of the graphs of prefill and decode. Raises PromptError above the bundle's largest
        context, or if there is not enough memory.
        """
        self.check_capacity(capacity)
        with self._spare_lock:
            spare, self._spare = self._spare, None
        manifest = self.bundle.manifest
        return KVCache(spec or self.bundle.kv_cache, capacity, self.max_context, rows, spare, manifest.states)

    def release(self, cache: Cache) -> None:
        """Keep the memory of one cache for the next, unless it is large.

        The system fills new memory with zeros on the first write, which can take as long as copying what was in it.
        """
        if isinstance(cache, KVCache) and len(cache.memory) <= MAX_SPARE:
            with self._spare_lock:
                self._spare = cache.memory

    def spans(self, count: int, chunk: int | None = None) -> Iterator[slice]:
        return chunks(count, chunk or self._chunk)

    @functools.cached_property
    def _chunk(self) -> int:
        """Tokens of one run of prefill.

        Small ones where something happens between runs: states are kept for the prefix cache, or go to the next stage.
        """
        manifest, made = self.bundle.manifest, specialized_for(self.bundle, self._settings)
        name = made.variant("prefill") if made is not None else None
        own = name is not None and manifest.variant(name).kernel_abi is not None
        stages = 1 if manifest.rank is None else manifest.rank.stages
        return OWN_CHUNK if own and not manifest.states and stages == 1 else PREFILL_CHUNK

    def new_pool(self, rows: int, capacity: int, kept: int, limit: int | None = None, *, force: bool = False) -> Batch:
        session = self.ragged_session()
        if session is not None:
            with self._paging_lock:
                self._paging = self._paging or self._new_paging(session)
            if self._paging.works:
                return self._paging.new_batch(rows, capacity, kept, limit)
        return super().new_pool(rows, capacity, kept, limit, force=force)

    def ragged_session(self) -> ort.InferenceSession | None:
        """The session whose graph takes new tokens of several sequences in one run, if there is one."""
        manifest, made = self.bundle.manifest, self.bundle.specialized
        names = {made.variant(phase) for phase in ("prefill", "decode")} if made is not None else {None}
        name = next(iter(names))
        plain = len(names) == 1 and not manifest.states and manifest.model.rotary_border is None
        return self.sessions[DECODE] if plain and name and manifest.variant(name).ragged else None

    def _new_paging(self, session: ort.InferenceSession) -> Paging:
        return Paging(self, session)

    def _new_batch(self, rows: int, capacity: int, force: bool) -> CpuBatch:
        runner = RowRunner(self.sessions, self.new_cache(capacity, rows), self.bundle.manifest, self.adapters)
        return CpuBatch(self, runner, [CpuState(runner, row) for row in range(rows)], force)

    @functools.cached_property
    def scored_by(self) -> str | None:
        """As `Engine.scored_by`: the variant that runs prefill, if there is one."""
        return scored_by(self.bundle, self._settings)

    def _run_score(self, tokens: Ids, chunk: int | None, logits: Logits, adapter: str | None) -> None:
        for _ in self._run_whole(SCORE, LOGITS, tokens, chunk, lambda span: logits[span], adapter):
            pass

    def _run_hidden(self, tokens: Ids, chunk: int | None, adapter: str | None) -> Iterator[Logits]:
        return self.run_whole(EMBED, tokens, chunk, adapter)

    def run_whole(self, graph: str, tokens: Ids, chunk: int | None, adapter: str | None = None) -> Iterator[Logits]:
        """Run a graph that returns a row for each token. Yields the rows of each span, in a buffer for further ones."""
        width = self.check_embeddings().size if graph == EMBED else self.vocabulary
        buffer: Logits = np.empty((min(chunk or PREFILL_CHUNK, len(tokens)), width), np.float32)
        output = HIDDEN_STATES if graph == EMBED else LOGITS
        return self._run_whole(graph, output, tokens, chunk, lambda span: buffer[: span.stop - span.start], adapter)

    def _run_whole(
        self,
        graph: str,
        output: str,
        tokens: Ids,
        chunk: int | None,
        rows_of: Callable[[slice], Logits],
        adapter: str | None,
    ) -> Iterator[Logits]:
        """Run a graph that returns a row for each token. Yields the rows of each span, in the buffer of `rows_of`."""
        by_prefill = graph == SCORE and self.scored_by is not None  # which has the tokens first, and a cache of its own
        with self._whole_lock:
            session = self._whole.get(graph)
            if session is None:
                opened = ("prefill", self._settings, of_every_token) if by_prefill else (graph, self._settings, None)
                session = self._whole[graph] = open_session(self.bundle, *opened)
        cache = self.new_cache(len(tokens), spec=None if by_prefill else self.bundle.manifest.kv_cache)
        try:
            cache.long = self.bundle.manifest.model.is_long(len(tokens))
            binding, ones = cache.bind(session), np.ones(len(tokens), np.int64)
            for name, tensor in self.adapters.tensors(adapter).items():
                bind_input(binding, name, tensor, tensor.shape)
            lengths = text_lengths(self.bundle.manifest)
            for span in chunks(len(tokens), chunk or PREFILL_CHUNK):
                rows = rows_of(span)
                bind_output(binding, output, rows, (len(rows), 1, rows.shape[1]) if by_prefill else (1, *rows.shape))
                run_span(session, binding, cache, tokens[span], ones.ctypes.data, lengths)
                yield rows
        finally:
            self.release(cache)


class RowRunner:
    """Runs prefill and decode on rows of one KV cache: their buffers, and bindings that are kept across steps."""

    def __init__(self, sessions: Sessions, cache: KVCache, manifest: Manifest, adapters: Adapters) -> None:
        rows, self._capacity = cache.rows, cache.capacity
        self.cache = cache
        self.logits: Logits = np.zeros((rows, manifest.model.vocab_size), np.float32)
        count = manifest.graph("decode").top_tokens
        self.top = (np.zeros((rows, count), np.int64), np.zeros((rows, count), np.float32)) if count else None
        self._sessions = sessions
        self._tokens = np.zeros((rows, 1), np.int64)
        self._ones = np.ones(self._capacity, np.int64)  # the first `total` entries are the mask of one sequence
        self._ones_address = self._ones.ctypes.data
        self._mask = np.zeros(rows * self._capacity, np.int64)
        self._fixed_mask = manifest.has_fixed_mask
        self._adapters = adapters
        self._lengths = text_lengths(manifest)
        self._bindings: dict[tuple[int, int, int, str | None], ort.IOBinding] = {}
        self._ahead: dict[tuple[int, int], tuple[ort.IOBinding, Logits]] = {}

    def prefill(self, row: int, cache: Cache, tokens: Ids) -> None:
        """Feed tokens to one row; `cache` is its part of the cache, with its length."""
        binding = self._binding(PREFILL, row, 1, cache.adapter)
        run_span(self._sessions[PREFILL], binding, cache, tokens, self._ones_address, self._lengths)

    def decode(self, first: int, caches: Sequence[Cache], tokens: Sequence[int] | Ids) -> None:
        """Feed a token to each of several neighboring rows of one adapter, from row `first` on, in one run."""
        for cache in caches:
            cache.begin(1)
        count = len(caches)
        self._tokens[first : first + count, 0] = tokens
        binding = self._binding(DECODE, first, count, caches[0].adapter)
        totals = np.array([cache.length + 1 for cache in caches])
        width = self._capacity if self._fixed_mask else int(totals.max())
        mask = self._mask[: count * width].reshape(count, width)
        np.less(np.arange(width), totals[:, None], out=mask, casting="unsafe")
        bind_input(binding, ATTENTION_MASK, mask, mask.shape)
        run_bound(self._sessions[DECODE], binding, f"with {count} sequences")
        for cache in caches:
            cache.advance(1)

    def decode_one(self, row: int, cache: Cache, token: int) -> None:
        """As `decode`, of one row: its mask is all ones, so nothing is computed or allocated."""
        if self._fixed_mask:
            self.decode(row, (cache,), (token,))
            return
        cache.begin(1)
        self._tokens[row, 0] = token
        binding = self._bindings.get((DECODE, row, 1, cache.adapter)) or self._binding(DECODE, row, 1, cache.adapter)
        length = cache.length
        binding.bind_input(ATTENTION_MASK, "cpu", 0, np.int64, (1, length + 1), self._ones_address)
        run_bound(self._sessions[DECODE], binding, f"at position {length}")
        cache.advance(1)

    def decode_ahead(self, row: int, cache: Cache, tokens: Ids) -> Logits:
        """Feed tokens to one row in one run, as rows that have one cache. Returns logits, [tokens, vocabulary]."""
        count, first = len(tokens), cache.length + 1
        cache.begin(count)
        key = row, count
        if key not in self._ahead:
            binding = self.cache.bind(self._sessions[DECODE], slice(row, row + 1))
            logits = np.empty((count, self.logits.shape[1]), np.float32)
            bind_output(binding, LOGITS, logits, (count, 1, logits.shape[1]))
            self._ahead[key] = binding, logits
        binding, logits = self._ahead[key]
        ids, width = tokens.reshape(count, 1), cache.length + count
        mask = (np.arange(width) < np.arange(first, first + count)[:, None]).astype(np.int64)
        bind_input(binding, INPUT_IDS, ids, ids.shape)
        bind_input(binding, ATTENTION_MASK, mask, mask.shape)
        run_bound(self._sessions[DECODE], binding, f"with {count} tokens at position {cache.length}")
        cache.advance(count)
        return logits

    def _binding(self, phase: int, first: int, count: int, adapter: str | None) -> ort.IOBinding:
        """A binding of `count` rows, from row `first` on, and of an adapter to the graph of a phase."""
        key = phase, first, count, adapter
        binding = self._bindings.get(key)
        if binding is None:
            rows = slice(first, first + count)
            binding = self._bindings[key] = self.cache.bind(self._sessions[phase], rows)
            bind_output(binding, LOGITS, self.logits[rows], (count, 1, self.logits.shape[1]))
            if self.top is not None:
                ids, logits = self.top
                bind_output(binding, TOP_IDS, ids[rows], (count, 1, ids.shape[1]))
                bind_output(binding, TOP_LOGITS, logits[rows], (count, 1, logits.shape[1]))
            for name, tensor in self._adapters.tensors(adapter).items():
                bind_input(binding, name, tensor, tensor.shape)
            if phase == DECODE:
                bind_input(binding, INPUT_IDS, self._tokens[rows], (count, 1))
        return binding


class CpuBatch(Batch):
    """Rows of one KV cache, decoded in one run of the graph if that changes none of them."""

    def __init__(self, engine: CpuEngine, runner: RowRunner, rows: Sequence[CpuState], force: bool) -> None:
        """`rows` are those of the runner's cache.

        `force` decodes all rows in one run even if their logits then differ from those that each has alone.
        """
        self._rows = list(rows)
        super().__init__(engine, self._rows, runner.logits)
        self._runner = runner
        self._force = force

    def exchange(self, row: int, other: int) -> None:
        if row != other:
            self._rows[row].exchange(self._rows[other])

    def _decode(self, tokens: Ids, first: int) -> None:
        if len(tokens) == 1:
            super()._decode(tokens, first)
            return
        rows, start = self.states[first : first + len(tokens)], first
        for adapter, group in itertools.groupby(rows, key=lambda state: state.cache.adapter):
            states = list(group)
            own = tokens[first - start : first - start + len(states)]
            invariant = self._force or (self._engine.batch_invariant and self._engine.invariant_with(adapter))
            if invariant and len(states) > 1:
                for row in self._rows[first : first + len(states)]:
                    row.settle()
                    row.expect(row.cache.length + 1)
                self._runner.decode(first, [state.cache for state in states], own)
                for state, token in zip(states, own.tolist(), strict=True):
                    state.note(token)
            else:
                for state, token in zip(states, own.tolist(), strict=True):
                    state.decode(token)
            first += len(states)


class CpuState(State):
    """A row of a KV cache. A step binds little and copies nothing."""

    def __init__(self, runner: RowRunner, row: int) -> None:
        self._kv = runner.cache.row(row)
        super().__init__(self._kv, runner.logits[row])
        self._runner, self._row = runner, row
        self._top = None if runner.top is None else (runner.top[0][row], runner.top[1][row])

    def best(self, count: int) -> TopTokens | None:
        """The tokens that the graph chose, if it has outputs for `count` of them."""
        return self._top if self._top is not None and count <= len(self._top[0]) else None

    def copy_from(self, other: State, start: int = 0) -> None:
        super().copy_from(other, start)
        if self._top is not None and (theirs := other.best(len(self._top[0]))):
            self._top[0][:], self._top[1][:] = theirs

    def exchange(self, other: CpuState) -> None:
        """Exchange the sequence and its logits with those of another row."""
        self._kv.exchange(other._kv)
        buffers, others = ([state._logits, *(state._top or ())] for state in (self, other))
        for mine, theirs in zip(buffers, others, strict=True):
            mine[:], theirs[:] = theirs.copy(), mine.copy()
        self._fed, other._fed = other._fed, self._fed

    def decode_ahead(self, tokens: Ids) -> Logits:
        return self._runner.decode_ahead(self._row, self.cache, tokens)

    def _prefill(self, tokens: Ids) -> None:
        self._runner.prefill(self._row, self.cache, tokens)

    def _decode(self, token: int) -> None:
        if not self.cache.behind:
            self._runner.decode_one(self._row, self.cache, token)
            return
        tokens, self.cache.behind = np.array([*self.cache.behind, token], np.int64), ()
        self._logits[:] = self.decode_ahead(tokens)[-1]

    def settle(self) -> None:
        """Feed what is behind."""
        tokens, self.cache.behind = np.array(self.cache.behind, np.int64), ()
        if len(tokens):
            self.decode_ahead(tokens)


def text_lengths(manifest: Manifest) -> Ids | None:
    """What the input `text_length` is for short and for long texts, [2, 1, 1]; None where a graph has no such input."""
    border = manifest.model.rotary_border
    return None if border is None else np.array([[[0]], [[border + 1]]], np.int64)


def run_span(
    session: ort.InferenceSession, binding: ort.IOBinding, cache: Cache, tokens: Ids, ones: int, lengths: Ids | None
) -> None:
    """Run a graph on tokens of one sequence and count them in its cache.

    `ones` is the address of as many ones (int64) as the cache has positions, `lengths` those of `text_lengths`.
    """
    count = len(tokens)
    cache.begin(count)
    bind_input(binding, INPUT_IDS, tokens, (1, count))
    binding.bind_input(ATTENTION_MASK, "cpu", 0, np.int64, (1, cache.length + count), ones)
    if lengths is not None:
        bind_input(binding, TEXT_LENGTH, lengths[int(cache.long)], (1, 1))
    run_bound(session, binding, f"at position {cache.length}")
    cache.advance(count)
