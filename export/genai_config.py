"""genai_config.json: how onnxruntime-genai opens the same folder."""

from __future__ import annotations

from typing import Any

from satchel.export.checkpoint import Checkpoint
from satchel.runtime.manifest import CacheSpec


def genai_config(checkpoint: Checkpoint, cache: CacheSpec, context: int) -> dict[str, Any] | None:
    """The configuration, or None where that runner cannot express the model (layers whose caches differ in size).

    That runner has one graph for prompts and further tokens; the prefill graph takes both.
    """
    sizes = {(layer.kv_heads, layer.key_dim, layer.value_dim) for layer in cache.layers}
    if len(sizes) != 1:
        return None
    ((kv_heads, head_dim, _),) = sizes
    end = list(checkpoint.eos_token_ids) or [0]
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": "prefill.onnx",
        "head_size": head_dim,
        "hidden_size": checkpoint.fact("hidden_size") or kv_heads * head_dim,
        "num_attention_heads": checkpoint.fact("num_attention_heads") or kv_heads,
        "num_hidden_layers": len(cache.layers),
        "num_key_value_heads": kv_heads,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    model = {
        "type": "decoder",
        "vocab_size": checkpoint.vocab_size,
        "context_length": context,
        "eos_token_id": end,
        "pad_token_id": checkpoint.pad_token_id if checkpoint.pad_token_id is not None else end[0],
        "decoder": decoder,
    }
    if checkpoint.bos_token_id is not None:
        model["bos_token_id"] = checkpoint.bos_token_id
    search = {"do_sample": False, "max_length": context, "min_length": 0, "past_present_share_buffer": True}
    return {"model": model, "search": search}
