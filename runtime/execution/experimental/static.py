"""Graphs with fully static shapes and a double-buffered KV cache.

They are for devices that compile a graph for each combination of shapes: every part of a graph always sees the same.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from satchel.runtime.bundle.contract import LOGITS
from satchel.runtime.bundle.graph_specs import GraphSpec, StaticGraph, TensorSpec
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.execution.batch import Batch
from satchel.runtime.execution.engine import Engine
from satchel.runtime.execution.experimental.device_memory import Buffer, Feed, Memory, Result, memory_of
from satchel.runtime.execution.experimental.om_cache import Workplace
from satchel.runtime.execution.experimental.static_inputs import StaticInputs
from satchel.runtime.execution.experimental.swapped_cache import SwappedCache
from satchel.runtime.execution.kv_cache import Cache
from satchel.runtime.execution.spans import covering, padded_spans
from satchel.runtime.execution.state import Ids, Logits, State
from satchel.runtime.ort.binding import run_bound
from satchel.runtime.ort.session import SessionSettings, open_part


@dataclass(frozen=True, eq=False)
class Chain:
    """One static graph, opened: the sessions of its parts, which run one after the other."""

    graph: StaticGraph
    sessions: tuple[ort.InferenceSession, ...]


class _Bound:
    """The buffers of one state for one chain: inputs, intermediate results, and bindings for each side of the cache."""

    def __init__(self, chain: Chain, cache: SwappedCache, memory: Memory, logits: Logits) -> None:
        self.feeds: dict[str, Feed] = {}
        self._chain, self._cache = chain, cache
        self._version = cache.version
        self._bindings: dict[int, list[ort.IOBinding]] = {}
        self._between: dict[str, Buffer] = {}
        self._logits: Result | None = None
        for part in chain.graph.parts:
            for tensor in part.inputs:
                if tensor.name not in cache.inputs() | self._between | self.feeds:
                    self.feeds[tensor.name] = memory.feed(_numbers(tensor), tensor.dtype)
            for tensor in part.outputs:
                if tensor.name == LOGITS:
                    self._logits = memory.result(logits.reshape(_numbers(tensor)))
                elif tensor.name not in cache.outputs():
                    self._between[tensor.name] = memory.buffer(_numbers(tensor), tensor.dtype)

    def bindings(self) -> list[ort.IOBinding]:
        """A binding for each part, for the current side of the cache."""
        cache = self._cache
        if self._version != cache.version:
            self._version, self._bindings = cache.version, {}
        if cache.side not in self._bindings:
            pairs = zip(self._chain.graph.parts, self._chain.sessions, strict=True)
            self._bindings[cache.side] = [self._bind(part, session.io_binding()) for part, session in pairs]
        return self._bindings[cache.side]

    def _bind(self, part: GraphSpec, binding: ort.IOBinding) -> ort.IOBinding:
        inputs, outputs = self._between | self._cache.inputs(), self._between | self._cache.outputs()
        for tensor in part.inputs:
            if tensor.name in self.feeds:
                self.feeds[tensor.name].bind(binding, tensor.name)
            else:
                inputs[tensor.name].bind_input(binding, tensor.name)
        for tensor in part.outputs:
            if tensor.name == LOGITS and self._logits is not None:
                self._logits.bind(binding, tensor.name)
            else:
                outputs[tensor.name].bind_output(binding, tensor.name)
        return binding


class StaticState(State):
    """A state over a double-buffered cache. Bindings are made for each graph when it first runs, and kept."""

    def __init__(self, engine: StaticEngine, cache: SwappedCache, logits: Logits) -> None:
        super().__init__(cache, logits)
        self._swapped = cache
        self._engine = engine
        self._bound: dict[Chain, _Bound] = {}

    def _prefill(self, tokens: Ids) -> None:
        self.run(self._engine.prefill_for(len(tokens)), tokens, self._logits)

    def _decode(self, token: int) -> None:
        self.run(self._engine.decode_chain, np.array([token], np.int64), self._logits)

    def run(self, chain: Chain, tokens: Ids, logits: Logits) -> None:
        """Run a chain on up to as many tokens as it holds, and count them in the cache.

        `logits` is the buffer for its logits, the same one at every run of this chain.
        """
        cache = self._swapped
        cache.require(len(tokens))
        bound = self._bound.get(chain)
        if bound is None:
            bound = self._bound[chain] = _Bound(chain, cache, self._engine.memory, logits)
        arrays = {name: feed.array for name, feed in bound.feeds.items()}
        self._engine.inputs.fill(arrays, tokens, cache.length, long=cache.long)
        with self._engine.workplace.first_run(chain):
            for part, session, binding in zip(chain.graph.parts, chain.sessions, bound.bindings(), strict=True):
                for tensor in part.inputs:
                    if tensor.name in bound.feeds:
                        bound.feeds[tensor.name].send(binding, tensor.name)
                run_bound(session, binding, f"at position {cache.length}")
        cache.swap(len(tokens))


class StaticEngine(Engine):
    """The static graphs of a bundle, on the CPU or on a device."""

    def __init__(self, bundle: Bundle, settings: SessionSettings) -> None:
        """Open prefill and decode. Raises BundleError and ProviderError."""
        static = bundle.manifest.static
        if static is None:
            raise ValueError("there are no static graphs")
        # Relative paths would break: the working directory may change while graphs are opened.
        super().__init__(bundle.absolute(), settings)
        self._static = static
        self.memory = memory_of(settings.provider)
        self.inputs = StaticInputs(bundle, static)
        self.workplace = Workplace.of(bundle, settings.provider)
        self._prefill = [self._open(f"prefill[{index}]", graph) for index, graph in enumerate(static.prefill)]
        self.decode_chain = self._open("decode", static.decode)
        self._score: Chain | None = None
        self._lock = threading.Lock()
        self._spare: SwappedCache | None = None

    @property
    def sessions(self) -> tuple[ort.InferenceSession, ...]:
        """Those of the prefill graphs, the shortest first, part by part, and of decode."""
        return tuple(session for chain in (*self._prefill, self.decode_chain) for session in chain.sessions)

    def sessions_for(self, count: int | None) -> tuple[ort.InferenceSession, ...]:
        return (self.decode_chain if count is None else self.prefill_for(count)).sessions

    @property
    def piece_invariant(self) -> bool:
        """False: pieces smaller than the graphs would only be padded."""
        return False

    def prefill_for(self, count: int) -> Chain:
        """The shortest prefill graph that holds `count` tokens."""
        return self._prefill[covering(count, self._lengths)]

    def _new_cache(self, capacity: int) -> SwappedCache:
        with self._lock:
            spare, self._spare = self._spare, None
        if spare is not None:
            spare.reopen(capacity)
            return spare
        spec = self.bundle.manifest.kv_cache
        return SwappedCache(spec, self.memory, self._static.capacity, capacity, self.max_context)

    def release(self, cache: Cache) -> None:
        """Keep one cache for the next: all have the full capacity, so any fits."""
        if isinstance(cache, SwappedCache):
            with self._lock:
                self._spare = cache

    def spans(self, count: int, chunk: int | None = None) -> Iterator[slice]:
        return padded_spans(count, chunk, self._lengths)

    def _new_batch(self, rows: int, capacity: int, force: bool) -> Batch:
        logits = np.zeros((rows, self.vocabulary), np.float32)
        return Batch(self, [StaticState(self, self._new_cache(capacity), row) for row in logits], logits)

    def _run_score(self, tokens: Ids, chunk: int | None, logits: Logits, adapter: str | None) -> None:
        chain, cache = self._score_chain(), self._new_cache(len(tokens))
        try:
            cache.long = self.bundle.manifest.model.is_long(len(tokens))
            state = StaticState(self, cache, logits[0])
            rows = np.zeros((chain.graph.tokens, logits.shape[1]), np.float32)
            for span in padded_spans(len(tokens), chunk, [chain.graph.tokens]):
                state.run(chain, tokens[span], rows)
                logits[span] = rows[: span.stop - span.start]
        finally:
            self.release(cache)

    @property
    def _lengths(self) -> Sequence[int]:
        return [graph.tokens for graph in self._static.prefill]

    def _score_chain(self) -> Chain:
        with self._lock:
            if self._score is None:
                self._score = self._open("score", self._static.score)
            return self._score

    def _open(self, key: str, graph: StaticGraph) -> Chain:
        with self.workplace.entered():
            sessions = [
                open_part(self.bundle, part, f"static.{key}.parts[{index}]", self._settings)
                for index, part in enumerate(graph.parts)
            ]
        return Chain(graph, tuple(sessions))


def _numbers(tensor: TensorSpec) -> tuple[int, ...]:
    """The shape of a tensor; the check of the manifest ensures that all sizes are numbers."""
    return tuple(size for size in tensor.shape if isinstance(size, int))
