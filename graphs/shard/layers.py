"""Finds where a graph can be cut between its layers: which nodes belong to which layer, and what crosses a border."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Hashable

import onnx_ir as ir

from satchel.graphs.ir.values import INTERNAL, dims, scalar
from satchel.runtime.bundle.contract import HIDDEN_STATES, INPUT_IDS, LOGITS

NUMBERED = re.compile(r"^(.*?\.)(\d+)(?:\.|$)")
"""Names of what belongs to a layer, such as model.layers.3.mlp.down_proj.weight: what is before its number, and it."""

CACHED = re.compile(r"^(?:past|present)[^.]*\.(\d+)(?:\.|$)")
"""Names of keys, values and states, with the number of their layer."""

RESULTS = (LOGITS, HIDDEN_STATES)
UNCUT = 1 << 40
"""The cost of what cannot be sent."""


@dataclasses.dataclass(frozen=True)
class Border:
    """Where a graph is cut in front of a layer: the nodes before it, and the values that those behind it read."""

    before: frozenset[ir.Node]
    crossing: tuple[ir.Value, ...]

    @property
    def width(self) -> int:
        """How many numbers cross for each token."""
        return sum(map(width_of, self.crossing))


class Layered:
    """The layers of a graph.

    A node belongs to the layer whose cache, state or weights it has; one that has neither may go with the layer before
    or behind it. Those that need nothing but the graph's inputs, such as positions, and no ids of tokens, are made by
    every stage for itself.
    """

    def __init__(self, model: ir.Model) -> None:
        self._nodes = list(model.graph)
        self._ids = next(value for value in model.graph.inputs if value.name == INPUT_IDS)
        self.bound = self._depending(model)
        own = self._numbers(_layer_prefix(model))
        self.count = 1 + max(own.values(), default=-1)
        results = {node for node in self.bound if any(str(v.name) in RESULTS for v in node.outputs)}
        self._highest: dict[ir.Node, int] = {}
        for node in self._nodes:
            above = [self._highest[maker] for maker in self._makers(node)]
            self._highest[node] = max([*above, own.get(node, -1), self.count if node in results else -1])
        self._lowest: dict[ir.Node, int] = {}
        for node in reversed(self._nodes):
            below = [self._lowest[reader] for value in node.outputs for reader in self._readers(value)]
            self._lowest[node] = min([*below, own.get(node, self.count + 1)])

    def is_behind(self, node: ir.Node | None, layer: int) -> bool:
        """Whether a node needs what this layer or a later one computes."""
        return node is not None and self._highest[node] >= layer

    def border(self, layer: int) -> Border | None:
        """The narrowest border between the layers before this one and the others; None where something crosses that
        cannot be sent: anything but float32 numbers for each token, such as keys and values that layers share.

        It is a minimum cut (Ford and Fulkerson, *Maximal flow through a network*, 1956) of the graph whose edges are
        values, each as wide as its last axes.
        """
        network = _Network()
        for node in self.bound:
            early, late = self._lowest[node] < layer, self._highest[node] >= layer
            if early and late:
                return None
            here = _Network.SOURCE if early else _Network.SINK if late else node
            for value in node.outputs:
                for reader in self._readers(value):
                    behind = self._highest[reader] >= layer
                    there = _Network.SINK if behind else _Network.SOURCE if self._lowest[reader] < layer else reader
                    if here != there:
                        network.join(here, value, self._cost(value))
                        network.join(value, there, UNCUT)
                        network.join(there, here, UNCUT)  # what is before the border needs nothing behind it
        if network.maximize() >= UNCUT:
            return None
        reached = network.reached()
        before = frozenset(node for node in self.bound if self._lowest[node] < layer or node in reached)
        made = (value for node in self._nodes if node in before for value in node.outputs)
        crossing = tuple(value for value in made if any(reader not in before for reader in self._readers(value)))
        return Border(before, crossing) if crossing else None

    def _cost(self, value: ir.Value) -> int:
        sizes = dims(value)
        if value.dtype != ir.DataType.FLOAT or value.is_graph_output() or not sizes or sizes[:2] != dims(self._ids):
            return UNCUT
        return width_of(value) or UNCUT

    def _numbers(self, prefix: str) -> dict[ir.Node, int]:
        """The layer of each node that has one of its own."""
        found: dict[ir.Node, int] = {}
        for node in self._nodes:
            named = [CACHED.match(str(value.name)) for value in (*node.inputs, *node.outputs) if value is not None]
            numbers = [int(match[1]) for match in named if match is not None]
            for value in node.inputs:
                if value is None or len(value.uses()) != 1:
                    continue  # what several layers read is of none
                maker = value.producer()
                match = NUMBERED.match(str(value.name)) if value.is_initializer() else None
                if match is not None and match[1] == prefix:
                    numbers.append(int(match[2]))
                elif maker in found and maker not in self.bound:
                    numbers.append(found[maker])  # what is made of weights alone
            if numbers:
                found[node] = max(numbers)
        return found

    def _depending(self, model: ir.Model) -> frozenset[ir.Node]:
        """The nodes that depend on ids of tokens, a cache or a state, by more than their shapes."""
        starts = {self._ids, *(value for value in model.graph.inputs if CACHED.match(str(value.name)))}
        found: set[ir.Node] = set()
        for node in self._nodes:
            if _reads_shape_only(node):
                continue
            if any(v is not None and (v in starts or v.producer() in found) for v in node.inputs):
                found.add(node)
        return frozenset(found)

    def _makers(self, node: ir.Node) -> list[ir.Node]:
        made = (value.producer() for value in node.inputs if value is not None)
        return [maker for maker in made if maker is not None and maker in self.bound] if node in self.bound else []

    def _readers(self, value: ir.Value) -> list[ir.Node]:
        return [use.node for use in value.uses() if use.node in self.bound]


def _reads_shape_only(node: ir.Node) -> bool:
    """Whether a node takes nothing but the shape of its first input: Shape, Positions, or zero times it."""
    if (node.domain, node.op_type) in (("", "Shape"), (INTERNAL, "Positions")):
        return True
    return (node.domain, node.op_type) == ("", "Mul") and any(scalar(value) == 0 for value in node.inputs)


def width_of(value: ir.Value) -> int:
    """The numbers of a value, [sequences, tokens, ...], for each token; 0 where that is not known."""
    sizes = (dims(value) or [])[2:]
    return math.prod(size if isinstance(size, int) else 0 for size in sizes) if sizes else 0


def _layer_prefix(model: ir.Model) -> str:
    """What the names of weights of layers begin with: of all that a number follows, that of the most bytes."""
    sizes: collections.Counter[str] = collections.Counter()
    for value in model.graph.initializers.values():
        match = NUMBERED.match(str(value.name))
        if match is not None and value.const_value is not None:
            sizes[match[1]] += value.const_value.nbytes
    return max(sizes, key=lambda prefix: (sizes[prefix], prefix), default="")


class _Network:
    """Capacities between things, and the largest flow from SOURCE to SINK."""

    SOURCE, SINK = "source", "sink"

    def __init__(self) -> None:
        self._left: dict[Hashable, dict[Hashable, int]] = collections.defaultdict(dict)

    def join(self, start: Hashable, end: Hashable, capacity: int) -> None:
        """Let up to `capacity` flow from `start` to `end`; the same twice is once."""
        self._left[start][end] = max(self._left[start].get(end, 0), capacity)
        self._left[end].setdefault(start, 0)

    def maximize(self) -> int:
        """Find the largest flow, along shortest ways first; `UNCUT` or more is as much as that."""
        total = 0
        while total < UNCUT and self.SINK in (came := self._search()):
            way, here = [], came[self.SINK]
            end: Hashable = self.SINK
            while here is not None:
                way.append((here, end))
                end, here = here, came[here]
            least = min(self._left[start][stop] for start, stop in way)
            for start, stop in way:
                self._left[start][stop] -= least
                self._left[stop][start] += least
            total += least
        return total

    def reached(self) -> set[Hashable]:
        """What is on the side of SOURCE after `maximize`."""
        return set(self._search())

    def _search(self) -> dict[Hashable, Hashable]:
        """Where each thing that SOURCE reaches was reached from."""
        came: dict[Hashable, Hashable] = {self.SOURCE: None}
        waiting: collections.deque[Hashable] = collections.deque([self.SOURCE])
        while waiting:
            here = waiting.popleft()
            for there, left in self._left[here].items():
                if left > 0 and there not in came:
                    came[there] = here
                    waiting.append(there)
        return came
