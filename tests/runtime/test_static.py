"""Static graphs over swapped caches: they give what dynamic ones of the same weights give, and see one shape each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from support.tiny_bundle import MAX_CONTEXT, VOCABULARY, read_manifest, write_bundle, write_manifest
from support.tiny_static_bundle import write_static_bundle

from satchel.runtime.errors import BundleError, PromptError
from satchel.runtime.execution.engine import Engine
from satchel.runtime.execution.experimental.static_inputs import HIDDEN, fill_mask
from satchel.runtime.generation.generator import Generator
from satchel.runtime.ort.open_bundle import open_bundle

IDS = np.random.default_rng(5).integers(3, VOCABULARY, 45)
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    return Generator.open(write_bundle(tmp_path_factory.mktemp("dynamic") / "bundle"), threads=1)


@pytest.fixture(scope="module", params=[1, 2], ids=["whole", "in two parts"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_static_bundle(tmp_path_factory.mktemp("static") / "bundle", parts=request.param)


@pytest.fixture
def static(folder: Path) -> Generator:
    return Generator.open(folder, threads=1)


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    assert_allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize("chunk", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("count", [1, 4, 17, 45])
def test_a_prompt_in_chunks_gives_the_logits_of_dynamic_graphs(
    dynamic: Generator, static: Generator, count: int, chunk: int | None
) -> None:
    ids = IDS[:count]
    expected = dynamic.engine.prefill(dynamic.engine.new_state(count), ids)
    state = static.engine.new_state(count)
    assert_same(static.engine.prefill(state, ids, chunk), expected)
    assert state.cache.length == count


def test_every_step_of_decode_gives_the_logits_of_dynamic_graphs(dynamic: Generator, static: Generator) -> None:
    states = [each.engine.new_state(MAX_CONTEXT) for each in (dynamic, static)]
    for token in IDS[:9]:
        assert_same(static.engine.decode(states[1], int(token)), dynamic.engine.decode(states[0], int(token)))


@pytest.mark.parametrize("count", [1, 8, 9, 45])
def test_score_gives_the_logits_of_dynamic_graphs(dynamic: Generator, static: Generator, count: int) -> None:
    assert_same(static.engine.score(IDS[:count]), dynamic.engine.score(IDS[:count]))


def test_a_context_can_be_filled_to_its_last_position(dynamic: Generator, static: Generator) -> None:
    ids = np.resize(IDS, MAX_CONTEXT)
    options = {"temperature": 1.0, "top_k": 9, "seed": 1}
    for prompt in (ids, ids[:-3]):
        assert static.generate(prompt, 9, **options).token_ids == dynamic.generate(prompt, 9, **options).token_ids


def test_a_full_cache_says_so_and_keeps_what_it_holds(static: Generator) -> None:
    state = static.engine.new_state(5)
    static.engine.prefill(state, IDS[:5])
    before = {name: values[:, :, :5].copy() for name, values in state.cache.past.items()}
    with pytest.raises(PromptError, match=r"context is full: 5 \+ 1 .* 5 positions"):
        static.engine.decode(state, 3)
    assert state.cache.length == 5
    for name, values in state.cache.past.items():
        assert_array_equal(values[:, :, :5], before[name])


def test_a_smaller_context_limits_positions_and_not_buffers(folder: Path, dynamic: Generator) -> None:
    small = Generator.open(folder, threads=1, max_context=20)
    assert small.generate(IDS[:15], 30).token_ids == dynamic.generate(IDS[:15], 6).token_ids
    assert small.engine.new_state(7).cache.past["past_key_values.0.key"].shape[2] == MAX_CONTEXT


def test_rows_cannot_be_asked_to_run_together(static: Generator) -> None:
    with pytest.raises(PromptError, match="takes a fixed number of rows"):
        static.engine.new_batch(2, 9, force=True)


def test_a_state_that_was_saved_is_loaded_again(folder: Path, static: Generator, tmp_path: Path) -> None:
    expected = static.generate(IDS[:21], 8)
    static.save_state(tmp_path / "state", IDS[:21])
    other = Generator.open(folder, threads=1)
    other.load_state(tmp_path / "state")
    found = other.generate(IDS[:21], 8)
    assert (found.token_ids, found.reused_tokens) == (expected.token_ids, 19)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("window", [0, 1, 3, 100])
def test_a_mask_shows_each_token_what_it_sees_and_padding_the_first_position(dtype: str, window: int) -> None:
    mask = np.full((1, 1, 6, 20), 7, dtype)
    fill_mask(mask, 4, 9, window)
    for row in range(6):
        position = 9 + row
        first = max(0, position - window + 1) if window else 0
        seen = set(range(first, position + 1)) if row < 4 else {0}
        assert set(np.flatnonzero(mask[0, 0, row] == 0)) == seen
        assert set(np.unique(mask[0, 0, row])) == {0, HIDDEN}
    assert np.isfinite(mask).all()


def test_a_graph_of_another_shape_than_the_manifest_says_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = write_static_bundle(tmp_path / "bundle")
    document = read_manifest(copy)
    mask = next(each for each in document["static"]["decode"]["parts"][0]["inputs"] if each["name"] == "mask")
    mask["shape"][-1] = 32
    write_manifest(copy, document)
    with pytest.raises(BundleError, match=r"mask is \[1, 1, 1, 64\] where the manifest says \[1, 1, 1, 32\]"):
        Engine.open(open_bundle(copy), threads=1)
