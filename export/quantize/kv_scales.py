"""The scales of an int8 KV cache, from the largest keys and values on a calibration text."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from satchel.export.errors import ExportError
from satchel.graphs.quant.quantized import KVScales

LARGEST_CODE = 127
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
