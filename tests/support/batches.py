"""A batch of prompts of different lengths through a bundle's graphs, without the runner."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

CAPACITY = 32
Arrays = dict[str, NDArray[np.generic]]
Ids = NDArray[np.int64]


def together(folder: Path, rows: Sequence[Ids], next_ids: Ids) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
    """Prefill `rows` padded on the right, then decode `next_ids` [batch]; the logits of both, [batch, vocabulary]."""
    lengths = [len(row) for row in rows]
    padded = np.stack([np.pad(row, (0, max(lengths) - len(row)), constant_values=7) for row in rows])
    feeds = {"input_ids": padded, "attention_mask": _mask(lengths), **_empty_cache(folder, len(rows))}
    prompt = _run(folder, "prefill", feeds)
    cache = {n.replace("present", "past_key_values"): v for n, v in prompt.items() if n.startswith("present.")}
    grown = _mask([length + 1 for length in lengths])
    step = _run(folder, "decode", {"input_ids": next_ids[:, None], "attention_mask": grown, **cache})
    return prompt["logits"][:, 0], step["logits"][:, 0]


def _mask(lengths: Sequence[int]) -> Ids:
    """1 for the first `length` positions of each row, [batch, longest]."""
    return (np.arange(max(lengths)) < np.asarray(lengths)[:, None]).astype(np.int64)


def _empty_cache(folder: Path, rows: int) -> Arrays:
    inputs = [value for value in _session(folder, "prefill").get_inputs() if value.name.startswith("past_key_values.")]
    return {value.name: np.zeros((rows, value.shape[1], CAPACITY, value.shape[3]), np.float32) for value in inputs}


def _run(folder: Path, phase: str, feeds: Arrays) -> Arrays:
    session = _session(folder, phase)
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, feeds), strict=True))


def _session(folder: Path, phase: str) -> ort.InferenceSession:
    return ort.InferenceSession(folder / f"{phase}.onnx", providers=["CPUExecutionProvider"])
