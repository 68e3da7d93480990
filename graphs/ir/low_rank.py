"""What adapters that are kept apart add to linear layers: carried along by a weight while passes change it.

A pass changes a weight from the side of its inputs (a norm is folded in, the inputs are rotated) or of its outputs
(these are rotated, or joined with those of other layers). A product of two matrices goes through the same changes: its
first matrix has the inputs, its second one the outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from satchel.graphs.ir.weights import LazyWeight

CHANGES = "changes"
"""Mark (`meta`) of a weight: its `Change`s, in the order of their outputs."""


@dataclasses.dataclass(frozen=True)
class LowRank:
    """gain * (x @ weight) + x @ first @ second + bias, for first [inputs, rank] and second [rank, outputs].

    `bias` and `gain` are [1, outputs], or None for none.
    """

    first: LazyWeight
    second: LazyWeight
    bias: LazyWeight | None = None
    gain: LazyWeight | None = None

    def with_outputs(self, edit: Callable[[LazyWeight], LazyWeight]) -> LowRank:
        """The same with the outputs of what is added edited."""
        bias = None if self.bias is None else edit(self.bias)
        return dataclasses.replace(self, second=edit(self.second), bias=bias)


@dataclasses.dataclass(frozen=True)
class Change:
    """What adapters add to one linear layer of the checkpoint.

    Attributes:
        layer: The layer's name in the checkpoint.
        adapters: By the name of an adapter.
        start, stop: Which outputs of the weight are the layer's.
        transposed: Whether the weight is [outputs, inputs].
    """

    layer: str
    adapters: Mapping[str, LowRank]
    start: int
    stop: int
    transposed: bool = False

    @property
    def gains(self) -> dict[str, LazyWeight]:
        """The gains of the adapters that have them."""
        return {name: part.gain for name, part in self.adapters.items() if part.gain is not None}

    def each(self, edit: Callable[[LowRank], LowRank]) -> Change:
        """The same with the part of each adapter edited."""
        return dataclasses.replace(self, adapters={name: edit(part) for name, part in self.adapters.items()})


def changes_of(weight: LazyWeight) -> tuple[Change, ...]:
    """The changes that a weight is marked with."""
    found = weight.meta.get(CHANGES, ())
    return found if isinstance(found, tuple) else ()


def carry(new: LazyWeight, old: LazyWeight, edit: Callable[[Change], Change | None]) -> LazyWeight:
    """Mark `new`, which is made of `old`, with the old weight's changes as edited; None loses one."""
    made = tuple(change for change in map(edit, changes_of(old)) if change is not None)
    if made:
        new.meta[CHANGES] = made
    return new


def carry_inputs(new: LazyWeight, old: LazyWeight, edit: Callable[[LazyWeight], LazyWeight]) -> LazyWeight:
    """Mark `new`, whose inputs were edited: `edit` does the same to the first axis of [inputs, rank]."""

    def edited(change: Change) -> Change | None:
        if change.transposed:
            return None
        return change.each(lambda part: dataclasses.replace(part, first=edit(part.first)))

    return carry(new, old, edited)


def carry_outputs(
    new: LazyWeight, old: LazyWeight, edit: Callable[[LazyWeight, Change], LazyWeight | None], *, mixes: bool
) -> LazyWeight:
    """Mark `new`, whose outputs were edited: `edit` does the same to the last axis of what a change has for its own.

    It returns None where these outputs were mixed with others, which loses the change; so does an edit that `mixes`
    outputs of which each has a gain.
    """

    def edited(change: Change) -> Change | None:
        for part in change.adapters.values():
            made = edit(part.second, change)
            if change.transposed or made is None or (mixes and part.gain is not None and made is not part.second):
                return None
        return change.each(lambda part: part.with_outputs(lambda matrix: edit(matrix, change) or matrix))

    return carry(new, old, edited)
