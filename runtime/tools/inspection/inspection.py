"""Collects what a manifest says about a bundle: sizes, precision per layer, passes, certificate."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from satchel.runtime.bundle import strict_json
from satchel.runtime.bundle.certificate import Certificate
from satchel.runtime.bundle.contract import EMBED, PHASES, WEIGHTS_NAME
from satchel.runtime.bundle.dtypes import DTYPES
from satchel.runtime.bundle.graph_specs import GraphSpec
from satchel.runtime.bundle.manifest import (
    MANIFEST_NAME,
    AdapterSpec,
    CacheSpec,
    LayerPrecision,
    Manifest,
    ModelFacts,
    NamedFile,
    Provenance,
    Source,
    Specialized,
)
from satchel.runtime.bundle.plain_graphs import without_custom
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.bundle.states import StateSpec
from satchel.runtime.errors import BundleError
from satchel.runtime.generation.templates.chat_template import template_files

LARGEST_SIZE = 1 << 63  # bytes; larger sizes are impossible


@dataclass(frozen=True)
class Refused:
    """A node that a pass did not change, and the reason."""

    node: str
    reason: str


@dataclass(frozen=True)
class PassFacts:
    """The result of a pass on a graph: "common" (shared by all phases) or that of a phase."""

    graph: str
    name: str
    count: int
    refusals: tuple[Refused, ...]


@dataclass(frozen=True)
class Inspection:
    """What is in a bundle. Sizes are in bytes; `files` has the largest first.

    `bytes` is the total of all files except those in `specialized`, `cache_bytes` the KV cache for the whole context,
    and `state_bytes` the states of one sequence. `bits_per_weight` is 8 times the size of weights.bin over the model's
    parameters, None without such a file. `layers` are the quantized layers, as in the manifest; other weights are in
    `float_weights`. `templates` are the names of the chat templates. `graphs` are those of the phases and the variants,
    and under "plain" and the phase those without custom passes. `embeddings` is the pooling, None without such a graph.
    """

    bundle: str
    source: Source
    provenance: Provenance | None
    target: str
    precision: str
    recipe: str | None
    model: ModelFacts
    tokenizer: str | None
    templates: tuple[str, ...]
    producer: dict[str, str]
    files: dict[str, int]
    bytes: int
    bits_per_weight: float | None
    kv_cache: CacheSpec
    cache_bytes_per_token: int
    cache_bytes: int
    states: tuple[StateSpec, ...]
    state_bytes: int
    float_weights: str
    layers: dict[str, LayerPrecision]
    graphs: dict[str, GraphSpec]
    custom_ops: tuple[NamedFile, ...]
    adapters: tuple[AdapterSpec, ...]
    embeddings: str | None
    embedding_size: int | None
    passes: tuple[PassFacts, ...]
    certificate: Certificate | None
    specialized: Specialized | None

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values, with the number of golden prompts instead of the prompts."""
        values: dict[str, Any] = strict_json.to_json(self)
        if self.certificate is not None:
            values["certificate"]["prompts"] = len(self.certificate.prompts)
        return values


def inspect_bundle(bundle: Bundle) -> Inspection:
    """Collect what the manifest of a bundle says; `read_bundle` opens it well enough.

    Raises BundleError if its list of passes is malformed or a size is impossible.
    """
    manifest = bundle.manifest
    sizes = {MANIFEST_NAME: bundle.manifest_bytes}
    sizes |= {name: record.bytes for name, record in manifest.files.items()}
    weights = manifest.files.get(WEIGHTS_NAME)
    specialized = manifest.specialized
    spec = dataclasses.replace(bundle, specialized=specialized).kv_cache
    token_bytes = _bytes_per_token(spec)
    cache_bytes = token_bytes * manifest.model.max_context
    if max(cache_bytes, 0 if specialized is None else specialized.bytes) >= LARGEST_SIZE:
        raise BundleError(f"{bundle.folder / MANIFEST_NAME}: its sizes are impossible: export the bundle again")
    return Inspection(
        bundle=str(bundle.folder),
        source=manifest.source,
        provenance=manifest.provenance,
        target=manifest.target,
        precision=manifest.precision,
        recipe=manifest.recipe,
        model=manifest.model,
        tokenizer=None if manifest.tokenizer is None else manifest.tokenizer.file,
        templates=tuple(template_files(bundle)),
        producer=manifest.producer,
        files=dict(sorted(sizes.items(), key=lambda item: (-item[1], item[0]))),
        bytes=sum(sizes.values()),
        bits_per_weight=None if weights is None else 8 * weights.bytes / manifest.model.parameters,
        kv_cache=spec,
        cache_bytes_per_token=token_bytes,
        cache_bytes=cache_bytes,
        states=manifest.states,
        state_bytes=manifest.state_bytes,
        float_weights=manifest.float_weights,
        layers=manifest.layers,
        graphs=_graphs(manifest),
        custom_ops=manifest.custom_ops,
        adapters=manifest.adapters,
        embeddings=None if manifest.embeddings is None else manifest.embeddings.pooling,
        embedding_size=None if manifest.embeddings is None else manifest.embeddings.size,
        passes=_passes(bundle),
        certificate=manifest.certificate,
        specialized=specialized,
    )


def _bytes_per_token(spec: CacheSpec) -> int:
    """The bytes of the KV cache for one position. A swapped cache has two buffers for each layer's keys and values."""
    numbers = sum(layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in spec.layers)
    return numbers * DTYPES[spec.dtype].nbytes * (2 if spec.mode == "swapped" else 1)


def _graphs(manifest: Manifest) -> dict[str, GraphSpec]:
    """Each graph by its phase; static ones with the number of tokens, and the part if there are several."""
    found = _graphs_of(manifest)
    if manifest.plain is not None:
        found |= {f"plain {name}": facts for name, facts in _graphs_of(without_custom(manifest)).items()}
    return found


def _graphs_of(manifest: Manifest) -> dict[str, GraphSpec]:
    static = manifest.static
    if static is None:
        embed = () if manifest.embeddings is None else (EMBED,)
        names = (*PHASES, *embed, *(variant.name for variant in manifest.variants))
        return {name: manifest.graph(name) for name in names}
    prefill = [(f"prefill of {graph.tokens}", graph) for graph in static.prefill]
    named = [*prefill, ("decode", static.decode), (f"score of {static.score.tokens}", static.score)]
    return {
        name if len(graph.parts) == 1 else f"{name}, part {number}": part
        for name, graph in named
        for number, part in enumerate(graph.parts, start=1)
    }


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
