"""Outliers in front of a down projection move into its weights."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from satchel.graphs.analysis.channels import Channels, gated_input, marked
from satchel.graphs.ir.contract import GraphPass, Refused, Report, graph_pass
from satchel.graphs.ir.values import Builder, nodes, replace, weight
from satchel.graphs.ir.weights import from_array, scaled

FLOOR = 1e-4
"""The smallest root mean square that counts, as a part of the mean over the channels."""
MARK = "smoothed"


def equalize(statistics: Mapping[str, np.ndarray], alpha: float = 0.5) -> GraphPass:
    """Divide each channel in front of a gated layer's down projection by s = rms ** alpha, scaled to a geometric mean
    of 1: the up projection's columns and bias are divided by s, the down projection's rows multiplied.

    before: act(gate) * MatMul(x, up) -> MatMul(down) -> y
    after:  act(gate) * MatMul(x, up / s) -> MatMul(diag(s) down) -> y
    refuses when: a linear layer that has statistics is not a down projection of act(gate) * up, its input or weights
    are read elsewhere too, or its statistics are not one finite number of at least 0 for each input channel. A linear
    layer without statistics is left alone (silently).

    Args:
        statistics: For linear layers by node name: the root mean square of each input channel, [in] float32.
        alpha: How much of the outliers moves: 0 nothing, 1 all.

    Source: SmoothQuant, Xiao et al. 2022, arXiv:2211.10438, with root mean squares in place of maxima.
    """

    def edit(model: ir.Model, report: Report) -> None:
        for node in nodes(model, "MatMul"):
            rms = statistics.get(str(node.name))
            if rms is None or marked(node.inputs[1], MARK):
                continue
            with report.refusing(node):
                up = gated_input(node)
                if up is None:
                    raise Refused("its input is not an up projection times an activation")
                factors = _factors(rms, up.stop - up.start, alpha)
                _smooth(model, node, up, factors)
                report.count += 1

    return graph_pass(edit, equalize)


def _factors(rms: np.ndarray, width: int, alpha: float) -> np.ndarray:
    """s for each channel, [width] float32."""
    if rms.shape != (width,) or not np.isfinite(rms).all() or (rms < 0).any():
        raise Refused(f"its statistics are not one finite number of at least 0 for each of {width} channels")
    if not rms.any():
        return np.ones(width, np.float32)
    wide = rms.astype(np.float64)
    logs = alpha * np.log(np.maximum(wide, FLOOR * wide.mean()))
    return np.asarray(np.exp(logs - logs.mean()), np.float32)


def _smooth(model: ir.Model, node: ir.Node, up: Channels, factors: np.ndarray) -> None:
    down = weight(node.inputs[1])
    if down is None or node.inputs[1] is None:
        return
    forth = from_array(f"{node.name}.factors", factors)
    replace(node.inputs[1], Builder(model).initializer(scaled(down, forth, f"{down.name}.{MARK}")))
    for value, axis in ((up.matrix, -1), (up.bias, 0)):
        lazy = weight(value)
        if value is None or lazy is None:
            continue
        divisors = np.ones(lazy.dims[-1], np.float32)
        divisors[up.start : up.stop] = 1 / factors
        back = from_array(f"{node.name}.divisors", divisors)
        replace(value, Builder(model).initializer(scaled(lazy, back, f"{lazy.name}.{MARK}", axis)))
