"""Finds the place of each stored tensor in the model, and names those without one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedModel

from satchel.export.checkpoint.conversion import places
from satchel.export.checkpoint.prefixes import without_prefixes
from satchel.export.errors import ExportError
from satchel.graphs.ir.weights import LazyWeight

_SHOWN = 4
_ALWAYS_LEFT = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$", r"\.masked_bias$", r"\.attn\.bias$")
"""Buffers of older versions of transformers, which its loader passes over too."""

_QUANTIZED = (
    ".qweight", ".qzeros", ".weight_packed", "weight_scale", ".weight_scale_inv", ".SCB", ".absmax", ".quant_map",
)  # fmt: skip
"""How the names of quantized values and of their scales end."""


def placed(
    module: PreTrainedModel, stored: Mapping[str, LazyWeight], folder: Path
) -> tuple[dict[str, LazyWeight], list[str]]:
    """Return the tensors without the prefixes that keep them from fitting, and a note if there were any."""
    wanted = module.state_dict()

    def fitting(names: Iterable[str]) -> int:
        return len({target for _, target, _ in places(module, names)} & wanted.keys())

    tied = len(module.all_tied_weights_keys)
    if fitting(stored) >= len(wanted) - tied:
        return dict(stored), []
    tensors, taken = without_prefixes(stored, fitting)
    if not taken:
        return tensors, []
    return tensors, [f"the names of its tensors fit the model without {' and '.join(taken)}, which was taken off"]


def on_unplaced(module: PreTrainedModel, names: Sequence[str], folder: Path, *, strict: bool) -> list[str]:
    """Return a note on the stored tensors that the model has no place for, apart from those that transformers ignores.

    Args:
        module: The model; it knows which names its checkpoints may have besides.
        names: The names without a place.
        folder: What to name in an error.
        strict: Refuse any such tensor, because the architecture was only claimed.

    Raises:
        ExportError: They are parts of an adapter or of quantized weights, which the others need; or `strict`.
    """
    patterns = (*_ALWAYS_LEFT, *(module._keys_to_ignore_on_load_unexpected or ()))
    ignored = re.compile("|".join(f"({pattern})" for pattern in patterns))
    left = [name for name in names if not ignored.search(name)]
    adapter = next((name for name in left if ".lora_" in name), None)
    if adapter is not None:
        raise ExportError(
            f"{folder}: its weights hold an adapter that is not merged ({adapter}); merge it with peft "
            "(merge_and_unload, then save_pretrained) and export the merged folder"
        )
    if not left:
        return []
    quantized = next((name for name in left if name.endswith(_QUANTIZED)), None)
    if quantized is not None:
        raise ExportError(
            f"{folder}: tensor {quantized} is part of a quantized weight, and config.json has no quantization_config; "
            "export from the original float checkpoint"
        )
    if strict:
        raise ExportError(
            f"{folder}: tensor {left[0]} has no place in a {module.config.model_type} model, so --as "
            f"{module.config.model_type} does not fit; export the original architecture"
        )
    shown = ", ".join(left[:_SHOWN]) + (f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else "")
    are = f"{len(left)} stored tensors have" if len(left) > 1 else "1 stored tensor has"
    return [f"{are} no place in the model of config.json, and stay out of the bundle as in transformers: {shown}"]


def on_ties(apart: Sequence[str]) -> list[str]:
    """Return a note on weights that config.json ties although they are stored with different values."""
    return [
        f"{name} is stored and differs from the weight that config.json ties it to (tie_word_embeddings): both are kept"
        for name in apart
    ]
