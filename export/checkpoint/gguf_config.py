"""Converts a GGUF file's metadata to a transformers config, and refuses metadata that it would have to drop."""

from __future__ import annotations

from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from satchel.export.checkpoint.gguf_architectures import ARCHITECTURES, HANDLED_KEYS, SILENT_KEYS, Architecture
from satchel.export.checkpoint.gguf_file import GgufFile
from satchel.export.checkpoint.structure import one_line
from satchel.export.errors import ExportError

_ROPE_TYPES = ("linear", "yarn")
_ORIGINAL = "export from the original float checkpoint"
_DEFAULT_ROPE_BASE = 10000.0


def architecture_of(file: GgufFile) -> Architecture:
    """Return the file's architecture.

    Raises:
        ExportError: If satchel does not support it, or the file is one of several shards.
    """
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ExportError(
            f"{file.path}: GGUF architecture {name!r} is not supported; satchel reads {', '.join(ARCHITECTURES)}: "
            "export from the checkpoint folder of the original model"
        )
    if file.metadata.get("split.count", 1) > 1:
        raise ExportError(
            f"{file.path}: one of {file.metadata['split.count']} files; join them with gguf-split --merge"
        )
    return ARCHITECTURES[name]


def config_of(file: GgufFile) -> PreTrainedConfig:
    """Return the transformers config that the metadata describes.

    Raises:
        ExportError: If a key is missing, or cannot be represented in the config.
    """
    architecture = architecture_of(file)
    try:
        return AutoConfig.for_model(architecture.model_type, **_fields(file, architecture))
    except (ValueError, TypeError, KeyError, ZeroDivisionError, StrictDataclassError) as error:
        raise ExportError(
            f"{file.path}: its metadata does not describe a valid {architecture.model_type} model: {one_line(error)}"
        ) from None


def _fields(file: GgufFile, architecture: Architecture) -> dict[str, Any]:
    facts = _facts(file, architecture)
    fields = {field: _scalar(file, key, facts[key]) for key, field in architecture.required.items()}
    fields |= {field: facts[key] for key, field in architecture.optional.items() if key in facts}
    fields |= architecture.config
    head_dim = _head_dim(file, facts, fields)
    fields["head_dim"] = head_dim
    if architecture.wide_layers is not None:
        wide = fields["num_hidden_layers"] == architecture.wide_layers
        fields["query_pre_attn_scalar"] = fields["hidden_size"] // fields["num_attention_heads"] if wide else head_dim
    fields["rope_parameters"] = _rope(file, architecture, facts)
    fields["vocab_size"] = _vocab_size(file)
    fields["tie_word_embeddings"] = "output.weight" not in file.tensors
    return fields


def _facts(file: GgufFile, architecture: Architecture) -> dict[str, Any]:
    """Return the metadata under the architecture's prefix; every key must be known."""
    prefix = f"{file.metadata['general.architecture']}."
    facts = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    known = architecture.required.keys() | architecture.optional.keys() | HANDLED_KEYS | SILENT_KEYS
    for key, value in facts.items():
        if key not in known:
            raise ExportError(
                f"{file.path}: {prefix}{key} = {value!r} is not supported and would be dropped; {_ORIGINAL}"
            )
    missing = [key for key in architecture.required if key not in facts]
    if missing:
        raise ExportError(
            f"{file.path}: {prefix}{missing[0]} is missing from the metadata; {_ORIGINAL}, or convert the file again"
        )
    return facts


def _scalar(file: GgufFile, key: str, value: Any) -> Any:
    """Return the value that all layers share."""
    if not isinstance(value, list):
        return value
    if len(set(value)) != 1:
        raise ExportError(f"{file.path}: {key} differs between layers: {value}; {_ORIGINAL}")
    return value[0]


def _head_dim(file: GgufFile, facts: dict[str, Any], fields: dict[str, Any]) -> int:
    head_dim = int(facts.get("attention.key_length", fields["hidden_size"] // fields["num_attention_heads"]))
    for key in ("attention.value_length", "rope.dimension_count"):
        if facts.get(key, head_dim) != head_dim:
            raise ExportError(f"{file.path}: {key} is {facts[key]}, but the head size is {head_dim}; {_ORIGINAL}")
    return head_dim


def _rope(file: GgufFile, architecture: Architecture, facts: dict[str, Any]) -> dict[str, Any]:
    """Return the rotary parameters; for models with two kinds of layers, one set per kind."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": facts.get("rope.freq_base", _DEFAULT_ROPE_BASE)}
    scaling = facts.get("rope.scaling.type", "none")
    if scaling in _ROPE_TYPES:
        rope |= {"rope_type": scaling, "factor": facts.get("rope.scaling.factor", 1.0)}
        if scaling == "yarn":
            original = facts.get("rope.scaling.original_context_length", facts["context_length"])
            rope["original_max_position_embeddings"] = original
    elif scaling != "none":
        raise ExportError(
            f"{file.path}: rope scaling of type {scaling!r} is not supported, only linear and yarn; {_ORIGINAL}"
        )
    elif facts.get("rope.scaling.factor", 1.0) not in (0.0, 1.0):
        raise ExportError(f"{file.path}: a rope scaling factor without a type; {_ORIGINAL}")
    if architecture.model_type != "gemma3_text":
        return rope
    local = {"rope_type": "default", "rope_theta": facts.get("rope.freq_base_swa", _DEFAULT_ROPE_BASE)}
    return {"full_attention": rope, "sliding_attention": local}


def _vocab_size(file: GgufFile) -> int:
    """Return the number of embedding rows, which can exceed the tokenizer's vocabulary."""
    if "token_embd.weight" not in file.tensors:
        raise ExportError(f"{file.path}: tensor token_embd.weight is missing; download the file again")
    return file.tensors["token_embd.weight"].dims[0]
