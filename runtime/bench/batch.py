"""Several sequences of one length that go through a bundle's graphs together."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from satchel.runtime.binding import bind_cache, bind_input, bind_output
from satchel.runtime.engine import Engine
from satchel.runtime.errors import BundleError, PromptError
from satchel.runtime.kv_cache import KVCache
from satchel.runtime.manifest import Manifest
from satchel.runtime.session import ORT_ERRORS


class Batch:
    """Rows that one run of the graph prefills and one run per step decodes, all at the same position.

    `logits` [rows, vocabulary] float32 are those of each row's last token; the next step overwrites them. A batch
    belongs to one thread at a time. Where a phase rounds activations with one scale for all that it is fed, the rows'
    numbers depend on each other a little.
    """

    def __init__(self, engine: Engine, rows: int, capacity: int) -> None:
        """Allocate `capacity` positions for each of `rows` sequences. Raises PromptError."""
        manifest = engine.bundle.manifest
        check_rows(manifest, rows)
        self.cache = KVCache(manifest.kv_cache, capacity, engine.max_context, rows)
        self.logits: NDArray[np.float32] = np.zeros((rows, engine.vocabulary), np.float32)
        self._tokens = np.zeros((rows, 1), np.int64)
        self._mask = np.ones(rows * capacity, np.int64)  # all ones: its first rows x total entries are [rows, total]
        self._prefill, self._decode = engine.sessions
        self._prefill_binding, self._decode_binding = self._bound(self._prefill), self._bound(self._decode)
        bind_input(self._decode_binding, "input_ids", self._tokens, self._tokens.shape)

    def prefill(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Feed the prompts, ids [rows, count], in one run: the attention operator takes several rows' parts only once.

        Returns `logits`. Raises PromptError when they do not fit or the rows hold something already.
        """
        if self.cache.length:
            raise PromptError("a batch takes its prompts once: start another")
        prompts = np.ascontiguousarray(ids)
        bind_input(self._prefill_binding, "input_ids", prompts, prompts.shape)
        self._run(self._prefill, self._prefill_binding, prompts.shape[1])
        return self.logits

    def decode(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Feed one token per row, [rows]. Returns `logits`. Raises PromptError when the context is full."""
        self._tokens[:, 0] = tokens
        self._run(self._decode, self._decode_binding, 1)
        return self.logits

    def _bound(self, session: ort.InferenceSession) -> ort.IOBinding:
        binding = bind_cache(session, self.cache)
        rows, vocabulary = self.logits.shape
        bind_output(binding, "logits", self.logits, (rows, 1, vocabulary))
        return binding

    def _run(self, session: ort.InferenceSession, binding: ort.IOBinding, count: int) -> None:
        self.cache.require(count)
        bind_input(binding, "attention_mask", self._mask, (self.cache.rows, self.cache.length + count))
        try:
            session.run_with_iobinding(binding)
        except ORT_ERRORS as error:
            reason = " ".join(str(error).split())
            raise BundleError(
                f"a graph of this bundle fails with {self.cache.rows} sequences ({reason}): export it again"
            ) from None
        self.cache.advance(count)


def check_rows(manifest: Manifest, rows: int) -> None:
    """Raise PromptError unless the bundle's graphs take `rows` sequences at once."""
    if rows < 1:
        raise PromptError(f"--batch {rows}: must be 1 or more")
    for tensor in (*manifest.graphs.prefill.inputs, *manifest.graphs.decode.inputs):
        if isinstance(tensor.shape[0], int) and tensor.shape[0] != rows:
            raise PromptError(f"--batch {rows}: the graphs of this bundle take {tensor.shape[0]} at a time")
