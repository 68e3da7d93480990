"""CPU rules: each node needs a kernel in the installed ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from satchel.graphs.providers.findings import Finding, GraphView, at
from satchel.graphs.providers.kernels import Match

CASTS = {"float16": "float"}
"""Types for which ONNX Runtime inserts casts around a node without a kernel."""


def types_have_kernel(view: GraphView) -> Iterator[Finding]:
    """Every operator has a kernel for its types, or one in float32 reachable through casts."""
    for node in view.nodes:
        fit = view.fits[node]
        if fit.match is Match.NO_TYPE and not _by_casts(view, node):
            yield at(node, fit.detail)


def float16_has_kernel(view: GraphView) -> Iterator[Finding]:
    """Every float16 operator has a float16 kernel."""
    for node in view.nodes:
        if view.fits[node].match is Match.NO_TYPE and _by_casts(view, node):
            yield at(node, "it runs in float32, with casts around it")


def _by_casts(view: GraphView, node: ir.Node) -> bool:
    if view.kernels is None:
        return False
    opset = view.model.graph.opset_imports.get(node.domain, 1)
    return view.kernels.fit(node, opset, CASTS).match in (Match.FITS, Match.UNVERIFIED)
