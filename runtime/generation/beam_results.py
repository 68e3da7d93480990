"""Applies generation options and grammars to beam search, and turns its results into generations."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from satchel.runtime.generation.beam_search import Adjust, BeamSearch, Ids, Scores
from satchel.runtime.generation.constraint import Constraint
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


class BeamConstraints:
    """Rules out what a grammar does not allow, of each beam by its own text; an `Adjust`.

    Scores of other tokens stay as they are. A beam goes on from the constraint of the beam that it was one token ago.
    """

    def __init__(self, start: Constraint, prompt_tokens: int, then: Adjust | None) -> None:
        """`start` is the constraint after the prompt, `then` adjusts what is left."""
        self._prompt_tokens, self._then = prompt_tokens, then
        self._known: dict[tuple[int, ...], Constraint] = {(): start}

    def __call__(self, scores: Scores, ids: Ids) -> Scores:
        """Raises PromptError as `Constraint.masked` and `then` do."""
        text = tuple(ids[self._prompt_tokens :].tolist())
        if text:
            self._known = {known: each for known, each in self._known.items() if len(known) >= len(text) - 1}
            self._known[text] = self._known[text[:-1]].copy()
            self._known[text].take(text[-1])
        left = np.minimum(scores, self._known[text].most())
        return left if self._then is None else self._then(left, ids)


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
