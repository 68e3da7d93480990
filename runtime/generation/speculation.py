"""Speculation: several tokens of a draft are checked in one run, and give the text of single steps.

Source: Leviathan et al. 2023, arXiv:2211.17192, with one difference: a drafted token counts if it is the one that is
chosen anyway, so that a seed gives the same text with and without drafts.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.errors import BundleError, PromptError, SatchelWarning
from satchel.runtime.execution.engine import Engine
from satchel.runtime.execution.state import State
from satchel.runtime.generation.draft_model import DraftModel, ModelDrafter
from satchel.runtime.generation.drafts import NgramDrafter, NgramPool
from satchel.runtime.generation.sampling.sampler import Sampler
from satchel.runtime.generation.sequence import ActiveSequence

WIDTHS = (1, 3, 7, 15)  # of drafts: with the token before them, the rows of a run are powers of two
MODES = ("auto", "ngram", "off")
GAIN = 1.05  # in tokens per second, that a draft must promise: less is within the error of what is measured
ROW = 0.5  # of the time of a step, that a further token is taken to cost before it is measured
SMOOTHING = 0.1
SURE = 2  # times that a run must have been measured: the first is slower
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


class Costs:
    """Seconds of a run by the number of drafted tokens in it, measured on this machine as it works."""

    def __init__(self, steps: Mapping[int, float] | None = None) -> None:
        """`steps` are what runs took in single steps when the bundle was specialized, until they are measured here."""
        self._steps = steps or {}
        self._seconds: dict[int, float] = {}
        self._times: dict[int, int] = {}

    def note(self, drafted: int, seconds: float) -> None:
        """Count a measurement. What disturbs a run makes it slower only, so that less time counts at once."""
        old, times = self._seconds.get(drafted, seconds), self._times.get(drafted, 0)
        self._seconds[drafted] = seconds if seconds < old else old + SMOOTHING * (seconds - old)
        self._times[drafted] = times + 1

    def of(self, drafted: int) -> float:
        """Seconds of a run; infinity before a single step was measured."""
        if self._times.get(drafted, 0) >= SURE:
            return self._seconds[drafted]
        return self.of(0) * self._steps.get(drafted, 1 + ROW * drafted) if drafted else np.inf

    def best(self, chances: Sequence[float], wrong: Collection[int] = (), each: float = 0.0) -> tuple[int, float]:
        """How many of the drafted tokens give the most tokens per second, 0 for none, and that number.

        `chances` are those of each token to be right if those before it are; `wrong` widths do not work here; `each` is
        the time to draft a token.
        """
        single = self.of(0)
        best, rate, expected, right = 0, GAIN / single, 1.0, 1.0
        if single == np.inf:
            return best, rate
        for count, chance in enumerate(chances, start=1):
            right *= chance
            expected += right
            if count in WIDTHS and count not in wrong:
                found = expected / (self.of(count) + count * each)
                if found > rate:
                    best, rate = count, found
        return best, rate


class Speculation:
    """What all sequences of one engine share: what was seen before, a small model if there is one, and costs."""

    def __init__(self, engine: Engine, model: DraftModel | None = None) -> None:
        made = engine.bundle.specialized
        steps = {} if made is None else {run.drafted: run.steps for run in made.runs_ahead}
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
        sure = min(len(forced), limit, WIDTHS[-1])
        count, _ = self.costs.best([1.0] * sure, wrong)
        if count:
            return list(forced[:count])
        tokens, chances = self._ngrams.predicted(min(limit, WIDTHS[-1]))
        count, rate = self.costs.best(chances, wrong) if tokens else (0, 0.0)
        if self._model is not None and not (count and chances[0] > 0.9):
            drafted = self._from_model(limit, wrong, rate if count else 0.0)
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

    def _from_model(self, limit: int, wrong: Collection[int], rate: float) -> list[int]:
        """A draft of the small model, if it promises more tokens per second than `rate`."""
        shared, model = self._shared, self._model
        chance = shared.model_right / shared.model_tried
        most = min(limit, WIDTHS[-1])
        count, found = self.costs.best([chance] * most, wrong, shared.model_costs)
        if not count:
            self._idle += 1
            if self._idle < self._patience or self.costs.of(0) == np.inf:
                return []
            count = next((width for width in WIDTHS if width <= most and width not in wrong), 0)
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
            drafter.costs.note(0, time.perf_counter() - start)
        sequence.take_from(state)
        return 1
    length, tokens, tried = state.cache.length, np.asarray([last, *draft], np.int64), len(draft) in engine.runs_ahead
    try:
        if tried:
            rows = state.decode_ahead(tokens)
            drafter.costs.note(len(draft), time.perf_counter() - start)
            taken = _take_right(sequence, rows, draft)
            timing.drafted += len(draft)
            timing.accepted += taken - 1
        else:
            taken = _try(engine, state, sequence, tokens)
    finally:  # also when interrupted: what a wrong token left in the cache must not be kept
        state.cache.shorten(length + max(1, len(sequence.token_ids) - known))
    drafter.learn(len(draft), taken - 1)
    return taken


def _take_right(sequence: ActiveSequence, rows: NDArray[np.float32], draft: Sequence[int]) -> int:
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
