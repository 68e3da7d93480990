"""Splits the text of an answer into content, reasoning and calls of tools."""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from satchel.runtime.generation.reasoning import shown
from satchel.runtime.generation.templates.thoughts import thoughts_of
from satchel.runtime.generation.tokenizer import Tokenizer
from satchel.runtime.server.call_readers import UNREADABLE, Schemas, read_all
from satchel.runtime.server.call_source import Incomplete, Piece, Pieces, Source
from satchel.runtime.server.tool_forms import Form, forms_of


@dataclass(frozen=True)
class Syntax:
    """How the answers of a model are written, as far as its chat template shows."""

    template: str

    @cached_property
    def forms(self) -> tuple[Form, ...]:
        """The forms of calls."""
        return forms_of(self.template)

    @cached_property
    def thoughts(self) -> dict[str, str]:
        """What begins reasoning, and what ends it; `<think>` may always."""
        return thoughts_of(self.template)

    @property
    def is_harmony(self) -> bool:
        """Whether answers are messages in channels, as gpt-oss writes them."""
        return all(mark in self.template for mark in HARMONY[:2])

    def marks(self, *, tools: bool) -> set[str]:
        """What must be in the text of an answer, even if it is a special token."""
        if self.is_harmony:
            return set(HARMONY)
        found = {mark for pair in self.thoughts.items() for mark in pair}
        for form in self.forms if tools else ():
            found |= {form.begin, form.end, *form.inner}
        return {mark.removesuffix("thought") for mark in found if mark}

    def special(self, tokenizer: Tokenizer, *, tools: bool) -> frozenset[int]:
        """The special tokens among the marks."""
        ids = (tokenizer.special_token(mark) for mark in self.marks(tools=tools))
        return frozenset(token for token in ids if token is not None)

    def reply(self, prompt: str, tools: Sequence[Mapping[str, Any]], *, several: bool = True) -> Reply | Harmony:
        """What reads an answer to a prompt; calls are looked for if there are tools, and not `several` gives one."""
        functions = [tool["function"] for tool in tools]
        schemas = {function["name"]: function.get("parameters") or {} for function in functions}
        if self.is_harmony:
            return Harmony(schemas, several=several, unfinished=_ends_in_message(prompt))
        open_thought = next((end for begin, end in self.thoughts.items() if prompt.rstrip().endswith(begin)), "")
        return Reply(self.forms if tools else (), self.thoughts, schemas, several=several, thinking=open_thought)


