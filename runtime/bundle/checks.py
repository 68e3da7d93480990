"""What must be true of a manifest beyond its keys and types: names, sizes and counts that fit together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from satchel.runtime.bundle.certificate import check_values
from satchel.runtime.bundle.contract import (
    ATTENTION_MASK,
    CACHE_MODES,
    FURTHER,
    INPUT_IDS,
    LOGITS,
    PHASES,
    STATIC_INPUTS,
    TOKENIZER_KINDS,
    TOP_IDS,
    TOP_OUTPUTS,
)
from satchel.runtime.bundle.dtypes import DTYPES
from satchel.runtime.bundle.strict_json import StrictJsonError

if TYPE_CHECKING:
    from satchel.runtime.bundle.manifest import FileRecord, Manifest, StaticGraph, StaticGraphs, TensorSpec


def check_manifest(manifest: Manifest) -> None:
    """Check that names, sizes and counts of a manifest fit together. Raises StrictJsonError, which names the key."""
    model, cache, tokenizer = manifest.model, manifest.kv_cache, manifest.tokenizer
    for field in ("parameters", "vocab_size", "max_context"):
        _check(getattr(model, field) > 0, f"model.{field}", getattr(model, field), "a number above 0")
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
            _check(size > 0, f"kv_cache.layers[{index}].{field}", size, "a number above 0")
    _check((manifest.graphs is None) != (manifest.static is None), "static", manifest.static, "there without 'graphs'")
    if manifest.static is not None:
        _check_static(manifest, manifest.static)
    else:
        for phase in (*PHASES, *(name for name in FURTHER if getattr(manifest.graphs, name))):
            _check_graph(manifest, phase)
        chosen = [manifest.graph(phase).top_tokens for phase in ("prefill", "decode")]
        _check(chosen[0] == chosen[1], "graphs.decode.outputs", chosen, "as many best tokens as prefill gives")
    if tokenizer:
        _check_one_of(tokenizer.kind, "tokenizer.kind", TOKENIZER_KINDS)
        _check(tokenizer.file in manifest.files, "tokenizer.file", tokenizer.file, "listed in 'files'")
    _check_files(manifest.files, "files")
    for index, library in enumerate(manifest.custom_ops):
        _check_sha256(library.sha256, f"custom_ops[{index}].sha256")
    if manifest.plain is not None:
        check_manifest(manifest.without_custom())
    if manifest.certificate:
        check_values(manifest.certificate, model.vocab_size, model.max_context)
    if manifest.specialized:
        specialized = manifest.specialized
        _check_files(specialized.files, "specialized.files")
        known = set(specialized.graphs) in ({"prefill"}, {"prefill", "decode"})
        _check(known, "specialized.graphs", sorted(specialized.graphs), "files of prefill, or of prefill and decode")
        fits = not specialized.native or (set(specialized.graphs) == {"prefill"} and specialized.kernels is not None)
        _check(fits, "specialized.native", specialized.native, "of one graph, with the version of the kernels")
        for phase, file in specialized.graphs.items():
            _check(file in specialized.files, f"specialized.graphs.{phase}", file, "listed in 'specialized.files'")


def _check_files(files: dict[str, FileRecord], key: str) -> None:
    for name, record in files.items():
        _check(record.bytes >= 0, f"{key}.{name}.bytes", record.bytes, "a size")
        _check_sha256(record.sha256, f"{key}.{name}.sha256")


def _check_sha256(digest: str, key: str) -> None:
    well_formed = len(digest) == 64 and set(digest) <= set("0123456789abcdef")
    _check(well_formed, key, digest, "64 lower-case hex digits")


def _check_graph(manifest: Manifest, phase: str) -> None:
    graph, key = manifest.graph(phase), f"graphs.{phase}"
    _check(graph.file in manifest.files, f"{key}.file", graph.file, "listed in 'files'")
    for side, tensors in (("inputs", graph.inputs), ("outputs", graph.outputs)):
        for index, tensor in enumerate(tensors):
            _check_one_of(tensor.dtype, f"{key}.{side}[{index}].dtype", DTYPES)
    shareable = (None, "prefill") if phase == "decode" else (None,)
    _check(graph.session_of in shareable, f"{key}.session_of", graph.session_of, f"one of {shareable}")
    layers = manifest.kv_cache.layers
    wanted = {INPUT_IDS, ATTENTION_MASK, *(name for layer in layers for name in (layer.past_key, layer.past_value))}
    found = {tensor.name for tensor in graph.inputs}
    _check(found == wanted, f"{key}.inputs", sorted(found ^ wanted), "the contract's names and those of kv_cache")
    wanted = {LOGITS, *(name for layer in layers for name in (layer.present_key, layer.present_value))}
    chosen = [tensor for tensor in graph.outputs if tensor.name in TOP_OUTPUTS]
    found = {tensor.name for tensor in graph.outputs if tensor not in chosen}
    _check(found == wanted, f"{key}.outputs", sorted(found ^ wanted), "the contract's names and those of kv_cache")
    if chosen:
        _check_chosen(f"{key}.outputs", phase, chosen, manifest.model.vocab_size)


def _check_chosen(key: str, phase: str, chosen: list[TensorSpec], vocabulary: int) -> None:
    """Both outputs, for the one token that a graph gives logits of, of one number of tokens and the right types."""
    names = sorted(tensor.name for tensor in chosen)
    _check(names == sorted(TOP_OUTPUTS) and phase in ("prefill", "decode"), key, names, "both of them, or neither")
    for tensor in chosen:
        dtype, count = "int64" if tensor.name == TOP_IDS else "float32", tensor.shape[-1]
        _check(tensor.dtype == dtype, f"{key}.{tensor.name}.dtype", tensor.dtype, dtype)
        fits = len(tensor.shape) == 3 and tensor.shape[1] == 1 and isinstance(count, int) and 1 <= count <= vocabulary
        _check(fits, f"{key}.{tensor.name}.shape", tensor.shape, "[batch, 1, a number of tokens]")
    _check(chosen[0].shape == chosen[1].shape, key, [tensor.shape for tensor in chosen], "of one shape")


def _check_static(manifest: Manifest, static: StaticGraphs) -> None:
    key = "static"
    _check(static.capacity == manifest.model.max_context, f"{key}.capacity", static.capacity, "model.max_context")
    for name, window in static.masks.items():
        _check(window >= 0, f"{key}.masks.{name}", window, "a window, or 0 for none")
    for index, table in enumerate(static.tables):
        where = f"{key}.tables[{index}]"
        _check_one_of(table.dtype, f"{where}.dtype", DTYPES)
        fits = len(table.shape) == 2 and table.shape[0] >= static.capacity and table.shape[1] > 0
        _check(fits, f"{where}.shape", table.shape, "[positions, width] with a row for each position of the cache")
        _check(table.file in manifest.files, f"{where}.file", table.file, "listed in 'files'")
        size = manifest.files[table.file].bytes
        start, end = table.offset, table.offset + math.prod(table.shape) * DTYPES[table.dtype].nbytes
        _check(0 <= start < end <= size, f"{where}.offset", start, "within the file")
    lengths = [graph.tokens for graph in static.prefill]
    rising = bool(lengths) and lengths[0] >= 1 and all(a < b for a, b in itertools.pairwise(lengths))
    _check(rising and lengths[-1] <= static.capacity, f"{key}.prefill", lengths, "rising lengths within the capacity")
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
    _check(bool(graph.parts), f"{key}.parts", graph.parts, "one graph at least")
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
    past = {name for layer in layers for name in (layer.past_key, layer.past_value)}
    present = {name for layer in layers for name in (layer.present_key, layer.present_value)}
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
