"""quantize_experts: a mixture of experts over codes is the one over what the codes stand for."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from support.codes import rounded, values
from support.graphs import build, experts, fired, normal, operators, run, serialized, tag, the, untouched

from satchel.graphs.ir.values import weight
from satchel.graphs.passes.fuse.lower_experts import lower_experts
from satchel.graphs.passes.quantize.quantize_experts import quantize_experts
from satchel.graphs.quant.quantized import QuantizedWeight

TOKENS, HIDDEN, INNER, EXPERTS = 5, 96, 32, 7
GATE_UP, DOWN = normal(1, EXPERTS, 2 * INNER, HIDDEN) / 8, normal(2, EXPERTS, HIDDEN, INNER) / 4
TEXT = """(float[tokens,96] hidden, float[tokens,7] router) => (float[tokens,96] y) <float[tokens,96] m> {
    m = com.microsoft.MoE <k=2, activation_type="swiglu", swiglu_fusion=1, activation_alpha=1.0, activation_beta=0.0,
        normalize_routing_weights=1> (hidden, router, gate_up, , down)
    y = Neg(m)
}"""
FEEDS = {"hidden": normal(3, TOKENS, HIDDEN), "router": normal(4, TOKENS, EXPERTS)}
Pair = dict[str, QuantizedWeight]


def mixture(*changes: tuple[str, str], **stacks: np.ndarray) -> ir.Model:
    return build(TEXT, *changes, **{"gate_up": GATE_UP, "down": DOWN, **stacks})


def pair(bits: int = 8, block: int | None = 32, symmetric: bool = True) -> Pair:
    arrays = {"gate_up": GATE_UP, "down": DOWN}
    return {name: rounded(name, array, bits, block, symmetric) for name, array in arrays.items()}


def plain(codes: Pair, *changes: tuple[str, str], **biases: np.ndarray) -> ir.Model:
    """The mixture in float over what the codes stand for."""
    gate_up, down = values(codes["gate_up"], *GATE_UP.shape), values(codes["down"], *DOWN.shape)
    return mixture(*changes, gate_up=gate_up, down=down, **biases)


def in_float(model: ir.Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """The model's y from a session that does not pack weights: the operator multiplies in float there."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_prepacking", "1")
    return ort.InferenceSession(serialized(model), options, providers=["CPUExecutionProvider"]).run(["y"], feeds)[0]


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("block", [16, 32, None])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_mixture_is_that_of_what_the_codes_stand_for(bits: int, block: int | None, symmetric: bool) -> None:
    codes = pair(bits, block, symmetric)
    after = fired(quantize_experts(codes), mixture(), 1).model
    assert operators(after) == {"com.microsoft::QMoE": 1, "Neg": 1}
    wanted = run(plain(codes), FEEDS)["y"]
    np.testing.assert_allclose(in_float(after, FEEDS), wanted, rtol=1e-5, atol=1e-5)  # sums of some hundred products
    error = np.linalg.norm(run(after, FEEDS)["y"] - wanted) / np.linalg.norm(wanted)
    assert error < 0.02, "int8 activations cost about a percent"


