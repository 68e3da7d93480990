"""manifest.json: everything that the runner knows about a bundle, as data. Standard library only."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from satchel.runtime import strict_json
from satchel.runtime.certificate import Certificate, check_values
from satchel.runtime.errors import BundleError
from satchel.runtime.integrity.digest import manifest_digest
from satchel.runtime.integrity.manifest_limits import check_limits
from satchel.runtime.integrity.manifest_text import check_digest, parse_document, read_bytes
from satchel.runtime.manifest_versions import upgraded

MANIFEST_NAME = "manifest.json"
PHASES = ("prefill", "decode", "score")
FURTHER = {"prefill_int8": "its products are not in 4 bits", "decode_blocks": "its decode takes no int8 activations"}
"""Graphs that not every bundle has, and why one has them not."""

CACHE_MODES = ("shared", "swapped")
DTYPE_BYTES = {"float32": 4, "float16": 2, "int64": 8, "int32": 4, "int8": 1, "uint8": 1, "bool": 1}
DTYPES = tuple(DTYPE_BYTES)

STATIC_INPUTS = frozenset({"input_ids", "cache_rows", "cache_index", "last_token"})
"""What a static graph may take besides caches, masks and rows of tables. `input_ids` [1, tokens] int64, padded with any
id; `cache_rows` [1, 1, capacity, 1] bool, the positions that the new tokens are written to; `cache_index` [capacity]
int64, which new token goes there, any elsewhere (where tokens > 1); `last_token` [1] int64, the index of the last token
that is no padding (where tokens > 1 and only its logits are wanted)."""

TOP_IDS, TOP_LOGITS = TOP_OUTPUTS = ("top_ids", "top_logits")
"""What a graph may give beside its logits, both or neither: its most likely tokens, the most likely first, as ids int64
and logits float32, both [batch, 1, k]."""

FULL_MASK = "capacity"
"""The length of an `attention_mask` that covers the whole cache, with ones for the tokens that are there and zeros
behind them; any other name stands for a mask that ends with the last token."""

TOKENIZER_KINDS = ("tokenizer.json", "sentencepiece")


@dataclass(frozen=True)
class Source:
    """What the bundle was made from: the kind of checkpoint, its file or folder name, and its `model_type`."""

    kind: str
    name: str
    model_type: str


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
    """The three graphs over one set of weights: the prompt, each further token, and all positions' logits.

    Two more read weights that no bundle holds, and that `satchel specialize` makes. `prefill_int8` is prefill over int8
    weights made of those in 4 bits; None where a bundle has no products in 4 bits. `decode_blocks` is decode over the
    same int8 numbers in blocks of inputs; None where decode takes no activations in int8.
    """

    prefill: GraphSpec
    decode: GraphSpec
    score: GraphSpec
    prefill_int8: GraphSpec | None
    decode_blocks: GraphSpec | None


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
    """The size in bytes and the SHA-256 (64 lower-case hex digits) of one file of the bundle."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Specialized:
    """Graphs and packed weights that `satchel specialize` made for one kind of machine.

    They fit where `onnxruntime` (a version), `provider` and `features` (architecture and extensions of the processor)
    are the same; `processor` is its name, for people. `int8_prefill` tells that prefill runs over int8 weights made of
    those in 4 bits, `decode_blocks` that decode runs over int8 weights in blocks, and `tiled_attention` which of two
    attention kernels was faster. `graphs` are file names by phase, of prefill alone where its session runs decode, too;
    `files` lists all files.
    """

    onnxruntime: str
    provider: str
    processor: str
    features: tuple[str, ...]
    int8_prefill: bool
    decode_blocks: bool
    tiled_attention: bool
    graphs: dict[str, str]
    files: dict[str, FileRecord]


