"""What the families' layers have beyond matrices that all have, as data: norms, biases, forms of feed-forward parts.

Rows were compared with the parameters of transformers' own models; `tests/export/test_plan_families.py` repeats it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

NAMES: Mapping[str, tuple[str, ...]] = {
    "hidden_size": ("n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "num_key_value_heads": ("num_kv_heads",),
    "max_position_embeddings": ("n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length"),
    "num_experts": ("num_local_experts", "n_routed_experts", "moe_num_experts"),
    "num_experts_per_tok": ("moe_k", "moe_topk", "num_experts_per_token"),
    "first_k_dense_replace": ("num_dense_layers", "moe_layer_start_index"),
    "num_shared_experts": ("n_shared_experts", "moe_num_shared_experts"),
    "mamba_expand": ("expand",),
    "mamba_d_state": ("state_size", "ssm_state_size"),
    "mamba_d_conv": ("conv_kernel",),
    "mamba_n_groups": ("n_groups",),
    "mamba_n_heads": ("mamba_num_heads", "num_heads"),
    "mamba_d_head": ("mamba_head_dim", "head_dim"),
    "mamba_dt_rank": ("time_step_rank",),
}
"""Other names of a setting in configs."""

ALL = frozenset({"qkv", "o", "mlp"})
ATTENTION = frozenset({"qkv", "o"})
NONE: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Family:
    """The layers of a family.

    Attributes:
        gated: Whether a feed-forward part has a gate beside its first matrix.
        norm: Vectors of one norm: 2 with a bias.
        norms: Norms of the residual stream in one layer.
        biases: What has a bias: "qkv", "o", "mlp", "head".
        switches: What settings of the config add to `biases` if they are true.
        head_norms: Norms of queries and keys: "head" with one vector for all heads, "all" with one for each.
        parallel: Whether attention and feed-forward part read the same input; a setting's name if that says so.
        tied: Whether the head is the embedding where the config does not say.
        positions: Whether there is a table of positions in place of angles; how many more rows than positions.
        angles: Whether keys are rotated.
        distances: Whether scores have a bias for distance (ALiBi); a config may say so too.
        wide_angles: Whether tables have an angle for each number of a head, in place of each pair.
        defaults: Settings that a config leaves out where they are these.
        mixer: What else than attention a layer has: "delta", "conv", "mamba", "mamba2".
        experts_bias: Whether router and experts have biases, and attention sinks.
        doubled_query: Whether queries come with a gate of their own.
        width: The setting with the width of a feed-forward part; four times the hidden size where a config has none.
    """

    gated: bool = True
    norm: int = 1
    norms: int = 2
    biases: frozenset[str] = NONE
    switches: Mapping[str, frozenset[str]] = dataclasses.field(default_factory=dict)
    head_norms: str = ""
    parallel: bool | str = False
    tied: bool = False
    positions: int | None = None
    angles: bool = True
    distances: bool = False
    wide_angles: bool = False
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    mixer: str = ""
    experts_bias: bool = False
    doubled_query: bool = False
    width: str = "intermediate_size"


def _with(base: Family, **changes: Any) -> Family:
    return dataclasses.replace(base, **changes)


_LLAMA = Family(switches={"attention_bias": ATTENTION, "mlp_bias": frozenset({"mlp"})})
_QWEN3 = Family(switches={"attention_bias": ATTENTION}, head_norms="head")
_GEMMA = Family(switches={"attention_bias": ATTENTION}, tied=True, defaults={"head_dim": 256})
_LAYER_NORM = Family(gated=False, norm=2, biases=ALL, angles=True)
_GPT2 = _with(_LAYER_NORM, tied=True, positions=0, angles=False, width="n_inner")
_OLMO2 = Family(switches={"attention_bias": ATTENTION}, head_norms="all")
_COHERE = Family(
    switches={"attention_bias": ATTENTION}, norms=1, parallel=True, tied=True, defaults={"logit_scale": 0.0625}
)
_DEEPSEEK = Family(
    switches={"attention_bias": frozenset({"o"})},
    defaults={"first_k_dense_replace": 0, "num_key_value_heads": None},
)
_QWEN3_5 = Family(head_norms="head", mixer="delta", doubled_query=True, defaults={"full_attention_interval": 4})
_MAMBA2 = Family(mixer="mamba2", defaults={"mamba_d_conv": 4, "mamba_n_groups": 1})
_MAMBA1 = Family(
    norms=1, mixer="mamba", angles=False, defaults={"conv_kernel": 4, "expand": 2, "state_size": 16, "use_bias": False}
)
_LFM2 = Family(head_norms="head", mixer="conv", tied=True, defaults={"conv_L_cache": 3, "block_multiple_of": 256})

FAMILIES: Mapping[str, Family] = {
    "llama": _LLAMA,
    "mistral": Family(),
    "ministral": Family(),
    "ministral3": Family(),
    "cwm": Family(),
    "qwen2": Family(biases=frozenset({"qkv"})),
    "qwen3": _QWEN3,
    "gemma": _GEMMA,
    "gemma2": _with(_GEMMA, norms=4),
    "gemma3_text": _with(_GEMMA, norms=4, head_norms="head", defaults={"head_dim": 256, "sliding_window_pattern": 6}),
    "gemma3n_text": _with(_GEMMA, norms=4, head_norms="head", wide_angles=True),
    "gemma4_text": _with(_GEMMA, norms=4, head_norms="head", wide_angles=True),
    "phi3": Family(),
    "phi": _with(_LAYER_NORM, norms=1, parallel=True, biases=ALL | {"head"}),
    "smollm3": _with(_LLAMA, tied=True),
    "olmo": _with(_LLAMA, norm=0),
    "olmo2": _OLMO2,
    "olmo3": _OLMO2,
    "granite": _LLAMA,
    "cohere": _COHERE,
    "cohere2": _COHERE,
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neo": _with(_GPT2, biases=frozenset({"o", "mlp"}), width="intermediate_size"),
    "opt": _with(_GPT2, positions=2, width="ffn_dim", defaults={"ffn_dim": 3072}),
    "gpt_neox": _with(
        _LAYER_NORM, biases=frozenset({"mlp"}), switches={"attention_bias": ATTENTION},
        parallel="use_parallel_residual", defaults={"attention_bias": True, "use_parallel_residual": True},
    ),
    "gptj": _with(
        _LAYER_NORM, norms=1, parallel=True, biases=frozenset({"mlp", "head"}), width="n_inner"
    ),
    "codegen": _with(
        _LAYER_NORM, norms=1, parallel=True, biases=frozenset({"mlp", "head"}), width="n_inner"
    ),
    "bloom": _with(_LAYER_NORM, tied=True, angles=False, distances=True, width=""),
    "mpt": Family(
        gated=False, tied=True, angles=False, distances=True, width="", defaults={"expansion_ratio": 4},
    ),
    "falcon": _with(
        _LAYER_NORM, biases=NONE, switches={"bias": ALL}, tied=True, parallel="parallel_attn", width="ffn_hidden_size",
        defaults={"multi_query": True, "parallel_attn": True},
    ),
    "starcoder2": _with(_LAYER_NORM, biases=NONE, switches={"use_bias": ALL}, tied=True, defaults={"use_bias": True}),
    "stablelm": Family(
        norm=2, switches={"use_qkv_bias": frozenset({"qkv"})}, parallel="use_parallel_residual",
    ),
    "exaone4": Family(head_norms="head"),
    "glm": Family(switches={"attention_bias": frozenset({"qkv"})}),
    "glm4": Family(switches={"attention_bias": frozenset({"qkv"})}, norms=4),
    "ernie4_5": Family(switches={"use_bias": ALL}, tied=True),
    "seed_oss": Family(
        switches={
            "attention_bias": frozenset({"qkv"}), "attention_out_bias": frozenset({"o"}), "mlp_bias": frozenset({"mlp"})
        },
        defaults={"attention_bias": True, "head_dim": 128},
    ),
    "arcee": _with(_LLAMA, gated=False),
    "nemotron": _with(_LLAMA, gated=False, norm=2),
    "hunyuan_v1_dense": Family(switches={"attention_bias": ATTENTION}, head_norms="head"),
    "mixtral": Family(),
    "qwen2_moe": Family(biases=frozenset({"qkv"}), defaults={"decoder_sparse_step": 1}),
    "qwen3_moe": _with(_QWEN3, defaults={"decoder_sparse_step": 1}),
    "olmoe": _OLMO2,
    "granitemoe": _LLAMA,
    "granitemoeshared": _LLAMA,
    "gpt_oss": Family(biases=ATTENTION, experts_bias=True),
    "dots1": _with(_QWEN3, defaults={"first_k_dense_replace": 0}),
    "glm4_moe": Family(
        switches={"attention_bias": frozenset({"qkv"})}, head_norms="use_qk_norm",
        defaults={"first_k_dense_replace": 1},
    ),
    "minimax_m2": Family(head_norms="all"),
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _with(_DEEPSEEK, wide_angles=True, defaults={"first_k_dense_replace": 3}),
    "glm4_moe_lite": _with(_DEEPSEEK, wide_angles=True, defaults={"first_k_dense_replace": 1}),
    "minicpm3": _with(_DEEPSEEK, tied=True),
    "youtu": _with(_DEEPSEEK, tied=True, wide_angles=True),
    "qwen3_5_text": _QWEN3_5,
    "qwen3_5_moe_text": _QWEN3_5,
    "qwen3_next": _with(_QWEN3_5, defaults={"full_attention_interval": 4, "decoder_sparse_step": 1}),
    "lfm2": _with(_LFM2, defaults={**_LFM2.defaults, "block_auto_adjust_ff_dim": True}),
    "lfm2_moe": _with(_LFM2, defaults={**_LFM2.defaults, "num_dense_layers": 2}),
    "granitemoehybrid": _with(_MAMBA2, switches={"attention_bias": ATTENTION}, angles=False),
    "bamba": _with(_MAMBA2, switches={"attention_bias": ATTENTION}),
    "falcon_h1": _MAMBA2,
    "nemotron_h": _with(_MAMBA2, gated=False, norms=1, angles=False, switches={"attention_bias": ATTENTION}),
    "mamba2": _with(_MAMBA2, norms=1, angles=False, defaults={**_MAMBA2.defaults, "expand": 2, "n_groups": 8}),
    "mamba": _with(_MAMBA1, tied=True),
    "falcon_mamba": _with(_MAMBA1, tied=True),
    "jamba": Family(
        mixer="mamba", angles=False,
        defaults={
            "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2, "attn_layer_period": 8, "attn_layer_offset": 4,
            "expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 16, "num_experts_per_tok": 2,
        },
    ),
}  # fmt: skip
"""By `model_type`."""
