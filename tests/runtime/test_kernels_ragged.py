"""Tokens of several sequences in one row: satchel's operators against numpy's float64, and against dense runs."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.attention_node import PASTS, RAGGED_INPUTS, SCALES, Array, Step, attend, open_node, over, packed
from support.attention_steps import precision_of
from support.kernels import Product, needs_kernels, operator_session
from support.native_ops import LastToken, Positions

pytestmark = needs_kernels


@dataclasses.dataclass(frozen=True)
class Mix:
    """Sequences of (past, new) tokens with one kind of attention, in scattered blocks of `block` positions."""

    sequences: tuple[tuple[int, int], ...]
    step: Step = dataclasses.field(default_factory=lambda: Step(rotary=64))
    block: int = 16

    def alone(self, row: int) -> tuple[Step, dict[str, Array]]:
        """A sequence as a dense step."""
        past, new = self.sequences[row]
        step = dataclasses.replace(self.step, past=past, tokens=new)
        feeds = step.feeds(seed=row)
        if self.step.rotary:  # one table for all
            angles = np.random.default_rng(9).uniform(0, 6, (2000, self.step.rotary // 2)).astype(np.float32)
            feeds |= {"cos": np.cos(angles), "sin": np.sin(angles)}
        if self.step.block:
            feeds["rows"] = feeds["rows"] % 2000
        if self.step.int8:  # and one of scales
            feeds |= {name: self.step.feeds()[name] for name in SCALES}
        return step, feeds

    def feeds(self, seed: int = 0) -> dict[str, Array]:
        """All sequences as one ragged step. Blocks that no sequence has, and positions beyond its last, are NaN.

        In int8, which has none, they are drawn.
        """
        draw, feeds = np.random.default_rng(seed), [self.alone(row)[1] for row in range(len(self.sequences))]
        counts = [-(-(past + new) // self.block) for past, new in self.sequences]
        blocks = sum(counts) + 3
        order = draw.permutation(blocks).tolist()
        table = np.full((len(counts), max(counts) + 1), -1, np.int32)
        shape = (blocks, self.step.kv_heads, self.block, self.step.head_dim)
        if self.step.int8:
            pools = {name: draw.integers(-128, 128, shape, np.int8) for name in PASTS}
        else:
            pools = {name: np.full(shape, np.nan, self.step.cache) for name in PASTS}
        for row, (past, _) in enumerate(self.sequences):
            first = 0 if self.step.window < 1 else max(0, past + 1 - self.step.window)
            for index in range(first // self.block, counts[row]):
                table[row, index] = order.pop()
            for position in range(first, past):
                at = table[row, position // self.block], slice(None), position % self.block
                for name, pool in pools.items():
                    pool[at] = feeds[row][name][0, :, position]
        joined = {
            n: np.concatenate([f[n] for f in feeds], 1) for n in ("query", "key", "value", "rows") if n in feeds[0]
        }
        joined |= {name: feeds[0][name] for name in ("cos", "sin", *SCALES) if name in feeds[0]}
        offsets = np.cumsum([0, *(new for _, new in self.sequences)], dtype=np.int32)
        lengths = np.asarray([past + new - 1 for past, new in self.sequences], np.int32)
        total = np.asarray(1, np.int32)
        ends = {"seqlens_k": lengths, "total_sequence_length": total, "row_offsets": offsets, "block_table": table}
        return joined | pools | ends

    def run(self, feeds: dict[str, Array], threads: int = 2) -> tuple[Array, dict[str, Array]]:
        """(y, the pools that were written in place)."""
        names = tuple(name for name in RAGGED_INPUTS if name in feeds)
        session = open_node(self.step, names, threads=threads)
        pools = {name: feeds[name].copy() for name in PASTS}
        binding = session.io_binding()
        for name in names:
            array = pools.get(name, feeds[name])
            assert array.flags.c_contiguous
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, pool in pools.items():
            binding.bind_output(name.replace("past", "present"), "cpu", 0, pool.dtype, pool.shape, pool.ctypes.data)
        binding.bind_output("y", "cpu")
        session.run_with_iobinding(binding)
        return binding.get_outputs()[-1].numpy(), pools


INT8, HALF = Step(rotary=64, cache="int8"), Step(rotary=64, cache="float16")
MIXES = {
    "single tokens": Mix(((40, 1), (0, 1), (700, 1), (15, 1), (16, 1))),
    "pieces": Mix(((0, 50), (33, 2), (200, 130))),
    "both": Mix(((40, 1), (0, 70), (129, 1), (95, 2), (1030, 1), (3, 300))),
    "larger blocks": Mix(((40, 1), (0, 70), (129, 1), (95, 2), (1030, 1), (64, 300)), block=64),
    "a window": Mix(((500, 1), (40, 30), (150, 130), (99, 1), (700, 3)), Step(rotary=64, window=100)),
    "a window below a block": Mix(((500, 1), (40, 30)), Step(window=5), block=32),
    "a cap": Mix(((300, 1), (60, 60)), Step(softcap=5.0, scale=0.5)),
    "one head to a key head": Mix(((77, 1), (9, 9), (513, 1)), Step(heads=3, kv_heads=3, head_dim=128)),
    "an odd width": Mix(((50, 1), (31, 65)), Step(heads=7, kv_heads=1, head_dim=37, rotary=10, interleaved=True)),
    "two blocks of angles": Mix(((50, 1), (31, 65)), Step(rotary=64, block=800)),
    "many": Mix(tuple((29 * i, 1 + 7 * (i % 3 == 0)) for i in range(40)), Step(rotary=64, heads=9, kv_heads=3)),
    "float16": Mix(((40, 1), (0, 70), (129, 1), (95, 2), (1030, 1), (3, 300)), HALF),
    "float16 of an odd width": Mix(((50, 1), (31, 65)), Step(heads=7, kv_heads=1, head_dim=37, cache="float16")),
    "int8": Mix(((40, 1), (0, 70), (129, 1), (95, 2), (1030, 1), (3, 300)), INT8),
    "int8 in larger blocks": Mix(((40, 1), (0, 70), (1030, 1), (64, 300)), INT8, block=64),
    "int8 in a window": Mix(((500, 1), (150, 130), (99, 1)), dataclasses.replace(INT8, window=100)),
    "int8 of an odd width": Mix(((50, 1), (31, 65)), Step(heads=7, kv_heads=1, head_dim=37, cache="int8")),
}


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("form", ["apart", "packed"])
def test_each_sequence_is_what_it_is_alone(mix: Mix, form: str) -> None:
    feeds = mix.feeds()
    y, pools = mix.run(packed(feeds) if form == "packed" else feeds)
    table, start, left = feeds["block_table"], 0, {name: feeds[name].copy() for name in PASTS}
    for row, (past, new) in enumerate(mix.sequences):
        step, own = mix.alone(row)
        wanted, keys, values = attend(step, own, threads=1)
        np.testing.assert_array_equal(y[0, start : start + new], wanted[0])
        for position in range(past, past + new):
            at = table[row, position // mix.block], slice(None), position % mix.block
            np.testing.assert_array_equal(pools["past_key"][at], keys[0, :, position])
            np.testing.assert_array_equal(pools["past_value"][at], values[0, :, position])
            for name in PASTS:
                left[name][at] = pools[name][at]
        exact = over(step, own, keys, values)
        assert np.abs(y[0, start : start + new] - exact).max() <= precision_of(step) * np.abs(exact).max()
        start += new
    for name in PASTS:
        np.testing.assert_array_equal(pools[name], left[name], err_msg="something else was written")


@pytest.mark.parametrize("name", ["both", "float16", "int8"])
def test_threads_and_places_make_no_difference(name: str) -> None:
    mix = MIXES[name]
    wanted = mix.run(mix.feeds(), threads=1)[0]
    for threads, seed in ((3, 0), (2, 1)):
        np.testing.assert_array_equal(mix.run(mix.feeds(seed), threads)[0], wanted)


@pytest.mark.parametrize("cache", ["float32", "float16", "int8"])
def test_rows_over_the_same_blocks_are_the_next_tokens_of_one_sequence(cache: str) -> None:
    mix = Mix(((250, 8),), Step(rotary=64, heads=9, kv_heads=3, cache=cache))
    feeds = mix.feeds()
    ahead = feeds | {
        "row_offsets": np.arange(9, dtype=np.int32),
        "block_table": np.repeat(feeds["block_table"], 8, 0),
        "seqlens_k": np.arange(250, 258, dtype=np.int32),
    }
    y, _ = mix.run(ahead)
    pools: dict[str, Array] = {}
    for token in range(8):
        one = {name: feeds[name][:, token : token + 1] for name in ("query", "key", "value")}
        one |= {"row_offsets": np.asarray([0, 1], np.int32), "seqlens_k": np.asarray([250 + token], np.int32)}
        found, pools = mix.run(feeds | one | pools)
        np.testing.assert_array_equal(y[0, token], found[0, 0])


def change(**changes: Callable[[Array], Any]) -> dict[str, Array]:
    feeds = MIXES["both"].feeds()
    return feeds | {name: np.ascontiguousarray(edit(feeds[name])) for name, edit in changes.items()}


def put(*place: int, value: int) -> Callable[[Array], Array]:
    def edit(array: Array) -> Array:
        array = array.copy()
        array[place] = value
        return array

    return edit


BAD = {
    "a block beyond the pool": (change(block_table=put(5, 3, value=1000)), "a block that the cache does not have"),
    "a block that is missing": (change(block_table=put(4, 0, value=-1)), "a block that the cache does not have"),
    "a table that is too short": (change(block_table=lambda x: x[:, :-2]), "fewer blocks than seqlens_k"),
    "a table of other sequences": (change(block_table=lambda x: x[:-1]), "block_table is not [sequences, blocks]"),
    "an empty table": (change(block_table=lambda x: x[:, :0]), "block_table is not [sequences, blocks]"),
    "a table of one dimension": (change(block_table=lambda x: x[0]), "block_table is not [sequences, blocks]"),
    "offsets that fall": (change(row_offsets=put(2, value=0)), "row_offsets do not ascend"),
    "offsets out of the row": (change(row_offsets=put(2, value=1 << 30)), "row_offsets do not ascend"),
    "offsets below the row": (change(row_offsets=put(0, value=-5)), "row_offsets do not ascend"),
    "offsets of too few tokens": (change(row_offsets=put(6, value=370)), "row_offsets do not ascend"),
    "one offset": (change(row_offsets=lambda x: x[:1]), "row_offsets are not [sequences + 1]"),
    "offsets of two dimensions": (change(row_offsets=lambda x: x[None]), "row_offsets are not [sequences + 1]"),
    "lengths of other sequences": (change(seqlens_k=lambda x: x[:-1]), "one number for each row"),
    "a negative length": (change(seqlens_k=put(0, value=-1)), "seqlens_k"),
    "a length below the new tokens": (change(seqlens_k=put(1, value=60)), "below the number of new tokens"),
    "a length beyond the table": (change(seqlens_k=put(0, value=1 << 30)), "rotary tables"),
    "blocks of 24 positions": (
        change(past_key=lambda x: x.repeat(2, 2)[:, :, :24], past_value=lambda x: x.repeat(2, 2)[:, :, :24]),
        "power of two",
    ),
    "blocks of 8 positions": (
        change(past_key=lambda x: x[:, :, :8], past_value=lambda x: x[:, :, :8]), "power of two"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("feeds", "message"), BAD.values(), ids=BAD)
def test_what_does_not_fit_is_refused(feeds: dict[str, Array], message: str) -> None:
    with pytest.raises(Exception, match=re.escape(message)):
        MIXES["both"].run(feeds)


def test_a_length_beyond_the_table_is_refused_without_rotation() -> None:
    mix = Mix(((40, 1), (3, 9)), Step(window=5))
    feeds = mix.feeds()
    with pytest.raises(Exception, match="fewer blocks than seqlens_k"):
        mix.run(feeds | {"seqlens_k": np.asarray([1 << 30, 11], np.int32)})


def test_several_rows_of_tokens_and_pools_in_other_memory_are_refused() -> None:
    mix = Mix(((40, 1), (3, 9)), Step())
    feeds = mix.feeds()
    twice = {name: np.concatenate([feeds[name]] * 2) for name in ("query", "key", "value")}
    with pytest.raises(Exception, match="all new tokens are in one row"):
        mix.run(feeds | twice)
    with pytest.raises(Exception, match="share memory"):
        open_node(mix.step, tuple(name for name in RAGGED_INPUTS if name in feeds)).run(None, feeds)


PRODUCTS = [
    Product(96, 64, epsilon=1e-5, optional="gbr"),
    Product(64, 2 * 48, gate="silu"),
    Product(128, 50, hadamard=32),
    Product(128, 50, bits=4, block=64, optional="b"),
]
COUNTS = (1, 1, 3, 1, 200, 2, 1, 1, 1, 99, 1)


@pytest.mark.parametrize("product", PRODUCTS, ids=str)
def test_a_linear_layer_quantizes_each_sequence_as_alone(product: Product) -> None:
    feeds = product.feeds(sum(COUNTS), seed=2)
    offsets = np.cumsum([0, *COUNTS], dtype=np.int32)
    names = [*product.names, *[""] * (7 - len(product.names)), "row_offsets"]
    together = feeds | {"row_offsets": offsets}
    session = operator_session("Linear", product.attributes, names, together, product.constants(0))
    found = session.run(None, together)[0]
    alone = product.session(0, feeds, threads=1)
    for start, end in itertools.pairwise(offsets):
        wanted = alone.run(None, {name: value[:, start:end] for name, value in feeds.items()})[0]
        np.testing.assert_array_equal(found[:, start:end], wanted)
    for bad in (offsets[::-1].copy(), offsets[:-1].copy(), offsets + 1, np.zeros(1, np.int32)):
        with pytest.raises(Exception, match="row_offsets do not ascend"):
            session.run(None, feeds | {"row_offsets": bad})


@pytest.mark.parametrize("rows", [(5, 3), (1, 7), ()], ids=str)
def test_positions_and_last_tokens_are_what_numpy_says(rows: tuple[int, ...]) -> None:
    """Of rows that are padded or have a past, and of ragged ones."""
    draw, offsets = np.random.default_rng(1), np.asarray([0, 2, 3, 9], np.int32)
    if rows:
        tokens, lengths = rows, draw.integers(1, 12, (rows[0], 1))
        extra: dict[str, Array] = {}
    else:
        tokens, lengths, extra = (1, 9), np.asarray([[2], [8], [40]]), {"row_offsets": offsets}
    first = draw.integers(0, 50, lengths.shape)
    feeds = {"input_ids": np.zeros(tokens, np.int64), "lengths": lengths, **extra, "first": first}
    names = ["input_ids", "lengths", "row_offsets" if extra else "", "first"]
    session = operator_session("Positions", {}, names, feeds, {}, kind=7)
    (wanted,) = Positions._run(None, feeds["input_ids"], lengths, extra.get("row_offsets"), first)  # type: ignore[arg-type]
    np.testing.assert_array_equal(session.run(None, feeds)[0], wanted)
    x = {"x": draw.standard_normal((*tokens, 24)).astype(np.float32), "lengths": lengths, **extra}
    session = operator_session("LastToken", {}, list(x), x, {})
    (wanted,) = LastToken._run(None, *x.values())  # type: ignore[arg-type]
    np.testing.assert_array_equal(session.run(None, x)[0], wanted)
    with pytest.raises(Exception, match="one length for each sequence"):
        session.run(
            None, x | {"lengths": lengths[:-1]} if len(lengths) > 1 else x | {"lengths": np.zeros((2, 1), np.int64)}
        )
    if extra:
        with pytest.raises(Exception, match="row_offsets do not ascend"):
            session.run(None, x | {"row_offsets": offsets[[0, 2, 1, 3]]})
    else:
        with pytest.raises(Exception, match="has no token"):
            session.run(None, x | {"lengths": lengths * 0})
