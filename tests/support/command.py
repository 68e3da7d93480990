"""satchel's commands in the test's own process, as the fixture `satchel` runs them."""

from __future__ import annotations

import io
import json
import sys
from typing import Any, NamedTuple

import pytest

from satchel.runtime.cli import main as cli


class Said(NamedTuple):
    """What a command wrote to standard output and to standard error."""

    out: str
    err: str


class Satchel:
    """Runs `satchel WORDS`, with `stdin` as if it were piped in."""

    def __init__(self, capture: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> None:
        self._capture, self._patch = capture, patch

    def __call__(self, *words: object, stdin: str | bytes | None = None, code: int = 0) -> Said:
        """What a command says that must end with exit code `code`."""
        if stdin is not None:
            content = stdin.encode() if isinstance(stdin, str) else stdin
            self._patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), "ascii"))
        self._capture.readouterr()
        try:
            found = cli.main([str(word) for word in words])
        except SystemExit as stop:  # of the parser of arguments
            found = stop.code
        said = Said(*self._capture.readouterr())
        assert found == code, said
        return said

    def json(self, *words: object, code: int = 0) -> Any:
        """What a command prints with --json: one object on one line, and nothing on standard error."""
        out, err = self(*words, "--json", code=code)
        assert (err, out.count("\n")) == ("", 1)
        return json.loads(out)

    def refuses(self, *words: object, stdin: str | bytes | None = None) -> str:
        """The one line, without `satchel: error: `, with which a command ends with exit code 2 and prints nothing."""
        out, err = self(*words, stdin=stdin, code=2)
        assert (out, err.count("\n")) == ("", 1), err
        assert err.startswith("satchel: error: ")
        return err.removeprefix("satchel: error: ").rstrip("\n")
