"""Contexts that are shorter than a model's window, with sinks, in chunks or beside states."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.exported import difference, stored_weights
from support.families import FAMILIES, TOLERANCE, VOCABULARY, WINDOW, by_family, logits_of, reference, save

from satchel.export import ExportConfig, export_bundle
from satchel.runtime.errors import SatchelError
from satchel.runtime.execution.engine import Engine
from satchel.runtime.ort.open_bundle import open_bundle

CONTEXT = WINDOW - 2


@pytest.mark.slow
@pytest.mark.parametrize("name", by_family(["gpt_oss", "llama4_text", "lfm3"], ["gpt_oss"].__contains__))
def test_a_context_below_the_window_is_served_up_to_its_end_and_not_beyond(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    checkpoint = save(family, tmp_path / "checkpoint")
    export_bundle(checkpoint, ExportConfig(tmp_path / "bundle", "fp32", max_context=CONTEXT, certificate=False))
    engine = Engine.open(open_bundle(tmp_path / "bundle"), threads=1)
    ids = np.random.default_rng(1).integers(3, VOCABULARY, CONTEXT + 1)
    wanted = logits_of(reference(family, stored_weights(checkpoint)), ids)
    state = engine.new_state(CONTEXT)
    assert difference(engine.prefill(state, ids[: CONTEXT - 1]), wanted[CONTEXT - 2]) <= TOLERANCE
    assert difference(engine.decode(state, int(ids[CONTEXT - 1])), wanted[CONTEXT - 1]) <= TOLERANCE
    with pytest.raises(SatchelError, match=rf"\b{CONTEXT}\b") as caught:
        engine.decode(state, int(ids[CONTEXT]))
    assert "\n" not in str(caught.value)
    with pytest.raises(SatchelError, match=rf"\b{CONTEXT}\b"):
        engine.new_state(CONTEXT + 1)
