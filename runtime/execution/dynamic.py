"""Graphs for any number of tokens, over a cache that they write in place, in memory of the CPU."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator

import numpy as np
import onnxruntime as ort

from satchel.runtime.bundle.contract import ATTENTION_MASK, INPUT_IDS, LOGITS, TOP_IDS, TOP_LOGITS
from satchel.runtime.bundle.manifest import Manifest
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.execution.kv_cache import Cache, KVCache
from satchel.runtime.execution.spans import PREFILL_CHUNK, chunks
from satchel.runtime.execution.state import Best, Graphs, Ids, Logits, State
from satchel.runtime.ort.binding import bind_cache, bind_input, bind_output, run_bound
from satchel.runtime.ort.session import SessionSettings, open_both, open_session

MOST_SPARE = 64 << 20  # bytes


class DynamicState(State):
    """A state over a cache that is written in place; a step binds little and copies nothing."""

    def __init__(
        self,
        cache: KVCache,
        logits: Logits,
        sessions: tuple[ort.InferenceSession, ort.InferenceSession],
        manifest: Manifest,
    ) -> None:
        super().__init__(cache, logits)
        self._sessions = sessions
        self._token = np.zeros((1, 1), np.int64)
        self._mask = np.ones(cache.capacity, np.int64)  # the first `total` entries are a step's attention mask
        self._mask_pointer = self._mask.ctypes.data
        count = manifest.graph("decode").top_tokens
        self._best = Best(np.zeros(count, np.int64), np.zeros(count, np.float32)) if count else None
        bindings = []
        for session in sessions:
            binding = bind_cache(session, cache)
            bind_output(binding, LOGITS, logits, (1, 1, len(logits)))
            if self._best is not None:
                bind_output(binding, TOP_IDS, self._best.ids, (1, 1, count))
                bind_output(binding, TOP_LOGITS, self._best.logits, (1, 1, count))
            bindings.append(binding)
        self._prefill_binding, self._decode_binding = bindings
        bind_input(self._decode_binding, INPUT_IDS, self._token, (1, 1))
        self._fixed_mask = np.zeros(cache.capacity, np.int64) if manifest.has_fixed_mask else None

    def best(self, count: int) -> Best | None:
        """The tokens that the graph chose, where it has outputs for `count` of them."""
        return self._best if self._best is not None and count <= len(self._best.ids) else None

    def hold(self, other: State, start: int = 0) -> None:
        super().hold(other, start)
        if self._best is not None and (theirs := other.best(len(self._best.ids))):
            self._best.ids[:], self._best.logits[:] = theirs

    def feed(self, tokens: Ids) -> None:
        bind_input(self._prefill_binding, INPUT_IDS, tokens, (1, len(tokens)))
        run_step(self._sessions[0], self._prefill_binding, self._cache, len(tokens), self._mask_pointer)

    def step(self, token: int) -> None:
        self._token[0, 0] = token
        if self._fixed_mask is None:
            run_step(self._sessions[1], self._decode_binding, self._cache, 1, self._mask_pointer)
            return
        cache = self._cache
        cache.require(1)
        self._fixed_mask[: cache.length + 1] = 1
        self._fixed_mask[cache.length + 1 :] = 0
        bind_input(self._decode_binding, ATTENTION_MASK, self._fixed_mask, (1, cache.capacity))
        run_bound(self._sessions[1], self._decode_binding, f"at position {cache.length}")
        cache.advance(1)


class DynamicGraphs(Graphs[KVCache]):
    """The prefill, decode and score graphs of `manifest.graphs` on the CPU."""

    def __init__(self, bundle: Bundle, settings: SessionSettings) -> None:
        """Open prefill and decode, in one session where the manifest says so. Raises BundleError and ProviderError."""
        self._bundle, self._settings = bundle, settings
        self._sessions = open_both(bundle, settings)
        self._score: ort.InferenceSession | None = None
        self._score_lock = threading.Lock()
        self._spare: mmap.mmap | None = None
        self._spare_lock = threading.Lock()

    @property
    def sessions(self) -> tuple[ort.InferenceSession, ort.InferenceSession]:
        """That of prefill and that of decode: the same one twice where both phases share it."""
        return self._sessions

    def sessions_for(self, count: int | None) -> tuple[ort.InferenceSession, ...]:
        return self._sessions[1:] if count is None else self._sessions[:1]

    @property
    def rows_need_turns(self) -> bool:
        """Where the decode graph takes a fixed number of rows, or is made for a device: masks of one length, choice."""
        manifest = self._bundle.manifest
        decode = manifest.graph("decode")
        fixed = any(isinstance(tensor.shape[0], int) for tensor in decode.inputs)
        return fixed or manifest.has_fixed_mask or decode.top_tokens > 0

    def new_cache(self, capacity: int, rows: int = 1) -> KVCache:
        with self._spare_lock:
            spare, self._spare = self._spare, None
        manifest = self._bundle.manifest
        return KVCache(manifest.kv_cache, capacity, manifest.model.max_context, rows, spare)

    def release(self, cache: Cache) -> None:
        """Keep the memory of one cache for the next, unless it is large.

        The system fills new memory with zeros when it is first written, which can take as long as a copy of what was
        there would.
        """
        if isinstance(cache, KVCache) and len(cache.memory) <= MOST_SPARE:
            with self._spare_lock:
                self._spare = cache.memory

    def state(self, cache: KVCache, logits: Logits) -> DynamicState:
        return DynamicState(cache, logits, self._sessions, self._bundle.manifest)

    def spans(self, count: int, chunk: int | None) -> Iterator[slice]:
        return chunks(count, chunk or PREFILL_CHUNK)

    def score(self, tokens: Ids, chunk: int | None, logits: Logits) -> None:
        session = self._score_session()
        cache = self.new_cache(len(tokens))
        binding, mask = bind_cache(session, cache), np.ones(len(tokens), np.int64)
        for span in self.spans(len(tokens), chunk):
            part, rows = tokens[span], logits[span]
            bind_input(binding, INPUT_IDS, part, (1, len(part)))
            bind_output(binding, LOGITS, rows, (1, *rows.shape))
            run_step(session, binding, cache, len(part), mask.ctypes.data)

    def _score_session(self) -> ort.InferenceSession:
        with self._score_lock:
            if self._score is None:
                self._score = open_session(self._bundle, "score", self._settings)
            return self._score


def run_step(session: ort.InferenceSession, binding: ort.IOBinding, cache: Cache, count: int, mask: int) -> None:
    """Run a step of `count` tokens, whose ids and logits are bound already, and count them in the cache.

    `mask` is the address of as many ones (int64) as the cache has positions.
    """
    cache.require(count)
    binding.bind_input(ATTENTION_MASK, "cpu", 0, np.int64, (1, cache.length + count), mask)
    run_bound(session, binding, f"at position {cache.length}")
    cache.advance(count)
