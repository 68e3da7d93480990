"""Converts a GGUF file's metadata to a transformers config, and refuses metadata that it would have to drop.

Keys that a file may omit have the defaults of llama.cpp (src/llama-model.cpp, load_hparams).
"""

from __future__ import annotations

import math
import re
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from satchel.export.checkpoint.gguf_architectures import (
    ANY,
    ARCHITECTURES,
    HANDLED_KEYS,
    NEUTRAL_KEYS,
    SILENT_KEYS,
    Architecture,
)
from satchel.export.checkpoint.gguf_file import GgufFile
from satchel.export.checkpoint.structure import one_line
from satchel.export.errors import ExportError

LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
_ROPE_TYPES = ("linear", "yarn")
_BLOCK = re.compile(r"blk\.(\d{1,6})\.")
_ORIGINAL = "export from the original float checkpoint"
_DEFAULT_ROPE_BASE = 10000.0
_WIDTHS = {
    "feed_forward_length": ("ffn_down", "ffn_down_exps"),
    "expert_feed_forward_length": ("ffn_down_exps",),
    "expert_shared_feed_forward_length": ("ffn_down_shexp",),
}
"""Keys that repeat the width of a tensor, with the tensors of a layer that have it."""

_NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
"""Ids come from the tokenizer's metadata; a config class fills in those of one model."""


def architecture_of(file: GgufFile) -> Architecture:
    """Return the file's architecture.

    Raises:
        ExportError: If satchel does not support it.
    """
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        found = "names no architecture" if name is None else f"GGUF architecture {name!r} is not supported"
        raise ExportError(
            f"{file.path}: {found}; satchel reads {', '.join(ARCHITECTURES)}: "
            "export from the checkpoint folder of the original model"
        )
    architecture = ARCHITECTURES[name]
    for key, variant in architecture.variants:
        if file.metadata.get(f"{name}.{key}"):
            return variant
    return architecture


def config_of(file: GgufFile) -> PreTrainedConfig:
    """Return the transformers config that the metadata describes.

    Raises:
        ExportError: If a key is missing, or cannot be represented in the config.
    """
    architecture = architecture_of(file)
    try:
        return AutoConfig.for_model(architecture.model_type, **_fields(file, architecture))
    except (ValueError, TypeError, KeyError, ZeroDivisionError, OverflowError, StrictDataclassError) as error:
        raise ExportError(
            f"{file.path}: its metadata does not describe a valid {architecture.model_type} model: {one_line(error)}"
        ) from None


