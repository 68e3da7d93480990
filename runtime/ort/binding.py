"""Binds numpy arrays to a graph's inputs and outputs, so that a step copies nothing.

Bindings hold addresses only: the caller keeps an array alive until the last run.
"""

from __future__ import annotations

from typing import Any

import onnxruntime as ort
from numpy.typing import NDArray

from satchel.runtime.errors import BundleError
from satchel.runtime.ort.session import ORT_ERRORS


def bind_input(binding: ort.IOBinding, name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
    """Let the graph read input `name` of this shape from the array's memory."""
    binding.bind_input(name, "cpu", 0, array.dtype.type, shape, array.ctypes.data)


def bind_output(binding: ort.IOBinding, name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
    """Let the graph write output `name` of this shape into the array's memory."""
    binding.bind_output(name, "cpu", 0, array.dtype.type, shape, array.ctypes.data)


def run_bound(
    session: ort.InferenceSession, binding: ort.IOBinding, where: str, options: ort.RunOptions | None = None
) -> None:
    """Run a graph on its bound inputs and outputs. Raises BundleError, which says `where`."""
    try:
        session.run_with_iobinding(binding, options)
    except ORT_ERRORS as error:
        reason = " ".join(str(error).split())
        raise BundleError(f"a graph of this bundle fails {where} ({reason}): export it again") from None
