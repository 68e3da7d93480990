"""What an export prints while it works: its stages, a line every few seconds in a log, and the time left."""

from __future__ import annotations

import time

import pytest

from satchel.export import stages
from satchel.export.stages import Pace, Stages

ROUND, WRITE, MEASURE = "rounding the weights", "writing the bundle", "measuring the bundle"
EXPECTED = {ROUND: 10.0, WRITE: 5.0, MEASURE: 20.0}


def test_the_time_left_follows_the_measured_pace() -> None:
    pace = Pace(EXPECTED)
    assert pace.left(ROUND, 0.0, None) == 35.0
    pace.finish(ROUND, 40.0)  # four times as slow as expected
    assert pace.left(WRITE, 0.0, None) == 4 * 25.0
    pace.finish(WRITE, 20.0)
    assert pace.left(MEASURE, 30.0, None) == 50.0


def test_what_is_done_of_a_stage_corrects_its_forecast() -> None:
    pace = Pace(EXPECTED)
    assert pace.left(ROUND, 30.0, 0.5) == pytest.approx(30.0 + 6 * 25.0)


def test_a_stage_beyond_its_forecast_leaves_what_comes_later() -> None:
    assert Pace(EXPECTED).left(ROUND, 50.0, None) == 25.0


def test_a_log_gets_lines_while_a_stage_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stages, "LINE_EVERY", 0.01)
    told = Stages(True, tuple(EXPECTED))
    told.expect(EXPECTED)
    with told.stage(ROUND), told.steps(4, "rounding") as advance:
        advance(1)
        deadline = time.monotonic() + 60
        text = ""
        while text.count("25%, ") < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
            text += capsys.readouterr().err
    lines = text.splitlines()
    assert lines[0].startswith(f"[1/3] {ROUND}")
    assert all(line.startswith(f"  {ROUND}: ") and "left" in line for line in lines[1:3])
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"[1/3] {ROUND} ... ")