class Reply:
    """Takes the text of one answer as it comes, and gives its pieces."""

    def __init__(
        self,
        forms: Sequence[Form],
        thoughts: Mapping[str, str],
        schemas: Schemas,
        *,
        several: bool = True,
        thinking: str = "",
    ) -> None:
        """`thinking` is what ends the reasoning within which the prompt ends, if it does; `schemas` are the tools."""
        self._forms, self._thoughts, self._schemas, self._several = forms, thoughts, schemas, several
        self._thought: list[str] = []  # what ended each reasoning so far
        self._begins = {form.begin: form for form in forms if form.begin}
        self._bare = next((form for form in forms if not form.begin), None)
        self._state = "thinking" if thinking else "start"
        self._closing = thinking
        self._form = forms[0] if forms else None
        self._held = self._gap = ""  # the gap is the space before a call
        self._calls = 0
        self._source, self._raw = Source(""), ""  # of the calls that are read, until one is sure
        self._run: Pieces | None = None
        self._waiting: list[Piece] = []
        self._sure = False

    def add(self, text: str, *, final: bool = False) -> list[Piece]:
        """The pieces that are known with this text; with a `final` one, all that was held back too."""
        self._held += text
        found: list[Piece] = []
        state = None
        while state != self._state:
            state = self._state
            step = {"start": self._start, "thinking": self._think, "content": self._content, "call": self._call}[state]
            found += [piece for piece in step(final) if piece.text or piece.name]
        return found

    def reasoning_tokens(self, tokenizer: Tokenizer, ids: Sequence[int]) -> int:
        """How many of the tokens of the answer, which has ended, are reasoning, with the marks around it."""
        if self._state == "thinking":
            return len(ids)
        if not self._thought:
            return 0

        def has_ended(count: int) -> bool:
            said = shown(tokenizer, ids[:count])
            return all(said.count(end) >= self._thought.count(end) for end in self._thought)

        return bisect_left(range(len(ids)), True, key=has_ended)

    def _start(self, final: bool) -> Iterator[Piece]:
        stripped = self._held.lstrip()
        begun = next((begin for begin in self._thoughts if stripped.startswith(begin)), None)
        if begun is not None:
            self._state, self._closing, self._held = "thinking", self._thoughts[begun], stripped.removeprefix(begun)
        elif not final and any(begin.startswith(stripped) for begin in self._thoughts):
            return
        elif self._bare is not None and stripped.startswith("{"):
            self._state, self._form, self._held = "call", self._bare, stripped
        else:
            self._state = "content"
        yield from ()

    def _think(self, final: bool) -> Iterator[Piece]:
        thought, closed, rest = self._held.partition(self._closing)
        if closed:
            self._thought.append(self._closing)
            self._state, self._held = "start", rest.lstrip()
            yield Piece("reasoning", thought)
        else:
            yield self._flush("reasoning", (self._closing,), final)

    def _content(self, final: bool) -> Iterator[Piece]:
        begun = [mark for mark in self._begins if mark in self._held]
        if not begun:
            yield self._flush("content", tuple(self._begins), final)
            return
        mark = min(begun, key=self._held.index)
        before, _, self._held = self._held.partition(mark)
        shown = before.rstrip()
        self._state, self._form, self._gap = "call", self._begins[mark], before[len(shown) :]
        yield Piece("content", shown)

    def _call(self, final: bool) -> Iterator[Piece]:
        form = self._form
        if form is None:
            return
        if self._run is None:
            self._source, self._raw = Source(form.end), ""
            self._run, self._waiting, self._sure = read_all(form.read, self._source, self._schemas), [], False
        source, held, self._held = self._source, self._held, ""
        source.held, source.ended = source.held + held, final
        self._raw += held if not self._sure else ""
        try:
            for piece in self._run:
                if piece is None:
                    if not final:
                        return
                    continue
                yield from self._wanted(piece)
            if not form.begin and not self._sure:
                raise ValueError("an object that names no tool")
            found, self._waiting, self._sure = self._waiting, [], True
            for piece in found:
                yield from self._counted(piece)
            self._held = source.held.lstrip()
        except UNREADABLE as error:
            if self._sure:
                self._held = "" if isinstance(error, Incomplete) else source.held
            else:
                yield Piece("content", self._gap + form.begin)
                inner, closed, self._held = self._raw.partition(form.end) if form.end else (self._raw, "", "")
                yield Piece("content", inner + closed)
        self._state, self._run = "content", None

    def _wanted(self, piece: Piece) -> Iterator[Piece]:
        """A piece of a call, once it is sure that there is one: when the first names a tool, or all calls are read."""
        self._sure = self._sure or piece.name in self._schemas
        if not self._sure:
            self._waiting.append(piece)
            return
        found, self._waiting = [*self._waiting, piece], []
        for each in found:
            yield from self._counted(each)

    def _counted(self, piece: Piece) -> Iterator[Piece]:
        """The piece, unless it is of a call too many."""
        self._calls += bool(piece.name)
        if self._several or self._calls == 1:
            yield piece

    def _flush(self, kind: str, marks: tuple[str, ...], final: bool) -> Piece:
        """The held text, but for an end of it that may begin one of the marks, with the space before it."""
        length = len(self._held)
        if marks and not final:
            length -= _overlap(self._held, marks)
            length = len(self._held[:length].rstrip()) if kind == "content" else length
        text, self._held = self._held[:length], self._held[length:]
        return Piece(kind, text)


CHANNEL, MESSAGE, START, ENDS = "<|channel|>", "<|message|>", "<|start|>", ("<|end|>", "<|call|>", "<|return|>")
HARMONY = (CHANNEL, MESSAGE, START, *ENDS, "<|constrain|>")
RECIPIENT = re.compile(r"\bto=(?:functions\.)?([^\s<]+)")


