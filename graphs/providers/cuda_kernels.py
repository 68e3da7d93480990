"""CUDA rules on which nodes have a kernel; nodes without one silently run on the CPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx_ir as ir

from satchel.graphs.providers.cuda_placement import Place, copies, excluded, placements
from satchel.graphs.providers.facts import VERSIONS, cuda_ir_version
from satchel.graphs.providers.findings import Finding, GraphView, at, of_type
from satchel.graphs.providers.kernels import Match

QDQ = ("QuantizeLinear", "DequantizeLinear")
NARROW = ("Where", "CumSum", "Range")
PARTLY = ("RNN", "GRU", "LSTM", "ConvTranspose")


def types_have_kernel(view: GraphView) -> Iterator[Finding]:
    """Every operator has a kernel for its types, except those with a separate rule."""
    yield from _misfits(view, (n for n in view.nodes if n.op_type not in QDQ + NARROW and excluded(n) is None))


def quantized_types_have_kernel(view: GraphView) -> Iterator[Finding]:
    """QuantizeLinear and DequantizeLinear have types with kernels; an int32 bias does not."""
    yield from _misfits(view, (node for node in view.nodes if node.op_type in QDQ))


def narrow_types_have_kernel(view: GraphView) -> Iterator[Finding]:
    """Where, CumSum and Range have types with kernels."""
    yield from _misfits(view, of_type(view, *NARROW))


def not_excluded(view: GraphView) -> Iterator[Finding]:
    """The provider excludes no node that a kernel matches."""
    for node in view.nodes:
        reason = excluded(node)
        if reason is not None and view.fits[node].match not in (Match.NO_KERNEL, Match.NO_VERSION):
            yield at(node, reason)


def partly_supported(view: GraphView) -> Iterator[Finding]:
    """There are no operators that the provider supports only in some forms."""
    for node in of_type(view, *PARTLY):
        if view.fits[node].match in (Match.FITS, Match.UNVERIFIED):
            yield at(node, "whether its form is supported is not checked")


def shapes_on_host(view: GraphView) -> Iterator[Finding]:
    """Reports shape arithmetic that ONNX Runtime prefers to run on the CPU."""
    places = placements(view)
    for node in view.nodes:
        if places[node] is Place.HOST_PREFERRED:
            yield at(node, "preferred on the CPU")


def no_copies(view: GraphView) -> Iterator[Finding]:
    """Nothing is copied between host and device in prefill."""
    if view.phase != "decode":
        yield from _copied(view)


def no_copies_in_decode(view: GraphView) -> Iterator[Finding]:
    """Nothing is copied between host and device in decode."""
    if view.phase == "decode":
        yield from _copied(view)


def ir_version(view: GraphView) -> Iterator[Finding]:
    """This ONNX Runtime supports the file's IR version."""
    name = "" if view.kernels is None else view.kernels.name
    highest = next((cuda_ir_version(version) for version in VERSIONS if name.endswith(version)), None)
    found = view.model.ir_version
    if highest is not None and found > highest:
        yield Finding(f"IR version {found}, but {name} supports up to {highest}")


def _misfits(view: GraphView, nodes: Iterable[ir.Node]) -> Iterator[Finding]:
    for node in nodes:
        if view.fits[node].match is Match.NO_TYPE:
            yield at(node, view.fits[node].detail)


def _copied(view: GraphView) -> Iterator[Finding]:
    for node, value, direction in copies(view, placements(view)):
        yield at(node, f"{value.name} is copied {direction}")
