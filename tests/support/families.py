"""Tiny seeded random models of the families that satchel is tested on, and what makes each family special."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from support.hybrid_families import HYBRIDS, is_known
from support.lost_features import (
    Model,
    sequential,
    skipping,
    stateless,
    uncentered,
    unrotated,
    unscaled_embeddings,
    without_distance,
    without_sinks,
    zeroing,
    zeroing_positions,
)

TOLERANCE = 1e-4
"""Largest allowed difference between logits, as a part of the largest logit."""

VOCABULARY, HEAD_DIM, WINDOW = 97, 16, 7
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip

QUICK = {
    "llama", "gemma2", "cohere", "gpt2", "phi3_long", "granite", "smollm3", "stablelm", "qwen3_moe",
    "qwen3_5_text", "lfm2",
}  # fmt: skip
"""Families that together have each kind of norm, rotation, attention and layer; the others are slow tests."""

Without = Mapping[str, Any] | Callable[[Model], None]
"""How to take a feature away from a reference model: other options for its config, or a change to the built model."""


@dataclasses.dataclass(frozen=True)
class Family:
    """A tiny model of one family.

    Attributes:
        model_type: As in config.json.
        options: Of the config, over those of `COMMON`.
        features: What is special, and how the reference loses it.
        reference: Further options of the reference model only.
        context: The largest context of the bundle, in positions.
        seed: Of the weights; the smallest with which 32 greedy tokens are a test: 8 different ones, and no near-tie.
        deviation: Standard deviation of the weights; norms lie around 1 with it, biases around 0.
    """

    model_type: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    features: Mapping[str, Without] = dataclasses.field(default_factory=dict)
    reference: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    context: int = 64
    seed: int = 0
    deviation: float = 0.2


def by_family(cases: Iterable[Any], quick: Callable[[Any], bool] = QUICK.__contains__) -> list[Any]:
    """Parameters of a test, marked as slow where `quick` is false; names of families as they are, or in tuples."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=() if quick(case) else pytest.mark.slow)
        for case in cases
    ]


def config_of(family: Family, **changes: Any) -> transformers.PreTrainedConfig:
    """The family's config with further changes."""
    return transformers.AutoConfig.for_model(family.model_type, **{**COMMON, **family.options, **changes})


def build(family: Family, seed: int | None = None) -> Model:
    """The model with weights drawn so wide that logits depend on all tokens before."""
    torch.manual_seed(family.seed if seed is None else seed)
    model = _empty(family)
    one = 0.0 if family.model_type.startswith("gemma") else 1.0  # Gemma's norms scale by 1 + weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = one if _is_norm(name) and name.endswith("weight") else 0.0
            parameter.copy_(center + family.deviation * torch.randn_like(parameter))
    return model


def reference(family: Family, weights: Mapping[str, torch.Tensor], without: str | None = None) -> Model:
    """transformers' own float32 model with these weights, whole or without one of the family's features."""
    change = family.features[without] if without is not None else {}
    model = _empty(family, **{**family.reference, **(change if isinstance(change, Mapping) else {})})
    missing, _ = model.load_state_dict(weights, strict=False)
    tied = set(model.all_tied_weights_keys)
    if set(missing) - tied:
        raise ValueError(f"the reference has no values for {missing}")
    if not isinstance(change, Mapping):
        change(model)
    return model


