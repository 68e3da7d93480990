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
from satchel.runtime.generation.draft_rows import DraftRows
from satchel.runtime.generation.drafts import NgramDrafter, NgramPool
from satchel.runtime.generation.run_costs import Costs, DraftCosts, reached
from satchel.runtime.generation.sampling.sampler import Sampler
from satchel.runtime.generation.sequence import ActiveSequence
from satchel.runtime.generation.trials import Record, Trials

WIDTHS = (1, 3, 7, 15)  # of drafts: with the token before them, the rows of a run are powers of two
MODES = ("auto", "ngram", "off")
SURE_ENOUGH = 0.9  # a probability of what earlier texts predict, above which the small model is not asked
OWN = 8  # tries of the small model for one text that count as much as what is known of all


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
        self.model_costs = DraftCosts()
        self.by_model = Record(3.0, 2.0)
        self.again = bool(engine.bundle.manifest.states)
        """Whether the tokens of a draft that is not all right are fed again: states cannot go back."""
        self._engine = engine

    def drafter(self, sequence: ActiveSequence, sampler: Sampler | None) -> Drafter | None:
        """What drafts for a sequence; None where no run takes several tokens of it."""
        if self._engine.why_not_ahead(sequence.options.adapter) is not None:
            return None
        model = None if self.model is None else ModelDrafter(self.model, sequence.positions)
        return Drafter(self, sequence.prompt, model, sampler)

    def draft_rows(self, rows: int, capacity: int, kv_cache_mib: int | None) -> DraftRows | None:
        """Rows of the small model for as many requests that run together; None where nothing is drafted by one.

        Raises PromptError as `Engine.new_pool`.
        """
        model = self.model
        if model is None or self._engine.why_not_ahead(None) is not None:
            return None
        limit = None if kv_cache_mib is None else kv_cache_mib << 20
        return DraftRows(model.engine, model.prefix_cache, self.model_costs, rows, capacity, limit)


class Drafter:
    """Drafts for one sequence: from texts, or by a small model where that promises more."""

    def __init__(
        self, shared: Speculation, prompt: NDArray[np.int64], model: ModelDrafter | None, sampler: Sampler | None
    ) -> None:
        """`sampler` is that of the sequence; None if it chooses in a way of its own."""
        self.costs = shared.costs
        self.model, self.sampler = model, sampler
        self._shared, self._prompt = shared, prompt
        self._trials = Trials()
        self._by_model = False  # what is checked next
        self._record = Record()

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
        again = self._shared.again
        count, rate = self.costs.best(reached(chances), widths, again=again) if tokens else (0, 0.0)
        if self.model is not None and not (count and chances[0] > SURE_ENOUGH):
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

    @property
    def model_chance(self) -> float:
        """The probability that a token of the small model is right if those before it are."""
        own, all_texts = self._record, self._shared.by_model
        return (own.right + OWN * all_texts.right / all_texts.tried) / (own.tried + OWN)

    def model_room(self, limit: int) -> int:
        """Up to `limit` tokens that the small model can draft; 0 where earlier texts promise more, or without one."""
        if self.model is None or self._ngrams.chance > max(self.model_chance, SURE_ENOUGH):
            return 0
        return min(limit, self.model.room(self.text))

    @property
    def text(self) -> list[int]:
        """The prompt and the new tokens that `follow` has taken in."""
        return self._ngrams.text

    def use_model(self) -> None:
        """Note that the small model has drafted what is checked next."""
        self._by_model = True

    def learn(self, drafted: int, right: int) -> None:
        """Note how many tokens of a draft were right."""
        if self._by_model and drafted:
            for record in (self._shared.by_model, self._record):
                record.note(drafted, right)
        self._by_model = False

    def share(self, rows: DraftRows) -> None:
        """Let the small model draft in a row of these."""
        if self.model is not None:
            self.model.share(rows)

    def rest(self) -> None:
        """Free what the small model has of this text: it has to wait."""
        if self.model is not None:
            self.model.close()

    def close(self, token_ids: Sequence[int]) -> None:
        """Keep what the sequence has become for others."""
        if token_ids:
            self.follow(token_ids)
        self.rest()

    def _from_model(self, most: int, widths: Sequence[int], rate: float) -> list[int]:
        """A draft of the small model, of up to `most` tokens, if it promises more tokens per second than `rate`."""
        gains = reached([self.model_chance] * most)
        each, again = self._shared.model_costs.of(1), self._shared.again
        count, found = self.costs.best(gains, widths, each=each, again=again)
        if not count:
            if self.costs.of(1) == np.inf or not self._trials.due():
                return []
            count = next((width for width in widths if width <= most), 0)
        elif found < rate:
            return []
        else:
            self._trials.end()
        if self.model is None or not count:
            return []
        fresh, start = self.model.fresh, time.perf_counter()
        drafted = self.model.draft(self.text, count, self.sampler)
        if drafted and not fresh:
            self._shared.model_costs.note(1, (time.perf_counter() - start) / len(drafted))
        self.use_model()
        return drafted[: max((width for width in WIDTHS if width <= len(drafted)), default=0)]


def decode(engine: Engine, state: State, sequence: ActiveSequence) -> int:
    """Feed the last token and choose the next one, or several where a draft is right. Returns how many were chosen.

    A draft is fed together with the last token, and its tokens count as far as they are those that are chosen anyway.
    So the text is the same, greedy or sampled, if a run of several tokens gives each the logits that it gets alone: the
    first run of each size is compared with single steps, bit for bit.
    """
    drafter, known, timing = sequence.drafter, len(sequence.token_ids), sequence.timing
    draft, last = [], sequence.token_ids[-1]
    behind = len(state.cache.behind)
    if drafter is not None and not behind:
        forced = () if sequence.constraint is None else sequence.constraint.forced
        draft = drafter.draft(sequence.token_ids, sequence.limit - known - 1, engine.wrong_ahead, forced)
    start = time.perf_counter()
    if drafter is None or not draft:
        state.decode(last)
        if drafter is not None:
            drafter.costs.note(1 + behind, time.perf_counter() - start)
        sequence.take_from(state)
        return 1
    length, tokens, tried = state.cache.length, np.asarray([last, *draft], np.int64), len(draft) in engine.runs_ahead
    state.begin_ahead()
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
        state.keep_ahead(length, tokens, max(1, len(sequence.token_ids) - known))
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
    state.keep_ahead(length, tokens, 0)
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
