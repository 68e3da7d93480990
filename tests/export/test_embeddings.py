"""Bundles exported for embeddings give the hidden states of transformers; what cannot be exported is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from support.adapted import ADAPTERS, IDS, trained
from support.checkpoints import change_json, save_tiny
from support.exported import stored_weights
from support.families import FAMILIES, TOLERANCE, VOCABULARY, by_family, reference, save

from satchel.export import ExportConfig, ExportError, export_bundle
from satchel.graphs.ir.values import IDENTITY
from satchel.runtime.generation.generator import Generator
from satchel.runtime.ort.open_bundle import open_bundle

LENGTHS = (40, 1, 13)
FAMILIES_TRIED = [
    "llama", "gemma2", "cohere", "gpt2", "granite", "phi3_long", "qwen3_moe", "qwen3_5_text", "lfm2", "falcon_h1",
]  # fmt: skip


def texts() -> list[NDArray[np.int64]]:
    rng = np.random.default_rng(1)
    return [rng.integers(3, VOCABULARY, length) for length in LENGTHS]


def pooled(model: torch.nn.Module, pooling: str) -> NDArray[np.float32]:
    """The hidden states that transformers says are the last ones, [texts, hidden]."""
    found = []
    for ids in texts():
        with torch.no_grad():
            result = model(input_ids=torch.from_numpy(ids)[None], output_hidden_states=True, use_cache=False)
        states = result.hidden_states[-1][0].float().numpy()
        found.append(states[-1] if pooling == "last" else states.mean(axis=0))
    return np.stack(found)


def off_by(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float((np.abs(found - expected).max(axis=1) / np.abs(expected).max(axis=1)).max())


@pytest.mark.parametrize("name", by_family(FAMILIES_TRIED, quick={"llama", "lfm2"}.__contains__))
def test_vectors_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    checkpoint, folder = save(family, tmp_path / "checkpoint"), tmp_path / "bundle"
    pooling = "mean" if name != "gemma2" else "last"
    config = ExportConfig(folder, "fp32", max_context=family.context, certificate=False, embeddings=pooling)
    manifest = export_bundle(checkpoint, config)
    assert manifest.embeddings is not None
    assert (manifest.embeddings.pooling, manifest.embeddings.size) == (pooling, 64)
    generator = Generator.open(folder, threads=1)
    expected = pooled(reference(family, stored_weights(checkpoint)), pooling)
    assert off_by(generator.embed(texts(), normalize=False), expected) <= TOLERANCE
    for index, ids in enumerate(texts()):  # in pieces
        assert off_by(generator.engine.embed(ids, 9)[None], expected[index : index + 1]) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("tie", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_rotated_stream_is_rotated_back(tie: bool, tmp_path: Path) -> None:
    """int8 turns all channels of the stream: hidden states are of the checkpoint's own channels nevertheless."""
    source = save_tiny(tmp_path / "checkpoint", "llama", tie_word_embeddings=tie, tokenizer=True)
    config = ExportConfig(tmp_path / "bundle", "int8", certificate=False, embeddings="mean")
    manifest = export_bundle(source, config)
    assert any(entry["pass"] == "rotate_residual" and entry["count"] for entry in manifest.passes)
    assert not any(IDENTITY.startswith(layer) for layer in manifest.layers)
    generator = Generator.open(tmp_path / "bundle", threads=1)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, local_files_only=True)
    ids = generator.encode("the cat sat on the mat and looked at the other cat")
    with torch.no_grad():
        result = model(input_ids=torch.from_numpy(ids)[None], output_hidden_states=True)
    expected = result.hidden_states[-1][0].mean(dim=0).numpy()
    (found,) = generator.embed([ids], normalize=False)
    assert found @ expected / np.linalg.norm(found) / np.linalg.norm(expected) >= 0.999
    assert np.linalg.norm(found - expected) <= 0.05 * np.linalg.norm(expected)


@pytest.mark.slow
def test_logits_are_those_of_a_bundle_without_embeddings(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "checkpoint", "llama")
    for name, embeddings in (("plain", None), ("both", "last")):
        export_bundle(source, ExportConfig(tmp_path / name, "fp32", certificate=False, embeddings=embeddings))
    plain, both = (open_bundle(tmp_path / name).manifest for name in ("plain", "both"))
    assert plain.embeddings is None
    for file in ("prefill.onnx", "decode.onnx", "score.onnx", "weights.bin"):
        assert plain.files[file] == both.files[file]


@pytest.mark.slow
@pytest.mark.parametrize("class_name", [pytest.param("Qwen3ForCausalLM", marks=pytest.mark.slow), "Qwen3Model"])
def test_a_checkpoint_of_a_body_alone_is_exported_if_its_head_is_tied(class_name: str, tmp_path: Path) -> None:
    """As Qwen3-Embedding and others are stored: no prefix before the names, and no head."""
    config = transformers.AutoConfig.for_model(
        "qwen3", vocab_size=VOCABULARY, hidden_size=64, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.AutoModel.from_config(config).eval()
    model.save_pretrained(tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "config.json"
    change_json(file, architectures=[class_name])
    export_bundle(
        tmp_path / "checkpoint", ExportConfig(tmp_path / "bundle", "fp32", certificate=False, embeddings="last")
    )
    ids = texts()[0]
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(ids)[None]).last_hidden_state[0, -1].numpy()
    found = Generator.open(tmp_path / "bundle", threads=1).embed([ids], normalize=False)
    assert off_by(found, expected[None]) <= TOLERANCE
    change_json(file, tie_word_embeddings=False)
    with pytest.raises(ExportError, match=r"lm_head\.weight.*tie_word_embeddings"):
        export_bundle(tmp_path / "checkpoint", ExportConfig(tmp_path / "other", "fp32", embeddings="last"))
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_adapters_that_are_kept_apart_change_the_vectors(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "base")
    model = trained("llama", tmp_path / "style", **ADAPTERS["style"]).eval()
    options = {"adapters": (f"style={tmp_path / 'style'}",), "adapter_form": "separate", "embeddings": "last"}
    export_bundle(source, ExportConfig(tmp_path / "bundle", "fp32", certificate=False, **options))
    generator = Generator.open(tmp_path / "bundle", threads=1)
    with torch.no_grad():
        states = model(torch.tensor([IDS]), output_hidden_states=True).hidden_states[-1][0, -1].numpy()
    found = generator.embed([IDS], normalize=False, adapter="style")
    assert off_by(found, states[None]) <= TOLERANCE
    assert off_by(generator.embed([IDS], normalize=False), states[None]) > 0.1


@pytest.mark.slow
def test_a_module_of_ones_own_is_refused(tmp_path: Path) -> None:
    factory = f"{Path(__file__).parents[2] / 'samples' / 'own_module.py'}:build"
    with pytest.raises(ExportError, match="--embeddings"):
        export_bundle(factory, ExportConfig(tmp_path / "bundle", "fp32", embeddings="mean"))


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"embeddings": "sum"}, "--embeddings sum"),
        ({"embeddings": "mean", "target": "cuda"}, "--target cuda"),
        ({"embeddings": "mean", "target": "cann"}, "--target cann"),
        ({"embeddings": "mean", "passes": (json,)}, "--pass"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, object], flag: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=flag):
        ExportConfig(tmp_path / "bundle", **options)
