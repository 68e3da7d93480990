"""Progress shows only where somebody can see it, only for work that takes long, and goes away."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest

from satchel.runtime.util import progress
from satchel.runtime.util.progress import Waiting, progress_bar, waiting

Make = Callable[..., Waiting]
MAKERS = [partial(waiting, "at it"), partial(progress_bar, 10, "at it", "B")]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal, on which everything that takes a moment is drawn. pytest itself sets sys.stderr after a fixture."""
    terminal = Terminal()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=terminal))
    monkeypatch.setattr(progress, "SHOW_AFTER", 0.001)
    monkeypatch.setattr(progress, "REDRAW_AFTER", 0.001)
    return terminal


def drawn(terminal: Terminal, text: str) -> bool:
    """Whether a text shows within ten seconds."""
    end = time.monotonic() + 10
    while text not in terminal.getvalue() and time.monotonic() < end:
        time.sleep(0.001)
    return text in terminal.getvalue()


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(("kind", "shown"), [(Terminal, False), (io.StringIO, True)])
def test_nothing_shows_off_a_terminal_or_when_it_is_turned_off(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, make: Make, kind: type[io.StringIO], shown: bool
) -> None:
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=(stream := kind())))
    with make(shown=shown):
        time.sleep(0.05)
    assert stream.getvalue() == ""


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("error", [None, ValueError("too bad")])
def test_long_work_is_drawn_and_cleared_at_its_end(terminal: Terminal, make: Make, error: Exception | None) -> None:
    with pytest.raises(ValueError, match="too bad") if error else nullcontext(), make(shown=True):
        assert drawn(terminal, "at it")
        if error:
            raise error
    *_, before, cleared, line = terminal.getvalue().split("\r")
    assert (cleared.strip(), line) == ("", "")
    assert len(cleared) >= len(before.rstrip())


def test_a_bar_shows_what_is_done_of_a_total_that_may_be_set_later(terminal: Terminal) -> None:
    with progress_bar(0, "reading", " tokens", shown=True) as bar:
        bar.total = 4000
        assert drawn(terminal, "0/4000")
        bar.update(1000)
        assert drawn(terminal, " 25%")
        assert "1000/4000" in terminal.getvalue()
