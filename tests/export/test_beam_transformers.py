"""Beam search finds the sequences and scores that transformers finds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from support.exported import Exported, exported
from support.families import VOCABULARY

from satchel.runtime.generation.beam_results import adjustment
from satchel.runtime.generation.beam_search import BeamSearch
from satchel.runtime.generation.beam_settings import BeamSettings
from satchel.runtime.generation.options import GenerationOptions
from satchel.runtime.generation.prefix_cache import PrefixCache

NEW_TOKENS, PAD = 16, 0
MANY = tuple(range(1, VOCABULARY, 4))
"""End tokens of which some are among the likeliest at every step."""

PROMPTS = ((0, 8), (8, 11), (11, 31))
"""Where they begin and end in the family's ids."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported("llama", tmp_path_factory)


@pytest.fixture(scope="module")
def ends(llama: Exported) -> list[int]:
    """Two tokens that the beams of the first prompt come to."""
    tokens = expected(llama, llama.ids[:8], [], num_beams=5)[0]
    found = [tokens[0][3], next(token for token in tokens[1][8:] if token != tokens[0][3])]
    assert PAD not in found
    return found


def expected(
    llama: Exported, prompt: np.ndarray, end_tokens: Sequence[int], **options: Any
) -> tuple[list[list[int]], list[float]]:
    """What transformers generates, each text with its end token, and its scores."""
    ids = torch.from_numpy(prompt)[None]
    with torch.no_grad():
        found = llama.reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=PAD,
            eos_token_id=list(end_tokens) or None, num_return_sequences=options["num_beams"], output_scores=True,
            return_dict_in_generate=True, **options,
        )  # fmt: skip
    sequences = []
    for tokens in found.sequences[:, len(prompt) :].tolist():
        last = next((place for place, token in enumerate(tokens) if token in end_tokens), len(tokens) - 1)
        sequences.append(tokens[: last + 1])
    return sequences, found.sequences_scores.tolist()


def compare(
    llama: Exported, prompt: np.ndarray, settings: BeamSettings, given: GenerationOptions, **options: Any
) -> set[str]:
    """Compare the two, and return the reasons for which texts ended."""
    sequences, scores = expected(
        llama, prompt, settings.end_tokens, num_beams=settings.beams, length_penalty=settings.length_penalty,
        early_stopping=settings.early_stopping, **options,
    )  # fmt: skip
    engine = llama.engine
    adjust = adjustment(given, len(prompt), settings.end_tokens, engine.vocabulary)
    found = BeamSearch(engine, prompt, settings, PrefixCache(engine.bundle.manifest.kv_cache, 0), adjust).run()
    for hypothesis, tokens in zip(found, sequences, strict=True):
        stopped = tokens[-1] in settings.end_tokens
        assert hypothesis.finish_reason == ("stop" if stopped else "length")
        assert list(hypothesis.token_ids) == (tokens[:-1] if stopped else tokens)
    np.testing.assert_allclose([hypothesis.score for hypothesis in found], scores, rtol=1e-4, atol=1e-4)
    return {hypothesis.finish_reason for hypothesis in found}


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("beams", [2, 3, 5])
def test_texts_and_scores_are_those_of_transformers(
    llama: Exported, ends: list[int], beams: int, length_penalty: float, early_stopping: Any
) -> None:
    reasons = set()
    for (first, last), end_tokens in zip((*PROMPTS, PROMPTS[0]), (ends, ends[:1], ends, MANY), strict=True):
        settings = BeamSettings(beams, NEW_TOKENS, end_tokens, length_penalty, early_stopping)
        reasons |= compare(llama, llama.ids[first:last], settings, GenerationOptions())
    assert "stop" in reasons or length_penalty > 1


@pytest.mark.parametrize("beams", [2, 5])
def test_without_an_end_token_all_texts_have_the_full_length(llama: Exported, beams: int) -> None:
    for first, last in PROMPTS:
        prompt = llama.ids[first:last]
        assert compare(llama, prompt, BeamSettings(beams, NEW_TOKENS), GenerationOptions()) == {"length"}


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 2}),
        ({"min_new_tokens": 7}, {"min_new_tokens": 7}),
        ({"logit_bias": {11: 2.5, 40: -np.inf}}, {"sequence_bias": {(11,): 2.5, (40,): -np.inf}}),
        (
            {"repetition_penalty": 0.8, "no_repeat_ngram_size": 3, "min_new_tokens": 4},
            {"repetition_penalty": 0.8, "no_repeat_ngram_size": 3, "min_new_tokens": 4},
        ),
    ],
)
def test_penalties_are_those_of_transformers(
    llama: Exported, ends: list[int], given: dict[str, Any], options: dict[str, Any]
) -> None:
    for first, last in PROMPTS:
        settings = BeamSettings(3, NEW_TOKENS, ends)
        compare(llama, llama.ids[first:last], settings, GenerationOptions(**given), **options)
