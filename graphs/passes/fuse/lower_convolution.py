"""The internal Convolution operator -> com.microsoft CausalConvWithState over a state."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from satchel.graphs.ir.contract import Refused, Report, graph_pass
from satchel.graphs.ir.inputs import add_present_state, add_state
from satchel.graphs.ir.values import INTERNAL, MICROSOFT, Builder, attributes, dims, nodes, producer, replace
from satchel.graphs.ir.values import weight as lazy_weight
from satchel.graphs.ir.weights import reshaped
from satchel.runtime.bundle.contract import CONV


@graph_pass
def lower_convolution(model: ir.Model, report: Report) -> None:
    """Give each causal convolution the inputs before the new ones as its state, and lower it to CausalConvWithState.

    before: x [batch, new, channels], weight [channels, width] -> satchel::Convolution(layer, silu) -> y
    after:  x, weight [channels, 1, width], past [batch, width - 1, channels] -> CausalConvWithState(channels_last) -> y
                                                                                                       \\-> present
    refuses when: the weight's shape is not known, or it is one token wide.
    """
    for node in nodes(model, "Convolution", INTERNAL):
        with report.refusing(node):
            options = attributes(node, layer=None, silu=0)
            match dims(node.inputs[1]):
                case [int(channels), int(width)] if width > 1:
                    _rewrite(model, node, int(options["layer"]), bool(options["silu"]), (channels, width))
                    report.count += 1
                case shape:
                    raise Refused(f"its weight has the shape {shape}: [channels, width] of 2 or more is supported")


def _rewrite(model: ir.Model, node: ir.Node, layer: int, silu: bool, sizes: tuple[int, int]) -> None:
    channels, width = sizes
    builder, name = Builder(model, node), f"convolution.{layer}"
    squeeze = producer(node.inputs[1], "Squeeze")
    weight = squeeze.inputs[0] if squeeze is not None else None
    lazy = lazy_weight(node.inputs[1])
    if lazy is not None:
        weight = builder.shared(reshaped(lazy, (channels, 1, width), f"{lazy.name}.apart"))
    elif weight is None or dims(weight) != [channels, 1, width]:
        axis = builder.constant(np.asarray([1], np.int64), "axis.1")
        weight = builder.value("Unsqueeze", [node.inputs[1], axis], f"{name}.weight")
        weight.shape, weight.type = ir.Shape([channels, 1, width]), node.inputs[1].type  # type: ignore[union-attr]
    past = add_state(model, CONV, layer, (width - 1, channels))
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    fused = builder.node(
        "CausalConvWithState", [node.inputs[0], weight, bias, past], name, MICROSOFT, outputs=2,
        channels_last=1, activation="silu" if silu else None,
    )  # fmt: skip
    replace(node.outputs[0], fused.outputs[0])
    add_present_state(model, CONV, layer, fused.outputs[1], past)
