"""States of layers with a convolution or a recurrence: what a manifest says of them, and the check of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from satchel.runtime.bundle.contract import STATE_KINDS
from satchel.runtime.bundle.dtypes import DTYPES
from satchel.runtime.bundle.strict_json import StrictJsonError

if TYPE_CHECKING:
    from satchel.runtime.bundle.graph_specs import GraphSpec


@dataclass(frozen=True)
class StateSpec:
    """A state of one layer that has the same size after any number of tokens, and its tensor names.

    `kind` is one of `contract.STATE_KINDS`. `shape` is that of one sequence: the tensors are [batch, *shape]. The same
    buffer may be bound as past and present. Zeros are the state before the first token.
    """

    layer: int
    kind: str
    dtype: str
    shape: tuple[int, ...]
    past: str
    present: str

    @property
    def nbytes(self) -> int:
        """The size of the state of one sequence in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].nbytes


def check_states(states: Sequence[StateSpec]) -> None:
    """Check that a manifest's states are possible and differ. Raises StrictJsonError with the key."""
    for index, state in enumerate(states):
        key = f"states[{index}]"
        _check(state.kind in STATE_KINDS, f"{key}.kind", state.kind, f"one of {', '.join(STATE_KINDS)}")
        _check(state.dtype in DTYPES, f"{key}.dtype", state.dtype, f"one of {', '.join(DTYPES)}")
        _check(state.layer >= 0, f"{key}.layer", state.layer, "0 or more")
        _check(bool(state.shape) and min(state.shape) > 0, f"{key}.shape", list(state.shape), "numbers above 0")
    for key in ("past", "present"):
        names = [getattr(state, key) for state in states]
        _check(len(set(names)) == len(names), f"states.{key}", names, "names that differ")
    kept = [f"{state.kind} of layer {state.layer}" for state in states]
    _check(len(set(kept)) == len(kept), "states", kept, "at most one of a kind in a layer")


def check_graph_states(states: Sequence[StateSpec], graph: GraphSpec, key: str) -> None:
    """Check that a graph, whose entry is `key`, has each state as input and output, in its dtype and shape."""
    for side, tensors in (("past", graph.inputs), ("present", graph.outputs)):
        found = {tensor.name: [tensor.dtype, *tensor.shape[1:]] for tensor in tensors}
        for state in states:
            name: str = getattr(state, side)
            wanted = [state.dtype, *state.shape]
            _check(found.get(name) == wanted, f"{key}.{name}", found.get(name), f"{wanted} for each sequence")


def _check(condition: bool, key: str, value: object, expected: str) -> None:
    if not condition:
        raise StrictJsonError(f"'{key}' must be {expected}, found {str(value)[:60]!r}")
