"""rotate_residual: what the stream holds is rotated, and the logits stay what they are."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support.graphs import build, expose, fired, normal, operators, run, tag, untouched

from satchel.graphs.analysis.rotations import rotation
from satchel.graphs.passes.quantize.rotate_residual import rotate_residual

SIZE, INNER, VOCABULARY = 12, 16, 11
WEIGHTS = {
    "table": normal(1, VOCABULARY, SIZE),
    "gain": normal(2, SIZE),
    "gain2": normal(3, SIZE),
    "w_in__weight__T": normal(4, SIZE, INNER),
    "w_out__weight__T": normal(5, INNER, SIZE),
    "bias": normal(6, SIZE),
    "head__weight__T": normal(7, SIZE, VOCABULARY),
}
HEADER = """(int64[batch,sequence] input_ids, int64[batch,sequence] other_ids, float[12] fed)
    => (float[batch,sequence,11] logits)
    <float three = {3.0}, float half = {0.5}, int64[2] flat = {-1, 12},
     int64[3] whole = {2, 3, 12}, int64[1] last = {-1}, ROWS>"""
NODES = """
    e = Gather(table, input_ids)
    h = Mul(e, three)
    n = RMSNormalization<axis = -1, epsilon = 0.001>(h, gain)
    a0 = MatMul(n, "w_in.weight.T")
    a = Relu(a0)
    b0 = MatMul(a, "w_out.weight.T")
    b = Add(b0, bias)
    c = Mul(half, b)
    r = Add(h, c)
    m = RMSNormalization<axis = -1, epsilon = 0.001>(r, gain2)
    logits = MatMul(m, "head.weight.T")
