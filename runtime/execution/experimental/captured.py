"""Graphs for any number of tokens on a CUDA device, whose decode step is captured as a CUDA graph.

Each decode step has the same shapes and addresses: one token, a mask as long as the whole cache, and the cache updated
in place. Its outputs stay on the device until they are read: the most likely tokens, if the graph chooses them, or all
logits.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import onnxruntime as ort

from satchel.runtime.bundle.contract import ATTENTION_MASK, INPUT_IDS, LOGITS, TEXT_LENGTH, TOP_IDS, TOP_LOGITS
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.execution.batch import Batch
from satchel.runtime.execution.cpu import text_lengths
from satchel.runtime.execution.engine import Engine
from satchel.runtime.execution.experimental.device_memory import memory_of
from satchel.runtime.execution.experimental.slots import NOT_CAPTURED, DeviceCache, Slots, run_options
from satchel.runtime.execution.kv_cache import Cache
from satchel.runtime.execution.spans import PREFILL_CHUNK, chunks
from satchel.runtime.execution.state import Ids, Logits, State, TopTokens
from satchel.runtime.ort.binding import bind_output, run_bound
from satchel.runtime.ort.providers import CUDA_GRAPH
from satchel.runtime.ort.session import SessionSettings, open_both, open_session


class CapturedState(State):
    """A state in a slot of the device."""

    def __init__(
        self,
        cache: DeviceCache,
        logits: Logits,
        sessions: tuple[ort.InferenceSession, ort.InferenceSession],
        *,
        fixed_mask: bool,
        top_tokens: int,
        lengths: Ids | None = None,
    ) -> None:
        """`lengths` are those of `text_lengths`."""
        super().__init__(cache, logits)
        self._lengths = lengths
        self._slot = slot = cache.slot
        self._sessions = sessions
        self._fixed_mask, self._top_tokens = fixed_mask, top_tokens
        self._read = True  # whether `_logits` are those of the last step
        self._stepped = False
        self._uncaptured = run_options(NOT_CAPTURED)
        self._prefill_binding, self._decode_binding = (slot.bind_cache(session) for session in sessions)
        for binding in (self._prefill_binding, self._decode_binding):
            for name, result in slot.results.items():
                result.bind(binding, name)
        slot.token.bind(self._decode_binding, INPUT_IDS)
        if fixed_mask:
            slot.mask.bind(self._decode_binding, ATTENTION_MASK)

    @property
    def logits(self) -> Logits:
        """Those of the last token fed, [vocabulary] float32; copied from the device on first use."""
        if not self._read:
            self._logits[:] = self._slot.results[LOGITS].read()[0, 0]
            self._read = True
        return self._logits

    def best(self, count: int) -> TopTokens | None:
        """The tokens that the graph chose, if it has outputs for `count` of them and has run since the last copy."""
        if not self._stepped or count > self._top_tokens:
            return None
        ids, logits = (self._slot.results[name].read()[0, 0] for name in (TOP_IDS, TOP_LOGITS))
        return ids, logits

    def copy_from(self, other: State, start: int = 0) -> None:
        super().copy_from(other, start)
        self._read, self._stepped = True, False

    def _prefill(self, tokens: Ids) -> None:
        cache, binding = self.cache, self._prefill_binding
        cache.require(len(tokens))
        binding.bind_cpu_input(INPUT_IDS, tokens[None])
        binding.bind_cpu_input(ATTENTION_MASK, np.ones((1, cache.length + len(tokens)), np.int64))
        if self._lengths is not None:
            binding.bind_cpu_input(TEXT_LENGTH, self._lengths[int(cache.long)])
        self._run(self._sessions[0], binding, self._uncaptured, len(tokens))

    def _decode(self, token: int) -> None:
        cache, slot, binding = self.cache, self._slot, self._decode_binding
        cache.require(1)
        slot.token.array[0, 0] = token
        slot.token.send(binding, INPUT_IDS)
        if self._fixed_mask:
            slot.mask.array[0, : cache.length + 1] = 1
            slot.mask.array[0, cache.length + 1 :] = 0
            slot.mask.send(binding, ATTENTION_MASK)
        else:
            binding.bind_cpu_input(ATTENTION_MASK, np.ones((1, cache.length + 1), np.int64))
        self._run(self._sessions[1], binding, slot.run_options, 1)

    def _run(self, session: ort.InferenceSession, binding: ort.IOBinding, options: ort.RunOptions, count: int) -> None:
        run_bound(session, binding, f"at position {self.cache.length}", options)
        self.cache.advance(count)
        self._read, self._stepped = False, True


class CapturedEngine(Engine):
    """The prefill, decode and score graphs of `manifest.graphs` on a CUDA device."""

    def __init__(self, bundle: Bundle, settings: SessionSettings) -> None:
        """Open prefill and decode, in one session if the manifest says so. Raises BundleError and ProviderError."""
        super().__init__(bundle, settings)
        self._sessions = open_both(bundle, settings)
        captures = settings.provider.session_options(bundle.manifest)[CUDA_GRAPH] == "1"
        self._slots = Slots(bundle.manifest, memory_of(settings.provider), captures)
        self._score: ort.InferenceSession | None = None
        self._lock = threading.Lock()

    @property
    def sessions(self) -> tuple[ort.InferenceSession, ort.InferenceSession]:
        """That of prefill and that of decode: the same one twice if both phases share it."""
        return self._sessions

    def sessions_for(self, count: int | None) -> tuple[ort.InferenceSession, ...]:
        return self._sessions[1:] if count is None else self._sessions[:1]

    def release(self, cache: Cache) -> None:
        if isinstance(cache, DeviceCache):
            cache.free()

    def spans(self, count: int, chunk: int | None = None) -> Iterator[slice]:
        return chunks(count, chunk or PREFILL_CHUNK)

    def _new_batch(self, rows: int, capacity: int, force: bool) -> Batch:
        manifest, logits = self.bundle.manifest, np.zeros((rows, self.vocabulary), np.float32)
        fixed, count = manifest.has_fixed_mask, manifest.graph("decode").top_tokens
        slots, lengths = self._slots, text_lengths(manifest)
        states = [
            CapturedState(
                slots.take(capacity), row, self._sessions, fixed_mask=fixed, top_tokens=count, lengths=lengths
            )
            for row in logits
        ]
        return Batch(self, states, logits)

    def _run_score(self, tokens: Ids, chunk: int | None, logits: Logits, adapter: str | None) -> None:
        with self._lock:
            if self._score is None:
                self._score = open_session(self.bundle, "score", self._settings)
            session = self._score
        cache, manifest = self._slots.take(len(tokens)), self.bundle.manifest
        lengths = text_lengths(manifest)
        length = None if lengths is None else lengths[int(manifest.model.is_long(len(tokens)))]
        try:
            binding, options = cache.slot.bind_cache(session), run_options(NOT_CAPTURED)
            for span in self.spans(len(tokens), chunk):
                part, rows = tokens[span], logits[span]
                binding.bind_cpu_input(INPUT_IDS, part[None])
                binding.bind_cpu_input(ATTENTION_MASK, np.ones((1, span.stop), np.int64))
                if length is not None:
                    binding.bind_cpu_input(TEXT_LENGTH, length)
                bind_output(binding, LOGITS, rows, (1, *rows.shape))
                run_bound(session, binding, f"at position {cache.length}", options)
                cache.advance(len(part))
        finally:
            self.release(cache)
