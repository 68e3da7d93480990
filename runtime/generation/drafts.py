"""Drafts of the next tokens from texts: those that followed the last ones before, in this text or another."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import pairwise, repeat

import numpy as np
from numpy.typing import NDArray

NGRAM = 3  # tokens that have to be the same
MAX_NGRAMS = 1 << 16
RUNS = 16  # of right tokens, that are told apart
PAIR, SKIPPED = -1, -2  # in place of a run: only the last two tokens match; or one token differs from the source
MEMORY = 512  # tries that an estimate remembers

Source = tuple[list[int], int]
"""A text and a place in it."""


class NgramPool:
    """What followed the n-grams of the latest texts, and how often that was right again. Threads may share one."""

    def __init__(self) -> None:
        self._places: dict[int, Source] = {}
        self._lock = threading.Lock()
        self._tried = dict.fromkeys(range(SKIPPED, RUNS + 1), 0.0)
        self._right = dict(self._tried)

    def add_all(self, text: list[int]) -> None:
        """Remember where each n-gram of a text ends, if it is followed. More may be appended to the list later."""
        ids = np.asarray(text, np.int64)
        if len(ids) <= NGRAM:
            return
        keys = sum(ids[at : len(ids) - NGRAM + at] << (21 * (NGRAM - 1 - at)) for at in range(NGRAM))
        with self._lock:
            self._places.update(zip(np.asarray(keys).tolist(), zip(repeat(text), range(NGRAM, len(ids))), strict=False))
            self._forget()

    def take(self, text: list[int]) -> Source | None:
        """In which text and where the last n-gram of a text ended before, if followed; remember where it ends now."""
        if len(text) < NGRAM:
            return None
        first, second, third = text[-NGRAM:]
        key = (first << 42) + (second << 21) + third
        with self._lock:
            found = self._places.pop(key, None)
            self._places[key] = text, len(text)
            self._forget()
        return found if found is not None and found[1] < len(found[0]) else None

    def note(self, run: int, right: bool) -> None:
        """Count a prediction after a run of so many right ones."""
        run = min(run, RUNS)
        self._tried[run] += 1
        self._right[run] += right
        if self._tried[run] > MEMORY:
            self._tried[run] /= 2
            self._right[run] /= 2

    def chance(self, run: int) -> float:
        """The probability that the next prediction is right after `run` right ones, as measured so far.

        Before much is measured, that of a rule that has held `run` times and failed twice before; a weaker source is
        taken to be wrong until it was right.
        """
        counted, held = min(run, RUNS), max(run, 0)
        return (self._right[counted] + held + 1) / (self._tried[counted] + held + (4 if run >= 0 else 8))

    def _forget(self) -> None:
        while len(self._places) > MAX_NGRAMS:
            del self._places[next(iter(self._places))]


class NgramDrafter:
    """Predicts the next tokens of one text, one after another, whether they are drafted or not.

    So it is known at no cost how good the predictions are: where a text does not repeat, none is tried. They come from
    a source, a place in this text or another: after the same n-gram, else after the same two tokens of this text; or
    the source goes on after a token that differs from it, as where a text is repeated with other words.
    """

    def __init__(self, pool: NgramPool, prompt: NDArray[np.int64]) -> None:
        """`pool` is shared by all texts."""
        self._pool = pool
        self.text: list[int] = prompt.tolist()
        self._pairs = dict(zip(pairwise(self.text), range(2, len(self.text)), strict=False))  # where each last ended
        pool.add_all(self.text)
        self._source: Source | None
        self._source, self._run = next(iter(self._found()), (None, 0))

    def add(self, tokens: Sequence[int]) -> None:
        """Let the text go on."""
        pool, text = self._pool, self.text
        for token in tokens:
            source, run = self._source, self._run
            right = source is not None and source[0][source[1]] == token
            if source is not None:
                pool.note(run, right)
            text.append(token)
            found = self._found()
            if source is not None and source[1] + 1 < len(source[0]):
                if right:
                    found = [((source[0], source[1] + 1), run + 1)]
                elif run > 0:
                    found.append(((source[0], source[1] + 1), SKIPPED))
            self._source, self._run = max(found, key=lambda each: pool.chance(each[1]), default=(None, 0))

    @property
    def chance(self) -> float:
        """The probability that the next token is the predicted one; 0 without a prediction."""
        return 0.0 if self._source is None else self._pool.chance(self._run)

    def predicted(self, most: int) -> tuple[list[int], list[float]]:
        """Up to `most` tokens that may follow, and the probability that each is right if those before it are."""
        if self._source is None:
            return [], []
        before, place = self._source
        tokens = before[place : place + most]
        while before is self.text and len(tokens) < most:  # a loop goes on
            tokens += tokens[: most - len(tokens)]
        return tokens, [self._pool.chance(self._run + at) for at in range(len(tokens))]

    def _found(self) -> list[tuple[Source, int]]:
        """Where the last tokens were before, and the run that begins there; remember where they are now."""
        text, known = self.text, self._pool.take(self.text)
        if len(text) < 2:
            return []
        pair = text[-2], text[-1]
        place, self._pairs[pair] = self._pairs.get(pair), len(text)
        if known is not None:
            return [(known, 0)]
        return [] if place is None else [((text, place), PAIR)]
