"""The result of a generation, with its times and memory."""

from __future__ import annotations

from dataclasses import dataclass

from satchel.runtime.generation.sampling.logprobs import TokenLogprob
from satchel.runtime.generation.sequence import ActiveSequence


@dataclass(frozen=True)
class Generation:
    """The result of a generation. `token_ids` excludes the end token; times are in seconds. `kv_bytes` is the size of
    the KV cache and the states.

    `finish_reason` is "stop" (an end token or a stop string), "length" (`max_new_tokens` or the context is used up),
    "loop", "time", "callback" or "closed". `reused_tokens` of the prompt were not fed, since the prefix cache had them.
    `decode_steps` counts tokens after the first, which comes from prefill, and an end token. Of `drafted_tokens`,
    `accepted_tokens` were right, and saved as many runs of the graph.
    `logprobs` has an entry for each of `token_ids`, or is None if not asked for. With a stop string, `token_ids` and
    `logprobs` include its tokens. `score` is that of a beam search, else None; each text of a search has the times and
    steps of the whole search.
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
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @classmethod
    def of(cls, sequence: ActiveSequence, kv_bytes: int) -> Generation:
        """The result of a sequence that has ended, or that is not continued."""
        timing = sequence.timing
        return cls(
            text="".join(sequence.pieces),
            token_ids=tuple(sequence.token_ids),
            finish_reason=sequence.finish_reason or "closed",
            prompt_tokens=len(sequence.prompt),
            reused_tokens=sequence.reused_tokens,
            prefill_seconds=timing.prefill_seconds,
            decode_seconds=timing.decode_seconds,
            decode_steps=timing.decode_steps,
            kv_bytes=kv_bytes,
            logprobs=None if sequence.options.logprobs is None else tuple(sequence.logprobs),
            drafted_tokens=timing.drafted,
            accepted_tokens=timing.accepted,
        )

    @property
    def new_tokens(self) -> int:
        """The number of tokens generated, without the end token."""
        return len(self.token_ids)

    @property
    def prefill_speed(self) -> float:
        """Prompt tokens fed per second; 0 if nothing was run."""
        fed = self.prompt_tokens - self.reused_tokens
        return fed / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_speed(self) -> float:
        """Decode steps per second; 0 if there was none."""
        return self.decode_steps / self.decode_seconds if self.decode_seconds else 0.0
