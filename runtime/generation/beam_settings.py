"""Settings of a beam search. Standard library only."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from types import UnionType
from typing import Literal

from satchel.runtime.errors import PromptError
from satchel.runtime.generation.options import GenerationOptions
from satchel.runtime.generation.sampling.options import DRAW_ONLY
from satchel.runtime.generation.sampling.table import BY_FIELD

MAX_BEAMS = 256
MAX_LENGTH_PENALTY = 10.0  # a length to this power does not overflow

EarlyStopping = bool | Literal["never"]


@dataclass(frozen=True)
class BeamSettings:
    """How to search.

    Attributes:
        beams: The number of beams, and the maximum number of results.
        max_new_tokens: The maximum tokens of a text, including its end token; 0 runs nothing.
        end_tokens: Token ids, each of which ends a text.
        length_penalty: A text's log-probability is divided by its length to this power: above 0 favors long texts.
        early_stopping: True stops as soon as `beams` texts have ended. False goes on while the best open text would, at
            its present length, beat one of them; "never" while it could at any length.
        time_limit: The maximum seconds, from the start of prefill; None for no limit.
        adapter: The adapter to search with; None for the base model.
    """

    beams: int
    max_new_tokens: int
    end_tokens: Collection[int] = ()
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    time_limit: float | None = None
    adapter: str | None = None


def check_beams(
    options: GenerationOptions, beams: int, length_penalty: float = 1.0, early_stopping: EarlyStopping = False
) -> None:
    """Raise PromptError for values out of range, and for options that have no effect on beams."""
    if not _is(beams, int) or not 1 <= beams <= MAX_BEAMS:
        raise PromptError(f"--beams {beams}: must be a whole number from 1 to {MAX_BEAMS}")
    if not _is(length_penalty, int | float) or not abs(length_penalty) <= MAX_LENGTH_PENALTY:
        limit = f"{MAX_LENGTH_PENALTY:g}"
        raise PromptError(f"--length-penalty {length_penalty}: must be a number from -{limit} to {limit}")
    if not isinstance(early_stopping, bool) and early_stopping != "never":
        raise PromptError(f"--early-stopping {early_stopping}: must be true, false or never")
    drawing = ("temperature", *DRAW_ONLY)
    given = [(BY_FIELD[field].flag, getattr(options, field)) for field in drawing if options.differs(field)]
    given += [("--stop", repr(text)) for text in options.stop]
    given += [("--logprobs", options.logprobs), ("--max-repeats", options.max_repeats or None)]
    given += [("--max-thinking-tokens", options.max_thinking_tokens)]
    for flag, value in (pair for pair in given if pair[1] is not None):
        raise PromptError(f"{flag} {value}".strip() + ": cannot be combined with --beams")


def _is(value: object, kind: type | UnionType) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
