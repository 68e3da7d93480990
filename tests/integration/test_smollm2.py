"""SmolLM2-135M from a GGUF file through the commands, compared with transformers in float32."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from integration.conftest import NEW_TOKENS, PROMPT, Reference
from numpy.typing import NDArray
from support.export_command import satchel

from satchel.export.checkpoint.hard_strings import HARD_STRINGS
from satchel.runtime import Engine, Generator, open_bundle

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4  # of the largest logit


@pytest.fixture(scope="module")
def engine(smollm2: Path) -> Engine:
    return Engine.open(open_bundle(smollm2), threads=2)


def assert_close(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_the_logits_of_every_position_are_those_of_transformers(engine: Engine, reference: Reference) -> None:
    assert len(reference.text_ids) > 90
    assert_close(engine.score(reference.text_ids), reference.logits)


def test_a_prompt_in_chunks_gives_the_same_logits(engine: Engine, reference: Reference) -> None:
    for chunk in (7, 64, 1000):
        state = engine.new_state(len(reference.text_ids))
        assert_close(engine.prefill(state, reference.text_ids, chunk), reference.logits[-1])


def test_64_greedy_tokens_and_their_logits_are_those_of_transformers(engine: Engine, reference: Reference) -> None:
    state = engine.new_state(len(reference.prompt_ids) + NEW_TOKENS)
    logits, tokens = engine.prefill(state, reference.prompt_ids), []
    for row in reference.greedy_logits:
        assert_close(logits, row)
        tokens.append(int(logits.argmax()))
        logits = engine.decode(state, tokens[-1])
    assert tokens == reference.greedy_ids
    assert len(set(tokens)) > 30


def test_the_tokenizer_gives_the_ids_of_transformers(smollm2: Path, reference: Reference) -> None:
    tokenizer = Generator.open(smollm2, threads=2).tokenizer
    assert tokenizer is not None
    # transformers leaves out this file's rule that each numeral stands alone, which numerals beyond 0-9 show.
    texts = [text for text in HARD_STRINGS if not any(c.isnumeric() and not c.isascii() for c in text)]
    assert len(HARD_STRINGS) - len(texts) <= 1
    for text in (*texts, PROMPT):
        assert tokenizer.encode(text) == reference.tokenizer(text).input_ids, repr(text)


def test_run_prints_what_transformers_would_say(smollm2: Path, reference: Reference) -> None:
    done = satchel("run", smollm2, PROMPT, "--raw", "--max-new-tokens", "12", "--threads", "2")
    expected = reference.tokenizer.decode([*reference.prompt_ids, *reference.greedy_ids[:12]]).removeprefix(PROMPT)
    assert (done.returncode, done.stdout) == (0, expected + "\n")
    assert f"prompt {len(reference.prompt_ids)} tokens at" in done.stderr


def test_bench_gives_its_figures_as_json(smollm2: Path) -> None:
    work = ("--prompt-tokens", "32", "--new-tokens", "8", "--threads", "2")
    done = satchel("bench", smollm2, *work, "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert set(figures) == {"prefill", "decode", "load", "rss_mb", "pss_mb", "ttft"}
    assert all(value > 0 for value in figures.values())


def test_the_weights_are_in_memory_once_for_both_phases(smollm2: Path) -> None:
    work = ("--prompt-tokens", "32", "--new-tokens", "8", "--threads", "2")
    figures = json.loads(satchel("bench", smollm2, *work, "--json").stdout)
    weights = (smollm2 / "weights.bin").stat().st_size / (1 << 20)
    assert figures["pss_mb"] < weights + 200
