"""Finds the language model inside a multimodal checkpoint: its config, and the tensors of the other parts."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from satchel.export.errors import ExportError

_SAME_AS = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
"""Language models that have no class of their own, and the family whose layers and tensors they have. Their rotary
embedding gives each token three positions, which are equal for text."""

_REFUSED = {
    "paligemma": "its prompts attend in both directions",
    "mllama": "its language model has cross-attention layers",
}


def language_model(config: PreTrainedConfig, source: str) -> PreTrainedConfig:
    """Return the config of the language model inside a multimodal one, or `config` itself if that is a text model.

    Raises:
        ExportError: If the language model is not one that can be built by itself.
    """
    text: PreTrainedConfig = config.get_text_config(decoder=True)
    if text is config or config.is_encoder_decoder:
        return config
    family = _SAME_AS.get(text.model_type, text.model_type)
    reason = _REFUSED.get(config.model_type)
    if reason is None and family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        reason = f"transformers has no class for its language model ({text.model_type}) alone"
    if reason is not None:
        raise ExportError(
            f"{source}: {config.model_type} is a multimodal model, and {reason}; export a text model, or a multimodal "
            "model of another family"
        )
    if family != text.model_type:
        settings = {k: v for k, v in text.to_dict().items() if k not in ("model_type", "architectures")}
        text = AutoConfig.for_model(family, **settings)
    # The head belongs to the multimodal model, and its config says whether it is tied.
    text.tie_word_embeddings = getattr(config, "tie_word_embeddings", text.tie_word_embeddings)
    return text


def of_other_parts(module: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Return the tensors among `names` that no part of a language model can have, with the part that has each."""
    base = module.base_model_prefix
    tops = {name for name, _ in module.named_children()}
    inner = {name for name, _ in getattr(module, base, module).named_children()}
    parts: dict[str, str] = {}
    for name in names:
        first, _, rest = name.partition(".")
        part = rest.partition(".")[0] if first == base else first
        if part not in (inner if first == base else tops):
            parts[name] = part
    return parts


def left_out(outer: str, inner: str, parts: Iterable[str]) -> str:
    """The note on an exported language model: `outer` and `inner` are model types, `parts` what is left out."""
    others = ", ".join(sorted(set(parts))) or "the others, which are not stored"
    return f"{outer} is a multimodal model: only its language model ({inner}) is exported, without {others}"
