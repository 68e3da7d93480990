"""The reference is the checkpoint itself, read and run by transformers or by the user's own module."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.checkpoints import GGUF_ARCHITECTURES, gguf_metadata, save_tiny, tiny_model, write_gguf
from support.command import Satchel
from support.families import FAMILIES, build, save
from support.gguf_families import to_gguf
from support.own_module import OwnModule
from support.own_module import plain_attention as protocol_attention

from satchel.export import ExportError
from satchel.export.reference import open_reference, plain_attention

IDS = np.random.default_rng(4).integers(3, 60, 24)


def logits_of(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(IDS)[None]).logits[0].numpy()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_folder_gives_the_logits_of_the_model_that_was_saved(tmp_path: Path, family: str) -> None:
    found = open_reference(save_tiny(tmp_path / "model", family))(IDS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, logits_of(tiny_model(family)), rtol=1e-5, atol=1e-5)


def test_what_transformers_says_of_other_kernels_is_not_shown(tmp_path: Path) -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    library = logging.getLogger("transformers")
    checkpoint = save(FAMILIES["lfm2"], tmp_path / "model")
    transformers.utils.logging.warning_once.cache_clear()
    level = library.level
    library.addHandler(handler)
    library.setLevel(logging.WARNING)  # other tests may have left it at ERROR
    try:
        open_reference(checkpoint)(IDS)
        assert records == []
        assert library.level == logging.WARNING
        transformers.utils.logging.warning_once.cache_clear()
        logits_of(build(FAMILIES["lfm2"]))
        assert any("causal_conv1d" in record.getMessage() for record in records)
    finally:
        library.removeHandler(handler)
        library.setLevel(level)


def test_a_gguf_file_gives_the_logits_of_the_model_that_was_written(tmp_path: Path) -> None:
    model = tiny_model("llama")
    tensors = to_gguf("llama", model)
    path = write_gguf(
        tmp_path / "model.gguf", GGUF_ARCHITECTURES["llama"], gguf_metadata("llama"), tensors, tokenizer=True
    )
    model.config.rms_norm_eps = 2.0**-17
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 2.0**-17
    np.testing.assert_allclose(open_reference(path)(IDS), logits_of(model), rtol=1e-4, atol=1e-4)


def test_a_module_of_ones_own_gives_its_logits(tmp_path: Path) -> None:
    file = tmp_path / "model.py"
    file.write_text(
        "from support.own_module import OwnModule\n\ndef build():\n    return OwnModule(24, window=5, softcap=3.0)\n"
    )
    module = OwnModule(24, window=5, softcap=3.0).eval()
    with torch.no_grad():
        positions = torch.arange(len(IDS))[None]
        expected = module(torch.from_numpy(IDS)[None], positions, protocol_attention)[0].numpy()
    np.testing.assert_allclose(open_reference(f"{file}:build")(IDS), expected, rtol=1e-5, atol=1e-5)


def test_attention_is_causal_and_keeps_its_window() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 6)
    whole = plain_attention(query, key, value, window=3)
    assert whole.shape == (1, 4, 9, 6)
    torch.testing.assert_close(
        whole[:, :, :7], plain_attention(query[:, :, :7], key[:, :, :7], value[:, :, :7], window=3)
    )
    changed = value.clone()
    changed[:, :, 2] += 1
    difference = (plain_attention(query, key, changed, window=3) - whole).abs().amax((0, 1, 3))
    assert [bool(moved) for moved in difference > 1e-6] == [False, False, True, True, True, *[False] * 4]


def test_weights_without_values_are_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ExportError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        open_reference(folder)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="nowhere: no such file or folder"):
        open_reference(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ExportError, match=r"empty: .*reference"):
        open_reference(tmp_path / "empty")
    (tmp_path / "noise.gguf").write_bytes(b"noise")
    with pytest.raises(ExportError, match=r"noise.gguf: .*reference"):
        open_reference(tmp_path / "noise.gguf")
    with pytest.raises(ExportError, match=r"missing.py: no such file"):
        open_reference(f"{tmp_path}/missing.py:build")


@pytest.fixture
def evaluation(tiny_bundle: Path, tmp_path: Path) -> tuple[object, ...]:
    """`satchel eval` of the tiny bundle on a little text."""
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and looked at the other cat. " * 3)
    return ("eval", tiny_bundle, "--text", text, "--windows", 2, "--window-tokens", 40, "--skip", 8)


def test_an_export_is_close_to_its_checkpoint(
    satchel: Satchel, evaluation: tuple[object, ...], tiny_checkpoint: Path
) -> None:
    found = satchel.json(*evaluation, "--reference", tiny_checkpoint, "--quiet")
    for phase in ("prefill", "decode"):
        assert found[phase]["kl_mean"] < 1e-8
        assert found[phase]["top1"] == 1
        assert found[phase]["perplexity"] == pytest.approx(found[phase]["reference_perplexity"], rel=1e-4)


def test_a_checkpoint_of_another_vocabulary_is_refused(
    satchel: Satchel, evaluation: tuple[object, ...], tmp_path: Path
) -> None:
    said = satchel.refuses(*evaluation, "--reference", save_tiny(tmp_path / "other", vocab_size=500), "--quiet")
    assert "the reference's logits are [40, 500] where the bundle's are [40, 448]" in said


def test_half_precision_weights_are_computed_in_float32(tmp_path: Path) -> None:
    found = open_reference(save_tiny(tmp_path / "model", dtype=torch.bfloat16))(IDS)
    np.testing.assert_allclose(found, logits_of(tiny_model("llama", torch.bfloat16).float()), rtol=1e-5, atol=1e-5)
