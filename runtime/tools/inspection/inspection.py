"""What a bundle's manifest says of it, put together for people: sizes, precision per layer, passes, certificate."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from satchel.runtime.bundle import strict_json
from satchel.runtime.bundle.certificate import Certificate
from satchel.runtime.bundle.contract import PHASES, WEIGHTS_NAME
from satchel.runtime.bundle.dtypes import DTYPES
from satchel.runtime.bundle.manifest import (
    MANIFEST_NAME,
    CacheSpec,
    GraphSpec,
    LayerPrecision,
    Manifest,
    ModelFacts,
    NamedFile,
    Provenance,
    Source,
)
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.errors import BundleError

LARGEST_SIZE = 1 << 63  # bytes: whatever is above it is no size


FLOAT16_TARGETS = ("cuda", "cann")
"""Targets whose graphs compute in float16, whatever the precision."""


@dataclass(frozen=True)
class CacheShape:
    """How many layers have keys and values of one form."""

    layers: int
    kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class CacheFacts:
    """The KV cache: its forms, and its size in bytes for one position and for the whole context.

    A swapped cache has two buffers for each layer's keys and values; both count.
    """

    mode: str
    dtype: str
    shapes: tuple[CacheShape, ...]
    bytes_per_token: int
    bytes_at_full_context: int


@dataclass(frozen=True)
class Refused:
    """A node that a pass left alone, and why."""

    node: str
    reason: str


@dataclass(frozen=True)
class PassFacts:
    """What a pass did to a graph: "common" (what all phases share) or that of a phase."""

    graph: str
    name: str
    count: int
    refusals: tuple[Refused, ...]


@dataclass(frozen=True)
class GraphFacts:
    """A graph's file and session. `session_of` names the phase whose session may run it."""

    file: str
    session: dict[str, str]
    session_of: str | None


@dataclass(frozen=True)
class SpecializedFacts:
    """For which machine the bundle has graphs of its own, how its phases run, and the files' sizes in bytes."""

    onnxruntime: str
    provider: str
    processor: str
    int8_prefill: bool
    decode_blocks: bool
    tiled_attention: bool
    native: bool
    files: dict[str, int]


