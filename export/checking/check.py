"""Checks a bundle for an execution provider, by the provider's rules, without the provider."""

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
from satchel.runtime.bundle.contract import NATIVE
from satchel.runtime.bundle.manifest import MANIFEST_NAME
from satchel.runtime.bundle.reader import Bundle

PREFERRED_ON_HOST = "U08"


@dataclass(frozen=True)
class Found:
    """A place in a graph that breaks a rule. `node` and `operator` are None where it is the graph as a whole."""

    rule: str
    severity: str
    message: str
    node: str | None
    operator: str | None


@dataclass(frozen=True)
class GraphResult:
    """What a provider makes of one graph.

    Attributes:
        graph: Its name for people.
        file: Its file in the bundle.
        optimized: Whether the graph that ONNX Runtime hands over was judged; else the file as it is.
        note: Why it was not, or "".
        nodes: How many nodes the judged graph has.
        taken: How many of them the provider runs: 0 where it takes whole graphs, and not this one.
        host: How many ONNX Runtime prefers on the CPU (cuda).
        refused: How many nodes break a rule with an error, by operator.
        findings: All places that break a rule.
        settled: For each rule that only the file breaks, how many places: ONNX Runtime's optimizers mend them.
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
    """What a provider makes of a bundle. `tables` says whose rules and kernels were looked up."""

    bundle: str
    target: str
    provider: str
    tables: str
    errors: int
    warnings: int
    graphs: tuple[GraphResult, ...]

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        values: dict[str, Any] = strict_json.to_json(self)
        return values


def check_bundle(bundle: Bundle, provider: Provider) -> CheckResult:
    """Judge every graph of a bundle by a provider's rules. Nothing is written.

    The graph of satchel's own operators is for the CPU alone, and left out for other providers.

    Raises:
        BundleError: A graph is damaged.
    """
    judged = [graph for graph in bundle_graphs(bundle) if graph.name != NATIVE or provider.name == "cpu"]
    graphs = tuple(_check_graph(bundle, graph, provider) for graph in judged)
    severities = Counter(found.severity for graph in graphs for found in graph.findings)
    return CheckResult(
        bundle=str(bundle.folder),
        target=bundle.manifest.target,
        provider=provider.name,
        tables=provider.tables,
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


def _of_libraries(bundle: Bundle, graph: BundleGraph, proto: onnx.ModelProto) -> frozenset[str]:
    """The domains of the graph's operators that are of satchel's own library, or of those which the bundle needs."""
    own = frozenset({INTERNAL} if graph.name == NATIVE else ())
    if not bundle.manifest.custom_ops:
        return own
    return own | frozenset(node.domain for node in proto.graph.node) - known_domains()


def _found(rule: Rule, finding: Finding) -> Found:
    severity = finding.severity or rule.severity
    return Found(rule.id, severity, finding.message, finding.node, finding.operator)


def _refused(findings: Iterable[Found]) -> dict[str, int]:
    """How many nodes break a rule with an error, by operator, the most frequent first."""
    nodes = {(found.node, found.operator) for found in findings if found.severity == ERROR and found.operator}
    return dict(Counter(str(operator) for _, operator in nodes).most_common())
