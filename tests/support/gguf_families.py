"""Tiny seeded models of every GGUF architecture, and their files as llama.cpp's own converter would write them.

Keys and layouts are written down here from llama.cpp's conversion/ folder, independently of what reads them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from support.checkpoints import GGUF_ARCHITECTURES, write_gguf
from support.families import COMMON, HEAD_DIM, LLAMA3, LONG, PLAIN_ROPE, SHORT, VOCABULARY, WINDOW

from satchel.export.checkpoint import Checkpoint

RMS, LAYER_NORM = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
FULL, SLIDING = "full_attention", "sliding_attention"
HEADS: dict[str, Any] = {"head_dim": HEAD_DIM}
HEAD_KEYS = {"attention.key_length": HEAD_DIM, "attention.value_length": HEAD_DIM}
ROTATED = {"rope.dimension_count": HEAD_DIM}
HALF = {"rope.dimension_count": HEAD_DIM // 2}
HALF_ROPE = {"rope_parameters": {**PLAIN_ROPE, "partial_rotary_factor": 0.5}}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SHARED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1}
TWO_OF_FOUR = {"expert_count": 4, "expert_used_count": 2}
WIDTH = {"expert_feed_forward_length": 24}
LEADING = {"leading_dense_block_count": 1, "expert_shared_count": 1, "expert_weights_scale": 1.0}
MULTIPLIERS = {
    "embedding_multiplier": 3.0, "attention_multiplier": 0.6, "residual_multiplier": 0.5, "logits_scaling": 2.0
}  # fmt: skip
SCALES = {"attention.scale": 0.6, "embedding_scale": 3.0, "residual_scale": 0.5, "logit_scale": 2.0}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": SHORT, "long_factor": LONG,
    "original_max_position_embeddings": 64,
}  # fmt: skip

XIELU = {"alpha_p": [0.4, 0.6], "alpha_n": [-0.9, 0.3], "beta": [0.5, 0.4], "eps": [-1e-6, -1e-6]}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
YARN_KEYS = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16}
LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8}
LATENT_KEYS = {"attention.kv_lora_rank": 16, "attention.key_length": 20, "rope.dimension_count": 8}


@dataclasses.dataclass(frozen=True)
class GgufFamily:
    """A tiny model, and how its file differs from that of another family.

    Attributes:
        architecture: Its name in GGUF.
        model_type: Its name in transformers.
        options: Of the config, over those of `COMMON`.
        facts: Metadata beyond the sizes, without the architecture's prefix; None removes a key.
        epsilon: The key and the config field of the norms' epsilon.
        permuted: Whether rows of queries and keys are stored as interleaved pairs.
        one_more: Whether norm weights are stored with 1 added.
        tensors: Tensors that are in the file besides the model's.
    """

    architecture: str
    model_type: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    epsilon: tuple[str, str] = (RMS, "rms_norm_eps")
    permuted: bool = False
    one_more: bool = False
    tensors: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _norm(name: str) -> tuple[str, str]:
    return LAYER_NORM, name


def _llama3_factors() -> list[float]:
    """The factors of `LLAMA3` for each frequency, as the converter computes them."""
    low, high, factor, original = (
        LLAMA3[key] for key in ("low_freq_factor", "high_freq_factor", "factor", "original_max_position_embeddings")
    )
    found = []
    for exponent in range(0, HEAD_DIM, 2):
        length = 2 * np.pi * LLAMA3["rope_theta"] ** (exponent / HEAD_DIM)
        smooth = (original / length - low) / (high - low)
        between = 1 / ((1 - smooth) / factor + smooth)
        found.append(1.0 if length < original / high else factor if length > original / low else between)
    return found


GGUF_FAMILIES: dict[str, GgufFamily] = {
    "llama": GgufFamily("llama", "llama", HEADS, HEAD_KEYS | ROTATED, permuted=True),
    "llama-biases": GgufFamily("llama", "llama", {"attention_bias": True, "mlp_bias": True}, ROTATED, permuted=True),
    "mixtral": GgufFamily(
        "llama", "mixtral", {**LOCAL, "sliding_window": None}, TWO_OF_FOUR | {"rope.freq_base": 1e6}, permuted=True
    ),
    "internlm2": GgufFamily("internlm2", "llama", HEADS, permuted=True),
    "exaone": GgufFamily("exaone", "llama", HEADS),
    "qwen2": GgufFamily("qwen2", "qwen2"),
    "qwen3": GgufFamily("qwen3", "qwen3", HEADS, HEAD_KEYS),
    "qwen2moe": GgufFamily(
        "qwen2moe", "qwen2_moe", {**ROUTED, "shared_expert_intermediate_size": 40},
        TWO_OF_FOUR | WIDTH | {"expert_shared_feed_forward_length": 40},
    ),
    "qwen3moe": GgufFamily("qwen3moe", "qwen3_moe", {**ROUTED, **HEADS, "norm_topk_prob": True}, TWO_OF_FOUR | WIDTH),
    "gemma": GgufFamily("gemma", "gemma", HEADS, HEAD_KEYS, one_more=True),
    "gemma2": GgufFamily(
        "gemma2", "gemma2", {**HEADS, "query_pre_attn_scalar": HEAD_DIM, "sliding_window": WINDOW},
        HEAD_KEYS
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "attention.sliding_window": WINDOW},
        one_more=True,
    ),
    "gemma3": GgufFamily(
        "gemma3", "gemma3_text",
        {**HEADS, "query_pre_attn_scalar": HEAD_DIM, "sliding_window": WINDOW, "num_hidden_layers": 7},
        HEAD_KEYS | {"attention.sliding_window": WINDOW, "rope.freq_base": 1e6, "rope.freq_base_swa": 1e4},
        one_more=True,
    ),
    "phi2": GgufFamily(
        "phi2", "phi", {**HALF_ROPE, "num_key_value_heads": 4}, HALF, _norm("layer_norm_eps")
    ),
    "phi3": GgufFamily(
        "phi3", "phi3", {"rope_parameters": PLAIN_ROPE, "sliding_window": WINDOW},
        ROTATED | {"attention.sliding_window": WINDOW, "rope.scaling.original_context_length": 128},
    ),
    "phi3-long": GgufFamily(
        "phi3", "phi3", {"original_max_position_embeddings": 64, "rope_parameters": LONGROPE, "sliding_window": None},
        ROTATED | {
            "attention.sliding_window": 0, "rope.scaling.original_context_length": 64,
            "rope.scaling.attn_factor": math.sqrt(1 + math.log(128 / 64) / math.log(64)),
        },
        tensors={"rope_factors_long.weight": LONG, "rope_factors_short.weight": SHORT},
    ),
    "phimoe": GgufFamily(
        "phimoe", "phimoe",
        {**LOCAL, "rope_parameters": PLAIN_ROPE, "attention_bias": True, "lm_head_bias": True},
        TWO_OF_FOUR | ROTATED | {"attention.sliding_window": 0},
    ),
    "starcoder2": GgufFamily("starcoder2", "starcoder2", {"sliding_window": None}, epsilon=_norm("norm_epsilon")),
    "starcoder": GgufFamily(
        "starcoder", "gpt_bigcode", {"multi_query": True, "n_inner": 48}, {"attention.head_count_kv": 1},
        _norm("layer_norm_epsilon"),
    ),
    "gpt2": GgufFamily(
        "gpt2", "gpt2", {"n_inner": 48}, {"attention.head_count_kv": None}, _norm("layer_norm_epsilon")
    ),
    "gptneox": GgufFamily(
        "gptneox", "gpt_neox", HALF_ROPE, HALF | {"attention.head_count_kv": None, "use_parallel_residual": True},
        _norm("layer_norm_eps"),
    ),
    "stablelm": GgufFamily(
        "stablelm", "stablelm", {**HALF_ROPE, "use_qkv_bias": True, "qk_layernorm": True},
        HALF | {"use_parallel_residual": False}, _norm("layer_norm_eps"),
    ),
    "stablelm-parallel": GgufFamily(
        "stablelm", "stablelm", {**HALF_ROPE, "use_parallel_residual": True}, HALF | {"use_parallel_residual": True},
        _norm("layer_norm_eps"),
    ),
    "granite": GgufFamily("granite", "granite", MULTIPLIERS, SCALES | ROTATED, permuted=True),
    "granitemoe": GgufFamily(
        "granitemoe", "granitemoe", {**MULTIPLIERS, **LOCAL}, SCALES | TWO_OF_FOUR, permuted=True
    ),
    "granitemoe-shared": GgufFamily(
        "granitemoe", "granitemoeshared", {**MULTIPLIERS, **LOCAL, "shared_intermediate_size": 40},
        SCALES | TWO_OF_FOUR | {"expert_shared_feed_forward_length": 40}, permuted=True,
    ),
    "olmo": GgufFamily(
        "olmo", "olmo", {"clip_qkv": 1.0}, {"attention.clamp_kqv": 1.0}, _norm("layer_norm_eps"), permuted=True
    ),
    "olmo2": GgufFamily("olmo2", "olmo2", facts={"rope.freq_base": 500000.0}, options={
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}
    }),
    "olmo3": GgufFamily(
        "olmo2", "olmo3",
        {"sliding_window": WINDOW, "num_hidden_layers": 4, "layer_types": [SLIDING, SLIDING, FULL, SLIDING]},
        {
            "attention.sliding_window": WINDOW, "rope.freq_base": 500000.0,
            "attention.sliding_window_pattern": [True, True, False, True],
        },
    ),
    "olmoe": GgufFamily("olmoe", "olmoe", {"num_experts": 4, "num_experts_per_tok": 2}, TWO_OF_FOUR),
    "command-r": GgufFamily(
        "command-r", "cohere", {"logit_scale": 0.25, "use_qk_norm": True},
        {"logit_scale": 0.25, "rope.freq_base": 500000.0, "rope.scaling.type": "none"}, _norm("layer_norm_eps"),
    ),
    "cohere2": GgufFamily(
        "cohere2", "cohere2", {"logit_scale": 0.25, "sliding_window": WINDOW, "num_hidden_layers": 4},
        ROTATED | {"logit_scale": 0.25, "attention.sliding_window": WINDOW}, _norm("layer_norm_eps"),
    ),
    "glm4": GgufFamily("glm4", "glm4", {**HEADS, **HALF_ROPE, "attention_bias": True}, HEAD_KEYS | HALF),
    "chatglm": GgufFamily("chatglm", "glm", {**HEADS, **HALF_ROPE, "attention_bias": True}, HALF),
    "exaone4": GgufFamily(
        "exaone4", "exaone4",
        {"sliding_window": WINDOW, "num_hidden_layers": 4, "layer_types": [SLIDING] * 3 + [FULL]},
        {"attention.sliding_window": WINDOW, "attention.sliding_window_pattern": 4},
    ),
    "smollm3": GgufFamily("smollm3", "smollm3", {"num_hidden_layers": 4}, {"rope.freq_base": 2e6}, permuted=True),
    "nemotron": GgufFamily("nemotron", "nemotron", HALF_ROPE, HALF | {RMS: 1e-5}, _norm("norm_eps"), one_more=True),
    "arcee": GgufFamily("arcee", "arcee", permuted=True),
    "ernie4_5": GgufFamily("ernie4_5", "ernie4_5", HEADS, HEAD_KEYS | {"rope.freq_base": 500000.0}),
    "ernie4_5-moe": GgufFamily(
        "ernie4_5-moe", "ernie4_5_moe",
        {
            "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_layer_start_index": 1,
            "moe_layer_end_index": 1,
        },
        TWO_OF_FOUR | WIDTH | {
            "rope.freq_base": 500000.0, "expert_shared_count": 2, "expert_shared_feed_forward_length": 24,
            "interleave_moe_layer_step": 1, "leading_dense_block_count": 1,
        },
    ),
    "seed_oss": GgufFamily("seed_oss", "seed_oss", HEADS, HEAD_KEYS),
    "dots1": GgufFamily(
        "dots1", "dots1", {**SHARED, "n_shared_experts": 1},
        TWO_OF_FOUR | WIDTH | LEADING | {"expert_weights_norm": False, "expert_gating_func": 2},
    ),
    "glm4moe": GgufFamily(
        "glm4moe", "glm4_moe", {**HEADS, **SHARED, **HALF_ROPE},
        HEAD_KEYS | HALF | TWO_OF_FOUR | WIDTH | LEADING
        | {"expert_weights_norm": True, "expert_gating_func": 2, "nextn_predict_layers": 1, "block_count": 3},
        tensors={"blk.2.nextn.eh_proj.weight": [[0.0] * 128] * 64},
    ),
    "minimax-m2": GgufFamily(
        "minimax-m2", "minimax_m2", {**HEADS, **LOCAL, **HALF_ROPE},
        HALF | TWO_OF_FOUR | {"expert_feed_forward_length": 48, "expert_gating_func": 2},
    ),
    "jais2": GgufFamily("jais2", "jais2", HEADS, HEAD_KEYS, _norm("layer_norm_eps")),
    "hunyuan-dense": GgufFamily("hunyuan-dense", "hunyuan_v1_dense", HEADS, HEAD_KEYS),
    "apertus": GgufFamily(
        "apertus", "apertus", {"rope_parameters": PLAIN_ROPE}, ROTATED
        | {f"xielu.{name}": values for name, values in XIELU.items()},
    ),
    "minicpm": GgufFamily(
        "minicpm", "granite", MULTIPLIERS | {"attention_multiplier": HEAD_DIM**-0.5},
        {"embedding_scale": 3.0, "residual_scale": 0.5, "logit_scale": 2.0} | ROTATED, permuted=True,
    ),
    "minicpm3": GgufFamily(
        "minicpm3", "minicpm3", {**LATENT, "q_lora_rank": 24, "num_key_value_heads": 4, "rope_parameters": PLAIN_ROPE},
        LATENT_KEYS | {"attention.q_lora_rank": 24},
    ),
    "mistral3": GgufFamily("mistral3", "llama", HEADS, HEAD_KEYS | ROTATED, permuted=True),
    "ministral3": GgufFamily(
        "mistral3", "ministral3",
        {**HEADS, "rope_parameters": {
            **YARN, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1, "max_position_embeddings": 128,
        }},
        HEAD_KEYS | ROTATED | YARN_KEYS
        | {"rope.scaling.yarn_log_multiplier": 1.0, "attention.temperature_scale": 0.1},
        permuted=True,
    ),
    "gpt-oss": GgufFamily(
        "gpt-oss", "gpt_oss",
        {**HEADS, **LOCAL, "sliding_window": WINDOW, "rope_parameters": {**YARN, "truncate": False}},
        HEAD_KEYS | TWO_OF_FOUR | YARN_KEYS | {"expert_feed_forward_length": 48, "attention.sliding_window": WINDOW},
    ),
    "llama-3.1": GgufFamily(
        "llama", "llama", {"rope_parameters": LLAMA3}, permuted=True,
        tensors={"rope_freqs.weight": _llama3_factors()},
    ),
}  # fmt: skip


def gguf_model(family: GgufFamily) -> transformers.PreTrainedModel:
    """The model with weights drawn so wide that logits depend on all tokens before."""
    config = transformers.AutoConfig.for_model(family.model_type, **{**COMMON, **family.options})
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    one = 0.0 if family.one_more else 1.0
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            if ".act_fn." in name:
                layer, part = name.split(".")[2], name.rpartition(".")[2]
                parameter.fill_(XIELU[part][int(layer)])
                continue
            if "rotary" in name or "scale" in name.rpartition(".")[2] or not parameter.is_floating_point():
                continue
            center = one if ("norm" in name or ".ln_" in name) and name.endswith("weight") else 0.0
            parameter.copy_(center + 0.2 * torch.randn_like(parameter))
    return model.train(False)


def facts_of(family: GgufFamily, model: transformers.PreTrainedModel) -> dict[str, Any]:
    """The metadata of the file, without the architecture's prefix."""
    config: Any = model.config
    key, field = family.epsilon
    facts = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": COMMON["intermediate_size"],
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        key: getattr(config, field, 1e-5),
    }
    return {name: value for name, value in {**facts, **family.facts}.items() if value is not None}


