"""Outliers in the values of attention are spread over each head."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from satchel.graphs.analysis.channels import Channels, channels, check_unshared, marked
from satchel.graphs.analysis.rotations import hadamard, rotation
from satchel.graphs.ir.contract import Refused, Report, graph_pass
from satchel.graphs.ir.values import MICROSOFT, Builder, attributes, last_dim, nodes, only_user, replace, weight
from satchel.graphs.ir.weights import left_multiplied, right_multiplied

MARK = "values_rotated"


@graph_pass
def rotate_values(model: ir.Model, report: Report) -> None:
    """Rotate the values of each head, and the rows of the output projection back.

    Attention is linear in its values, so that what it gives for rotated values is rotated in the same way. The cache
    holds rotated values, too.

    before: MatMul(qkv) -> GroupQueryAttention -> MatMul(o)
    after:  MatMul(qkv with R after each head's values) -> GroupQueryAttention -> MatMul(R.T for each query head, o)
    R is a Hadamard matrix, or a random orthogonal one where the heads are no power of two wide.
    refuses when: something stands between the linear layer and the values, or between the attention and the output
    projection; these, their weights or the cache are read elsewhere too; or the attention has an attribute that is not
    known.
    Source: QuaRot, Ashkboos et al. 2024, arXiv:2404.00456.
    """
    for attention in nodes(model, "GroupQueryAttention", MICROSOFT):
        with report.refusing(attention):
            match = _match(attention)
            if match is not None:
                _rotate(model, match)
                report.count += 1


@dataclasses.dataclass(frozen=True)
class Match:
    """The channels that are values, the output projection [heads * head_dim, out] as an initializer, and the width of a
    head.
    """

    values: Channels
    output: ir.Value
    head_dim: int


def _match(attention: ir.Node) -> Match | None:
    options = attributes(
        attention, num_heads=None, kv_num_heads=None, scale=None, softcap=0.0, local_window_size=-1, do_rotary=0,
        rotary_interleaved=0, smooth_softmax=0,
    )  # fmt: skip
    heads, kv_heads = int(options["num_heads"]), int(options["kv_num_heads"])
    cached = [value for value in attention.inputs[3:5] if value is not None]
    if any(not value.is_graph_input() for value in cached) or any(v.uses() for v in attention.outputs[1:3]):
        raise Refused("its cache is read by several layers")
    projection = only_user(attention.outputs[0])
    if projection is None or projection.op_type != "MatMul" or projection.inputs[0] is not attention.outputs[0]:
        raise Refused("its output does not go straight into one linear layer")
    matrix = projection.inputs[1]
    if matrix is None or weight(matrix) is None:
        raise Refused("its output goes into a linear layer without constant weights")
    if marked(matrix, MARK):
        return None
    check_unshared(matrix)
    packed = attention.inputs[1] is None
    found = channels(attention.inputs[0 if packed else 2])
    if found is None:
        raise Refused("something stands between its values and their linear layer")
    if packed:
        start = found.stop - (found.stop - found.start) // (heads + 2 * kv_heads) * kv_heads
        found = dataclasses.replace(found, start=start)
    head_dim = (found.stop - found.start) // kv_heads
    if last_dim(attention.outputs[0]) != heads * head_dim:
        raise Refused("its output is not as wide as its heads")
    return Match(found, matrix, head_dim)


def _rotate(model: ir.Model, match: Match) -> None:
    power_of_two = match.head_dim & (match.head_dim - 1) == 0
    matrix: np.ndarray = hadamard(match.head_dim) if power_of_two else rotation(match.head_dim)
    builder, span = Builder(model), (match.values.start, match.values.stop)
    for value in (match.values.matrix, match.values.bias):
        lazy = weight(value)
        if value is not None and lazy is not None:
            replace(value, builder.initializer(right_multiplied(lazy, matrix, f"{lazy.name}.{MARK}", span)))
    output = weight(match.output)
    if output is not None:
        replace(match.output, builder.initializer(left_multiplied(output, matrix.T, f"{output.name}.{MARK}")))
