"""Speculation: several tokens of a draft are checked in one run, and give the text of single steps.

Source: Leviathan et al. 2023, arXiv:2211.17192, with one difference: a drafted token counts if it is the one that is
chosen anyway, so that a seed gives the same text with and without drafts.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.errors import BundleError, PromptError, SatchelWarning
from satchel.runtime.execution.engine import Engine
from satchel.runtime.execution.state import State
from satchel.runtime.generation.draft_model import DraftModel, ModelDrafter
from satchel.runtime.generation.drafts import NgramDrafter, NgramPool
from satchel.runtime.generation.run_costs import SMOOTHING, Costs, reached
from satchel.runtime.generation.sampling.sampler import Sampler
from satchel.runtime.generation.sequence import ActiveSequence

WIDTHS = (1, 3, 7, 15)  # of drafts: with the token before them, the rows of a run are powers of two
MODES = ("auto", "ngram", "off")
IDLE, LONGEST_IDLE = 8, 512  # steps without a draft of the small model, after which it is tried again


def check_mode(speculate: str, draft: str | Path | None) -> None:
    """Raise PromptError for a mode that is unknown or leaves no use for a draft bundle."""
    if speculate not in MODES:
        raise PromptError(f"--speculate {speculate}: must be {', '.join(MODES[:-1])} or {MODES[-1]}")
    if draft is not None and speculate != "auto":
        raise PromptError(f"--draft cannot be combined with --speculate {speculate}: leave one out")


def warn_without_effect(engine: Engine, speculate: str, draft: str | Path | None) -> None:
    """Warn if drafts were asked for, and this bundle takes none."""
    reason = engine.why_not_ahead(None)
    if reason is not None and (draft is not None or speculate == "ngram"):
        flag = "--speculate ngram" if draft is None else f"--draft {draft}"
        warnings.warn(f"{flag} has no effect: {reason}", SatchelWarning, stacklevel=3)


class Speculation:
    """What all sequences of one engine share: what was seen before, a small model if there is one, and costs."""

    def __init__(self, engine: Engine, model: DraftModel | None = None) -> None:
        made = engine.bundle.specialized
        steps = {} if made is None else {1 + run.drafted: run.steps for run in made.runs_ahead}
        self.pool, self.model, self.costs = NgramPool(), model, Costs(steps)
        self.model_costs = 0.0  # seconds of a token that the small model drafts
        self.model_tried, self.model_right = 3.0, 2.0
        self._engine = engine

    def drafter(self, sequence: ActiveSequence, sampler: Sampler | None) -> Drafter | None:
        """What drafts for a sequence; None where no run takes several tokens of it."""
        if self._engine.why_not_ahead(sequence.options.adapter) is not None:
            return None
        model = None if self.model is None else ModelDrafter(self.model, sequence.positions)
        return Drafter(self, sequence.prompt, model, sampler)

    def note_model(self, drafted: int, right: int, seconds: float | None) -> None:
        """Count a draft of the small model, and the time that it took, unless it was a first one."""
        self.model_tried += min(right + 1, drafted)
        self.model_right += right
        if self.model_tried > 64:
            self.model_tried /= 2
            self.model_right /= 2
        if seconds is not None:
            each, old = seconds / drafted, self.model_costs
            self.model_costs = old + SMOOTHING * (each - old) if 0 < old < each else each


class Drafter:
    """Drafts for one sequence: from texts, or by a small model where that promises more."""

    def __init__(
        self, shared: Speculation, prompt: NDArray[np.int64], model: ModelDrafter | None, sampler: Sampler | None
    ) -> None:
        """`sampler` is that of the sequence; None if it chooses in a way of its own."""
        self.costs = shared.costs
        self._shared, self._prompt, self._model, self._sampler = shared, prompt, model, sampler
        self._seconds: float | None = None
        self._by_model = False
        self._idle, self._patience = 0, IDLE

    def draft(
        self, token_ids: Sequence[int], limit: int, wrong: Collection[int], forced: Sequence[int] = ()
    ) -> list[int]:
        """Up to `limit` tokens that may follow the new tokens; often none. `wrong` widths do not work.

        `forced` are tokens that a grammar leaves no choice of.
        """
        self.follow(token_ids)
        self._by_model = False
        most, widths = min(limit, WIDTHS[-1]), [width for width in WIDTHS if width not in wrong]
        count, _ = self.costs.best([1.0] * min(len(forced), most), widths)
        if count:
            return list(forced[:count])
        tokens, chances = self._ngrams.predicted(most)
        count, rate = self.costs.best(reached(chances), widths) if tokens else (0, 0.0)
        if self._model is not None and not (count and chances[0] > 0.9):
            drafted = self._from_model(most, widths, rate if count else 0.0)
            if drafted:
                return drafted
        return tokens[:count]

    @cached_property
    def _ngrams(self) -> NgramDrafter:
        """Made when it is first needed: a request that waits has no use for it."""
        return NgramDrafter(self._shared.pool, self._prompt)

    def follow(self, token_ids: Sequence[int]) -> None:
        """Take in what was chosen since."""
        known = len(self._ngrams.text) - len(self._prompt)
        if known < len(token_ids):
            self._ngrams.add(token_ids[known:])

    def proposed(
        self, token_ids: Sequence[int], limit: int, least: float, forced: Sequence[int] = ()
    ) -> tuple[list[int], list[float]]:
        """Up to `limit` tokens that may follow the new tokens, and the probability that each is reached and right.

        Those of a probability below `least` are left out. `forced` is as for `draft`. The small model is not asked.
        """
        self.follow(token_ids)
        self._by_model = False
        if forced:
            return list(forced[:limit]), [1.0] * min(len(forced), limit)
        if self._ngrams.chance < least:
            return [], []
        tokens, chances = self._ngrams.predicted(limit)
        gains = [gain for gain in reached(chances) if gain >= least]
        return tokens[: len(gains)], gains

    def learn(self, drafted: int, right: int) -> None:
        """Note how many tokens of a draft were right."""
        if self._by_model:
            self._shared.note_model(drafted, right, self._seconds)
            self._patience = IDLE if right else min(2 * self._patience, LONGEST_IDLE)

    def close(self, token_ids: Sequence[int]) -> None:
        """Keep what the sequence has become for others."""
        if token_ids:
            self.follow(token_ids)
        if self._model is not None:
            self._model.close()

    def _from_model(self, most: int, widths: Sequence[int], rate: float) -> list[int]:
        """A draft of the small model, of up to `most` tokens, if it promises more tokens per second than `rate`."""
        shared, model = self._shared, self._model
        chance = shared.model_right / shared.model_tried
        count, found = self.costs.best(reached([chance] * most), widths, each=shared.model_costs)
        if not count:
            self._idle += 1
            if self._idle < self._patience or self.costs.of(1) == np.inf:
                return []
            count = next((width for width in widths if width <= most), 0)
            self._patience = min(2 * self._patience, LONGEST_IDLE)
        elif found < rate:
            return []
        if model is None or not count:
            return []
        self._idle, fresh, start = 0, model.fresh, time.perf_counter()
        drafted = model.draft(self._ngrams.text, count, self._sampler)
        self._seconds, self._by_model = None if fresh else time.perf_counter() - start, bool(drafted)
        return drafted[: max((width for width in WIDTHS if width <= len(drafted)), default=0)]


def decode(engine: Engine, state: State, sequence: ActiveSequence) -> int:
    """Feed the last token and choose the next one, or several where a draft is right. Returns how many were chosen.

    A draft is fed together with the last token, and its tokens count as far as they are those that are chosen anyway.
    So the text is the same, greedy or sampled, if a run of several tokens gives each the logits that it gets alone: the
    first run of each size is compared with single steps, bit for bit.
    """
    drafter, known, timing = sequence.drafter, len(sequence.token_ids), sequence.timing
    draft, last = [], sequence.token_ids[-1]
    if drafter is not None:
        forced = () if sequence.constraint is None else sequence.constraint.forced
        draft = drafter.draft(sequence.token_ids, sequence.limit - known - 1, engine.wrong_ahead, forced)
    start = time.perf_counter()
    if drafter is None or not draft:
        state.decode(last)
        if drafter is not None:
            drafter.costs.note(1, time.perf_counter() - start)
        sequence.take_from(state)
        return 1
    length, tokens, tried = state.cache.length, np.asarray([last, *draft], np.int64), len(draft) in engine.runs_ahead
    try:
        if tried:
            rows = state.decode_ahead(tokens)
            drafter.costs.note(len(tokens), time.perf_counter() - start)
            taken = take_right(sequence, rows, draft)
            timing.drafted += len(draft)
            timing.accepted += taken - 1
        else:
            taken = _try(engine, state, sequence, tokens)
    finally:  # also when interrupted: what a wrong token left in the cache must not be kept
        state.cache.shorten(length + max(1, len(sequence.token_ids) - known))
    drafter.learn(len(draft), taken - 1)
    return taken


def take_right(sequence: ActiveSequence, rows: NDArray[np.float32], draft: Sequence[int]) -> int:
    """Choose a token from each of the rows of logits, as long as what was drafted is chosen. Returns how many."""
    for taken, logits in enumerate(rows, start=1):
        sequence.take(logits)
        if taken > len(draft) or sequence.finish_reason or sequence.token_ids[-1] != draft[taken - 1]:
            return taken
    return len(rows)


def _try(engine: Engine, state: State, sequence: ActiveSequence, tokens: NDArray[np.int64]) -> int:
    """Compare a run of several tokens with single steps, as long as those are needed, whose logits count."""
    length, taken = state.cache.length, 0
    try:
        found = state.decode_ahead(tokens).copy()
    except BundleError:  # its kernels do not take several tokens of one sequence
        found = None
    state.cache.shorten(length)
    same = found is not None
    for row, token in enumerate(tokens.tolist()):
        state.decode(token)
        same = same and found is not None and np.array_equal(found[row], state.logits)
        sequence.take(state.logits)
        taken += 1
        if sequence.finish_reason or (taken < len(tokens) and sequence.token_ids[-1] != tokens[taken]):
            break
    if not same:
        engine.wrong_ahead.add(len(tokens) - 1)
    elif taken == len(tokens):
        engine.runs_ahead.add(len(tokens) - 1)
    return taken
