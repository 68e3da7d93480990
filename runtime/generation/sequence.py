"""One active request: it takes logits, chooses tokens, gives text, and knows when it has ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.errors import PromptError
from satchel.runtime.execution.state import Logits, State
from satchel.runtime.generation.constraint import Constraint
from satchel.runtime.generation.detokenizer import IncrementalDetokenizer
from satchel.runtime.generation.options import GenerationOptions
from satchel.runtime.generation.reasoning import ThoughtLimit
from satchel.runtime.generation.repeats import RepeatDetector
from satchel.runtime.generation.sampling.logprobs import TokenLogprob, log_probabilities
from satchel.runtime.generation.sampling.sampler import Sampler
from satchel.runtime.generation.snapshots import NO_SNAPSHOTS, Snapshots
from satchel.runtime.generation.stop_strings import StopStrings

if TYPE_CHECKING:
    from satchel.runtime.generation.speculation import Drafter

Choose = Callable[[Logits], int]
Callback = Callable[[str], object]


@dataclass
class Timing:
    """Seconds until the first token was chosen, seconds for further tokens, and the number of their steps.

    `drafted` tokens were checked, of which `accepted` were right: as many runs of the graph were saved.

    The steps of a batch count in full for each of its rows.
    """

    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_steps: int = 0
    drafted: int = 0
    accepted: int = 0


class ActiveSequence:
    """The new tokens and the text of one prompt; the caller runs the graphs.

    `take` is called with the logits of the prompt's last token, then with those of each token taken, until
    `finish_reason` is set: "stop" (an end token or a stop string), "length" (`max_new_tokens` or the context), "loop"
    (`max_repeats`), "time" (the time limit), "callback" (it returned something true), "closed" (closed early) or
    "error". The last new token need not be fed, so k new tokens after p prompt tokens take p + k - 1 positions: a
    prompt that fills the context exactly still gets one token. End tokens are not in `token_ids`.
    """

    def __init__(
        self,
        prompt: NDArray[np.int64],
        options: GenerationOptions,
        limit: int,
        choose: Choose | Sampler,
        end_tokens: Collection[int],
        text: IncrementalDetokenizer | None,
        callback: Callback | None = None,
        snapshots: Snapshots = NO_SNAPSHOTS,
        constraint: Constraint | ThoughtLimit | None = None,
    ) -> None:
        """`choose` is a sampler, or picks a token from logits.

        `limit` is the maximum number of tokens, `text` decodes them, `callback` gets each piece and may end this.
        """
        self.prompt = prompt
        self.options = options
        self.limit = limit
        self.snapshots = snapshots
        self.constraint = constraint
        self.drafter: Drafter | None = None
        self.token_ids: list[int] = []
        self.pieces: list[str] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: str | None = None if limit else "length"
        self.error: Exception | None = None
        self.reused_tokens = 0
        self.timing = Timing()
        self._sampler = choose if isinstance(choose, Sampler) else None
        self._choose = choose.choose if isinstance(choose, Sampler) else choose
        self._end_tokens = end_tokens
        self._text = text
        self._stops = StopStrings(options.stop)
        self._repeats = RepeatDetector(options.max_repeats) if options.max_repeats else None
        self._callback = callback
        self._began = 0.0
        self._deadline: float | None = None

    @property
    def positions(self) -> int:
        """The maximum number of KV cache positions that this takes."""
        return len(self.prompt) + max(self.limit - 1, 0)

    @property
    def fed(self) -> NDArray[np.int64]:
        """The prompt and the new tokens; the KV cache holds a prefix of them."""
        return np.concatenate([self.prompt, np.asarray(self.token_ids, np.int64)])

    def begin(self, shared: ActiveSequence | None = None) -> None:
        """Start the clock of the time limit: at the time of `shared`, if its prompt was fed for this one too."""
        self._began = time.monotonic() if shared is None else shared._began
        if self.options.time_limit is not None:
            self._end_at(self._began + self.options.time_limit)

    def end_within(self, seconds: float) -> None:
        """End with "time" after so many seconds from now, or when an earlier such limit is over."""
        self._end_at(time.monotonic() + seconds)

    def check_time(self) -> None:
        """End with "time" if the time limit is over."""
        if self._deadline is not None and self.finish_reason is None and time.monotonic() >= self._deadline:
            self._end("time")

    def take(self, logits: Logits) -> str:
        """Choose the next token from logits [vocabulary]. Returns the text that may be shown now, often empty.

        Raises what choosing raises, and PromptError for a token outside the vocabulary; this has then ended.
        """
        return self._take(lambda: (self._checked(logits), logits))

    def take_from(self, state: State) -> str:
        """As `take`, from the last step of a state; its logits are not read if its best tokens are enough."""
        return self._take(lambda: self._chosen_from(state))

    def close(self, reason: str = "closed") -> None:
        """End this early; nothing changes it afterwards. Text that was held back is shown."""
        if self.finish_reason is None:
            self._end(reason)

    def end_drafts(self) -> None:
        """Free what drafts for this, and keep its text for others."""
        drafter, self.drafter = self.drafter, None
        if drafter is not None:
            drafter.close(self.token_ids)

    def fail(self, error: Exception) -> None:
        """End this with an error."""
        self.error, self.finish_reason = error, "error"

    def _end_at(self, deadline: float) -> None:
        self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)

    def _take(self, choose: Callable[[], tuple[int, Logits | None]]) -> str:
        shown = len(self.pieces)
        try:
            self._add(*choose())
        except Exception:  # what follows would be wrong; an interrupt is not an Exception, and leaves this open
            self.finish_reason = "error"
            raise
        return "".join(self.pieces[shown:])

    def _checked(self, logits: Logits) -> int:
        token = int(self._choose(logits if self.constraint is None else self.constraint.masked(logits)))
        if not 0 <= token < len(logits):
            raise PromptError(f"token id {token} was chosen, outside the vocabulary of {len(logits)} ids")
        return token

    def _chosen_from(self, state: State) -> tuple[int, Logits | None]:
        """The token, and the logits if they had to be read."""
        free = self.constraint is None or self.constraint.free
        if self._sampler is not None and self.options.logprobs is None and free:
            token = self._sampler.choose_best(state.best)
            if token is not None:
                return token, None
        return self._checked(state.logits), state.logits

    def _add(self, token: int, logits: Logits | None) -> None:
        if self.constraint is not None:
            self.constraint.take(token)
        if token in self._end_tokens:
            self._end("stop")
            return
        if logits is not None and self.options.logprobs is not None:
            self.logprobs.append(log_probabilities(logits, token, self.options.logprobs))
        self.token_ids.append(token)
        piece, found = self._stops.add(self._text.add(token)) if self._text else ("", False)
        unwanted = self._show(piece)
        if found:
            self.finish_reason = "stop"
        elif unwanted:
            self._end("callback")
        elif self.constraint is not None and self.constraint.complete:
            self._end("stop")
        elif len(self.token_ids) == self.limit:
            self._end("length")
        elif self._repeats is not None and self._repeats.add(token):
            self._end("loop")
        else:
            self.check_time()

    def _end(self, reason: str) -> None:
        self.finish_reason = reason
        if self._text and self.token_ids:  # without a token, only text of the prompt is held back
            piece, found = self._stops.add(self._text.finish())
            self._show(piece if found else piece + self._stops.finish())

    def _show(self, piece: str) -> bool:
        """Add a piece to the text. Returns whether the callback asks to stop."""
        if not piece:
            return False
        self.pieces.append(piece)
        return bool(self._callback and self._callback(piece))
