"""The turns of a user: typed on a terminal, or read from standard input line by line."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from satchel.runtime.errors import PromptError
from satchel.runtime.util import interrupt

PROMPT, MORE = "> ", "... "


class _Lines:
    """Joins lines to turns: a line that ends with a backslash continues on the next; blank turns are skipped."""

    def __init__(self) -> None:
        self.pending: list[str] = []

    def add(self, line: str) -> str:
        """The turn that `line` completes; empty if there is none."""
        goes_on = line.endswith("\\")
        self.pending.append(line[:-1] if goes_on else line)
        return "" if goes_on else self.rest()

    def rest(self) -> str:
        """The turn of the lines so far; empty if there is none."""
        turn, self.pending = "\n".join(self.pending), []
        return turn if turn.strip() else ""


def typed_turns() -> Iterator[str]:
    """The user's input, turn by turn. Ctrl-C at the prompt clears the line."""
    with contextlib.suppress(ImportError):  # a console of Windows edits lines itself
        import readline  # noqa: F401  # gives input() its line editing and the arrow keys

    lines = _Lines()
    while True:
        prompt = MORE if lines.pending else PROMPT
        try:
            if not sys.stdout.isatty():  # input() would write the prompt among the answers
                print(prompt, end="", file=sys.stderr, flush=True)
                prompt = ""
            turn = lines.add(input(prompt))
        except EOFError:
            print(file=sys.stderr)
            break
        except UnicodeDecodeError:
            print("satchel: error: not UTF-8 text: set the terminal to UTF-8", file=sys.stderr)
            continue
        except KeyboardInterrupt:
            interrupt.forget()
            print("\n/exit or Ctrl-D quits", file=sys.stderr)
            lines = _Lines()
            continue
        if turn:
            yield turn
    if turn := lines.rest():
        yield turn


def read_turns() -> Iterator[str]:
    """The turns of standard input, each read when it is needed. Raises PromptError for a line that is not UTF-8."""
    lines = _Lines()
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            text = line.decode("utf-8").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise PromptError(
                f"line {number} of standard input is not UTF-8 text (byte {error.start}): convert it to UTF-8"
            ) from None
        if turn := lines.add(text):
            yield turn
    if turn := lines.rest():
        yield turn
