"""lower_experts: a mixture of experts becomes ONNX Runtime's operator and keeps its own weights."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support.graphs import build, experts, fired, normal, operators, run, tag, untouched

from satchel.graphs.passes.fuse.lower_experts import lower_experts

TOKENS, HIDDEN, INNER, EXPERTS = 5, 8, 12, 7
GATE_UP, DOWN = normal(1, EXPERTS, 2 * INNER, HIDDEN), normal(2, EXPERTS, HIDDEN, INNER)
TEXT = """(float[tokens,8] hidden, int64[tokens,{k}] index, float[tokens,{k}] weights) => (float[tokens,8] y)
    <float[tokens,8] mixed> {{
    mixed = satchel.Experts(hidden, index, weights, gate_up, down)
    y = Neg(mixed)
}}"""


def mixture(k: int = 2, *changes: tuple[str, str]) -> ir.Model:
    return build(TEXT.format(k=k), *changes, gate_up=GATE_UP, down=DOWN)


def feeds(k: int, total: float | None = None, tokens: int = TOKENS) -> dict[str, np.ndarray]:
    """Each token's experts in no order, their weights summing up to `total` or to anything."""
    random = np.random.default_rng(3)
    weights = random.uniform(0.05, 1, (tokens, k)).astype(np.float32)
    if total is not None:
        weights *= np.float32(total) / weights.sum(1, keepdims=True)
    index = np.stack([random.permutation(EXPERTS)[:k] for _ in range(tokens)])
    return {"hidden": normal(4, tokens, HIDDEN), "index": index, "weights": weights}


@pytest.mark.parametrize("total", [1.0, None, 2.5], ids=["weights that sum to 1", "any weights", "scaled weights"])
@pytest.mark.parametrize("k", [1, 2, 3, EXPERTS])
def test_the_lowered_mixture_is_the_plain_one(k: int, total: float | None) -> None:
    given = feeds(k, total)
    after = fired(lower_experts, mixture(k), 1).model
    assert operators(after)["com.microsoft::MoE"] == 1
    wanted = -experts(**given, gate_up=GATE_UP, down=DOWN)
    np.testing.assert_allclose(run(after, given)["y"], wanted, rtol=1e-5, atol=1e-5)  # sums of some hundred products


COMPUTED = ("mixed = satchel", "other = Neg({0}) mixed = satchel")


@pytest.mark.parametrize("name", ["gate_up", "down"])
def test_expert_weights_that_are_computed_are_refused(name: str) -> None:
    arguments = "gate_up, down)"
    model = mixture(2, (COMPUTED[0], COMPUTED[1].format(name)), (arguments, arguments.replace(name, "other")))
    (reason,) = untouched(lower_experts, model)
    assert "not constants" in reason


def test_an_unknown_number_of_experts_per_token_is_refused() -> None:
    (reason,) = untouched(lower_experts, mixture(2, ("[tokens,2] index", "[tokens,k] index")))
    assert "experts per token is not known" in reason


def test_an_unknown_attribute_is_refused() -> None:
    (reason,) = untouched(lower_experts, tag(mixture(), "Experts", "activation", "gelu"))
    assert "activation" in reason
