"""strict_json: numbers are read as they are declared, and nothing else passes for one."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from satchel.runtime.bundle.strict_json import StrictJsonError, from_json, to_json


@dataclasses.dataclass(frozen=True)
class Figures:
    kl: float
    tokens: int
    speed: float | None
    gaps: tuple[float, ...]


GOOD = {"kl": 0.25, "tokens": 3, "speed": None, "gaps": [1.5, 2.0]}


def test_floats_are_read_and_written_again() -> None:
    figures = from_json(Figures, GOOD)
    assert figures == Figures(0.25, 3, None, (1.5, 2.0))
    assert from_json(Figures, json.loads(json.dumps(to_json(figures)))) == figures


def test_a_whole_number_is_a_float_too() -> None:
    found = from_json(Figures, {"kl": 7, "tokens": 3, "speed": 7, "gaps": [1, 2.5]})
    assert [type(each) for each in (found.kl, found.speed, *found.gaps)] == [float] * 4
    assert (found.kl, found.gaps) == (7.0, (1.0, 2.5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kl": "0.25"}, "'kl' must be a number, found '0.25'"),
        ({"kl": True}, "'kl' must be a number, found 'True'"),
        ({"tokens": 3.0}, "'tokens' must be a whole number, found '3.0'"),
        ({"tokens": True}, "'tokens' must be a whole number"),
        ({"speed": "fast"}, "'speed' must be a number, found 'fast'"),
        ({"gaps": [1.5, "2"]}, "'gaps[1]' must be a number, found '2'"),
    ],
)
def test_what_is_no_number_is_an_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StrictJsonError) as caught:
        from_json(Figures, {**GOOD, **changes})
    assert str(caught.value).startswith(message)


@dataclasses.dataclass(frozen=True)
class Grown:
    kl: float
    native: bool = False


@pytest.mark.parametrize("native", [False, True])
def test_a_key_with_a_default_may_be_missing_and_is_not_written_where_it_says_nothing(native: bool) -> None:
    document = {"kl": 0.5, "native": True} if native else {"kl": 0.5}
    assert from_json(Grown, document) == from_json(Grown, {"kl": 0.5, "native": native}) == Grown(0.5, native)
    assert to_json(Grown(0.5, native)) == document
    with pytest.raises(StrictJsonError, match="missing key 'kl'"):
        from_json(Grown, {"native": True})
