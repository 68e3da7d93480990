"""Codes in the order in which satchel's own kernels read them: panels of 16 outputs. Plain numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PANEL = 16
"""Outputs of a panel."""

TOGETHER = {8: 4, 4: 8}
"""Bits -> inputs of an output that lie beside each other."""

MIDDLE = {8: 128, 4: 8}
"""Bits -> the code that stands for zero in symmetric schemes, and fills up what is no weight."""


def panel_outputs(outputs: int, *, gated: bool = False) -> NDArray[np.int64]:
    """Which output lies where, [panels, 16]; -1 beyond the last one.

    With `gated`, the first half of the outputs and the second are each filled up to whole panels, which take turns: a
    gate and what it is multiplied by are computed at the same time.
    """
    half = outputs // 2 if gated else outputs
    panels = -(-half // PANEL)
    places = np.arange(panels * PANEL).reshape(panels, PANEL)
    first = np.where(places < half, places, -1)
    if not gated:
        return first
    return np.stack([first, np.where(places < half, places + half, -1)], axis=1).reshape(2 * panels, PANEL)


def pack_panels(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Unsigned codes [16 * panels, inputs], one a byte, as panels [panels, bytes].

    In 8 bits a panel is [inputs / 4, 16 outputs, 4 inputs], the last four inputs filled up with 128. In 4 bits it is
    [inputs / 8, 16 outputs, 4 bytes]: byte i has input i of eight in its low half and input i + 4 in its high half.
    """
    panels, together = len(codes) // PANEL, TOGETHER[bits]
    codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % together)), constant_values=MIDDLE[bits])
    parts = codes.reshape(panels, PANEL, -1, together).transpose(0, 2, 1, 3)
    if bits == 4:
        parts = np.bitwise_or(parts[..., :4], np.left_shift(parts[..., 4:], 4), dtype=np.uint8)
    return np.ascontiguousarray(parts).reshape(panels, -1)
