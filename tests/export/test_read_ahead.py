"""Weights are read while the one before them is in use, one at a time, and in the order in which they are taken."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support.graphs import normal

from satchel.export.quantize import read_ahead
from satchel.export.quantize.read_ahead import ReadAhead
from satchel.graphs.ir.weights import LazyWeight, from_array

ARRAYS = {name: normal(seed, 4, 6) for seed, name in enumerate("abc")}


def counted(reads: list[str]) -> dict[str, LazyWeight]:
    """Weights that note each time they are read."""

    def weight(name: str) -> LazyWeight:
        whole = from_array(name, ARRAYS[name])

        def rows(start: int, stop: int) -> np.ndarray:
            reads.append(name)
            return whole.rows(start, stop)

        return LazyWeight(name, whole.dims, whole.dtype, rows)

    return {name: weight(name) for name in ARRAYS}


def taken(names: str) -> tuple[list[str], list[str]]:
    """What had been read after each of the weights was taken, once the thread had no more to do; and in the end."""
    reads: list[str] = []
    weights, after = counted(reads), []
    with ThreadPoolExecutor(1) as thread:
        reader = ReadAhead(weights.values(), thread)
        for name in names:
            assert np.array_equal(reader.take(weights[name]), ARRAYS[name].T)
            thread.submit(int).result()
            after.append("".join(reads))
    return after, reads


def test_the_next_weight_is_read_and_no_other() -> None:
    assert taken("abc")[0] == ["ab", "abc", "abc"]


def test_weights_that_are_not_taken_are_passed_over() -> None:
    after, reads = taken("c")
    assert after[0][-1] == "c" and reads.count("c") == 1


def test_a_large_weight_is_read_when_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "LARGEST", ARRAYS["a"].nbytes - 1)
    assert taken("ab")[0] == ["a", "ab"]
