"""A module of a user's own: attention that no fused operator has is expanded into standard operators, and is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.dynamic_graphs import together
from support.exported import difference
from support.families import TOLERANCE, by_family
from support.own_module import CONTEXT, HIDDEN, KEY_DIM, VOCABULARY, OwnModule, plain_attention

from satchel.export import ExportConfig, ExportError, ModuleFacts, export_bundle
from satchel.runtime.bundle.manifest import Manifest
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.execution.engine import Engine

PROMPT, CHUNK, TOTAL = 20, 9, 60
NARROW = KEY_DIM // 2
VARIANTS: dict[str, dict[str, Any]] = {
    "equal widths": {"value_dim": KEY_DIM, "window": 7, "softcap": 1.5},
    "narrow values": {"value_dim": NARROW},
    "narrow values, window": {"value_dim": NARROW, "window": 7},
    "narrow values, window and soft cap": {"value_dim": NARROW, "window": 7, "softcap": 1.5},
}


def logits_of(module: OwnModule, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    with torch.no_grad():
        logits = module(torch.from_numpy(ids)[None], torch.arange(len(ids))[None], plain_attention)[0]
    found: NDArray[np.float32] = logits.numpy()
    return found


FIRST = ("equal widths", "narrow values, window and soft cap")
"""All that a variant may have; those with a part of it are slow tests."""


@pytest.fixture(scope="module", params=by_family(VARIANTS, FIRST.__contains__))
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, OwnModule, Path, Manifest]:
    module = OwnModule(**VARIANTS[request.param])
    folder = tmp_path_factory.mktemp("own") / "bundle"
    return (
        request.param,
        module,
        folder,
        export_bundle(module, ExportConfig(folder, precision="fp32", certificate=False)),
    )


def test_every_way_through_the_graphs_gives_the_logits_of_torch(
    exported: tuple[str, OwnModule, Path, Manifest],
) -> None:
    _, module, folder, manifest = exported
    ids = np.random.default_rng(2).integers(0, VOCABULARY, TOTAL)
    expected = logits_of(module, ids)
    engine = Engine.open(Bundle(folder, manifest), threads=1)
    assert difference(engine.score(ids, chunk=TOTAL), expected) <= TOLERANCE
    for chunk in (PROMPT, CHUNK):
        state = engine.new_state(CONTEXT)
        found = [engine.prefill(state, ids[:PROMPT], chunk=chunk).copy()]
        found += [engine.decode(state, int(token)).copy() for token in ids[PROMPT:]]
        assert difference(np.stack(found), expected[PROMPT - 1 :]) <= TOLERANCE


def test_padded_rows_give_what_each_row_gives_alone(exported: tuple[str, OwnModule, Path, Manifest]) -> None:
    _, module, folder, _ = exported
    ids = np.random.default_rng(3).integers(0, VOCABULARY, 40)
    rows, following = [ids[:13], ids[13:18], ids[18:27]], ids[30:33]
    prompt, step = together(folder, rows, following)
    for row, token, after_prompt, after_step in zip(rows, following, prompt, step, strict=True):
        expected = logits_of(module, np.append(row, token))
        assert difference(after_prompt, expected[-2]) <= TOLERANCE
        assert difference(after_step, expected[-1]) <= TOLERANCE


@pytest.mark.parametrize("feature", ["window", "softcap"])
def test_the_comparison_would_notice_the_loss_of_a_feature(feature: str) -> None:
    options = VARIANTS["narrow values, window and soft cap"]
    ids = np.random.default_rng(2).integers(0, VOCABULARY, TOTAL)
    whole, without = (logits_of(OwnModule(**o), ids) for o in (options, {**options, feature: None}))
    assert difference(without, whole) >= 100 * TOLERANCE


@pytest.mark.parametrize("options", [{"scale": 0.0}, {"window": 0}, {"softcap": -1.0}])
def test_options_of_attention_that_mean_nothing_are_refused(options: dict[str, float], tmp_path: Path) -> None:
    module = OwnModule(KEY_DIM)
    module.options[0] = options
    with pytest.raises(ExportError, match=r"scale.*window.*softcap"):
        export_bundle(module, ExportConfig(tmp_path / "bundle", precision="fp32", certificate=False))
    assert not list(tmp_path.iterdir())


def test_a_vocabulary_of_another_size_than_the_logits_is_refused(tmp_path: Path) -> None:
    module = OwnModule(KEY_DIM)
    module.satchel = ModuleFacts(vocab_size=VOCABULARY + 5, max_context=CONTEXT)
    with pytest.raises(ExportError, match=f"{VOCABULARY} .*vocab_size.* {VOCABULARY + 5}"):
        export_bundle(module, ExportConfig(tmp_path / "bundle", precision="fp32", certificate=False))


class ScaledRotaryEmbedding(torch.nn.Module):
    """Called as transformers calls its own, but what it gives depends on more than positions."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.linspace(0.1, 1.0, HIDDEN))

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None] * self.frequencies
        return angles.cos() * (1 + x.tanh()), angles.sin()


class WithOwnRotary(OwnModule):
    """One layer, in front of which a rotary module of its own works on the embeddings."""

    def __init__(self) -> None:
        super().__init__(KEY_DIM)
        self.rotary = ScaledRotaryEmbedding()

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, attention: Any) -> torch.Tensor:
        hidden = self.tokens(input_ids)
        cos, sin = self.rotary(hidden, position_ids)
        hidden = hidden * cos + sin
        heads = [
            self.products[0][name](hidden).unflatten(-1, (-1, KEY_DIM)).transpose(1, 2)
            for name in ("query", "key", "value")
        ]
        hidden = hidden + self.outputs[0](attention(*heads).transpose(1, 2).flatten(2))
        logits: torch.Tensor = self.head(hidden)
        return logits


def test_a_rotary_module_of_ones_own_is_traced_as_it_is(tmp_path: Path) -> None:
    module = WithOwnRotary().eval()
    manifest = export_bundle(module, ExportConfig(tmp_path / "bundle", precision="fp32", certificate=False))
    ids = np.random.default_rng(3).integers(0, VOCABULARY, 20)
    engine = Engine.open(Bundle(tmp_path / "bundle", manifest), threads=1)
    assert difference(engine.score(ids, chunk=20), logits_of(module, ids)) <= TOLERANCE
