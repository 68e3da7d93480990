"""The steps of quantization: transform, calibrate, round."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from satchel.export.ahead import in_order
from satchel.export.config import ExportConfig
from satchel.export.errors import ExportError
from satchel.export.quantize.flow import Flow, Inputs
from satchel.export.quantize.gptq import SWEEPS, Feedback
from satchel.export.quantize.kept import RoundedWeights
from satchel.export.quantize.kv_scales import cache_scales
from satchel.export.quantize.observe import BATCH, Progress, batched, observed
from satchel.export.quantize.read_ahead import ReadAhead
from satchel.export.quantize.scales import fit_grid
from satchel.export.quantize.texts import QUICK_WINDOWS
from satchel.graphs.analysis.segments import split
from satchel.graphs.ir import pipeline
from satchel.graphs.ir.arrays import transposed
from satchel.graphs.ir.inputs import cached_layers
from satchel.graphs.ir.pipeline import Done
from satchel.graphs.ir.values import MICROSOFT, nodes, weight
from satchel.graphs.ir.weights import LazyWeight
from satchel.graphs.passes.fuse.lower_experts import INTERLEAVED, interleaved
from satchel.graphs.quant.assign import layer_name, layers_of, rule_of
from satchel.graphs.quant.quantized import Quantized, QuantizedWeight
from satchel.graphs.quant.recipe import Recipe, RecipeError, Rule
from satchel.graphs.quant.rounding import Grid
from satchel.graphs.quant.stored import STORED, StoredGrid, grid_of
from satchel.graphs.targets.steps import ROTATE, equalize_steps

ROWS = 4096
"""Number of outputs whose scales are searched at a time."""

LOOKUP_SHARE = 0.1
"""How much a looked-up row's error counts beside that of the logits, in a table that is also the head: the fraction of
the mean second moment of the head's inputs that is added to each."""


def quantize(
    model: ir.Model,
    recipe: Recipe,
    windows: NDArray[np.int64] | None,
    folder: Path,
    config: ExportConfig,
    progress: Progress,
    grids: Mapping[str, StoredGrid] | None = None,
) -> tuple[Quantized, list[Done]]:
    """Transform a graph, calibrate it, and quantize its weights by a recipe.

    Args:
        model: The graph that all phases share, its weights marked with their rules.
        recipe: The precision of each weight.
        windows: Calibration text, [windows, length]; None for a recipe that needs none.
        folder: A folder for quantized values and for the values between segments of the flow; the caller removes it
            after the weights are written. If it has what an equal call had done before it was interrupted, this goes
            on from there.
        config: The options of the export, among them whether the KV cache is int8 and so needs scales.
        progress: Called after each unit of work; `pieces(model, recipe, config)` is their number.
        grids: Where the checkpoint's own quantized values lie, by layer, for the rules that keep them.

    Returns:
        The quantized weights, and the report of the transforms.

    Raises:
        ExportError: A rule cannot be applied to a layer that it matches, or a layer's KV cache cannot be int8.
    """
    if config.int8_cache:
        _caches_fit(model)
    model, done = transform(model, recipe)
    chosen = rules(model)
    schemes_fit(model, chosen)
    maxima: dict[str, NDArray[np.float32]] = {}
    statistics: dict[str, NDArray[np.float32]] = {}
    if windows is not None and (config.int8_cache or "smooth" in recipe.transforms):
        statistics, maxima = observed(model, windows, folder, config.int8_cache, progress)
    model, ran = pipeline.run(model, equalize_steps(recipe, statistics))
    done += ran
    chosen = rules(model)
    weights = _round(model, chosen, windows, folder, config, progress, grids or {})
    scales = {layer: cache_scales(model, layer, maxima) for layer in (cached_layers(model) if maxima else ())}
    return Quantized(model, weights, chosen, scales, recipe.name), done


def transform(model: ir.Model, recipe: Recipe) -> tuple[ir.Model, list[Done]]:
    """Run the recipe's transforms that need no calibration: the rotations. Return the graph and their report."""
    if "rotate" not in recipe.transforms:
        return model, []
    return pipeline.run(model, ROTATE)


