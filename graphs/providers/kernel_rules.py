"""Rules common to all providers that match nodes to kernels one by one."""

from __future__ import annotations

from collections.abc import Iterator

from satchel.graphs.providers.findings import Finding, GraphView, at
from satchel.graphs.providers.kernels import Match


def operator_has_kernel(view: GraphView) -> Iterator[Finding]:
    """Every operator has a kernel for at least one version."""
    yield from _of_match(view, Match.NO_KERNEL)


def version_has_kernel(view: GraphView) -> Iterator[Finding]:
    """Every operator has a kernel for the version of its definition."""
    yield from _of_match(view, Match.NO_VERSION)


def types_are_known(view: GraphView) -> Iterator[Finding]:
    """The types by which a kernel is chosen are known."""
    yield from _of_match(view, Match.UNVERIFIED)


def operator_of_library(view: GraphView) -> Iterator[Finding]:
    """There are no custom operators."""
    yield from _of_match(view, Match.OF_LIBRARY)


def _of_match(view: GraphView, match: Match) -> Iterator[Finding]:
    for node in view.nodes:
        fit = view.fits[node]
        if fit.match is match:
            yield at(node, fit.detail)
