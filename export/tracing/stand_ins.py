"""Replacements for attention, masks and experts while `transformers` runs under the tracer.

`transformers` lets all three be replaced by name, so no model code is changed. A replacement refuses what it does not
support, and names the class that needs it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

from satchel.export.errors import ExportError
from satchel.export.tracing import own_attention

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
    """Replaces a mask tensor during the trace: causal, and limited to the last `window` positions or to the token's own
    chunk of `chunk` positions (0: no limit).

    A model that computes with its mask fails on this object, so it is refused instead of exported wrongly.
    """

    window: int = 0
    chunk: int = 0
    ndim: ClassVar[int] = 0

    def to(self, *_: Any, **__: Any) -> Mask:
        """The mask itself: it has no dtype."""
        return self

    def __getitem__(self, index: Any) -> Mask:
        """The mask itself, if the index takes all of it."""
        parts = index if isinstance(index, tuple) else (index,)
        if not all(isinstance(part, slice) and not part.start and part.stop is None for part in parts):
            raise TypeError("a part of the mask is taken")
        return self


def register_implementations() -> None:
    """Register satchel's attention, mask and experts with `transformers`; idempotent."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts)
    own_attention.register_classes()


def _attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
    scaling: float | None = None, softcap: float | None = None, s_aux: torch.Tensor | None = None, **kwargs: Any,
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
        query,
        key,
        value,
        s_aux,
        int(layer),
        scale,
        attention_mask.window,
        attention_mask.chunk,
        float(softcap or 0.0),
    )
    return out, None


