"""The progress bar shows only where somebody can see it."""

from __future__ import annotations

import io
import sys

import pytest

from satchel.runtime.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "shown", "disabled"), [(Terminal(), True, False), (Terminal(), False, True), (io.StringIO(), True, True)]
)
def test_the_bar_is_for_terminals_and_can_be_turned_off(
    monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, shown: bool, disabled: bool
) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar(10, "checking", "B", shown=shown) as bar:
        bar.update(10)
        assert bar.disable is disabled
    assert stream.getvalue().strip() == ""  # it took no two seconds


def test_a_bar_that_takes_long_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with progress_bar(10, "checking", "B", shown=True) as bar:
        bar.start_t -= 10
        bar.refresh()
        assert "checking" in terminal.getvalue()
