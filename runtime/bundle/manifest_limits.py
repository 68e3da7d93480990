"""Refuses a manifest whose numbers or lists are larger than any model's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from satchel.runtime.bundle.limits import LIMITS
from satchel.runtime.bundle.strict_json import StrictJsonError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from satchel.runtime.bundle.manifest import GraphSpec, Manifest


def check_limits(manifest: Manifest) -> None:
    """Compare a manifest with `LIMITS`. Raises StrictJsonError naming the key, what was found and the most."""
    model, cache, tokenizer = manifest.model, manifest.kv_cache, manifest.tokenizer
    _check("model.vocab_size", model.vocab_size)
    _check("model.max_context", model.max_context)
    _check("model.parameters", model.parameters)
    _check("model.eos_token_ids", len(model.eos_token_ids))
    _check("kv_cache.layers", len(cache.layers))
    for layer in cache.layers:
        for size in (layer.kv_heads, layer.key_dim, layer.value_dim):
            _check("kv_cache sizes", size)
    _check("layers", len(manifest.layers))
    for files in (manifest.files, {} if manifest.specialized is None else manifest.specialized.files):
        _check("files", len(files))
        for record in files.values():
            _check("bytes of a file", record.bytes)
    for graph in _graphs(manifest):
        for side in (graph.inputs, graph.outputs):
            _check("graph inputs or outputs", len(side))
            for tensor in side:
                _check("dimensions of a tensor", len(tensor.shape))
    if tokenizer is not None:
        _check("tokenizer.corpus", len(tokenizer.corpus))
        for entry in tokenizer.corpus:
            _check("characters of a corpus text", len(entry.text))
    if manifest.certificate is not None:
        _check("certificate.prompts", len(manifest.certificate.prompts))


def _graphs(manifest: Manifest) -> Iterator[GraphSpec]:
    if manifest.graphs is not None:
        yield from (graph for graph in vars(manifest.graphs).values() if graph is not None)
    if manifest.static is not None:
        static = manifest.static
        parts = [part for graph in (*static.prefill, static.decode, static.score) for part in graph.parts]
        _check("static graphs", len(parts))
        yield from parts


def _check(key: str, found: int) -> None:
    if found > LIMITS[key].most:
        raise StrictJsonError(f"{key}: {found:,} are more than the {LIMITS[key].most:,} that are allowed")
