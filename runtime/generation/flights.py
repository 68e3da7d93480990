"""Runs that have begun and whose results were not taken yet: one for each stage of a model, so that all have work."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from satchel.runtime.generation.fair_queue import Job


@dataclass(frozen=True)
class Flight:
    """What a run feeds: the last pieces of prompts, with their numbers of tokens, and one token of other requests."""

    ended: Sequence[tuple[Job, int]]
    decoding: Sequence[Job]


class Flights:
    """The runs that are under way, the oldest first: up to `depth` of them."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self._flying: deque[Flight] = deque()

    def __len__(self) -> int:
        return len(self._flying)

    def is_due(self, *, begun: bool) -> bool:
        """Whether the oldest one must land now: there are as many as may be, or no further one has begun."""
        return len(self._flying) >= (self.depth if begun else 1)

    @property
    def jobs(self) -> list[Job]:
        """The requests in them, which are fed nothing until they land."""
        return [job for each in self._flying for job in (*(job for job, _ in each.ended), *each.decoding)]

    def begin(self, ended: Sequence[tuple[Job, int]], decoding: Sequence[Job]) -> None:
        """Note a run that has begun."""
        self._flying.append(Flight(ended, decoding))

    def land(self) -> Flight:
        """Take the oldest one."""
        return self._flying.popleft()

    def next_of(self, decoding: Sequence[Job]) -> list[Job]:
        """Those that the next run decodes, of all in the order of their rows: neighbors that are not under way.

        They are as many as let each of `depth` runs have as many.
        """
        flying, found = set(self.jobs), list[Job]()
        for job in decoding:
            if job not in flying:
                found.append(job)
            if found and (job in flying or len(found) * self.depth >= len(decoding)):
                break
        return found
