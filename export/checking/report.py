"""Renders the result of a check: as text, by rule with the first places, or as an HTML page with all places."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources

from satchel.export.checking.check import CheckResult, Found, GraphResult
from satchel.graphs.providers.findings import SEVERITIES, Rule
from satchel.graphs.providers.rules import RULES
from satchel.runtime.util.terminal import columns, printable

TEMPLATE = "check.html.jinja"
SHOWN_OPERATORS = 4
SHOWN_KINDS = 3
SHOWN_PLACES = 1000
"""Max places per rule on a page; a graph may have thousands."""

NOTE_LENGTH = 160


@dataclass(frozen=True)
class Section:
    """The violations of a rule. Texts that come from the bundle are escaped.

    `lines` has one line per operator; `places` are (graph, node, operator, message).
    """

    rule: Rule
    severity: str
    count: int
    graphs: str
    lines: tuple[str, ...]
    places: tuple[tuple[str, str, str, str], ...]


def as_text(result: CheckResult, strict: bool) -> str:
    """The result for a terminal: the graphs, each violated rule with its first places, and the verdict."""
    lines = [_title(result), "", *(f"  {line}" for line in columns(_graph_rows(result), (2, 3, 4)))]
    for section in sections(result):
        rule = section.rule
        lines += ["", f"{rule.id} {section.severity}: {rule.title} ({section.count:,} in {section.graphs})"]
        lines += [f"  {line}" for line in section.lines[:SHOWN_OPERATORS]]
        if len(section.lines) > SHOWN_OPERATORS:
            lines.append(f"  and {len(section.lines) - SHOWN_OPERATORS} more operators")
        lines += [f"  why: {rule.why}", *([f"  do: {rule.remedy}"] if rule.remedy else [])]
    notes = list(_notes(result))
    if notes:
        lines += ["", *notes]
    return "\n".join([*lines, "", verdict(result, strict)])


def as_page(result: CheckResult, strict: bool) -> str:
    """The result as a self-contained HTML page."""
    from jinja2 import Environment

    template = resources.files("satchel.export.checking").joinpath(TEMPLATE).read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    header, *rows = _graph_rows(result)
    page = environment.from_string(template).render(
        title=_title(result), verdict=verdict(result, strict), ready=is_ready(result, strict), header=header, rows=rows,
        sections=sections(result), notes=list(_notes(result)), shown=SHOWN_PLACES,
    )  # fmt: skip
    return page.lstrip()


def is_ready(result: CheckResult, strict: bool) -> bool:
    """Whether there are no errors and, if `strict`, no warnings."""
    return not result.errors and not (strict and result.warnings)


def verdict(result: CheckResult, strict: bool) -> str:
    """One line: whether the bundle is ready for the provider."""
    counts = ", ".join(
        f"{count:,} {word}{'' if count == 1 else 's'}"
        for word, count in (("error", result.errors), ("warning", result.warnings))
        if count
    )
    if is_ready(result, strict):
        return f"ready for {result.provider}" + (f", with {counts}" if counts else "")
    return f"not ready for {result.provider}: {counts}"


def sections(result: CheckResult) -> list[Section]:
    """The violated rules, the most severe first."""
    rules = {rule.id: rule for rule in RULES[result.provider]}
    found: dict[tuple[int, str], list[tuple[GraphResult, Found]]] = defaultdict(list)
    for graph in result.graphs:
        for place in graph.findings:
            found[SEVERITIES.index(place.severity), place.rule].append((graph, place))
    return [_section(rules[name], SEVERITIES[rank], places) for (rank, name), places in sorted(found.items())]


def _section(rule: Rule, severity: str, places: list[tuple[GraphResult, Found]]) -> Section:
    operators: dict[str | None, list[tuple[GraphResult, Found]]] = defaultdict(list)
    for graph, place in places:
        operators[place.operator].append((graph, place))
    lines = []
    for operator, alike in operators.items():
        graph, first = alike[0]
        times = "" if len(alike) == 1 else f" (and {len(alike) - 1:,} more)"
        what = "" if operator is None else f"{operator} {first.node}: "
        lines.append(printable(f"{graph.graph}: {what}{first.message}{times}"))
    listed = [
        (printable(graph.graph), printable(place.node or ""), printable(place.operator or ""), printable(place.message))
        for graph, place in places
    ]
    graphs = ", ".join(dict.fromkeys(printable(graph.graph) for graph, _ in places))
    return Section(rule, severity, len(places), graphs, tuple(lines), tuple(listed))


def _title(result: CheckResult) -> str:
    return f"{printable(result.bundle)} (made for {printable(result.target)}) on {result.provider}, by {result.tables}"


def _graph_rows(result: CheckResult) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("graph", "file", "nodes", "supported", "preferred on CPU", "unsupported")]
    for graph in result.graphs:
        kinds = [f"{count:,} {operator.partition('::')[2] or operator}" for operator, count in graph.refused.items()]
        more = len(kinds) - SHOWN_KINDS
        text = ", ".join(kinds[:SHOWN_KINDS]) + (f" and {more} more" if more > 0 else "")
        if not graph.taken and graph.nodes and result.provider == "cann":
            text = f"the whole graph{': ' if text else ''}{text}"
        row = (graph.graph, graph.file, f"{graph.nodes:,}", f"{graph.taken:,}", f"{graph.host:,}", text or "-")
        rows.append(tuple(map(printable, row)))
    return rows


def _notes(result: CheckResult) -> Iterator[str]:
    if result.states and result.provider != "cpu":
        yield "layers with convolution or recurrent states are exported for the CPU only: no other target helps"
    for graph in result.graphs:
        if graph.note:
            reason = printable(graph.note)
            reason = reason if len(reason) <= NOTE_LENGTH else reason[:NOTE_LENGTH] + " ..."
            yield f"{printable(graph.graph)}: checked unoptimized, since ONNX Runtime does not open it ({reason})"
        if graph.settled:
            fixed = ", ".join(f"{rule} ({count:,})" for rule, count in graph.settled.items())
            yield f"{printable(graph.graph)}: fixed by ONNX Runtime before the provider gets the graph: {fixed}"
