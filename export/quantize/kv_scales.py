"""The scales of an int8 KV cache, from the largest keys and values that a calibration text brings up."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from satchel.export.errors import ExportError
from satchel.graphs.quant.quantized import KVScales

LARGEST_CODE = 127
SMALLEST_SHARE = 1e-3
"""A channel that the text left at rest gets the scale of one with this share of its head's largest number."""


def kv_scales(
    key_maxima: NDArray[np.float32], value_maxima: NDArray[np.float32], rotary_dim: int, interleaved: bool
) -> KVScales:
    """The scales of one layer: largest magnitude / 127 for each head and channel.

    A rotation moves what is in one channel of a pair into the other as positions go by, far beyond what short texts
    show, so both get the larger one's. Numbers beyond the calibration text's are cut off: room for them costs all
    others more than it saves these.

    Args:
        key_maxima: Largest magnitudes of the keys as they are cached, [kv_heads, head_dim].
        value_maxima: Those of the values, [kv_heads, head_dim].
        rotary_dim: How many channels of a key rotate, from the first; 0 for none.
        interleaved: Whether neighbors are a pair; otherwise channels d and d + rotary_dim / 2 are.

    Raises:
        ExportError: A maximum is not a finite number.
    """
    paired = np.array(key_maxima, np.float32)
    if rotary_dim:
        turning = paired[:, :rotary_dim].reshape((-1, rotary_dim // 2, 2) if interleaved else (-1, 2, rotary_dim // 2))
        largest = turning.max(axis=2 if interleaved else 1, keepdims=True)
        paired[:, :rotary_dim] = np.broadcast_to(largest, turning.shape).reshape(-1, rotary_dim)
    return KVScales(_scales(paired, "keys"), _scales(np.asarray(value_maxima, np.float32), "values"))


def _scales(maxima: NDArray[np.float32], part: str) -> NDArray[np.float32]:
    if not np.isfinite(maxima).all():
        raise ExportError(f"the {part} of the calibration text are not all finite: export without an int8 KV cache")
    of_head = maxima.max(axis=1, keepdims=True)
    raised = np.maximum(maxima, np.where(of_head > 0, SMALLEST_SHARE * of_head, 1.0))
    return (raised / LARGEST_CODE).astype(np.float32)
