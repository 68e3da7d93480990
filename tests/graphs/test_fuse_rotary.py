"""fuse_rotary: rotations written as arithmetic become RotaryEmbedding, or stay as they are."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support.graphs import (
    build,
    fired,
    normal,
    operators,
    rotated,
    rotation_tables,
    run,
    tag,
    the,
    untouched,
)

from satchel.graphs.passes.fuse.fuse_rotary import fuse_rotary

BATCH, HEADS, SEQUENCE, WIDTH, WHOLE, POSITIONS = 2, 3, 5, 10, 14, 17
CONSTANTS = """int64[1] axis1 = {1}, int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] half = {5},
    int64[1] third = {4}, int64[1] width = {10}, int64[1] end = {9223372036854775807}, int64[1] last = {-1},
    int64[1] axis3 = {3}, int64[2] halves = {5, 5}, int64[2] parts = {10, 4}, int64[4] flat = {0, 0, 0, 10}"""
HEAD = f"(float[batch,3,sequence,10] x, int64[batch,sequence] p) => (float[batch,3,sequence,10] y) <{CONSTANTS}>"
ANGLES = """
    cosines{n} = Gather(cos, p)
    sines{n} = Gather(sin, p)
    c{n} = Unsqueeze(cosines{n}, axis1)
    s{n} = Unsqueeze(sines{n}, axis1)
"""
HALVES = """
    low{n} = Slice({x}, zero, half, last)
    high{n} = Slice({x}, half, end, last)
    minus{n} = Neg(high{n})
    turned{n} = Concat<axis = -1>(minus{n}, low{n})
"""
PAIRS = """
    even{n} = Slice({x}, zero, end, last, two)
    odd{n} = Slice({x}, one, end, last, two)
    minus{n} = Neg(odd{n})
    first{n} = Unsqueeze(minus{n}, last)
    second{n} = Unsqueeze(even{n}, last)
    pairs{n} = Concat<axis = -1>(first{n}, second{n})
    turned{n} = Reshape(pairs{n}, flat)
"""
SUM = """
    plain{n} = Mul({x}, c{n})
    sine{n} = Mul(turned{n}, s{n})
    r{n} = Add(plain{n}, sine{n})
