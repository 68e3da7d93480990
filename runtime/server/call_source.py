"""The text of calls as it comes: readers are generators that take it, and yield None while they need more."""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """A part of an answer: "content" or "reasoning" with its text, or "call" with text of its arguments.

    A piece of a call with a name begins one; those without go on with its arguments, a text of JSON.
    """

    kind: str
    text: str
    name: str = ""


class Incomplete(ValueError):
    """The text ends within a call that has begun."""


Pieces = Generator[Piece | None, None, None]
Found = Generator[Piece | None, None, "re.Match[str] | None"]
Answer = Generator[Piece | None, None, bool]

BETWEEN = " \t\r\n,;]"  # what may stand after a call
_STRUCTURE = re.compile(r'[{}\[\]"]|\\.', re.DOTALL)


class Source:
    """What is left of a text that grows until it has `ended`; `end` is the mark after the calls, if there is one."""

    def __init__(self, end: str) -> None:
        self.held, self.end, self.ended = "", end, False

    @property
    def closed(self) -> bool:
        """Whether all of the calls has come."""
        return self.ended or bool(self.end and self.end in self.held)

    def match(self, pattern: re.Pattern[str]) -> Found:
        """Take what matches at the place; None if nothing does, which is known when the text is closed."""
        while True:
            match = pattern.match(self.held)
            if match is not None and (match.end() < len(self.held) or self.ended):
                self.held = self.held[match.end() :]
                return match
            if match is None and self.closed:
                return None
            yield None

    def at_end(self) -> Answer:
        """Whether no other call follows; the end is taken."""
        while True:
            rest = self.held.lstrip(BETWEEN)
            if self.end and rest.startswith(self.end):
                self.held = rest.removeprefix(self.end)
                return True
            if self.ended or not self.end.startswith(rest):
                self.held = rest if not rest else self.held
                return not rest
            if rest and not self.end:
                return False
            yield None

    def whole(self) -> Generator[Piece | None, None, str]:
        """Take all text before the end."""
        while not self.closed:
            yield None
        inner = self.held.partition(self.end)[0] if self.end else self.held
        self.held = self.held[len(inner) :]
        return inner

    def text_until(self, mark: re.Pattern[str], longest: int) -> Pieces:
        """Take text up to a mark of at most `longest` characters; gives it as a string of JSON. Raises Incomplete."""
        yield Piece("call", '"')
        while (match := mark.search(self.held)) is None:
            sure = len(self.held) - (0 if self.ended else longest)
            if sure > 0:
                yield Piece("call", escaped(self.held[:sure]))
                self.held = self.held[sure:]
            if self.ended:
                raise Incomplete
            yield None
        text, self.held = self.held[: match.start()], self.held[match.end() :]
        yield Piece("call", f'{escaped(text)}"')

    def json_object(self) -> Pieces:
        """Take an object of JSON, and give its text. Raises Incomplete if the text ends first."""
        depth, quoted = 0, False
        while True:
            for found in _STRUCTURE.finditer(self.held):
                sign = found[0]
                if sign == '"':
                    quoted = not quoted
                elif not quoted and sign in "{[":
                    depth += 1
                elif not quoted and sign in "}]":
                    depth -= 1
                    if depth == 0:
                        yield Piece("call", self.held[: found.end()])
                        self.held = self.held[found.end() :]
                        return
            backslashes = len(self.held) - len(self.held.rstrip("\\"))
            sure = len(self.held) - backslashes % 2
            if sure:
                yield Piece("call", self.held[:sure])
                self.held = self.held[sure:]
            if self.ended:
                raise Incomplete
            yield None


def escaped(text: str) -> str:
    """A text as it stands within a string of JSON."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
