"""Tiny checkpoints: seeded models of several families, saved as folders and as GGUF files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from support.tiny_tokenizers import byte_level_json

from satchel.export.checkpoint import open_checkpoint
from satchel.export.errors import ExportError

VOCABULARY = 448
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, INTERMEDIATE, CONTEXT = 64, 4, 2, 16, 2, 96, 128
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "num_hidden_layers": LAYERS,
    "intermediate_size": INTERMEDIATE,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
EXPERTS: dict[str, Any] = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LONG_FACTORS = {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + 0.5 * i for i in range(8)]}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32, **LONG_FACTORS}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-llama3-rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": HEAD_DIM}),
    "qwen3-wide": ("qwen3", {"head_dim": 128}),
    "qwen3-yarn": ("qwen3", {"head_dim": HEAD_DIM, "rope_parameters": YARN}),
    "phi3-longrope": ("phi3", {"rope_parameters": LONGROPE}),
    "gemma2": ("gemma2", {"head_dim": HEAD_DIM, "query_pre_attn_scalar": HEAD_DIM}),
    "gemma3_text": ("gemma3_text", {"head_dim": HEAD_DIM, "query_pre_attn_scalar": HEAD_DIM, "sliding_window": 16}),
    "gpt2": ("gpt2", {}),
    "gpt_neox": ("gpt_neox", {}),
    "mixtral": ("mixtral", {"num_local_experts": 3}),
    "qwen2_moe": ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 40}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "head_dim": HEAD_DIM}),
}


def tiny_model(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> transformers.PreTrainedModel:
    """A model of `FAMILIES` with seeded random weights, biases and norms included."""
    model_type, options = FAMILIES[family]
    config = transformers.AutoConfig.for_model(model_type, **{**COMMON, **options, **changes})
    torch.manual_seed(11)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype).eval()


def save_tiny(
    folder: Path, family: str = "llama", *, dtype: torch.dtype = torch.float32, tokenizer: bool = False, **changes: Any
) -> Path:
    """Save a tiny model with `save_pretrained`; give it a byte-level tokenizer if asked to."""
    tiny_model(family, dtype, **changes).save_pretrained(folder)
    if tokenizer:
        add_tokenizer(folder)
    return folder


def add_tokenizer(folder: Path) -> None:
    """Put a byte-level tokenizer with its config into a folder."""
    (folder / "tokenizer.json").write_bytes(byte_level_json())
    table = {"tokenizer_class": "TokenizersBackend", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(table))


def change_json(path: Path, **changes: Any) -> None:
    """Set, or with None remove, keys of a JSON file."""
    table = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in table.items() if value is not None}))


def reloaded(folder: Path) -> dict[str, np.ndarray]:
    """The float32 state dict as transformers' own loader reads it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


GGUF_ARCHITECTURES = {
    "llama": "llama",
    "llama-tied": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3-wide": "qwen3",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}
Q = gguf.GGMLQuantizationType


def gguf_metadata(family: str) -> dict[str, Any]:
    """The metadata of a tiny model's GGUF file, without the architecture's prefix."""
    config = tiny_model(family).config
    head_dim = getattr(config, "head_dim", HEAD_DIM)
    facts: dict[str, Any] = {
        "context_length": CONTEXT,
        "embedding_length": HIDDEN,
        "block_count": LAYERS,
        "feed_forward_length": INTERMEDIATE,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "rope.freq_base": 10000.0,
        "attention.layer_norm_rms_epsilon": 2.0**-17,
        "vocab_size": VOCABULARY,
    }
    if "moe" in family:
        facts |= {"expert_count": 3, "expert_used_count": 2, "expert_feed_forward_length": 32}
    if family == "qwen2_moe":
        facts["expert_shared_feed_forward_length"] = 40
    if "gemma" in family:
        facts["attention.sliding_window"] = config.sliding_window
    return facts


def write_gguf(
    path: Path,
    architecture: str,
    facts: dict[str, Any],
    tensors: dict[str, np.ndarray],
    *,
    types: dict[str, gguf.GGMLQuantizationType] | None = None,
    tokenizer: bool = False,
    metadata: dict[str, Any] | None = None,
) -> Path:
    """Write a GGUF file; `types` names tensors to quantize, `tokenizer` adds a byte-level vocabulary."""
    writer = gguf.GGUFWriter(path, architecture)
    if tokenizer:
        _add_vocabulary(writer)
    for key, value in {**{f"{architecture}.{k}": v for k, v in facts.items()}, **(metadata or {})}.items():
        _add(writer, key, value)
    for name, array in tensors.items():
        kind = (types or {}).get(name)
        if kind is None:
            writer.add_tensor(name, np.ascontiguousarray(array))
        else:
            writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    adders.get(type(value), writer.add_array)(key, value)


def _add_vocabulary(writer: gguf.GGUFWriter) -> None:
    stored = json.loads(byte_level_json())
    tokens = sorted(stored["model"]["vocab"], key=stored["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i < 3 else 1 for i in range(len(tokens))])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in stored["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)


def refused(source: Path | str, *parts: str, **options: Any) -> None:
    """`open_checkpoint` refuses with one line that holds all parts, and leaves a folder as it was."""
    folder = Path(source)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    with pytest.raises(ExportError) as caught:
        open_checkpoint(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