class Harmony:
    """As `Reply`, of answers that are messages: `<|channel|>NAME<|message|>TEXT<|end|>`, one after another.

    The channel "analysis" is reasoning, and a message to a recipient is a call; others are content.
    """

    def __init__(self, schemas: Schemas, *, several: bool = True, unfinished: bool = False) -> None:
        """`unfinished` is whether the prompt ends within a message."""
        self._tools, self._several, self._unfinished = bool(schemas), several, unfinished
        self._schemas = schemas
        self._held, self._called = "", False
        self._streams = False  # whether the open message is a call that has begun
        # What the open message is, and whom it is for; None between messages.
        self._kind: tuple[str, str] | None = (
            ("content", "") if unfinished else None
        )  # of the message, and its recipient

    def add(self, text: str, *, final: bool = False) -> list[Piece]:
        """As `Reply.add`."""
        self._held += text
        found: list[Piece] = []
        while True:
            before = self._kind, self._held
            found += [piece for piece in self._step(final) if piece.text or piece.name]
            if before == (self._kind, self._held):
                return found

    def reasoning_tokens(self, tokenizer: Tokenizer, ids: Sequence[int]) -> int:
        """As `Reply.reasoning_tokens`: those of the messages in the channel for it."""
        ends = {tokenizer.special_token(mark) for mark in ENDS}
        cuts = [place + 1 for place, token in enumerate(ids) if token in ends]
        count = 0
        for start, end in pairwise([0, *cuts, len(ids)]):
            header, begun, _ = shown(tokenizer, ids[start:end]).partition(MESSAGE)
            if begun and not (self._unfinished and start == 0) and self._kind_of(header)[0] == "reasoning":
                count += end - start
        return count

    def _step(self, final: bool) -> Iterator[Piece]:
        if self._kind is None:
            header, begun, rest = self._held.partition(MESSAGE)
            if begun:
                self._kind, self._held = self._kind_of(header), rest
            elif final:
                held, self._held = self._held, ""
                yield Piece("content", "" if any(mark in held for mark in HARMONY) else held)
            return
        kind, name = self._kind
        known = name in self._schemas and (self._several or not self._called)
        if kind == "call" and not self._streams and known and self._held.lstrip().startswith("{"):
            self._streams, self._called, self._held = True, True, self._held.lstrip()
            yield Piece("call", "", name)
        ends = [mark for mark in (*ENDS, START) if mark in self._held]
        if ends:
            mark = min(ends, key=self._held.index)
            text, _, self._held = self._held.partition(mark)
            self._kind = None
        elif final:
            text, self._held, self._kind = self._held, "", None
        elif kind == "call" and not self._streams:
            return
        else:
            length = len(self._held) - _overlap(self._held, (*ENDS, START))
            text, self._held = self._held[:length], self._held[length:]
        if kind != "call" or self._streams:
            yield Piece(kind, text)
            self._streams = self._streams and self._kind is not None
        elif not _is_object(text):
            yield Piece("content", text)
        elif self._several or not self._called:
            self._called = True
            yield Piece("call", text.strip(), name)

    def _kind_of(self, header: str) -> tuple[str, str]:
        recipient = RECIPIENT.search(header)
        if recipient is not None and self._tools:
            return "call", recipient[1]
        channel = header.rpartition(CHANNEL)[2].split()
        return ("reasoning" if channel[:1] == ["analysis"] else "content"), ""


def _ends_in_message(prompt: str) -> bool:
    """Whether a prompt ends within a message, for the model to continue it."""
    return prompt.rfind(MESSAGE) > max(prompt.rfind(mark) for mark in (*ENDS, START))


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except UNREADABLE:
        return False


def _overlap(text: str, marks: Sequence[str]) -> int:
    """The length of the longest end of a text that may begin one of the marks."""
    sizes = [size for mark in marks for size in range(1, len(mark)) if text.endswith(mark[:size])]
    return max(sizes, default=0)
