"""Beam search, with the results of transformers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.execution.engine import Engine
from satchel.runtime.execution.state import Logits
from satchel.runtime.generation.beam_settings import BeamSettings
from satchel.runtime.generation.prefill import Progress, feed
from satchel.runtime.generation.prefix_cache import PrefixCache, common_length
from satchel.runtime.generation.sampling.sampler import check_finite
from satchel.runtime.generation.sequence import Timing
from satchel.runtime.generation.snapshots import NO_SNAPSHOTS, Snapshots

BLOCK = 64  # scores per block; the search for the highest scores looks at block maxima first

Scores = NDArray[np.float64]
Ids = NDArray[np.int64]
Adjust = Callable[[Scores, Ids], Scores]
"""Adjusts log-probabilities [vocabulary] of the token after `ids`, which are prompt and new text."""


@dataclass(frozen=True)
class Hypothesis:
    """A text that was found. `token_ids` excludes the end token.

    `score` is the sum of the tokens' log-probabilities (natural logarithm), as adjusted, divided by the number of
    tokens to the power of the length penalty; the end token counts in both. `finish_reason` is "stop" (an end token
    came), "length" or "time".
    """

    token_ids: tuple[int, ...]
    score: float
    finish_reason: str


class _Candidate(NamedTuple):
    row: int
    token: int
    total: float  # the sum of log-probabilities, with the token's


class BeamSearch:
    """A search for the continuations of one prompt; `run` runs it.

    It gives the sequences and scores of transformers' `generate` without sampling (and `num_return_sequences` equal to
    `num_beams`), except that sums are float64, and that fewer texts than beams are returned if there are no more. Each
    beam has a row. One child of a beam keeps its row; for the others the row is copied, from the first position that
    differs, to rows of beams without children. A search belongs to one thread.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: Ids,
        settings: BeamSettings,
        prefix_cache: PrefixCache,
        adjust: Adjust | None = None,
        progress: Progress = lambda count: None,
        snapshots: Snapshots = NO_SNAPSHOTS,
    ) -> None:
        """Allocate the rows. `progress` gets the prompt tokens done, `snapshots` tells where states are copied.

        Raises PromptError if the context is too small.
        """
        self.timing = Timing()
        self.reused_tokens = 0
        self.prompt, self.settings = prompt, settings
        self._engine, self._prefix_cache = engine, prefix_cache
        self._adjust, self._progress, self._snapshots = adjust, progress, snapshots
        beams, limit = settings.beams, settings.max_new_tokens
        self._rows = engine.new_batch(beams, len(prompt) + max(limit - 1, 0))
        self._ends = frozenset(token for token in settings.end_tokens if 0 <= token < engine.vocabulary)
        self._ids = np.empty((beams, len(prompt) + limit), np.int64)  # what each row was fed, and its next token
        self._totals = np.zeros(beams)
        self._scores = np.empty((beams, engine.vocabulary))
        self._ended: list[Hypothesis] = []
        self._deadline = math.inf

    @property
    def kv_bytes(self) -> int:
        """The size of all rows' KV cache in bytes."""
        return self._rows.nbytes

    def run(self) -> list[Hypothesis]:
        """The texts found, best first. Without a token, or time for one, that is the empty text alone.

        Raises BundleError for logits that are not finite, and what `adjust` raises.
        """
        if not self.settings.max_new_tokens:
            return [Hypothesis((), 0.0, "length")]
        start = time.perf_counter()
        if self.settings.time_limit is not None:
            self._deadline = time.monotonic() + self.settings.time_limit
        state = self._rows.add(self.settings.adapter)
        self._ids[0, : len(self.prompt)] = self.prompt
        self.reused_tokens = feed(
            self._engine, state, self.prompt, self._prefix_cache, self._progress, self._is_over, self._snapshots
        )
        if self._is_over():
            self._ended = [Hypothesis((), 0.0, "time")]
            going_on = False
        else:
            going_on = self._step(state.logits[None], 1)
        self.timing.prefill_seconds = time.perf_counter() - start
        while going_on:
            start = time.perf_counter()
            length = self._rows.states[0].cache.length
            self._rows.decode(self._ids[: len(self._rows), length])
            going_on = self._step(self._rows.logits, length - len(self.prompt) + 2)
            self.timing.decode_seconds += time.perf_counter() - start
            self.timing.decode_steps += 1
        self._keep()
        return self._ended

    def _is_over(self) -> bool:
        return time.monotonic() >= self._deadline

    def _step(self, logits: Logits, length: int) -> bool:
        """Choose each beam's next token, the `length`-th, from logits [beams, vocabulary]. True: continue."""
        settings = self.settings
        every = "length" if length == settings.max_new_tokens else "time" if self._is_over() else None
        running: list[_Candidate] = []
        for rank, candidate in enumerate(self._candidates(logits, length)):
            reason = "stop" if candidate.token in self._ends else every
            if reason is None:
                running.append(candidate)
            elif rank < settings.beams:  # those behind are spare, in case these end
                self._end(candidate, length, reason)
        del running[settings.beams :]
        self._ended = sorted(self._ended, key=lambda text: -text.score)[: settings.beams]
        if not running or not self._can_improve(running[0].total, length):
            return False
        self._move(running, len(self.prompt) + length - 1)
        return True

    def _can_improve(self, total: float, length: int) -> bool:
        settings = self.settings
        if len(self._ended) < settings.beams:
            return True
        # A single beam is greedy decoding, in transformers too.
        if settings.early_stopping is True or settings.beams == 1:
            return False
        if settings.early_stopping == "never" and settings.length_penalty > 0:
            length = settings.max_new_tokens
        return bool(total / length**settings.length_penalty > self._ended[-1].score)

    def _candidates(self, logits: Logits, length: int) -> list[_Candidate]:
        """The most likely sequences one token longer, so many that at least one for each beam does not end."""
        fed = len(self.prompt) + length - 1
        for row, raw in enumerate(logits):
            highest = check_finite(raw, length - 1)
            scores = raw.astype(np.float64)
            scores -= scores[highest]
            scores -= math.log(np.exp(scores).sum())
            if self._adjust:
                scores = self._adjust(scores, self._ids[row, :fed])
            np.add(scores, self._totals[row], out=self._scores[row])
        flat = self._scores[: len(logits)].reshape(-1)
        best = highest_of(flat, max(2, 1 + len(self._ends)) * self.settings.beams)
        rows, tokens = np.divmod(best, self._engine.vocabulary)
        return [_Candidate(*each) for each in zip(rows.tolist(), tokens.tolist(), flat[best].tolist(), strict=True)]

    def _end(self, candidate: _Candidate, length: int, reason: str) -> None:
        score = candidate.total / length**self.settings.length_penalty
        tokens = self._ids[candidate.row, len(self.prompt) : len(self.prompt) + length - 1].tolist()
        if reason != "stop":
            tokens.append(candidate.token)
        self._ended.append(Hypothesis(tuple(tokens), score, reason))

    def _move(self, running: list[_Candidate], fed: int) -> None:
        """Give each candidate a row with the `fed` tokens of its parent, and its own token after them."""
        placed: dict[int, _Candidate] = {}
        others = []
        for candidate in running:
            if placed.setdefault(candidate.row, candidate) is not candidate:
                others.append(candidate)
        free = [row for row in range(len(self._rows)) if row not in placed]
        for candidate in others:
            # Free rows are not sources, and sources do not change: the order of copies does not matter.
            row = free.pop() if free else self._add()
            self._copy(candidate.row, row, fed)
            placed[row] = candidate
        for row in sorted(free, reverse=True):
            last = len(self._rows) - 1
            self._rows.drop(row)
            if row != last:
                self._ids[row] = self._ids[last]
                placed[row] = placed.pop(last)
        for row, candidate in placed.items():
            self._ids[row, fed] = candidate.token
            self._totals[row] = candidate.total

    def _add(self) -> int:
        row = len(self._rows)
        self._rows.add()
        self._ids[row, 0] = -1  # no common prefix with any other
        return row

    def _copy(self, source: int, target: int, fed: int) -> None:
        start = common_length(self._ids[source, :fed], self._ids[target, :fed])
        self._rows.copy(source, target, start)
        self._ids[target, start:fed] = self._ids[source, start:fed]

    def _keep(self) -> None:
        """Put the longest part of the best text that a row holds into the prefix cache."""
        tokens = self._ended[0].token_ids if self._ended else ()
        best = np.concatenate([self.prompt, np.array(tokens, np.int64)])
        fed = self._rows.states[0].cache.length
        common = [common_length(ids[:fed], best) for ids in self._ids[: len(self._rows)]]
        row = int(np.argmax(common))
        self._prefix_cache.keep(best[: common[row]], self._rows.states[row].cache)


def highest_of(values: Scores, count: int) -> NDArray[np.int64]:
    """The indices of the `count` highest of `values` [n], highest first, ties by lower index; -inf does not count.

    One pass finds the maximum of each block: the `count`-th highest of these is a lower bound that few values reach.
    """
    blocks, bound = len(values) // BLOCK, -np.inf
    if blocks > count:
        highest = values[: blocks * BLOCK].reshape(blocks, BLOCK).max(axis=1)
        bound = np.partition(highest, blocks - count)[blocks - count]
    near = np.flatnonzero(values >= bound if bound > -np.inf else values > -np.inf)
    found = values[near]
    if len(near) > count:
        reached = found >= np.partition(found, len(near) - count)[len(near) - count]
        near, found = near[reached], found[reached]
    return near[np.argsort(-found, kind="stable")[:count]]
