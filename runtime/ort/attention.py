"""Chooses the kernel that ONNX Runtime's GroupQueryAttention uses for many tokens: by tiles, or row by row.

A session reads the choice from a variable of the environment while it is opened: no session entry says the same. The
variable belongs to the whole process, so sessions with different choices are opened one after another.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

PLAIN_ATTENTION = "ORT_GQA_DISABLE_FLASH_ATTENTION"


class AttentionChoice:
    """Gives every thread that opens sessions the choice it wants: those of one choice at a time."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._openers = 0
        self._plain = False
        self._is_ours = False

    @contextlib.contextmanager
    def of(self, plain: bool) -> Iterator[None]:
        """Open sessions in this context; `plain` computes one row of scores at a time. A value the user set stays."""
        with self._changed:
            self._changed.wait_for(lambda: not self._openers or self._plain == plain)
            if not self._openers:
                self._plain, self._is_ours = plain, plain and PLAIN_ATTENTION not in os.environ
                if self._is_ours:
                    os.environ[PLAIN_ATTENTION] = "1"
            self._openers += 1
        try:
            yield
        finally:
            with self._changed:
                self._openers -= 1
                if not self._openers:
                    if self._is_ours:
                        os.environ.pop(PLAIN_ATTENTION, None)
                    self._changed.notify_all()


attention = AttentionChoice()
"""The one of this process."""