def tensors_of(family: GgufFamily, model: transformers.PreTrainedModel) -> dict[str, NDArray[np.float32]]:
    """The model's tensors as the converter lays them out."""
    kind = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[family.architecture]
    names = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    tensors = {name: np.array(values, np.float32) for name, values in family.tensors.items()}
    stacked: dict[str, list[NDArray[np.float32]]] = {}
    tied = set(model.all_tied_weights_keys)
    for name, parameter in model.state_dict().items():
        if name in tied:
            continue
        array: NDArray[np.float32] = parameter.float().numpy()
        layer = next((part for part in name.split(".") if part.isdigit()), "")
        stem, _, suffix = name.rpartition(".")
        if family.architecture == "gpt-oss" and ".experts." in name:
            array, part = (array, "bias") if name.endswith("_bias") else (array.swapaxes(1, 2), "weight")
            stacks = {"gate": array[:, ::2], "up": array[:, 1::2]} if "gate_up" in name else {"down": array}
            tensors |= {f"blk.{layer}.ffn_{kind}_exps.{part}": stack for kind, stack in stacks.items()}
        elif ".act_fn." in name:
            continue
        elif name.endswith(".sinks"):
            tensors[f"blk.{layer}.attn_sinks.weight"] = array
        elif name.endswith("gate_up_proj") and array.ndim == 3:
            half = array.shape[1] // 2
            tensors[f"blk.{layer}.ffn_gate_exps.weight"] = array[:, :half]
            tensors[f"blk.{layer}.ffn_up_exps.weight"] = array[:, half:]
        elif name.endswith("experts.down_proj"):
            tensors[f"blk.{layer}.ffn_down_exps.weight"] = array
        elif name.endswith("shared_mlp.input_linear.weight"):
            half = len(array) // 2
            tensors[f"blk.{layer}.ffn_gate_shexp.weight"] = array[:half]
            tensors[f"blk.{layer}.ffn_up_shexp.weight"] = array[half:]
        elif name.endswith("shared_mlp.output_linear.weight"):
            tensors[f"blk.{layer}.ffn_down_shexp.weight"] = array
        elif name.endswith("e_score_correction_bias"):
            tensors[f"blk.{layer}.exp_probs_b.bias"] = array.reshape(-1)
        elif name.endswith(("block_sparse_moe.router.weight", "mlp.router.weight")):
            tensors[f"blk.{layer}.ffn_gate_inp.weight"] = array
        elif "_layernorm.norms." in name:
            stacked.setdefault(f"blk.{layer}.attn_{name.split('_layernorm')[0][-1]}_norm.weight", []).append(array)
        else:
            if family.permuted and stem.endswith(("q_proj", "k_proj")):
                array = _as_pairs(array, heads if stem.endswith("q_proj") else kv_heads)
            if family.one_more and name.endswith("norm.weight"):
                array = array + np.float32(1)
            if family.architecture == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
                array = array.T
            if family.architecture == "gptneox" and ".query_key_value." in name:
                array = array.reshape(heads, 3, -1, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)
            stored = "output" if stem == "lm_head" else names.get_name(stem)
            tensors[f"{stored}.{suffix}"] = array
    return tensors | {name: np.stack(arrays) for name, arrays in stacked.items()}


