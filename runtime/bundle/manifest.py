"""The manifest of a bundle, manifest.json, as dataclasses: all that a runner needs to know. Standard library only."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from satchel.runtime.bundle import strict_json
from satchel.runtime.bundle.certificate import Certificate
from satchel.runtime.bundle.checks import check_limits, check_manifest
from satchel.runtime.bundle.contract import ATTENTION_MASK, CAPACITY, EMBED
from satchel.runtime.bundle.digest import (
    FORMAT,
    VERSION,
    check_digest,
    check_version,
    manifest_digest,
    parse_manifest,
    read_content,
)
from satchel.runtime.bundle.errors import BundleError
from satchel.runtime.bundle.graph_specs import Graphs, GraphSpec, PlainGraphs, StaticGraphs, TensorSpec, Variant
from satchel.runtime.bundle.ranks import RankSpec
from satchel.runtime.bundle.states import StateSpec

MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class Source:
    """The exported checkpoint: its kind, its file or folder name, and its `model_type`."""

    kind: str
    name: str
    model_type: str


@dataclass(frozen=True)
class NamedFile:
    """A file outside the bundle: its name without the folder, and its SHA-256 (64 lower-case hex digits)."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Provenance:
    """The inputs, options and machine of an export: everything that determines the bytes of a bundle.

    `options` are the export options by their Python names, opaque to the runner; a file is given by its name and
    SHA-256. `source` lists the files that were read from the checkpoint, none for a module passed in Python.
    `processor` is the architecture and the extensions that affect kernels, `threads` the number of threads that shared
    each sum.
    """

    options: dict[str, Any]
    source: dict[str, FileRecord]
    processor: tuple[str, ...]
    threads: int


@dataclass(frozen=True)
class ModelFacts:
    """Sizes and special token ids of the model. `max_context` is in positions, `vocab_size` is the logits' width.

    `rotary_border` is the number of tokens up to which a text has the first of two blocks of rotary angles, if longer
    ones have others; None if there is one block.
    """

    parameters: int
    vocab_size: int
    max_context: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    rotary_border: int | None = None

    def is_long(self, length: int) -> bool:
        """Whether a text of `length` tokens has the second block of rotary angles."""
        return self.rotary_border is not None and length > self.rotary_border


@dataclass(frozen=True)
class CacheLayer:
    """One layer's key and value buffers, [batch, kv_heads, capacity, key_dim or value_dim], and their tensor names.

    A layer of latent attention has no values of its own, as they are the first channels of its keys: `value_dim` is 0,
    and the names of values are None.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    past_key: str
    past_value: str | None
    present_key: str
    present_value: str | None

    @property
    def buffers(self) -> tuple[tuple[str, str, int], ...]:
        """(graph input, graph output, width) of each buffer."""
        keys = (self.past_key, self.present_key, self.key_dim)
        if self.past_value is None or self.present_value is None:
            return (keys,)
        return keys, (self.past_value, self.present_value, self.value_dim)


@dataclass(frozen=True)
class CacheSpec:
    """The KV cache.

    In mode "shared", one buffer is bound as both past and present, and the graph writes in place. In mode "swapped",
    the cache is double-buffered: past and present are two buffers that are swapped after each step.
    """

    mode: str
    dtype: str
    layers: tuple[CacheLayer, ...]


@dataclass(frozen=True)
class Embeddings:
    """How texts become vectors: the graph that gives hidden states, their `size`, and one of `POOLINGS`."""

    pooling: str
    size: int
    graph: GraphSpec


@dataclass(frozen=True)
class LayerPrecision:
    """The quantization of one linear layer: its weights, and its activations in each phase.

    `bits` is 8 or 4. `block` is the group size, the number of inputs that share a scale; None for per-channel scales.
    `symmetric` is False if there are zero points. Activations are "float", or int8 with a scale per "token" or
    "tensor".
    """

    bits: int
    block: int | None
    symmetric: bool
    prefill_activations: str
    decode_activations: str


@dataclass(frozen=True)
class CorpusEntry:
    """A text and its token ids, special tokens included, from the checkpoint's own tokenizer at export."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class AddedToken:
    """A text that always becomes one token, before a SentencePiece model sees the rest.

    The whitespace to the left of it (`lstrip`), or to the right (`rstrip`), belongs to it. When it is decoded, a
    `special` token has no text.
    """

    id: int
    content: str
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False


