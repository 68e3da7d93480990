"""satchel:LinearAttention against numpy in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from support.kernels import equal_in_all_sets, needs_kernels, operator_session

pytestmark = needs_kernels

Feeds = dict[str, NDArray[np.float32]]
TOLERANCE = 2e-6
"""Of the largest number."""

NAMES = ["q", "k", "v", "past", "d", "b"]


def flat(array: NDArray[Any]) -> NDArray[Any]:
    """[batch, tokens, heads * width]"""
    return array.reshape(*array.shape[:2], int(np.prod(array.shape[2:])))


@dataclasses.dataclass(frozen=True)
class Rule:
    """One operator with random inputs."""

    name: str
    key_heads: int = 2
    heads: int = 2
    key_dim: int = 16
    value_dim: int = 16
    channel_decay: bool = False
    epsilon: float = 0.0
    packed: bool = False

    @property
    def gated(self) -> bool:
        return "gated" in self.name

    @property
    def delta(self) -> bool:
        return "delta" in self.name

    def feeds(self, batch: int, tokens: int, seed: int = 0, decay: float = 1.0) -> Feeds:
        rng = np.random.default_rng(seed)

        def heads(count: int, width: int) -> NDArray[Any]:
            return rng.standard_normal((batch, tokens, count, width))

        q, k = (heads(self.key_heads, self.key_dim) for _ in range(2))
        if not self.epsilon:
            k /= np.linalg.norm(k, axis=-1, keepdims=True)
        parts = {"q": q, "k": k, "v": heads(self.heads, self.value_dim)}
        if self.packed:
            parts = {"q": np.concatenate([flat(part) for part in parts.values()], -1)}
        parts["past"] = rng.standard_normal((batch, self.heads, self.key_dim, self.value_dim))
        if self.gated:
            parts["d"] = -decay * rng.exponential(
                0.3, heads(self.heads, self.key_dim if self.channel_decay else 1).shape
            )
        if self.delta:
            parts["b"] = rng.uniform(0, 1, (batch, tokens, self.heads))
        return {key: (value if key == "past" else flat(value)).astype(np.float32) for key, value in parts.items()}

    def session(self, feeds: Feeds, threads: int = 2) -> ort.InferenceSession:
        attributes = {"q_num_heads": self.key_heads, "kv_num_heads": self.heads, "scale": 0.25,
                      "update_rule": self.name, "epsilon": self.epsilon}  # fmt: skip
        names = [name if name in feeds else "" for name in NAMES]
        return operator_session("LinearAttention", attributes, names, feeds, {}, outputs=("y", "present"),
                                threads=threads)  # fmt: skip

    def expected(self, feeds: Feeds) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(out, state), token by token in float64."""
        given = {key: value.astype(np.float64) for key, value in feeds.items()}
        batch, tokens, _ = given["q"].shape
        keys = self.key_heads * self.key_dim
        q, k, v = np.split(given["q"], [keys, 2 * keys], -1) if self.packed else (given["q"], given["k"], given["v"])
        shared = self.heads // self.key_heads
        q, k = (np.repeat(x.reshape(batch, tokens, self.key_heads, -1), shared, 2) for x in (q, k))
        if self.epsilon:
            q, k = (x / np.sqrt(np.square(x).sum(-1, keepdims=True) + self.epsilon) for x in (q, k))
        state, out = given["past"].copy(), np.zeros((batch, tokens, self.heads, self.value_dim))
        for t in range(tokens):
            if self.gated:
                state *= np.exp(given["d"][:, t].reshape(batch, self.heads, -1, 1))
            new = v[:, t].reshape(batch, self.heads, -1)
            if self.delta:
                new = given["b"][:, t][..., None] * (new - np.einsum("bhkv,bhk->bhv", state, k[:, t]))
            state += np.einsum("bhk,bhv->bhkv", k[:, t], new)
            out[:, t] = 0.25 * np.einsum("bhkv,bhk->bhv", state, q[:, t])
        return out.reshape(batch, tokens, -1), state


