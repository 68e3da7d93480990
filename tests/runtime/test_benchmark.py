"""What `satchel bench` runs and how it sums it up; never how long it takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from satchel.runtime.errors import PromptError
from satchel.runtime.execution.batch import Batch
from satchel.runtime.execution.engine import Engine
from satchel.runtime.tools.bench import benchmark
from satchel.runtime.tools.bench.benchmark import (
    Figures,
    Run,
    Workload,
    check_workload,
    measure,
    summarize,
    timed_run,
    warm_up,
)


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """The steps that an engine, or rows of a batch, are asked for: what is fed."""
    steps: list[tuple[str, Any]] = []

    def watch(kind: type, name: str) -> None:
        original = getattr(kind, name)

        def watched(self: Any, *arguments: Any) -> Any:
            steps.append((f"{kind.__name__}.{name}", np.asarray(arguments[-1]).copy()))
            return original(self, *arguments)

        monkeypatch.setattr(kind, name, watched)

    watch(Engine, "prefill")
    watch(Engine, "decode")
    watch(Batch, "decode")
    return steps


def test_one_warm_up_of_16_and_one_run(engine: Engine, fed: list[tuple[str, Any]]) -> None:
    figures = measure(engine, Workload(20, 3, 300), load=0.5)
    assert [(name, ids.size) for name, ids in fed] == [
        ("Engine.prefill", 16), ("Engine.decode", 1), ("Engine.prefill", 20), *[("Engine.decode", 1)] * 3
    ]  # fmt: skip
    prompt = fed[2][1]
    np.testing.assert_array_equal(fed[0][1], prompt[:16])
    assert prompt.min() >= 100
    assert prompt.max() < 300
    assert figures.load == 0.5
    assert figures.prefill * figures.ttft == pytest.approx(20)


def test_each_decode_step_is_fed_the_most_likely_token(engine: Engine, fed: list[tuple[str, Any]]) -> None:
    timed_run(engine, Workload(7, 4, 300))
    (_, prompt), *steps = list(fed)
    state = engine.new_state(11)
    logits = engine.prefill(state, prompt)
    for _, token in steps:
        assert token == logits.argmax()
        logits = engine.decode(state, int(token))


def test_runs_are_alike_and_each_starts_afresh(engine: Engine, fed: list[tuple[str, Any]]) -> None:
    for _ in range(2):
        timed_run(engine, Workload(60, 4, 300))  # 64 positions: two runs on one cache would not fit
    for (_, first), (_, second) in zip(fed[:5], fed[5:], strict=True):
        np.testing.assert_array_equal(first, second)


def test_a_batch_decodes_what_each_row_would_alone(engine: Engine, fed: list[tuple[str, Any]]) -> None:
    workload = Workload(9, 5, 300, batch=3)
    assert engine.batch_invariant  # tried once, beside what is watched here
    fed.clear()
    warm_up(engine, workload)
    assert [(name, ids.shape) for name, ids in fed] == [*[("Engine.prefill", (9,))] * 3, ("Batch.decode", (3,))]
    fed.clear()
    run = timed_run(engine, workload)
    prompts, steps = [ids for _, ids in fed[:3]], fed[3:]
    assert [tokens.shape for _, tokens in steps] == [(3,)] * 5
    assert len({tuple(row) for row in prompts}) == 3
    for index, prompt in enumerate(prompts):
        state = engine.new_state(14)
        logits = engine.prefill(state, prompt)
        for _, tokens in steps:
            assert tokens[index] == logits.argmax()
            logits = engine.decode(state, int(tokens[index]))
    assert run.prefill * run.ttft == pytest.approx(3 * 9)


def test_decode_speed_counts_every_row(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 2.0, 2.0, 6.0])
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(ticks))
    assert timed_run(engine, Workload(10, 8, 300, batch=2)) == Run(prefill=10.0, ttft=2.0, decode=4.0)


def test_a_summary_takes_each_figure_apart() -> None:
    runs = [Run(1.0, 30.0, 5.0), Run(3.0, 10.0, 7.0), Run(2.0, 20.0, 9.0), Run(9.0, 40.0, 6.0)]
    summary = summarize(runs)
    assert summary.median == Run(2.5, 25.0, 6.5)
    assert summary.lowest == Run(1.0, 10.0, 5.0)
    assert summary.highest == Run(9.0, 40.0, 9.0)


def test_a_workload_that_does_not_fit_is_refused_before_any_step(engine: Engine, fed: list[tuple[str, Any]]) -> None:
    with pytest.raises(PromptError, match="a context of 65 positions is not possible: this bundle allows 1 to 64"):
        measure(engine, Workload(60, 5, 300), 0.0)
    assert fed == []


def test_the_largest_workload_fits(engine: Engine) -> None:
    check_workload(Workload(60, 4, 400, batch=2), engine.bundle.manifest)
    assert isinstance(measure(engine, Workload(60, 4, 400), 0.0), Figures)