@dataclass(frozen=True)
class TokenizerSpec:
    """The tokenizer's kind and file.

    What follows is for "sentencepiece"; a tokenizer.json holds its added tokens, and adds special tokens itself.
    `add_bos` says whether BOS is prepended to a text: `bos_id`, or the model's own for None. `eos_id` is appended,
    unless it is None. `added` are tokens beside those of the model.
    """

    kind: str
    file: str
    add_bos: bool
    corpus: tuple[CorpusEntry, ...]
    bos_id: int | None = None
    eos_id: int | None = None
    added: tuple[AddedToken, ...] = ()


@dataclass(frozen=True)
class FileRecord:
    """The size in bytes and the SHA-256 (64 lower-case hex digits) of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class AdapterSpec:
    """An adapter that a request may choose: its name, its file in ONNX Runtime's adapter format, and what is in it.

    `inputs` are optional inputs of all graphs, with the shapes that this adapter has for them. Inputs that it does not
    have keep the default that is in the graph, which has no effect.
    """

    name: str
    file: str
    inputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class PreparedGraph:
    """A graph optimized for one kind of machine: its file, and its variant, None for the portable graph."""

    file: str
    variant: str | None


@dataclass(frozen=True)
class RunAhead:
    """A run of decode over a token and `drafted` further ones of its sequence, whose logits are those of single steps.

    It took the time of so many single `steps`.
    """

    drafted: int
    steps: float


@dataclass(frozen=True)
class Specialized:
    """Graphs and packed weights that `satchel specialize` made for one kind of machine.

    They can be used if `onnxruntime` (a version), `provider` and `features` (the processor's architecture and
    extensions) are the same; `processor` is its display name. `graphs` has the graphs of prefill and decode, or only
    that of prefill if its session runs decode too. `tiled_attention` says which of ONNX Runtime's two attention kernels
    was faster. `files` lists all files. `runs_ahead` are those that were tried and gave the same bits.
    """

    onnxruntime: str
    provider: str
    processor: str
    features: tuple[str, ...]
    tiled_attention: bool
    graphs: dict[str, PreparedGraph]
    files: dict[str, FileRecord]
    runs_ahead: tuple[RunAhead, ...] = ()

    def variant(self, phase: str) -> str | None:
        """The name of the variant that runs prefill or decode, None for the portable graph."""
        return self.graphs.get(phase, self.graphs["prefill"]).variant

    @property
    def bytes(self) -> int:
        """The total size of all files."""
        return sum(record.bytes for record in self.files.values())

    @property
    def variants(self) -> tuple[str, ...]:
        """The names of the variants in use, that of prefill first."""
        names = (graph.variant for graph in self.graphs.values())
        return tuple(dict.fromkeys(name for name in names if name is not None))


@dataclass(frozen=True)
class Manifest:
    """The whole manifest. `files` lists every file except manifest.json; `passes` is opaque to the runner.

    `recipe` is the name of the quantization recipe, None if nothing is quantized. `layers` lists every layer with
    quantized weights; other weights are in `float_weights`, a dtype. Prompts are split only at multiples of
    `token_multiple`: some kernels process tokens in groups of that size and round an incomplete group differently.
    A bundle has either `graphs`, with dynamic shapes, or `static` ones. `variants` are alternatives to `graphs`.
    `plain` is for a bundle with custom passes: its graphs without them. `custom_ops` are the libraries whose operators
    the graphs need; those of `plain` need none.
    `certificate` is None for a bundle without one, and `specialized` for a bundle with portable graphs only.
    `states` are those of layers with a convolution or a recurrence, none in models that only attend.
    `adapters` are those that requests may choose; without any, as in the certificate, the graphs are the base model.
    `embeddings` is None for a bundle that was not exported for them, `rank` for one that is a whole model.
    """

    producer: dict[str, str]
    source: Source
    provenance: Provenance | None
    target: str
    precision: str
    recipe: str | None
    model: ModelFacts
    kv_cache: CacheSpec
    graphs: Graphs | None
    variants: tuple[Variant, ...]
    static: StaticGraphs | None
    plain: PlainGraphs | None
    custom_ops: tuple[NamedFile, ...]
    float_weights: str
    layers: dict[str, LayerPrecision]
    token_multiple: int
    tokenizer: TokenizerSpec | None
    passes: tuple[dict[str, Any], ...]
    files: dict[str, FileRecord]
    certificate: Certificate | None
    specialized: Specialized | None
    states: tuple[StateSpec, ...] = ()
    adapters: tuple[AdapterSpec, ...] = ()
    embeddings: Embeddings | None = None
    rank: RankSpec | None = None

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read and check a manifest file. Raises BundleError, which names the file, the key and the remedy."""
        document = parse_manifest(read_content(path, str(path)), str(path))
        check_digest(document, str(path))
        return cls.from_json(document, str(path))

    @classmethod
    def from_json(cls, document: Any, name: str = MANIFEST_NAME) -> Manifest:
        """Build a manifest from parsed JSON and check it; `name` is the file in messages. Raises BundleError."""
        document = check_version(document, name)
        fields = {key: value for key, value in document.items() if key not in ("format", "version", "digest")}
        try:
            manifest: Manifest = strict_json.from_json(cls, fields)
            check_limits(manifest)
            check_manifest(manifest)
        except strict_json.StrictJsonError as error:
            raise BundleError(f"{name}: {error}: export the bundle again with this satchel") from None
        return manifest

    def to_json(self) -> dict[str, Any]:
        """The manifest as plain JSON values, with its digest; `from_json` of it gives an equal manifest."""
        body: dict[str, Any] = strict_json.to_json(self)
        document = {"format": FORMAT, "version": VERSION, "digest": None, **body}
        return {**document, "digest": manifest_digest(document)}

    @property
    def state_bytes(self) -> int:
        """The size of all states of one sequence in bytes, which does not grow with its length."""
        return sum(state.nbytes for state in self.states)

    @property
    def has_fixed_mask(self) -> bool:
        """Whether the decode graph takes an attention mask over the whole cache, so that its shapes never change."""
        inputs = () if self.graphs is None else self.graphs.decode.inputs
        return any(tensor.name == ATTENTION_MASK and tensor.shape[-1:] == (CAPACITY,) for tensor in inputs)

    def graph(self, name: str) -> GraphSpec:
        """The graph of a phase, or of the variant with this name. Raises BundleError if there is none."""
        if name == EMBED:
            if self.embeddings is None:
                raise BundleError("this bundle has no graph for embeddings: export it with --embeddings mean or last")
            return self.embeddings.graph
        if self.graphs is None:
            raise BundleError(f"this bundle has static graphs for {self.target}, and no dynamic {name} graph")
        found: GraphSpec | None = getattr(self.graphs, name, None)
        return self.variant(name).graph if found is None else found

    def cache_of(self, name: str) -> CacheSpec:
        """The KV cache of a graph, by its phase or variant, whose type is that of the graph's inputs."""
        types = {tensor.name: tensor.dtype for tensor in self.graph(name).inputs}
        found = {types[past] for layer in self.kv_cache.layers for past, _, _ in layer.buffers}
        return dataclasses.replace(self.kv_cache, dtype=found.pop()) if found else self.kv_cache

    def variant(self, name: str) -> Variant:
        """The variant with this name. Raises BundleError if there is none."""
        found = next((variant for variant in self.variants if variant.name == name), None)
        if found is None:
            others = ", ".join(variant.name for variant in self.variants) or "none"
            raise BundleError(f"this bundle has no graph {name}; its variants: {others}")
        return found
