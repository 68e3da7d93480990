"""Bundles in float16 on satchel's own kernels, beside transformers with rounded weights, keys and values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support.checkpoints import save_tiny
from support.kernels import needs_kernels

from satchel.export import ExportConfig, export_bundle
from satchel.runtime.bundle.contract import NATIVE
from satchel.runtime.bundle.onnx_wire import external_tensors
from satchel.runtime.execution.engine import Engine
from satchel.runtime.optimize.specialize import specialize
from satchel.runtime.ort.open_bundle import open_bundle

pytestmark = needs_kernels

SIZES = {"hidden_size": 128, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 2}
TOLERANCE = 1e-5
"""Of the largest logit: both round sums to float32, in another order."""


class HalvedCache(transformers.DynamicCache):
    """Keys and values are rounded to float16 when they are stored, and all tokens attend to what is stored."""

    def update(self, key: torch.Tensor, value: torch.Tensor, *where: Any, **options: Any) -> Any:
        return super().update(key.half().float(), value.half().float(), *where, **options)


def expected(checkpoint: Path, ids: np.ndarray) -> np.ndarray:
    """transformers' logits of each position in float32, with weights rounded to float16 and such a cache."""
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
        found: np.ndarray = (
            model(torch.from_numpy(ids)[None], past_key_values=HalvedCache(), use_cache=True).logits[0].numpy()
        )
    return found


@pytest.fixture(scope="module", params=[True, False], ids=["a tied head", "a head of its own"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle in float16 that is specialized for satchel's kernels."""
    place = tmp_path_factory.mktemp("half")
    checkpoint = save_tiny(place / "checkpoint", **SIZES, tie_word_embeddings=request.param)
    export_bundle(checkpoint, ExportConfig(place / "bundle", "fp16", max_context=64, certificate=False))
    specialize(open_bundle(place / "bundle"), kernels="satchel", threads=1)
    return place / "bundle"


def greedy(engine: Engine, ids: np.ndarray, count: int) -> tuple[np.ndarray, list[int]]:
    """The logits after the prompt and after each of `count` greedy tokens, and these tokens."""
    state = engine.new_state(len(ids) + count)
    logits, tokens = [engine.prefill(state, ids).copy()], list[int]()
    for _ in range(count):
        tokens.append(int(logits[-1].argmax()))
        logits.append(engine.decode(state, tokens[-1]).copy())
    return np.stack(logits), tokens


def test_logits_are_those_of_transformers_within_rounding(folder: Path) -> None:
    bundle = open_bundle(folder)
    assert bundle.specialized is not None
    assert bundle.specialized.variants == (NATIVE,)
    ids = np.random.default_rng(1).integers(4, 90, 21)
    own, tokens = greedy(Engine.open(bundle, threads=2), ids, 16)
    wanted = expected(folder.parent / "checkpoint", np.concatenate([ids, tokens]))[len(ids) - 1 :]
    assert tokens == wanted[:-1].argmax(-1).tolist()
    np.testing.assert_allclose(own, wanted, rtol=0, atol=TOLERANCE * np.abs(wanted).max())


@pytest.mark.parametrize("chunk", [None, 9])
def test_the_logits_of_every_token_are_those_of_transformers_too(folder: Path, chunk: int | None) -> None:
    ids = np.random.default_rng(2).integers(4, 90, 37)
    engine, wanted = Engine.open(open_bundle(folder), threads=2), expected(folder.parent / "checkpoint", ids)
    assert engine.scored_by == NATIVE
    np.testing.assert_allclose(engine.score(ids, chunk), wanted, rtol=0, atol=TOLERANCE * np.abs(wanted).max())


def test_no_weight_is_stored_twice_for_the_kernels(folder: Path) -> None:
    """The table of a tied head is the one that is looked up, and no matrix is left as the portable graphs read it."""
    graph = open_bundle(folder).manifest.specialized.graphs["prefill"].file  # type: ignore[union-attr]
    tensors = external_tensors((folder / graph).read_bytes())
    assert sum(name.endswith("panels") for name in tensors) >= 8
    assert not [name for name in tensors if name.endswith(".T.fp16")]
