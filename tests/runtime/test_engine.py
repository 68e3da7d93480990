"""The step layer: prefill, decode and score agree, and the cache is written in place."""

from __future__ import annotations

import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose
from support.tiny_bundle import MAX_CONTEXT, VOCABULARY, change_manifest

from satchel.runtime.errors import PromptError
from satchel.runtime.execution.engine import Engine
from satchel.runtime.execution.kv_cache import position_bytes
from satchel.runtime.execution.spans import chunks
from satchel.runtime.ort.open_bundle import open_bundle

IDS = np.random.default_rng(1).integers(3, VOCABULARY, 40)
TOLERANCE = 1e-5


def whole(engine: Engine, ids: np.ndarray) -> np.ndarray:
    return engine.prefill(engine.new_state(MAX_CONTEXT), ids).copy()


def assert_same_logits(found: np.ndarray, expected: np.ndarray) -> None:
    assert_allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize("chunk", [1, 7, 16, 39])
def test_prefill_in_chunks_gives_the_logits_of_the_whole_prompt(engine: Engine, chunk: int) -> None:
    chunked = engine.prefill(engine.new_state(MAX_CONTEXT), IDS, chunk)
    assert_same_logits(chunked, whole(engine, IDS))


def test_decoding_one_by_one_gives_the_logits_of_a_prefill_at_every_step(engine: Engine) -> None:
    state = engine.new_state(MAX_CONTEXT)
    for count, token in enumerate(IDS, start=1):
        assert_same_logits(engine.decode(state, int(token)), whole(engine, IDS[:count]))
    assert state.cache.length == len(IDS)


def test_prefill_continues_what_was_decoded(engine: Engine) -> None:
    state = engine.new_state(len(IDS))
    engine.prefill(state, IDS[:10])
    engine.decode(state, int(IDS[10]))
    assert_same_logits(engine.prefill(state, IDS[11:], chunk=8), whole(engine, IDS))


def test_different_prompts_give_different_logits(engine: Engine) -> None:
    other = IDS.copy()
    other[0] += 1
    assert np.abs(whole(engine, other) - whole(engine, IDS)).max() > 0.01


@pytest.mark.parametrize("chunk", [9, 256])
def test_score_gives_at_every_position_the_logits_of_a_prefill_up_to_it(engine: Engine, chunk: int) -> None:
    scores = engine.score(IDS, chunk)
    assert scores.shape == (len(IDS), VOCABULARY)
    assert scores.dtype == np.float32
    for position in (0, 8, 9, 39):
        assert_same_logits(scores[position], whole(engine, IDS[: position + 1]))


def test_the_graphs_write_into_the_buffers_of_the_state(engine: Engine) -> None:
    state = engine.new_state(MAX_CONTEXT)
    pairs = list(zip(state.cache.past.values(), state.cache.present.values(), strict=True))
    assert all(past is present for past, present in pairs)
    engine.prefill(state, IDS[:5])
    first = [past[:, :, :5].copy() for past, _ in pairs]
    for past, _ in pairs:
        assert np.abs(past[:, :, :5]).min() > 0
        assert not past[:, :, 5:].any()
    engine.decode(state, 7)
    for (past, _), before in zip(pairs, first, strict=True):
        assert np.abs(past[:, :, 5]).min() > 0
        assert not past[:, :, 6:].any()
        assert (past[:, :, :5] == before).all()


def test_every_step_writes_its_logits_into_one_buffer(engine: Engine) -> None:
    state = engine.new_state(8)
    prefilled = engine.prefill(state, IDS[:3])
    before = prefilled.copy()
    decoded = engine.decode(state, 9)
    assert decoded is prefilled is state.logits
    assert not np.array_equal(decoded, before)


def test_decoding_allocates_no_arrays(engine: Engine) -> None:
    state = engine.new_state(MAX_CONTEXT)
    engine.prefill(state, IDS[:3])
    engine.decode(state, 9)
    tracemalloc.start()
    for token in range(10, 20):
        engine.decode(state, token)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.5 * state.logits.nbytes  # 1.0 are Python's own objects; a copy of the logits would make it 2.0


def test_a_state_is_not_disturbed_by_the_steps_of_another(engine: Engine) -> None:
    one, other = engine.new_state(MAX_CONTEXT), engine.new_state(MAX_CONTEXT)
    engine.prefill(one, IDS[:20])
    engine.prefill(other, IDS[20:])
    for token in IDS[20:]:
        engine.decode(one, int(token))
        engine.decode(other, 5)
    assert_same_logits(one.logits, whole(engine, IDS))


