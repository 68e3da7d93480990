"""What a beam search may be asked for. Standard library only."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from types import UnionType
from typing import Literal

from satchel.runtime.errors import PromptError
from satchel.runtime.generation.options import GenerationOptions
from satchel.runtime.generation.sampling.options import DRAW_ONLY
from satchel.runtime.generation.sampling.table import BY_FIELD

MOST_BEAMS = 256
HIGHEST_LENGTH_PENALTY = 10.0  # no length to this power overflows

EarlyStopping = bool | Literal["never"]


@dataclass(frozen=True)
class BeamSettings:
    """How to search.

    Attributes:
        beams: How many texts go on at each step, and the most that are found.
        max_new_tokens: The most tokens of a text, its end token included; 0 runs nothing.
        end_tokens: Token ids, each of which ends a text.
        length_penalty: The power of its length that a text's log-probability is divided by: above 0 favors long texts.
        early_stopping: True ends the search with the first `beams` texts that have ended. False goes on while the best
            open text would, as it is, beat one of them; "never" asks so of the length that favors it most.
        time_limit: The most seconds, from the start of prefill; None for no limit.
    """

    beams: int
    max_new_tokens: int
    end_tokens: Collection[int] = ()
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    time_limit: float | None = None


def check_beams(
    options: GenerationOptions,
    beams: int,
    length_penalty: float = 1.0,
    early_stopping: EarlyStopping = False,
    samples: int | None = None,
) -> None:
    """Raise PromptError for values out of range, and for options that mean nothing with beams.

    `samples` is a number of samples that was asked for beside the beams. What `options` say by themselves is not
    checked.
    """
    if not _is(beams, int) or not 1 <= beams <= MOST_BEAMS:
        raise PromptError(f"--beams {beams}: must be a whole number from 1 to {MOST_BEAMS}")
    if not _is(length_penalty, int | float) or not abs(length_penalty) <= HIGHEST_LENGTH_PENALTY:
        limit = f"{HIGHEST_LENGTH_PENALTY:g}"
        raise PromptError(f"--length-penalty {length_penalty}: must be a number from -{limit} to {limit}")
    if not isinstance(early_stopping, bool) and early_stopping != "never":
        raise PromptError(f"--early-stopping {early_stopping}: must be true, false or never")
    drawing = ("temperature", *DRAW_ONLY)
    given = [(BY_FIELD[field].flag, getattr(options, field)) for field in drawing if options.differs(field)]
    given += [("--stop", repr(text)) for text in options.stop]
    given += [("--logprobs", options.logprobs), ("--num-return-sequences", samples)]
    for flag, value in (pair for pair in given if pair[1] is not None):
        raise PromptError(f"{flag} {value}: cannot be had together with --beams: leave one of them out")


def _is(value: object, kind: type | UnionType) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