def to_gguf(family: str, model: transformers.PreTrainedModel) -> dict[str, NDArray[np.float32]]:
    """The same for a model of `tiny_model`."""
    name = GGUF_ARCHITECTURES[family]
    return tensors_of(GgufFamily(name, family, permuted=name == "llama", one_more="gemma" in name), model)


def write_family(path: Path, family: GgufFamily, model: transformers.PreTrainedModel, **more: Any) -> Path:
    """Write the file of a model; `more` are options of `write_gguf`, `facts` and `tensors` those that are different."""
    facts = {**facts_of(family, model), **more.pop("facts", {})}
    tensors = {**tensors_of(family, model), **more.pop("tensors", {})}
    facts, tensors = ({k: v for k, v in table.items() if v is not None} for table in (facts, tensors))
    return write_gguf(path, family.architecture, facts, tensors, **more)


def loaded(checkpoint: Checkpoint) -> Any:
    """The checkpoint's module with its weights."""
    module: Any = checkpoint.module
    state = {name: torch.from_numpy(np.array(weight.numpy())) for name, weight in checkpoint.weights.items()}
    module.load_state_dict(state, assign=True)
    return module


def fused(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Join queries, keys and values, and gates and ups of experts, as llama.cpp's converter can be asked to."""
    found = dict(tensors)
    for name in tensors:
        if name.endswith((".attn_q.weight", ".attn_q.bias")):
            parts = [found.pop(name.replace("attn_q.", f"attn_{part}.")) for part in "qkv"]
            found[name.replace("attn_q.", "attn_qkv.")] = np.concatenate(parts)
        if name.endswith(".ffn_gate_exps.weight"):
            parts = [found.pop(name.replace("ffn_gate_", f"ffn_{part}_")) for part in ("gate", "up")]
            found[name.replace("ffn_gate_", "ffn_gate_up_")] = np.concatenate(parts, 1)
    return found


def some_ids(count: int = 60) -> NDArray[np.int64]:
    """Random token ids, more than the window."""
    return np.random.default_rng(1).integers(3, VOCABULARY, count)


def _as_pairs(array: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of each head from two halves to interleaved pairs, as the converter's `permute` does."""
    return array.reshape(heads, 2, len(array) // heads // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
