"""What can be asked of a generator."""

from __future__ import annotations

from dataclasses import dataclass, field

from satchel.runtime.execution.engine import TokenIds
from satchel.runtime.generation.options import GenerationOptions

Prompt = str | TokenIds


@dataclass(frozen=True)
class Request:
    """A prompt, how to continue it, and how it is scheduled among other requests.

    Attributes:
        prompt: Text, encoded as it is, or token ids.
        options: How it is continued.
        sample: The number of the sample: requests that differ in this alone draw other random numbers from their seed.
        priority: Requests of a higher priority come first.
        client: Clients of one priority get equal shares; any name.
        visible: Special tokens that have their text in the answer; others have none.
        timeout: Maximum seconds from submission, time in the queue included; None for no limit.
    """

    prompt: Prompt
    options: GenerationOptions = field(default_factory=GenerationOptions)
    sample: int = 0
    priority: int = 0
    client: str = ""
    visible: frozenset[int] = frozenset()
    timeout: float | None = None
