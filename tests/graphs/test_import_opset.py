"""import_opset: a graph says that it is of an earlier operator set, where that changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
from support.graphs import build, fired

from satchel.graphs.ir.contract import PassError
from satchel.graphs.passes.normalize.import_opset import import_opset

TEXT = "(float[2,4] x) => (float[2,1] y) <int64[1] one = {1}> { y, i = TopK(x, one) }"


def test_the_import_is_the_version_and_the_numbers_are_the_same() -> None:
    before = build(TEXT)
    after = fired(
        import_opset(23), before, 1, feeds={"x": np.arange(8, dtype=np.float32).reshape(2, 4)}, exact=True
    ).model
    assert (before.graph.opset_imports[""], after.graph.opset_imports[""]) == (24, 23)


@pytest.mark.parametrize(
    ("nodes", "what"),
    [
        ("y = Swish(x)", "Swish is not in version 23"),
        (
            'h = Cast<to = 10, round_mode = "up">(x) y = Cast<to = 1>(h)',
            "Cast's attribute round_mode is not in version",
        ),
    ],
)
def test_what_came_later_is_an_error(nodes: str, what: str) -> None:
    with pytest.raises(PassError, match=what):
        import_opset(23)(build(f"(float[2,4] x) => (float[2,4] y) {{ {nodes} }}"))


def test_versions_in_which_operators_mean_something_else_are_no_matter_of_an_import() -> None:
    with pytest.raises(ValueError, match="version 17"):
        import_opset(17)