def rules(model: ir.Model) -> dict[str, Rule]:
    """Return the rule of each quantizable weight that has one, by the weight's name, in graph order."""
    marked = {lazy.name: rule_of(lazy) for _, lazy in quantizable(model) if not lazy.computed}
    found = {name: rule for name, rule in marked.items() if rule is not None}
    for node in nodes(model, "MoE", MICROSOFT):
        stacks = [lazy for lazy in map(weight, node.inputs) if lazy is not None and lazy.name in found]
        found |= _sharing_blocks(stacks, found)
    return found


def _sharing_blocks(stacks: Sequence[LazyWeight], found: Mapping[str, Rule]) -> dict[str, Rule]:
    """Limit the rules of a mixture's stacks to group sizes that divide the inputs of all: its kernel needs one size."""
    shared = {}
    for lazy in stacks:
        rule = found[lazy.name]
        blocks = tuple(b for b in rule.blocks if isinstance(b, str) or all(s.dims[-1] % b == 0 for s in stacks))
        shared[lazy.name] = dataclasses.replace(rule, blocks=blocks) if blocks else rule
    return shared


def schemes_fit(model: ir.Model, chosen: Mapping[str, Rule]) -> None:
    """Check that each weight can be stored by its rule.

    Raises:
        ExportError: A weight cannot.
    """
    for node, lazy in quantizable(model):
        rule = chosen.get(lazy.name)
        if rule is None:
            continue
        try:
            rule.scheme(_inputs(lazy, node))
        except RecipeError as error:
            raise ExportError(f"recipe: {layer_name(lazy)}: {error}") from None


def quantizable(model: ir.Model) -> Iterator[tuple[ir.Node, LazyWeight]]:
    """Yield each node that reads a quantizable weight, with the weight."""
    places = {"MatMul": (1,), "Gather": (0,), "MoE": (2, 4)}
    for node in model.graph:
        for index in places.get(node.op_type, ()):
            lazy = weight(node.inputs[index]) if len(node.inputs) > index else None
            if lazy is not None and len(lazy.dims) > 1 and lazy.dtype == ir.DataType.FLOAT:
                yield node, lazy


def by_outputs(node: ir.Node) -> bool:
    """Whether the weight is stored [.., outputs, inputs]; a MatMul's is [inputs, outputs]."""
    return node.op_type != "MatMul"


def _inputs(lazy: LazyWeight, node: ir.Node) -> int:
    return lazy.dims[-1] if by_outputs(node) else lazy.dims[0]


