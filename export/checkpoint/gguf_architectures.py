"""Maps each GGUF architecture's metadata to transformers' config fields, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_COMMON = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_EXPERTS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_GEMMA = {"attention.sliding_window": "sliding_window"}
_GEMMA_SOFTCAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}


@dataclass(frozen=True)
class Architecture:
    """How to read one GGUF architecture.

    Attributes:
        model_type: transformers' name for it.
        required: Metadata keys, without the architecture's prefix, that become config fields.
        optional: The same, for keys that a file may omit.
        config: Config fields that are built into llama.cpp rather than stored in the file.
        permuted: Whether the rows of the query and key projections are stored in the order of interleaved rotary pairs.
        norm_offset: The offset added to norm weights in the file.
        wide_layers: The number of layers at which the query scale is the hidden size per head instead of head_dim.
    """

    model_type: str
    required: Mapping[str, str] = field(default_factory=lambda: dict(_COMMON))
    optional: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    permuted: bool = False
    norm_offset: float = 0.0
    wide_layers: int | None = None


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", permuted=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "qwen2moe": Architecture(
        "qwen2_moe",
        _COMMON | _EXPERTS | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
        config={"norm_topk_prob": False},
    ),
    "qwen3moe": Architecture("qwen3_moe", _COMMON | _EXPERTS, config={"norm_topk_prob": True}),
    "gemma2": Architecture("gemma2", _COMMON | _GEMMA, _GEMMA_SOFTCAPS, norm_offset=1.0, wide_layers=46),
    "gemma3": Architecture("gemma3_text", _COMMON | _GEMMA, _GEMMA_SOFTCAPS, norm_offset=1.0, wide_layers=62),
}

HANDLED_KEYS = frozenset(
    {
        "attention.key_length",
        "attention.value_length",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.freq_base_swa",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
    }
)
"""Keys that are combined into config fields."""

SILENT_KEYS = frozenset({"vocab_size", "rope.scaling.finetuned", "tensor_data_layout"})
"""Keys that repeat what the tensors show, or have no effect in any runtime."""
