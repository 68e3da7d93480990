"""Builds a model's modules without its weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from satchel.export.checkpoint.families import check_family
from satchel.export.errors import ExportError

_MESSAGE_LENGTH = 300


@dataclass(frozen=True)
class Implementations:
    """Names of the functions in transformers' registries that the model calls; None for transformers' default."""

    attention: str
    experts: str | None = None


def build_structure(config: PreTrainedConfig, implementations: Implementations, source: str) -> PreTrainedModel:
    """Build the causal language model of a config, in evaluation mode and float32, without values for its weights.

    Parameters and persistent buffers are on the meta device. Buffers that a checkpoint does not store (rotary
    frequencies, embedding scales) are computed on the CPU as transformers computes them when it loads a model.

    Args:
        config: A config of one of transformers' own causal language models.
        implementations: The attention and experts functions that the modules call.
        source: What to name in an error.

    Raises:
        ExportError: If the config is not that of a decoder-only model, or the model cannot be built.
    """
    check_decoder(config, source)
    build: Any = AutoModelForCausalLM.from_config  # untyped in transformers
    options: dict[str, Any] = {"attn_implementation": implementations.attention}
    if implementations.experts is not None:
        options["experts_implementation"] = implementations.experts
    try:
        with torch.device("meta"):
            module: PreTrainedModel = build(config, dtype=torch.float32, **options)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ZeroDivisionError, ImportError) as error:
        raise ExportError(
            f"{source}: transformers cannot build this {config.model_type} model: {one_line(error)}"
        ) from None
    module.train(False)
    _compute_buffers(module, source)
    return module


def check_decoder(config: PreTrainedConfig, source: str) -> None:
    """Refuse a config that is not for a decoder-only text model, or whose family is known not to work."""
    model_type = config.model_type
    check_family(model_type, source)
    if config.is_encoder_decoder:
        raise ExportError(
            f"{source}: {model_type} is an encoder-decoder model; satchel exports decoder-only language models"
        )
    # BERT-like models can also be built as decoders; GPT-NeoX has `is_decoder: false` but is a decoder.
    encoder = model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", True)
    if encoder or model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ExportError(
            f"{source}: {model_type} is not a causal language model; satchel exports decoder-only language models"
        )


def one_line(error: BaseException) -> str:
    """Return an error's message on one line, truncated if long; its type if the message is empty."""
    text = " ".join(str(error).split())
    if not text:
        return type(error).__name__
    return text if len(text) <= _MESSAGE_LENGTH else f"{text[:_MESSAGE_LENGTH]}..."


def _owners(module: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Module, PreTrainedModel]]:
    """Yield each submodule with its name and nearest parent model, whose `_init_weights` initializes it."""
    owners: dict[str, PreTrainedModel] = {}
    for name, submodule in module.named_modules():
        owner = submodule if isinstance(submodule, PreTrainedModel) else owners[name.rpartition(".")[0]]
        owners[name] = owner
        yield name, submodule, owner


@torch.no_grad()
def _compute_buffers(module: PreTrainedModel, source: str) -> None:
    for path, submodule, owner in _owners(module):
        buffers = {
            name: buffer
            for name, buffer in submodule.named_buffers(recurse=False)
            if name in submodule._non_persistent_buffers_set
        }
        # With two different initial values, a buffer that nothing computes shows up as a difference.
        first, second = (_filled(owner, submodule, buffers, value) for value in (0, 1))
        if any(not torch.equal(first[name], second[name]) for name in buffers):  # the model computes its parts' buffers
            first, second = (_filled(owner, submodule, buffers, value, owner) for value in (0, 1))
        for name in buffers:
            if not torch.equal(first[name], second[name]):
                raise ExportError(f"{source}: the buffer {path}.{name} is neither stored nor computed by transformers")
        for name, value in vars(submodule).items():
            if isinstance(value, torch.Tensor) and value.is_meta:
                model_type = module.config.model_type
                raise ExportError(f"{source}: {path}.{name} of {model_type} is neither a weight nor a buffer")


def _filled(
    owner: PreTrainedModel,
    submodule: torch.nn.Module,
    buffers: dict[str, torch.Tensor],
    value: int,
    initialized: torch.nn.Module | None = None,
) -> dict[str, torch.Tensor]:
    """Return the buffers after transformers initializes the submodule (or `initialized`), with `value` as their initial
    value."""
    real = {name: torch.full_like(buffer, value, device="cpu") for name, buffer in buffers.items()}
    submodule._buffers.update(real)
    initialize: Any = owner._init_weights  # untyped in transformers
    if real:
        initialize(submodule if initialized is None else initialized)
    return {name: submodule.get_buffer(name) for name in real}
