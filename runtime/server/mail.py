"""Takes what other threads have to the thread of a loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

Letter = TypeVar("Letter")


class Mail(Generic[Letter]):
    """Hands letters of any thread to functions in the thread of a loop, which is woken once for all that are new."""

    def __init__(self) -> None:
        self._letters: deque[tuple[Callable[[Letter], object], Letter]] = deque()
        self._called = False

    def put(self, loop: asyncio.AbstractEventLoop, take: Callable[[Letter], object], letter: Letter) -> None:
        """Let `loop`, the same in each call, call `take` with a letter."""
        self._letters.append((take, letter))
        if not self._called:
            self._called = True
            loop.call_soon_threadsafe(self._hand_out)

    def _hand_out(self) -> None:
        self._called = False  # before letters are taken: one that comes from now on calls again
        while self._letters:
            take, letter = self._letters.popleft()
            take(letter)
