"""What an export begins before it needs it: processes that load, and what becomes of those that cannot."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from satchel.export.ahead import helper
from satchel.export.writing.self_check import SELFTEST


def test_a_helper_does_what_it_is_told(tiny_bundle: Path) -> None:
    with helper(SELFTEST) as process:
        process.tell([str(tiny_bundle)])
        assert process.finish() is None


def test_a_helper_that_cannot_run_says_so() -> None:
    with helper("satchel.runtime.nowhere") as process:
        time.sleep(1)  # it has ended
        process.tell([])
        assert "satchel.runtime.nowhere" in str(process.finish())


def test_a_helper_ends_with_the_export() -> None:
    with pytest.raises(KeyError), helper("satchel.runtime.nowhere") as process:
        time.sleep(1)
        process.tell([])
        raise KeyError
    with pytest.raises(KeyError), helper(SELFTEST) as process:
        raise KeyError
    assert process.ended
