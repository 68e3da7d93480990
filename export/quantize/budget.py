"""The recipe of an export with a budget: measures what each weight costs in 4 bits, and chooses the precisions."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from satchel.export.checkpoint import Checkpoint
from satchel.export.config import ExportConfig
from satchel.export.errors import ExportError
from satchel.export.quantize.quantize import rules, transform
from satchel.export.quantize.sensitivity import Sensitivity, measure, schemes_of
from satchel.export.recipes.fit import layer_kinds
from satchel.graphs.ir.inputs import table_of
from satchel.graphs.ir.values import weight
from satchel.graphs.ir.weights import LazyWeight, aligned
from satchel.graphs.quant.assign import layers_of
from satchel.graphs.quant.mixture import Choice, cheapest
from satchel.graphs.quant.recipe import Recipe, RecipeError, Rule, Scheme, parse_recipe, write_recipe

WINDOWS = 16
"""Windows of the calibration text on which weights are measured."""

NAME = "mixture"
"""What the recipe is called."""

RECIPE_NAME = "recipe.toml"
"""Its file, in the bundle and beside what is rounded."""

UNKNOWN = 1.1
"""Largest size of a model's weights over that of its checkpoint's: rotary tables and others are made in tracing."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """The largest size of the weights.

    Attributes:
        bits: In bits.
        option: The option that said so.
        unit: Bits of one unit of that option's number.
        units: What its number counts.
    """

    bits: float
    option: str
    unit: float
    units: str

    def check(self, smallest: float, largest: float) -> None:
        """Check that a mixture meets the budget.

        Raises:
            ExportError: None is as small, or as large.
        """
        if not smallest <= self.bits <= largest:
            low, high = math.ceil(100 * smallest / self.unit) / 100, math.floor(100 * largest / self.unit) / 100
            raise ExportError(
                f"{self.option}: no mixture of this model's layers meets it: give {low:.2f} to {high:.2f} {self.units}"
            )


def budget_of(config: ExportConfig, parameters: int) -> Budget | None:
    """The budget of an export of a model with so many parameters, if it has one."""
    if config.bits is not None:
        return Budget(config.bits * parameters, f"--bits {config.bits:g}", parameters, "bits per weight")
    if config.size is not None:
        return Budget(config.size * 8e6, f"--size {config.size:g}", 8e6, "MB")
    return None


def check_budget(budget: Budget, recipe: Recipe, checkpoint: Checkpoint) -> None:
    """Check a budget against what is known of a checkpoint before it is traced, `recipe` being what it starts from.

    Raises:
        ExportError: No mixture meets the budget.
    """
    smallest, largest, layers = 0.0, 0.0, dict(layer_kinds(checkpoint))
    once = {id(lazy): (name, lazy) for name, lazy in reversed(list(checkpoint.weights.items()))}  # a head may be tied
    for name, lazy in once.values():
        kind, inputs = layers.get(name.removesuffix(".weight"), ("", None))
        rule = recipe.rule(name.removesuffix(".weight"), kind)
        fixed = rule is None or rule.bits is None or inputs is None
        schemes = [] if fixed else schemes_of(inputs or 0, kind)
        each = [scheme.bits_per_weight(kind) for scheme in schemes] or [4.0, 32.0]
        smallest += lazy.size * min(each)
        largest += lazy.size * max(each)
    budget.check(smallest, largest * UNKNOWN)


def find_recipe(
    common: ir.Model,
    recipe: Recipe,
    budget: Budget,
    windows: NDArray[np.int64],
    folder: Path,
    progress: Callable[[int], object],
    about: str,
) -> tuple[Recipe, str]:
    """Measure the weights of a graph, and find the mixture of precisions with the least loss within a budget.

    Args:
        common: The graph that all phases share, its weights marked with the rules of `recipe`.
        recipe: What to start from: its transforms, and its rules for layers that are not measured.
        budget: The largest size of all weights.
        windows: Text, [windows, length], of which `WINDOWS` are used.
        folder: A folder for temporary files, and for the recipe. If that is there, it is read.
        progress: Called after each weight.
        about: What to call the model and the budget in the recipe's comment.

    Returns:
        The recipe, and its text.

    Raises:
        ExportError: No mixture meets the budget.
    """
    kept = folder / RECIPE_NAME
    if kept.exists():
        text = kept.read_text(encoding="utf-8")
        return _parsed(text), text
    model, _ = transform(common, recipe)
    spread = np.linspace(0, len(windows) - 1, min(WINDOWS, len(windows))).round().astype(int)
    work = folder / "sensitivity"
    shutil.rmtree(work, ignore_errors=True)  # of an export that was interrupted
    found = measure(model, windows[spread], work, progress)
    shutil.rmtree(work)
    fixed = _other_bits(model, recipe, {layer for each in found for layer in each.layers})
    choices = [_choices(each) for each in found]
    budget.check(
        fixed + sum(min(c.bits for c in each) for each in choices),
        fixed + sum(max(c.bits for c in each) for each in choices),
    )
    mixture = cheapest(choices, budget.bits - fixed)
    made = _recipe(recipe, found, mixture)
    bits = (fixed + sum(choice.bits for choice in mixture)) / budget.unit
    text = write_recipe(made, _comment(about, f"{bits:.2f} {budget.units}", found))
    part = kept.with_suffix(".part")
    part.write_text(text, encoding="utf-8", newline="\n")
    part.replace(kept)
    return made, text


def with_recipe(checkpoint: Checkpoint, text: str) -> Checkpoint:
    """The checkpoint with a recipe among the files that its bundle has beside the graphs."""
    return dataclasses.replace(checkpoint, companions={**checkpoint.companions, RECIPE_NAME: text.encode()})


def _parsed(text: str) -> Recipe:
    try:
        return parse_recipe(text, NAME)
    except RecipeError as error:
        raise ExportError(
            f"--resume: {RECIPE_NAME} of the interrupted export is damaged ({error}): start anew"
        ) from None


def _choices(layer: Sensitivity) -> list[Choice[Scheme]]:
    outputs = layer.weights // layer.inputs
    return [
        Choice(scheme, float(_bits(scheme, layer.inputs, outputs, layer.kind)), layer.kl * error)
        for scheme, error in layer.errors.items()
    ]


def _bits(scheme: Scheme, inputs: int, outputs: int, kind: str) -> int:
    """The most bits of a weight in the weight file: quantized values, scales and zero points, each aligned."""
    groups = outputs * (1 if scheme.block is None else inputs // scheme.block)
    points = 0 if scheme.symmetric else groups * scheme.bits // 8
    return 8 * sum(map(_aligned, (inputs * outputs * scheme.bits // 8, groups * scheme.scale_bits(kind) // 8, points)))


def _aligned(size: int) -> int:
    """The most bytes that so many take in the weight file, with what is left in front of them."""
    return aligned(size, 0) + aligned(1, size) - aligned(1, 0)


def _other_bits(model: ir.Model, recipe: Recipe, measured: Iterable[str]) -> int:
    """The bits of all weights but those that were measured."""
    names, chosen, total, seen = set(measured), rules(model), 0, set[str]()
    values = (*map(weight, model.graph.initializers.values()), *map(table_of, model.graph.inputs))
    products = {
        id(lazy) for node in model.graph if node.op_type == "MatMul" for lazy in map(weight, node.inputs) if lazy
    }
    for lazy in values:
        if lazy is None or lazy.base.name in seen:
            continue
        seen.add(lazy.base.name)
        layers = layers_of(lazy)
        if layers and names.issuperset(layers):
            continue
        total += 8 * _aligned(_other_bytes(lazy, chosen.get(lazy.name), id(lazy) in products))
    return total


def _other_bytes(lazy: LazyWeight, rule: Rule | None, product: bool) -> int:
    if rule is not None:
        inputs = lazy.dims[0] if product else lazy.dims[-1]
        scheme = rule.scheme(inputs)
        if scheme is not None:
            return _bits(scheme, inputs, lazy.size // inputs, "linear" if product else "experts") // 8
    return lazy.nbytes // 2 if product and lazy.computed and lazy.dtype == ir.DataType.FLOAT else lazy.nbytes


def _recipe(base: Recipe, found: Sequence[Sensitivity], mixture: Sequence[Choice[Scheme]]) -> Recipe:
    """The base recipe with rules before its own, one for each scheme and kind that was chosen."""
    names: dict[tuple[str, Scheme], list[str]] = {}
    for layer, choice in zip(found, mixture, strict=True):
        names.setdefault((layer.kind, choice.what), []).extend(layer.layers)
    made = tuple(
        Rule(
            tuple(layers),
            (kind,),
            scheme.bits,
            ("channel" if scheme.block is None else scheme.block,),
            scheme.symmetric,
            "gptq",
        )
        for (kind, scheme), layers in names.items()
    )
    return dataclasses.replace(base, name=NAME, rules=(*made, *base.rules))


def _comment(about: str, size: str, found: Sequence[Sensitivity]) -> str:
    """What the recipe is, and the layers by what their weights lose in 4 bits."""
    lines = [
        f"{about}: {size}.",
        "",
        "KL of each layer in 4 bits with group size 64, the most sensitive per weight first:",
    ]
    lines += [
        f"{layer.kl:10.6f} {layer.weights / 1e6:9.3f} M  {', '.join(layer.layers)}"
        for layer in sorted(found, key=lambda s: s.kl / s.weights, reverse=True)
    ]
    return "\n".join(lines)
