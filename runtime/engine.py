"""The step layer: runs the graphs of a bundle over explicit state. It knows token ids and logits, not text."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from satchel.runtime.binding import bind_cache, bind_input, bind_output
from satchel.runtime.bundle import Bundle
from satchel.runtime.defaults import PROVIDER
from satchel.runtime.errors import BundleError, PromptError
from satchel.runtime.kv_cache import KVCache
from satchel.runtime.session import ORT_ERRORS, SessionSettings, open_both, open_session

PREFILL_CHUNK = 256  # tokens
MOST_SPARE = 64 << 20  # bytes

TokenIds = Sequence[int] | NDArray[np.int64]
Logits = NDArray[np.float32]


class State:
    """One sequence in the making: its KV cache, its buffers, and a binding to each graph that is kept across steps.

    `logits` [vocabulary] float32 are those of the last token fed; the next step overwrites them. A state belongs to one
    thread at a time; different states are independent.
    """

    def __init__(
        self, cache: KVCache, prefill: ort.InferenceSession, decode: ort.InferenceSession, logits: Logits
    ) -> None:
        self.cache = cache
        self.logits = logits
        self.token = np.zeros((1, 1), np.int64)
        self.mask = np.ones(cache.capacity, np.int64)  # the first `total` entries are a step's attention mask
        self.mask_pointer = self.mask.ctypes.data
        self.prefill_binding = bind_cache(prefill, cache)
        self.decode_binding = bind_cache(decode, cache)
        for binding in (self.prefill_binding, self.decode_binding):
            bind_output(binding, "logits", logits, (1, 1, len(logits)))
        bind_input(self.decode_binding, "input_ids", self.token, (1, 1))


class Engine:
    """The sessions of one bundle. Threads may share it, each with states of its own."""

    def __init__(self, bundle: Bundle, settings: SessionSettings) -> None:
        """Open the prefill and the decode graph, in one session where the manifest says so.

        Raises BundleError and ProviderError.
        """
        self.bundle = bundle
        self.vocabulary = bundle.manifest.model.vocab_size
        self.max_context = bundle.manifest.model.max_context
        self._settings = settings
        self._prefill, self._decode = open_both(bundle, settings)
        self._score: ort.InferenceSession | None = None
        self._score_lock = threading.Lock()
        self._spare: mmap.mmap | None = None
        self._spare_lock = threading.Lock()
        self._found: dict[str, bool] = {}
        self._found_lock = threading.Lock()

    @classmethod
    def open(
        cls, bundle: Bundle, provider: str = PROVIDER, threads: int | None = None, *, verbose: bool = False
    ) -> Engine:
        """Open an engine; `threads` None means one per physical core, `verbose` shows ONNX Runtime's own log."""
        return cls(bundle, SessionSettings(provider, threads, verbose))

    @property
    def sessions(self) -> tuple[ort.InferenceSession, ort.InferenceSession]:
        """Those that run prefill and decode: the same one twice where both phases share it."""
        return self._prefill, self._decode

    def new_state(self, capacity: int) -> State:
        """A state with room for `capacity` positions. Raises PromptError above the bundle's largest context."""
        return self.state_over(self.new_cache(capacity), np.zeros(self.vocabulary, np.float32))

    def new_cache(self, capacity: int, rows: int = 1) -> KVCache:
        """A KV cache of `capacity` positions for each of `rows` sequences. Raises PromptError as `new_state` does."""
        if not 1 <= capacity <= self.max_context:
            raise PromptError(
                f"a context of {capacity} positions is not possible: this bundle allows 1 to {self.max_context}: "
                "ask for fewer tokens"
            )
        with self._spare_lock:
            spare, self._spare = self._spare, None
        return KVCache(self.bundle.manifest.kv_cache, capacity, self.max_context, rows, spare)

    def release(self, cache: KVCache) -> None:
        """Take back the memory of a cache that nobody uses any more, for the next one.

        The system fills new memory with zeros when it is first written, which can take as long as a copy of what was
        there would. One cache's memory is kept, unless it is large.
        """
        if len(cache.memory) <= MOST_SPARE:
            with self._spare_lock:
                self._spare = cache.memory

    def state_over(self, cache: KVCache, logits: Logits) -> State:
        """A state over a cache of one row and a buffer for logits, [vocabulary] float32."""
        return State(cache, self._prefill, self._decode, logits)

    def prefill(self, state: State, ids: TokenIds, chunk: int = PREFILL_CHUNK) -> Logits:
        """Feed `ids` after what the state already holds, `chunk` at a time.

        Returns the logits of the last id, [vocabulary] float32: a buffer of the state that its next step overwrites.
        Raises PromptError when there is no id, one is outside the vocabulary, or they do not fit.
        """
        tokens = self.check_ids(ids)
        _check_chunk(chunk)
        state.cache.require(len(tokens))
        for span in chunks(len(tokens), chunk):
            part = tokens[span]
            bind_input(state.prefill_binding, "input_ids", part, (1, len(part)))
            _run(self._prefill, state.prefill_binding, state, len(part))
        return state.logits

    def decode(self, state: State, token: int) -> Logits:
        """Feed one token. Returns its logits, [vocabulary] float32: the same buffer as `prefill` returns.

        Raises PromptError when the token is outside the vocabulary or the context is full.
        """
        if not 0 <= token < self.vocabulary:
            raise PromptError(f"token id {token} is outside the vocabulary: use ids from 0 to {self.vocabulary - 1}")
        state.token[0, 0] = token
        _run(self._decode, state.decode_binding, state, 1)
        return state.logits

    def score(self, ids: TokenIds, chunk: int = PREFILL_CHUNK) -> Logits:
        """The logits of every position of `ids`, [sequence, vocabulary] float32, through the score graph.

        That graph is opened on first use. Raises PromptError as `prefill` does.
        """
        tokens = self.check_ids(ids)
        _check_chunk(chunk)
        session = self._score_session()
        state = self.new_state(len(tokens))
        binding = bind_cache(session, state.cache)
        logits: Logits = np.empty((len(tokens), self.vocabulary), np.float32)
        for span in chunks(len(tokens), chunk):
            part, rows = tokens[span], logits[span]
            bind_input(binding, "input_ids", part, (1, len(part)))
            bind_output(binding, "logits", rows, (1, *rows.shape))
            _run(session, binding, state, len(part))
        return logits

    def once(self, name: str, find: Callable[[], bool]) -> bool:
        """What `find` says, called the first time that this name is asked for."""
        with self._found_lock:
            if name not in self._found:
                self._found[name] = find()
            return self._found[name]

    def end_profiling(self) -> dict[str, Path]:
        """Write the profiles that `SessionSettings.profile` asked for, and record no more.

        Returns the file of "prefill" and that of "decode": the same one where both run in one session.
        """
        files = {"prefill": Path(self._prefill.end_profiling())}
        shared = self._decode is self._prefill
        files["decode"] = files["prefill"] if shared else Path(self._decode.end_profiling())
        return files

    def check_ids(self, ids: TokenIds) -> NDArray[np.int64]:
        """The ids as contiguous int64.

        Raises PromptError when there is none, they are no whole numbers in a row, or one is outside the vocabulary.
        """
        tokens = np.asarray(ids)
        if not tokens.size:
            raise PromptError("the prompt has no tokens: give at least one token to continue from")
        if tokens.ndim != 1 or (tokens.dtype.kind not in "iu" and not all(type(token) is int for token in ids)):
            raise PromptError("token ids must be whole numbers, one after the other: give a list of them")
        outside = [int(token) for token in tokens if not 0 <= token < self.vocabulary]
        if outside:
            raise PromptError(
                f"token id {outside[0]} is outside the vocabulary: use ids from 0 to {self.vocabulary - 1}"
            )
        return np.ascontiguousarray(tokens, np.int64)

    def _score_session(self) -> ort.InferenceSession:
        with self._score_lock:
            if self._score is None:
                self._score = open_session(self.bundle, "score", self._settings)
            return self._score


