"""Ragged runs of native graphs: prompt pieces and single tokens of several sequences together, as each has it alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.checkpoints import save_tiny
from support.families import FAMILIES, save
from support.kernels import needs_kernels
from support.ragged import Pool

from satchel.export import ExportConfig, export_bundle
from satchel.runtime.bundle.contract import NATIVE, TEXT_LENGTH
from satchel.runtime.execution.engine import Engine
from satchel.runtime.optimize.specialize import specialize
from satchel.runtime.ort.open_bundle import open_bundle

pytestmark = needs_kernels

BLOCK = 16
LONG = np.full((7, 1), 90, np.int64)
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
WIDE = {"hidden_size": 128, "intermediate_size": 256, **HEADS}
FORMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "int8": ("llama", "int8", WIDE),
    "int4": ("llama", "int4", WIDE),
    "fp16": ("llama", "fp16", WIDE),
    "a sliding window and a cap": ("gemma2", "int8", {}),
    "learned positions": ("gpt2", "int8", {}),
    "rotation beside attention": ("cohere", "int8", {}),
    "two blocks of angles": ("phi3_long", "int8", {}),
}


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Engine]:
    """The bundle of a form, specialized for satchel's kernels."""

    @functools.cache
    def load(form: str) -> Engine:
        folder = tmp_path_factory.mktemp("ragged")
        family, precision, changes = FORMS[form]
        if changes:
            checkpoint = save_tiny(folder / "checkpoint", family, **changes)
        else:
            checkpoint = save(FAMILIES[family], folder / "checkpoint")
        export_bundle(checkpoint, ExportConfig(folder / "bundle", precision, max_context=96, certificate=False))
        specialize(open_bundle(folder / "bundle"), kernels="satchel", threads=1)
        return Engine.open(open_bundle(folder / "bundle"), threads=2)

    return load


QUICK = ("int8", "fp16")


@pytest.mark.slow
@pytest.mark.parametrize(
    "form", [form if form in QUICK else pytest.param(form, marks=pytest.mark.slow) for form in FORMS]
)
def test_each_sequence_gets_the_numbers_that_it_has_alone(form: str, opened: Callable[[str], Engine]) -> None:
    engine, draw = opened(form), np.random.default_rng(7)
    assert engine.bundle.manifest.variant(NATIVE).ragged
    pool, rows = Pool(engine, 60, BLOCK), 7
    ids = draw.integers(3, engine.vocabulary, (rows, 90))
    states = [engine.new_state(96) for _ in range(rows)]
    for state in states:
        state.expect(90)  # where that is beyond a border, from the first piece on
    for _ in range(14):
        pieces, wanted = {}, []
        for row in draw.permutation(rows)[: draw.integers(1, rows + 1)].tolist():
            start = states[row].cache.length
            count = int(draw.choice([1, 1, 1, 2, 5, 19, 40]))
            tokens = ids[row, start : start + count]
            if len(tokens):
                pieces[row] = tokens
                states[row].prefill(tokens)
                wanted.append(states[row].logits.copy())
        if pieces:
            border = {} if engine.bundle.manifest.model.rotary_border is None else {TEXT_LENGTH: LONG[: len(pieces)]}
            np.testing.assert_array_equal(pool.step(pieces, **border), np.stack(wanted))


@pytest.mark.parametrize(
    "form", [form if form in QUICK else pytest.param(form, marks=pytest.mark.slow) for form in FORMS]
)
def test_every_token_is_scored_with_the_bits_that_prefill_gives_it(form: str, opened: Callable[[str], Engine]) -> None:
    """Where it is the last one of a prompt of several tokens: a lone token is rounded as in decode."""
    engine, chunk = opened(form), 16
    assert engine.scored_by == NATIVE
    ids = np.random.default_rng(8).integers(3, engine.vocabulary, 40)
    found = engine.score(ids, chunk)
    for end in (2, 3, 11, 16, 18, 31, 40):
        state = engine.new_state(96)
        state.expect(len(ids))
        np.testing.assert_array_equal(engine.prefill(state, ids[:end], chunk), found[end - 1])
