"""Size limits for the parts of a bundle: far above any real model, far below what exhausts a machine."""

from __future__ import annotations

from dataclasses import dataclass

from satchel.runtime.bundle.strict_json import DEEPEST

MIB = 1 << 20


@dataclass(frozen=True)
class Limit:
    """An upper limit and its reason."""

    most: int
    reason: str


LIMITS: dict[str, Limit] = {
    "manifest.json bytes": Limit(64 * MIB, "it is parsed as a whole, which takes ten times as much memory"),
    "manifest.json nesting": Limit(DEEPEST, "JSON parsers recurse; a manifest is nested 7 deep"),
    "signature.json bytes": Limit(4096, "it is read as a whole, before its author is known"),
    "model.sig bytes": Limit(1 << 20, "the same; it lists every file"),
    "OCI manifest bytes": Limit(64 * MIB, "index and manifest of a layout are parsed as a whole"),
    "files": Limit(100_000, "each is looked up and opened"),
    "bytes of a file name": Limit(1024, "file systems allow 255 bytes per component"),
    "bytes of a file": Limit(1 << 50, "sizes are summed and compared with free space"),
    "kv_cache.layers": Limit(10_000, "each has two buffers, and two inputs in each graph"),
    "kv_cache sizes": Limit(1 << 20, "heads x width x positions is allocated"),
    "states": Limit(20_000, "each is a buffer, and an input in each graph"),
    "numbers in states": Limit(1 << 30, "they are set to zero for each sequence"),
    "variants": Limit(1000, "each is a graph, and their names must differ"),
    "adapters": Limit(10_000, "each is a file that is read as a whole"),
    "layers": Limit(1_000_000, "one for each quantized matrix"),
    "graph inputs or outputs": Limit(50_000, "two for each cache layer, and a few more"),
    "dimensions of a tensor": Limit(16, "ONNX Runtime's kernels support fewer"),
    "static graphs": Limit(10_000, "each part is a session"),
    "model.vocab_size": Limit(1 << 24, "a row of logits is allocated for each sequence"),
    "model.max_context": Limit(1 << 27, "a cache of as many positions can be requested"),
    "embeddings.size": Limit(1 << 20, "a row of numbers is allocated for each token of a run"),
    "model.parameters": Limit(1 << 50, "figures are computed from it"),
    "model.eos_token_ids": Limit(10_000, "each token is looked up among them"),
    "tokenizer.corpus": Limit(10_000, "each text is encoded when the tokenizer is opened"),
    "tokenizer.added": Limit(100_000, "one pattern looks for all of them"),
    "characters of a corpus text": Limit(1_000_000, "each text is encoded when the tokenizer is opened"),
    "certificate.prompts": Limit(10_000, "each is replayed by `satchel verify`"),
    "packed entries": Limit(110_000, "the files and the runner's modules"),
    "packed directory bytes": Limit(64 * MIB, "it is read as a whole"),
    "graph bytes": Limit((1 << 31) - 1, "the limit of protobuf; weights are external"),
}