def chunks(total: int, size: int = PREFILL_CHUNK) -> Iterator[slice]:
    """Spans of up to `size` tokens that cover `total`, none of one token alone if that can be helped.

    Some kernels take tokens in pairs, and round otherwise for one that is left over. With spans of an even size that
    can be the last token of all and no other, whatever was fed before.
    """
    start = 0
    while start < total:
        step = size - 2 if total - start == size + 1 and size > 3 else size
        yield slice(start, min(start + step, total))
        start += step


def _run(session: ort.InferenceSession, binding: ort.IOBinding, state: State, count: int) -> None:
    """Run a step of `count` tokens, whose ids and logits are bound already, and count them in the cache."""
    state.cache.require(count)
    shape = (1, state.cache.length + count)
    binding.bind_input("attention_mask", "cpu", 0, np.int64, shape, state.mask_pointer)
    run_bound(session, binding, f"at position {state.cache.length}")
    state.cache.advance(count)


def run_bound(session: ort.InferenceSession, binding: ort.IOBinding, where: str) -> None:
    """Run a graph on what is bound. Raises BundleError, which says `where`."""
    try:
        session.run_with_iobinding(binding)
    except ORT_ERRORS as error:
        reason = " ".join(str(error).split())
        raise BundleError(f"a graph of this bundle fails {where} ({reason}): export it again") from None


def _check_chunk(chunk: int) -> None:
    if chunk < 1:
        raise PromptError(f"a chunk of {chunk} tokens is not possible: give at least 1")
