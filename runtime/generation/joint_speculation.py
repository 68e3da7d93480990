"""Speculation of several requests: the run that gives each its next token also checks drafts of some of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from satchel.runtime.execution.batch import Batch, Feed
from satchel.runtime.execution.state import Logits
from satchel.runtime.generation.sequence import ActiveSequence
from satchel.runtime.generation.speculation import Drafter, take_right

RUNS = (2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Rows of a run that has drafts: few numbers, so that each is measured often."""


@dataclass
class Ahead:
    """A row that is decoded, and what is drafted for it: often nothing."""

    row: int
    sequence: ActiveSequence
    drafter: Drafter
    draft: list[int]

    @property
    def feed(self) -> Feed:
        """The last token and the drafted ones."""
        return self.row, np.array([self.sequence.token_ids[-1], *self.draft], np.int64)


def plan_drafts(batch: Batch, decoding: Sequence[tuple[int, ActiveSequence]]) -> list[Ahead]:
    """What is drafted for rows that are decoded together; [] where they take no drafts.

    A drafted token is a row that costs as much as that of another request, and gives a token if it and those before it
    are right. So the most probable ones of all rows are taken, as many as give the most tokens per second.
    """
    planned = [Ahead(row, sequence, sequence.drafter, []) for row, sequence in decoding if sequence.drafter is not None]
    if not planned or len(planned) < len(decoding) or not batch.widest_ahead:
        return []
    costs, rows, found = planned[0].drafter.costs, len(planned), []
    further = [run - rows for run in RUNS if run > rows]
    price = costs.price(further, rows)
    for each in planned:
        sequence = each.sequence
        limit = min(batch.widest_ahead, sequence.limit - len(sequence.token_ids) - 1)
        forced = () if sequence.constraint is None else sequence.constraint.forced
        tokens, gains = each.drafter.proposed(sequence.token_ids, limit, price, forced)
        found += [(gain, each, token) for gain, token in zip(gains, tokens, strict=True)]
    found.sort(key=lambda proposal: -proposal[0])  # stable, so that those of a row stay in order
    count, _ = costs.best([gain for gain, _, _ in found], further, rows=rows)
    for _, each, token in found[:count]:
        each.draft.append(token)
    return planned


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
    sequence.timing.drafted += len(each.draft)
    sequence.timing.accepted += taken - 1
    return taken
