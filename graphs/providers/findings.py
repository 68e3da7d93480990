"""What a rule is and what it finds, and the graph that it is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import onnx_ir as ir

from satchel.graphs.providers.kernels import Fit, KernelTable, Match

ERROR, WARNING, INFO = "error", "warning", "info"
SEVERITIES = (ERROR, WARNING, INFO)
"""An error: the graph does not run there, or a node falls back to the CPU. A warning: it runs, slowly or in doubt."""


@dataclass(frozen=True)
class Finding:
    """One place that breaks a rule.

    Attributes:
        message: What was found, without the node's name.
        node: The node's name, None where it is the graph as a whole.
        operator: The node's operator, with its domain where that is not ai.onnx.
        severity: Where it differs from the rule's.
    """

    message: str
    node: str | None = None
    operator: str | None = None
    severity: str | None = None


@dataclass(frozen=True)
class GraphView:
    """A graph as a rule sees it. Types of values are filled in as far as they are known.

    Attributes:
        phase: "prefill", "decode" or "score".
        kernels: The provider's kernels, where it takes node by node; None for one that takes whole graphs.
        libraries: Domains whose operators are of libraries that whoever runs the graph names.
    """

    model: ir.Model
    phase: str = "prefill"
    kernels: KernelTable | None = None
    libraries: frozenset[str] = frozenset()

    @cached_property
    def nodes(self) -> tuple[ir.Node, ...]:
        """All nodes, those of inner graphs too, in the graph's order."""
        return tuple(ir.traversal.RecursiveGraphIterator(self.model.graph))

    @cached_property
    def fits(self) -> Mapping[ir.Node, Fit]:
        """For each node how it fits the kernels."""
        table = self.kernels
        if table is None:
            return {}
        imports, of_library = self.model.graph.opset_imports, Fit(Match.OF_LIBRARY, "its kernels are the library's")
        return {
            node: of_library if node.domain in self.libraries else table.fit(node, imports.get(node.domain, 1))
            for node in self.nodes
        }

    @cached_property
    def values(self) -> tuple[ir.Value, ...]:
        """The graph's inputs, its initializers, and what its nodes make."""
        graph = self.model.graph
        made = [value for node in self.nodes for value in node.outputs]
        return (*graph.inputs, *graph.initializers.values(), *made)


Check = Callable[[GraphView], Iterable[Finding]]


@dataclass(frozen=True)
class Rule:
    """A rule of a provider.

    Attributes:
        id: As C01, for messages and documents.
        severity: "error", "warning" or "info".
        title: What is wrong where it is broken, in a few words.
        why: The reason.
        remedy: What to do, "" for nothing.
        check: A pure function from a graph to the places that break the rule.
        of_file: Whether the file itself is judged, and not what ONNX Runtime makes of it before it hands it over.
    """

    id: str
    severity: str
    title: str
    why: str
    remedy: str
    check: Check
    of_file: bool = False


def operator(node: ir.Node) -> str:
    """The operator's name, with its domain where that is not ai.onnx."""
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"


def at(node: ir.Node, message: str, severity: str | None = None) -> Finding:
    """A finding at a node, which goes by its name or by that of its first output."""
    name = node.name or next((str(value.name) for value in node.outputs if value.name), node.op_type)
    return Finding(message, name, operator(node), severity)


def of_type(view: GraphView, *op_types: str) -> Iterator[ir.Node]:
    """The view's nodes of these standard operators."""
    return (node for node in view.nodes if node.domain in ("", "ai.onnx") and node.op_type in op_types)


def is_constant(value: ir.Value | None) -> bool:
    """Whether a value is there before the graph runs: an initializer, or what a Constant node makes."""
    if value is None:
        return False
    maker = value.producer()
    return value.const_value is not None or (maker is not None and maker.op_type == "Constant")


def operand(node: ir.Node, index: int) -> ir.Value | None:
    """The input at an index, None where it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def known_rank(value: ir.Value | None) -> int | None:
    """The number of dimensions where it is known."""
    return None if value is None or value.shape is None else len(value.shape)


def number(node: ir.Node, name: str, default: int) -> int:
    """A node's attribute that is a whole number, the default where it has none of the name."""
    attribute = node.attributes.get(name)
    return attribute.value if attribute is not None and isinstance(attribute.value, int) else default
