"""A small model drafts for several requests together: each of its runs gives all of them a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from satchel.runtime.execution.batch import Feed
from satchel.runtime.generation.draft_model import ModelDrafter
from satchel.runtime.generation.draft_rows import DraftRows
from satchel.runtime.generation.speculation import Drafter

CATCH_UP = 256
"""Tokens that the small model is fed at most of texts that it does not know yet, so that no request waits for long."""


@dataclass
class Asked:
    """A request for up to `count` tokens that may follow a text, and what was `found`."""

    drafter: Drafter
    count: int
    found: list[int] = field(default_factory=list)


def draft_together(small: DraftRows, asked: Sequence[Asked]) -> None:
    """Draft for texts, and leave in `found` what the small model takes for likely, or what each sampler will draw.

    Nothing for a text that it is still being fed, or that there is no memory for.
    """
    feeds, needed, going = list[Feed](), list[Feed](), list[_Going]()
    room = CATCH_UP
    for each in asked:
        model = each.drafter.model
        missing = None if model is None else model.behind(each.drafter.text)
        if model is None or model.row is None or missing is None or not room:
            continue
        piece = missing[:room]
        whole = model.row, np.zeros(len(piece) + each.count, np.int64)
        if not small.has_memory([*needed, whole]):
            continue
        needed.append(whole)
        room -= len(piece)
        feeds.append((model.row, piece))
        model.note(piece)
        if len(piece) == len(missing):
            going.append(_Going(each, model))
    while feeds:
        small.run(feeds)
        feeds = []
        going = [each for each in going if each.choose(feeds)]


class _Going:
    """One that is drafted for at the moment."""

    def __init__(self, asked: Asked, model: ModelDrafter) -> None:
        self._asked, self._model = asked, model
        sampler = asked.drafter.sampler
        self._numbers = [] if sampler is None else sampler.coming(asked.count)

    def choose(self, feeds: list[Feed]) -> bool:
        """Choose the next token. Returns whether one more is wanted: then this one is among what is fed next."""
        asked, model = self._asked, self._model
        token = model.chosen(asked.drafter.sampler, self._numbers, len(asked.found))
        if token is None or model.row is None:
            return False
        asked.found.append(token)
        if len(asked.found) == asked.count:
            return False
        feeds.append((model.row, np.array([token], np.int64)))
        model.note([token])
        return True
