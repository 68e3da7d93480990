"""Runs of several tokens of one sequence for tiny bundles, which do not have satchel's kernels."""

from __future__ import annotations

import pytest

from satchel.runtime.execution.cpu import CpuEngine, CpuState
from satchel.runtime.execution.state import Ids, Logits, State
from satchel.runtime.generation.run_costs import Costs


def allow_runs_ahead(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let engines take several tokens in a run, as single steps; a further token is said to cost a tenth of a step.

    Returns the number of tokens of each such run, to which later ones are added.
    """
    counts: list[int] = []

    def decode_ahead(state: CpuState, tokens: Ids) -> Logits:
        counts.append(len(tokens))
        return State.decode_ahead(state, tokens)

    monkeypatch.setattr(Costs, "of", lambda costs, rows: 0.9 + rows / 10)
    monkeypatch.setattr(CpuEngine, "why_not_ahead", lambda engine, adapter: None)
    monkeypatch.setattr(CpuState, "decode_ahead", decode_ahead)
    return counts
