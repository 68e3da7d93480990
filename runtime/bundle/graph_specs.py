"""Graphs of a bundle as its manifest describes them: inputs and outputs, variants, and graphs with static shapes."""

from __future__ import annotations

from dataclasses import dataclass

from satchel.runtime.bundle.contract import ROW_OFFSETS, TOP_IDS


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output; each dimension is a size, or a name if it is dynamic."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class GraphSpec:
    """A graph: its file in the bundle, session configuration entries for ONNX Runtime, and its inputs and outputs.

    `session_of` names the graph whose session runs this phase too, so that weights are loaded once; None means its own
    session. The prefill graph takes any number of tokens, so it can run the decode phase.
    """

    file: str
    session: dict[str, str]
    session_of: str | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def top_tokens(self) -> int:
        """The number of most likely tokens that the graph returns as `TOP_OUTPUTS`; 0 for none."""
        found = [tensor.shape[-1] for tensor in self.outputs if tensor.name == TOP_IDS]
        return found[0] if found and isinstance(found[0], int) else 0


@dataclass(frozen=True)
class Graphs:
    """The three graphs over one set of weights: the prompt, each further token, and the logits of all positions."""

    prefill: GraphSpec
    decode: GraphSpec
    score: GraphSpec


@dataclass(frozen=True)
class VariantWeights:
    """The weights of a variant: their layout, and the file that its graph reads.

    The file is not in the bundle: `satchel specialize` makes it from the weights of the portable graphs.
    """

    layout: str
    file: str


@dataclass(frozen=True)
class Variant:
    """An alternative to the portable graphs that is faster on some machines.

    `runs` are the phases that it can run, all in one session. `requires` are processor features (architecture and
    extensions). `kernel_abi` is the version of satchel's own kernels that it needs, None for a graph of standard
    operators.
    """

    name: str
    runs: tuple[str, ...]
    graph: GraphSpec
    weights: VariantWeights
    requires: tuple[str, ...]
    kernel_abi: int | None

    @property
    def ragged(self) -> bool:
        """Whether one run may hold new tokens of several sequences, with keys and values in blocks of a pool."""
        return any(tensor.name == ROW_OFFSETS for tensor in self.graph.inputs)


@dataclass(frozen=True)
class TableSpec:
    """An input of a static graph with one row per new token, looked up in a table by the token's position.

    The table, such as the cosines of a rotary embedding, is [positions, width] of `dtype` at `offset` of `file`,
    little-endian and row-major. The input `input` is [1, tokens, width].
    """

    input: str
    file: str
    offset: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StaticGraph:
    """A graph for exactly `tokens` new tokens, as parts that run sequentially.

    Intermediate outputs of a part are inputs of later parts under the same name.
    """

    tokens: int
    parts: tuple[GraphSpec, ...]


@dataclass(frozen=True)
class StaticGraphs:
    """Graphs with static shapes, for devices that compile each shape separately.

    `capacity` is the length of the cache. `masks` are the attention mask inputs by name, with the sliding window of
    their layers, 0 for none. `prefill` are graphs for several chunk lengths, the shortest first; `score` returns the
    logits of all tokens of a chunk.
    """

    capacity: int
    masks: dict[str, int]
    tables: tuple[TableSpec, ...]
    prefill: tuple[StaticGraph, ...]
    decode: StaticGraph
    score: StaticGraph


@dataclass(frozen=True)
class PlainGraphs:
    """The graphs without custom passes over the same weights: either `graphs` or `static`."""

    graphs: Graphs | None
    static: StaticGraphs | None