def _mask(mask_function: Callable[..., Any], local_size: int | None = None, **_: Any) -> Mask:
    """The mask function that `transformers` calls.

    It probes `mask_function` to check that it is causal, alone or with a window or chunks of `local_size` positions.
    """
    size = int(local_size or 0)
    reach = size or 1 << 20
    query = reach + 3
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        keys = torch.tensor([0, query - reach, query - reach + 1, reach - 1, reach, query - 1, query, query + 1])
        zero = torch.zeros_like(keys)
        try:
            found = torch.as_tensor(mask_function(zero, zero, torch.full_like(keys, query), keys)).broadcast_to(
                keys.shape
            )
        except (RuntimeError, TypeError, AttributeError, IndexError):
            found = None
        causal = keys <= query
        if found is not None and torch.equal(found, causal & (keys > query - (size or query + 1))):
            return Mask(window=size)
        if found is not None and size and torch.equal(found, causal & (keys // size == query // size)):
            return Mask(chunk=size)
    raise ExportError(
        "the model uses a mask that is neither causal nor limited to a window or to chunks (packed or bidirectional); "
        "satchel does not support it"
    )


@contextlib.contextmanager
def chunks_without_padding() -> Iterator[None]:
    """While it is entered, the masks of `transformers` count chunks from position 0, as in a batch without padding.

    They count from the first token that is not padding, which they read from the mask: a tensor, of which the tracer
    knows no values. satchel's batches have no padding on the left.
    """
    from transformers import masking_utils

    def overlay(chunk_size: int, left_padding: torch.Tensor) -> Callable[..., Any]:
        return lambda batch, head, query, key: key // chunk_size == query // chunk_size

    original = masking_utils.chunked_overlay
    masking_utils.chunked_overlay = overlay
    try:
        yield
    finally:
        masking_utils.chunked_overlay = original


def _experts(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts function that `transformers` calls.

    [tokens, hidden] and the chosen experts' indices and weights [tokens, k] -> [tokens, hidden].
    """
    where, activation = type(module).__name__, getattr(module, "act_fn", None)
    own_gate = "_apply_gate" in type(module).__dict__ and type(module)._apply_gate.__name__ != "_default_apply_gate"
    swiglu = own_gate and _is_clipped_swiglu(module)
    silu = activation is torch.nn.functional.silu or type(activation).__name__ in ("SiLU", "SiLUActivation")
    beyond = {
        "no gate": not module.has_gate,
        "a norm after each expert": module.has_post_expert_norm,
        "a custom gate": own_gate and not swiglu,
        f"the activation {type(activation).__name__}": not silu and not own_gate,
    }
    found = [feature for feature, there in beyond.items() if there]
    if found:
        raise ExportError(
            f"{where}: its experts have {', '.join(found)}, which satchel does not support yet; "
            "this family is not supported"
        )
    biases = (module.gate_up_proj_bias, module.down_proj_bias) if module.has_bias else (None, None)
    alpha, beta, limit = (float(module.alpha), 1.0, float(module.limit)) if swiglu else (1.0, 0.0, 0.0)
    out: torch.Tensor = torch.ops.satchel.experts(
        hidden_states, top_k_index, top_k_weights.to(hidden_states.dtype), module.gate_up_proj, module.down_proj,
        *biases, alpha, beta, limit, not module.is_concatenated, module.is_transposed,
    )  # fmt: skip
    return out


def _llama4_experts(module: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The forward of Llama 4's mixture, which feeds every token to every expert, with inputs of zero for all but one.

    [batch, tokens, hidden] -> [batch * tokens, hidden], and the router's logits. An input is scaled by its score.

    Raises:
        ExportError: A token goes to several experts, each of which scales the input differently.
    """
    if module.top_k != 1:
        raise ExportError(f"{type(module).__name__}: {module.top_k} experts per token are not supported, only 1")
    hidden = hidden_states.reshape(-1, module.hidden_dim)
    logits = torch.nn.functional.linear(hidden, module.router.weight)
    score, index = torch.topk(logits, 1, dim=1)
    experts = module.experts
    out: torch.Tensor = torch.ops.satchel.experts(
        hidden * torch.sigmoid(score), index, torch.ones_like(score), experts.gate_up_proj, experts.down_proj,
        None, None, 1.0, 0.0, 0.0, False, True,
    )  # fmt: skip
    return module.shared_expert(hidden) + out, logits


def _aria_experts(module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """The forward of Aria's mixture, whose views of views the tracer does not follow."""
    hidden: Any = hidden_states.flatten(0, 1)
    _, weights, index = module.router(hidden)
    mixed: Any = module.experts(hidden, index, weights)
    summed: torch.Tensor = mixed.unflatten(0, hidden_states.shape[:2]) + module.shared_experts(hidden_states)
    return summed


def _gaussian_top_k(module: Any, inputs: torch.Tensor) -> torch.Tensor:
    """Gemma 3n's sparse activations: what exceeds a quantile of a normal distribution, the quantile as a number."""
    quantile = statistics.NormalDist().inv_cdf(module.activation_sparsity)
    mean = inputs.mean(-1, keepdim=True)
    deviation = (inputs - mean).square().mean(-1, keepdim=True).sqrt()
    return torch.nn.functional.relu(inputs - (mean + deviation * quantile))


def _shared_attention(module: Any, hidden_states: torch.Tensor, layer_idx: int, **options: Any) -> Any:
    """Zamba 2's attention, whose weights serve several layers: it is told the layer that it stands in."""
    module.layer_idx = layer_idx
    try:
        return type(module).forward(module, hidden_states, layer_idx, **options)
    finally:
        module.layer_idx = -1


METHODS: dict[tuple[str, str], Callable[..., Any]] = {
    ("Llama4TextMoe", "forward"): _llama4_experts,
    ("AriaTextMoELayer", "forward"): _aria_experts,
    ("Gemma3nTextMLP", "_gaussian_topk"): _gaussian_top_k,
    ("Zamba2Attention", "forward"): _shared_attention,
    **own_attention.METHODS,
}
"""Replacements for methods of classes of `transformers` that cannot be traced as they are."""


@contextlib.contextmanager
def replaced_methods(module: torch.nn.Module) -> Iterator[None]:
    """While it is entered, parts of a model run the methods in `METHODS`."""
    found = [
        (part, name) for part in module.modules() for kind, name in METHODS if kind == type(part).__name__
    ]  # fmt: skip
    for part, name in found:
        setattr(part, name, functools.partial(METHODS[type(part).__name__, name], part))
    try:
        yield
    finally:
        for part, name in found:
            part.__dict__.pop(name)


class _InOrder(set[Any]):
    """A set that is iterated in the order of its texts. Python's order of texts varies from process to process."""

    def __iter__(self) -> Iterator[Any]:
        return iter(sorted(super().__iter__(), key=str))


@contextlib.contextmanager
def sets_in_order(module: torch.nn.Module) -> Iterator[None]:
    """While it is entered, sets that a model of transformers makes or holds are iterated in order.

    Models loop over the set of their layers' types. So each process traces the same graph.
    """
    held = [
        (part, name, value)
        for part in module.modules()
        for name, value in vars(part).items()
        if type(value) is set and not name.startswith("_")
    ]
    classes = {kind for part in module.modules() for kind in type(part).__mro__}
    files = {kind.__module__ for kind in classes if kind.__module__.startswith("transformers.models.")}
    for part, name, value in held:
        setattr(part, name, _InOrder(value))
    for file in files:
        vars(sys.modules[file])["set"] = _InOrder
    try:
        yield
    finally:
        for part, name, value in held:
            setattr(part, name, value)
        for file in files:
            del vars(sys.modules[file])["set"]


def without_temperature(module: torch.nn.Module, capacity: int) -> None:
    """Switch the attention temperature of Llama 4 off, which is 1 up to the first `floor_scale` positions.

    Raises:
        ExportError: The context is longer.
    """
    for part in (each for each in module.modules() if getattr(each, "attn_temperature_tuning", None)):
        last = int(getattr(part, "floor_scale", 0)) - 1
        if capacity > last:
            raise ExportError(
                f"{type(part).__name__}: its attention changes from position {last} on, which is not supported: "
                f"export with --max-context {last} or less"
            )
        setattr(part, "attn_temperature_tuning", False)  # noqa: B010 (a module's attributes are typed as modules)


def _is_clipped_swiglu(module: Any) -> bool:
    """Whether the gate is g * sigmoid(alpha * g) * (u + 1) over clipped g and u, tried on values beyond the limit."""
    if not all(isinstance(getattr(module, name, None), float | int) for name in ("alpha", "limit")):
        return False
    alpha, limit = float(module.alpha), float(module.limit)
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        tried = torch.linspace(-2 * limit, 2 * limit, 48).reshape(1, 48)
        gate, up = (tried[:, :24], tried[:, 24:]) if module.is_concatenated else (tried[:, ::2], tried[:, 1::2])
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return torch.allclose(module._apply_gate(tried), gate * torch.sigmoid(alpha * gate) * (up + 1))
