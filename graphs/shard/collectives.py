"""The operators by which ranks exchange what they compute: satchel's own over MPI, or ONNX Runtime's over NCCL."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from satchel.graphs.analysis.linear import ADDED, RESIDUAL, WIDTHS, X, has_input, set_input
from satchel.graphs.ir.values import INTERNAL, MICROSOFT, Builder, nodes, replace
from satchel.runtime.bundle.contract import LOGITS
from satchel.runtime.bundle.layouts import HALF_BITS
from satchel.runtime.bundle.ranks import MPI, NCCL

DOMAINS = {MPI: INTERNAL, NCCL: MICROSOFT}
"""The domain of AllReduce, by the library that carries it out."""


@dataclasses.dataclass(frozen=True)
class Place:
    """One of the ranks that share layers.

    Attributes:
        rank: Its number.
        shares: What part of each layer each rank gets, in proportion.
        wire: Bits of the numbers that ranks exchange within the layers: 32, or 8 in blocks with a scale. NCCL sends
            numbers as they are.
        collectives: The library that exchanges them, one of `COLLECTIVES`.
        exact: Whether ranks compute the bits of one process: they hand each other parts of values where they would add
            parts of sums, whose order floats show.
    """

    rank: int
    shares: tuple[float, ...]
    wire: int = 32
    collectives: str = MPI
    exact: bool = False


def add_sum(builder: Builder, value: ir.Value, name: str, place: Place) -> ir.Node:
    """A node that adds a value over all ranks; each has the sum.

    ONNX Runtime's kernel reads the first input alone, although the operator takes any number: a sum is a node.
    """
    wire = place.wire if place.collectives == MPI and place.wire != 32 else None
    summed = builder.node("AllReduce", [value], name, DOMAINS[place.collectives], wire=wire)
    summed.outputs[0].shape, summed.outputs[0].type = value.shape, value.type
    return summed


def gather(
    builder: Builder, own: ir.Value, parts: Sequence[range], name: str, residual: ir.Value | None = None
) -> ir.Node:
    """A node that joins a value of all ranks along its last axis, by MPI, and adds `residual`; each has the whole."""
    widths = builder.constant(np.asarray([len(part) for part in parts], np.int64), _widths(parts))
    inputs = [own, widths] if residual is None else [own, widths, residual]
    joined = builder.node("AllGather", inputs, name, INTERNAL)
    joined.outputs[0].type = own.type
    if own.shape is not None:
        joined.outputs[0].shape = ir.Shape([*list(own.shape)[:-1], sum(map(len, parts))])
    return joined


def fold_gathers(model: ir.Model) -> None:
    """Let a Linear join what it reads of all ranks itself: its second output is what an AllGather in front of it gives.

    With many rows each rank quantizes some of them, and they hand each other bytes. Then it has the joined numbers of
    its own rows only, unless others than such nodes read them, or none if nothing does: `whole`.
    """
    folded = {node: reader for node in nodes(model, "AllGather", INTERNAL) if (reader := _joining(node)) is not None}
    for node, reader in folded.items():
        joined = node.outputs[0]
        adds = {(other, ADDED) for other in folded.values()} | {(other, _GATHERED) for other in folded}
        others = [use for use in joined.uses() if use.node is not reader and (use.node, use.idx) not in adds]
        rows = ALL_ROWS if others or joined.is_graph_output() else OWN_ROWS if len(joined.uses()) > 1 else NO_ROWS
        reader.attributes.add(ir.AttrInt64("whole", rows))
        own, widths, added = [*node.inputs, None][: _GATHERED + 1]
        reader.resize_outputs(2)
        whole = reader.outputs[1]
        whole.name, whole.shape, whole.type = joined.name, joined.shape, joined.type
        replace(joined, whole)
        for index, value in ((X, own), (WIDTHS, widths), (ADDED, added)):
            if value is not None:
                set_input(reader, index, value)
        model.graph.remove(node)
    model.graph.sort()  # what reads joined numbers stands behind the node that joins them


_GATHERED = 2
"""Where an AllGather takes what it adds."""

OWN_ROWS, ALL_ROWS, NO_ROWS = range(3)
"""What other nodes read of the rows that a Linear joins: attribute `whole`."""


def _joining(node: ir.Node) -> ir.Node | None:
    """The only Linear with quantized weights that reads what a node joins, if nothing else that it reads needs that."""
    readers = [use for use in node.outputs[0].uses() if (use.node.domain, use.node.op_type) == (INTERNAL, "Linear")]
    if len(readers) != 1 or readers[0].idx != X or readers[0].node.attributes.get_int("bits", 8) == HALF_BITS:
        return None
    return None if has_input(readers[0].node, RESIDUAL) else readers[0].node


def _widths(parts: Sequence[range]) -> str:
    return "ranks.widths_" + "_".join(str(len(part)) for part in parts)


def gather_logits(builder: Builder, own: ir.Value, parts: Sequence[range], place: Place) -> ir.Value:
    """All logits, [batch, tokens, vocabulary], of those of each rank: the first rank has them by MPI, all by NCCL.

    ONNX Runtime's AllGather takes as many from each rank. Parts that are narrower than the widest are filled up with
    what they have, and that is left out behind it. (Pad has no kernel for CUDA in ONNX Runtime 1.24.)
    """
    name = f"{LOGITS}.whole"
    if place.collectives == MPI:
        widths = builder.constant(np.asarray([len(part) for part in parts], np.int64), _widths(parts))
        return builder.value("GatherLogits", [own, widths], name, None, INTERNAL)
    leading, widest = list(own.shape or ())[:-1], max(map(len, parts))
    even, width = all(len(part) == widest for part in parts), len(parts[place.rank])
    last = builder.constant(np.asarray([-1], np.int64), "axis.last")

    def as_wide(value: ir.Value, width: int) -> ir.Value:
        value.type, value.shape = own.type, ir.Shape([*leading, width])
        return value

    def cut_out(value: ir.Value, start: int, stop: int, name: str) -> ir.Value:
        ends = (builder.constant(np.asarray([end], np.int64), f"logits.at_{end}") for end in (start, stop))
        return as_wide(builder.value("Slice", [value, *ends, last], name), stop - start)

    sent, (times, rest) = own, divmod(widest, width)
    if width < widest:
        more = [cut_out(own, 0, rest, f"{LOGITS}.more")] if rest else []
        sent = as_wide(builder.value("Concat", [own] * times + more, f"{LOGITS}.filled", axis=-1), widest)
    # The axis is counted from the first: the kernel takes a negative one for 0.
    attributes = {"axis": len(leading), "group_size": len(parts)}
    gathered = builder.node("AllGather", [sent], name if even else f"{LOGITS}.gathered", MICROSOFT, **attributes)
    everything = as_wide(gathered.outputs[0], widest * len(parts))
    if even:
        return everything
    starts = range(0, widest * len(parts), widest)
    pieces = [
        cut_out(everything, start, start + len(part), f"{LOGITS}.of_{rank}")
        for rank, (start, part) in enumerate(zip(starts, parts, strict=True))
    ]
    return builder.value("Concat", pieces, name, axis=-1)