def logits_of(model: Model, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits of all positions, [sequence, vocabulary] float32, without a cache."""
    tokens = torch.from_numpy(ids)[None]
    with torch.no_grad():
        logits = model(input_ids=tokens, position_ids=torch.arange(len(ids))[None], use_cache=False).logits
    found: NDArray[np.float32] = logits[0].float().numpy()
    return found


def greedy(model: Model, prompt: NDArray[np.int64], count: int) -> list[int]:
    """transformers' own greedy continuation, with its cache."""
    tokens = torch.from_numpy(prompt)[None]
    generated = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, do_sample=False, use_cache=True,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return [int(token) for token in generated[0, len(prompt) :]]


def save(family: Family, folder: Path) -> Path:
    """Write the model as a checkpoint folder."""
    build(family).save_pretrained(folder)
    return folder


def _empty(family: Family, **changes: Any) -> Model:
    build_from: Any = transformers.AutoModelForCausalLM.from_config  # untyped in transformers
    # The eager attention of Falcon adds its bias for distance twice.
    attention = "sdpa" if family.model_type == "falcon" else "eager"
    model: Model = build_from(config_of(family, **changes), dtype=torch.float32, attn_implementation=attention)
    return model.train(False)


def _is_norm(name: str) -> bool:
    return "norm" in name or ".ln_" in name


PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
SHORT, LONG = [1.0 + 0.1 * i for i in range(8)], [2.0 + i for i in range(8)]
ALTERNATING = ["sliding_attention", "full_attention"]
ALWAYS_FULL = ["full_attention", "full_attention"]
BIASES = zeroing(".bias")
STATE = "the states of convolutions and recurrences"
HEAD_NORMS = skipping("q_norm", "k_norm")
POST_NORMS = skipping("post_attention_layernorm", "post_feedforward_layernorm")


def _longrope(short: list[float], long: list[float], border: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": short, "long_factor": long,
        "original_max_position_embeddings": border,
    }  # fmt: skip


def _phi3(chosen: list[float], other: list[float], context: int, border: int, seed: int = 0) -> Family:
    """The reference has the chosen factors for both lengths: transformers would choose by the length of each call."""
    return Family(
        "phi3",
        {
            "pad_token_id": 0, "original_max_position_embeddings": border,
            "rope_parameters": _longrope(SHORT, LONG, border),
        },
        {
            "the chosen factors": {"rope_parameters": _longrope(other, other, border)},
            "rope scaling": {"rope_parameters": PLAIN_ROPE},
        },
        {"rope_parameters": _longrope(chosen, chosen, border)},
        context=context,
        seed=seed,
    )  # fmt: skip


def _rope(part: float) -> dict[str, Any]:
    return {**PLAIN_ROPE, "partial_rotary_factor": part}


LATENT = {
    "kv_lora_rank": 24, "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 24,
    "num_key_value_heads": 4,
}  # fmt: skip
"""Latent attention with keys of 32 channels and values of 24."""
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 1}
EYES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
EARS = {
    "hidden_size": 32, "intermediate_size": 48, "num_blocks": 1, "num_attention_heads": 2, "nemo_conv_channels": 32,
    "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32,
}  # fmt: skip
"""The parts of a model of images and sound that a bundle leaves out; 870 million weights if nothing is said."""
SECOND_EXPERT = {"the second expert": {"num_experts_per_tok": 1}}

