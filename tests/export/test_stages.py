"""The time left of an export, by the pace of the stages that are done."""

from __future__ import annotations

import pytest

from satchel.export.stages import Pace

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


def test_a_stage_beyond_its_forecast_slows_what_comes_later() -> None:
    assert Pace(EXPECTED).left(ROUND, 50.0, None) == 5 * 25.0
