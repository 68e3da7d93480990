"""The reasoning before an answer: where it ends, and after how many tokens it has to."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.generation.templates.thoughts import (
    CHANNELS,
    MESSAGE_START,
    NEXT_MESSAGE,
    THOUGHT_END,
    THOUGHT_MESSAGE,
    thoughts_of,
)
from satchel.runtime.generation.tokenizer import Tokenizer

TAIL = 16  # tokens in which the end of reasoning is looked for


class Thought:
    """Follows the reasoning before an answer, which no grammar constrains, to its end.

    `forced` are the tokens that have to come next: those that begin it, and those that end it when its tokens are used
    up. `thinking` is whether it has begun.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        end: str,
        *,
        begins: Collection[int] = (),
        header: str = "",
        closing: str = "",
        most: int | None = None,
    ) -> None:
        """The prompt has begun it already, unless one of the tokens `begins` may do so.

        `end` is the text that ends it, `header` what it has to begin with, `closing` what is written to end it after
        `most` tokens, if not `end`.
        """
        self.begins = frozenset(begins)
        self.thinking = not begins
        self.forced = tokenizer.encode_rendered(header) if header else []
        self._tokenizer, self._end, self._left = tokenizer, end, most
        self._end_ids = tokenizer.encode_rendered(end)
        self._closing_ids = tokenizer.encode_rendered(closing) if closing else self._end_ids
        self._last: list[int] = []

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer,
        prompt: NDArray[np.int64],
        template: str,
        *,
        most: int | None = None,
        answer: str | None = None,
    ) -> Thought | None:
        """The reasoning after a prompt, of at most so many tokens; None if the answer follows at once.

        Where answers are messages in channels, `answer` is the beginning of the one that has to follow, FINAL for text;
        None for any.
        """
        said, marks = shown(tokenizer, prompt[-TAIL:].tolist()).rstrip(), thoughts_of(template)
        if all(mark in template for mark in CHANNELS):
            told = shown(tokenizer, prompt.tolist())
            if told.rfind(CHANNELS[1]) > max(told.rfind(mark) for mark in (THOUGHT_END, MESSAGE_START)):
                return None  # the prompt ends within a message
            if answer:
                return cls(tokenizer, answer, closing=NEXT_MESSAGE + answer, most=most)
            return cls(tokenizer, THOUGHT_END, header=THOUGHT_MESSAGE, most=most)
        for begin, end in marks.items():
            if said.endswith(begin):
                return cls(tokenizer, end, most=most)
        if said.endswith(tuple(marks.values())):
            return None
        for begin, end in marks.items():
            first, *rest = tokenizer.encode_rendered(begin)
            if begin in template and (not rest or tokenizer.is_hidden(first)):
                return cls(tokenizer, end, begins=[first], most=most)
        return None

    def copy(self) -> Thought:
        """Another text that has come as far as this one."""
        found = copy.copy(self)
        found.forced = list(self.forced)
        return found

    def take(self, token: int) -> str | None:
        """Go on after a token: the text after the end of the reasoning, once that has come; None before."""
        if not self.thinking:
            self.thinking = True
            return None
        self._last = [*self._last, token][-max(TAIL, len(self._end_ids)) :]
        if self._last[-len(self._end_ids) :] == self._end_ids:
            return ""
        _, found, rest = shown(self._tokenizer, self._last).partition(self._end)
        if found:
            return rest.lstrip()
        if self.forced:
            del self.forced[0]
        elif self._left is not None:
            self._left -= 1
            self.forced = list(self._closing_ids) if self._left <= 0 else []
        return None


class ThoughtLimit:
    """What constrains an answer that may reason for so many tokens, and is free otherwise."""

    complete = False

    def __init__(self, thought: Thought) -> None:
        self._thought: Thought | None = thought

    @property
    def free(self) -> bool:
        """Whether any token may follow."""
        return not self.forced

    @property
    def forced(self) -> list[int]:
        """The tokens that have to come next."""
        return self._thought.forced if self._thought is not None else []

    def masked(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits [vocabulary], with -inf for each token that may not follow."""
        if self.free:
            return logits
        found = np.full_like(logits, -np.inf)
        found[self.forced[0]] = 0
        return found

    def take(self, token: int) -> None:
        """Go on after a token."""
        thought = self._thought
        if thought is None:
            return
        unbegun = not thought.thinking and token not in thought.begins
        if unbegun or thought.take(token) is not None:
            self._thought = None


def shown(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of ids, with special tokens."""
    text = ""
    run: list[int] = []
    for token in ids:
        if tokenizer.is_hidden(token):
            text, run = text + tokenizer.decode(run) + (tokenizer.token_text(token) or ""), []
        else:
            run.append(token)
    return text + tokenizer.decode(run)
