"""manifest.json: everything that the runner knows about a bundle, as data. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from satchel.runtime.bundle import strict_json
from satchel.runtime.bundle.certificate import Certificate
from satchel.runtime.bundle.checks import check_limits, check_manifest
from satchel.runtime.bundle.contract import ATTENTION_MASK, CAPACITY, TOP_IDS
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

MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class Source:
    """What the bundle was made from: the kind of checkpoint, its file or folder name, and its `model_type`."""

    kind: str
    name: str
    model_type: str


@dataclass(frozen=True)
class NamedFile:
    """A file that is not in the bundle: its name without its folder, and its SHA-256 (64 lower-case hex digits)."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Provenance:
    """What an export read, how it was asked to go about it, and where: all that decides a bundle's bytes.

    `options` are those of the export by their names in Python, opaque to the runner; a file among them is its name and
    SHA-256. `source` has the files of the checkpoint that were read; none for a module that was handed over in Python.
    `processor` is the architecture and the extensions that kernels choose by, `threads` the parts that sums were cut
    into.
    """

    options: dict[str, Any]
    source: dict[str, FileRecord]
    processor: tuple[str, ...]
    threads: int


@dataclass(frozen=True)
class ModelFacts:
    """Counts and special token ids of the model. `max_context` is in positions, `vocab_size` the logits' width."""

    parameters: int
    vocab_size: int
    max_context: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None


@dataclass(frozen=True)
class CacheLayer:
    """One layer's key and value buffers, [batch, kv_heads, capacity, key_dim or value_dim], and their graph names."""

    kv_heads: int
    key_dim: int
    value_dim: int
    past_key: str
    past_value: str
    present_key: str
    present_value: str


@dataclass(frozen=True)
class CacheSpec:
    """The KV cache.

    Mode "shared": one buffer is bound as past and as present, and the graph writes in place. Mode "swapped": past and
    present are two buffers, which change places after each step.
    """

    mode: str
    dtype: str
    layers: tuple[CacheLayer, ...]


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output; each dimension is a size or the name of a dimension that varies."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class GraphSpec:
    """One graph: its file in the bundle, session configuration entries for ONNX Runtime, and its signature.

    `session_of` names the graph whose session runs this phase too, so that weights are in memory once; None means a
    session of its own. The prefill graph takes any number of tokens, and so can run the decode phase.
    """

    file: str
    session: dict[str, str]
    session_of: str | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def top_tokens(self) -> int:
        """How many of the most likely tokens the graph itself chooses, as `TOP_OUTPUTS`; 0 for none."""
        found = [tensor.shape[-1] for tensor in self.outputs if tensor.name == TOP_IDS]
        return found[0] if found and isinstance(found[0], int) else 0


@dataclass(frozen=True)
class Graphs:
    """The three graphs over one set of weights: the prompt, each further token, and all positions' logits."""

    prefill: GraphSpec
    decode: GraphSpec
    score: GraphSpec


@dataclass(frozen=True)
class VariantWeights:
    """The weights of a variant: one of the layouts, and the file that its graph reads them from.

    The bundle does not have that file: `satchel specialize` makes it from the weights of the portable graphs.
    """

    layout: str
    file: str


@dataclass(frozen=True)
class Variant:
    """A graph that computes the same as the portable ones, faster on some machines.

    `runs` are the phases that it can run; one that runs several needs one session for them. `requires` are features of
    the processor (architecture and extensions), `kernel_abi` the version of satchel's own kernels that it is for, None
    for a graph of standard operators.
    """

    name: str
    runs: tuple[str, ...]
    graph: GraphSpec
    weights: VariantWeights
    requires: tuple[str, ...]
    kernel_abi: int | None


@dataclass(frozen=True)
class TableSpec:
    """A static graph's input that has one row for each new token, taken from a table by the token's position.

    The table, such as the cosines of a rotary embedding, is [positions, width] of `dtype` at `offset` of `file`,
    little-endian, row by row; the input `input` is [1, tokens, width].
    """

    input: str
    file: str
    offset: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StaticGraph:
    """A graph for exactly `tokens` new tokens, as parts that run one after the other.

    A part's outputs that are no output of the whole are inputs of later parts, under the same name.
    """

    tokens: int
    parts: tuple[GraphSpec, ...]


@dataclass(frozen=True)
class StaticGraphs:
    """Graphs in which every shape is a number, for devices that compile each shape anew.

    `capacity` is the length of the cache. `masks` are the inputs, by name, that say which positions each new token
    sees, with the window of their layers, 0 for none. `prefill` are graphs for chunks of several lengths, the shortest
    first; `score` gives the logits of all tokens of a chunk.
    """

    capacity: int
    masks: dict[str, int]
    tables: tuple[TableSpec, ...]
    prefill: tuple[StaticGraph, ...]
    decode: StaticGraph
    score: StaticGraph


