"""Checkpoints of multimodal models: their language model is exported, and the other parts are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.checkpoints import COMMON, HEAD_DIM, add_tokenizer
from support.families import by_family

from satchel.export import ExportError
from satchel.export.checkpoint import open_checkpoint
from satchel.export.reference import open_reference
from satchel.runtime import Generator
from satchel.runtime.cli import main as cli

IDS = np.random.default_rng(3).integers(3, 440, 20)
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
         "patch_size": 14}  # fmt: skip
QWEN_TOWER = {"depth": 1, "hidden_size": 32, "embed_dim": 32, "intermediate_size": 48, "num_heads": 2,
              "out_hidden_size": 64, "fullatt_block_indexes": [0], "deepstack_visual_indexes": [0]}  # fmt: skip
AUDIO = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "hidden_size": 32,
         "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}  # fmt: skip
GEMMA = {"head_dim": HEAD_DIM, "query_pre_attn_scalar": HEAD_DIM}

WRAPPERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma3": (GEMMA, {"vision_config": TOWER, "mm_tokens_per_image": 4}),
    "mistral3": ({"head_dim": HEAD_DIM}, {"vision_config": {**TOWER, "head_dim": 16}}),
    "llava": ({}, {"vision_config": {**TOWER, "model_type": "clip_vision_model"}}),
    "llava-tied": ({}, {"vision_config": {**TOWER, "model_type": "clip_vision_model"}, "tie_word_embeddings": True}),
    "llava_onevision": ({}, {"vision_config": {**TOWER, "model_type": "siglip_vision_model"}}),
    "internvl": ({}, {"vision_config": TOWER}),
    "idefics3": ({}, {"vision_config": TOWER}),
    "smolvlm": ({}, {"vision_config": TOWER}),
    "qwen2_vl": ({"rope_parameters": ROPE}, {"vision_config": {**QWEN_TOWER, "hidden_size": 64}}),
    "qwen2_5_vl": ({"rope_parameters": ROPE}, {"vision_config": QWEN_TOWER}),
    "qwen3_vl": ({"rope_parameters": ROPE, "head_dim": HEAD_DIM}, {"vision_config": QWEN_TOWER}),
    "qwen3_5": (
        {
            "rope_parameters": {**ROPE, "mrope_interleaved": True, "partial_rotary_factor": 1.0}, "head_dim": HEAD_DIM,
            "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
            "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        },
        {"vision_config": QWEN_TOWER},
    ),
    "lfm2_vl": ({"layer_types": ["conv", "full_attention"]}, {"vision_config": TOWER}),
    "qwen2_audio": ({}, {"audio_config": AUDIO}),
    "voxtral": ({"head_dim": HEAD_DIM}, {"audio_config": AUDIO}),
}  # fmt: skip


def save_wrapper(folder: Path, name: str) -> torch.nn.Module:
    """Save a tiny seeded multimodal model, and return it."""
    text, others = WRAPPERS[name]
    family = name.removesuffix("-tied")
    default = transformers.AutoConfig.for_model(family).get_text_config().model_type
    config = transformers.AutoConfig.for_model(
        family, text_config={"model_type": default, **COMMON, "pad_token_id": 0, **text}, **others
    )
    torch.manual_seed(5)
    model = transformers.AutoModelForMultimodalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    model.eval().save_pretrained(folder)
    return model


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> np.ndarray:
    return model(input_ids=torch.from_numpy(IDS)[None], use_cache=False).logits[0].numpy()


@pytest.mark.parametrize("name", by_family(WRAPPERS, {"gemma3", "llava-tied", "qwen2_vl", "qwen3_5"}.__contains__))
def test_the_language_model_has_the_logits_of_the_whole_model(name: str, tmp_path: Path) -> None:
    expected = logits_of(save_wrapper(tmp_path, name))
    opened = open_checkpoint(tmp_path)
    tensors = {key: torch.from_numpy(np.array(weight.numpy())) for key, weight in opened.weights.items()}
    opened.module.load_state_dict(tensors, assign=True)
    opened.module.tie_weights()
    np.testing.assert_allclose(logits_of(opened.module), expected, rtol=1e-4, atol=1e-4)
    (note,) = opened.notes
    assert name.removesuffix("-tied") in note
    assert "tower" in note or "visual" in note or "vision_model" in note


@pytest.mark.slow
def test_a_multimodal_folder_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = logits_of(save_wrapper(tmp_path / "model", "gemma3"))
    add_tokenizer(tmp_path / "model")
    assert cli.main(["export", str(tmp_path / "model"), "-o", str(tmp_path / "bundle"), "-p", "fp32"]) == 0
    assert "gemma3 is a multimodal model" in capsys.readouterr().err
    found = Generator.open(tmp_path / "bundle").engine.score(IDS)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(open_reference(tmp_path / "model")(IDS), expected, rtol=1e-5, atol=1e-5)


def test_a_folder_without_the_tensors_of_its_language_model_is_refused(tmp_path: Path) -> None:
    save_wrapper(tmp_path, "gemma3")
    path = tmp_path / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if "vision" in name}, path)
    with pytest.raises(ExportError, match=r"model\.embed_tokens"):
        open_checkpoint(tmp_path)
