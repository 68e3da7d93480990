"""The longest context of a model whose rotary embedding is scaled, and what an export says of its choice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import save_tiny, tiny_model
from support.command import Said

from satchel.export.checkpoint import open_checkpoint
from satchel.export.tracing.rotary_tables import border_of

BASE = {"rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}, 128),
        ({"rope_type": "dynamic", "factor": 2.0}, 256),
        (
            {
                "rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 8,
                "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            },
            128,
        ),
        ({"rope_type": "linear", "factor": 4.0}, 128),
        ({"rope_type": "default"}, 128),
    ],
)  # fmt: skip
def test_the_longest_context_follows_the_scaling(tmp_path: Path, rope: dict[str, Any], longest: int) -> None:
    place = save_tiny(tmp_path / "m", max_position_embeddings=128, rope_parameters=BASE | rope)
    assert open_checkpoint(place).max_context == longest


def test_the_border_is_where_the_angles_change() -> None:
    assert border_of(tiny_model("phi3-longrope", original_max_position_embeddings=32)) == 32
    dynamic = BASE | {"rope_type": "dynamic", "factor": 2.0}
    assert border_of(tiny_model("llama", max_position_embeddings=128, rope_parameters=dynamic)) == 128
    assert border_of(tiny_model("llama")) is None


@pytest.mark.parametrize(("context", "says"), [("32", False), ("64", True)])
def test_an_export_says_which_factors_it_chose(
    export: Callable[..., Said], tmp_path: Path, context: str, says: bool
) -> None:
    place = save_tiny(tmp_path / "long", "phi3-longrope", original_max_position_embeddings=32)
    ran = export(place, "-o", tmp_path / "b", "--max-context", context, "--no-certificate")
    assert ("--max-context 32" in ran.err) is says
