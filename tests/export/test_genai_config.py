"""onnxruntime-genai opens a bundle as it is, and takes the steps that satchel's own runner takes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoints import save_tiny
from support.genai import Continued, by_genai, by_satchel
from support.tiny_hybrid import expected, write_hybrid

from satchel.export import ExportConfig, export_bundle
from satchel.export.checkpoint import Checkpoint, open_checkpoint
from satchel.export.writing.genai_config import genai_config
from satchel.runtime import Engine, open_bundle
from satchel.runtime.bundle.manifest import MANIFEST_NAME, Manifest

PROMPTS = [[418, 390, 2, 378, 378, 2, 166, 439, 426, 304], [96, 419]]
"""One with the token that fills up batches inside, and one of two tokens."""

COUNT = 64
TOLERANCE = 1e-5  # of the largest logit
FORMS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "fp16": {"precision": "fp16"},
    "int8": {"precision": "int8"},
    "int4": {"precision": "int4"},
    "a8w8": {"precision": "a8w8"},
    "int8-cache": {"precision": "int4", "kv_cache": "int8"},
}
FIRST = ("int8", "int4")
"""One in two sessions and one in one; the others are slow tests."""


@pytest.fixture(scope="module", params=[pytest.param(f, marks=() if f in FIRST else pytest.mark.slow) for f in FORMS])
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def bundle(form: str, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(form) / "bundle"
    export_bundle(tiny_checkpoint, ExportConfig(folder, certificate=False, **FORMS[form]))
    return folder


def difference(found: Continued, expected: Continued) -> float:
    return float(np.abs(found[1] - expected[1]).max() / np.abs(expected[1]).max())


def test_the_tokens_and_logits_are_those_of_satchel(bundle: Path, tmp_path: Path) -> None:
    expected = by_satchel(Engine.open(open_bundle(bundle), threads=1), PROMPTS, COUNT)
    found = by_genai(bundle, PROMPTS, COUNT, tmp_path)
    for one, other in zip(found, expected, strict=True):
        assert one[0] == other[0]
        assert difference(one, other) <= TOLERANCE
        assert len(one[0]) == COUNT
        assert len(set(one[0])) > 20


def test_one_graph_for_both_phases_would_give_other_logits_where_satchel_opens_two(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    export_bundle(tiny_checkpoint, ExportConfig(bundle, certificate=False, precision="int8"))
    expected = by_satchel(Engine.open(open_bundle(bundle), threads=1), PROMPTS, 8)
    path = bundle / "genai_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    del config["model"]["decoder"]["pipeline"]
    config["model"] |= {"type": "decoder"}
    config["model"]["decoder"] |= {"filename": "prefill.onnx"}
    path.write_text(json.dumps(config), encoding="utf-8")
    found = by_genai(bundle, PROMPTS, 8, tmp_path)
    assert difference(found[0], expected[0]) > 100 * TOLERANCE


@pytest.mark.slow
def test_a_model_without_an_end_token_never_ends(tmp_path: Path) -> None:
    """Token 0 is no end token for want of another."""
    folder = save_tiny(tmp_path / "checkpoint", "qwen2", eos_token_id=None)
    bundle = tmp_path / "bundle"
    export_bundle(folder, ExportConfig(bundle, precision="fp32", certificate=False))
    config = json.loads((bundle / "genai_config.json").read_text(encoding="utf-8"))
    assert "eos_token_id" not in config["model"]
    expected = by_satchel(Engine.open(open_bundle(bundle), threads=1), PROMPTS, COUNT)
    assert [one[0] for one in by_genai(bundle, PROMPTS, COUNT, tmp_path)] == [one[0] for one in expected]


@pytest.fixture(scope="module")
def opened(tiny_checkpoint: Path) -> Checkpoint:
    return open_checkpoint(tiny_checkpoint)


@pytest.mark.parametrize(
    ("pattern", "one_session", "runs"),
    [
        ("linear conv attention linear", False, True),
        ("linear plain attention", True, True),
        ("linear linear", True, True),
        ("conv plain attention", True, False),
    ],
)
def test_states_are_kept_from_step_to_step(
    pattern: str, one_session: bool, runs: bool, opened: Checkpoint, tmp_path: Path
) -> None:
    layers = pattern.split()
    folder = write_hybrid(tmp_path / "bundle", layers)
    manifest = Manifest.read(folder / MANIFEST_NAME)
    graphs = manifest.graphs
    assert graphs is not None
    if one_session:
        graphs = dataclasses.replace(graphs, decode=dataclasses.replace(graphs.decode, session_of="prefill"))
    config = genai_config(opened, dataclasses.replace(manifest, graphs=graphs))
    assert (config is not None) is runs
    if not runs:
        return
    (folder / "genai_config.json").write_text(json.dumps(config), encoding="utf-8")
    prompt = [7, 300, 12, 12, 90]
    ((tokens, logits),) = by_genai(folder, [prompt], 20, tmp_path)
    assert len(set(tokens)) > 5
    wanted = expected([*prompt, *tokens], layers)[len(prompt) - 1 : -1]
    assert np.abs(logits - wanted).max() <= TOLERANCE * np.abs(wanted).max()


@pytest.mark.parametrize("change", [{"value_dim": 32}, {"kv_heads": 1, "layers": 1}, {"mode": "swapped"}])
def test_caches_that_it_cannot_express_get_no_file(
    change: dict[str, Any], opened: Checkpoint, tiny_bundle: Path
) -> None:
    manifest = Manifest.read(tiny_bundle / MANIFEST_NAME)
    cache = manifest.kv_cache
    assert genai_config(opened, manifest) is not None
    if "mode" in change:
        cache = dataclasses.replace(cache, mode=change["mode"])
    else:
        changed = {key: value for key, value in change.items() if key != "layers"}
        count = change.get("layers", len(cache.layers))
        layers = [dataclasses.replace(layer, **changed) for layer in cache.layers[:count]]
        cache = dataclasses.replace(cache, layers=(*layers, *cache.layers[count:]))
    assert genai_config(opened, dataclasses.replace(manifest, kv_cache=cache)) is None
