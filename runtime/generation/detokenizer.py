"""Incremental detokenization: each piece is final, and the pieces joined are the text of all ids."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import islice

from satchel.runtime.generation.tokenizer import Tokenizer

UNFINISHED = "\ufffd"  # what decoding gives for bytes that are not, or not yet, a whole character
PROMPT_CONTEXT = 8  # tokens of the prompt that decoding starts from
LONGEST_CHARACTER = 4  # bytes, and so at most as many tokens
LONGEST_WINDOW = 64  # maximum tokens held back: after that, bytes that are not UTF-8 are shown as such


class IncrementalDetokenizer:
    """Decodes a continuation of `prompt`, token by token, in time linear in its length.

    The text of a token depends on those before it (a leading space, the first bytes of a character), so each step
    decodes a short window of tokens, of which the first `_shown` characters were returned before. A piece never ends
    inside a character. Special tokens have no text, but for those that are to be visible.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], visible: Collection[int] = ()) -> None:
        self._tokenizer, self._visible = tokenizer, visible
        # The text of the last `_pending` tokens had not been returned when the window was last cut.
        self._window, self._pending = _end_of(tokenizer, prompt)
        self._shown = len(tokenizer.decode(self._window[: len(self._window) - self._pending]))

    def add(self, token: int) -> str:
        """The text that `token` completes; empty while a character is incomplete, and for special tokens."""
        if token in self._visible:
            piece = self.finish()
            if piece:  # a character that stays incomplete
                self._window, self._pending, self._shown = [], 0, 0
            return piece + (self._tokenizer.token_text(token) or "")
        if self._tokenizer.is_hidden(token):
            return ""
        self._window.append(token)
        self._pending += 1
        text = self._tokenizer.decode(self._window)
        overlong = self._pending > LONGEST_WINDOW
        final = text if overlong else text.rstrip(UNFINISHED)
        piece = final[self._shown :]
        if overlong or (piece and final == text):
            self._window = self._window[-self._pending :]
            self._pending = 0
            self._shown = len(self._tokenizer.decode(self._window))
        else:
            self._shown += len(piece)
        return piece

    def finish(self) -> str:
        """The text still held back, incomplete characters as U+FFFD. Nothing may be added afterwards."""
        piece = self._tokenizer.decode(self._window)[self._shown :]
        self._shown += len(piece)
        return piece


def _end_of(tokenizer: Tokenizer, prompt: Sequence[int]) -> tuple[list[int], int]:
    """The last prompt tokens with text, from where a character begins, and how many of them are not yet shown.

    A prompt of ids may end inside a character; the tokens of that are not yet shown.
    """
    backwards = (token for token in reversed(prompt) if not tokenizer.is_hidden(token))
    visible = list(islice(backwards, PROMPT_CONTEXT + LONGEST_CHARACTER))[::-1]
    for unfinished in range(LONGEST_CHARACTER):
        for length in range(PROMPT_CONTEXT, PROMPT_CONTEXT + LONGEST_CHARACTER):
            window = visible[-length:]
            text = tokenizer.decode(window[: max(0, len(window) - unfinished)])
            if not text.startswith(UNFINISHED) and not text.endswith(UNFINISHED):
                return window, min(unfinished, len(window))
    return visible, 0
