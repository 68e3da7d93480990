"""Maps each GGUF architecture's metadata to transformers' config fields, and its tensors to parameters, as data.

The source is llama.cpp: its conversion/ folder says what a file holds, src/models/ which keys may be absent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_RMS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
_COMMON = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
}
_EXPERTS = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
_LOCAL_EXPERTS = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
_EXPERT_WIDTH = {"expert_feed_forward_length": "moe_intermediate_size"}
_SOFTCAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_ATTENTION_BIAS = {"attention_bias": "blk.0.attn_q.bias"}
_ROUTED = {
    "expert_count": "n_routed_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_shared_count": "n_shared_experts",
    "expert_feed_forward_length": "moe_intermediate_size",
    "leading_dense_block_count": "first_k_dense_replace",
}
_ROUTED_OPTIONS = {"expert_weights_scale": "routed_scaling_factor", "expert_weights_norm": "norm_topk_prob"}
_SIGMOID = {"expert_gating_func": (2,)}
_GRANITE_SCALES = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}


ANY: tuple[Any, ...] = ()
"""In `Architecture.neutral`: whatever the value, the tensors say the same."""


def _layer_norm(name: str) -> dict[str, str]:
    return {"attention.layer_norm_epsilon": name}


@dataclass(frozen=True)
class Architecture:
    """How to read one GGUF architecture.

    Attributes:
        model_type: transformers' name for it.
        required: Metadata keys, without the architecture's prefix, that become config fields; `_COMMON` is added.
        optional: The same, for keys that a file may omit.
        defaults: Config fields that llama.cpp sets where the file omits the key.
        width: The config field of feed_forward_length.
        config: Config fields that are built into llama.cpp rather than stored in the file.
        flags: Config fields that are true if the file has the tensor; after "!", if it has not.
        names: Parameters by the end of their module's name, with the tensor that holds them in each layer, where the
            gguf library does not know transformers' name.
        permuted: Whether the rows of the query and key projections are stored in the order of interleaved rotary pairs.
        per_head: Whether the fused projection is stored as query, key, value, and in the module by head.
        transposed: Ends of the names of parameters that the module stores transposed.
        norm_offset: The offset added to norm weights in the file.
        wide_layers: The number of layers at which the query scale is the hidden size per head instead of head_dim.
        partial: Whether only a part of each head may be rotated.
        period: Layers between two with full attention, where a file names a sliding window; None for one window in
            all layers.
        window: The sliding window where the file names none.
        two_ropes: Whether the config has rotary parameters for each kind of layer.
        variants: Architectures that a file with the key, and not 0, is of instead; the first that fits.
        latent: Whether keys have a part that is rotated, of rope.dimension_count, beside one that is not.
        by_input: Whether the module has stacks of experts as [experts, inputs, outputs], gates and ups in turn.
        by_layer: Metadata keys with a number for each layer that is a parameter, with the end of its name.
        rotary: Metadata keys that become rotary parameters.
        yarn: Rotary parameters that are built into the model where the file scales by yarn.
        refused_without_rope: Whether rope.scaling.finetuned false means that nothing is rotated.
        neutral: Keys with the values that say what the model does anyway.
    """

    model_type: str
    required: Mapping[str, str] = field(default_factory=lambda: dict(_RMS))
    optional: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    width: str = "intermediate_size"
    config: Mapping[str, Any] = field(default_factory=dict)
    flags: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    permuted: bool = False
    per_head: bool = False
    transposed: tuple[str, ...] = ()
    norm_offset: float = 0.0
    wide_layers: int | None = None
    partial: bool = False
    period: int | None = None
    window: int | None = None
    two_ropes: bool = False
    variants: tuple[tuple[str, Architecture], ...] = ()
    latent: bool = False
    by_input: bool = False
    by_layer: Mapping[str, str] = field(default_factory=dict)
    rotary: Mapping[str, str] = field(default_factory=dict)
    yarn: Mapping[str, Any] = field(default_factory=dict)
    refused_without_rope: bool = False
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "required", {**_COMMON, **self.required})


_GRANITE = Architecture(
    "granite",
    _RMS | {"logit_scale": "logits_scaling"},
    _GRANITE_SCALES,
    {"embedding_multiplier": 1.0, "residual_multiplier": 1.0},
    flags=_ATTENTION_BIAS | {"mlp_bias": "blk.0.ffn_up.bias"},
    permuted=True,
    refused_without_rope=True,
)
_GRANITE_MOE = dataclasses.replace(
    _GRANITE,
    model_type="granitemoe",
    required={**_GRANITE.required, **_LOCAL_EXPERTS},
    flags=_ATTENTION_BIAS,
    names={
        "block_sparse_moe.router": "ffn_gate_inp",
        "shared_mlp.output_linear": "ffn_down_shexp",
    },
    refused_without_rope=False,
)
_LLAMA = Architecture("llama", flags=_ATTENTION_BIAS | {"mlp_bias": "blk.0.ffn_up.bias"}, permuted=True)
_OLMO2 = Architecture("olmo2", flags=_ATTENTION_BIAS)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": dataclasses.replace(
        _LLAMA, variants=(("expert_count", Architecture("mixtral", _RMS | _LOCAL_EXPERTS, permuted=True)),)
    ),
    "internlm2": _LLAMA,
    "exaone": dataclasses.replace(_LLAMA, permuted=False),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3", flags=_ATTENTION_BIAS),
    "qwen2moe": Architecture(
        "qwen2_moe",
        _RMS | _EXPERTS,
        _EXPERT_WIDTH | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
        config={"norm_topk_prob": False},
    ),
    "qwen3moe": Architecture("qwen3_moe", _RMS | _EXPERTS, _EXPERT_WIDTH, config={"norm_topk_prob": True}),
    "gemma": Architecture("gemma", norm_offset=1.0),
    "gemma2": Architecture("gemma2", optional=_SOFTCAPS, norm_offset=1.0, wide_layers=46, period=2, window=4096),
    "gemma3": Architecture(
        "gemma3_text", optional=_SOFTCAPS, norm_offset=1.0, wide_layers=62, period=6, two_ropes=True
    ),
    "phi2": Architecture("phi", _layer_norm("layer_norm_eps"), partial=True),
    "phi3": Architecture("phi3", partial=True, config={"pad_token_id": None}),
    "phimoe": Architecture(
        "phimoe",
        _RMS | _LOCAL_EXPERTS,
        flags=_ATTENTION_BIAS | {"lm_head_bias": "output.bias"},
    ),
    "starcoder2": Architecture("starcoder2", _layer_norm("norm_epsilon"), flags={"use_bias": "blk.0.attn_q.bias"}),
    "starcoder": Architecture(
        "gpt_bigcode", _layer_norm("layer_norm_epsilon"), width="n_inner", config={"multi_query": True}
    ),
    "gpt2": Architecture(
        "gpt2",
        _layer_norm("layer_norm_epsilon"),
        width="n_inner",
        transposed=(".c_attn.weight", ".c_proj.weight", ".c_fc.weight"),
    ),
    "gptneox": Architecture(
        "gpt_neox",
        _layer_norm("layer_norm_eps") | {"use_parallel_residual": "use_parallel_residual"},
        flags={"attention_bias": "blk.0.attn_qkv.bias"},
        per_head=True,
        partial=True,
    ),
    "stablelm": Architecture(
        "stablelm",
        _layer_norm("layer_norm_eps"),
        flags={
            "use_qkv_bias": "blk.0.attn_q.bias",
            "qk_layernorm": "blk.0.attn_q_norm.weight",
            "use_parallel_residual": "!blk.0.ffn_norm.weight",
        },
        partial=True,
    ),
    "granite": _GRANITE,
    "granitemoe": dataclasses.replace(
        _GRANITE_MOE,
        variants=(
            (
                "expert_shared_feed_forward_length",
                dataclasses.replace(
                    _GRANITE_MOE,
                    model_type="granitemoeshared",
                    optional=_GRANITE_SCALES | {"expert_shared_feed_forward_length": "shared_intermediate_size"},
                ),
            ),
        ),
    ),
    "olmo": Architecture(
        "olmo",
        {},
        _layer_norm("layer_norm_eps") | {"attention.clamp_kqv": "clip_qkv"},
        permuted=True,
    ),
    "olmo2": dataclasses.replace(
        _OLMO2,
        variants=(
            (
                "attention.sliding_window",
                dataclasses.replace(_OLMO2, model_type="olmo3", period=4, two_ropes=True),
            ),
        ),
    ),
    "olmoe": Architecture("olmoe", _RMS | _EXPERTS, config={"norm_topk_prob": False}),
    "command-r": Architecture(
        "cohere",
        _layer_norm("layer_norm_eps"),
        {"logit_scale": "logit_scale"},
        {"logit_scale": 1.0},
        flags={"use_qk_norm": "blk.0.attn_q_norm.weight"},
    ),
    "cohere2": Architecture(
        "cohere2",
        _layer_norm("layer_norm_eps") | {"logit_scale": "logit_scale", "attention.sliding_window": "sliding_window"},
        period=4,
    ),
    "glm4": Architecture("glm4", flags=_ATTENTION_BIAS, partial=True),
    "exaone4": Architecture("exaone4", period=4),
    "smollm3": Architecture("smollm3", flags=_ATTENTION_BIAS, permuted=True),
    "nemotron": Architecture("nemotron", _layer_norm("norm_eps"), norm_offset=1.0, partial=True),
    "arcee": dataclasses.replace(_LLAMA, model_type="arcee"),
    "ernie4_5": Architecture("ernie4_5", flags={"use_bias": "blk.0.attn_q.bias"}),
    "seed_oss": Architecture(
        "seed_oss",
        flags=_ATTENTION_BIAS | {"attention_out_bias": "blk.0.attn_output.bias", "mlp_bias": "blk.0.ffn_up.bias"},
    ),
    "ernie4_5-moe": Architecture(
        "ernie4_5_moe",
        _RMS
        | {
            "expert_count": "moe_num_experts",
            "expert_used_count": "moe_k",
            "expert_shared_count": "moe_num_shared_experts",
            "expert_feed_forward_length": "moe_intermediate_size",
            "interleave_moe_layer_step": "moe_layer_interval",
            "leading_dense_block_count": "moe_layer_start_index",
        },
        flags={"use_bias": "blk.0.attn_q.bias"},
        neutral={"expert_shared_feed_forward_length": ANY},
    ),
    "dots1": Architecture("dots1", _RMS | _ROUTED, _ROUTED_OPTIONS, flags=_ATTENTION_BIAS, neutral=_SIGMOID),
    "glm4moe": Architecture(
        "glm4_moe",
        _RMS | _ROUTED,
        _ROUTED_OPTIONS,
        flags=_ATTENTION_BIAS | {"use_qk_norm": "blk.0.attn_q_norm.weight"},
        partial=True,
        neutral=_SIGMOID,
    ),
    "minimax-m2": Architecture(
        "minimax_m2", _RMS | _LOCAL_EXPERTS, partial=True, neutral=_SIGMOID | {"expert_feed_forward_length": ANY}
    ),
    "chatglm": Architecture("glm", flags=_ATTENTION_BIAS, partial=True),
    "jais2": Architecture(
        "jais2",
        _layer_norm("layer_norm_eps"),
        flags=_ATTENTION_BIAS | {"mlp_bias": "blk.0.ffn_up.bias"},
    ),
    "apertus": Architecture(
        "apertus",
        flags=_ATTENTION_BIAS,
        by_layer={f"xielu.{name}": f".act_fn.{name}" for name in ("alpha_p", "alpha_n", "beta", "eps")},
    ),
    "minicpm": Architecture(
        "granite",
        _RMS
        | {
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
        permuted=True,
    ),
    "minicpm3": Architecture(
        "minicpm3",
        _RMS | {"attention.kv_lora_rank": "kv_lora_rank", "attention.q_lora_rank": "q_lora_rank"},
        config={"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256},
        latent=True,
    ),
    "mistral3": dataclasses.replace(
        _LLAMA,
        yarn={"attention_factor": 1.0},
        variants=(
            (
                "attention.temperature_scale",
                Architecture(
                    "ministral3",
                    permuted=True,
                    rotary={"attention.temperature_scale": "llama_4_scaling_beta"},
                    yarn={"attention_factor": 1.0},
                    neutral={"rope.scaling.yarn_log_multiplier": ANY},
                ),
            ),
        ),
    ),
    "gpt-oss": Architecture(
        "gpt_oss",
        _RMS | _LOCAL_EXPERTS,
        period=2,
        by_input=True,
        yarn={"truncate": False},
        neutral={"expert_feed_forward_length": ANY},
    ),
    "hunyuan-dense": Architecture("hunyuan_v1_dense", flags=_ATTENTION_BIAS),
}

HANDLED_KEYS = frozenset(
    {
        "attention.head_count_kv",
        "attention.key_length",
        "attention.sliding_window",
        "attention.sliding_window_pattern",
        "attention.value_length",
        "feed_forward_length",
        "nextn_predict_layers",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.freq_base_swa",
        "rope.scale_linear",
        "rope.scaling.attn_factor",
        "rope.scaling.factor",
        "rope.scaling.finetuned",
        "rope.scaling.original_context_length",
        "rope.scaling.type",
        "rope.scaling.yarn_attn_factor",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
        "rope.scaling.yarn_ext_factor",
    }
)
"""Keys that are combined into config fields."""

SILENT_KEYS = frozenset(
    {
        "attention.layer_norm_epsilon",
        "attention.layer_norm_rms_epsilon",
        "tensor_data_layout",
        "use_parallel_residual",
        "vocab_size",
    }
)
"""Keys that repeat what the tensors show, or have no effect in any runtime; a norm reads one epsilon of the two."""

NEUTRAL_KEYS: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_gating_func": (0, 1),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_weights_scale": (0.0, 1.0),
    "pooling_type": (0,),
}
"""Keys of other architectures, with the values that change nothing."""
