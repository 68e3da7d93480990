"""Text generation from a bundle: pieces of text as they come, or the whole at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from satchel.runtime.bundle import open_bundle
from satchel.runtime.defaults import MAX_NEW_TOKENS, PROVIDER
from satchel.runtime.engine import Engine, TokenIds
from satchel.runtime.errors import PromptError
from satchel.runtime.text_stream import TextStream
from satchel.runtime.token_stream import Choose, TokenStream, greedy
from satchel.runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class Generation:
    """What a generation gave and cost. `token_ids` leaves out the end token; times are in seconds, `kv_bytes` in bytes.

    `finish_reason` is "stop" (an end token came), "length" (`max_new_tokens` or the context is used up) or "closed".
    `decode_steps` counts runs of the decode graph: the first token comes from prefill, and an end token costs a step.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float
    decode_steps: int
    kv_bytes: int

    @property
    def new_tokens(self) -> int:
        """The number of tokens generated, without the end token."""
        return len(self.token_ids)

    @property
    def prefill_speed(self) -> float:
        """Prompt tokens per second; 0 when nothing was run."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_speed(self) -> float:
        """Decode steps per second; 0 when there was none."""
        return self.decode_steps / self.decode_seconds if self.decode_seconds else 0.0


class PieceStream:
    """The generated text in pieces: an iterator of non-empty strings, and a context manager that frees the KV cache.

    Leaving it early is safe. It belongs to one thread at a time. Without a tokenizer there are no pieces.
    """

    def __init__(self, tokens: TokenStream, text: TextStream | None) -> None:
        self._tokens = tokens
        self._text = text
        self._pieces: list[str] = []

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        for token in self._tokens:
            if self._text and (piece := self._text.add(token)):
                return self._shown(piece)
        if self._text and (piece := self._text.finish()):
            return self._shown(piece)
        raise StopIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the stream and free its KV cache."""
        self._tokens.close()

    def result(self) -> Generation:
        """Run what is left of the stream, if anything, and sum it up."""
        for _ in self:
            pass
        tokens = self._tokens
        return Generation(
            text="".join(self._pieces),
            token_ids=tuple(tokens.token_ids),
            finish_reason=tokens.finish_reason or "closed",
            prompt_tokens=tokens.prompt_tokens,
            prefill_seconds=tokens.prefill_seconds,
            decode_seconds=tokens.decode_seconds,
            decode_steps=tokens.decode_steps,
            kv_bytes=tokens.kv_bytes,
        )

    def _shown(self, piece: str) -> str:
        self._pieces.append(piece)
        return piece


class Generator:
    """A bundle ready to generate. Threads may share one: each generation has a state of its own."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None, max_context: int) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.max_context = max_context

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        provider: str = PROVIDER,
        threads: int | None = None,
        max_context: int | None = None,
        verbose: bool = False,
        progress: bool = False,
    ) -> Generator:
        """Open a bundle folder.

        `threads` None means one per physical core; `max_context` (positions) None means the bundle's own and may only
        lower it; `verbose` shows ONNX Runtime's log, `progress` a bar while a large bundle is first checked.
        Raises BundleError, ProviderError, and PromptError for a `max_context` that the bundle does not allow.
        """
        bundle = open_bundle(path, progress=progress)
        limit = bundle.manifest.model.max_context
        if max_context is not None and not 1 <= max_context <= limit:
            raise PromptError(f"--max-context {max_context}: this bundle allows 1 to {limit}")
        engine = Engine.open(bundle, provider, threads, verbose=verbose)
        tokenizer = Tokenizer.open(bundle) if bundle.manifest.tokenizer else None
        return cls(engine, tokenizer, max_context or limit)

    def generate(
        self, prompt: str | TokenIds, max_new_tokens: int = MAX_NEW_TOKENS, choose: Choose = greedy
    ) -> Generation:
        """Continue a prompt (text or token ids) and return the whole. Raises PromptError."""
        with self.stream(prompt, max_new_tokens, choose) as stream:
            return stream.result()

    def stream(
        self, prompt: str | TokenIds, max_new_tokens: int = MAX_NEW_TOKENS, choose: Choose = greedy
    ) -> PieceStream:
        """Continue a prompt (text or token ids) piece by piece; `choose` picks a token from logits [vocabulary].

        The pieces joined are the text of `generate`. Raises PromptError here, before anything runs.
        """
        ids = self._encode(prompt) if isinstance(prompt, str) else prompt
        tokens = TokenStream(self.engine, ids, max_new_tokens, self.max_context, choose)
        text = TextStream(self.tokenizer, [int(token) for token in ids]) if self.tokenizer else None
        return PieceStream(tokens, text)

    def _encode(self, prompt: str) -> Sequence[int]:
        if self.tokenizer is None:
            raise PromptError("this bundle has no tokenizer: give the prompt as token ids from Python")
        ids = self.tokenizer.encode(prompt)
        if not ids:
            raise PromptError("the prompt is empty: give some text to continue")
        return ids