def test_a_full_cache_says_what_to_change_and_keeps_its_length(engine: Engine) -> None:
    state = engine.new_state(5)
    engine.prefill(state, IDS[:5])
    with pytest.raises(PromptError, match=r"context is full: 5 \+ 1 .* 5 positions.*--max-context .*64.*shorten"):
        engine.decode(state, 3)
    assert state.cache.length == 5


def test_a_prefill_that_does_not_fit_feeds_nothing(engine: Engine) -> None:
    state = engine.new_state(5)
    with pytest.raises(PromptError, match="context is full"):
        engine.prefill(state, IDS[:6], chunk=2)
    assert state.cache.length == 0
    assert not any(buffer.any() for buffer in state.cache.past.values())


@pytest.mark.parametrize("token", [-1, VOCABULARY, 2**70, np.uint64(2**63 + 5)])
def test_a_token_outside_the_vocabulary_is_refused_by_its_number(engine: Engine, token: int) -> None:
    expected = f"token id {int(token)} is outside the vocabulary: use ids from 0 to {VOCABULARY - 1}"
    for step in (
        lambda: engine.prefill(engine.new_state(4), [token]),
        lambda: engine.decode(engine.new_state(4), token),
        lambda: engine.score([token]),
    ):
        with pytest.raises(PromptError, match=expected):
            step()


def test_a_prompt_without_tokens_is_refused(engine: Engine) -> None:
    with pytest.raises(PromptError, match="no tokens: give at least one"):
        engine.prefill(engine.new_state(4), [])


@pytest.mark.parametrize("capacity", [0, MAX_CONTEXT + 1])
def test_a_capacity_that_the_bundle_does_not_allow_is_refused(engine: Engine, capacity: int) -> None:
    with pytest.raises(
        PromptError, match=f"{capacity} positions is not possible: .* 1 to {MAX_CONTEXT}: ask for fewer"
    ):
        engine.new_state(capacity)


def test_one_session_serves_both_phases_where_the_manifest_says_so(tiny: Path, tmp_path: Path, engine: Engine) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "bundle"))
    change_manifest(folder, "graphs", "decode", "session_of", to="prefill")
    shared = Engine.open(open_bundle(folder), threads=1)
    assert shared.sessions[1] is shared.sessions[0]
    assert engine.sessions[1] is not engine.sessions[0]
    results = []
    for each in (engine, shared):
        state = each.new_state(8)
        each.prefill(state, [5, 6, 7])
        results.append([each.decode(state, token).copy() for token in (8, 9)])
    assert_allclose(results[0], results[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ids", [[1.9, 2.9], ["5"], [True], [[1, 2]], np.ones((1, 2), np.int64)])
def test_ids_that_are_no_row_of_whole_numbers_are_refused(engine: Engine, ids: object) -> None:
    with pytest.raises(PromptError, match="token ids must be a flat list of integers"):
        engine.check_ids(ids)


@pytest.mark.parametrize("chunk", [0, -1])
def test_a_chunk_without_tokens_is_refused(engine: Engine, chunk: int) -> None:
    for step in (
        lambda: engine.score([5, 6], chunk=chunk),
        lambda: engine.prefill(engine.new_state(4), [5], chunk=chunk),
    ):
        with pytest.raises(PromptError, match=f"a chunk of {chunk} tokens is not possible"):
            step()


def test_the_memory_of_a_released_cache_serves_the_next_one(engine: Engine) -> None:
    ids = [5, 80, 199, 12]
    expected = engine.prefill(engine.new_state(9), ids).copy()
    old = engine.new_cache(20)
    for buffer in old.past.values():
        buffer[:] = 1000.0  # what lies behind the length must not matter
    engine.release(old)
    state = engine.new_state(9)
    assert state.cache.memory is old.memory
    np.testing.assert_array_equal(engine.prefill(state, ids), expected)
    assert engine.new_cache(9).memory is not old.memory
    engine.release(old)
    larger = engine.new_cache(21)
    assert larger.memory is not old.memory
    assert larger.nbytes == 21 * position_bytes(engine.bundle.manifest.kv_cache)


def test_large_memory_goes_back_to_the_system(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("satchel.runtime.execution.cpu.MAX_SPARE", 1000)
    cache = engine.new_cache(20)
    engine.release(cache)
    assert engine.new_cache(20).memory is not cache.memory


@pytest.mark.parametrize(
    ("total", "size", "lengths"),
    [(0, 4, []), (1, 4, [1]), (4, 4, [4]), (5, 4, [2, 3]), (9, 4, [4, 2, 3]), (3, 2, [2, 1]), (3, 1, [1, 1, 1])],
)
def test_spans_cover_all_and_leave_no_token_alone(total: int, size: int, lengths: list[int]) -> None:
    spans = list(chunks(total, size))
    assert [span.stop - span.start for span in spans] == lengths
    assert [token for span in spans for token in range(total)[span]] == list(range(total))