@dataclass(frozen=True)
class Inspection:
    """What is in a bundle. Sizes are in bytes; `files` has the largest first.

    `bytes` is all files together, those that `specialized` lists apart. `bits_per_weight` is 8 times the size of
    weights.bin over the model's parameters, None without such a file. `layers` is as in the manifest: the quantized
    ones; other weights are in `float_weights`. `graphs` has those without passes of a user's own, too, as "plain" and
    their phase.
    """

    bundle: str
    source: Source
    provenance: Provenance | None
    target: str
    precision: str
    recipe: str | None
    model: ModelFacts
    tokenizer: str | None
    producer: dict[str, str]
    files: dict[str, int]
    bytes: int
    bits_per_weight: float | None
    kv_cache: CacheFacts
    float_weights: str
    layers: dict[str, LayerPrecision]
    graphs: dict[str, GraphFacts]
    custom_ops: tuple[NamedFile, ...]
    passes: tuple[PassFacts, ...]
    certificate: Certificate | None
    specialized: SpecializedFacts | None

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values, in the order of the fields, golden prompts counted."""
        values: dict[str, Any] = strict_json.to_json(self)
        if self.certificate is not None:
            values["certificate"]["prompts"] = len(self.certificate.prompts)
        return values


def inspect_bundle(bundle: Bundle) -> Inspection:
    """Put together what the manifest of a bundle says; `read_bundle` is enough to have one.

    Raises BundleError when its list of passes is not of the form that an export writes, or a size cannot be.
    """
    manifest = bundle.manifest
    sizes = {MANIFEST_NAME: bundle.manifest_bytes}
    sizes |= {name: record.bytes for name, record in manifest.files.items()}
    weights = manifest.files.get(WEIGHTS_NAME)
    cache, specialized = _cache_facts(manifest.kv_cache, manifest.model.max_context), _specialized_facts(manifest)
    further = sum(specialized.files.values()) if specialized else 0
    if max(cache.bytes_at_full_context, further) >= LARGEST_SIZE:
        raise BundleError(f"{bundle.folder / MANIFEST_NAME}: its sizes are no sizes: export the bundle again")
    return Inspection(
        bundle=str(bundle.folder),
        source=manifest.source,
        provenance=manifest.provenance,
        target=manifest.target,
        precision=manifest.precision,
        recipe=manifest.recipe,
        model=manifest.model,
        tokenizer=None if manifest.tokenizer is None else manifest.tokenizer.file,
        producer=manifest.producer,
        files=dict(sorted(sizes.items(), key=lambda item: (-item[1], item[0]))),
        bytes=sum(sizes.values()),
        bits_per_weight=None if weights is None else 8 * weights.bytes / manifest.model.parameters,
        kv_cache=cache,
        float_weights="float16" if manifest.precision == "fp16" or manifest.target in FLOAT16_TARGETS else "float32",
        layers=manifest.layers,
        graphs=_graphs(manifest),
        custom_ops=manifest.custom_ops,
        passes=_passes(bundle),
        certificate=manifest.certificate,
        specialized=specialized,
    )


def _cache_facts(spec: CacheSpec, max_context: int) -> CacheFacts:
    forms = Counter((layer.kv_heads, layer.key_dim, layer.value_dim) for layer in spec.layers)
    shapes = tuple(CacheShape(count, *form) for form, count in forms.items())
    numbers = sum(shape.layers * shape.kv_heads * (shape.key_dim + shape.value_dim) for shape in shapes)
    size = numbers * DTYPES[spec.dtype].nbytes * (2 if spec.mode == "swapped" else 1)
    return CacheFacts(spec.mode, spec.dtype, shapes, size, size * max_context)


def _graphs(manifest: Manifest) -> dict[str, GraphFacts]:
    """Each graph by its phase, of static ones with the number of tokens, and the part where there are several."""
    found = _graphs_of(manifest)
    if manifest.plain is not None:
        found |= {f"plain {name}": facts for name, facts in _graphs_of(manifest.without_custom()).items()}
    return found


def _graphs_of(manifest: Manifest) -> dict[str, GraphFacts]:
    static = manifest.static
    if static is None:
        return {phase: _graph_facts(manifest.graph(phase)) for phase in PHASES}
    prefill = [(f"prefill of {graph.tokens}", graph) for graph in static.prefill]
    named = [*prefill, ("decode", static.decode), (f"score of {static.score.tokens}", static.score)]
    return {
        name if len(graph.parts) == 1 else f"{name}, part {number}": _graph_facts(part)
        for name, graph in named
        for number, part in enumerate(graph.parts, start=1)
    }


def _graph_facts(graph: GraphSpec) -> GraphFacts:
    return GraphFacts(graph.file, graph.session, graph.session_of)


def _passes(bundle: Bundle) -> tuple[PassFacts, ...]:
    try:
        entries = [
            {"name" if key == "pass" else key: value for key, value in entry.items()}
            for entry in bundle.manifest.passes
        ]
        facts: tuple[PassFacts, ...] = strict_json.from_json(tuple[PassFacts, ...], entries, "passes")
    except strict_json.StrictJsonError as error:
        raise BundleError(f"{bundle.folder / MANIFEST_NAME}: {error}: export the bundle again") from None
    return facts


def _specialized_facts(manifest: Manifest) -> SpecializedFacts | None:
    found = manifest.specialized
    if found is None:
        return None
    files = {name: record.bytes for name, record in found.files.items()}
    return SpecializedFacts(
        onnxruntime=found.onnxruntime,
        provider=found.provider,
        processor=found.processor,
        int8_prefill=found.int8_prefill,
        decode_blocks=found.decode_blocks,
        tiled_attention=found.tiled_attention,
        native=found.native,
        files=files,
    )
