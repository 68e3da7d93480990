"""What a generation gave and cost."""

from __future__ import annotations

from dataclasses import dataclass

from satchel.runtime.generation.sampling.logprobs import TokenLogprob
from satchel.runtime.generation.sequence import ActiveSequence


@dataclass(frozen=True)
class Generation:
    """What a generation gave and cost. `token_ids` leaves out the end token; times are in seconds, `kv_bytes` in bytes.

    `finish_reason` is "stop" (an end token or a stop string came), "length" (`max_new_tokens` or the context is used
    up), "time", "callback" or "closed". Of the prompt's tokens `reused_tokens` were not fed again, since their keys and
    values were kept. `decode_steps` counts runs of the decode graph: the first token comes from prefill, and an end
    token costs a step. `logprobs` has an entry for each of `token_ids`; None where none were asked for. With a stop
    string, `token_ids` and `logprobs` include the tokens that it came in. `score` is that of a beam search, None
    elsewhere; each text of a search has the times and steps of all of it.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    reused_tokens: int
    prefill_seconds: float
    decode_seconds: float
    decode_steps: int
    kv_bytes: int
    logprobs: tuple[TokenLogprob, ...] | None
    score: float | None = None

    @classmethod
    def of(cls, continuation: ActiveSequence, kv_bytes: int) -> Generation:
        """The sum of a continuation that has ended, or that nobody will go on with."""
        timing = continuation.timing
        return cls(
            text="".join(continuation.pieces),
            token_ids=tuple(continuation.token_ids),
            finish_reason=continuation.finish_reason or "closed",
            prompt_tokens=len(continuation.prompt),
            reused_tokens=continuation.reused_tokens,
            prefill_seconds=timing.prefill_seconds,
            decode_seconds=timing.decode_seconds,
            decode_steps=timing.decode_steps,
            kv_bytes=kv_bytes,
            logprobs=None if continuation.options.logprobs is None else tuple(continuation.logprobs),
        )

    @property
    def new_tokens(self) -> int:
        """The number of tokens generated, without the end token."""
        return len(self.token_ids)

    @property
    def prefill_speed(self) -> float:
        """Tokens of the prompt that were fed, per second; 0 when nothing was run."""
        fed = self.prompt_tokens - self.reused_tokens
        return fed / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_speed(self) -> float:
        """Decode steps per second; 0 when there was none."""
        return self.decode_steps / self.decode_seconds if self.decode_seconds else 0.0
