"""Sensitivity of layers to quantization: each is quantized alone, and the logits are compared."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from satchel.export.quantize.flow import Flow, Visit, fresh
from satchel.export.quantize.kept import RoundedWeights
from satchel.export.quantize.quantize import by_outputs, quantizable, round_weight, rules, values
from satchel.graphs.quant.assign import layers_of
from satchel.graphs.quant.recipe import Recipe, Rule
from satchel.runtime.evaluation.fidelity import log_softmax

RAISED_BITS = 8
"""Bits that a sensitive layer is raised to."""


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """The effect of quantizing one linear layer alone.

    Attributes:
        layers: The checkpoint's layers that are merged into this linear layer.
        weights: Its number of weights.
        inputs: Its number of inputs.
        kl: Mean KL divergence in nats from the float model to the model with only this weight quantized.
    """

    layers: tuple[str, ...]
    weights: int
    inputs: int
    kl: float


def measure(
    model: ir.Model, recipe: Recipe, windows: NDArray[np.int64], folder: Path, progress: Callable[[int], object]
) -> list[Sensitivity]:
    """Quantize each linear layer with fewer than 8 bits alone, with searched scales, and compare the logits.

    Args:
        model: The graph that all phases share, its weights marked with their rules.
        recipe: The recipe under test.
        windows: Text, [windows, length].
        folder: An empty folder.
        progress: Called after each linear layer.

    Returns:
        The linear layers in graph order.
    """
    flow = Flow(model, windows, fresh(folder, "float"), keep=True)
    flow.run()
    chosen = rules(model)
    places = {name: index for index, name in enumerate(flow.pieces())}
    found = []
    for node, lazy in quantizable(model):
        rule = chosen.get(lazy.name)
        if rule is None or rule.bits == RAISED_BITS or by_outputs(node) or node.name not in places:
            continue
        work = fresh(folder, "tried")
        tried = dataclasses.replace(rule, rounding="search")
        rounded = values(round_weight(lazy, tried, RoundedWeights(work / "codes"), by_outputs=False)).T
        branch = flow.branch(fresh(work, "flow"))
        weight = {lazy.name: np.ascontiguousarray(rounded)}
        branch.run(_replacing(str(node.name), weight), first=places[str(node.name)])
        found.append(Sensitivity(layers_of(lazy), lazy.size, lazy.dims[0], _divergence(flow, branch)))
        shutil.rmtree(work)
        progress(1)
    return found


def count(model: ir.Model) -> int:
    """Return the max number of linear layers that `measure` tries."""
    return sum(not by_outputs(node) for node, _ in quantizable(model))


def raise_most_sensitive(
    recipe: Recipe, found: Sequence[Sensitivity], bits_now: float, bits: float, weights: int
) -> list[Sensitivity]:
    """Choose the layers to raise to 8 bits within a budget: those with the highest loss per weight first.

    Args:
        recipe: The recipe to change.
        found: The sensitivity of each linear layer.
        bits_now: Bits per weight of the whole model with `recipe`.
        bits: The max bits per weight of the whole model.
        weights: Number of weights of the whole model.
    """
    spare = (bits - bits_now) * weights
    raised = []
    for layer in sorted(found, key=lambda s: s.kl / s.weights, reverse=True):
        cost = raising_costs(recipe, layer)
        if 0 < cost <= spare:
            raised.append(layer)
            spare -= cost
    return raised


def raising_costs(recipe: Recipe, layer: Sensitivity) -> float:
    """Return the additional bits that a linear layer takes at 8 bits, zero points included."""
    rule = _rule_of(recipe, layer)
    now, then = rule.scheme(layer.inputs), _raised(rule, ()).scheme(layer.inputs)
    return 0.0 if now is None or then is None else layer.weights * (then.bits_per_weight - now.bits_per_weight)


def raised_recipe(recipe: Recipe, raised: Sequence[Sensitivity]) -> Recipe:
    """Prepend rules to the recipe that keep some layers at 8 bits, with their group sizes unchanged."""
    names: dict[Rule, list[str]] = {}
    for layer in raised:
        names.setdefault(_rule_of(recipe, layer), []).extend(layer.layers)
    rules = tuple(_raised(rule, tuple(layers)) for rule, layers in names.items())
    return dataclasses.replace(recipe, rules=(*rules, *recipe.rules))


def _rule_of(recipe: Recipe, layer: Sensitivity) -> Rule:
    return next(rule for rule in recipe.rules if rule.matches(layer.layers[0], "linear"))


def _raised(rule: Rule, layers: tuple[str, ...]) -> Rule:
    return dataclasses.replace(rule, layers=layers, kinds=("linear",), bits=RAISED_BITS, optional=False)


def _replacing(name: str, weight: Mapping[str, NDArray[np.float32]]) -> Visit:
    return lambda node, inputs: weight if node.name == name else {}


def _divergence(flow: Flow, branch: Flow) -> float:
    """Mean KL(flow || branch) over all positions."""
    total, count = 0.0, 0
    for index in range(flow.batches):
        for expected, found in zip(flow.logits(index), branch.logits(index), strict=True):
            reference, actual = log_softmax(expected), log_softmax(found)
            total += float((np.exp(reference) * (reference - actual)).sum())
            count += len(reference)
    return total / count
