"""full_length_mask: the decode graph's mask is as long as its cache."""

from __future__ import annotations

import pytest
from support.graphs import build, fired, untouched

from satchel.graphs.passes.cache.full_length_mask import full_length_mask

TEXT = "(int64[batch,total] attention_mask) => (int64[batch] y) { y = ReduceSum<keepdims = 0>(attention_mask, axis) }"
AXIS = ("=> (int64[batch] y)", "=> (int64[batch] y) <int64[1] axis = {1}>")


def test_the_mask_has_the_caches_length() -> None:
    after = fired(full_length_mask, build(TEXT.replace(*AXIS)), 1).model
    assert [str(d) for d in after.graph.inputs[0].shape or ()] == ["batch", "capacity"]


@pytest.mark.parametrize("length", ["capacity", "9"])
def test_a_mask_whose_length_is_fixed_is_left_alone(length: str) -> None:
    assert untouched(full_length_mask, build(TEXT.replace(*AXIS).replace("total", length))) == []
