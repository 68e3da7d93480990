"""What the manifest says of a bundle: model facts, caches, graph signatures, tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from satchel.export.checkpoint import Checkpoint
from satchel.export.config import ExportConfig
from satchel.export.errors import ExportError
from satchel.export.provenance import named_file, producer, provenance
from satchel.graphs import signature
from satchel.graphs.assign import layer_name
from satchel.graphs.quantized import Quantised
from satchel.graphs.targets import DECODE_BLOCKS, PHASES, PLAIN, PREFILL_INT8, TARGETS, Session
from satchel.runtime.manifest import (
    CacheLayer,
    CacheSpec,
    CorpusEntry,
    FileRecord,
    Graphs,
    GraphSpec,
    LayerPrecision,
    Manifest,
    ModelFacts,
    PlainGraphs,
    Source,
    TensorSpec,
    TokenizerSpec,
)

DTYPE_NAMES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.INT64: "int64",
    ir.DataType.INT8: "int8",
}


def describe(
    checkpoint: Checkpoint,
    config: ExportConfig,
    models: Mapping[str, ir.Model],
    quantised: Quantised | None,
    report: Sequence[dict[str, Any]],
    files: Mapping[str, FileRecord],
) -> Manifest:
    """The manifest of a bundle whose files are written."""
    facts = ModelFacts(
        parameters=checkpoint.parameters,
        vocab_size=checkpoint.vocab_size,
        max_context=config.context(checkpoint.max_context),
        bos_token_id=_possible(checkpoint, checkpoint.bos_token_id),
        eos_token_ids=tuple(i for i in checkpoint.eos_token_ids if _possible(checkpoint, i) is not None),
        pad_token_id=_possible(checkpoint, checkpoint.pad_token_id),
    )
    return Manifest(
        producer=producer(),
        source=Source(checkpoint.kind, checkpoint.name, checkpoint.model_type),
        provenance=provenance(checkpoint, config),
        target=config.target,
        precision=config.precision,
        recipe=None if quantised is None else quantised.recipe,
        model=facts,
        kv_cache=cache_spec(models["prefill"]),
        graphs=_graphs(models, TARGETS[config.target].sessions(quantised)),
        static=None,
        plain=_plain_graphs(models, TARGETS[config.target].sessions(quantised)),
        custom_ops=tuple(named_file(path) for path in config.custom_ops),
        layers=_layers(quantised),
        tokenizer=tokenizer_spec(checkpoint),
        passes=tuple(report),
        files=dict(files),
        certificate=None,
        specialized=None,
    )


def _possible(checkpoint: Checkpoint, token: int | None) -> int | None:
    """The id, or None where the logits do not reach it: some configs name a padding id that the model never had."""
    return token if token is not None and token < checkpoint.vocab_size else None


def cache_spec(model: ir.Model) -> CacheSpec:
    """The KV cache as the graph's inputs declare it."""
    by_name = {spec.name: spec for spec in tensor_specs(model.graph.inputs)}
    layers = []
    for index in range(sum(name.endswith(".key") for name in by_name)):
        past, present = signature.past_names(index), signature.present_names(index)
        (_, kv_heads, _, key_dim), (_, _, _, value_dim) = by_name[past[0]].shape, by_name[past[1]].shape
        layers.append(CacheLayer(int(kv_heads), int(key_dim), int(value_dim), *past, *present))
    return CacheSpec("shared", by_name[past[0]].dtype if layers else "float32", tuple(layers))


def tokenizer_spec(checkpoint: Checkpoint) -> TokenizerSpec | None:
    """The tokenizer's entry, with the name that its file has in the bundle."""
    files = checkpoint.tokenizer
    if files is None:
        return None
    name = "tokenizer.json" if files.kind == "tokenizer.json" else "tokenizer.model"
    corpus = tuple(CorpusEntry(text, tuple(ids)) for text, ids in files.corpus)
    return TokenizerSpec(files.kind, name, files.add_bos, corpus)


def tensor_specs(values: Iterable[ir.Value]) -> tuple[TensorSpec, ...]:
    """Graph inputs or outputs as the manifest declares them.

    Raises:
        ExportError: A shape or type is not known.
    """
    specs = []
    for value in values:
        if value.shape is None or value.dtype not in DTYPE_NAMES:
            raise ExportError(
                f"the graph's {value.name} has no shape or an unexpected type {value.dtype}: "
                "report this model to satchel"
            )
        shape = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape.dims)
        specs.append(TensorSpec(str(value.name), DTYPE_NAMES[value.dtype], shape))
    return tuple(specs)


def _layers(quantised: Quantised | None) -> dict[str, LayerPrecision]:
    """How each quantised layer is stored; layers that are not named are in the precision's float."""
    layers = {}
    for name, weight in ({} if quantised is None else quantised.weights).items():
        scheme, rule = weight.grid.scheme, quantised.rules[name]  # type: ignore[union-attr]
        layers[layer_name(weight)] = LayerPrecision(
            scheme.bits, scheme.block, scheme.symmetric, rule.prefill, rule.decode
        )
    return layers


def _graphs(models: Mapping[str, ir.Model], sessions: Mapping[str, Session]) -> Graphs:
    custom = {phase: model for phase, model in models.items() if not phase.startswith(PLAIN)}
    specs = {phase: _graph_spec(phase, model, sessions[phase]) for phase, model in custom.items()}
    always = {phase: specs[phase] for phase in PHASES}
    return Graphs(**always, prefill_int8=specs.get(PREFILL_INT8), decode_blocks=specs.get(DECODE_BLOCKS))


def _plain_graphs(models: Mapping[str, ir.Model], sessions: Mapping[str, Session]) -> PlainGraphs | None:
    """The graphs without passes of a user's own, where there are such passes."""
    if not any(name.startswith(PLAIN) for name in models):
        return None
    specs = {phase: _graph_spec(f"{PLAIN}{phase}", models[f"{PLAIN}{phase}"], sessions[phase]) for phase in PHASES}
    return PlainGraphs(Graphs(**specs, prefill_int8=None, decode_blocks=None), None)


def _graph_spec(name: str, model: ir.Model, session: Session) -> GraphSpec:
    return GraphSpec(
        file=f"{name}.onnx",
        session=dict(session.config),
        session_of=session.of,
        inputs=tensor_specs(model.graph.inputs),
        outputs=tensor_specs(model.graph.outputs),
    )
