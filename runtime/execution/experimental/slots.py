"""Slots on a CUDA device: buffers at fixed addresses, and the CUDA graph that was captured over them.

A captured graph reads and writes the addresses that it was captured with. A slot is therefore everything that decode
touches: the cache and the small inputs and outputs. It has its own graph id and serves sequences one after another. The
first slots of an engine are captured and kept. If more sequences are active at a time, theirs run uncaptured and are
freed afterwards, because ONNX Runtime keeps a captured graph until the session ends.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from satchel.runtime.bundle.contract import LOGITS, TOP_IDS, TOP_LOGITS
from satchel.runtime.bundle.manifest import Manifest
from satchel.runtime.errors import PromptError
from satchel.runtime.execution.experimental.device_memory import Buffer, Memory
from satchel.runtime.execution.kv_cache import Cache
from satchel.runtime.ort.session import ORT_ERRORS

MAX_KEPT = 8
GRAPH_ID, NOT_CAPTURED = "gpu_graph_id", -1
"""The run option that names the CUDA graph, and its value for none."""


class Slot:
    """The buffers of one sequence. `graph` is the id of its CUDA graph, `NOT_CAPTURED` for none."""

    def __init__(self, manifest: Manifest, memory: Memory, capacity: int, graph: int, kept: bool) -> None:
        self.kept = kept
        self.run_options = run_options(graph)
        self.cache: dict[str, Buffer] = {}
        self.present: dict[str, str] = {}
        for layer in manifest.kv_cache.layers:
            for past, present, width in layer.buffers:
                self.cache[past] = memory.buffer((1, layer.kv_heads, capacity, width), manifest.kv_cache.dtype)
                self.present[present] = past
        self.token = memory.feed((1, 1), "int64")
        self.mask = memory.feed((1, capacity), "int64")
        self.results = {LOGITS: memory.result(np.zeros((1, 1, manifest.model.vocab_size), np.float32))}
        if chosen := manifest.graph("decode").top_tokens:
            self.results[TOP_IDS] = memory.result(np.zeros((1, 1, chosen), np.int64))
            self.results[TOP_LOGITS] = memory.result(np.zeros((1, 1, chosen), np.float32))

    def bind_cache(self, session: ort.InferenceSession) -> ort.IOBinding:
        """A binding in which each buffer is past and present at once."""
        binding = session.io_binding()
        for name, buffer in self.cache.items():
            buffer.bind_input(binding, name)
        for name, past in self.present.items():
            self.cache[past].bind_output(binding, name)
        return binding


class DeviceCache(Cache):
    """Keys and values in a slot, which is free for the next sequence once this is released or garbage-collected."""

    def __init__(self, slots: Slots, slot: Slot, capacity: int, limit: int) -> None:
        super().__init__(capacity, limit)
        self.slot = slot
        self.free = weakref.finalize(self, slots.give_back, slot)

    @property
    def past(self) -> Mapping[str, NDArray[Any]]:
        """Copies of the buffers, by past input."""
        return {name: buffer.read() for name, buffer in self.slot.cache.items()}

    @property
    def nbytes(self) -> int:
        """The size of all buffers in bytes."""
        return sum(buffer.nbytes for buffer in self.slot.cache.values())

    def copy_from(self, other: Cache, count: int, start: int = 0) -> None:
        """As `Cache.copy_from`; whole buffers are copied to the device."""
        self._length, self.long = 0, other.long
        self.require(count)
        theirs = other.past
        for name, buffer in self.slot.cache.items():
            values = np.array(buffer.read())
            values[:, :, start:count] = theirs[name][:, :, start:count]
            buffer.write(values)
        self._length = count


class Slots:
    """The slots of an engine. Threads may share it."""

    def __init__(self, manifest: Manifest, memory: Memory, captures: bool) -> None:
        """`captures` tells whether decode runs as a CUDA graph."""
        self._manifest, self._memory, self._captures = manifest, memory, captures
        self._lock = threading.RLock()  # reentrant: a cache can be collected while this thread holds the lock
        self._free: list[Slot] = []
        self._made = 0

    def take(self, capacity: int) -> DeviceCache:
        """An empty cache of `capacity` positions, in buffers of the bundle's largest context. Raises PromptError."""
        size = self._manifest.model.max_context
        with self._lock:
            if self._free:
                return DeviceCache(self, self._free.pop(), capacity, size)
            self._made += 1
            number = self._made
        kept = number <= MAX_KEPT
        try:
            graph = number if kept and self._captures else NOT_CAPTURED
            slot = Slot(self._manifest, self._memory, size, graph, kept)
        except (MemoryError, *ORT_ERRORS) as error:
            reason = " ".join(str(error).split())
            raise PromptError(
                f"the device has no memory for a KV cache of {size} positions ({reason}): "
                "run fewer sequences at a time, or export with a smaller --max-context"
            ) from None
        return DeviceCache(self, slot, capacity, size)

    def give_back(self, slot: Slot) -> None:
        """Keep a slot for the next sequence, or let its memory be freed."""
        if slot.kept:
            with self._lock:
                self._free.append(slot)


def run_options(graph: int) -> ort.RunOptions:
    """Options of runs that are captured under the id `graph`; `NOT_CAPTURED` for none."""
    options = ort.RunOptions()
    options.add_run_config_entry(GRAPH_ID, str(graph))
    return options
