"""drop_inputs: inputs that nothing reads go away, and what a static graph may not read is refused."""

from __future__ import annotations

import pytest
from support.graphs import build, fired, untouched

from satchel.graphs.passes.cache.drop_inputs import drop_inputs

TEXT = "(int64[1,3] input_ids, int64[1,9] attention_mask) => (int64[1,3] y) { y = Neg(input_ids) }"


def test_an_unread_input_goes_away() -> None:
    after = fired(drop_inputs, build(TEXT), 1, keeps_signature=False).model
    assert [v.name for v in after.graph.inputs] == ["input_ids"]


@pytest.mark.parametrize("name", ["attention_mask", "position_ids"])
def test_positions_and_masks_that_are_read_are_refused(name: str) -> None:
    text = f"(int64[1,3] input_ids, int64[1,3] {name}) => (int64[1,3] y) {{ y = Add(input_ids, {name}) }}"
    (reason,) = untouched(drop_inputs, build(text))
    assert reason == f"{name} is used in another way than to mask attention and to look up tables"
