"""Drafts of the next tokens: those that followed the last ones before, in this text or another."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

NGRAM = 3  # tokens that have to be the same
MAX_NGRAMS = 1 << 17
WIDTHS = (1, 3, 7)  # of drafts: with the token before them, the rows of a run are powers of two
LONGEST_PAUSE = 64  # steps


class NgramPool:
    """What followed the n-grams of the latest texts. Threads may share one."""

    def __init__(self) -> None:
        self._places: dict[tuple[int, ...], tuple[list[int], int]] = {}
        self._lock = threading.Lock()

    def add(self, text: list[int], start: int) -> None:
        """Remember where the n-grams of a text that grows end, from position `start` on: those that are followed."""
        with self._lock:
            for end in range(max(start, NGRAM), len(text)):
                ngram = tuple(text[end - NGRAM : end])
                self._places.pop(ngram, None)
                self._places[ngram] = text, end
            while len(self._places) > MAX_NGRAMS:
                del self._places[next(iter(self._places))]

    def after(self, text: list[int], count: int) -> list[int]:
        """Up to `count` tokens that followed the last n-gram of a text before."""
        with self._lock:
            before, end = self._places.get(tuple(text[-NGRAM:]), ([], 0))
            return before[end : end + count]


class Drafter:
    """Drafts the next tokens of one sequence: more while they are right, and none for a while after wrong ones."""

    def __init__(self, pool: NgramPool) -> None:
        """`pool` is shared by all sequences."""
        self._pool = pool
        self._text: list[int] = []
        self._width = 0
        self._misses = self._pause = 0

    def draft(self, prompt: NDArray[np.int64], token_ids: Sequence[int], limit: int) -> list[int]:
        """Up to `limit` tokens that may follow a prompt and its new tokens; often none."""
        known = len(self._text)
        if not known:
            self._text = prompt.tolist()
        self._text += token_ids[max(known - len(prompt), 0) :]
        self._pool.add(self._text, known)
        if self._pause:
            self._pause -= 1
            return []
        found = self._pool.after(self._text, min(WIDTHS[self._width], limit))
        return found[: max((width for width in WIDTHS if width <= len(found)), default=0)]

    def learn(self, drafted: int, right: int) -> None:
        """Note how many tokens of a draft were right."""
        if right == drafted:
            self._width = min(self._width + 1, len(WIDTHS) - 1)
        elif not right:
            self._width = 0
            self._misses += 1
            self._pause = min(1 << self._misses, LONGEST_PAUSE)
            return
        self._misses = 0