@pytest.mark.parametrize("block", [32, None])
def test_exact_mixtures_of_4_bits_do_not_round_their_input(block: int | None) -> None:
    codes = pair(4, block)
    after = fired(quantize_experts(codes, exact={"gate_up", "down"}), mixture(), 1).model
    np.testing.assert_allclose(run(after, FEEDS)["y"], run(plain(codes), FEEDS)["y"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero points"])
def test_biases_and_the_form_of_the_gate_are_kept(symmetric: bool) -> None:
    codes = pair(8, 32, symmetric)
    biases = {"b1": normal(5, EXPERTS, 2 * INNER), "b2": normal(6, EXPERTS, HIDDEN)}
    changes = (
        ("(hidden, router, gate_up, , down)", "(hidden, router, gate_up, b1, down, b2)"),
        ("activation_beta=0.0", "activation_beta=1.0, swiglu_limit=0.5"),
    )
    after = fired(quantize_experts(codes), mixture(*changes, **biases), 1).model
    wanted = run(plain(codes, *changes, **biases), FEEDS)["y"]
    np.testing.assert_allclose(in_float(after, FEEDS), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [1, 2, EXPERTS])
def test_a_lowered_mixture_keeps_its_own_weights(k: int) -> None:
    text = f"""(float[tokens,96] hidden, int64[tokens,{k}] index, float[tokens,{k}] weights) => (float[tokens,96] y)
        <float[tokens,96] m> {{ m = satchel.Experts(hidden, index, weights, gate_up, down) y = Neg(m) }}"""
    random = np.random.default_rng(5)
    index = np.stack([random.permutation(EXPERTS)[:k] for _ in range(TOKENS)])
    shares = random.uniform(0.05, 1, (TOKENS, k)).astype(np.float32)
    lowered = lower_experts(build(text, gate_up=GATE_UP, down=DOWN)).model
    stack = weight(the(lowered, "MoE").inputs[2])
    assert stack is not None
    codes = {"gate_up.interleaved": rounded("gate_up.interleaved", stack.numpy()), "down": rounded("down", DOWN)}
    after = fired(quantize_experts(codes), lowered, 1).model
    gates = values(codes["gate_up.interleaved"], EXPERTS, INNER, 2, HIDDEN).swapaxes(1, 2).reshape(GATE_UP.shape)
    given = {"hidden": FEEDS["hidden"], "index": index, "weights": shares}
    wanted = -experts(**given, gate_up=gates, down=values(codes["down"], *DOWN.shape))
    np.testing.assert_allclose(in_float(after, given), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        ("normalize_routing_weights=1", "normalize_routing_weights=1, swiglu_limit=0.5"),
        ("k=2", "k=3"),
        ("activation_alpha=1.0, activation_beta=0.0", "activation_alpha=1.7, activation_beta=1.0"),
    ],
    ids=lambda change: change[1],
)
def test_attributes_are_carried_over(change: tuple[str, str]) -> None:
    codes = pair()
    after = fired(quantize_experts(codes), mixture(change), 1).model
    wanted = run(plain(codes, change), FEEDS)["y"]
    assert np.abs(wanted - run(plain(codes), FEEDS)["y"]).max() > 1e-3, "the attribute changes nothing here"
    np.testing.assert_allclose(in_float(after, FEEDS), wanted, rtol=1e-5, atol=1e-5)


def test_two_mixtures_over_the_same_stacks_share_the_codes() -> None:
    settings = 'k=1, activation_type="swiglu", swiglu_fusion=1, normalize_routing_weights=1'
    second = f"n = com.microsoft.MoE <{settings}> (hidden, router, gate_up, , down)"
    after = fired(quantize_experts(pair()), mixture(("y = Neg(m)", f"{second} y = Sub(m, n)")), 2).model
    first, other = (node for node in after.graph if node.op_type == "QMoE")
    assert all(a is b for a, b in zip(first.inputs, other.inputs, strict=True))


NONE = ("y = Neg(m)", "y = Neg(m)")
NORMALIZE = "normalize_routing_weights=1"


@pytest.mark.parametrize(
    ("codes", "change", "reason"),
    [
        (pair() | {"gate_up": rounded("gate_up", GATE_UP, 4)}, NONE, "are stored as"),
        (pair() | {"gate_up": rounded("gate_up", GATE_UP, 8, 16)}, NONE, "are stored as"),
        (pair() | {"gate_up": rounded("gate_up", GATE_UP, symmetric=False)}, NONE, "are stored as"),
        (pair() | {"down": rounded("down", GATE_UP)}, NONE, "another shape"),
        ({"gate_up": pair()["gate_up"]}, NONE, "only one"),
        ({"down": pair()["down"]}, NONE, "only one"),
        (pair(), ("gate_up, , down)", "gate_up, , down, , gate_up)"), "third stack"),
        (pair(), (NORMALIZE, "normalize_routing_weights=0"), "sum of 1"),
        (pair(), (NORMALIZE, "swiglu_limit=100.0"), "sum of 1"),
    ],
    ids=["bits", "blocks", "zero points", "shape", "gate and up alone", "down alone", "a third stack",
         "weights as they are", "weights as they are by default"],
)  # fmt: skip
def test_what_the_kernel_does_not_take_is_refused(codes: Pair, change: tuple[str, str], reason: str) -> None:
    (found,) = untouched(quantize_experts(codes), mixture(change))
    assert reason in found


def test_rows_of_half_bytes_are_refused() -> None:
    odd = {"gate_up": normal(1, 2, 6, 9), "down": normal(2, 2, 9, 3)}
    codes = {name: rounded(name, array, 4, None) for name, array in odd.items()}
    (reason,) = untouched(quantize_experts(codes), mixture(gate_up=odd["gate_up"], down=odd["down"]))
    assert "no whole bytes" in reason


def test_an_unknown_attribute_is_refused() -> None:
    (reason,) = untouched(quantize_experts(pair()), tag(mixture(), "MoE", "use_sparse_mixer", 1))
    assert "use_sparse_mixer" in reason


def test_mixtures_in_float_are_left_alone() -> None:
    assert untouched(quantize_experts({}), mixture()) == []
    assert untouched(quantize_experts(pair()), build("(float[3] x) => (float[3] y) { y = Neg(x) }")) == []
