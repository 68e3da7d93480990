"""Builds the manifest of a bundle: model facts, KV caches, graph signatures, tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from satchel.export.checkpoint import Checkpoint
from satchel.export.config import ExportConfig
from satchel.export.tracing.rotary_tables import border_within
from satchel.export.writing.provenance import Sources, named_file, producer, provenance
from satchel.export.writing.static_graphs import describe_static
from satchel.export.writing.tensor_specs import tensor_specs
from satchel.graphs.passes.adapt.attach_adapters import TENSORS
from satchel.graphs.quant.assign import layer_name
from satchel.graphs.quant.quantized import Quantized
from satchel.graphs.targets.sessions import Session
from satchel.graphs.targets.targets import PLAIN, TARGETS
from satchel.runtime.bundle.contract import (
    DECODE_BLOCKS,
    EMBED,
    HIDDEN_STATES,
    NATIVE,
    PHASES,
    PREFILL_INT8,
    STATE_KINDS,
    Layout,
    past_names,
    past_state_name,
    present_names,
    present_state_name,
)
from satchel.runtime.bundle.dtypes import FLOAT32
from satchel.runtime.bundle.graph_specs import (
    Graphs,
    GraphSpec,
    PlainGraphs,
    StaticGraphs,
    TensorSpec,
    Variant,
    VariantWeights,
)
from satchel.runtime.bundle.layouts import file_name
from satchel.runtime.bundle.manifest import (
    AdapterSpec,
    CacheLayer,
    CacheSpec,
    Embeddings,
    FileRecord,
    LayerPrecision,
    Manifest,
    ModelFacts,
    Source,
)
from satchel.runtime.bundle.states import StateSpec
from satchel.runtime.kernels import library


@dataclass(frozen=True)
class VariantKind:
    """The part of a `graph_specs.Variant` that does not depend on the model."""

    runs: tuple[str, ...]
    layout: Layout
    kernel_abi: int | None = None


VARIANTS: Mapping[str, VariantKind] = {
    PREFILL_INT8: VariantKind(("prefill",), Layout.INT8),
    DECODE_BLOCKS: VariantKind(("decode",), Layout.GROUPS),
    NATIVE: VariantKind(("prefill", "decode"), Layout.PANELS, kernel_abi=library.VERSION),
}
"""The variants by name: graphs that a target adds to the portable ones."""


def describe(
    checkpoint: Checkpoint,
    config: ExportConfig,
    models: Mapping[str, ir.Model],
    quantized: Quantized | None,
    report: Sequence[dict[str, Any]],
    files: Mapping[str, FileRecord],
    starts: Mapping[str, tuple[str, int]],
    sources: Sources,
    adapters: tuple[AdapterSpec, ...] = (),
) -> Manifest:
    """Return the manifest of a written bundle; `starts` has the file and offset of each weight."""
    layers = _layers(quantized)
    sessions, context = TARGETS[config.target].sessions(quantized), config.context(checkpoint.max_context)

    def static(prefix: str = "") -> StaticGraphs | None:
        return describe_static(models, sessions, config, context, starts, prefix) if config.static else None

    def plain() -> PlainGraphs:
        return PlainGraphs(None if config.static else _graphs(models, sessions, PLAIN), static(PLAIN))

    facts = ModelFacts(
        parameters=checkpoint.parameters,
        vocab_size=checkpoint.vocab_size,
        max_context=context,
        bos_token_id=_possible(checkpoint, checkpoint.bos_token_id),
        eos_token_ids=tuple(i for i in checkpoint.eos_token_ids if _possible(checkpoint, i) is not None),
        pad_token_id=_possible(checkpoint, checkpoint.pad_token_id),
        rotary_border=None if checkpoint.kind == "module" else border_within(checkpoint.module, context),
    )
    return Manifest(
        producer=producer(),
        source=Source(checkpoint.kind, checkpoint.name, checkpoint.model_type),
        provenance=provenance(checkpoint, config, sources),
        target=config.target,
        precision=config.precision,
        recipe=None if quantized is None else quantized.recipe,
        model=facts,
        kv_cache=cache_spec(models, "swapped" if config.static else "shared"),
        graphs=None if config.static else _graphs(models, sessions),
        variants=_variants(models, sessions),
        static=static(),
        plain=plain() if config.passes else None,
        custom_ops=tuple(named_file(path) for path in config.custom_ops),
        float_weights="float16" if config.precision == "fp16" or TARGETS[config.target].float16 else "float32",
        layers=layers,
        # The 4-bit kernels process the tokens of a prompt in pairs.
        token_multiple=2 if any(layer.bits == 4 for layer in layers.values()) else 1,
        tokenizer=None if checkpoint.tokenizer is None else checkpoint.tokenizer.spec,
        passes=tuple(report),
        files=dict(files),
        certificate=None,
        specialized=None,
        states=state_specs(models),
        adapters=adapters,
        embeddings=_embeddings(models, sessions, config),
    )


def _possible(checkpoint: Checkpoint, token: int | None) -> int | None:
    """Return the id, or None if it is outside the logits: some configs name a padding id that the model lacks."""
    return token if token is not None and token < checkpoint.vocab_size else None


def cache_spec(models: Mapping[str, ir.Model], mode: str = "shared") -> CacheSpec:
    """Return the KV cache as declared by the inputs of the portable graphs."""
    by_name, layers, dtype = _inputs(models), [], FLOAT32.name
    for index in _layer_numbers(by_name, past_names(0)[0]):
        past, present = past_names(index), present_names(index)
        _, kv_heads, _, key_dim = by_name[past[0]].shape
        own = past[1] in by_name
        value_dim = by_name[past[1]].shape[-1] if own else 0
        values = (past[1], present[1]) if own else (None, None)
        layers.append(
            CacheLayer(int(kv_heads), int(key_dim), int(value_dim), past[0], values[0], present[0], values[1])
        )
        dtype = by_name[past[0]].dtype
    return CacheSpec(mode, dtype, tuple(layers))


def state_specs(models: Mapping[str, ir.Model]) -> tuple[StateSpec, ...]:
    """Return the states of layers with a convolution or a recurrence, as declared by the graphs' inputs."""
    by_name, states = _inputs(models), []
    for kind in STATE_KINDS:
        for index in _layer_numbers(by_name, past_state_name(0, kind)):
            past = past_state_name(index, kind)
            shape = tuple(int(size) for size in by_name[past].shape[1:])
            states.append(StateSpec(index, kind, by_name[past].dtype, shape, past, present_state_name(index, kind)))
    return tuple(sorted(states, key=lambda state: state.layer))


