"""Speculation of several requests: the run that gives each its next token also checks drafts of some of them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from satchel.runtime.execution.batch import Batch, Feed
from satchel.runtime.execution.state import Logits
from satchel.runtime.generation.draft_rows import DraftRows
from satchel.runtime.generation.joint_drafts import Asked, draft_together
from satchel.runtime.generation.run_costs import Costs, reached
from satchel.runtime.generation.sequence import ActiveSequence
from satchel.runtime.generation.speculation import Drafter, take_right

RUNS = (2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Rows of a run that has drafts: few numbers, so that each is measured often."""
DEPTHS = (1, 2, 3, 4, 6, 8, 11, 15)
"""Tokens that the small model may draft for each row."""


@dataclass
class Ahead:
    """A row that is decoded, and what is drafted for it: often nothing.

    `proposed` are tokens that may be drafted, with the probability that each is reached and right; `most` is how many
    the small model may draft.
    """

    row: int
    sequence: ActiveSequence
    drafter: Drafter
    draft: list[int] = field(default_factory=list)
    proposed: list[tuple[float, int]] = field(default_factory=list)
    most: int = 0

    @property
    def feed(self) -> Feed:
        """The last token and the drafted ones."""
        return self.row, np.array([self.sequence.token_ids[-1], *self.draft], np.int64)


@dataclass
class Prices:
    """What drafted rows cost beside `rows` others."""

    costs: Costs
    rows: int

    @property
    def further(self) -> list[int]:
        """The numbers of drafted rows that a run may have."""
        return [run - self.rows for run in RUNS if run > self.rows]

    @property
    def least(self) -> float:
        """The probability below which no draft pays."""
        return self.costs.price(self.further, self.rows)

    def best(self, gains: Iterable[float], before: float = 0.0) -> tuple[int, float]:
        """How many of the proposed rows to feed, and the tokens per second then, if to draft all takes `before`."""
        return self.costs.best(sorted(gains, reverse=True), self.further, rows=self.rows, before=before)


def plan_drafts(
    batch: Batch, decoding: Sequence[tuple[int, ActiveSequence]], small: DraftRows | None = None
) -> list[Ahead]:
    """What is drafted for rows that are decoded together; [] where they take no drafts.

    A drafted token is a row that costs as much as that of another request, and gives a token if it and those before it
    are right. So the most probable ones of all rows are taken, as many as give the most tokens per second. `small` are
    rows of a small model, which drafts where that pays for its own runs too.
    """
    planned = [Ahead(row, sequence, sequence.drafter) for row, sequence in decoding if sequence.drafter is not None]
    if not planned or len(planned) < len(decoding) or not batch.widest_ahead:
        return []
    prices = Prices(planned[0].drafter.costs, len(planned))
    least = prices.least
    for each in planned:
        sequence = each.sequence
        limit = min(batch.widest_ahead, sequence.limit - len(sequence.token_ids) - 1)
        forced = () if sequence.constraint is None else sequence.constraint.forced
        tokens, gains = each.drafter.proposed(sequence.token_ids, limit, least, forced)
        each.proposed = list(zip(gains, tokens, strict=True))
        each.most = 0 if forced or small is None else each.drafter.model_room(limit)
    if small is not None and _tried(small, planned, prices):
        return planned
    found = [(gain, each, token) for each in planned for gain, token in each.proposed]
    found.sort(key=lambda proposal: -proposal[0])  # stable, so that those of a row stay in order
    for _, each, token in found[: prices.best(gain for gain, _, _ in found)[0]]:
        each.draft.append(token)
    return planned


def _tried(small: DraftRows, planned: Sequence[Ahead], prices: Prices) -> bool:
    """Let the small model propose tokens where that gives more tokens per second than what is proposed.

    Returns whether it only tried, where it does not: then its tokens are drafted, and no others.
    """
    able = [each for each in planned if each.most > 0]
    depth, rate = 0, prices.best(gain for each in planned for gain, _ in each.proposed)[1]
    for more in DEPTHS:
        gains = [gain for each in planned for gain in _gains(each, more)]
        count, found = prices.best(gains, more * small.costs.of(len(able)))
        if count and found > rate and any(more <= each.most for each in able):
            depth, rate = more, found
    if depth:
        small.trials.end()
        for each, tokens in _drafted(small, able, depth):
            each.proposed = list(zip(_gains(each, len(tokens)), tokens, strict=True))
        return False
    if not able or prices.costs.of(prices.rows) == math.inf or not small.trials.due():
        return False
    for each, tokens in _drafted(small, able, 1):
        each.draft += tokens
    return True


def _gains(each: Ahead, tokens: int) -> list[float]:
    """The probabilities that each of so many tokens is reached and right: of the small model, or as proposed."""
    if not each.most:
        return [gain for gain, _ in each.proposed]
    return reached([each.drafter.model_chance] * min(tokens, each.most))


def _drafted(small: DraftRows, able: Sequence[Ahead], depth: int) -> list[tuple[Ahead, list[int]]]:
    """What the small model drafts, for those for which it can."""
    asked = [Asked(each.drafter, min(depth, each.most)) for each in able]
    draft_together(small, asked)
    found = [(each, one.found) for each, one in zip(able, asked, strict=True) if one.found]
    for each, _ in found:
        each.drafter.use_model()
    return found


def decode_together(batch: Batch, planned: Sequence[Ahead]) -> list[int]:
    """Feed the last token of each row with its draft, in one run, and choose what follows. Returns how many tokens.

    The tokens of a draft count as far as they are those that are chosen anyway. An error in choosing ends its own
    sequence; raises what the run raises.
    """
    before = [(batch.states[each.row].cache, len(each.sequence.token_ids)) for each in planned]
    lengths = [cache.length for cache, _ in before]
    feeds, start = [each.feed for each in planned], time.perf_counter()
    try:
        found = batch.decode_ahead(feeds)
        planned[0].drafter.costs.note(sum(len(tokens) for _, tokens in feeds), time.perf_counter() - start)
        return [_take(each, logits) for each, logits in zip(planned, found, strict=True)]
    finally:  # also when interrupted: what a wrong token left in a cache must not be kept
        for each, (cache, known), length in zip(planned, before, lengths, strict=True):
            if cache.length > length:
                cache.shorten(length + max(1, len(each.sequence.token_ids) - known))


def _take(each: Ahead, logits: Logits) -> int:
    sequence = each.sequence
    try:
        taken = take_right(sequence, logits, each.draft)
    except Exception as error:  # noqa: BLE001 - also one of a callback
        sequence.fail(error)
        return 1
    each.drafter.learn(len(each.draft), taken - 1)
    sequence.timing.drafted += len(each.draft)
    sequence.timing.accepted += taken - 1
    return taken
