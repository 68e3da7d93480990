"""Constrained output: which tokens may follow, so that a text matches a grammar. The grammars are llguidance's."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Collection, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.errors import PromptError
from satchel.runtime.generation.grammar import Grammar
from satchel.runtime.generation.options import GenerationOptions
from satchel.runtime.generation.reasoning import Thought, ThoughtLimit
from satchel.runtime.generation.templates.thoughts import FINAL
from satchel.runtime.generation.tokenizer import JsonTokenizer, Tokenizer
from satchel.runtime.util.requirements import not_installed

# JSON as Python writes it. Space wherever JSON allows it would let a model write spaces for ever.
JSON_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
MOST_COMPILED = 32
# By a byte of a mask: inf where a bit is set, the lowest first, and -inf where none is.
MOST_BY_BITS = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little") == 1, np.inf, -np.inf
).astype(np.float32)


class Grammars:
    """Compiles grammars for one tokenizer, and keeps some of them. Threads may share it."""

    def __init__(self, tokenizer: Tokenizer | None, vocabulary: int, ends: Collection[int]) -> None:
        """`vocabulary` is the number of logits, `ends` are the model's end tokens."""
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._ends = sorted(token for token in ends if 0 <= token < vocabulary)
        self._lock = threading.Lock()
        self._tokens: Any = None
        self._compiled: dict[tuple[str, str], Any] = {}

    def constraint(
        self, options: GenerationOptions, prompt: NDArray[np.int64], ends: Collection[int], template: str
    ) -> Constraint | ThoughtLimit | None:
        """What constrains the text after a prompt, if anything does; `ends` are all tokens that end it.

        The marks of reasoning are those that the source of the chat template shows. Raises PromptError for a grammar
        that cannot be compiled, without llguidance, and for a tokenizer that it cannot use.
        """
        grammar, tokenizer, most = options.grammar, self._tokenizer, options.max_thinking_tokens
        if grammar is None:
            thought = Thought.of(tokenizer, prompt, template, most=most) if tokenizer is not None else None
            return None if thought is None else ThoughtLimit(thought)
        library = _library()
        with self._lock:
            matcher = self._matcher(library, grammar).deep_copy()
            tokens = self._tokens
        thought = None
        if grammar.chat and tokenizer is not None:
            answer = None if grammar.calls else FINAL
            thought = Thought.of(tokenizer, prompt, template, most=most, answer=answer)
        return Constraint(matcher, tokens, self._vocabulary, ends, thought)

    def check(self, grammar: Grammar) -> None:
        """Raise PromptError as `constraint` does."""
        with self._lock:
            self._matcher(_library(), grammar)

    def _matcher(self, library: ModuleType, grammar: Grammar) -> Any:
        key = grammar.kind, grammar.source
        found = self._compiled.pop(key, None)
        if found is None:
            if self._tokens is None:
                self._tokens = self._open(library)
            found = _compiled(library, self._tokens, grammar)
        self._compiled[key] = found
        while len(self._compiled) > MOST_COMPILED:
            del self._compiled[next(iter(self._compiled))]
        return found

    def _open(self, library: ModuleType) -> Any:
        if not isinstance(self._tokenizer, JsonTokenizer):
            raise PromptError("a grammar needs a bundle with a tokenizer.json: leave it out for this bundle")
        if not self._ends:
            raise PromptError("a grammar needs a model with an end token, which this bundle does not name")
        size = max(self._vocabulary, self._tokenizer.size)
        try:
            return library.LLTokenizer(self._tokenizer.definition, n_vocab=size, eos_token=self._ends)
        except ValueError as error:
            raise PromptError(f"a grammar cannot be used with this bundle's tokenizer: {_line(error)}") from None


