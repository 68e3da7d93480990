"""The longest context of a model whose rotary embedding is scaled, and the length beyond which its angles change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import change_json, save_tiny, tiny_model

from satchel.export.checkpoint import open_checkpoint
from satchel.export.errors import ExportError
from satchel.export.tracing.rotary_tables import border_of, border_within

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


def test_a_bundle_below_the_border_has_one_table() -> None:
    model = tiny_model("phi3-longrope", original_max_position_embeddings=32)
    assert [border_within(model, context) for context in (31, 32, 33)] == [None, None, 32]


def test_kinds_of_layers_with_two_borders_are_refused() -> None:
    ropes = {kind: {"rope_type": "longrope", "original_max_position_embeddings": n} for kind, n in (("a", 8), ("b", 9))}
    model = tiny_model("llama")
    model.config.rope_parameters = ropes
    assert [border_of(model, kind) for kind in ("a", "b", "c")] == [8, 9, None]
    with pytest.raises(ExportError, match=r"8, 9"):
        border_of(model)


def test_one_kind_of_layer_that_is_scaled_extends_the_context(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    ropes = {"full_attention": BASE | yarn, "sliding_attention": BASE | {"rope_type": "default"}}
    place = save_tiny(tmp_path / "m", "gemma3_text", max_position_embeddings=128, rope_parameters=ropes)
    assert open_checkpoint(place).max_context == 512


@pytest.mark.parametrize("limit", [16, 4096])
def test_what_a_window_and_a_tokenizer_allow_changes_nothing(tmp_path: Path, limit: int) -> None:
    """A window bounds what a token sees, and transformers truncates by model_max_length only where asked to."""
    place = save_tiny(tmp_path / "m", "gemma3_text", tokenizer=True, sliding_window=limit)
    change_json(place / "tokenizer_config.json", model_max_length=limit)
    assert open_checkpoint(place).max_context == 128
