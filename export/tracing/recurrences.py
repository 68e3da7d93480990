"""Replacements for the convolutions and recurrences of hybrid models while `transformers` runs under the tracer.

Its hybrid families call a handful of functions of their own modules, of which each family has a copy. Each function is
replaced in each module by one that calls the internal operators of `torch_ops`.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

from satchel.export.errors import ExportError
from satchel.export.tracing.stand_ins import HARMLESS


class Place:
    """The layer that runs: the last entered module that has a layer index."""

    def __init__(self) -> None:
        self.module: torch.nn.Module | None = None

    def enter(self, module: torch.nn.Module, _: Any) -> None:
        self.module = module

    @property
    def layer(self) -> int:
        return int(getattr(self.module, "layer_idx"))  # noqa: B009 (typed as a module or a tensor)

    def refuse(self, options: dict[str, Any]) -> None:
        """Refuse a call with options that change the result.

        Raises:
            ExportError: One of `options` is neither None nor False and not among those that are harmless.
        """
        harmless = HARMLESS | {"position_embeddings"}
        unknown = sorted(k for k, v in options.items() if k not in harmless and v is not None and v is not False)
        if unknown:
            raise ExportError(
                f"{type(self.module).__name__}: its convolution or recurrence uses {', '.join(unknown)}, which satchel "
                "does not support"
            )


def _convolution(
    place: Place, hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None,
    activation: str | None = None, **options: Any,
) -> torch.Tensor:  # fmt: skip
    """`causal_conv1d_fn`: [batch, channels, new] -> the same."""
    from transformers.activations import ACT2FN

    place.refuse(options)
    silu = activation in ("silu", "swish")
    x = hidden_states.transpose(1, 2)
    out: torch.Tensor = torch.ops.satchel.convolution(x, weight, bias, place.layer, silu).transpose(1, 2)
    if not silu and activation is not None:
        out = ACT2FN[activation](out)
    return out


def _delta_rule(
    place: Place, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, g: torch.Tensor, beta: torch.Tensor,
    use_qk_l2norm_in_kernel: bool = False, chunk_size: int = 0, **options: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """`torch_chunk_gated_delta_rule` and `chunk_kimi_delta_attention`; g as `satchel::Recurrence` has decay."""
    place.refuse(options)
    width = query.shape[-1]
    scale = width**-0.5
    if use_qk_l2norm_in_kernel:  # written as a root-mean-square norm, which is one operator
        query, key = (x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + 1e-6 / width) for x in (query, key))
        key, scale = key * scale, scale * scale
    out = torch.ops.satchel.recurrence(query, key, value, g, beta, place.layer, scale)
    return out, None


def _state_space(
    place: Place, hidden_states: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor,
    D: torch.Tensor | None = None, dt_bias: torch.Tensor | None = None, dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf), chunk_size: int = 0, **options: Any,
) -> torch.Tensor:  # fmt: skip
    """`mamba2_chunk_scan`: x [batch, new, heads, head_dim], dt [batch, new, heads], A and D [heads], B and C [batch,
    new, groups, state].

    A step h = exp(dt A) h + dt B x, y = C h + D x is a recurrence with the keys B, the values dt x and the queries C.
    """
    place.refuse(options)
    dt = dt if dt_bias is None else dt + dt_bias
    dt = torch.nn.functional.softplus(dt) if dt_softplus else dt
    if tuple(dt_limit) != (0.0, math.inf) or not dt_softplus:
        dt = dt.clamp(*(None if math.isinf(limit) else limit for limit in dt_limit))
    out: torch.Tensor = torch.ops.satchel.recurrence(
        C, B, hidden_states * dt[..., None], A * dt, None, place.layer, 1.0
    )
    return out if D is None else out + D[:, None] * hidden_states


def _selective_scan(
    place: Place, hidden_states: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor,
    D: torch.Tensor | None = None, z: torch.Tensor | None = None, delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False, use_mambapy: bool = False, use_associative_scan: bool = False, **options: Any,
) -> torch.Tensor:  # fmt: skip
    """`mamba_selective_scan`: x, dt and z [batch, channels, new], A [channels, state], B and C [batch, state, new], D
    and delta_bias [channels].

    The step is that of `_state_space`, with a head of one channel for each, and a decay for each number of its state.
    """
    place.refuse(options)
    x, dt, query, key = (each.transpose(1, 2) for each in (hidden_states, dt, C, B))
    dt = dt if delta_bias is None else dt + delta_bias
    dt = torch.nn.functional.softplus(dt) if delta_softplus else dt
    value, decay = (x * dt)[..., None], dt[..., None] * A
    out: torch.Tensor = torch.ops.satchel.recurrence(
        query[:, :, None], key[:, :, None], value, decay, None, place.layer, 1.0
    )[..., 0]
    out = out if D is None else out + x * D
    out = out if z is None else out * torch.nn.functional.silu(z.transpose(1, 2))
    return out.transpose(1, 2)


def _unmasked(place: Place, hidden_states: torch.Tensor, attention_mask: Any = None) -> torch.Tensor:
    """`apply_mask_to_padding_states`: no row is padded."""
    return hidden_states


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "apply_mask_to_padding_states": _unmasked,
    "causal_conv1d_fn": _convolution,
    "torch_chunk_gated_delta_rule": _delta_rule,
    "chunk_kimi_delta_attention": _delta_rule,
    "mamba2_chunk_scan": _state_space,
    "mamba_selective_scan": _selective_scan,
}
"""Replacements for functions of the modules of `transformers`, by their names there."""


def has_recurrences(module: torch.nn.Module) -> bool:
    """Whether a model's code has functions in `FUNCTIONS`."""
    return bool(_functions(module))


@contextlib.contextmanager
def replaced_functions(module: torch.nn.Module) -> Iterator[None]:
    """While it is entered, the Python modules of a model's parts have the functions in `FUNCTIONS`."""
    place, originals = Place(), _functions(module)
    layers = [part for part in module.modules() if isinstance(getattr(part, "layer_idx", None), int)]
    hooks = [part.register_forward_pre_hook(place.enter) for part in layers] if originals else []
    for home, name, _ in originals:
        setattr(home, name, functools.partial(FUNCTIONS[name], place))
    try:
        yield
    finally:
        for home, name, original in originals:
            setattr(home, name, original)
        for hook in hooks:
            hook.remove()


def _functions(module: torch.nn.Module) -> list[tuple[ModuleType, str, Callable[..., Any]]]:
    """(Python module, name, function) of all that is replaced."""
    names = sorted({type(part).__module__ for part in module.modules()})
    homes = [sys.modules[name] for name in names if name.startswith("transformers.")]
    return [(home, name, getattr(home, name)) for home in homes for name in FUNCTIONS if hasattr(home, name)]
