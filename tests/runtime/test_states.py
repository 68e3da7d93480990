"""Layers with a convolution or a recurrence: fed in pieces, beside others or again, they give what numpy gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from support.tiny_bundle import VOCABULARY
from support.tiny_hybrid import PATTERN, expected, write_hybrid

from satchel.runtime.errors import PromptError, ProviderError
from satchel.runtime.execution.engine import Engine
from satchel.runtime.execution.kv_cache import position_bytes
from satchel.runtime.execution.state import State
from satchel.runtime.ort.open_bundle import open_bundle

PATTERNS = {"hybrid": PATTERN, "recurrent": ("linear", "linear"), "short": ("conv", "attention", "plain", "conv")}
IDS = [int(token) for token in np.random.default_rng(4).integers(0, VOCABULARY, 60)]


@pytest.fixture(scope="module", params=list(PATTERNS))
def pattern(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return PATTERNS[request.param]


@pytest.fixture(scope="module")
def engine(pattern: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine.open(open_bundle(write_hybrid(tmp_path_factory.mktemp("hybrid") / "bundle", pattern)), threads=1)


def check(found: NDArray[np.float32], ids: list[int], pattern: tuple[str, ...]) -> None:
    """Compare logits [vocabulary] with those after `ids`."""
    np.testing.assert_allclose(found, expected(ids, pattern)[-1], rtol=1e-4, atol=2e-4)


def test_the_context_counts_through_every_kind_of_layer(pattern: tuple[str, ...]) -> None:
    """So that the tests below can fail: another first token changes the logits of the last."""
    other = expected([IDS[0] + 1, *IDS[1:6]], pattern)[-1]
    assert np.abs(other - expected(IDS[:6], pattern)[-1]).max() > 0.1


@pytest.mark.parametrize("cuts", [(), (1,), (2, 3, 5), (1, 2, 3, 4, 5, 6, 7), (11,), (20,)])
def test_a_prompt_in_pieces_and_40_steps_are_as_the_whole(
    engine: Engine, pattern: tuple[str, ...], cuts: tuple[int, ...]
) -> None:
    state = engine.new_state(64)
    for start, end in zip((0, *cuts), (*cuts, 21), strict=True):
        logits = engine.prefill(state, IDS[start:end])
        check(logits, IDS[:end], pattern)
    for end in range(22, 62 if not cuts else 24):
        check(engine.decode(state, (IDS + IDS)[end - 1]), (IDS + IDS)[:end], pattern)


def test_scores_are_those_of_all_positions(engine: Engine, pattern: tuple[str, ...]) -> None:
    whole = engine.score(IDS[:30])
    np.testing.assert_allclose(whole, expected(IDS[:30], pattern), rtol=1e-4, atol=2e-4)
    np.testing.assert_allclose(engine.score(IDS[:30], chunk=7), whole, rtol=1e-4, atol=2e-4)


def test_a_row_that_is_used_again_starts_from_zeros(engine: Engine, pattern: tuple[str, ...]) -> None:
    rows = engine.new_batch(1, 40)
    engine.prefill(rows.add(), IDS[:9])
    rows.drop(0)
    check(engine.prefill(rows.add(), IDS[20:30]), IDS[20:30], pattern)
    engine.release(rows.states[0].cache)
    check(engine.prefill(engine.new_state(40), IDS[20:30]), IDS[20:30], pattern)


def test_rows_of_different_lengths_are_decoded_in_one_run(engine: Engine, pattern: tuple[str, ...]) -> None:
    assert engine.batch_invariant
    rows, texts = engine.new_batch(4, 40), [IDS[:13], IDS[13:14], IDS[20:27]]
    for ids in texts:
        engine.prefill(rows.add(), ids)

    def step(token: int) -> None:
        tokens = [token + row for row in range(len(texts))]
        rows.decode(tokens)
        for row, fed in enumerate(tokens):
            texts[row] = [*texts[row], fed]
            check(rows.logits[row], texts[row], pattern)

    step(5)
    rows.drop(0)
    texts[0] = texts.pop()
    step(50)
    rows.add()
    rows.copy(1, 2)
    texts.append(texts[1])
    step(90)
    engine.prefill(rows.add(), IDS[40:45])
    texts.append(IDS[40:45])
    step(140)


def snapshot_at(engine: Engine, length: int, end: int) -> State:
    """A state fed with `end` tokens, and a snapshot of it at `length`."""
    state = engine.new_state(40)
    engine.prefill(state, IDS[:length])
    state.cache.take_snapshot()
    engine.prefill(state, IDS[length:end])
    return state


def test_a_copy_goes_on_from_a_snapshot(engine: Engine, pattern: tuple[str, ...]) -> None:
    state, other = snapshot_at(engine, 7, 12), engine.new_state(40)
    assert [state.cache.reach(count) for count in (6, 7, 11, 12, 30)] == [0, 7, 7, 12, 12]
    for count in (7, 12):
        other.cache.copy_from(state.cache, count)
        ids = [*IDS[:count], *IDS[30:34]]
        check(engine.prefill(other, ids[count:]), ids, pattern)
        assert other.cache.reach(10) == 7
    with pytest.raises(KeyError):
        other.cache.states_at(9)
    state.cache.clear()
    assert (state.cache.reach(12), state.cache.snapshots) == (0, {})


def test_states_that_a_failed_step_may_have_written_are_not_used(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = snapshot_at(engine, 7, 12)

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("satchel.runtime.execution.cpu.run_bound", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.decode(state, 3)
    assert state.cache.reach(40) == 7


def test_the_size_of_a_cache_counts_states_once_for_each_row(engine: Engine) -> None:
    manifest = engine.bundle.manifest
    for rows in (1, 3):
        cache = engine.new_cache(20, rows)  # type: ignore[attr-defined]
        assert cache.nbytes == rows * (20 * position_bytes(manifest.kv_cache) + manifest.state_bytes)


def test_a_device_is_refused_by_name(tmp_path: Path) -> None:
    bundle = open_bundle(write_hybrid(tmp_path / "bundle"))
    with pytest.raises((ProviderError, PromptError), match="cuda"):
        Engine.open(bundle, "cuda", threads=1)
