"""Sequences that go through the graphs together give what each gives alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from satchel.runtime.bench.batch import Batch, check_rows
from satchel.runtime.engine import Engine
from satchel.runtime.errors import PromptError


def test_rows_give_what_each_gives_alone(engine: Engine) -> None:
    rng = np.random.default_rng(3)
    ids, next_ids = rng.integers(0, engine.vocabulary, (3, 13)), rng.integers(0, engine.vocabulary, (7, 3))
    batch = Batch(engine, 3, 20)
    states = [engine.new_state(20) for _ in range(3)]
    found = batch.prefill(ids)
    for row, state, logits in zip(ids, states, found, strict=True):
        np.testing.assert_allclose(logits, engine.prefill(state, row), rtol=1e-4, atol=1e-4)
    for tokens in next_ids:
        found = batch.decode(tokens)
        for token, state, logits in zip(tokens, states, found, strict=True):
            np.testing.assert_allclose(logits, engine.decode(state, int(token)), rtol=1e-4, atol=1e-4)
    assert batch.cache.length == 20


def test_rows_beyond_the_capacity_are_refused(engine: Engine) -> None:
    batch = Batch(engine, 2, 4)
    with pytest.raises(PromptError, match=r"0 \+ 5 tokens do not fit 4 positions"):
        batch.prefill(np.ones((2, 5), np.int64))
    batch.prefill(np.ones((2, 4), np.int64))
    with pytest.raises(PromptError, match=r"4 \+ 1 tokens do not fit"):
        batch.decode(np.ones(2, np.int64))


def test_prompts_come_once(engine: Engine) -> None:
    batch = Batch(engine, 2, 8)
    batch.prefill(np.ones((2, 2), np.int64))
    with pytest.raises(PromptError, match="takes its prompts once"):
        batch.prefill(np.ones((2, 2), np.int64))


def test_graphs_of_a_fixed_batch_refuse_another(engine: Engine) -> None:
    manifest = engine.bundle.manifest
    decode = manifest.graphs.decode
    first = dataclasses.replace(decode.inputs[0], shape=(1, 1))
    fixed = dataclasses.replace(decode, inputs=(first, *decode.inputs[1:]))
    one = dataclasses.replace(manifest, graphs=dataclasses.replace(manifest.graphs, decode=fixed))
    check_rows(one, 1)
    with pytest.raises(PromptError, match=r"^--batch 4: the graphs of this bundle take 1 at a time"):
        check_rows(one, 4)
    with pytest.raises(PromptError, match=r"^--batch 0: must be 1 or more"):
        check_rows(manifest, 0)
    check_rows(manifest, 4)