"""
IDS = {
    "input_ids": np.asarray([[3, 0, 10], [7, 7, 1]]),
    "other_ids": np.asarray([[1, 2, 3], [4, 0, 9]]),
    "fed": normal(8, SIZE),
}
Change = tuple[str, str]


def model(*changes: Change, rows: str = "float[rows,12] row", **weights: np.ndarray) -> ir.Model:
    return build(f"{HEADER} {{ {NODES} }}", ("ROWS", rows), *changes, **(WEIGHTS | weights))


def check(before: ir.Model) -> ir.Model:
    after = fired(rotate_residual, before, 1).model
    wanted, found = run(before, IDS)["logits"], run(after, IDS)["logits"]
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()
    return after


TIED = ('logits = MatMul(m, "head.weight.T")', "logits = com.microsoft.FusedMatMul<transB = 1>(m, table)")
LAYER = (
    "n = RMSNormalization<axis = -1, epsilon = 0.001>(h, gain)",
    "n = LayerNormalization<axis = -1>(h, gain, beta)",
)
LAYER2 = (
    "m = RMSNormalization<axis = -1, epsilon = 0.001>(r, gain2)",
    "m = LayerNormalization<axis = -1>(r, gain2, beta2)",
)
BETAS = {"beta": normal(9, SIZE), "beta2": normal(10, SIZE)}
IN_BIAS = ("a = Relu(a0)", "a1 = Add(a0, in_bias) a = Relu(a1)")


def test_the_stream_is_rotated_and_the_logits_are_the_same() -> None:
    before = model()
    after = check(before)
    assert operators(after) == operators(before)
    held = run(expose(after, "r"), IDS)["r"]
    wanted = run(expose(before, "r"), IDS)["r"] @ rotation(SIZE)
    np.testing.assert_allclose(held, wanted, rtol=1e-4, atol=1e-5)


WRITERS = {
    "positions that are looked up": ("h = Mul(e, three)", "p = Gather(places, other_ids) h = Add(e, p)"),
    "a constant that is added": ("h = Mul(e, three)", "h = Add(bias2, e)"),
    "a number for each row": ("c = Mul(half, b)", "g0 = MatMul(n, gate) g = Sigmoid(g0) c = Mul(b, g)"),
    "two products": ("c = Mul(half, b)", "d = MatMul(a, second) c = Add(b, d)"),
    "rows flattened": ("c = Mul(half, b)", "f = Reshape(b, flat) c = Reshape(f, whole)"),
    "a look-up twice": ("c = Mul(half, b)", "d = Gather(table, other_ids) c = Add(b, d)"),
    "the shape of the stream": (
        "a = Relu(a0)",
        "s = Shape(h) t = ConstantOfShape(s) u = MatMul(t, zero) a = Add(a0, u)",
    ),
}
MORE = {
    "places": normal(11, 5 + VOCABULARY, SIZE), "bias2": normal(12, SIZE), "gate": normal(13, SIZE, 1),
    "second": normal(14, INNER, SIZE), "zero": normal(15, SIZE, INNER),
}  # fmt: skip


@pytest.mark.parametrize("tied", [(), (TIED,)], ids=["head", "tied head"])
@pytest.mark.parametrize("name", WRITERS)
def test_whatever_is_linear_may_write(name: str, tied: tuple[Change, ...]) -> None:
    check(model(WRITERS[name], *tied, **MORE))


@pytest.mark.parametrize("tied", [(), (TIED,)], ids=["head", "tied head"])
@pytest.mark.parametrize("bias", [(), (IN_BIAS,)], ids=["no bias", "bias"])
@pytest.mark.parametrize("layers", [(LAYER,), (LAYER, LAYER2)], ids=["both kinds of norm", "layer norms"])
def test_norms_that_subtract_the_mean(
    layers: tuple[Change, ...], bias: tuple[Change, ...], tied: tuple[Change, ...]
) -> None:
    after = check(model(*layers, *bias, *tied, **BETAS, in_bias=normal(16, INNER)))
    assert all(len(n.inputs) == 2 for n in after.graph if n.op_type == "LayerNormalization")
    assert sum(n.op_type == "Add" and "a0" in {v.name for v in n.inputs} for n in after.graph) == 1


EXPERTS = """f = Reshape(n, flat) g0 = Gemm<transB = 1>(f, router) g = Sigmoid(g0)
    y = com.microsoft.MoE<k = 2, activation_type = "swiglu", swiglu_fusion = 1, normalize_routing_weights = 1>
        (f, g0, experts_in, , experts_out)
    s = ReduceSum<keepdims = 1>(g, last) t = Mul(y, s) u = Reshape(t, whole) c = Add(u, b)"""
EXPERT_WEIGHTS = {
    "router": normal(17, 4, SIZE),
    "experts_in": normal(18, 4, 16, SIZE),
    "experts_out": normal(19, 4, SIZE, 8),
}
EXPERT_ROWS = "float[rows,12] y, float[rows,12] t"


def mixture(*changes: Change) -> ir.Model:
    return model(("c = Mul(half, b)", EXPERTS), *changes, rows=EXPERT_ROWS, **EXPERT_WEIGHTS)


def test_experts_and_their_router_take_the_rotation_in() -> None:
    before = mixture()
    assert operators(check(before)) == operators(before)


NO_PRODUCT = "reads the norm of the residual stream"
SHARED = "is read by more than one node: layers share their weights"
REFUSED: dict[str, tuple[ir.Model, str]] = {
    "a norm on what is written": (
        model(("b = Add(b0, bias)", "b = RMSNormalization(b0, bias)")),
        "node_6 (RMSNormalization) writes to the residual stream",
    ),
    "an activation on what is written": (
        model(("b = Add(b0, bias)", "b = Relu(b0)")),
        "node_6 (Relu) writes to the residual stream",
    ),
    "a product with a computed matrix": (
        model(('b0 = MatMul(a, "w_out.weight.T")', 'w = Neg("w_out.weight.T") b0 = MatMul(a, w)')),
        "node_6 (MatMul) writes to the residual stream",
    ),
    "an input of the graph": (
        model(("b = Add(b0, bias)", "b = Add(b0, fed)")),
        "fed of the residual stream has no linear layer that makes it",
    ),
    "a product of two streams": (
        model(("c = Mul(half, b)", "c = Mul(b, b)")),
        "node_7 (Mul) writes to the residual stream",
    ),
    "no norm": (
        model(("(m, ", "(r, ")),
        "node_10 (MatMul) reads the residual stream without a norm",
    ),
    "an activation reads the norm": (model(("a = Relu(a0)", "q = MatMul(n, squares) a = Add(a0, q)"),
        ("n, squares", "k, squares"), ("a0 = ", "k = Relu(n) a0 = "), squares=normal(20, SIZE, INNER)),
        f"node_3 (Relu) {NO_PRODUCT}",
    ),
    "the stream is an output": (expose(model(), "r"), "the residual stream is an output of the graph: r"),
    "a norm is an output": (
        expose(model(), "m"),
        "m, the norm of the residual stream, is an output of the graph",
    ),
    "a gain that is fed": (
        model(("(h, gain)", "(h, fed)")),
        "the norm weight or bias of node_2 is not a constant vector over the last axis",
    ),
    "a norm over two axes": (
        model(("n = RMSNormalization<axis = -1", "n = RMSNormalization<axis = 1")),
        "node_2 is not over the last axis alone, or gives more than the norm",
    ),
    "an attribute that is not known": (
        tag(model(), "RMSNormalization", "satchel_unknown", 1),
        "RMSNormalization has an attribute that this pass does not know: satchel_unknown",
    ),
    "a matrix that is read twice": (
        model(("a = Relu(a0)", 'z = Add(a0, a0) k = MatMul(n, "w_in.weight.T") a = Add(z, k)')),
        f"w_in.weight.T {SHARED}",
    ),
    "a matrix that is read elsewhere": (
        model(("a = Relu(a0)", 'z = Relu(a0) s = Shape("w_out.weight.T") a = Relu(a0)')),
        f"w_out.weight.T {SHARED}",
    ),
    "a matrix from the stream into the stream": (
        model(("c = Mul(half, b)", "d = MatMul(n, square) c = Add(b, d)"), square=normal(22, SIZE, SIZE)),
        "square both reads the residual stream and writes to it",
    ),
    "a head that scales": (
        model((TIED[0], TIED[1].replace("transB = 1", "transB = 1, alpha = 2.0"))),
        "FusedMatMul has an attribute that this pass does not know: alpha",
    ),
    "a head over another table": (
        model((TIED[0], TIED[1].replace("table", "other")), other=normal(21, VOCABULARY, SIZE)),
        "the head reads other, which is not looked up for the residual stream",
    ),
    "a router that scales": (
        mixture(("transB = 1", "transB = 1, alpha = 2.0")),
        "node_8 scales its result, or transposes in another way than by transB",
    ),
    "a stream of unknown width": (
        model(("c = Mul(half, b)", "c = com.microsoft.Mul(half, b)")),
        "r of the residual stream is not known to be 12 wide",
    ),
    "an operator of another domain": (
        model(("c = Mul(half, b)", "c = com.microsoft.Mul(half, b)"), rows="float[batch,sequence,12] c"),
        "node_7 (Mul) writes to the residual stream",
    ),
    "experts with biases": (
        mixture(("experts_in, ,", "experts_in, router,")),
        "node_10 has expert weights or biases that are not known",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_rotated_is_refused(name: str) -> None:
    before, reason = REFUSED[name]
    assert untouched(rotate_residual, before) == [reason]


def test_another_look_up_is_left_alone() -> None:
    assert untouched(rotate_residual, model(("Gather(table, input_ids)", "Gather(table, other_ids)"))) == []
