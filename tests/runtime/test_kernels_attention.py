"""satchel's Attention operator, against numpy's float64 and against GroupQueryAttention."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from support.attention_node import INPUTS, PASTS, SCALES, Array, Step, added, attend, expected, open_node, over, packed
from support.attention_steps import PRECISION, STEPS, precision_of
from support.kernels import equal_in_all_sets, needs_kernels

pytestmark = needs_kernels

CACHES = ("float32", "float16", "int8")


def assert_close(found: Array, wanted: Array, precision: float = PRECISION) -> None:
    assert np.abs(found - wanted).max() <= precision * np.abs(wanted).max()


def assert_rounded(step: Step, feeds: dict[str, Array], *caches: Array) -> None:
    """The cache has what was there before, and for new numbers the nearest of the type, but for an error of float32."""
    for name, cache, exact in zip(PASTS, caches, added(step, feeds), strict=True):
        for row, past in enumerate(step.pasts):
            assert np.array_equal(cache[row, :, :past], feeds[name][row, :, :past])
            found = cache[row, :, past : past + step.tokens].astype(np.float64)
            if step.int8:
                assert np.abs(found - exact[row].clip(-128, 127)).max() <= 0.5 + 1e-4
            else:  # 11 significant bits
                assert (np.abs(found - exact[row]) <= 2.0**-11 * np.abs(exact[row]) + 1e-6).all()


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_numbers_are_those_of_float64(step: Step) -> None:
    feeds = step.feeds()
    y, keys, values = attend(step, feeds)
    assert_close(y, over(step, feeds, keys, values), precision_of(step))
    if step.cache != "float32":
        assert_rounded(step, feeds, keys, values)
        return
    wanted, wanted_keys, wanted_values = expected(step, feeds)
    assert_close(y, wanted, precision_of(step))
    for row, past in enumerate(step.pasts):
        written = (row, slice(None), slice(past + step.tokens))
        assert_close(keys[written], wanted_keys[written])
        assert np.array_equal(values[written], wanted_values[written])


@pytest.mark.parametrize(
    "name",
    [name for name, step in STEPS.items() if step.head_dim % 16 == 0 and step.rotary != 22 and step.cache != "float16"],
)
def test_numbers_are_those_of_group_query_attention(name: str) -> None:
    step = STEPS[name]
    feeds = step.feeds()
    theirs, found = attend(step, feeds, domain="com.microsoft"), attend(step, feeds)
    assert_close(found[0], theirs[0], precision_of(step))
    for row, past in enumerate(step.pasts if step.int8 else ()):
        for own, wanted in zip(found[1:], theirs[1:], strict=True):
            assert np.array_equal(own[row, :, : past + step.tokens], wanted[row, :, : past + step.tokens])


def test_halves_are_rounded_to_even_and_what_is_beyond_is_clipped() -> None:
    step = Step(heads=1, kv_heads=1, cache="int8", spare=0)
    numbers = np.asarray([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 1e9, -128.5, -129, np.inf, -np.inf], np.float32)
    feeds = step.feeds() | {name: np.full((1, 1, 1, 64), 0.25, np.float32) for name in SCALES}
    for name in ("key", "value"):
        feeds[name] = np.resize(numbers / 4, (1, 1, 64))
    wanted = np.resize(np.asarray([0, 2, 2, 0, -2, 126, 127, 127, -128, -128, 127, -128], np.int8), 64)
    for domain in ("satchel", "com.microsoft"):
        for cache in attend(step, feeds, domain)[1:]:
            assert np.array_equal(cache[0, 0, 0], wanted), domain


def test_float16_is_rounded_to_even_and_what_is_beyond_is_its_largest() -> None:
    step = Step(heads=1, kv_heads=1, cache="float16", spare=0)
    draw = np.random.default_rng(1)
    most, small = np.float32(65504), np.float32(2) ** -24  # the largest, and the smallest above zero
    odd = [most, -most, 65519, small, small / 2, small * 1.5, small * 2.5, 2**-14 - small / 4, 0]
    every = draw.integers(0, 1 << 32, 4000, np.uint32).view(np.float32)
    between = (draw.integers(0, 0x7BFF, 4000, np.uint16).view(np.float16).astype(np.float32)) * np.float32(1 + 2.0**-11)
    numbers = np.concatenate([np.asarray(odd, np.float32), every[np.isfinite(every)], between])
    numbers = numbers[: len(numbers) // 64 * 64]
    feeds = dataclasses.replace(step, tokens=len(numbers) // 64).feeds() | {
        "key": numbers.reshape(1, -1, 64), "value": np.flip(numbers).reshape(1, -1, 64).copy()
    }  # fmt: skip
    wanted = numbers.clip(-65504, 65504).astype(np.float16).reshape(-1, 64)

    def caches() -> list[Array]:
        return attend(step, feeds)[1:]

    keys, values = caches()
    assert np.array_equal(keys[0, 0].view(np.uint16), wanted.view(np.uint16))
    assert np.array_equal(np.flip(values[0, 0]).view(np.uint16), wanted.view(np.uint16))
    equal_in_all_sets(caches)


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_all_instruction_sets_give_the_same_bits(step: Step) -> None:
    """All but AMX, whose tiles attend to prompts; the caches are the same there, too."""
    feeds = step.feeds()
    equal_in_all_sets(lambda: attend(step, feeds)[1:])
    equal_in_all_sets(lambda: attend(step, feeds)[:1], but="amx" if step.tokens > 1 else "")


@pytest.mark.parametrize("cache", ["", "float16: ", "int8: "])
@pytest.mark.parametrize("name", ["decode over several ranges", "chunk over a past", "prompt of several rows"])
def test_packed_inputs_and_other_numbers_of_threads_give_the_same(name: str, cache: str) -> None:
    step = STEPS[cache + name]
    feeds = step.feeds()
    wanted = attend(step, feeds, threads=1)
    for found in (attend(step, feeds, threads=3), attend(step, packed(feeds), threads=2)):
        assert all(map(np.array_equal, found, wanted))


@pytest.mark.parametrize("cache", CACHES)
def test_rows_of_a_batch_are_what_they_are_alone(cache: str) -> None:
    step = Step(past=(1030, 3, 0, 129), rotary=64, heads=9, kv_heads=3, cache=cache)
    feeds = step.feeds()
    together = attend(step, feeds)[0]
    for row, past in enumerate(step.pasts):
        alone = {
            name: array if name in ("cos", "sin", *SCALES) else array[row : row + 1]
            for name, array in feeds.items()
            if array.ndim
        }
        alone["total_sequence_length"] = np.asarray(past + 1, np.int32)
        assert np.array_equal(attend(dataclasses.replace(step, past=past), alone)[0][0], together[row])


@pytest.mark.parametrize("options", [{}, {"window": 100}, {"rotary": 0}, {"cache": "float16"}, {"cache": "int8"}])
def test_rows_of_one_cache_are_the_next_tokens_of_one_sequence(options: dict[str, Any]) -> None:
    """Bit for bit what one token after another gives, here over a boundary between ranges of keys."""
    count, past = 5, 254
    step = Step(past=tuple(range(past, past + count)), **{"rotary": 64, "heads": 9, "kv_heads": 3, **options})
    feeds = step.feeds()
    keys, values = (feeds[name][:1].copy() for name in ("past_key", "past_value"))
    expected = []
    for row in range(count):
        alone = {name: feeds[name][row : row + 1] for name in ("query", "key", "value", "seqlens_k")}
        alone |= {name: feeds[name] for name in ("cos", "sin", *SCALES) if name in feeds}
        alone |= {"past_key": keys, "past_value": values}
        alone["total_sequence_length"] = np.asarray(past + row + 1, np.int32)
        y, keys, values = attend(dataclasses.replace(step, past=past + row), alone)
        expected.append(y[0])
    caches = [feeds[name][:1].copy() for name in ("past_key", "past_value")]
    session = open_node(step, tuple(feeds))
    binding = session.io_binding()
    for name, array in feeds.items():
        if not name.startswith("past"):
            binding.bind_cpu_input(name, array)
    for side, cache in zip(("key", "value"), caches, strict=True):
        for bind, name in ((binding.bind_input, f"past_{side}"), (binding.bind_output, f"present_{side}")):
            bind(name, "cpu", 0, cache.dtype, cache.shape, cache.ctypes.data)
    binding.bind_output("y")
    session.run_with_iobinding(binding)
    assert np.array_equal(binding.get_outputs()[-1].numpy(), np.stack(expected))
    for found, wanted in zip(caches, (keys, values), strict=True):
        assert np.array_equal(found[:, :, : past + count], wanted[:, :, : past + count])


@pytest.mark.parametrize("cache", CACHES)
def test_a_prompt_in_chunks_is_what_it_is_whole(cache: str) -> None:
    step = Step(tokens=300, rotary=64, window=150, cache=cache)
    feeds = step.feeds()
    whole, keys, _ = attend(step, feeds)
    found = []
    for start, end in ((0, 7), (7, 100), (100, 298), (298, 300)):
        part = {name: feeds[name][:, start:end] for name in ("query", "key", "value")}
        part["seqlens_k"], part["total_sequence_length"] = np.asarray([end - 1], np.int32), np.asarray(end, np.int32)
        y, feeds["past_key"], feeds["past_value"] = attend(step, feeds | part)
        found.append(y)
    assert np.array_equal(np.concatenate(found, axis=1), whole)
    assert np.array_equal(feeds["past_key"][:, :, :300], keys[:, :, :300])


def bound(session: ort.InferenceSession, feeds: dict[str, Array], outputs: dict[str, Array]) -> ort.IOBinding:
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    for name, array in outputs.items():
        binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    return binding


@pytest.mark.parametrize("cache", ["", "float16: ", "int8: "])
@pytest.mark.parametrize("name", ["decode of rows of different lengths", "chunk over a past"])
def test_a_cache_bound_twice_is_written_in_place(name: str, cache: str) -> None:
    step = STEPS[cache + name]
    feeds = step.feeds()
    wanted = attend(step, feeds)
    before = feeds["past_key"].copy()
    y = np.empty_like(feeds["query"])
    outputs = {"y": y, "present_key": feeds["past_key"], "present_value": feeds["past_value"]}
    session = open_node(step, tuple(feeds))
    session.run_with_iobinding(bound(session, feeds, outputs))
    assert np.array_equal(y, wanted[0])
    for row, past in enumerate(step.pasts):
        end = past + step.tokens
        assert np.array_equal(feeds["past_key"][row, :, :end], wanted[1][row, :, :end])
        assert np.array_equal(feeds["past_key"][row, :, end:], before[row, :, end:]), "what comes after is not touched"


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("past", [0, 10])
def test_a_cache_in_other_memory_is_copied_and_grows(past: int, cache: str) -> None:
    step = Step(tokens=5, past=past, rotary=64, cache=cache)
    feeds = step.feeds()
    wanted = attend(step, feeds)
    for name in ("past_key", "past_value"):
        feeds[name] = feeds[name][:, :, :past]
    y, keys, values = attend(step, feeds)
    end = past + 5
    assert np.array_equal(y, wanted[0])
    assert keys.shape[2] == end
    assert np.array_equal(keys, wanted[1][:, :, :end]) and np.array_equal(values, wanted[2][:, :, :end])
    assert not wanted[1][:, :, end:].any(), "what comes after is empty"


def changed(step: Step, **arrays: Any) -> tuple[Step, dict[str, Array]]:
    """A step with some of its inputs replaced: by the result of a function of them, or taken out by None."""
    feeds = step.feeds()
    for name, change in arrays.items():
        if change is None:
            del feeds[name]
        else:
            feeds[name] = np.asarray(change(feeds[name]), feeds[name].dtype)
    return step, feeds


BLOCKS = STEPS["chunk in the second block of angles"]
INT8 = STEPS["int8: chunk over a past"]
CHUNK, DECODE = STEPS["chunk over a past"], STEPS["decode of rows of different lengths"]

BAD = {
    "width of the query": (changed(CHUNK, query=lambda x: x[..., :-1]), "query is not [batch, tokens"),
    "no tokens": (changed(CHUNK, query=lambda x: x[:, :0], key=lambda x: x[:, :0], value=lambda x: x[:, :0]), "zero"),
    "key of another width": (changed(CHUNK, key=lambda x: x[..., :64]), "key and value do not"),
    "key without value": (changed(CHUNK, value=None), "key and value do not"),
    "past of another width": (changed(CHUNK, past_key=lambda x: x[..., :32]), "the past is not"),
    "past of fewer heads": (changed(CHUNK, past_key=lambda x: x[:, :1], past_value=lambda x: x[:, :1]), "past is not"),
    "past of fewer rows": (changed(DECODE, past_key=lambda x: x[:2], past_value=lambda x: x[:2]), "the past is not"),
    "one past for all, not in place": (
        changed(DECODE, past_key=lambda x: x[:1], past_value=lambda x: x[:1]),
        "share memory",
    ),
    "one past for all, of several tokens": (
        changed(Step(tokens=4, past=(5, 5)), past_key=lambda x: x[:1], past_value=lambda x: x[:1]),
        "single tokens",
    ),
    "no past": (changed(CHUNK, past_key=None), "the past is not"),
    "one length for all rows": (changed(DECODE, seqlens_k=lambda x: x[:1]), "one number for each row"),
    "length below zero": (changed(DECODE, seqlens_k=lambda x: x - 1000), "seqlens_k is not within"),
    "length below the new tokens": (changed(CHUNK, seqlens_k=lambda x: x * 0 + 10), "below the number of new tokens"),
    "total below the new tokens": (changed(CHUNK, total_sequence_length=lambda x: 10), "below the number of new"),
    "past that is not there": (
        changed(CHUNK, seqlens_k=lambda x: x + 100, total_sequence_length=lambda x: x + 100),
        "beyond the past's capacity",
    ),
    "chunks of several rows": (changed(Step(tokens=4, past=(5, 5))), "batch size 1"),
    "tables too wide": (changed(CHUNK, cos=lambda x: np.tile(x, 2), sin=lambda x: np.tile(x, 2)), "rotary tables"),
    "tables too short": (changed(CHUNK, cos=lambda x: x[:382], sin=lambda x: x[:382]), "beyond the rotary tables"),
    "a row beyond the tables": (changed(BLOCKS, rows=lambda x: x + 10), "beyond the rotary tables"),
    "a row before the tables": (changed(BLOCKS, rows=lambda x: x - 600), "beyond the rotary tables"),
    "rows of another length": (changed(BLOCKS, rows=lambda x: x[:, 1:]), "position_ids are not [batch, tokens]"),
    "heads too wide": (changed(Step(head_dim=520)), "512"),
    "negative cap": (changed(dataclasses.replace(CHUNK, softcap=-1.0)), "softcap"),
    "int8 without scales": (changed(INT8, key_scale=None, value_scale=None), "a cache in int8 has scales"),
    "int8 with scales of keys only": (changed(INT8, value_scale=None), "the scales of the cache are not"),
    "scales of other heads": (changed(INT8, key_scale=lambda x: x[:, :1]), "the scales of the cache are not"),
    "scales of another width": (changed(INT8, value_scale=lambda x: x[..., :1]), "the scales of the cache are not"),
    "floats with scales": (
        (CHUNK, CHUNK.feeds() | {name: INT8.feeds()[name] for name in SCALES}),
        "one of floats has none",
    ),
    "infinite scale": (changed(dataclasses.replace(CHUNK, scale=np.inf)), "scale"),
}


@pytest.mark.parametrize(("case", "message"), BAD.values(), ids=BAD)
def test_what_does_not_fit_is_refused(case: tuple[Step, dict[str, Array]], message: str) -> None:
    with pytest.raises(Exception, match=re.escape(message)):
        attend(*case)


@pytest.mark.parametrize("own", [range(4), range(1, 4), range(2, 6)])
@pytest.mark.parametrize("name", ["decode over several ranges", "int8: chunk over a past", "prompt of several rows"])
def test_some_of_the_heads_are_what_they_are_among_all(name: str, own: range) -> None:
    step = STEPS[name]
    feeds, size = packed(step.feeds()), step.head_dim
    whole, found = attend(step, feeds), attend(dataclasses.replace(step, own=own), feeds)
    assert np.array_equal(found[0], whole[0][..., own.start * size : own.stop * size])
    assert all(map(np.array_equal, found[1:], whole[1:]))


@pytest.mark.parametrize("own", [range(-1, 2), range(0), range(5, 8)])
def test_heads_that_are_not_there_are_refused(own: range) -> None:
    with pytest.raises(Exception, match="own_heads"):
        open_node(dataclasses.replace(CHUNK, own=own), INPUTS)


@pytest.mark.parametrize(("heads", "kv_heads"), [(5, 2), (0, 0), (-6, -2), (1 << 40, 1 << 20)])
def test_heads_that_do_not_go_together_are_refused(heads: int, kv_heads: int) -> None:
    with pytest.raises(Exception, match="num_heads"):
        open_node(dataclasses.replace(CHUNK, heads=heads, kv_heads=kv_heads), INPUTS)


def test_a_prompt_is_attended_on_a_thread_with_a_small_stack() -> None:
    """Threads of musl have 128 KiB; here 192 KiB, since Python needs some of it."""
    code = """
import threading
from support.attention_node import Step, open_node
step = Step(tokens=70, past=10, head_dim=512)
feeds = step.feeds()
session = open_node(step, tuple(feeds), threads=1)
threading.stack_size(192 * 1024)
results = []
thread = threading.Thread(target=lambda: results.append(session.run(None, feeds)))
thread.start()
thread.join()
print(len(results))
"""
    tests = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tests)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
