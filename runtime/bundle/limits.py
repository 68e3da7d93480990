"""How large the parts of a bundle may be: one table. Far above any real model, far below what takes a machine down."""

from __future__ import annotations

from dataclasses import dataclass

from satchel.runtime.bundle.strict_json import DEEPEST

MIB = 1 << 20


@dataclass(frozen=True)
class Limit:
    """The most that there may be of something, and why there must be a most."""

    most: int
    reason: str


LIMITS: dict[str, Limit] = {
    "manifest.json bytes": Limit(64 * MIB, "it is read and parsed whole; parsed, it takes ten times as much memory"),
    "manifest.json nesting": Limit(DEEPEST, "readers of JSON recurse; a manifest nests 7 deep"),
    "signature.json bytes": Limit(4096, "it is read whole, before anything is known of who wrote it"),
    "files": Limit(100_000, "each is looked up and opened"),
    "bytes of a file name": Limit(1024, "file systems take 255 bytes for each part"),
    "bytes of a file": Limit(1 << 50, "sizes are added up, and compared with free space"),
    "kv_cache.layers": Limit(10_000, "each is two buffers, and two inputs of each graph"),
    "kv_cache sizes": Limit(1 << 20, "heads x width x positions is allocated"),
    "variants": Limit(1000, "each is a graph, and names are compared with each other"),
    "layers": Limit(1_000_000, "an entry for each quantized matrix"),
    "graph inputs or outputs": Limit(50_000, "two for each layer of the cache, and few more"),
    "dimensions of a tensor": Limit(16, "ONNX Runtime's own kernels take fewer"),
    "static graphs": Limit(10_000, "parts are sessions"),
    "model.vocab_size": Limit(1 << 24, "a row of logits is allocated for each sequence"),
    "model.max_context": Limit(1 << 27, "a cache of that many positions can be asked for"),
    "model.parameters": Limit(1 << 50, "figures are computed from it"),
    "model.eos_token_ids": Limit(10_000, "each token is looked up among them"),
    "tokenizer.corpus": Limit(10_000, "each text is encoded when the tokenizer is opened"),
    "characters of a corpus text": Limit(1_000_000, "the same"),
    "certificate.prompts": Limit(10_000, "each is replayed by `satchel verify`"),
    "packed entries": Limit(110_000, "the files, and the runner's own modules"),
    "packed directory bytes": Limit(64 * MIB, "it is read whole"),
    "graph bytes": Limit((1 << 31) - 1, "protobuf reads no more; weights lie outside"),
}
