"""The sizes of a model: its matrices, caches and states, layer by layer, without values."""

from __future__ import annotations

import dataclasses
import functools

from satchel.runtime.bundle import shares

FLOAT_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Cut:
    """How several devices divide a matrix.

    Attributes:
        parts: Into how many equal parts that stay whole it can be cut; of attention, the heads of keys.
        queries: Query heads, if these divide it.
        keyed: Whether it makes keys or values, of which devices that share a head have copies.
    """

    parts: int
    queries: int = 0
    keyed: bool = False

    @property
    def most(self) -> int:
        """How many devices can have a part."""
        return max(self.parts, self.queries)

    def share(self, devices: int) -> float:
        """The largest part that one of several devices has, between 0 and 1."""
        equal = (1.0,) * devices
        if not self.queries:
            return max(shares.counts(self.parts, equal)) / self.parts
        found = shares.heads(self.queries, self.parts, equal)
        if self.keyed:
            return max(len(each.keys) for each in found) / self.parts
        return max(len(each.projected) for each in found) / self.queries


@functools.cache
def share(cut: Cut | None, devices: int) -> float:
    """The largest part of something that one of several devices has, between 0 and 1; 1 for what is not cut."""
    return 1.0 if cut is None else cut.share(devices)


@dataclasses.dataclass(frozen=True)
class Matrix:
    """The weight of one linear layer, table or mixture of experts.

    Attributes:
        layer: Its name, as far as the rules of recipes look at names.
        outputs, inputs: Its width on both sides; `outputs` of a table are its rows.
        kind: One of `recipe.KINDS`, or "float" for what no recipe rounds.
        cut: How several devices divide it; None for what each has whole.
        count: How many matrices of this size there are: experts.
        active: How many of them a token needs.
    """

    layer: str
    outputs: int
    inputs: int
    kind: str = "linear"
    cut: Cut | None = None
    count: int = 1
    active: int = 1

    @property
    def size(self) -> int:
        """The number of weights of all of them."""
        return self.outputs * self.inputs * self.count


@dataclasses.dataclass(frozen=True)
class Cache:
    """The KV cache of one layer.

    `value_dim` is 0 for a latent. `window` is how many of the last positions a step reads; None for all. `native` is
    whether satchel's own attention takes it.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None
    cut: Cut | None = None
    native: bool = True


@dataclasses.dataclass(frozen=True)
class State:
    """The state of a convolution or recurrence, of one sequence: so many numbers, which `cut` divides."""

    size: int
    cut: Cut | None = None


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer.

    Attributes:
        matrices: Its linear layers and experts.
        norms: Numbers in norms on the residual stream, which a rotation folds into matrices.
        vectors: Other numbers that stay in float: biases, norms of heads, convolutions.
        reductions: Sums of `hidden` numbers over all devices: one behind attention and one behind the feed-forward
            part, or a single one where both read the same input.
        cache: What attention keeps; None without attention, and where the cache of an earlier layer is read.
        reads: The cache that attention reads.
        states: Those of convolutions and recurrences.
    """

    matrices: tuple[Matrix, ...]
    norms: int
    vectors: int
    reductions: int
    cache: Cache | None = None
    reads: Cache | None = None
    states: tuple[State, ...] = ()


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model.

    Attributes:
        model_type: As in its config.
        hidden: Width of the residual stream.
        vocabulary: Rows of the embedding.
        context: The longest text in tokens.
        layers: In order.
        embedding: The table of tokens.
        head: What makes logits; None where it is the embedding.
        norms, vectors: As those of a layer: the last norm, and tables of positions.
        rotary: Numbers in the tables of angles for each position.
    """

    model_type: str
    hidden: int
    vocabulary: int
    context: int
    layers: tuple[Layer, ...]
    embedding: Matrix
    head: Matrix | None
    norms: int
    vectors: int
    rotary: int

    @property
    def parameters(self) -> int:
        """The number of weights, a table that is also the head counted once."""
        floats = self.norms + self.vectors + sum(layer.norms + layer.vectors for layer in self.layers)
        ends = self.embedding.size + (0 if self.head is None else self.head.size)
        return floats + ends + sum(matrix.size for layer in self.layers for matrix in layer.matrices)

    @property
    def active_parameters(self) -> int:
        """The weights that one token is multiplied with: the head, and of experts those that it chooses."""
        head = self.embedding if self.head is None else self.head
        layers = (matrix for layer in self.layers for matrix in layer.matrices)
        return head.size + sum(matrix.size * matrix.active // matrix.count for matrix in layers)


def most_devices(shape: Shape) -> int:
    """How many devices can have a part of each layer: as many as the layer with the fewest heads has."""
    cuts = (m.cut for layer in shape.layers for m in layer.matrices if m.kind != "experts")
    return min((cut.most for cut in cuts if cut is not None), default=1)
