"""Checks that logits are finite, and finds the most likely token in the same pass."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.errors import BundleError


def most_likely(logits: NDArray[np.floating[Any]], name: str) -> int:
    """The token with the highest of logits [vocabulary], ties by lower id.

    argmax stops at the first NaN, and finds +inf if there is one. Some logits may be -inf, where a model masks tokens,
    but not all. Raises BundleError; `name` says in messages which logits they are.
    """
    token = int(logits.argmax())
    highest = logits[token]
    if np.isfinite(highest):
        return token
    what = "every one is -inf" if highest == -np.inf else f"{'NaN' if np.isnan(highest) else '+inf'} at token {token}"
    raise BundleError(f"{name} are not finite ({what}): verify the bundle, or export it again in another precision")
