"""Checks a bundle by the rules of an execution provider, without the provider."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir

from satchel.export.checking.bundle_graphs import BundleGraph, bundle_graphs
from satchel.export.checking.handed_over import NotOptimized, handed_over, no_graph, read_graph
from satchel.export.checking.installed_kernels import known_domains
from satchel.export.checking.tables import Provider
from satchel.export.checking.value_types import typed_model
from satchel.graphs.ir.values import INTERNAL
from satchel.graphs.providers.findings import ERROR, INFO, WARNING, Finding, GraphView, Rule
from satchel.runtime.bundle import strict_json
from satchel.runtime.bundle.manifest import MANIFEST_NAME
from satchel.runtime.bundle.reader import Bundle

PREFERRED_ON_HOST = "U08"


@dataclass(frozen=True)
class Found:
    """A place in a graph that violates a rule. `node` and `operator` are None for the graph as a whole."""

    rule: str
    severity: str
    message: str
    node: str | None
    operator: str | None


@dataclass(frozen=True)
class GraphResult:
    """The result for one graph.

    Attributes:
        graph: Its name, for people.
        file: Its file in the bundle.
        optimized: Whether the graph was checked as optimized by ONNX Runtime; otherwise as it is in the file.
        note: Why it was not optimized, or "".
        nodes: Number of nodes of the checked graph.
        taken: Number of nodes that the provider runs; 0 if it only takes whole graphs and refuses this one.
        host: Number of nodes that ONNX Runtime prefers on the CPU (cuda).
        refused: Number of nodes that violate a rule with an error, by operator.
        findings: All places that violate a rule.
        settled: Number of violations in the file, by rule, that ONNX Runtime's optimizers fix.
    """

    graph: str
    file: str
    optimized: bool
    note: str
    nodes: int
    taken: int
    host: int
    refused: dict[str, int]
    findings: tuple[Found, ...]
    settled: dict[str, int]


@dataclass(frozen=True)
class CheckResult:
    """The result for a bundle.

    `tables` names the ONNX Runtime whose rules and kernels were looked up; `states` counts those that its layers keep.
    """

    bundle: str
    target: str
    provider: str
    tables: str
    states: int
    errors: int
    warnings: int
    graphs: tuple[GraphResult, ...]

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON values."""
        values: dict[str, Any] = strict_json.to_json(self)
        return values


def check_bundle(bundle: Bundle, provider: Provider) -> CheckResult:
    """Check every graph of a bundle by the rules of a provider. Writes nothing.

    Graphs with satchel's own operators run only on the CPU, and are skipped for other providers.

    Raises:
        BundleError: A graph is damaged.
    """
    judged = [graph for graph in bundle_graphs(bundle) if not _own(graph) or provider.name == "cpu"]
    graphs = tuple(_check_graph(bundle, graph, provider) for graph in judged)
    severities = Counter(found.severity for graph in graphs for found in graph.findings)
    return CheckResult(
        bundle=str(bundle.folder),
        target=bundle.manifest.target,
        provider=provider.name,
        tables=provider.tables,
        states=len(bundle.manifest.states),
        errors=severities[ERROR],
        warnings=severities[WARNING],
        graphs=graphs,
    )


def _check_graph(bundle: Bundle, graph: BundleGraph, provider: Provider) -> GraphResult:
    proto, note = read_graph(graph.path), ""
    known, libraries = list(proto.graph.value_info), _of_libraries(bundle, graph, proto)
    try:
        file_view = GraphView(typed_model(proto), graph.phase, provider.kernels, libraries)
    except ir.serde.SerdeError:
        raise no_graph(graph.path) from None
    try:
        if libraries - {INTERNAL}:
            raise NotOptimized(f"it needs {', '.join(file.name for file in bundle.manifest.custom_ops)}")
        optimized = handed_over(graph, bundle.folder / MANIFEST_NAME, None if provider.name == "cpu" else file_view)
    except NotOptimized as error:
        note = str(error)
    view = file_view if note else GraphView(typed_model(optimized, known), graph.phase, provider.kernels)
    findings: list[Found] = []
    settled: dict[str, int] = {}
    for rule in provider.rules:
        found = list(rule.check(file_view if rule.of_file else view))
        findings += [_found(rule, finding) for finding in found]
        if not (found or note or rule.of_file or rule.severity == INFO):
            count = sum(1 for _ in rule.check(file_view))
            settled |= {rule.id: count} if count else {}
    refused = _refused(findings)
    host = len({found.node for found in findings if found.rule == PREFERRED_ON_HOST})
    whole = provider.whole_graphs and any(found.severity == ERROR for found in findings)
    nodes = len(view.nodes)
    return GraphResult(
        graph=graph.name,
        file=graph.file,
        optimized=not note,
        note=note,
        nodes=nodes,
        taken=0 if whole else nodes - host - sum(refused.values()),
        host=host,
        refused=refused,
        findings=tuple(findings),
        settled=settled,
    )


def _own(graph: BundleGraph) -> bool:
    """Whether a graph has satchel's own operators."""
    return graph.variant is not None and graph.variant.kernel_abi is not None


def _of_libraries(bundle: Bundle, graph: BundleGraph, proto: onnx.ModelProto) -> frozenset[str]:
    """The domains of the operators in the graph that come from satchel's library or the custom ones of the bundle."""
    own = frozenset({INTERNAL} if _own(graph) else ())
    if not bundle.manifest.custom_ops:
        return own
    return own | frozenset(node.domain for node in proto.graph.node) - known_domains()


def _found(rule: Rule, finding: Finding) -> Found:
    severity = finding.severity or rule.severity
    return Found(rule.id, severity, finding.message, finding.node, finding.operator)


def _refused(findings: Iterable[Found]) -> dict[str, int]:
    """Number of nodes that violate a rule with an error, by operator, the most frequent first."""
    nodes = {(found.node, found.operator) for found in findings if found.severity == ERROR and found.operator}
    return dict(Counter(str(operator) for _, operator in nodes).most_common())
