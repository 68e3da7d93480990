"""Speculation without a second model: a draft of the next tokens is checked in one step."""

from __future__ import annotations

import numpy as np

from satchel.runtime.errors import BundleError
from satchel.runtime.execution.engine import Engine
from satchel.runtime.execution.state import Logits, State
from satchel.runtime.generation.sequence import ActiveSequence


def decode(engine: Engine, state: State, sequence: ActiveSequence) -> int:
    """Feed the last token and choose the next one, or several where the text repeats. Returns how many were chosen.

    A draft is fed together with the last token, and its tokens count as far as they are those that are chosen anyway.
    So the text is the same, greedy or sampled, if a run of several tokens gives each the logits that it gets alone: the
    first run of each size is compared with single steps, bit for bit.
    """
    drafter, known, draft = sequence.drafter, len(sequence.token_ids), []
    if drafter is not None and engine.may_run_ahead(state):
        draft = drafter.draft(sequence.prompt, sequence.token_ids, sequence.limit - known - 1)
    last = sequence.token_ids[-1]
    if drafter is None or not draft or engine.runs_ahead.get(len(draft)) is False:
        state.decode(last)
        sequence.take_from(state)
        return 1
    length, taken = state.cache.length, 0
    try:
        for logits, next_one in zip(_logits(engine, state, [last, *draft]), [*draft, None], strict=True):
            sequence.take(logits)
            taken += 1
            if sequence.finish_reason or sequence.token_ids[-1] != next_one:
                break
    finally:  # also when interrupted: what a wrong token left in the cache must not be kept
        state.cache.shorten(length + max(1, len(sequence.token_ids) - known))
    drafter.learn(len(draft), taken - 1)
    return taken


def _logits(engine: Engine, state: State, tokens: list[int]) -> Logits:
    """Feed tokens; the logits of each, [tokens, vocabulary]."""
    ids, drafted = np.asarray(tokens, np.int64), len(tokens) - 1
    if engine.runs_ahead.get(drafted):
        return state.decode_ahead(ids)
    length = state.cache.length
    try:
        found = state.decode_ahead(ids).copy()
    except BundleError:  # its kernels do not take several tokens of one sequence
        found = None
    state.cache.shorten(length)
    expected = State.decode_ahead(state, ids)
    engine.runs_ahead[drafted] = found is not None and np.array_equal(found, expected)
    return expected
