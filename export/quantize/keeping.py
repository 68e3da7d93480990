"""Keeps the quantized values that a checkpoint stores, where kernels read them, and says what is done with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from satchel.export.checkpoint import Checkpoint
from satchel.export.config import STORED, TARGET_PRECISIONS, ExportConfig
from satchel.export.errors import ExportError
from satchel.graphs.quant.recipe import CHANNEL, Recipe, Rule
from satchel.graphs.quant.stored import GRID, WIDENED, StoredGrid, keeping

GROUP_SIZE = "group size"
"""What the reason names where a form would be kept but for its groups."""


STACKS = (".experts.gate_up_proj", ".experts.down_proj")
"""The two weights of a mixture, which its kernel takes in one form only."""


def stored_grids(checkpoint: Checkpoint) -> dict[str, StoredGrid]:
    """The grids of the weights that the checkpoint stores quantized and that are kept, by layer."""
    found = _marks(checkpoint, GRID)
    unlike = _unlike(found)
    return {layer: grid for layer, grid in found.items() if isinstance(grid, StoredGrid) and layer not in unlike}


def widened(checkpoint: Checkpoint) -> dict[str, str]:
    """Why weights that are stored quantized are widened to float, by layer."""
    grids = _marks(checkpoint, GRID)
    unlike = dict.fromkeys(sorted(_unlike(grids) & grids.keys()), "its mixture has stacks of two forms")
    return {layer: str(reason) for layer, reason in _marks(checkpoint, WIDENED).items()} | unlike


def _marks(checkpoint: Checkpoint, mark: str) -> dict[str, object]:
    weights = checkpoint.weights.items()
    return {name.removesuffix(".weight"): weight.meta[mark] for name, weight in weights if mark in weight.meta}


def _unlike(grids: Mapping[str, object]) -> set[str]:
    """The stacks of mixtures whose two stacks are not in one form."""
    found = set()
    for mixture in {layer.removesuffix(end) for layer in grids for end in STACKS if layer.endswith(end)}:
        pair = [grids.get(mixture + end) for end in STACKS]
        if len({grid.scheme if isinstance(grid, StoredGrid) else None for grid in pair}) > 1:
            found |= {mixture + end for end in STACKS}
    return found


def resolve(config: ExportConfig, checkpoint: Checkpoint) -> tuple[ExportConfig, list[str]]:
    """Choose the precision that keeps a checkpoint's quantized values where no other was asked for.

    Returns:
        The config, and what to tell the user about the values.

    Raises:
        ExportError: --precision stored was asked for, and there is nothing to keep or a recipe that changes it; or
            no precision was, and the checkpoint's form is one that would be kept but for its group sizes.
    """
    name, grids, floats = checkpoint.name, stored_grids(checkpoint), widened(checkpoint)
    asked = config.precision == STORED
    if not grids and not floats:
        if asked:
            raise ExportError(f"{name}: --precision {STORED}: its weights are not quantized: choose another precision")
        return config, []
    reason = next(iter(floats.values()), "")
    if asked and not grids:
        raise ExportError(f"{name}: --precision {STORED}: {reason}: choose fp32 or int8")
    possible = STORED in TARGET_PRECISIONS[config.target]
    if grids and not asked and config.keep_stored and possible and checkpoint.kind != "gguf":
        config = dataclasses.replace(config, precision=STORED)
    if config.precision == STORED:
        forms = ", ".join(sorted({_form(grid) for grid in grids.values()}))
        lines = [f"{name}: the quantized values of {len(grids)} layers are kept as they are stored ({forms})"]
        if floats:
            first = next(iter(floats))
            how = "rounded to 8 bits" if to_round(checkpoint) else "widened to float"
            lines.append(f"{name}: {len(floats)} layers are {how}: {first}: {reason}")
        return config, lines
    if config.quantized and not grids and config.keep_stored and GROUP_SIZE in reason:
        raise ExportError(
            f"{name}: {reason}: choose --precision fp32, which widens its weights, or int8 to round them again"
        )
    if config.quantized and grids and not asked and checkpoint.kind == "gguf":
        keep = f"; --precision {STORED} keeps {len(grids)} layers as they are stored" if possible else ""
        return config, [f"{name}: its quantized weights are widened and rounded to {config.precision}{keep}"]
    if config.quantized and grids:
        keep = f": leave it out, or choose {STORED}, to keep them" if possible else ""
        return config, [
            f"warning: {name} has quantized weights; --precision {config.precision} rounds them again{keep}"
        ]
    if config.quantized:
        return config, [f"{name}: its quantized weights are widened ({reason}) and rounded to {config.precision}"]
    return config, [f"{name}: its quantized weights are widened to float{f' ({reason})' if reason else ''}"]


def to_round(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The layers of a GGUF file that no kernel reads as they are stored, which as floats would outgrow the file."""
    return tuple(widened(checkpoint)) if checkpoint.kind == "gguf" else ()


def kept_recipe(
    recipe: Recipe | None, config: ExportConfig, grids: Mapping[str, StoredGrid], rounded: tuple[str, ...] = ()
) -> Recipe | None:
    """The recipe with the rules that keep the stored values first, where the precision is that.

    Args:
        recipe: The recipe of the precision.
        config: The options of the export.
        grids: The grids of the weights to keep, by layer.
        rounded: Layers to round to 8 bits beside them.

    Raises:
        ExportError: The recipe transforms weights, which would take them off their grids.
    """
    if recipe is None or config.precision != STORED:
        return recipe
    if recipe.transforms:
        raise ExportError(
            f"--recipe {config.recipe}: its transforms ({', '.join(recipe.transforms)}) do not go with --precision "
            f"{STORED}, which keeps weights as they are: leave them out"
        )
    if rounded:
        rule = Rule(rounded, bits=8, blocks=(32, 16, CHANNEL), rounding="search", optional=True)
        recipe = dataclasses.replace(recipe, rules=(rule, *recipe.rules))
    return keeping(recipe, grids)


def _form(grid: StoredGrid) -> str:
    scheme = grid.scheme
    groups = "per-channel" if scheme.block is None else f"group size {scheme.block}"
    return f"{scheme.bits} bits, {groups}{'' if scheme.symmetric else ' with zero points'}"