"""
END = " y = Identity(r) "
PARTS = {"halves": HALVES, "pairs": PAIRS}
HEAD_WITH_OTHERS = HEAD.replace(
    " p)", " p, float[batch,3,sequence,10] other, int64[batch,sequence] q, float[17,10] given)"
)
# Each row starts somewhere else in the table, one at its very end.
FEEDS = {
    "x": normal(1, BATCH, HEADS, SEQUENCE, WIDTH),
    "p": np.stack([np.arange(SEQUENCE) + 2, np.arange(SEQUENCE) + POSITIONS - SEQUENCE]),
}


def nodes(kind: str = "halves", x: str = "x", n: str = "") -> str:
    """The nodes that rotate `x` into r; `n` is put behind all their names."""
    return (ANGLES + PARTS[kind] + SUM).format(x=x, n=n)


def rotation(kind: str = "halves", old: str = "", new: str = "", head: str = HEAD, **tables: np.ndarray) -> ir.Model:
    """A rotation of x by its tables, with one piece of its text replaced."""
    cos, sin = rotation_tables(2, POSITIONS, WIDTH, kind == "pairs")
    return build(f"{head} {{ {nodes(kind)} {END} }}", (old, new), **({"cos": cos, "sin": sin} | tables))


@pytest.mark.parametrize("kind", PARTS)
def test_the_fused_rotation_is_the_published_one(kind: str) -> None:
    cos, sin = rotation_tables(2, POSITIONS, WIDTH, kind == "pairs")
    found = run(fired(fuse_rotary, rotation(kind), 1).model, FEEDS)["y"]
    for row in range(BATCH):
        place = FEEDS["p"][row]
        halves = (slice(None), slice(None, None, 2) if kind == "pairs" else slice(WIDTH // 2))
        wanted = rotated(FEEDS["x"][row], cos[place][halves], sin[place][halves], kind == "pairs")
        np.testing.assert_allclose(found[row], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            "low = Slice(x, zero, half, last)\n    high = Slice(x, half, end, last)",
            "low, high = Split<axis = -1>(x, halves)",
        ),
        ("Add(plain, sine)", "Add(sine, plain)"),
        ("Mul(x, c)", "Mul(c, x)"),
        ("Mul(turned, s)", "Mul(s, turned)"),
        ("int64[1] axis1 = {1}", "int64[1] axis1 = {-3}"),
        ("int64[1] last = {-1}", "int64[1] last = {3}"),
    ],
)
def test_every_spelling_of_the_same_rotation_fuses(old: str, new: str) -> None:
    after = fired(fuse_rotary, rotation("halves", old, new), 1, feeds=FEEDS).model
    assert operators(after) == {"RotaryEmbedding": 1, "Identity": 1}


PARTIAL = HEAD.replace("sequence,10", "sequence,14").replace(" x,", " whole,")
CUT = "x = Slice(whole, zero, width, last) rest = Slice(whole, width, end, last)"
JOIN = " joined = Concat<axis = -1>(r, rest) y = Identity(joined) "
PARTIAL_FEEDS = {**FEEDS, "whole": normal(3, BATCH, HEADS, SEQUENCE, WHOLE)}


def partial(cut: str = CUT, join: str = JOIN, head: str = PARTIAL) -> ir.Model:
    cos, sin = rotation_tables(2, POSITIONS, WIDTH)
    return build(f"{head} {{ {cut} {nodes()} {join} }}", cos=cos, sin=sin)


@pytest.mark.parametrize("cut", [CUT, "x, rest = Split<axis = -1>(whole, parts)"], ids=["slices", "split"])
def test_a_rotation_of_the_first_channels_takes_in_the_rest(cut: str) -> None:
    after = fired(fuse_rotary, partial(cut), 1, feeds=PARTIAL_FEEDS).model
    assert operators(after) == {"RotaryEmbedding": 1, "Identity": 1}
    assert the(after, "RotaryEmbedding").attributes["rotary_embedding_dim"].value == WIDTH


@pytest.mark.parametrize(
    ("cut", "join"),
    [
        (CUT, " joined = Concat<axis = -1>(rest, r) y = Identity(joined) "),
        (CUT, " n = Neg(rest) joined = Concat<axis = -1>(r, n) y = Identity(joined) "),
        (
            "x = Slice(whole, third, end, last) rest = Slice(whole, zero, third, last)",
            " joined = Concat<axis = -1>(r, rest) y = Identity(joined) ",
        ),
        (CUT, " joined = Concat<axis = -1>(r, rest) t = Concat<axis = -1>(rest, r) y = Add(joined, t) "),
    ],
    ids=["rest first", "rest changed", "last channels", "two readers"],
)
def test_other_joins_stay_outside_the_rotation(cut: str, join: str) -> None:
    after = fired(fuse_rotary, partial(cut, join), 1, feeds=PARTIAL_FEEDS).model
    assert operators(after)["Concat"] >= 1
    assert the(after, "RotaryEmbedding").attributes["rotary_embedding_dim"].value == 0


@pytest.mark.parametrize(
    ("kind", "old", "new", "reason"),
    [
        ("halves", "half = {5}", "half = {4}", "the rotated halves"),
        ("halves", "Concat<axis = -1>(minus, low)", "Concat<axis = -1>(minus, high)", "the rotated halves"),
        ("halves", "Neg(high)", "Neg(low)", "the rotated halves"),
        ("pairs", "Neg(odd)", "Neg(even)", "the rotated pairs"),
        ("pairs", "x, one, end, last, two", "x, zero, end, last, two", "the rotated pairs"),
        ("pairs", "Concat<axis = -1>(first", "Concat<axis = 3>(first", "not laid side by side"),
        ("pairs", "minus, last)", "minus, axis3)", "not laid side by side"),
        ("halves", "int64[1] axis1 = {1}", "int64[1] axis1 = {2}", "not spread over the head axis"),
        ("halves", "int64[1] axis1 = {1}", "int64[1] axis1 = {0}", "not spread over the head axis"),
    ],
    ids=["uneven", "one half twice", "the other half negative", "the other channel negative", "one channel twice",
         "pairs joined as halves", "pairs spread otherwise", "tables over the sequence", "tables over the batch"],
)  # fmt: skip
def test_channels_that_turn_otherwise_are_refused(kind: str, old: str, new: str, reason: str) -> None:
    reasons = untouched(fuse_rotary, rotation(kind, old, new))
    assert reasons
    assert all(reason in found for found in reasons)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Concat<axis = -1>(minus, low)", "Concat<axis = -1>(low, minus)"),
        ("minus = Neg(high)", "minus = Abs(high)"),
        ("Mul(x, c)", "Mul(other, c)"),
        ("Add(plain, sine)", "Sub(plain, sine)"),
        ("Gather(sin, p)", "Gather(sin, q)"),
        ("Gather(sin, p)", "Gather(given, p)"),
    ],
    ids=["swapped", "not negative", "another operand", "backwards", "other positions", "no table"],
)
def test_arithmetic_that_is_no_rotation_is_left_alone(old: str, new: str) -> None:
    assert untouched(fuse_rotary, rotation("halves", old, new, HEAD_WITH_OTHERS)) == []


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("name", ["cos", "sin"])
def test_tables_that_differ_between_the_two_channels_are_refused(kind: str, name: str) -> None:
    tables = dict(zip(("cos", "sin"), rotation_tables(2, POSITIONS, WIDTH, kind == "pairs"), strict=True))
    tables[name][-1, 0] += 1
    (reason,) = untouched(fuse_rotary, rotation(kind, **tables))
    assert reason == f"the table {name} is not the same for the two channels that rotate together"


def test_a_table_wider_than_the_rotation_is_refused() -> None:
    wide = np.ones((POSITIONS, 2 * WIDTH), np.float32)
    cut = "cut = Slice(cosines, zero, width, last)\n    c = Unsqueeze(cut, axis1)"
    assert untouched(fuse_rotary, rotation("halves", "c = Unsqueeze(cosines, axis1)", cut, cos=wide)) == []


def test_positions_without_a_batch_are_refused() -> None:
    # Heads behind the sequence: [batch, sequence, heads, width], where a table [sequence, 1, width] fits as well.
    head = HEAD.replace("batch,3,sequence,10", "batch,sequence,3,10").replace("[batch,sequence] p", "[sequence] p")
    assert untouched(fuse_rotary, rotation(head=head)) == ["the positions are not [batch, sequence]"]


def test_a_rotation_without_a_head_axis_is_refused() -> None:
    model = rotation(head=HEAD.replace("batch,3,sequence,10", "3,sequence,10"))
    assert untouched(fuse_rotary, model) == ["the rotated value is not [batch, heads, sequence, head_dim]"]


def test_a_look_up_with_an_unknown_attribute_is_refused() -> None:
    (reason,) = untouched(fuse_rotary, tag(rotation(), "Gather", "novelty", 1))
    assert "novelty" in reason
