"""Rows of a small model that drafts for several requests."""

from __future__ import annotations

import time
from collections.abc import Sequence

from satchel.runtime.errors import PromptError
from satchel.runtime.execution.batch import Feed
from satchel.runtime.execution.engine import Engine
from satchel.runtime.execution.state import State
from satchel.runtime.generation.prefix_cache import PrefixCache
from satchel.runtime.generation.run_costs import DraftCosts
from satchel.runtime.generation.trials import Trials

LEVEL = 2  # tokens of a row that were chosen since its last draft: a run that feeds more is one of a prompt


class DraftRows:
    """Rows of one batch of the small model, one for each request that it drafts for. One thread has them."""

    def __init__(
        self, engine: Engine, prefix_cache: PrefixCache, costs: DraftCosts, rows: int, capacity: int, limit: int | None
    ) -> None:
        """Allocate `rows` rows of up to `capacity` positions; `limit` is the most bytes for all, None for any number.

        `costs` are those of runs of the small model. Raises PromptError as `Engine.new_pool`.
        """
        try:
            self._batch = engine.new_pool(rows, min(capacity, engine.max_context), prefix_cache.limit, limit)
        except PromptError as error:
            raise PromptError(f"the draft bundle: {error}") from None
        self._prefix_cache, self.costs, self.trials = prefix_cache, costs, Trials()
        self._free = list(range(rows))[::-1]

    def take(self) -> int | None:
        """The number of a free row, which is empty; None if there is none."""
        if not self._free:
            return None
        row = self._free.pop()
        self.state(row).cache.clear()
        return row

    def free(self, row: int) -> None:
        """Give a row back."""
        self.state(row).cache.clear()
        self._free.append(row)

    def state(self, row: int) -> State:
        """The state of a row."""
        return self._batch.states[row]

    def has_memory(self, feeds: Sequence[Feed]) -> bool:
        """Whether there is memory for a run with these, if prefixes are let go for it, as is done here."""
        while self._batch.is_short_of(feeds):
            if not self._prefix_cache.evict(self._batch.owns):
                return False
        return True

    def run(self, feeds: Sequence[Feed]) -> None:
        """Feed tokens to rows in one run."""
        start = time.perf_counter()
        self._batch.run(feeds)
        if all(len(tokens) <= LEVEL for _, tokens in feeds):
            self.costs.note(len(feeds), time.perf_counter() - start)
