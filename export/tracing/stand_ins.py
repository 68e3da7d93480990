"""Replacements for attention, masks and experts while `transformers` runs under the tracer.

`transformers` lets all three be replaced by name, so no model code is changed. A replacement refuses what it does not
support, and names the class that needs it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from satchel.export.errors import ExportError

IMPLEMENTATION = "satchel"
"""The name under which attention, masks and experts are registered with `transformers`."""

HARMLESS = {
    "position_ids",
    "cache_position",
    "use_cache",
    "output_attentions",
    "sliding_window",
    "dropout",
    "is_causal",
    "deterministic",
}
"""Keyword arguments of an attention call that are redundant, given the mask and the graph."""


@dataclasses.dataclass(frozen=True)
class Mask:
    """Replaces a mask tensor during the trace: causal, and limited to the last `window` positions (0: no limit).

    A model that computes with its mask fails on this object, so it is refused instead of exported wrongly.
    """

    window: int


def register_implementations() -> None:
    """Register satchel's attention, mask and experts with `transformers`; idempotent."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts)


def _attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
    scaling: float | None = None, softcap: float | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """The attention function that `transformers` calls.

    query [batch, heads, new, head_dim] -> [batch, new, heads, head_dim], and None for the attention weights.
    """
    where = type(module).__name__
    if not isinstance(attention_mask, Mask):
        raise ExportError(
            f"{where}: its attention gets a custom mask ({type(attention_mask).__name__}); "
            "satchel supports only causal masks and sliding windows"
        )
    unknown = sorted(k for k, v in kwargs.items() if k not in HARMLESS and v is not None and v is not False)
    if unknown:
        raise ExportError(
            f"{where}: its attention uses {', '.join(unknown)}, which satchel does not support; "
            "this family is not supported"
        )
    if kwargs.get("is_causal") is False:
        raise ExportError(
            f"{where}: its attention is not causal (is_causal=False); satchel exports only causal language models"
        )
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise ExportError(f"{where}: its attention has no layer index, so its KV cache cannot be named")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    out = torch.ops.satchel.attention(
        query, key, value, int(layer), scale, attention_mask.window, float(softcap or 0.0)
    )
    return out, None


def _mask(mask_function: Callable[..., Any], local_size: int | None = None, **_: Any) -> Mask:
    """The mask function that `transformers` calls.

    It probes `mask_function` to check that it is causal, with or without a window.
    """
    window = int(local_size or 0)
    reach = window or 1 << 20
    query = reach + 3
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        keys = torch.tensor([0, query - reach, query - reach + 1, query - 1, query, query + 1])
        wanted = (keys <= query) & (keys > query - (window or query + 1))
        zero = torch.zeros_like(keys)
        try:
            found = mask_function(zero, zero, torch.full_like(keys, query), keys)
            same = torch.equal(torch.as_tensor(found).broadcast_to(wanted.shape), wanted)
        except (RuntimeError, TypeError, AttributeError, IndexError):
            same = False
    if not same:
        raise ExportError(
            "the model uses a mask that is neither causal nor a sliding window (chunked, packed or bidirectional); "
            "satchel does not support it"
        )
    return Mask(window)


def _experts(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts function that `transformers` calls.

    [tokens, hidden] and the chosen experts' indices and weights [tokens, k] -> [tokens, hidden].
    """
    where, activation = type(module).__name__, getattr(module, "act_fn", None)
    beyond = {
        "biases": module.has_bias,
        "transposed weights": module.is_transposed,
        "interleaved gates": not module.is_concatenated,
        "no gate": not module.has_gate,
        "a norm after each expert": module.has_post_expert_norm,
        "a custom gate": "_apply_gate" in type(module).__dict__
        and type(module)._apply_gate.__name__ != "_default_apply_gate",
        f"the activation {type(activation).__name__}": not isinstance(activation, torch.nn.SiLU)
        and type(activation).__name__ != "SiLUActivation",
    }
    found = [feature for feature, there in beyond.items() if there]
    if found:
        raise ExportError(
            f"{where}: its experts have {', '.join(found)}, which satchel does not support yet; "
            "this family is not supported"
        )
    out: torch.Tensor = torch.ops.satchel.experts(
        hidden_states, top_k_index, top_k_weights.to(hidden_states.dtype), module.gate_up_proj, module.down_proj
    )
    return out