def _inputs(models: Mapping[str, ir.Model]) -> dict[str, TensorSpec]:
    portable = (model for name, model in models.items() if name != NATIVE)  # which may store the cache otherwise
    return {spec.name: spec for model in portable for spec in tensor_specs(model.graph.inputs)}


def _layer_numbers(names: Iterable[str], first: str) -> list[int]:
    """Return the numbers of the layers that have an input named as `first` is for layer 0, in ascending order."""
    pattern = re.compile(re.escape(first).replace("0", "([0-9]+)"))
    return sorted(int(found[1]) for name in names if (found := pattern.fullmatch(name)))


def _embeddings(
    models: Mapping[str, ir.Model], sessions: Mapping[str, Session], config: ExportConfig
) -> Embeddings | None:
    if config.embeddings is None:
        return None
    graph = _graph_spec(EMBED, models[EMBED], sessions[EMBED])
    size = next(tensor.shape[-1] for tensor in graph.outputs if tensor.name == HIDDEN_STATES)
    return Embeddings(config.embeddings, int(size), graph)


def _layers(quantized: Quantized | None) -> dict[str, LayerPrecision]:
    """Return the precision of each quantized layer; all other layers are in float."""
    layers = {}
    for name, weight in ({} if quantized is None else quantized.weights).items():
        scheme, rule = weight.grid.scheme, quantized.rules[name]  # type: ignore[union-attr]
        layers[layer_name(weight)] = LayerPrecision(
            scheme.bits, scheme.block, scheme.symmetric, rule.prefill, rule.decode
        )
    return layers


def _graphs(models: Mapping[str, ir.Model], sessions: Mapping[str, Session], prefix: str = "") -> Graphs:
    specs = {phase: _graph_spec(f"{prefix}{phase}", models[f"{prefix}{phase}"], sessions[phase]) for phase in PHASES}
    return Graphs(**specs)


def _variants(models: Mapping[str, ir.Model], sessions: Mapping[str, Session]) -> tuple[Variant, ...]:
    return tuple(
        Variant(
            name=name,
            runs=kind.runs,
            graph=_graph_spec(name, models[name], sessions[name]),
            weights=VariantWeights(kind.layout.value, file_name(kind.layout)),
            requires=(),
            kernel_abi=kind.kernel_abi,
        )
        for name, kind in VARIANTS.items()
        if name in models
    )


def _graph_spec(name: str, model: ir.Model, session: Session) -> GraphSpec:
    return GraphSpec(
        file=f"{name}.onnx",
        session=dict(session.config),
        session_of=session.of,
        inputs=tensor_specs(value for value in model.graph.inputs if TENSORS not in value.meta),
        outputs=tensor_specs(model.graph.outputs),
    )
