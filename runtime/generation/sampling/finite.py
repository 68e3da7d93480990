"""The check that logits are finite, which finds the most likely token on its way."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.errors import BundleError


def most_likely(logits: NDArray[np.floating[Any]], name: str) -> int:
    """The token of the highest logit of [vocabulary], the lowest id among equals.

    One pass: argmax stops at the first NaN, and finds an infinity if there is one. -inf is no fault in some logits,
    where a model masks tokens, but in all. Raises BundleError; `name` says which logits they are.
    """
    token = int(logits.argmax())
    highest = logits[token]
    if np.isfinite(highest):
        return token
    what = "every one is -inf" if highest == -np.inf else f"{'NaN' if np.isnan(highest) else '+inf'} at token {token}"
    raise BundleError(f"{name} are not finite ({what}): verify the bundle, or export it again in another precision")
