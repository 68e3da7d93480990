"""How often a small model that drafts was right, and when it is tried again."""

from __future__ import annotations

from dataclasses import dataclass

IDLE, LONGEST_IDLE = 8, 512  # steps without a draft of the small model, after which it is tried again
MEMORY = 64  # tries that are remembered


@dataclass
class Record:
    """How many drafted tokens of the small model were tried and right, of late."""

    tried: float = 0.0
    right: float = 0.0

    def note(self, drafted: int, right: int) -> None:
        """Count a draft: the tokens behind the first wrong one were not tried."""
        self.tried += min(right + 1, drafted)
        self.right += right
        if self.tried > MEMORY:
            self.tried /= 2
            self.right /= 2


class Trials:
    """When the small model is tried again that promises too little: after twice as many steps each time."""

    def __init__(self) -> None:
        self._idle, self._patience = 0, IDLE

    def due(self) -> bool:
        """Whether it is tried in this step, in which it promises too little."""
        self._idle += 1
        if self._idle < self._patience:
            return False
        self._idle, self._patience = 0, min(2 * self._patience, LONGEST_IDLE)
        return True

    def end(self) -> None:
        """Note a draft that promised enough."""
        self._idle, self._patience = 0, IDLE
