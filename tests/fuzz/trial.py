"""What is run on a mutant: a path, a command and what was changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fuzz.mutate import Random

RUN = ("run", "the cat", "--max-new-tokens", "1", "--threads", "1", "--quiet")
CHAT = ("chat", "--max-new-tokens", "1", "--threads", "1", "--temperature", "0", "--quiet")
OTHERS = (
    ("inspect", "--json"),
    ("inspect", "--quiet"),
    ("pack", "-o", "../out/m.pyz", "--quiet"),
    ("verify", "--quiet"),
)


@dataclass(frozen=True)
class Trial:
    """The bundle to open, the command with its flags, and what was changed."""

    path: Path
    note: str
    command: tuple[str, ...] = RUN


Make = Callable[[Random, Path], Trial]


def some_command(rng: Random) -> tuple[str, ...]:
    return RUN if rng.random() < 0.75 else rng.choice(OTHERS)
