"""Passes weights to a session as memory, so that a provider that compiles whole graphs gets their values."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from satchel.runtime.bundle import onnx_wire
from satchel.runtime.bundle.dtypes import BY_ONNX
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.errors import BundleError


def hand_over_weights(bundle: Bundle, name: str, options: ort.SessionOptions) -> list[NDArray[np.generic]]:
    """Give `options` the weights of the graph file `name`, mapped from the bundle.

    Otherwise ONNX Runtime passes the relative path of the weights to a provider that compiles whole graphs, and not the
    weights themselves.

    Returns:
        The mapped weights; they must be kept for as long as the session.

    Raises:
        BundleError: A weight does not lie in its file, or has a type that numpy lacks.
    """
    where = str(bundle.folder / name)
    try:
        tensors = list(onnx_wire.external_tensors(bundle.read(name)).values())
        arrays = [_mapped(bundle, tensor) for tensor in tensors]
    except (ValueError, KeyError, OSError) as error:
        raise BundleError(f"{where}: its weights cannot be mapped ({error}): copy or export the bundle again") from None
    if tensors:
        options.add_external_initializers(
            [tensor.name for tensor in tensors], [ort.OrtValue.ortvalue_from_numpy(array) for array in arrays]
        )
    return arrays


def _mapped(bundle: Bundle, tensor: onnx_wire.Tensor) -> NDArray[np.generic]:
    known = BY_ONNX.get(tensor.dtype)
    if known is None or not known.nbytes:
        raise ValueError(f"{tensor.name} is of type {tensor.dtype}")
    dtype = np.dtype(known.name)
    span, offset = bundle.span(tensor.place["location"]), int(tensor.place.get("offset", "0"))
    length = int(np.prod(tensor.dims, dtype=np.int64)) * dtype.itemsize
    if offset < 0 or offset + length > span.length:
        raise ValueError(f"{tensor.name} goes beyond its file")
    # Copy on write: ONNX Runtime takes writable arrays only, and writes to none.
    whole = np.memmap(span.path, np.uint8, mode="c", offset=span.offset + offset, shape=(length,))
    return whole.view(dtype).reshape(tensor.dims)