RULES = [
    Rule("linear"),
    Rule("gated"),
    Rule("delta"),
    Rule("gated_delta"),
    Rule("gated_delta", channel_decay=True, key_dim=20),
    Rule("gated", channel_decay=True, key_heads=1, heads=4, key_dim=7, value_dim=1),
    Rule("gated", key_heads=1, heads=6, key_dim=33, value_dim=50),
    Rule("gated_delta", key_heads=2, heads=4, key_dim=128, value_dim=128, epsilon=1e-6, packed=True),
    Rule("gated_delta", key_dim=1, value_dim=3, channel_decay=True),
    Rule("delta", key_dim=24, value_dim=70, epsilon=1e-3),
]


def close(found: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    for got, wanted in zip(found, expected, strict=True):
        assert got.shape == wanted.shape
        np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 31, 32, 33, 100])
def test_each_rule_is_what_numpy_says(rule: Rule, tokens: int) -> None:
    feeds = rule.feeds(2, tokens, seed=tokens)
    close(rule.session(feeds).run(None, feeds), rule.expected(feeds))


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("cuts", [(37, 1, 2, 30), (1,) * 5 + (65,), (32, 38)], ids=str)
def test_a_prompt_in_chunks_is_what_the_whole_one_is(rule: Rule, cuts: tuple[int, ...]) -> None:
    feeds = rule.feeds(1, sum(cuts), seed=1)
    session, state, parts, start = rule.session(feeds), feeds["past"], [], 0
    for count in cuts:
        piece = {key: value[:, start : start + count] for key, value in feeds.items()} | {"past": state}
        out, state = session.run(None, piece)
        parts.append(out)
        start += count
    close([np.concatenate(parts, 1), state], rule.expected(feeds))


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("tokens", [1, 45])
def test_a_row_gets_the_same_bits_alone_and_in_a_batch_padded_or_not(rule: Rule, tokens: int) -> None:
    feeds = rule.feeds(3, tokens, seed=2)
    alone = rule.session(feeds, threads=1)
    together = rule.session(feeds).run(None, feeds)
    row = {key: value[1:2] for key, value in feeds.items()}
    for whole, part in zip(together, alone.run(None, row), strict=True):
        np.testing.assert_array_equal(whole[1:2], part)
    if tokens > 1 and rule.gated and rule.delta:  # what a pad is fed with
        row = {key: value if key == "past" else value[:, :40].copy() for key, value in row.items()}
        padded = {key: value.copy() for key, value in feeds.items()}
        padded["d"][:, 40:] = padded["b"][:, 40:] = 0
        (whole, states), (part, state) = rule.session(feeds).run(None, padded), alone.run(None, row)
        np.testing.assert_array_equal(whole[1:2, :40], part)
        np.testing.assert_array_equal(states[1:2], state)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_all_instruction_sets_give_the_same_bits(rule: Rule) -> None:
    for tokens in (1, 45):
        feeds = rule.feeds(1, tokens, seed=3)
        equal_in_all_sets(lambda feeds=feeds: rule.session(feeds).run(None, feeds))


def test_all_instruction_sets_give_the_same_bits_of_what_is_not_finite() -> None:
    rule = RULES[3]
    feeds = rule.feeds(1, 40, decay=1e4)
    feeds["d"][0, 20] = -np.inf
    feeds["v"][0, 30, 5], feeds["k"][0, 33, 2] = np.inf, np.nan
    equal_in_all_sets(lambda: rule.session(feeds).run(None, feeds))


