"""Norms go into satchel's own linear operator."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from satchel.graphs.analysis.linear import NORM_WEIGHT, X, has_input, linear, set_input, width
from satchel.graphs.ir.contract import Refused, Report, graph_pass
from satchel.graphs.ir.values import attributes, constant, dims, nodes, rank, weight


@graph_pass
def fold_norms(model: ir.Model, report: Report) -> None:
    """Let linear layers norm their own input, where nothing else reads what is normed.

    A norm weight of ones, which rotated models have, is left out.

    before: x -> RMSNormalization(gain, eps) -> satchel::Linear -> y
    after:  x -> satchel::Linear(gain, epsilon = eps) -> y
    refuses when: the norm is not over the last axis alone in single precision, eps is not above 0, the norm weight is
    not a constant vector, something other than linear layers reads the result, or one of these has a norm already.
    """
    for norm in nodes(model, "RMSNormalization"):
        readers = [use.node for use in norm.outputs[0].uses()]
        if not any(reader is linear(reader.outputs[0]) for reader in readers):
            continue
        with report.refusing(norm):
            epsilon, gain = _checked(norm, readers)
            ones = constant(gain)
            for reader in readers:
                reader.replace_input_with(X, norm.inputs[0])
                reader.attributes.add(ir.AttrFloat32("epsilon", epsilon))
                if ones is None or not np.array_equal(ones, np.ones_like(ones)):
                    set_input(reader, NORM_WEIGHT, gain)
            report.count += 1


def _checked(norm: ir.Node, readers: list[ir.Node]) -> tuple[float, ir.Value]:
    """(epsilon, norm weight) of a norm that its readers can take over; Refused otherwise."""
    options = attributes(norm, axis=-1, epsilon=1e-5, stash_type=1)
    x, gain = norm.inputs[0], norm.inputs[1]
    if options["axis"] not in (-1, (rank(x) or 0) - 1) or options["stash_type"] != 1:
        raise Refused("the norm is not over the last axis, or not computed in single precision")
    if options["epsilon"] <= 0:
        raise Refused("the norm's epsilon is not above 0")
    for reader in readers:
        at_x = [use.idx for use in norm.outputs[0].uses() if use.node is reader] == [X]
        if reader is not linear(reader.outputs[0]) or not at_x or norm.outputs[0].is_graph_output():
            raise Refused("something other than linear layers reads its result")
        if reader.attributes.get("epsilon") or has_input(reader, NORM_WEIGHT):
            raise Refused("the linear layer has a norm already")
        if gain is None or weight(gain) is None or dims(gain) != [width(reader)[0]] or gain.dtype != ir.DataType.FLOAT:
            raise Refused("the norm's weight is not a constant vector as wide as the linear layer's input")
    if gain is None:
        raise Refused("the norm has no weight")
    return float(options["epsilon"]), gain