def _round(
    model: ir.Model,
    chosen: Mapping[str, Rule],
    windows: NDArray[np.int64] | None,
    folder: Path,
    config: ExportConfig,
    progress: Progress,
    grids: Mapping[str, StoredGrid],
) -> dict[str, QuantizedWeight]:
    """Quantize each weight by its rule.

    A quick run uses fewer windows, and GPTQ only where it gains most: in layers with fewer inputs than outputs, which
    read the residual stream. All other weights are rounded by a thread, ahead of the flow, and another reads the next
    weight for GPTQ.
    """
    kept, quick = RoundedWeights(folder / "codes"), config.effort == "quick"
    results: dict[str, QuantizedWeight] = {}
    ahead: dict[str, Future[QuantizedWeight]] = {}
    reader: ReadAhead | None = None

    def follows(lazy: LazyWeight) -> bool:
        """Whether a weight is rounded by the moments of what it multiplies."""
        return chosen[lazy.name].rounding == "gptq" and (not quick or lazy.dims[0] < lazy.dims[-1])

    def rounded(node: ir.Node, lazy: LazyWeight, inputs: Inputs | None = None) -> QuantizedWeight:
        rule = chosen[lazy.name]
        before = kept.get(lazy.name, rule.scheme(_inputs(lazy, node)), _inputs(lazy, node))
        if before is not None:
            return before
        moments = head_moments(inputs, by_outputs(node)) if inputs is not None and follows(lazy) else None
        stored, sweeps = kept_grid(lazy, rule, grids), 0 if quick else SWEEPS
        whole = None if reader is None or moments is None or by_outputs(node) else reader.take(lazy)
        return round_weight(
            lazy, rule, kept, by_outputs=by_outputs(node), moments=moments, stored=stored, sweeps=sweeps, whole=whole
        )

    def visit(node: ir.Node, inputs: Inputs) -> Mapping[str, NDArray[Any]]:
        replaced = {}
        for value in node.inputs:
            lazy = weight(value)
            if lazy is None or lazy.name not in chosen:
                continue
            if lazy.name not in results:
                take(node, lazy, inputs if node.op_type == "MatMul" else None)
            if not by_outputs(node):
                replaced[lazy.name] = transposed(values(results[lazy.name])).reshape(lazy.dims)
        return replaced

    def take(node: ir.Node, lazy: LazyWeight, inputs: Inputs | None) -> None:
        early = ahead.get(lazy.name)
        results[lazy.name] = rounded(node, lazy, inputs) if early is None else early.result()
        progress(1)

    linear = {n.name for n, lazy in quantizable(model) if n.op_type == "MatMul" and lazy.name in chosen}
    at_head: tuple[ir.Node, Inputs] | None = None
    with in_order() as thread, in_order() as reading:
        if windows is not None and any(rule.rounding == "gptq" for rule in chosen.values()):
            alone: dict[str, tuple[ir.Node, LazyWeight]] = {}
            for node, lazy in quantizable(model):
                if lazy.name in chosen and not follows(lazy):
                    alone.setdefault(lazy.name, (node, lazy))
            for node, lazy in sorted(alone.values(), key=lambda found: by_outputs(found[0])):
                ahead[lazy.name] = thread.submit(rounded, node, lazy)  # the flow waits for no table, which come last
            following = {
                lazy.name: lazy
                for node, lazy in quantizable(model)
                if node.op_type == "MatMul" and lazy.name in chosen and lazy.name not in alone
            }
            reader = ReadAhead(following.values(), reading)
            read = batched(windows[:QUICK_WINDOWS] if quick else windows)
            values_between = folder / "round"
            values_between.mkdir(parents=True, exist_ok=True)
            flow = Flow(model, read, values_between, batch=BATCH)
            flow.run(
                lambda node, inputs: visit(node, inputs) if node.name in linear else {},
                journal=folder / "flow.json" if config.resumable else None,
            )
            at_head = flow.head()
        for node, lazy in quantizable(model):
            if lazy.name in chosen and lazy.name not in results:
                take(node, lazy, read_by(lazy, at_head))
    return results


def read_by(lazy: LazyWeight, at_head: tuple[ir.Node, Inputs] | None) -> Inputs | None:
    """The inputs of the head, if it multiplies by this weight."""
    if at_head is None:
        return None
    read = (weight(value) for value in at_head[0].inputs)
    return at_head[1] if any(found is not None and found.base.name == lazy.base.name for found in read) else None


def round_weight(
    lazy: LazyWeight,
    rule: Rule,
    kept: RoundedWeights,
    *,
    by_outputs: bool,
    moments: NDArray[np.float32] | None = None,
    stored: Grid | None = None,
    sweeps: int = SWEEPS,
    whole: NDArray[np.float32] | None = None,
) -> QuantizedWeight:
    """Quantize one weight by a rule; the quantized values go to a file of `kept` and are memory-mapped.

    Args:
        lazy: The weight, [.., outputs, inputs] if `by_outputs`, else [inputs, outputs].
        rule: The rule.
        kept: Where the weight is kept.
        by_outputs: Whether outputs come before inputs; see `lazy`.
        moments: The sum of x x^T over the layer's inputs, for rounding "gptq"; without it, only scales are searched.
        stored: The grid that the weight is on already, so that nothing is rounded.
        sweeps: How often values and scales of 4 bits are refined after rounding "gptq".

    Raises:
        ExportError: The weight is not on `stored`.
    """
    inputs = lazy.dims[-1] if by_outputs else lazy.dims[0]
    outputs = lazy.size // inputs
    scheme = rule.scheme(inputs)
    if scheme is None:
        raise ValueError(f"{lazy.name} has no quantization scheme")
    codes = kept.values((outputs, inputs), np.int8 if scheme.symmetric else np.uint8)
    scales, points = [], []
    search = rule.rounding != "nearest"
    importance = None if moments is None else np.ascontiguousarray(moments.diagonal())
    feedback = None if moments is None else Feedback(moments)
    for start, part in weight_parts(lazy, by_outputs, inputs, whole):
        if stored is not None:
            grid = stored.part(start, start + len(part))
            codes[start : start + len(part)] = _codes_on(grid, part, lazy)
        else:
            grid = fit_grid(part, scheme, importance, search=search)
            if feedback is None:
                codes[start : start + len(part)] = grid.round(part)
            else:
                grid, found = feedback.refine(part, grid, feedback.round(part, grid), sweeps if scheme.bits == 4 else 0)
                codes[start : start + len(part)] = found
        scales.append(grid.scales)
        points.append(grid.zero_points)
    zero_points = None if scheme.symmetric else np.concatenate([p for p in points if p is not None])
    return kept.add(lazy.name, Grid(scheme, np.concatenate(scales), zero_points), codes)