def _fields(file: GgufFile, architecture: Architecture) -> dict[str, Any]:
    facts = _facts(file, architecture)
    _check_sizes(file, facts)
    fields = {**_NO_IDS, **architecture.defaults}
    fields |= {name: facts[key] for key, name in architecture.required.items()}
    fields |= {name: facts[key] for key, name in architecture.optional.items() if key in facts}
    fields |= architecture.config
    fields |= {name: _has(file, tensor) for name, tensor in architecture.flags.items()}
    heads = _count(file, "attention.head_count", facts["attention.head_count"])
    # The last blocks may predict further tokens; a model that generates one at a time has no use for them.
    fields["num_hidden_layers"] -= facts.get("nextn_predict_layers", 0)
    fields["num_key_value_heads"] = facts.get("attention.head_count_kv", heads)
    fields[architecture.width] = facts["feed_forward_length"]
    head_dim = facts.get("attention.key_length", facts["embedding_length"] // heads)
    fields["head_dim"] = head_dim = _count(file, "attention.key_length", head_dim)
    if facts.get("attention.value_length", head_dim) != head_dim:
        raise ExportError(
            f"{file.path}: attention.value_length is {facts['attention.value_length']}, but the head size is "
            f"{head_dim}; {_ORIGINAL}"
        )
    if architecture.latent:
        fields |= _latent(file, facts, head_dim)
    if architecture.wide_layers is not None:
        wide = fields["num_hidden_layers"] == architecture.wide_layers
        fields["query_pre_attn_scalar"] = fields["hidden_size"] // heads if wide else head_dim
    if architecture.model_type.startswith("granite"):
        fields.setdefault("attention_multiplier", head_dim**-0.5)
    fields |= _windows(file, architecture, facts)
    rope = _rope(file, architecture, facts, head_dim)
    local = {"rope_type": "default", "rope_theta": facts.get("rope.freq_base_swa", _local_base(architecture, rope))}
    fields["rope_parameters"] = {"full_attention": rope, "sliding_attention": local} if architecture.two_ropes else rope
    fields["vocab_size"] = _vocab_size(file)
    fields["tie_word_embeddings"] = "output.weight" not in file.tensors
    return fields


def _latent(file: GgufFile, facts: dict[str, Any], head_dim: int) -> dict[str, int]:
    """Return the sizes of the two parts of a key."""
    rotated = _count(file, "rope.dimension_count", facts.get("rope.dimension_count"))
    if rotated >= head_dim:
        raise ExportError(f"{file.path}: rope.dimension_count is {rotated} of {head_dim}; convert the file again")
    return {"qk_rope_head_dim": rotated, "qk_nope_head_dim": head_dim - rotated}


def _facts(file: GgufFile, architecture: Architecture) -> dict[str, Any]:
    """Return the metadata under the architecture's prefix, complete; every key must be known."""
    prefix = f"{file.metadata['general.architecture']}."
    facts = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    own = (architecture.required, architecture.optional, architecture.rotary, architecture.by_layer)
    known = {key for keys in own for key in keys} | HANDLED_KEYS | SILENT_KEYS
    for key, value in facts.items():
        neutral = architecture.neutral.get(key, NEUTRAL_KEYS.get(key))
        if key not in known and (neutral is None or (neutral != ANY and value not in neutral)):
            raise ExportError(
                f"{file.path}: {prefix}{key} = {repr(value)[:80]} is not supported and would be dropped; {_ORIGINAL}"
            )
    for key in (*architecture.optional, "feed_forward_length"):
        if key not in facts and key in _WIDTHS:
            facts |= _width(file, key)
    missing = [key for key in (*architecture.required, "feed_forward_length") if key not in facts]
    if missing:
        raise ExportError(
            f"{file.path}: {prefix}{missing[0]} is missing from the metadata; {_ORIGINAL}, or convert the file again"
        )
    lists = {"attention.sliding_window_pattern", *architecture.by_layer}
    return {key: value if key in lists else _scalar(file, key, value) for key, value in facts.items()}


def _width(file: GgufFile, key: str) -> dict[str, int]:
    """Return a width that the file does not state, from the first tensor that has it."""
    for tensor in _WIDTHS[key]:
        for name, weight in file.tensors.items():
            if name.startswith("blk.") and name.endswith(f".{tensor}.weight") and weight.dims:
                return {key: weight.dims[-1]}
    return {}


def _scalar(file: GgufFile, key: str, value: Any) -> Any:
    """Return the value that all layers share."""
    if not isinstance(value, list):
        return value
    if len(set(value)) != 1:
        raise ExportError(f"{file.path}: {key} differs between layers: {value[:8]}; {_ORIGINAL}")
    return value[0]


def _count(file: GgufFile, key: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ExportError(f"{file.path}: {key} is {value!r}; it must be at least 1: convert the file again")
    return value


def _check_sizes(file: GgufFile, facts: dict[str, Any]) -> None:
    """Refuse sizes that the tensors contradict before anything of that size is made."""
    for key in ("context_length", "embedding_length", "block_count", "attention.head_count"):
        _count(file, key, facts[key])
    for key, smallest in (("attention.head_count_kv", 1), ("attention.key_length", 1), ("rope.dimension_count", 0)):
        if type(facts.get(key, smallest)) is not int or facts.get(key, smallest) < smallest:
            raise ExportError(f"{file.path}: {key} is {facts[key]!r}; convert the file again")
    further = facts.get("nextn_predict_layers", 0)
    if type(further) is not int or not 0 <= further < facts["block_count"]:
        raise ExportError(f"{file.path}: nextn_predict_layers is {further!r} of block_count {facts['block_count']}")
    layers = {int(found[1]) for found in map(_BLOCK.match, file.tensors) if found}
    if facts["block_count"] - further > len(layers):
        raise ExportError(
            f"{file.path}: block_count is {facts['block_count']}, but there are tensors of {len(layers)} blocks; "
            "download the whole file again"
        )
    heads, kv_heads = facts["attention.head_count"], facts.get("attention.head_count_kv", facts["attention.head_count"])
    width = facts.get("attention.key_length", facts["embedding_length"] // heads)
    for tensor, rows in (("attn_q", heads * width), ("attn_qkv", (heads + 2 * kv_heads) * width)):
        weight = file.tensors.get(f"blk.0.{tensor}.weight")
        if weight is not None and weight.dims[0] != rows:
            raise ExportError(
                f"{file.path}: blk.0.{tensor}.weight has {weight.dims[0]} rows; {heads} heads of {width} need {rows}"
            )
    for key, tensor in (("embedding_length", "token_embd"), ("expert_count", "blk.0.ffn_gate_inp")):
        weight, axis = file.tensors.get(f"{tensor}.weight"), -1 if key == "embedding_length" else 0
        if weight is not None and facts.get(key, weight.dims[axis]) != weight.dims[axis]:
            raise ExportError(f"{file.path}: {key} is {facts[key]}, but {tensor}.weight has shape {list(weight.dims)}")


def _has(file: GgufFile, tensor: str) -> bool:
    name = tensor.removeprefix("!")
    fused = name.replace("attn_q.", "attn_qkv.")
    return (name in file.tensors or fused in file.tensors) != tensor.startswith("!")


def _windows(file: GgufFile, architecture: Architecture, facts: dict[str, Any]) -> dict[str, Any]:
    """Return the sliding window, and which layers have it; 0 in the file is none."""
    window = facts.get("attention.sliding_window", architecture.window) or None
    if window is None and architecture.window is None and "attention.sliding_window" not in facts:
        fields: dict[str, Any] = {} if architecture.period is None else {"sliding_window": None}
    else:
        fields = {"sliding_window": window}
    if architecture.period is None:
        return fields
    layers = _count(file, "block_count", facts["block_count"]) - facts.get("nextn_predict_layers", 0)
    pattern = facts.get("attention.sliding_window_pattern", architecture.period)
    if not isinstance(pattern, list):
        # As llama.cpp counts: the last layer of each period is full; a period of 0 has no full layer.
        pattern = [not pattern or layer % pattern < pattern - 1 for layer in range(layers)]
    if len(pattern) < layers:
        raise ExportError(f"{file.path}: attention.sliding_window_pattern has {len(pattern)} of {layers} layers")
    if window is None:
        pattern = [False] * layers
    kinds = ("full_attention", "sliding_attention")
    return fields | {"layer_types": [kinds[bool(sliding)] for sliding in pattern[:layers]]}


def _local_base(architecture: Architecture, rope: dict[str, Any]) -> float:
    """Return the rotary base of layers with a window where the file has no rope.freq_base_swa."""
    base: float = _DEFAULT_ROPE_BASE if architecture.model_type == "gemma3_text" else rope["rope_theta"]
    return base


def _rope(file: GgufFile, architecture: Architecture, facts: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """Return the rotary parameters of the layers with full attention."""
    if architecture.refused_without_rope and facts.get("rope.scaling.finetuned") is False:
        raise ExportError(f"{file.path}: rope.scaling.finetuned is false: nothing is rotated; {_ORIGINAL}")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": facts.get("rope.freq_base", _DEFAULT_ROPE_BASE)}
    rotated = facts.get("rope.dimension_count", head_dim)
    if architecture.partial:
        rope["partial_rotary_factor"] = rotated / head_dim
    elif rotated != head_dim and not architecture.latent:
        raise ExportError(
            f"{file.path}: rope.dimension_count is {rotated}, but the head size is {head_dim}; {_ORIGINAL}"
        )
    original = facts.get("rope.scaling.original_context_length", facts["context_length"])
    if LONG_FACTORS in file.tensors and SHORT_FACTORS in file.tensors:
        return rope | _longrope(file, facts, original)
    scaling = facts.get("rope.scaling.type", "linear")
    factor = facts.get("rope.scaling.factor", facts.get("rope.scale_linear", 0.0)) or 1.0
    if scaling != "none" and scaling not in _ROPE_TYPES:
        more = f" without the tensors {LONG_FACTORS} and {SHORT_FACTORS}" if scaling == "longrope" else ""
        raise ExportError(
            f"{file.path}: rope scaling of type {scaling!r}{more} is not supported, only linear and yarn; {_ORIGINAL}"
        )
    attention = facts.get("rope.scaling.attn_factor", 1.0)
    rope |= {name: facts[key] for key, name in architecture.rotary.items() if key in facts}
    if scaling == "yarn":
        return rope | _yarn(file, facts, factor, original, attention) | dict(architecture.yarn)
    if attention not in (0.0, 1.0):
        raise ExportError(
            f"{file.path}: rope.scaling.attn_factor = {attention} would be dropped without yarn or longrope; "
            f"{_ORIGINAL}"
        )
    # llama.cpp divides positions by the factor whatever the type.
    return rope if factor == 1.0 else rope | {"rope_type": "linear", "factor": factor}


def _yarn(file: GgufFile, facts: dict[str, Any], factor: float, original: int, attention: float) -> dict[str, Any]:
    if facts.get("rope.scaling.yarn_ext_factor", 1.0) not in (1.0, -1.0):
        raise ExportError(f"{file.path}: rope.scaling.yarn_ext_factor would be dropped; {_ORIGINAL}")
    found = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    for key, name in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
        if f"rope.scaling.{key}" in facts:
            found[name] = facts[f"rope.scaling.{key}"]
    if "rope.scaling.yarn_attn_factor" in facts:
        found["attention_factor"] = facts["rope.scaling.yarn_attn_factor"]
    elif attention not in (0.0, 1.0):
        found["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0)
    return found


def _longrope(file: GgufFile, facts: dict[str, Any], original: int) -> dict[str, Any]:
    """Return the parameters of rotary tables for short and long prompts, whose factors are stored as tensors."""
    found = {
        "rope_type": "longrope",
        "short_factor": file.tensors[SHORT_FACTORS].numpy().tolist(),
        "long_factor": file.tensors[LONG_FACTORS].numpy().tolist(),
        "original_max_position_embeddings": original,
        "factor": facts["context_length"] / original,
    }
    if "rope.scaling.attn_factor" in facts:
        found["attention_factor"] = facts["rope.scaling.attn_factor"]
    return found


def _vocab_size(file: GgufFile) -> int:
    """Return the number of embedding rows, which can exceed the tokenizer's vocabulary."""
    if "token_embd.weight" not in file.tensors:
        raise ExportError(f"{file.path}: tensor token_embd.weight is missing; download the file again")
    dims = file.tensors["token_embd.weight"].dims
    if len(dims) != 2:
        raise ExportError(f"{file.path}: token_embd.weight has {len(dims)} dimensions instead of 2; convert it again")
    return dims[0]
