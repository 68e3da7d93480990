"""The cheapest mixture of precisions, compared with that of trying all."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from satchel.graphs.quant.mixture import Choice, cheapest

Layers = list[list[Choice[str]]]


def random_layers(seed: int, layers: int = 6, choices: int = 4) -> Layers:
    rng = np.random.default_rng(seed)
    made = []
    for layer in range(layers):
        sizes = np.sort(rng.integers(1, 40, choices))
        losses = np.sort(rng.exponential(1, choices))[::-1]
        made.append(
            [Choice(f"{layer}.{i}", float(b), float(e)) for i, (b, e) in enumerate(zip(sizes, losses, strict=True))]
        )
    return made


def size(found: list[Choice[str]]) -> float:
    return sum(choice.bits for choice in found)


def loss(found: list[Choice[str]]) -> float:
    return sum(choice.loss for choice in found)


@pytest.mark.parametrize("seed", range(20))
def test_it_comes_near_to_the_best_of_all(seed: int) -> None:
    layers = random_layers(seed)
    smallest = sum(choices[0].bits for choices in layers)
    largest = sum(choices[-1].bits for choices in layers)
    step = max(a.loss - b.loss for choices in layers for a, b in itertools.combinations(choices, 2))
    for budget in np.linspace(smallest, largest, 7):
        found = cheapest(layers, float(budget))
        fitting = [list(all_of) for all_of in itertools.product(*layers) if size(list(all_of)) <= budget]
        best = min(map(loss, fitting))
        assert [choice.what.split(".")[0] for choice in found] == [str(i) for i in range(len(layers))]
        assert size(found) <= budget
        assert best <= loss(found) + 1e-12
        assert loss(found) <= best + step


def test_the_gain_per_bit_decides() -> None:
    large = [Choice("large 4", 400.0, 3.0), Choice("large 8", 800.0, 0.0)]
    small = [Choice("small 4", 40.0, 1.0), Choice("small 8", 80.0, 0.0)]
    assert [c.what for c in cheapest([large, small], 480)] == ["large 4", "small 8"]
    assert [c.what for c in cheapest([large, small], 879)] == ["large 4", "small 8"]
    assert [c.what for c in cheapest([large, small], 880)] == ["large 8", "small 8"]
    assert [c.what for c in cheapest([large, small], 840)] == ["large 4", "small 8"]


def test_a_choice_that_is_larger_and_worse_is_never_taken() -> None:
    layer = [Choice("a", 4.0, 2.0), Choice("worse", 5.0, 3.0), Choice("b", 8.0, 1.0), Choice("as good", 9.0, 1.0)]
    assert [cheapest([layer], budget)[0].what for budget in (4, 7, 8, 99)] == ["a", "a", "b", "b"]


def test_what_is_left_over_goes_to_a_smaller_step() -> None:
    layers = [[Choice("a", 10.0, 9.0), Choice("A", 110.0, 0.0)], [Choice("b", 10.0, 0.1), Choice("B", 20.0, 0.0)]]
    assert [c.what for c in cheapest(layers, 60)] == ["a", "B"]


def test_too_small_a_budget_is_an_error() -> None:
    with pytest.raises(ValueError, match="budget"):
        cheapest([[Choice("a", 10.0, 1.0)]], 9.9)
