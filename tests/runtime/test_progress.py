"""Progress shows only where somebody can see it, only for work that takes long, and goes away."""

from __future__ import annotations

import io
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.tiny_bundle import VOCABULARY, read_manifest, write_manifest

from satchel.runtime.bundle import strict_json
from satchel.runtime.cli import main as cli
from satchel.runtime.evaluation.certify import make_certificate
from satchel.runtime.execution.engine import Engine
from satchel.runtime.generation import generator as generator_module
from satchel.runtime.tools.bench import bandwidth
from satchel.runtime.tools.bench.bandwidth import Bandwidth
from satchel.runtime.util import progress
from satchel.runtime.util.progress import Waiting, progress_bar, waiting

WORDS = "the cat sat on the mat and looked at the other cat, which sat elsewhere. " * 4

MAKERS = [partial(waiting, "at it"), partial(progress_bar, 10, "at it", "B")]
Make = Callable[..., Waiting]


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
def test_short_work_shows_nothing(monkeypatch: pytest.MonkeyPatch, make: Make) -> None:
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=(terminal := Terminal())))
    with make(shown=True):
        pass
    assert terminal.getvalue() == ""


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
def test_long_work_is_drawn_while_it_sits_in_one_call_and_cleared_at_its_end(terminal: Terminal, make: Make) -> None:
    with make(shown=True):
        assert drawn(terminal, "at it")
        redraws = terminal.getvalue().count("\r")
        time.sleep(0.05)
        assert terminal.getvalue().count("\r") > redraws
    *_, before, cleared, line = terminal.getvalue().split("\r")
    assert (cleared.strip(), line) == ("", "")
    assert len(cleared) >= len(before.rstrip())


@pytest.mark.parametrize("make", MAKERS)
def test_nothing_is_drawn_once_it_is_closed(terminal: Terminal, make: Make) -> None:
    with make(shown=True) as shown:
        assert drawn(terminal, "at it")
        shown.close()
        left = terminal.getvalue()
        time.sleep(0.05)
        assert terminal.getvalue() == left


def test_an_error_goes_through_and_the_line_is_cleared(terminal: Terminal) -> None:
    def fail() -> None:
        with waiting("at it", shown=True):
            assert drawn(terminal, "at it")
            raise ValueError("too bad")

    with pytest.raises(ValueError, match="too bad"):
        fail()
    assert terminal.getvalue().endswith(" \r")


def test_the_time_is_that_since_the_work_began(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(1000, 10_000_000, 83))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    with waiting("at it", shown=True):
        while "at it ... 2:46" not in terminal.getvalue():
            time.sleep(0.001)
    assert "at it ... 1:23" in terminal.getvalue()


def test_a_bar_shows_what_is_done_of_a_total_that_may_be_set_later(terminal: Terminal) -> None:
    with progress_bar(0, "reading", " tokens", shown=True) as bar:
        bar.total = 4000
        assert drawn(terminal, "0/4000")
        bar.update(1000)
        assert drawn(terminal, " 25%")
        assert "1000/4000" in terminal.getvalue()


def test_a_file_is_counted_in_thousands_of_bytes(terminal: Terminal) -> None:
    with progress_bar(8_000_000, "checking", "B", shown=True) as bar:
        bar.update(2_000_000)
        assert drawn(terminal, "2.00M/8.00M")


@pytest.fixture(scope="module")
def certified(tiny: Path, engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny bundle, with a certificate; the commands may change it."""
    folder = tmp_path_factory.mktemp("bundles") / "certified"
    shutil.copytree(tiny, folder)
    windows = [np.random.default_rng(2).integers(3, VOCABULARY, 20)]
    certificate = make_certificate(engine, engine.score, None, windows, [(0, 4, 4)], skip=4)
    write_manifest(folder, {**read_manifest(folder), "certificate": strict_json.to_json(certificate)})
    (folder.parent / "text.txt").write_text(WORDS, encoding="utf-8")
    return folder


OPENING = "opening the bundle"
WINDOWS = ("--windows", "2", "--window-tokens", "30", "--skip", "6")
WAITS: dict[str, tuple[list[str], list[str]]] = {
    "run": (["run", "BUNDLE", "the cat", "--max-new-tokens", "2"], [OPENING]),
    "bench": (
        ["bench", "BUNDLE", "--prompt-tokens", "5", "--new-tokens", "3", "--runs", "2", "--json", "--bandwidth"],
        [
            *(OPENING, "warming up", "measuring 5 + 3 tokens, run 1 of 2", "measuring 5 + 3 tokens, run 2 of 2"),
            "measuring the memory bandwidth",
        ],
    ),
    "bench --plot": (
        [
            "bench",
            "BUNDLE",
            "--prompt-lengths",
            "4,8",
            "--new-tokens",
            "3",
            "--no-bandwidth",
            "--plot",
            "FOLDER/plot.svg",
        ],
        [OPENING, "warming up", "measuring 4 + 3 tokens", "measuring 8 + 3 tokens", "drawing the plot"],
    ),
    "eval": (
        ["eval", "BUNDLE", "--text", "FOLDER/text.txt", "--reference", "BUNDLE", *WINDOWS],
        ["reading the text", "opening the reference", OPENING],
    ),
    "inspect": (["inspect", "BUNDLE"], ["reading the manifest"]),
    "profile": (["profile", "BUNDLE", "--prompt-tokens", "5", "--new-tokens", "2"], ["profiling"]),
    "verify": (["verify", "BUNDLE"], [OPENING, "checking the tokenizer"]),
}


@pytest.mark.parametrize("quiet", [False, True])
@pytest.mark.parametrize("name", WAITS)
def test_a_command_says_what_it_waits_for_unless_it_is_quiet(
    certified: Path,
    terminal: Terminal,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    quiet: bool,
) -> None:
    if name == "bench --plot":
        pytest.importorskip("matplotlib")
    asked: list[tuple[str, bool]] = []

    def recorded(label: str, *, shown: bool) -> Waiting:
        asked.append((label, shown))
        return waiting(label, shown=shown)

    monkeypatch.setattr(progress, "waiting", recorded)
    monkeypatch.setattr(generator_module, "waiting", recorded)
    monkeypatch.setattr(bandwidth, "measure_in_child", lambda: Bandwidth(2.5, 3, 64))
    arguments, labels = WAITS[name]
    places = {"BUNDLE": str(certified), "FOLDER": str(certified.parent)}
    filled = [argument.replace("BUNDLE", places["BUNDLE"]) for argument in arguments]
    filled = [argument.replace("FOLDER", places["FOLDER"]) for argument in filled]
    assert cli.main([*filled, *(["--quiet"] if quiet else [])]) == 0
    assert asked == [(label, not quiet) for label in labels]
    out, err = capsys.readouterr()
    assert "..." not in out
    if quiet:
        assert err + terminal.getvalue() == ""


def test_what_goes_on_is_drawn_while_a_bundle_is_opened(
    tiny: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def slowly(*arguments: object, **options: object) -> Engine:
        assert drawn(terminal, "opening the bundle ... 0:0")
        return opened(*arguments, **options)  # type: ignore[arg-type]

    opened = Engine.open
    monkeypatch.setattr(Engine, "open", slowly)
    assert cli.main(["run", str(tiny), "the cat", "--max-new-tokens", "2"]) == 0
    assert "opening" not in capsys.readouterr().out
