"""Fits a recipe to a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from satchel.export.checkpoint import Checkpoint
from satchel.export.errors import ExportError
from satchel.export.tracing.soundness import ATTENTION, PROMISED
from satchel.graphs.quant.recipe import Recipe, RecipeError


def fit_recipe(recipe: Recipe, checkpoint: Checkpoint) -> Recipe:
    """Return the rules that are for a checkpoint, checked against it without reading its weights.

    Raises:
        ExportError: A pattern matches no layer, or no group size divides a layer's inputs.
    """
    keeps_states = any(PROMISED.get(kind, frozenset()) - {ATTENTION} for kind in checkpoint.layer_types)
    rules = tuple(rule for rule in recipe.rules if keeps_states or not rule.states)
    recipe = dataclasses.replace(recipe, rules=rules)
    layers = dict(layer_kinds(checkpoint))
    try:
        recipe.check_layers(list(layers))
    except RecipeError as error:
        raise ExportError(f"recipe {recipe.name}: {error}") from None
    for layer, (kind, inputs) in layers.items():
        rule = recipe.rule(layer, kind)
        if rule is not None and inputs is not None:
            try:
                rule.scheme(inputs)
            except RecipeError as error:
                raise ExportError(f"recipe {recipe.name}: {layer}: {error}") from None
    return recipe


def layer_kinds(checkpoint: Checkpoint) -> Iterator[tuple[str, tuple[str, int | None]]]:
    """Yield each layer's name, its kind as far as the module shows, and its number of inputs if known."""
    modules = dict(checkpoint.module.named_modules())
    for name, lazy in checkpoint.weights.items():
        if len(lazy.dims) < 2:
            continue
        layer = name.removesuffix(".weight")
        module = modules.get(layer)
        if isinstance(module, torch.nn.Embedding):
            yield layer, ("embedding", module.embedding_dim)
        elif isinstance(module, torch.nn.Linear):
            yield layer, ("linear", module.in_features)
        else:
            yield layer, ("experts" if len(lazy.dims) == 3 else "linear", None)
