"""Runs the graphs of a bundle on the CPU without the runner, over caches of full length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from satchel.runtime.bundle.manifest import CacheLayer, Manifest

Values = dict[str, NDArray[np.generic]]


class DynamicGraphs:
    """One graph of a bundle, and the cache that it is given and gives back."""

    def __init__(self, folder: Path, manifest: Manifest, phase: str, capacity: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(folder / f"{phase}.onnx", options, providers=["CPUExecutionProvider"])
        self.layers: tuple[CacheLayer, ...] = manifest.kv_cache.layers
        self.dtype, self.capacity = manifest.kv_cache.dtype, capacity

    def empty(self, rows: int = 1) -> Values:
        """Keys and values of zeros."""
        return {
            name: np.zeros((rows, layer.kv_heads, self.capacity, width), self.dtype)
            for layer in self.layers
            for name, _, width in layer.buffers
        }

    def run(self, ids: NDArray[np.int64], mask: NDArray[np.int64], cache: Values) -> tuple[Values, Values]:
        """All outputs but the cache, and the cache."""
        names = [output.name for output in self.session.get_outputs()]
        feeds = {"input_ids": ids, "attention_mask": mask, **cache}
        found = dict(zip(names, self.session.run(names, feeds), strict=True))
        after = {past: found.pop(present) for layer in self.layers for past, present, _ in layer.buffers}
        return found, after

    def prefill(self, ids: NDArray[np.int64], chunk: int) -> tuple[Values, Values]:
        """A prompt of one row, `chunk` tokens at a time: the last one's outputs, and the cache."""
        cache, found = self.empty(), Values()
        for start in range(0, len(ids), chunk):
            part = ids[None, start : start + chunk]
            found, cache = self.run(part, np.ones((1, start + part.shape[1]), np.int64), cache)
        return found, cache

    def decode(self, ids: list[int], lengths: list[int], cache: Values) -> tuple[Values, Values]:
        """A token for each row, which has so many before; the mask covers the whole cache."""
        mask = np.arange(self.capacity) <= np.asarray(lengths)[:, None]
        return self.run(np.asarray(ids, np.int64)[:, None], mask.astype(np.int64), cache)


def together(folder: Path, rows: Sequence[NDArray[np.int64]], next_ids: NDArray[np.int64]) -> list[NDArray[np.generic]]:
    """Prefill `rows` padded on the right, then decode `next_ids` [batch]; the logits of both, [batch, vocabulary]."""
    manifest = Manifest.read(folder / "manifest.json")
    lengths = np.asarray([len(row) for row in rows])
    padded = np.stack([np.pad(row, (0, max(lengths) - len(row)), constant_values=7) for row in rows])
    found, cache = [], None
    for phase, ids, known in (("prefill", padded, lengths), ("decode", next_ids[:, None], lengths + 1)):
        graphs = DynamicGraphs(folder, manifest, phase, capacity=32)
        mask = (np.arange(max(known)) < known[:, None]).astype(np.int64)
        values, cache = graphs.run(ids, mask, graphs.empty(len(rows)) if cache is None else cache)
        found.append(values["logits"][:, 0])
    return found
