"""lower_recurrence: each kind of linear recurrence keeps its state, and goes on where it stopped."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support.graphs import build, fired, normal, recurrence, run, tag, the, untouched

from satchel.graphs.passes.fuse.lower_recurrence import lower_recurrence

TOKENS, HEADS, KEY_DIM, VALUE_DIM = 7, 4, 5, 3
TEXT = """(float[batch,sequence,{groups},5] q, float[batch,sequence,{groups},5] k, float[batch,sequence,4,3] v,
    float[batch,sequence,{decay}] d, float[batch,sequence,4] b) => (float[batch,sequence,4,3] y)
    <float[batch,sequence,4,3] r> {{ r = satchel.Recurrence<layer = 2, scale = 0.5>(q, k, v{inputs}) y = Neg(r) }}"""
RULES = {"linear": (False, False), "gated": (True, False), "delta": (False, True), "gated_delta": (True, True)}


def graph(rule: str = "gated_delta", groups: int = HEADS, decay: str = "4") -> ir.Model:
    inputs = "".join(
        part if there else "," for part, there in zip((", d", ", b"), RULES[rule], strict=True)
    ).rstrip(",")  # fmt: skip
    return build(TEXT.format(groups=groups, decay=decay, inputs=inputs))


def feeds(groups: int, decay: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Two rows; keys of length 1, decay below 0, beta between 0 and 1."""
    key = normal(2, 2, TOKENS, groups, KEY_DIM)
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    return {
        "q": normal(1, 2, TOKENS, groups, KEY_DIM), "k": key, "v": normal(3, 2, TOKENS, HEADS, VALUE_DIM),
        "d": -np.abs(normal(4, 2, TOKENS, *decay)), "b": 1 / (1 + np.exp(-normal(5, 2, TOKENS, HEADS))),
    }  # fmt: skip


@pytest.mark.parametrize("cuts", [(7,), (1, 1, 5)], ids=str)
@pytest.mark.parametrize("decay", [(4,), (4, 5)], ids=["a decay of each head", "of each channel"])
@pytest.mark.parametrize("groups", [HEADS, 2, 1])
@pytest.mark.parametrize("rule", RULES)
def test_chunks_give_what_the_recurrence_says(
    rule: str, groups: int, decay: tuple[int, ...], cuts: tuple[int, ...]
) -> None:
    given = feeds(groups, decay)
    after = fired(lower_recurrence, graph(rule, groups, ",".join(map(str, decay))), 1, keeps_signature=False).model
    past, parts = np.zeros((2, HEADS, KEY_DIM, VALUE_DIM), np.float32), []
    start = 0
    for count in cuts:
        piece = {name: array[:, start : start + count] for name, array in given.items()}
        outputs = run(after, {**piece, "past.2.recurrent": past})
        parts.append(outputs["y"])
        past, start = outputs["present.2.recurrent"], start + count
    gated, corrected = RULES[rule]
    for row in range(2):
        q, k, v, d, b = (array[row] for array in given.values())
        wanted = -recurrence(q, k, v, d if gated else None, b if corrected else None, 0.5)
        np.testing.assert_allclose(np.concatenate(parts, 1)[row], wanted, rtol=1e-4, atol=1e-5)


def test_the_operator_is_named_after_its_layer() -> None:
    assert the(lower_recurrence(graph()).model, "LinearAttention").name == "recurrence.2"


@pytest.mark.parametrize(("groups", "fact"), [(3, "3 key heads"), ("n", "not known")])
def test_heads_that_do_not_divide_or_are_not_known_are_refused(groups: int | str, fact: str) -> None:
    (reason,) = untouched(lower_recurrence, build(TEXT.format(groups=groups, decay="4", inputs=", d, b")))
    assert fact in reason


def test_an_unknown_attribute_is_refused() -> None:
    (reason,) = untouched(lower_recurrence, tag(graph(), "Recurrence", "mode", "chunk"))
    assert "mode" in reason
