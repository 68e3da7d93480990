"""Which layers count as the same program: those that differ in nothing but their parameters and their number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from satchel.export.tracing.same_layers import same_layers
from satchel.export.tracing.torch_ops import DOMAIN

WIDTH = 4


class Layer(torch.nn.Module):
    """Attention with itself, changed by `twist`."""

    def __init__(self, number: int, twist: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(WIDTH, WIDTH, device="meta")
        self.number, self.twist = number, twist

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.linear(x)[:, None]
        mixed = getattr(torch.ops, DOMAIN).attention(heads, heads, heads, None, 2 * self.number, 1.0, 0, 0, 0.0)
        return self.twist(self, x + mixed[:, :, 0])


class Model(torch.nn.Module):
    """Four layers, one after the other."""

    def __init__(self, twist: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer(number, twist) for number in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def found(model: torch.nn.Module) -> list[list[int]]:
    """The numbers of layers that are alike."""
    given = torch.zeros(2, 7, WIDTH, device="meta")
    kinds = same_layers(model, (given,))
    assert all(offset == 2 * (int(n[-1]) - int(k.first[-1])) for k in kinds for n, offset in k.offsets.items())
    return [[int(name[-1]) for name in (kind.first, *kind.offsets)] for kind in kinds]


def test_layers_that_differ_in_their_number_only_are_alike() -> None:
    assert found(Model(lambda layer, x: x)) == [[0, 1, 2, 3]]


def test_layers_of_two_kinds() -> None:
    assert found(Model(lambda layer, x: x.relu() if layer.number % 2 else x)) == [[0, 2], [1, 3]]
    assert found(Model(lambda layer, x: x.clamp(max=1.0 + layer.number // 2))) == [[0, 1], [2, 3]]


def _left_for_others(layer: Any, x: torch.Tensor) -> torch.Tensor:
    before, Layer.seen = getattr(Layer, "seen", None), x * 2
    return x if before is None or layer.number != 3 else x + before


ALONE: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "it computes with its number": lambda layer, x: x * layer.number,
    "it gives another shape": lambda layer, x: x.flatten(1)[:, : 7 * WIDTH - layer.number, None],
    "it gives two tensors": lambda layer, x: (x, x),  # type: ignore[dict-item,return-value]
}


@pytest.mark.parametrize("why", ALONE)
def test_a_layer_that_is_like_no_other(why: str) -> None:
    layers = [Model(ALONE[why]).layers[number] for number in range(4)]

    class Apart(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(layers)

        def forward(self, x: torch.Tensor) -> None:
            for layer in self.layers:
                layer(x)

    assert found(Apart()) == []


def test_a_layer_whose_inner_result_others_read_is_alone() -> None:
    assert found(Model(_left_for_others)) == [[0, 1]]  # the last reads what the one before it left


def test_a_layer_that_runs_twice_or_shares_a_parameter_is_alone() -> None:
    model = Model(lambda layer, x: x)
    model.layers[1].linear = model.layers[0].linear
    assert found(model) == [[2, 3]]
    twice = Model(lambda layer, x: x)
    twice.layers[2].forward = lambda x, again=twice.layers[1]: again(x)  # type: ignore[method-assign]
    assert found(twice) == [[0, 3]]


def test_a_layer_that_changes_what_it_is_given_is_alone() -> None:
    model = Model(lambda layer, x: x)
    forward = Layer.forward

    def changing(x: torch.Tensor) -> torch.Tensor:
        return forward(model.layers[3], x.mul_(2))  # type: ignore[arg-type]

    model.layers[3].forward = changing  # type: ignore[method-assign]
    model.layers[2].forward = changing  # type: ignore[method-assign]
    assert found(model) == [[0, 1]]


def test_few_layers_are_not_compared() -> None:
    model = Model(lambda layer, x: x)
    del model.layers[2:]
    assert found(model) == []
