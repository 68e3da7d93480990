"""The scales of an int8 KV cache, from the largest keys and values on a calibration text."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from satchel.export.errors import ExportError
from satchel.graphs.ir.values import MICROSOFT, last_dim, nodes
from satchel.graphs.quant.quantized import KVScales
from satchel.runtime.bundle.contract import past_names, present_names

LARGEST_CODE = 127
MOVES = ("Reshape", "Transpose", "Split", "Slice", "RMSNormalization", "LayerNormalization", "Add")
"""Operators allowed between a linear layer and attention because they do not mix channels."""

SMALLEST_SHARE = 1e-3
"""Lower bound on a channel's maximum, as a fraction of its head's maximum, for channels the text does not excite."""


def kv_scales(
    key_maxima: NDArray[np.float32], value_maxima: NDArray[np.float32], rotary_dim: int, interleaved: bool
) -> KVScales:
    """Return the scales of one layer: max magnitude / 127 for each head and channel.

    The rotary embedding mixes the two channels of a pair with the position, more than short texts show, so both get the
    larger maximum. Values beyond the calibration maxima saturate: headroom for them would cost more accuracy for all
    other values than it saves.

    Args:
        key_maxima: Max magnitudes of the keys as cached, [kv_heads, head_dim].
        value_maxima: Max magnitudes of the values, [kv_heads, head_dim].
        rotary_dim: Number of rotated channels of a key, from the first; 0 for none.
        interleaved: Whether adjacent channels form a pair; otherwise channels d and d + rotary_dim / 2 do.

    Raises:
        ExportError: A maximum is not a finite number.
    """
    paired = np.array(key_maxima, np.float32)
    if rotary_dim:
        rotated = paired[:, :rotary_dim].reshape((-1, rotary_dim // 2, 2) if interleaved else (-1, 2, rotary_dim // 2))
        largest = rotated.max(axis=2 if interleaved else 1, keepdims=True)
        paired[:, :rotary_dim] = np.broadcast_to(largest, rotated.shape).reshape(-1, rotary_dim)
    return KVScales(_scales(paired, "keys"), _scales(np.asarray(value_maxima, np.float32), "values"))


def _scales(maxima: NDArray[np.float32], part: str) -> NDArray[np.float32]:
    if not np.isfinite(maxima).all():
        raise ExportError(f"the {part} on the calibration text are not all finite: export without an int8 KV cache")
    of_head = maxima.max(axis=1, keepdims=True)
    raised = np.maximum(maxima, np.where(of_head > 0, SMALLEST_SHARE * of_head, 1.0))
    return (raised / LARGEST_CODE).astype(np.float32)


def cache_scales(model: ir.Model, layer: int, maxima: Mapping[str, NDArray[np.float32]]) -> KVScales:
    """The scales of a layer's KV cache; `maxima` are its largest magnitudes [kv_heads, head_dim], by output name."""
    key, value = present_names(layer)
    past = past_names(layer)[0]
    attention = next(n for n in nodes(model, "GroupQueryAttention", MICROSOFT) if n.inputs[3].name == past)  # type: ignore[union-attr]
    rotation = _rotation(attention)
    if rotation is None:  # any two channels of a head may be mixed
        whole = np.broadcast_to(maxima[key].max(-1, keepdims=True), maxima[key].shape)
        return kv_scales(whole, maxima[value], 0, False)
    return kv_scales(maxima[key], maxima[value], *rotation)


def _rotation(attention: ir.Node) -> tuple[int, bool] | None:
    """Return the number of rotated channels of a key, and whether pairs are interleaved; None if unknown."""
    if attention.attributes.get_int("do_rotary", 0):
        width = last_dim(attention.inputs[7])
        return None if width is None else (2 * width, bool(attention.attributes.get_int("rotary_interleaved", 0)))
    value = attention.inputs[1] if attention.inputs[1] is not None else attention.inputs[0]
    while value is not None and (node := value.producer()) is not None:
        if node.op_type == "RotaryEmbedding":
            width = node.attributes.get_int("rotary_embedding_dim", 0) or last_dim(node.inputs[0])
            return None if width is None else (width, bool(node.attributes.get_int("interleaved", 0)))
        if node.op_type in ("MatMul", "MatMulNBits"):
            return 0, False
        if node.op_type not in MOVES:
            return None
        value = node.inputs[0]
    return None