def kept_grid(lazy: LazyWeight, rule: Rule, grids: Mapping[str, StoredGrid]) -> Grid | None:
    """The grid of a weight whose rule keeps the checkpoint's quantized values; None for another rule."""
    if rule.rounding != STORED:
        return None
    found = [grids[layer] for layer in layers_of(lazy)]
    if lazy.name.endswith(INTERLEAVED):
        found = [grid.mapped(interleaved) for grid in found]
    return grid_of(found)


def _codes_on(grid: Grid, part: NDArray[np.float32], lazy: LazyWeight) -> NDArray[np.int16]:
    """The quantized values of a weight on its grid.

    Raises:
        ExportError: It is not on the grid: a scale is not finite, or the values belong to another one.
    """
    divisors = np.where(grid.scales == 0, np.float32(1), grid.scales)  # a group of zeros may have no scale
    codes = dataclasses.replace(grid, scales=divisors).round(np.nan_to_num(part))
    if not np.array_equal(grid.values(codes), part):
        raise ExportError(
            f"{layer_name(lazy)}: its stored quantized values and scales do not fit together; "
            "download the checkpoint again"
        )
    return codes


def weight_parts(
    lazy: LazyWeight, by_outputs: bool, inputs: int, whole: NDArray[np.float32] | None = None
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield the weight as [outputs, inputs] in parts, each with the index of its first output.

    `whole` is all of it, [outputs, inputs], if it has been read already.
    """
    if whole is None and not by_outputs:
        whole = transposed(lazy.numpy())
    if whole is not None:
        for start in range(0, len(whole), ROWS):
            yield start, whole[start : start + ROWS]
        return
    start, per_row = 0, lazy.size // lazy.row_count // inputs
    step = max(1, ROWS // per_row)
    for row in range(0, lazy.row_count, step):
        part = np.ascontiguousarray(lazy.rows(row, min(row + step, lazy.row_count))).reshape(-1, inputs)
        yield start, part
        start += len(part)


def values(quantized: QuantizedWeight) -> NDArray[np.float32]:
    """Dequantize a weight to [outputs, inputs] float32."""
    return quantized.grid.values(quantized.codes.astype(np.int16))


def moments_of(inputs: Inputs) -> NDArray[np.float32]:
    """The sum of x x^T over the inputs x, [width, width]."""
    total: torch.Tensor | None = None
    for x in inputs():
        batch = torch.from_numpy(np.array(x))
        total = batch.T @ batch if total is None else total.addmm_(batch.T, batch)
    if total is None:
        raise ValueError("the layer has no inputs")
    return total.numpy()


def head_moments(inputs: Inputs, table: bool) -> NDArray[np.float32]:
    """`moments_of` the inputs; of a `table` that is the head and is looked up too, each row also for itself."""
    moments = moments_of(inputs)
    if table:
        moments += np.diag(np.full(len(moments), LOOKUP_SHARE * np.trace(moments) / len(moments), np.float32))
    return moments


def _caches_fit(model: ir.Model) -> None:
    """Check that every layer uses the fused attention operator, the only one that supports an int8 cache.

    Raises:
        ExportError: A layer does not.
    """
    for node in nodes(model, "TensorScatter"):
        raise ExportError(
            f"--kv-cache int8: the layer of {node.name} cannot use GroupQueryAttention, the only operator that "
            "supports an int8 cache: use --kv-cache float"
        )


def pieces(model: ir.Model, recipe: Recipe, config: ExportConfig) -> int:
    """Return the units of work that `quantize` reports: segments of the calibration run, and quantized weights."""
    observes = config.int8_cache or "smooth" in recipe.transforms
    return (len(split(model, [])) - 1 if observes else 0) + len(rules(model))
