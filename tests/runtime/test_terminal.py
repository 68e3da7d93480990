"""Text out of a bundle in a terminal, and the names of layers in it."""

from __future__ import annotations

import pytest

from satchel.runtime.tools.profiling.layer_names import layer_of, pattern_of
from satchel.runtime.util.terminal import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("model.layers.0 猫", "model.layers.0 猫"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("a\u202eb", r"a\u202eb"),
        ("half \ud800", r"half \ud800"),
    ],
)
def test_what_is_not_for_reading_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(text).encode()


@pytest.mark.parametrize(
    ("name", "layer", "pattern"),
    [
        ("model.layers.12.mlp.down_proj", 12, "model.layers.*.mlp.down_proj"),
        ("/model/layers.3/attn/MatMul", 3, "/model/layers.*/attn/MatMul"),
        ("attention.7", 7, "attention.*"),
        ("model.layers.2.mlp.experts.5.up", 2, "model.layers.*.mlp.experts.*.up"),
        ("node_silu_4/QuickGeluFusion/", None, "node_silu_4/QuickGeluFusion/"),
        ("a." + "9" * 5000, None, "a." + "9" * 5000),
    ],
)
def test_a_number_of_its_own_is_the_layer(name: str, layer: int | None, pattern: str) -> None:
    assert layer_of(name) == layer
    assert pattern_of(name) == pattern
