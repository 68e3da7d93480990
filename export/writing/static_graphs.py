"""The graphs of targets with static shapes: their plan, their lowering, and their manifest entries."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import onnx_ir as ir

from satchel.export.checkpoint import Checkpoint
from satchel.export.config import ExportConfig
from satchel.export.errors import ExportError
from satchel.export.user_passes import standard_only
from satchel.export.writing.tensor_specs import tensor_specs
from satchel.graphs.analysis.cut import INLINE_LIMIT, CutError, cut
from satchel.graphs.ir import pipeline
from satchel.graphs.ir.inputs import WINDOW, Lengths, table_of
from satchel.graphs.ir.pipeline import Done, Step
from satchel.graphs.passes.normalize.lower_opset import OPSET
from satchel.graphs.quant.quantized import Quantized
from satchel.graphs.targets.sessions import Session
from satchel.graphs.targets.targets import PLAIN, TARGETS
from satchel.runtime.bundle.dtypes import BY_ONNX
from satchel.runtime.bundle.graph_specs import GraphSpec, StaticGraph, StaticGraphs, TableSpec

FATAL = (
    "fix_shapes", "lower_attention_static", "hoist_position_gathers", "take_last_token", "drop_inputs",
    "transpose_tied_head",
    "decompose_norms", "lower_opset", "quantize_folded",
)  # fmt: skip
"""Passes that a static graph requires: a refusal by one of them stops the export."""


@dataclasses.dataclass(frozen=True)
class Planned:
    """A planned graph of a bundle: its name, phase and number of tokens."""

    name: str
    phase: str
    tokens: int


def plan(config: ExportConfig, context: int) -> tuple[Planned, ...]:
    """Return the graphs of a bundle: prefill at each length, decode, and score at the largest length.

    Raises:
        ExportError: A requested length exceeds the context of the bundle.
    """
    lengths = config.lengths(context)
    prefill = (Planned(f"prefill_{tokens}", "prefill", tokens) for tokens in lengths)
    return (*prefill, Planned("decode", "decode", 1), Planned("score", "score", lengths[-1]))


def lower_static(
    common: ir.Model,
    checkpoint: Checkpoint,
    config: ExportConfig,
    quantized: Quantized | None,
    report: list[dict[str, Any]],
    limit: int = INLINE_LIMIT,
) -> dict[str, ir.Model]:
    """Return the static graphs by file name; a graph split into parts has NAME.part1, NAME.part2, ...

    With custom passes, this includes the graphs without them, whose names are prefixed with `PLAIN`.

    Args:
        common: The graph that all phases share.
        checkpoint: The source checkpoint.
        config: The options of the export.
        quantized: The quantized weights, if any.
        report: The reports of the passes are appended to it.
        limit: Max bytes of weights in one part.

    Raises:
        ExportError: The target does not support part of the model.
        PassError: A pass produced an invalid graph.
    """
    target, context = TARGETS[config.target], config.context(checkpoint.max_context)
    custom = tuple(Step(standard_only(user, OPSET, config.target)) for user in config.passes)
    models: dict[str, ir.Model] = {}
    for prefix, own in (("", custom), (PLAIN, ())) if custom else (("", custom),):
        for planned in plan(config, context):
            phase = "decode" if planned.tokens == 1 else planned.phase
            steps = target.static_steps(phase, Lengths(planned.tokens, context), quantized, own)
            model, finished = pipeline.run(common, steps)
            _check_refusals(finished, checkpoint.name, config.target)
            if not prefix:  # the report leaves out the graphs without custom passes
                report += [done.as_json(planned.name) for done in finished]
            models |= _named_parts(f"{prefix}{planned.name}", model, limit, checkpoint.name)
    return models


def _check_refusals(finished: Iterable[Done], source: str, target: str) -> None:
    refused = [(done.name, refusal) for done in finished if done.name in FATAL for refusal in done.refusals]
    if refused:
        name, refusal = refused[0]
        raise ExportError(f"{source}: --target {target} does not support {refusal.node}: {refusal.reason} ({name})")


def _named_parts(name: str, model: ir.Model, limit: int, source: str) -> dict[str, ir.Model]:
    try:
        parts = cut(model, limit)
    except CutError as error:
        raise ExportError(f"{source}: {error}") from None
    names = [name] if len(parts) == 1 else [f"{name}.part{index + 1}" for index in range(len(parts))]
    for key, part in zip(names, parts, strict=True):
        part.graph.name = key  # Ascend's compiler names its files after the graph
    return dict(zip(names, parts, strict=True))


def parts_of(models: Mapping[str, ir.Model], name: str) -> dict[str, ir.Model]:
    """Return the parts of the named graph in order, by file name."""
    return {key: model for key, model in models.items() if key == name or key.startswith(f"{name}.part")}


def describe_static(
    models: Mapping[str, ir.Model],
    sessions: Mapping[str, Session],
    config: ExportConfig,
    context: int,
    starts: Mapping[str, tuple[str, int]],
    prefix: str = "",
) -> StaticGraphs:
    """Return the manifest entries of the static graphs of a written bundle.

    `starts` has the file and offset of each weight and lookup table by name; `prefix` is `PLAIN` for the graphs without
    custom passes.
    """
    found = {planned: parts_of(models, f"{prefix}{planned.name}") for planned in plan(config, context)}
    graphs = {
        planned.name: StaticGraph(
            planned.tokens, tuple(_spec(key, part, sessions[planned.phase]) for key, part in parts.items())
        )
        for planned, parts in found.items()
    }
    inputs = {str(v.name): v for parts in found.values() for model in parts.values() for v in model.graph.inputs}
    windows = {name: value.meta.get(WINDOW) for name, value in inputs.items()}
    return StaticGraphs(
        capacity=context,
        masks={name: window for name, window in windows.items() if isinstance(window, int)},
        tables=tuple(_tables(inputs.values(), starts)),
        prefill=tuple(graph for name, graph in graphs.items() if name.startswith("prefill_")),
        decode=graphs["decode"],
        score=graphs["score"],
    )


def _spec(name: str, model: ir.Model, session: Session) -> GraphSpec:
    return GraphSpec(
        file=f"{name}.onnx",
        session=dict(session.config),
        session_of=None,
        inputs=tensor_specs(model.graph.inputs),
        outputs=tensor_specs(model.graph.outputs),
    )


def _tables(inputs: Iterable[ir.Value], starts: Mapping[str, tuple[str, int]]) -> Iterator[TableSpec]:
    for value in inputs:
        table = table_of(value)
        if table is not None:
            file, offset = starts[table.name]
            yield TableSpec(str(value.name), file, offset, BY_ONNX[table.dtype.value].name, table.dims)
