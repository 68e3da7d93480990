"""Sequences that are decoded together give what each gives alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.tiny_bundle import read_manifest, write_bundle, write_manifest

from satchel.runtime.errors import PromptError
from satchel.runtime.execution.batch import Batch
from satchel.runtime.execution.cpu import CpuState
from satchel.runtime.execution.engine import Engine
from satchel.runtime.execution.state import State
from satchel.runtime.ort.open_bundle import open_bundle

LENGTHS = (13, 1, 7)


def filled(engine: Engine, rows: Batch, lengths: tuple[int, ...] = LENGTHS) -> list[State]:
    """Prompts of these lengths in rows, and in states of their own; those."""
    rng, states = np.random.default_rng(3), []
    for length in lengths:
        ids = rng.integers(0, engine.vocabulary, length)
        states.append(engine.new_state(30))
        expected = engine.prefill(states[-1], ids)
        np.testing.assert_array_equal(engine.prefill(rows.add(), ids), expected)
    return states


def check_steps(engine: Engine, rows: Batch, states: list[State], steps: int) -> None:
    """Feed both the same tokens, and compare."""
    rng = np.random.default_rng(5)
    for tokens in rng.integers(0, engine.vocabulary, (steps, len(states))):
        rows.decode(tokens.tolist())
        found = rows.logits[: len(states)]
        assert found.shape == (len(states), engine.vocabulary)
        for logits, state, token in zip(found, states, tokens, strict=True):
            np.testing.assert_allclose(logits, engine.decode(state, int(token)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dropped", [0, 1, 2])
def test_rows_give_what_each_gives_alone_also_after_one_is_dropped(engine: Engine, dropped: int) -> None:
    rows = engine.new_batch(3, 30)
    states = filled(engine, rows)
    check_steps(engine, rows, states, 3)
    assert [state.cache.length for state in rows.states] == [length + 3 for length in LENGTHS]
    rows.drop(dropped)
    states[dropped] = states[-1]
    states.pop()
    assert len(rows) == 2
    check_steps(engine, rows, states, 3)


def test_rows_that_were_exchanged_go_on(engine: Engine) -> None:
    rows = engine.new_batch(3, 30)
    first, second, third = filled(engine, rows)
    rows.exchange(0, 2)
    rows.exchange(1, 1)
    for row, state in zip(rows.states, (third, second, first), strict=True):
        assert row.cache.length == state.cache.length
        np.testing.assert_array_equal(row.logits, state.logits)
    check_steps(engine, rows, [third, second, first], 3)
    rows.states[0].cache.clear()
    rows.exchange(0, 2)
    assert rows.states[2].cache.length == 0
    check_steps(engine, rows, [first, second], 3)


def test_a_copied_row_goes_its_own_way(engine: Engine) -> None:
    rows = engine.new_batch(2, 30)
    (state,) = filled(engine, rows, (9,))
    twin = engine.new_state(30)
    twin.cache.copy_from(state.cache, 9)
    rows.add()
    rows.copy(0, 1)
    np.testing.assert_array_equal(rows.states[1].logits, rows.states[0].logits)
    check_steps(engine, rows, [state, twin], 4)


def test_a_copy_may_leave_out_what_is_there_already(engine: Engine) -> None:
    rows = engine.new_batch(2, 30)
    (state,) = filled(engine, rows, (5,))
    rows.add()
    rows.copy(0, 1)
    rows.decode([1, 2])
    for cache in (rows.states[0].cache, state.cache):
        for buffer in cache.past.values():
            buffer[:, :, :5] += 1  # what a copy from 5 on does not see
    rows.copy(0, 1, start=5)
    assert rows.states[1].cache.length == 6
    for first, second in zip(*(rows.states[i].cache.past.values() for i in (0, 1)), strict=True):
        np.testing.assert_array_equal(first[:, :, 5], second[:, :, 5])
        assert (first[:, :, :5] != second[:, :, :5]).any()


def test_rows_that_are_full_say_so(engine: Engine) -> None:
    rows = engine.new_batch(2, 4)
    filled(engine, rows, (4, 2))
    with pytest.raises(PromptError, match=r"all 2 rows are in use"):
        rows.add()
    with pytest.raises(PromptError, match=r"4 \+ 1 tokens do not fit 4 positions"):
        rows.decode([1, 2])
    with pytest.raises(PromptError, match="token id 400 is outside the vocabulary"):
        rows.decode([1, 400])
    assert [state.cache.length for state in rows.states] == [4, 2]
    with pytest.raises(PromptError, match=r"--batch 0: must be 1 or more"):
        engine.new_batch(0, 4)


def engine_of(folder: Path, change: Callable[[dict], None] = lambda document: None) -> Engine:
    document = read_manifest(folder)
    change(document)
    write_manifest(folder, document)
    return Engine.open(open_bundle(folder), threads=1)


def test_a_graph_whose_rows_change_each_other_is_not_batch_invariant(tmp_path: Path) -> None:
    mixed = engine_of(write_bundle(tmp_path / "mixed", rows_mix=1e-3))
    assert not mixed.batch_invariant
    rows = mixed.new_batch(2, 30)
    check_steps(mixed, rows, filled(mixed, rows, (5, 9)), 3)  # so each is decoded alone


def test_rounding_in_another_order_keeps_batch_invariance(tmp_path: Path, engine: Engine) -> None:
    assert engine.batch_invariant
    assert engine_of(write_bundle(tmp_path / "rounded", rows_mix=1e-7)).batch_invariant


def test_rows_run_together_if_forced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = engine_of(write_bundle(tmp_path / "mixed", rows_mix=1e-3))
    rows = mixed.new_batch(2, 30, force=True)
    filled(mixed, rows, (5, 9))
    monkeypatch.setattr(CpuState, "decode", lambda state, token: pytest.fail("decoded alone"))
    rows.decode([1, 2])


def test_rows_of_a_fixed_batch_are_decoded_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fix_rows(document: dict) -> None:
        document["graphs"]["decode"]["inputs"][0]["shape"] = [1, 1]

    fixed = engine_of(write_bundle(tmp_path / "fixed"), fix_rows)
    assert not fixed.batch_invariant
    with pytest.raises(PromptError, match="takes a fixed number of rows"):
        fixed.new_batch(2, 30, force=True)
    alone: list[int] = []
    decode = CpuState.decode
    rows = fixed.new_batch(3, 30)
    for state, expected in zip(rows.states, filled(fixed, rows), strict=True):
        assert state.cache.length == expected.cache.length
    monkeypatch.setattr(CpuState, "decode", lambda state, token: alone.append(token) or decode(state, token))
    rows.decode([7, 8, 9])
    assert alone == [7, 8, 9]
    assert len({row.tobytes() for row in rows.logits}) == 3
