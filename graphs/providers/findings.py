"""Rules, their findings, and the view of a graph that a rule checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import onnx_ir as ir

from satchel.graphs.providers.kernels import Fit, KernelTable, Match

ERROR, WARNING, INFO = "error", "warning", "info"
SEVERITIES = (ERROR, WARNING, INFO)
"""Error: the graph does not run, or a node falls back to the CPU. Warning: it runs slowly, or might not run."""


@dataclass(frozen=True)
class Finding:
    """One violation of a rule.

    Attributes:
        message: What was found, without the node's name.
        node: The node's name; None for the graph as a whole.
        operator: The node's operator, prefixed with its domain unless that is ai.onnx.
        severity: Overrides the rule's severity.
    """

    message: str
    node: str | None = None
    operator: str | None = None
    severity: str | None = None


@dataclass(frozen=True)
class GraphView:
    """A graph as a rule sees it, with value types filled in as far as they are known.

    Attributes:
        phase: "prefill", "decode" or "score".
        kernels: The provider's kernels; None for a provider that takes whole graphs.
        libraries: Domains of custom operators, whose library is given when the graph is run.
    """

    model: ir.Model
    phase: str = "prefill"
    kernels: KernelTable | None = None
    libraries: frozenset[str] = frozenset()

    @cached_property
    def nodes(self) -> tuple[ir.Node, ...]:
        """All nodes including those of subgraphs, in graph order."""
        return tuple(ir.traversal.RecursiveGraphIterator(self.model.graph))

    @cached_property
    def fits(self) -> Mapping[ir.Node, Fit]:
        """How each node fits the kernels."""
        table = self.kernels
        if table is None:
            return {}
        imports, of_library = self.model.graph.opset_imports, Fit(Match.OF_LIBRARY, "its kernels are in a library")
        return {
            node: of_library if node.domain in self.libraries else table.fit(node, imports.get(node.domain, 1))
            for node in self.nodes
        }

    @cached_property
    def values(self) -> tuple[ir.Value, ...]:
        """The graph's inputs, initializers and node outputs."""
        graph = self.model.graph
        made = [value for node in self.nodes for value in node.outputs]
        return (*graph.inputs, *graph.initializers.values(), *made)


Check = Callable[[GraphView], Iterable[Finding]]


@dataclass(frozen=True)
class Rule:
    """A rule of a provider.

    Attributes:
        id: An identifier such as C01, for messages and documents.
        severity: "error", "warning" or "info".
        title: The violation, in a few words.
        why: The reason.
        remedy: What to do; "" for nothing.
        check: A pure function that returns the violations in a graph.
        of_file: Whether to check the file itself rather than the graph that ONNX Runtime passes to the provider.
    """

    id: str
    severity: str
    title: str
    why: str
    remedy: str
    check: Check
    of_file: bool = False


def operator(node: ir.Node) -> str:
    """Return the operator's name, prefixed with its domain unless that is ai.onnx."""
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"


def at(node: ir.Node, message: str, severity: str | None = None) -> Finding:
    """Return a finding at a node, identified by its name or by that of its first output."""
    name = node.name or next((str(value.name) for value in node.outputs if value.name), node.op_type)
    return Finding(message, name, operator(node), severity)


def of_type(view: GraphView, *op_types: str) -> Iterator[ir.Node]:
    """Return the nodes of these ai.onnx operators."""
    return (node for node in view.nodes if node.domain in ("", "ai.onnx") and node.op_type in op_types)


def is_constant(value: ir.Value | None) -> bool:
    """Whether a value is an initializer or the output of a Constant node."""
    if value is None:
        return False
    maker = value.producer()
    return value.const_value is not None or (maker is not None and maker.op_type == "Constant")


def operand(node: ir.Node, index: int) -> ir.Value | None:
    """Return the input at an index, or None if it is omitted."""
    return node.inputs[index] if index < len(node.inputs) else None


def known_rank(value: ir.Value | None) -> int | None:
    """Return the number of dimensions, or None if unknown."""
    return None if value is None or value.shape is None else len(value.shape)


def number(node: ir.Node, name: str, default: int) -> int:
    """Return an integer attribute of a node, or the default if it has none of that name."""
    attribute = node.attributes.get(name)
    return attribute.value if attribute is not None and isinstance(attribute.value, int) else default
