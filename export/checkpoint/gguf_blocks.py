"""Says which block types of GGUF lie on a grid that kernels read, so that they can be kept, and with which scales.

Layouts are those of ggml (ggml/src/ggml-common.h). A block can be kept only where its values are quantized values times
a scale, to the last bit. Those with minimums are not: DequantizeLinear has whole zero points only, and with the float
ones of MatMulNBits, ONNX Runtime widens the whole matrix at each call.
"""

from __future__ import annotations

from collections.abc import Callable

import gguf
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from satchel.graphs.ir.weights import LazyWeight
from satchel.graphs.quant.recipe import Scheme
from satchel.graphs.quant.stored import GRID, WIDENED, StoredGrid

_Type = gguf.GGMLQuantizationType
_Read = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""Takes blocks [.., bytes]; returns the scales of each, [.., groups of a block]."""


def _half(low: int) -> _Read:
    """Read the float16 at a place of each block."""
    return lambda blocks: np.ascontiguousarray(blocks[..., low : low + 2]).view(np.float16).astype(np.float32)


def _scales_of_q6_k(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    return _half(208)(blocks) * np.ascontiguousarray(blocks[..., 192:208]).view(np.int8).astype(np.float32)


_KEPT: dict[gguf.GGMLQuantizationType, tuple[Scheme, _Read]] = {
    _Type.Q4_0: (Scheme(4, 32), _half(0)),
    _Type.Q5_0: (Scheme(8, 32), _half(0)),
    _Type.Q8_0: (Scheme(8, 32), _half(0)),
    _Type.Q6_K: (Scheme(8, 16), _scales_of_q6_k),
}
"""Types without minimums: the grid that holds their values, and how their scales are read."""

_FLOATS = (_Type.F32, _Type.F16, _Type.BF16)


def mark_blocks(weight: LazyWeight, quantization: gguf.GGMLQuantizationType, stored: NDArray[np.uint8]) -> None:
    """Mark a weight [.., outputs, inputs] with the grid that its blocks lie on, or with the reason that none does.

    Args:
        weight: The dequantized weight.
        quantization: Its storage type.
        stored: Its bytes, [.., outputs, bytes of a row].
    """
    if quantization in _FLOATS:
        return
    blocks = stored.reshape(*stored.shape[:-1], -1, gguf.GGML_QUANT_SIZES[quantization][1])
    if quantization in _KEPT:
        scheme, read = _KEPT[quantization]
        weight.meta[GRID] = StoredGrid(scheme, _scales(weight, blocks, read, scheme))
    else:
        weight.meta[WIDENED] = f"no kernel reads its {quantization.name} blocks"


def _scales(weight: LazyWeight, blocks: NDArray[np.uint8], read: _Read, scheme: Scheme) -> LazyWeight:
    """The scales [.., outputs, groups] of a weight."""
    shape = (*weight.dims[:-1], weight.dims[-1] // (scheme.block or weight.dims[-1]))

    def rows(start: int, stop: int) -> NDArray[np.float32]:
        part = blocks[start:stop]
        return read(part).reshape(len(part), *shape[1:])

    columns = (lambda a, b: rows(0, shape[0])[:, a:b]) if len(shape) > 1 else None
    return LazyWeight(f"{weight.name}.scales", shape, ir.DataType.FLOAT, rows, columns)
