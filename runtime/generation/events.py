"""What a scheduler tells of its requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from satchel.runtime.generation.result import Generation
from satchel.runtime.generation.sampling.logprobs import TokenLogprob


@dataclass(frozen=True)
class Event:
    """News of one request: the tokens that were chosen, and its end.

    Attributes:
        id: The number of the request.
        text: The new text that may be shown; often empty. The texts joined are that of the result.
        token_ids: The new tokens.
        logprobs: Those of the new tokens, if the request asks for them.
        outcome: In the last event of a request, its result, or the error that ended it; else None.
    """

    id: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    outcome: Generation | Exception | None = None


Deliver = Callable[[Event], object]
