"""Greedy choice without the checks and options of a sampler, for measurements."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def greedy(logits: NDArray[np.float32]) -> int:
    """The most likely token of logits [vocabulary], ties by lower id."""
    return int(logits.argmax())