@dataclass(frozen=True)
class Manifest:
    """The whole manifest. `files` lists every file but manifest.json; `passes` is opaque to the runner.

    `recipe` is the name of the recipe that quantised it, None where nothing is quantised.
    `layers` names every layer whose weights are quantised; all others are in float.
    A bundle has either `graphs`, whose shapes vary, or `static` ones.
    `certificate` is None for a bundle that nobody certified, `specialized` for one that runs its portable graphs only.
    """

    FORMAT: ClassVar[str] = "satchel-bundle"
    VERSION: ClassVar[int] = 2

    producer: dict[str, str]
    source: Source
    target: str
    precision: str
    recipe: str | None
    model: ModelFacts
    kv_cache: CacheSpec
    graphs: Graphs | None
    static: StaticGraphs | None
    layers: dict[str, LayerPrecision]
    tokenizer: TokenizerSpec | None
    passes: tuple[dict[str, Any], ...]
    files: dict[str, FileRecord]
    certificate: Certificate | None
    specialized: Specialized | None

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read and check a manifest file. Raises BundleError naming the file, the key and what to do."""
        document = parse_document(read_bytes(path), str(path))
        check_digest(document, cls.VERSION, str(path))
        return cls.from_json(document, str(path))

    @classmethod
    def from_json(cls, document: Any, name: str = MANIFEST_NAME) -> Manifest:
        """Check a parsed manifest and build it; `name` is the file that messages name. Raises BundleError."""
        if not isinstance(document, dict) or document.get("format") != cls.FORMAT:
            raise BundleError(f"{name}: not a satchel manifest ('format' is not '{cls.FORMAT}'): give a satchel bundle")
        document = upgraded(document, cls.VERSION, name)
        fields = {key: value for key, value in document.items() if key not in ("format", "version", "digest")}
        try:
            manifest: Manifest = strict_json.from_json(cls, fields)
            check_limits(manifest)
            _check_values(manifest)
        except strict_json.StrictJsonError as error:
            raise BundleError(f"{name}: {error}: export the bundle again with this satchel") from None
        return manifest

    def to_json(self) -> dict[str, Any]:
        """The manifest as plain JSON values, with its digest; `from_json` of it gives an equal manifest."""
        body: dict[str, Any] = strict_json.to_json(self)
        document = {"format": self.FORMAT, "version": self.VERSION, "digest": None, **body}
        return {**document, "digest": manifest_digest(document)}

    @property
    def has_fixed_mask(self) -> bool:
        """Whether the decode graph takes a mask of the cache's whole length, so that its shapes never change."""
        inputs = () if self.graphs is None else self.graphs.decode.inputs
        return any(tensor.name == "attention_mask" and tensor.shape[-1:] == (FULL_MASK,) for tensor in inputs)

    def graph(self, phase: str) -> GraphSpec:
        """The graph of a phase, or one of `FURTHER`. Raises BundleError where there is none."""
        if self.graphs is None:
            raise BundleError(f"this bundle has static graphs for {self.target}, and none for {phase} of any length")
        spec: GraphSpec | None = getattr(self.graphs, phase)
        if spec is None:
            raise BundleError(f"this bundle has no graph for {phase}: {FURTHER[phase]}")
        return spec


def _check_values(manifest: Manifest) -> None:
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
    if manifest.certificate:
        check_values(manifest.certificate, model.vocab_size, model.max_context)
    if manifest.specialized:
        specialized = manifest.specialized
        _check_files(specialized.files, "specialized.files")
        known = set(specialized.graphs) in ({"prefill"}, {"prefill", "decode"})
        _check(known, "specialized.graphs", sorted(specialized.graphs), "files of prefill, or of prefill and decode")
        for phase, file in specialized.graphs.items():
            _check(file in specialized.files, f"specialized.graphs.{phase}", file, "listed in 'specialized.files'")


def _check_files(files: dict[str, FileRecord], key: str) -> None:
    for name, record in files.items():
        _check(record.bytes >= 0, f"{key}.{name}.bytes", record.bytes, "a size")
        well_formed = len(record.sha256) == 64 and set(record.sha256) <= set("0123456789abcdef")
        _check(well_formed, f"{key}.{name}.sha256", record.sha256, "64 lower-case hex digits")


def _check_graph(manifest: Manifest, phase: str) -> None:
    graph, key = manifest.graph(phase), f"graphs.{phase}"
    _check(graph.file in manifest.files, f"{key}.file", graph.file, "listed in 'files'")
    for side, tensors in (("inputs", graph.inputs), ("outputs", graph.outputs)):
        for index, tensor in enumerate(tensors):
            _check_one_of(tensor.dtype, f"{key}.{side}[{index}].dtype", DTYPES)
    shareable = (None, "prefill") if phase == "decode" else (None,)
    _check(graph.session_of in shareable, f"{key}.session_of", graph.session_of, f"one of {shareable}")
    layers = manifest.kv_cache.layers
    wanted = {"input_ids", "attention_mask", *(name for layer in layers for name in (layer.past_key, layer.past_value))}
    found = {tensor.name for tensor in graph.inputs}
    _check(found == wanted, f"{key}.inputs", sorted(found ^ wanted), "the contract's names and those of kv_cache")
    wanted = {"logits", *(name for layer in layers for name in (layer.present_key, layer.present_value))}
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
        start, end = table.offset, table.offset + math.prod(table.shape) * DTYPE_BYTES[table.dtype]
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
    wanted = past | {"input_ids"}
    _check(not unknown and wanted <= fed, f"{key}.inputs", sorted(unknown or wanted - fed), "the contract's names")
    wanted = present | {"logits"}
    _check(wanted <= made, f"{key}.outputs", sorted(wanted - made), "the contract's names and those of kv_cache")


def _check_one_of(value: str, key: str, known: tuple[str, ...]) -> None:
    _check(value in known, key, value, f"one of {', '.join(known)}")


def _check(condition: bool, key: str, value: object, expected: str) -> None:
    if not condition:
        raise strict_json.StrictJsonError(f"'{key}' must be {expected}, found {str(value)[:60]!r}")
