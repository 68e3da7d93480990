"""transpose_tied_head: a tied head multiplies the embedding table as it lies."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from support.graphs import build, fired, normal, operators, tag, untouched

from satchel.graphs.passes.static.transpose_tied_head import transpose_tied_head

TABLE = normal(1, 11, 6)


def head(tokens: int | str) -> ir.Model:
    text = f"""(float[1,{tokens},6] x) => (float[1,{tokens},11] logits) {{
        logits = com.microsoft.FusedMatMul<transB = 1>(x, table)
    }}"""
    return build(text, table=TABLE)


@pytest.mark.parametrize(("tokens", "transposes"), [(1, 0), (5, 2)])
def test_the_product_is_the_same(tokens: int, transposes: int) -> None:
    after = fired(transpose_tied_head, head(tokens), 1, feeds={"x": normal(2, 1, tokens, 6)}).model
    assert operators(after)["MatMul"] == 1
    assert operators(after)["Transpose"] == transposes
    assert list(after.graph.initializers) == ["table", *(n for n in after.graph.initializers if n.startswith("const/"))]


@pytest.mark.parametrize("change", ["attribute", "shape"])
def test_what_it_cannot_carry_over_is_refused(change: str) -> None:
    model = tag(head(5), "FusedMatMul", "alpha", 2.0) if change == "attribute" else head("sequence")
    (reason,) = untouched(transpose_tied_head, model)
    assert "transB" in reason
