"""Small graphs whose products are satchel's own, for the passes that fold their neighbors into them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from support.codes import rounded
from support.graphs import build, normal, serialized, the
from support.native_ops import run_reference

from satchel.graphs.passes.native.insert_linear import insert_linear
from satchel.graphs.quant.quantized import QuantizedWeight

INPUTS, OUTPUTS = 64, 40
NAME = "layer.weight.T"


def codes_of(
    name: str = NAME, inputs: int = INPUTS, outputs: int = OUTPUTS, bits: int = 8, block: int | None = None
) -> QuantizedWeight:
    return rounded(name, normal(len(name), outputs, inputs), bits, block)


def with_linears(text: str, *weights: QuantizedWeight, **arrays: np.ndarray) -> ir.Model:
    """A graph from text in which each MatMul by one of these weights is a Linear."""
    floats = {w.name.replace(".", "__"): np.zeros(w.codes.shape[::-1], np.float32) for w in weights}
    return insert_linear({w.name: w for w in weights})(build(text, **floats, **arrays)).model


def attributes_of(model: ir.Model) -> dict[str, object]:
    """Those of the only Linear."""
    return {name: attribute.value for name, attribute in the(model, "Linear").attributes.items()}


def same_by_reference(before: ir.Model, after: ir.Model, feeds: Mapping[str, np.ndarray]) -> None:
    """Check that both graphs give the same numbers: within 1e-5 of the largest of each output."""
    wanted, found = run_reference(before, feeds), run_reference(after, feeds)
    assert serialized(before) != serialized(after)
    for name, array in wanted.items():
        assert np.ptp(array) > 0, f"{name} is constant and would show no mistake"
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-5 * np.abs(array).max(), err_msg=name)
