"""Applies generation options to beam search, and turns its results into generations."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from satchel.runtime.generation.beam_search import Adjust, BeamSearch, Ids
from satchel.runtime.generation.detokenizer import IncrementalDetokenizer
from satchel.runtime.generation.result import Generation
from satchel.runtime.generation.sampling.filters import adjusted, adjusts
from satchel.runtime.generation.sampling.options import SamplingOptions
from satchel.runtime.generation.tokenizer import Tokenizer


def adjustment(
    options: SamplingOptions,
    prompt_tokens: int,
    end_tokens: Collection[int],
    vocabulary: int,
    limit: int | None = None,
) -> Adjust | None:
    """The penalties, bans and bias of `options` as a function of log-probabilities, as in transformers.

    None if there are none. The function raises PromptError if no token is left.
    """
    if not adjusts(options):
        return None
    ends = np.array([token for token in end_tokens if 0 <= token < vocabulary], np.int64)
    return lambda scores, ids: adjusted(scores, options, ids, prompt_tokens, ends, limit)


def beam_results(search: BeamSearch, tokenizer: Tokenizer | None) -> list[Generation]:
    """Run a search. Returns its results, best first, each with the times of the whole search."""
    found = search.run()
    timing = search.timing
    return [
        Generation(
            text=_text(tokenizer, search.prompt, hypothesis.token_ids) if tokenizer else "",
            token_ids=hypothesis.token_ids,
            finish_reason=hypothesis.finish_reason,
            prompt_tokens=len(search.prompt),
            reused_tokens=search.reused_tokens,
            prefill_seconds=timing.prefill_seconds,
            decode_seconds=timing.decode_seconds,
            decode_steps=timing.decode_steps,
            kv_bytes=search.kv_bytes // search.settings.beams,
            logprobs=None,
            score=hypothesis.score,
        )
        for hypothesis in found
    ]


def _text(tokenizer: Tokenizer, prompt: Ids, tokens: Sequence[int]) -> str:
    stream = IncrementalDetokenizer(tokenizer, prompt.tolist())
    return "".join([*(stream.add(token) for token in tokens), stream.finish()])