@dataclass(frozen=True)
class PlainGraphs:
    """The graphs as they are without the passes of a user's own, over the same weights: `graphs` or `static`."""

    graphs: Graphs | None
    static: StaticGraphs | None


@dataclass(frozen=True)
class LayerPrecision:
    """How one layer's weights are stored, and how its product takes its input in each phase.

    `bits` is 8 or 4; `block` the number of inputs that share a scale, None for one scale per output channel;
    `symmetric` is False where there are zero points. Activations are "float", or int8 with a scale per "token" or
    "tensor".
    """

    bits: int
    block: int | None
    symmetric: bool
    prefill_activations: str
    decode_activations: str


@dataclass(frozen=True)
class CorpusEntry:
    """A text and the token ids, special tokens included, that the checkpoint's own tokenizer made of it at export."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class TokenizerSpec:
    """The tokenizer's kind and file. `add_bos` is for "sentencepiece"; tokenizer.json adds its own special tokens."""

    kind: str
    file: str
    add_bos: bool
    corpus: tuple[CorpusEntry, ...]


@dataclass(frozen=True)
class FileRecord:
    """The size in bytes and the SHA-256 (64 lower-case hex digits) of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class PreparedGraph:
    """A graph that is optimized for one kind of machine: its file, and the variant, None for the portable graph."""

    file: str
    variant: str | None


@dataclass(frozen=True)
class Specialized:
    """Graphs and packed weights that `satchel specialize` made for one kind of machine.

    They fit where `onnxruntime` (a version), `provider` and `features` (architecture and extensions of the processor)
    are the same; `processor` is its name, for people. `graphs` has the graph of prefill and that of decode, of prefill
    alone where its session runs decode, too. `tiled_attention` tells which of ONNX Runtime's two attention kernels was
    faster. `files` lists all files.
    """

    onnxruntime: str
    provider: str
    processor: str
    features: tuple[str, ...]
    tiled_attention: bool
    graphs: dict[str, PreparedGraph]
    files: dict[str, FileRecord]

    def variant(self, phase: str) -> str | None:
        """The name of the variant that runs prefill or decode, None for the portable graph."""
        return self.graphs.get(phase, self.graphs["prefill"]).variant

    @property
    def bytes(self) -> int:
        """The size of all files together."""
        return sum(record.bytes for record in self.files.values())

    @property
    def variants(self) -> tuple[str, ...]:
        """The names of the variants in use, that of prefill first."""
        names = (graph.variant for graph in self.graphs.values())
        return tuple(dict.fromkeys(name for name in names if name is not None))


@dataclass(frozen=True)
class Manifest:
    """The whole manifest. `files` lists every file but manifest.json; `passes` is opaque to the runner.

    `recipe` is the name of the recipe that quantized it, None where nothing is quantized.
    `layers` names every layer whose weights are quantized; all others are in `float_weights`, a dtype.
    `token_multiple`: some kernels take the tokens of a prompt in groups of so many and round an incomplete one
    differently, so a prompt is split at multiples of it only.
    A bundle has either `graphs`, whose shapes vary, or `static` ones. `variants` are further graphs for the former.
    `plain` is for a bundle that passes of a user's own had a part in, and `custom_ops` are the libraries whose
    operators its graphs need; those of `plain` need none.
    `certificate` is None for a bundle that nobody certified, `specialized` for one that runs its portable graphs only.
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

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read and check a manifest file. Raises BundleError naming the file, the key and what to do."""
        document = parse_manifest(read_content(path, str(path)), str(path))
        check_digest(document, str(path))
        return cls.from_json(document, str(path))

    @classmethod
    def from_json(cls, document: Any, name: str = MANIFEST_NAME) -> Manifest:
        """Check a parsed manifest and build it; `name` is the file that messages name. Raises BundleError."""
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
    def has_fixed_mask(self) -> bool:
        """Whether the decode graph takes a mask of the cache's whole length, so that its shapes never change."""
        inputs = () if self.graphs is None else self.graphs.decode.inputs
        return any(tensor.name == ATTENTION_MASK and tensor.shape[-1:] == (CAPACITY,) for tensor in inputs)

    def graph(self, name: str) -> GraphSpec:
        """The graph of a phase, or of the variant of this name. Raises BundleError where there is none."""
        if self.graphs is None:
            raise BundleError(f"this bundle has static graphs for {self.target}, and none for {name} of any length")
        found: GraphSpec | None = getattr(self.graphs, name, None)
        return self.variant(name).graph if found is None else found

    def variant(self, name: str) -> Variant:
        """The variant of this name. Raises BundleError where there is none."""
        found = next((variant for variant in self.variants if variant.name == name), None)
        if found is None:
            others = ", ".join(variant.name for variant in self.variants) or "none"
            raise BundleError(f"this bundle has no graph {name}; its variants: {others}")
        return found
