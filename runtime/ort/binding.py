"""Binds numpy arrays to a graph's inputs and outputs, so that a step copies nothing.

Bindings hold addresses only: whoever binds an array keeps it alive until the last run.
"""

from __future__ import annotations

from typing import Any

import onnxruntime as ort
from numpy.typing import NDArray

from satchel.runtime.errors import BundleError
from satchel.runtime.execution.kv_cache import KVCache
from satchel.runtime.ort.session import ORT_ERRORS


def bind_cache(session: ort.InferenceSession, cache: KVCache, rows: int | None = None) -> ort.IOBinding:
    """A binding in which each buffer of the cache is past and present at once: the graph writes in place.

    `rows` binds the first of its rows only; None means all.
    """
    binding = session.io_binding()
    count = cache.rows if rows is None else rows
    for name, buffer in cache.past.items():
        bind_input(binding, name, buffer, (count, *buffer.shape[1:]))
    for name, buffer in cache.present.items():
        bind_output(binding, name, buffer, (count, *buffer.shape[1:]))
    return binding


def bind_input(binding: ort.IOBinding, name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
    """Let the graph read input `name` of this shape from the array's memory."""
    binding.bind_input(name, "cpu", 0, array.dtype.type, shape, array.ctypes.data)


def bind_output(binding: ort.IOBinding, name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
    """Let the graph write output `name` of this shape into the array's memory."""
    binding.bind_output(name, "cpu", 0, array.dtype.type, shape, array.ctypes.data)


def run_bound(
    session: ort.InferenceSession, binding: ort.IOBinding, where: str, options: ort.RunOptions | None = None
) -> None:
    """Run a graph on what is bound. Raises BundleError, which says `where`."""
    try:
        session.run_with_iobinding(binding, options)
    except ORT_ERRORS as error:
        reason = " ".join(str(error).split())
        raise BundleError(f"a graph of this bundle fails {where} ({reason}): export it again") from None
