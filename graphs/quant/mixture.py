"""Chooses the precision of each layer: the least loss within a budget."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Choice(Generic[T]):
    """One way to store a layer.

    Attributes:
        what: What the choice stands for.
        bits: The layer's size.
        loss: What it costs in accuracy; losses of layers add up.
    """

    what: T
    bits: float
    loss: float


def cheapest(layers: Sequence[Sequence[Choice[T]]], budget: float) -> list[Choice[T]]:
    """Choose one of each layer's choices so that their sizes fit `budget` and the sum of their losses is small.

    This is the multiple-choice knapsack problem. Each layer starts with its smallest choice, and the steps with the
    largest gains per bit are made, as far as they fit: steps along the lower convex hull of a layer's (size, loss),
    where gains per bit fall. Up to the first step that does not fit, this is the optimum of the problem with divisible
    choices, so the result is at most that step's gain away from the best mixture. Source: Sinha and Zoltners 1979,
    "The Multiple-Choice Knapsack Problem", Operations Research 27 (3).

    Args:
        layers: The choices of each layer, at least one.
        budget: The largest sum of `bits`.

    Raises:
        ValueError: The smallest choices exceed the budget.
    """
    hulls = [_hull(choices) for choices in layers]
    chosen = [0] * len(hulls)
    left = budget - sum(hull[0].bits for hull in hulls)
    if left < 0:
        raise ValueError("the smallest choices exceed the budget")
    steps = [
        ((before.loss - after.loss) / (after.bits - before.bits), layer, place, after.bits - before.bits)
        for layer, hull in enumerate(hulls)
        for place, (before, after) in enumerate(itertools.pairwise(hull))
    ]
    for _, layer, place, bits in sorted(steps, key=lambda step: (-step[0], step[1], step[2])):
        if chosen[layer] == place and bits <= left:
            chosen[layer] += 1
            left -= bits
    return [hull[place] for hull, place in zip(hulls, chosen, strict=True)]


def _hull(choices: Sequence[Choice[T]]) -> list[Choice[T]]:
    """The choices on the lower convex hull from the smallest to the one with the least loss, in order of size."""
    hull: list[Choice[T]] = []
    for choice in sorted(choices, key=lambda c: (c.bits, c.loss)):
        if hull and choice.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _gain(hull[-2], choice) >= _gain(hull[-2], hull[-1]):
            hull.pop()
        hull.append(choice)
    return hull


def _gain(before: Choice[T], after: Choice[T]) -> float:
    return (before.loss - after.loss) / (after.bits - before.bits)