class Constraint:
    """Follows one text through a grammar. `masked` is asked before each token, and `take` told of it afterwards.

    Where the grammar leaves one continuation, its tokens are those of the tokenizer for it: `forced`. So a text does
    not depend on how many of them are fed in one run.
    """

    def __init__(
        self, matcher: Any, tokens: Any, vocabulary: int, ends: Collection[int], thought: Thought | None = None
    ) -> None:
        """`matcher` and `tokens` are llguidance's, `ends` all tokens that end the text."""
        self._matcher, self._tokens, self._vocabulary = matcher, tokens, vocabulary
        self._ends = [token for token in ends if 0 <= token < vocabulary]
        self._thought = thought
        # What logits may be at the most, eight tokens in a row. Memory that is new each time would take longer.
        self._most = np.empty((-(-vocabulary // 8), 8), np.float32)
        self._forced: list[int] = [] if thought is not None else self._next_forced()

    free = False

    @property
    def forced(self) -> list[int]:
        """The tokens that have to come next."""
        return self._forced if self._thought is None else self._thought.forced

    @property
    def complete(self) -> bool:
        """Whether the text matches and nothing may follow."""
        return self._thought is None and bool(self._matcher.is_stopped()) and bool(self._matcher.is_accepting())

    def copy(self) -> Constraint:
        """Another text that has come as far as this one."""
        found = copy.copy(self)  # `_most` is written before each use
        found._matcher, found._forced = self._matcher.deep_copy(), list(self._forced)
        found._thought = None if self._thought is None else self._thought.copy()
        return found

    def masked(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits [vocabulary] with -inf for each token that may not follow, in memory that the next call writes again.

        Raises PromptError if the grammar fails, or leaves no token.
        """
        most = self.most()
        return np.minimum(logits, most, out=most)

    def most(self) -> NDArray[np.float32]:
        """What scores [vocabulary] may be at the most: inf, or -inf for each token that may not follow.

        In memory that the next call writes again, also one of a copy. Raises as `masked`.
        """
        most = self._most.reshape(-1)[: self._vocabulary]
        if self.forced:
            most[:] = -np.inf
            most[self.forced[0]] = np.inf
        elif self._thought is not None and self._thought.thinking:
            most[:] = np.inf
            most[self._ends] = -np.inf
        else:
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)[: len(self._most)]
            self._check()
            np.take(MOST_BY_BITS, bits, axis=0, out=self._most, mode="clip")  # without clip, numpy copies
            if self._thought is not None:
                most[list(self._thought.begins)] = np.inf
            if most.max() < 0:
                raise PromptError("the grammar leaves no token to choose from: loosen it")
        return most

    def take(self, token: int) -> None:
        """Go on after a token. Raises PromptError for one that may not follow."""
        if self._thought is not None:
            if self._thought.thinking or token in self._thought.begins:
                rest = self._thought.take(token)
                if rest is not None:
                    self._begin(rest)
                return
            self._thought = None
        self._consume([token])
        if self._forced:
            del self._forced[0]
        if not self._forced:
            self._forced = self._next_forced()

    def _begin(self, text: str) -> None:
        """Begin the part that has to match, with text that came with the last token of the reasoning."""
        self._thought = None
        if text:
            self._consume(self._tokens.tokenize_str(text))
        self._forced = self._next_forced()

    def _consume(self, tokens: Sequence[int]) -> None:
        if not self._matcher.consume_tokens(tokens):
            self._check()
            raise PromptError("a token was chosen that the grammar does not allow")

    def _next_forced(self) -> list[int]:
        found = [] if self._matcher.is_stopped() else list(self._matcher.compute_ff_tokens())
        self._check()
        return found

    def _check(self) -> None:
        if self._matcher.is_error():
            raise PromptError(f"the grammar fails: {_line(self._matcher.get_error())}")


def _library() -> ModuleType:
    try:
        import llguidance
    except ImportError:
        missing = not_installed("llguidance") or "llguidance is not installed: pip install llguidance"
        raise PromptError(f"a grammar needs satchel's extra grammar: {missing}") from None
    return llguidance


def _compiled(library: ModuleType, tokens: Any, grammar: Grammar) -> Any:
    """llguidance's matcher of a grammar, at its beginning. Raises PromptError."""
    matcher = library.LLMatcher
    try:
        if grammar.kind == "json_schema":
            source = matcher.grammar_from_json_schema(json.loads(grammar.source), defaults=JSON_FORM)
        elif grammar.kind == "regex":
            source = matcher.grammar_from_regex(grammar.source)
        else:
            source = matcher.grammar_from_lark(grammar.source)
    except ValueError as error:
        raise _refused(grammar, str(error)) from None
    limits = library.LLParserLimits(verbose_errors=False)
    found = matcher(tokens, source, log_level=0, limits=limits)
    if found.is_error():
        raise _refused(grammar, found.get_error())
    if found.is_stopped() and not found.is_accepting():
        raise _refused(grammar, "nothing matches it")
    return found


def _refused(grammar: Grammar, reason: str) -> PromptError:
    names = {"json_schema": "JSON schema", "regex": "regular expression", "lark": "Lark grammar"}
    return PromptError(f"the {names[grammar.kind]} cannot be used: {_line(reason)}")


def _line(reason: object) -> str:
    """What a message says, in one line of moderate length."""
    text = " ".join(str(reason).split())
    return text if len(text) <= 300 else f"{text[:297]}..."
