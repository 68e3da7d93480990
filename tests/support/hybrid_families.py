"""Tiny models of the families whose layers keep a state, as data for `families.FAMILIES`: model_type, options, seed,
deviation."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING

SINCE = {
    "flint": "5.21", "dots3_note_text": "5.23", "inkling2_text": "5.23", "internlm3": "5.23", "iquestcoder": "5.23",
    "lfm3": "5.23", "apertus1p5_text": "5.24",
    "dory": "5.24", "exaone": "5.24", "inkling2_loop_text": "5.24", "lara_mini": "5.24", "sarvam_mla": "5.24",
    "sarvam_moe": "5.24",
}  # fmt: skip
"""The version of transformers that brought a family: those that came after the lowest version that satchel takes."""


def is_known(model_type: str) -> bool:
    """Whether the installed transformers has a family; one without an entry in `SINCE` is there or it is a mistake."""
    return model_type not in SINCE or model_type in CONFIG_MAPPING


LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 8,
}  # fmt: skip
DELTA = {"num_hidden_layers": 4, "layer_types": ["linear_attention"] * 3 + ["full_attention"], "head_dim": 16}
SHORT = {"num_hidden_layers": 4, "layer_types": ["conv", "conv", "full_attention", "conv"], "pad_token_id": 0}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MAMBA2 = {
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 16, "mamba_expand": 2,
    "mamba_chunk_size": 8,
}  # fmt: skip
MAMBA1 = {"state_size": 16, "expand": 2, "time_step_rank": 8, "tie_word_embeddings": False}

HYBRIDS: dict[str, tuple[str, dict[str, Any], int, float]] = {
    "qwen3_5_text": ("qwen3_5_text", {**DELTA, **LINEAR}, 0, 0.2),
    "qwen3_5_moe_text": (
        "qwen3_5_moe_text", {**DELTA, **LINEAR, **MIXTURE, "shared_expert_intermediate_size": 24}, 0, 0.2,
    ),
    "qwen3_next": ("qwen3_next", {**DELTA, **LINEAR, **MIXTURE, "shared_expert_intermediate_size": 24}, 0, 0.2),
    "lfm2": ("lfm2", SHORT, 0, 0.2),
    "lfm2_moe": ("lfm2_moe", {**SHORT, **MIXTURE, "num_dense_layers": 1}, 0, 0.2),
    "lfm3": (
        "lfm3",
        {**SHORT, "layer_types": ["conv", "sliding_attention", "full_attention", "conv"], "sliding_window": 7},
        0, 0.2,
    ),
    "granitemoehybrid_mamba": (
        "granitemoehybrid",
        {
            "num_hidden_layers": 4, "layer_types": ["mamba", "mamba", "attention", "mamba"], "num_local_experts": 4,
            "num_experts_per_tok": 2, "shared_intermediate_size": 48, **MAMBA2,
        },
        1, 0.2,
    ),
    "nemotron_h": (
        "nemotron_h",
        {
            "num_hidden_layers": 5, "layers_block_type": ["mamba", "mlp", "mamba", "attention", "mlp"], "head_dim": 16,
            "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 16, "chunk_size": 8,
            "pad_token_id": 0,
        },
        2, 0.2,
    ),
    "falcon_h1": ("falcon_h1", {"head_dim": 16, "mamba_d_ssm": 128, "ssm_out_multiplier": 3.0, **MAMBA2}, 0, 0.2),
    "bamba": ("bamba", {"num_hidden_layers": 3, "attn_layer_indices": [1], **MAMBA2}, 0, 0.2),
    "mamba": ("mamba", MAMBA1, 0, 0.2),
    "mamba2": (
        "mamba2",
        {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2, "expand": 2, "chunk_size": 8},
        0, 0.2,
    ),
    "falcon_mamba": ("falcon_mamba", MAMBA1, 0, 0.2),
    "jamba": (
        "jamba",
        {
            "num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2, "expert_layer_period": 2,
            "expert_layer_offset": 1, "num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 16,
            "mamba_dt_rank": 8, "pad_token_id": 0,
        },
        0, 0.2,
    ),
    "zamba2": (
        "zamba2",
        {
            "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "attention_head_dim": 32, "mamba_d_state": 16, "mamba_ngroups": 2, "n_mamba_heads": 8, "mamba_expand": 2,
            "chunk_size": 8, "num_mem_blocks": 2, "adapter_rank": 8, "use_shared_attention_adapter": True,
            "use_mem_rope": True, "num_key_value_heads": 4,
        },
        0, 0.1,
    ),
    "olmo_hybrid": (
        "olmo_hybrid",
        {
            **DELTA, "linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
            "linear_value_head_dim": 24, "pad_token_id": 0,
        },
        0, 0.2,
    ),
    "bailing_hybrid": (
        "bailing_hybrid",
        {
            **DELTA, "linear_num_heads": 4, "linear_head_dim": 16, "num_key_value_heads": 4, "kv_lora_rank": 24,
            "q_lora_rank": None, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "num_experts": 4,
            "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 1, "n_group": 1,
            "topk_group": 1, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        },
        0, 0.1,
    ),
    "kimi_linear": (
        "kimi_linear",
        {
            **DELTA, "linear_num_heads": 4, "linear_head_dim": 16, "num_key_value_heads": 4, "kv_lora_rank": 24,
            "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "num_local_experts": 4,
            "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 1,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        },
        0, 0.2,
    ),
    "lara_mini": (
        "lara_mini",
        {
            **LINEAR, **MIXTURE, "num_hidden_layers": 4, "head_dim": 16, "sliding_window": 7,
            "layer_types": ["linear_attention", "sliding_attention", "linear_attention", "full_attention"],
            "shared_expert_intermediate_size": 24,
        },
        0, 0.2,
    ),
}  # fmt: skip
HYBRIDS = {name: family for name, family in HYBRIDS.items() if is_known(family[0])}