@pytest.mark.parametrize("tokens", [1, 40])
def test_the_state_is_updated_in_place(tokens: int) -> None:
    rule = RULES[4]
    feeds = rule.feeds(2, tokens)
    wanted = rule.session(feeds).run(None, feeds)
    session = rule.session(feeds)
    binding, state = session.io_binding(), ort.OrtValue.ortvalue_from_numpy(feeds["past"].copy())
    for key, value in feeds.items():
        if key != "past":
            binding.bind_cpu_input(key, value)
    binding.bind_ortvalue_input("past", state)
    binding.bind_ortvalue_output("present", state)
    binding.bind_output("y")
    session.run_with_iobinding(binding)
    np.testing.assert_array_equal(state.numpy(), wanted[1])
    np.testing.assert_array_equal(binding.get_outputs()[1].numpy(), wanted[0])


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("decay", [50.0, 1e4])
def test_strong_decay_neither_overflows_nor_loses_digits(channels: bool, decay: float) -> None:
    rule = Rule("gated_delta", channel_decay=channels)
    feeds = rule.feeds(1, 64, decay=decay)
    feeds["d"][:, ::3] *= 1e-6  # tokens that keep nearly all, beside those that keep nothing
    feeds["d"][0, 20] = -np.inf
    close(rule.session(feeds).run(None, feeds), rule.expected(feeds))


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("name", ["q", "k", "v", "d", "b", "past"])
def test_what_is_not_finite_stays_so_in_its_own_row(name: str, tokens: int) -> None:
    rule = Rule("gated_delta")
    feeds = rule.feeds(2, tokens)
    feeds[name][(0, 0, 0)] = np.nan
    out, _ = rule.session(feeds).run(None, feeds)
    assert not np.isfinite(out[0]).all()
    assert np.isfinite(out[1]).all()


@pytest.mark.parametrize(("batch", "tokens"), [(0, 3), (2, 0)])
def test_no_tokens_leave_the_state_alone(batch: int, tokens: int) -> None:
    rule = Rule("gated_delta")
    feeds = rule.feeds(batch, tokens)
    out, state = rule.session(feeds).run(None, feeds)
    assert out.shape == (batch, tokens, 32)
    np.testing.assert_array_equal(state, feeds["past"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": (1, 3, 31)}, "query"),
        ({"q": (1, 96)}, "query"),
        ({"k": (1, 2, 32)}, "query, key and value"),
        ({"v": (1, 3, 33)}, "query, key and value"),
        ({"past": (1, 2, 16)}, "past"),
        ({"past": (1, 3, 16, 16)}, "past"),
        ({"past": (2, 2, 16, 16)}, "past"),
        ({"past": (1, 2, 0, 16)}, "past"),
        ({"past": (1, 2, 4097, 1)}, "past"),
        ({"d": (1, 3, 3)}, "decay"),
        ({"d": (1, 2, 2)}, "decay"),
        ({"b": (1, 3, 1)}, "beta"),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_refused(changed: dict[str, tuple[int, ...]], message: str) -> None:
    rule = Rule("gated_delta")
    feeds = rule.feeds(1, 3)
    feeds |= {name: np.zeros(shape, np.float32) for name, shape in changed.items()}
    with pytest.raises(Exception, match=f"satchel:LinearAttention: .*{message}"):
        rule.session(feeds).run(None, feeds)


@pytest.mark.parametrize("left_out", ["past", "d", "b", "k"])
def test_inputs_that_the_rule_needs_are_refused_if_absent(left_out: str) -> None:
    rule = Rule("gated_delta")
    feeds = rule.feeds(1, 3)
    del feeds[left_out]
    with pytest.raises(Exception, match="satchel:LinearAttention"):
        rule.session(feeds).run(None, feeds)


@pytest.mark.parametrize(
    "rule",
    [Rule("gated", key_heads=3), Rule("other"), Rule("gated", key_heads=0), Rule("gated", epsilon=-1.0)],
    ids=str,
)
def test_attributes_that_do_not_fit_are_refused(rule: Rule) -> None:
    feeds = Rule("gated_delta").feeds(1, 3)
    with pytest.raises(Exception, match="satchel:LinearAttention: invalid"):
        rule.session(feeds)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("tokens", [2, 3, 8, 33])
def test_rows_over_one_state_are_the_next_tokens_bit_for_bit(rule: Rule, tokens: int) -> None:
    given = rule.feeds(1, tokens, seed=tokens)
    rows = {
        name: value if name == "past" else np.ascontiguousarray(value.swapaxes(0, 1)) for name, value in given.items()
    }
    together, last = rule.session(rows).run(None, rows)
    state = given["past"]
    for token in range(tokens):
        step = {name: np.ascontiguousarray(value[:, token : token + 1]) for name, value in given.items()} | {
            "past": state
        }
        out, state = rule.session(step).run(None, step)
        np.testing.assert_array_equal(together[token], out[0])
    np.testing.assert_array_equal(last, state)