FAMILIES: dict[str, Family] = {
    "llama": Family("llama", {"head_dim": HEAD_DIM}, {"rotation": unrotated}, seed=2),
    "llama_llama3_rope": Family(
        "llama", {"head_dim": HEAD_DIM, "rope_parameters": LLAMA3}, {"rope scaling": {"rope_parameters": PLAIN_ROPE}}
    ),
    "mistral": Family(
        "mistral", {"head_dim": HEAD_DIM, "sliding_window": WINDOW}, {"window": {"sliding_window": None}}
    ),
    "qwen2": Family("qwen2", {}, {"biases": BIASES}),
    "qwen3": Family("qwen3", {"head_dim": HEAD_DIM}, {"norms of queries and keys": HEAD_NORMS}, seed=1),
    "gemma2": Family(
        "gemma2",
        {
            "head_dim": HEAD_DIM, "query_pre_attn_scalar": 5, "sliding_window": WINDOW, "layer_types": ALTERNATING,
            "attn_logit_softcapping": 5.0, "final_logit_softcapping": 9.0, "tie_word_embeddings": False,
        },
        {
            "window": {"layer_types": ALWAYS_FULL},
            "window in one layer only": {"layer_types": ["sliding_attention"] * 2},
            "soft-capped scores": {"attn_logit_softcapping": None},
            "soft-capped logits": {"final_logit_softcapping": None},
            "scale of the scores": {"query_pre_attn_scalar": HEAD_DIM},
            "scaled embeddings": unscaled_embeddings,
            "GeGLU": {"hidden_activation": "silu"},
            "norms after attention and feed-forward": POST_NORMS,
        },
        seed=2,
    ),
    "gemma3_text": Family(
        "gemma3_text",
        {
            "head_dim": HEAD_DIM, "query_pre_attn_scalar": 5, "sliding_window": WINDOW, "layer_types": ALTERNATING,
            "final_logit_softcapping": 9.0, "tie_word_embeddings": False,
        },
        {
            "window": {"layer_types": ALWAYS_FULL},
            "soft-capped logits": {"final_logit_softcapping": None},
            "norms of queries and keys": HEAD_NORMS,
            "scaled embeddings": unscaled_embeddings,
            "GeGLU": {"hidden_activation": "silu"},
            "a rotation for each kind of layer": {
                "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e6} for kind in ALTERNATING}
            },
        },
    ),
    "phi3_short": _phi3(SHORT, LONG, context=64, border=64),
    "phi3_long": _phi3(LONG, SHORT, context=96, border=2, seed=1),
    "smollm3": Family(
        "smollm3",
        {"no_rope_layers": [1, 0], "pad_token_id": 0},
        {"the layer without rotation": {"no_rope_layers": [1, 1]}, "rotation": {"no_rope_layers": [0, 0]}},
    ),
    "olmo2": Family(
        "olmo2",
        {},
        {
            "norms of queries and keys": HEAD_NORMS,
            "norms after attention and feed-forward": POST_NORMS,
        },
        seed=1,
    ),
    "granite": Family(
        "granite",
        {"embedding_multiplier": 3.0, "attention_multiplier": 0.6, "residual_multiplier": 0.5, "logits_scaling": 2.0},
        {
            "scaled embeddings": {"embedding_multiplier": 1.0},
            "scale of the scores": {"attention_multiplier": HEAD_DIM**-0.5},
            "scaled residuals": {"residual_multiplier": 1.0},
            "scaled logits": {"logits_scaling": 1.0},
        },
    ),
    "cohere": Family(
        "cohere",
        {"logit_scale": 0.25, "use_qk_norm": True, "pad_token_id": 0},
        {
            "feed-forward beside attention": sequential,
            "centered norms": uncentered,
            "norms of queries and keys": {"use_qk_norm": False},
            "scaled logits": {"logit_scale": 1.0},
            "rotation": unrotated,
        },
    ),
    "gpt2": Family("gpt2", {}, {"learned positions": zeroing("wpe.weight"), "biases": BIASES}),
    "gpt_neox": Family(
        "gpt_neox",
        {"num_attention_heads": 2, "rope_parameters": _rope(0.5)},
        {
            "rotation of half the channels": {"rope_parameters": _rope(1.0)},
            "feed-forward beside attention": {"use_parallel_residual": False},
            "biases": BIASES,
        },
        seed=6,
    ),
    "starcoder2": Family(
        "starcoder2", {"sliding_window": WINDOW}, {"window": {"sliding_window": None}, "biases": BIASES}
    ),
    "stablelm": Family(
        "stablelm",
        {"rope_parameters": _rope(0.5), "use_qkv_bias": True, "qk_layernorm": True},
        {
            "rotation of half the channels": {"rope_parameters": _rope(1.0)},
            "norms of queries and keys": {"qk_layernorm": False},
            "biases": zeroing("_proj.bias"),
        },
    ),
    "stablelm_wide": Family(
        "stablelm",
        {"num_attention_heads": 2, "rope_parameters": _rope(0.5), "use_parallel_residual": True},
        {"rotation of half the channels": {"rope_parameters": _rope(1.0)}},
        seed=1,
    ),
    "mixtral": Family(
        "mixtral",
        {"head_dim": HEAD_DIM, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
        {"window": {"sliding_window": None}, "the second expert": {"num_experts_per_tok": 1}},
    ),
    "qwen3_moe": Family(
        "qwen3_moe",
        {"head_dim": HEAD_DIM, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        {
            "the second expert": {"num_experts_per_tok": 1},
            "expert weights that do not sum to 1": {"norm_topk_prob": True},
            "norms of queries and keys": HEAD_NORMS,
        },
    ),
    "deepseek_v2": Family(
        "deepseek_v2",
        {**LATENT, **ROUTED, "first_k_dense_replace": 1, "topk_method": "greedy"},
        {**SECOND_EXPERT},
    ),
    "deepseek_v3": Family(
        "deepseek_v3",
        {**LATENT, **ROUTED, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
        {"rotation": unrotated, **SECOND_EXPERT, "groups of experts": {"topk_group": 2}},
    ),
    "glm4_moe_lite": Family(
        "glm4_moe_lite", {**LATENT, **ROUTED, "mlp_layer_types": ["dense", "sparse"]}, {"rotation": unrotated}
    ),
    "minicpm3": Family("minicpm3", {**LATENT, "scale_emb": 1.0, "dim_model_base": 64}, {"rotation": unrotated}, seed=3),
    "youtu": Family("youtu", LATENT, {"rotation": unrotated}, seed=1),
    "gpt_oss": Family(
        "gpt_oss",
        {
            "head_dim": HEAD_DIM, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW,
            "layer_types": ALTERNATING, "rope_parameters": PLAIN_ROPE, "swiglu_limit": 1.0,
        },
        {
            "sinks": without_sinks,
            "window": {"layer_types": ALWAYS_FULL},
            "biases of the experts": zeroing("proj_bias"),
            "clipped gates": {"swiglu_limit": 1000.0},
            **SECOND_EXPERT,
        },
    ),
    "granite_swa": Family(
        "granite_swa", {"sliding_window": WINDOW}, {"sinks": without_sinks, "window": {"sliding_window": 128}}
    ),
    "granitemoe_swa": Family(
        "granitemoe_swa",
        {"sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
        {"sinks": without_sinks, **SECOND_EXPERT},
    ),
    "granitemoehybrid": Family(
        "granitemoehybrid",
        {
            "layer_types": ["attention"] * 2, "num_local_experts": 4, "num_experts_per_tok": 2,
            "shared_intermediate_size": 48,
        },
        SECOND_EXPERT,
        seed=1,
    ),
    "llama4_text": Family(
        "llama4_text",
        {
            "head_dim": HEAD_DIM, "attention_chunk_size": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 1,
            "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2, "pad_token_id": 0,
            "layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0],
        },
        {"chunks": {"attention_chunk_size": 128}, "the layer without rotation": {"no_rope_layers": [1, 1]}},
        seed=2,
    ),
    "gemma4_text": Family(
        "gemma4_text",
        {
            "head_dim": HEAD_DIM, "global_head_dim": 2 * HEAD_DIM, "num_hidden_layers": 4, "num_kv_shared_layers": 2,
            "layer_types": 2 * ALTERNATING, "sliding_window": WINDOW, "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8, "attention_k_eq_v": True, "num_global_key_value_heads": 1,
        },
        {"window": {"sliding_window": 128}},
        seed=14,
    ),
    "gemma3n_text": Family(
        "gemma3n_text",
        {
            "head_dim": HEAD_DIM, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": 2 * ALTERNATING,
            "sliding_window": WINDOW, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8,
            "laurel_rank": 8, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        },
        {"window": {"sliding_window": 128}, "sparse activations": {"activation_sparsity_pattern": [0.0] * 4}},
    ),
    "bloom": Family(
        "bloom", {"num_attention_heads": 6, "hidden_size": 96}, {"bias for distance": without_distance}, seed=40
    ),
    "mpt": Family("mpt", {"max_seq_len": 128}, {"bias for distance": without_distance}, seed=3),
    "mpt_clipped": Family(
        "mpt",
        {"max_seq_len": 128, "attn_config": {"clip_qkv": 0.5, "softmax_scale": 0.4, "alibi_bias_max": 8}},
        {"clipped queries, keys and values": {"attn_config": {"softmax_scale": 0.4}}},
        seed=5,
    ),
    "falcon": Family("falcon", {}, {"rotation": unrotated}, seed=1),
    "falcon_groups": Family(
        "falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}, {"biases": BIASES}
    ),
    "falcon_alibi": Family(
        "falcon", {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
        {"bias for distance": {"alibi": False}}, seed=3,
    ),
    "gptj": Family("gptj", {"rotary_dim": 8, "n_positions": 128}, {"rotation": zeroing_positions}),
    "codegen": Family("codegen", {"rotary_dim": 8, "n_ctx": 128, "n_positions": 128}, {"rotation": zeroing_positions}),
    "gpt_neo": Family(
        "gpt_neo", {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
        {"window": {"window_size": 128}, "learned positions": zeroing("wpe.weight")},
    ),
    "gpt-sw3": Family("gpt-sw3", {}, {"learned positions": zeroing("wpe.weight")}),
    "cwm": Family(
        "cwm",
        {
            "head_dim": HEAD_DIM, "sliding_window": WINDOW, "layer_types": ALTERNATING, "rope_parameters": LLAMA3,
            "bos_token_id": 1, "eos_token_id": 2,
        },
        {"window": {"layer_types": ALWAYS_FULL}},
        seed=1,
    ),
    "gemma4_unified_text": Family(
        "gemma4_unified_text",
        {
            "head_dim": HEAD_DIM, "layer_types": ALTERNATING, "sliding_window": WINDOW, "tie_word_embeddings": False,
        },
        {"window": {"sliding_window": 128}},
        seed=2,
    ),
    "phi4_multimodal": Family(
        "phi4_multimodal", {"pad_token_id": 0, "vision_config": EYES, "audio_config": EARS}, {"rotation": unrotated},
        seed=2,
    ),
    "falcon_alibi_one_key": Family("falcon", {"alibi": True}, {"bias for distance": {"alibi": False}}, seed=4),
    "exaone": Family("exaone", {"head_dim": HEAD_DIM, "pad_token_id": 0}, {"rotation": unrotated}, seed=2),
    "sarvam_mla": Family(
        "sarvam_mla", {**LATENT, **ROUTED, "first_k_dense_replace": 1}, {"rotation": unrotated, **SECOND_EXPERT}
    ),
    "sarvam_moe": Family(
        "sarvam_moe", {**ROUTED, "head_dim": HEAD_DIM, "first_k_dense_replace": 1, "use_qk_norm": True},
        {"rotation of all channels": {"partial_rotary_factor": 0.5}, "norms of queries and keys": HEAD_NORMS},
    ),
    "apertus1p5_text": Family("apertus1p5_text", {}, {"rotation": unrotated}),
    "aria_text": Family(
        "aria_text", {"head_dim": HEAD_DIM, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
        {"rotation": unrotated, "the second expert": {"moe_topk": 1}},
    ),
    "cohere_compass_text": Family(
        "cohere_compass_text",
        {
            "layer_types": ALTERNATING, "sliding_window": WINDOW, "logit_scale": 0.5, "tie_word_embeddings": False,
            "rope_parameters": {"sliding_attention": PLAIN_ROPE, "full_attention": None}, "pad_token_id": 0,
        },
        {"window": {"sliding_window": 128}, "scale of the logits": {"logit_scale": 1.0}},
        seed=2,
    ),
}  # fmt: skip
FAMILIES |= {
    name: Family(model_type, options, {STATE: stateless}, seed=seed, deviation=deviation)
    for name, (model_type, options, seed, deviation) in HYBRIDS.items()
}
FAMILIES = {name: family for name, family in FAMILIES.items() if is_known(family.model_type)}
