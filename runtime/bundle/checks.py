"""Checks a manifest beyond its keys and types: that names and counts are consistent and within the limits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from satchel.runtime.bundle.certificate import check_values
from satchel.runtime.bundle.contract import (
    ATTENTION_MASK,
    CACHE_MODES,
    EMBED,
    HIDDEN_STATES,
    INPUT_IDS,
    LOGITS,
    PHASES,
    POOLINGS,
    RAGGED_INPUTS,
    ROW_OFFSETS,
    STATIC_INPUTS,
    TEXT_LENGTH,
    TOKENIZER_KINDS,
    TOP_IDS,
    TOP_OUTPUTS,
    Layout,
)
from satchel.runtime.bundle.dtypes import DTYPES
from satchel.runtime.bundle.limits import LIMITS
from satchel.runtime.bundle.names import leads_outside
from satchel.runtime.bundle.plain_graphs import without_custom
from satchel.runtime.bundle.ranks import check_rank
from satchel.runtime.bundle.states import check_graph_states, check_states
from satchel.runtime.bundle.strict_json import StrictJsonError

if TYPE_CHECKING:
    from satchel.runtime.bundle.graph_specs import GraphSpec, StaticGraph, StaticGraphs, TensorSpec
    from satchel.runtime.bundle.manifest import Embeddings, FileRecord, Manifest, Specialized


PREPARED = ("prefill", "decode")
"""The phases that variants and specialized graphs run."""

FLOATS = ("float32", "float16")
LAYOUTS = tuple(layout.value for layout in Layout)


def check_manifest(manifest: Manifest) -> None:
    """Check that the names, sizes and counts of a manifest are consistent. Raises StrictJsonError with the key."""
    model, cache, tokenizer = manifest.model, manifest.kv_cache, manifest.tokenizer
    for field in ("parameters", "vocab_size", "max_context"):
        _check(getattr(model, field) > 0, f"model.{field}", getattr(model, field), "a number above 0")
    border = model.rotary_border
    _check(border is None or 0 < border < model.max_context, "model.rotary_border", border, "below model.max_context")
    special = [model.bos_token_id, model.pad_token_id, *model.eos_token_ids]
    for token_id in special:
        _check(
            token_id is None or 0 <= token_id < model.vocab_size, "model", token_id, "token ids below model.vocab_size"
        )
    _check_one_of(cache.mode, "kv_cache.mode", CACHE_MODES)
    mode = "shared" if manifest.static is None else "swapped"
    _check(cache.mode == mode, "kv_cache.mode", cache.mode, f"'{mode}' for these graphs")
    _check_one_of(cache.dtype, "kv_cache.dtype", DTYPES)
    for index, layer in enumerate(cache.layers):
        for field in ("kv_heads", "key_dim", "value_dim"):
            size = getattr(layer, field)
            least = 0 if field == "value_dim" and layer.past_value is None else 1
            _check(size >= least, f"kv_cache.layers[{index}].{field}", size, "a number above 0")
        none = [name is None for name in (layer.past_value, layer.present_value)] + [layer.value_dim == 0]
        key = f"kv_cache.layers[{index}].present_value"
        _check(len(set(none)) == 1, key, layer.present_value, "null if and only if past_value is, and value_dim 0")
    check_states(manifest.states)
    _check(manifest.static is None or not manifest.states, "states", len(manifest.states), "none with 'static'")
    _check(
        (manifest.graphs is None) != (manifest.static is None),
        "static",
        manifest.static,
        "set if and only if 'graphs' is not",
    )
    if manifest.static is not None:
        _check_static(manifest, manifest.static)
    else:
        for phase in PHASES:
            _check_graph(manifest, manifest.graph(phase), phase, f"graphs.{phase}")
        chosen = [manifest.graph(phase).top_tokens for phase in ("prefill", "decode")]
        _check(chosen[0] == chosen[1], "graphs.decode.outputs", chosen, "as many top tokens as those of prefill")
    if manifest.embeddings is not None:
        _check_embeddings(manifest, manifest.embeddings)
    _check_variants(manifest)
    _check_adapters(manifest)
    _check_one_of(manifest.float_weights, "float_weights", FLOATS)
    _check(manifest.token_multiple >= 1, "token_multiple", manifest.token_multiple, "a number above 0")
    if tokenizer:
        _check_one_of(tokenizer.kind, "tokenizer.kind", TOKENIZER_KINDS)
        _check(tokenizer.file in manifest.files, "tokenizer.file", tokenizer.file, "listed in 'files'")
        for name in ("bos_id", "eos_id"):
            value = getattr(tokenizer, name)
            _check(value is None or value >= 0, f"tokenizer.{name}", value, "0 or more")
        for index, token in enumerate(tokenizer.added):
            _check(token.id >= 0, f"tokenizer.added[{index}].id", token.id, "0 or more")
            _check(token.content != "", f"tokenizer.added[{index}].content", token.content, "a text that is not empty")
    _check_files(manifest.files, "files")
    for index, library in enumerate(manifest.custom_ops):
        _check_sha256(library.sha256, f"custom_ops[{index}].sha256")
    if manifest.plain is not None:
        check_manifest(without_custom(manifest))
    if manifest.certificate:
        check_values(manifest.certificate, model.vocab_size, model.max_context)
    if manifest.specialized:
        _check_specialized(manifest, manifest.specialized)
    if manifest.rank is not None:
        check_rank(manifest.rank)


def _check_embeddings(manifest: Manifest, embeddings: Embeddings) -> None:
    key = "embeddings"
    _check_one_of(embeddings.pooling, f"{key}.pooling", POOLINGS)
    _check(embeddings.size > 0, f"{key}.size", embeddings.size, "a number above 0")
    plain = manifest.static is None and manifest.plain is None
    _check(plain, key, embeddings.pooling, "null with 'static' or 'plain'")
    _check_graph(manifest, embeddings.graph, EMBED, f"{key}.graph", HIDDEN_STATES)
    width = next(tensor.shape[-1:] for tensor in embeddings.graph.outputs if tensor.name == HIDDEN_STATES)
    _check(width == (embeddings.size,), f"{key}.graph.outputs", width, f"{embeddings.size} wide, as 'size' says")


def _check_variants(manifest: Manifest) -> None:
    _check(
        manifest.graphs is not None or not manifest.variants, "variants", len(manifest.variants), "none with 'static'"
    )
    names = [*PHASES, *(variant.name for variant in manifest.variants)]
    _check(len(set(names)) == len(names), "variants", names, "names that differ from each other and from the phases")
    for index, variant in enumerate(manifest.variants):
        key, weights = f"variants[{index}]", variant.weights
        runs = bool(variant.runs) and set(variant.runs) <= set(PREPARED) and len(set(variant.runs)) == len(variant.runs)
        _check(runs, f"{key}.runs", list(variant.runs), f"some of {', '.join(PREPARED)}")
        _check_graph(manifest, variant.graph, variant.name, f"{key}.graph")
        same = variant.graph.top_tokens == manifest.graph(variant.runs[0]).top_tokens
        _check(same, f"{key}.graph.outputs", variant.graph.top_tokens, "as many top tokens as those of prefill")
        _check_one_of(weights.layout, f"{key}.weights.layout", LAYOUTS)
        made = "/" not in weights.file and not leads_outside(weights.file) and weights.file not in manifest.files
        _check(made, f"{key}.weights.file", weights.file, "the name of a file that is not in 'files'")


def _check_adapters(manifest: Manifest) -> None:
    static = manifest.static is not None
    _check(not static or not manifest.adapters, "adapters", len(manifest.adapters), "none with 'static'")
    names = [adapter.name for adapter in manifest.adapters]
    _check("" not in names and len(set(names)) == len(names), "adapters", names, "names that differ from each other")
    for index, adapter in enumerate(manifest.adapters):
        key = f"adapters[{index}]"
        _check(adapter.file in manifest.files, f"{key}.file", adapter.file, "listed in 'files'")
        names = [tensor.name for tensor in adapter.inputs]
        _check(len(set(names)) == len(names), f"{key}.inputs", names, "names that differ from each other")
        for tensor in adapter.inputs:
            _check_one_of(tensor.dtype, f"{key}.inputs.{tensor.name}.dtype", FLOATS[:1])
            numbers = all(isinstance(size, int) and size >= 1 for size in tensor.shape)
            _check(numbers, f"{key}.inputs.{tensor.name}.shape", tensor.shape, "numbers above 0")


def _check_specialized(manifest: Manifest, specialized: Specialized) -> None:
    _check_files(specialized.files, "specialized.files")
    for index, run in enumerate(specialized.runs_ahead):
        key = f"specialized.runs_ahead[{index}]"
        _check(run.drafted > 0, f"{key}.drafted", run.drafted, "a number above 0")
        _check(0 < run.steps < math.inf, f"{key}.steps", run.steps, "a number above 0")
    found, known = specialized.graphs, {variant.name: variant for variant in manifest.variants}
    fits = set(found) in ({"prefill"}, {"prefill", "decode"})
    _check(fits, "specialized.graphs", sorted(found), "prefill, or prefill and decode")
    for phase, graph in found.items():
        key = f"specialized.graphs.{phase}"
        _check(graph.file in specialized.files, f"{key}.file", graph.file, "listed in 'specialized.files'")
        if graph.variant is not None:
            runs = known[graph.variant].runs if graph.variant in known else ()
            wanted = set(PREPARED) if len(found) == 1 else {phase}
            _check(wanted <= set(runs), f"{key}.variant", graph.variant, "a variant that runs the phase")
    caches = {manifest.cache_of(graph.variant or phase).dtype for phase, graph in found.items()}
    _check(len(caches) == 1, "specialized.graphs", sorted(caches), "of one type of keys and values")


def _check_files(files: dict[str, FileRecord], key: str) -> None:
    for name, record in files.items():
        _check(record.bytes >= 0, f"{key}.{name}.bytes", record.bytes, "a size")
        _check_sha256(record.sha256, f"{key}.{name}.sha256")


def _check_sha256(digest: str, key: str) -> None:
    well_formed = len(digest) == 64 and set(digest) <= set("0123456789abcdef")
    _check(well_formed, key, digest, "64 lower-case hex digits")


def _check_graph(manifest: Manifest, graph: GraphSpec, name: str, key: str, result: str = LOGITS) -> None:
    _check(graph.file in manifest.files, f"{key}.file", graph.file, "listed in 'files'")
    for side, tensors in (("inputs", graph.inputs), ("outputs", graph.outputs)):
        for index, tensor in enumerate(tensors):
            _check_one_of(tensor.dtype, f"{key}.{side}[{index}].dtype", DTYPES)
    shareable = (None, "prefill") if name == "decode" else (None,)
    _check(graph.session_of in shareable, f"{key}.session_of", graph.session_of, f"one of {shareable}")
    layers, states = manifest.kv_cache.layers, manifest.states
    wanted = {INPUT_IDS, ATTENTION_MASK, *(past for layer in layers for past, _, _ in layer.buffers)}
    wanted |= {state.past for state in states}
    wanted |= set() if manifest.model.rotary_border is None else {TEXT_LENGTH}
    found = {tensor.name for tensor in graph.inputs}
    wanted |= set(RAGGED_INPUTS) if ROW_OFFSETS in found and name not in PHASES else set()
    expected = "the contract's names and those of kv_cache and states"
    _check(found == wanted, f"{key}.inputs", sorted(found ^ wanted), expected)
    wanted = {result, *(present for layer in layers for _, present, _ in layer.buffers)}
    wanted |= {state.present for state in states}
    chosen = [tensor for tensor in graph.outputs if tensor.name in TOP_OUTPUTS]
    found = {tensor.name for tensor in graph.outputs if tensor not in chosen}
    _check(found == wanted, f"{key}.outputs", sorted(found ^ wanted), expected)
    pasts = {past for layer in layers for past, _, _ in layer.buffers}
    types = {tensor.dtype for tensor in graph.inputs if tensor.name in pasts}
    own = {manifest.kv_cache.dtype} if name in (*PHASES, EMBED) else types  # a variant may store another type
    _check(len(types) < 2 and types <= own, f"{key}.inputs", sorted(types), "of one type, that of kv_cache")
    check_graph_states(states, graph, key)
    if chosen:
        _check_chosen(f"{key}.outputs", name, chosen, manifest.model.vocab_size)


def _check_chosen(key: str, name: str, chosen: list[TensorSpec], vocabulary: int) -> None:
    """Check that both outputs exist, for the last token only, with equal shapes and the right types."""
    names = sorted(tensor.name for tensor in chosen)
    _check(names == sorted(TOP_OUTPUTS) and name != "score", key, names, "both of them, or neither")
    for tensor in chosen:
        dtype, count = "int64" if tensor.name == TOP_IDS else "float32", tensor.shape[-1]
        _check(tensor.dtype == dtype, f"{key}.{tensor.name}.dtype", tensor.dtype, dtype)
        fits = len(tensor.shape) == 3 and tensor.shape[1] == 1 and isinstance(count, int) and 1 <= count <= vocabulary
        _check(fits, f"{key}.{tensor.name}.shape", tensor.shape, "[batch, 1, a number of tokens]")
    _check(chosen[0].shape == chosen[1].shape, key, [tensor.shape for tensor in chosen], "equal in shape")


def _check_static(manifest: Manifest, static: StaticGraphs) -> None:
    key = "static"
    _check(static.capacity == manifest.model.max_context, f"{key}.capacity", static.capacity, "model.max_context")
    for name, window in static.masks.items():
        _check(window >= 0, f"{key}.masks.{name}", window, "a window, or 0 for none")
    for index, table in enumerate(static.tables):
        where = f"{key}.tables[{index}]"
        _check_one_of(table.dtype, f"{where}.dtype", DTYPES)
        rows = (static.capacity, static.capacity + (manifest.model.rotary_border or 0))
        fits = len(table.shape) == 2 and table.shape[0] in rows and table.shape[1] > 0
        _check(fits, f"{where}.shape", table.shape, "[positions, width] with a row for each position of the cache")
        _check(table.file in manifest.files, f"{where}.file", table.file, "listed in 'files'")
        size = manifest.files[table.file].bytes
        start, end = table.offset, table.offset + math.prod(table.shape) * DTYPES[table.dtype].nbytes
        _check(0 <= start < end <= size, f"{where}.offset", start, "within the file")
    lengths = [graph.tokens for graph in static.prefill]
    rising = bool(lengths) and lengths[0] >= 1 and all(a < b for a, b in itertools.pairwise(lengths))
    _check(
        rising and lengths[-1] <= static.capacity, f"{key}.prefill", lengths, "ascending lengths within the capacity"
    )
    _check(static.decode.tokens == 1, f"{key}.decode.tokens", static.decode.tokens, "1")
    for where, graph in (
        *((f"{key}.prefill[{index}]", graph) for index, graph in enumerate(static.prefill)),
        (f"{key}.decode", static.decode),
        (f"{key}.score", static.score),
    ):
        _check_static_graph(manifest, where, graph)


def _check_static_graph(manifest: Manifest, key: str, graph: StaticGraph) -> None:
    static, layers = manifest.static, manifest.kv_cache.layers
    _check(static is not None and 1 <= graph.tokens <= static.capacity, f"{key}.tokens", graph.tokens, "a length")
    made: set[str] = set()
    fed: set[str] = set()
    _check(bool(graph.parts), f"{key}.parts", graph.parts, "at least one graph")
    for index, part in enumerate(graph.parts):
        where = f"{key}.parts[{index}]"
        _check(part.file in manifest.files, f"{where}.file", part.file, "listed in 'files'")
        _check(part.session_of is None, f"{where}.session_of", part.session_of, "null")
        for tensor in (*part.inputs, *part.outputs):
            _check_one_of(tensor.dtype, f"{where}.{tensor.name}.dtype", DTYPES)
            numbers = all(isinstance(size, int) and size >= 1 for size in tensor.shape) and bool(tensor.shape)
            _check(numbers, f"{where}.{tensor.name}.shape", tensor.shape, "numbers above 0")
        fed |= {tensor.name for tensor in part.inputs} - made
        made |= {tensor.name for tensor in part.outputs}
    past = {past for layer in layers for past, _, _ in layer.buffers}
    present = {present for layer in layers for _, present, _ in layer.buffers}
    tables = set() if static is None else {table.input for table in static.tables}
    masks = set() if static is None else set(static.masks)
    unknown = fed - past - tables - masks - STATIC_INPUTS
    wanted = past | {INPUT_IDS}
    _check(not unknown and wanted <= fed, f"{key}.inputs", sorted(unknown or wanted - fed), "the contract's names")
    wanted = present | {LOGITS}
    _check(wanted <= made, f"{key}.outputs", sorted(wanted - made), "the contract's names and those of kv_cache")


def _check_one_of(value: str, key: str, known: Iterable[str]) -> None:
    _check(value in known, key, value, f"one of {', '.join(known)}")


def _check(condition: bool, key: str, value: object, expected: str) -> None:
    if not condition:
        raise StrictJsonError(f"'{key}' must be {expected}, found {str(value)[:60]!r}")


def check_limits(manifest: Manifest) -> None:
    """Compare a manifest with `LIMITS`. Raises StrictJsonError with the key, the value and the limit."""
    model, cache, tokenizer = manifest.model, manifest.kv_cache, manifest.tokenizer
    _limit("model.vocab_size", model.vocab_size)
    if manifest.embeddings is not None:
        _limit("embeddings.size", manifest.embeddings.size)
    _limit("model.max_context", model.max_context)
    _limit("model.parameters", model.parameters)
    _limit("model.eos_token_ids", len(model.eos_token_ids))
    _limit("kv_cache.layers", len(cache.layers))
    for layer in cache.layers:
        for size in (layer.kv_heads, layer.key_dim, layer.value_dim):
            _limit("kv_cache sizes", size)
    _limit("states", len(manifest.states))
    for state in manifest.states:
        _limit("dimensions of a tensor", len(state.shape))
    _limit("numbers in states", sum(math.prod(state.shape) for state in manifest.states))
    _limit("layers", len(manifest.layers))
    for files in (manifest.files, {} if manifest.specialized is None else manifest.specialized.files):
        _limit("files", len(files))
        for record in files.values():
            _limit("bytes of a file", record.bytes)
    for graph in _graphs(manifest):
        for side in (graph.inputs, graph.outputs):
            _limit("graph inputs or outputs", len(side))
            for tensor in side:
                _limit("dimensions of a tensor", len(tensor.shape))
    _limit("adapters", len(manifest.adapters))
    for adapter in manifest.adapters:
        _limit("graph inputs or outputs", len(adapter.inputs))
        for tensor in adapter.inputs:
            _limit("dimensions of a tensor", len(tensor.shape))
    if tokenizer is not None:
        _limit("tokenizer.corpus", len(tokenizer.corpus))
        _limit("tokenizer.added", len(tokenizer.added))
        for entry in tokenizer.corpus:
            _limit("characters of a corpus text", len(entry.text))
    if manifest.certificate is not None:
        _limit("certificate.prompts", len(manifest.certificate.prompts))


def _graphs(manifest: Manifest) -> Iterator[GraphSpec]:
    if manifest.graphs is not None:
        yield from vars(manifest.graphs).values()
    if manifest.embeddings is not None:
        yield manifest.embeddings.graph
    _limit("variants", len(manifest.variants))
    yield from (variant.graph for variant in manifest.variants)
    if manifest.static is not None:
        static = manifest.static
        parts = [part for graph in (*static.prefill, static.decode, static.score) for part in graph.parts]
        _limit("static graphs", len(parts))
        yield from parts


def _limit(key: str, found: int) -> None:
    if found > LIMITS[key].most:
        raise StrictJsonError(f"{key}: {found:,} exceeds the limit of {LIMITS[key].most:,}")
