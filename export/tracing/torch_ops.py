"""Placeholder operators in a traced graph, which a pass lowers later.

`satchel::Attention`: query [batch, heads, new, key_dim], key [batch, kv_heads, new, key_dim] and value [batch,
kv_heads, new, value_dim] of the new tokens, and optionally sinks [heads], a logit of each head that takes part in the
softmax and has no value -> [batch, new, heads, value_dim]. Attributes: layer, scale, window (the last positions that a
token sees), chunk (it sees its own chunk of so many positions) and softcap, where 0 means none.

`satchel::Experts`: hidden [tokens, hidden], index and weights [tokens, k] of the chosen experts, gate_up [experts,
2 x inner, hidden], down [experts, hidden, inner], and optionally a bias of each, [experts, 2 x inner] and [experts,
hidden] -> [tokens, hidden]. The gate is g * sigmoid(alpha * g) * (u + beta) with g at most `limit` and u within -limit
and limit (0: no limit). Attributes: alpha, beta, limit; interleaved, where gates and ups alternate in gate_up; and
transposed, where the last two axes of both matrices are the other way round.

`satchel::RotaryRows`: positions [batch, sequence] int64 -> their rows in a rotary table of two blocks: that of texts of
up to `border` tokens begins at row 0, that of longer ones at row `border`.

`satchel::Convolution`: x [batch, new, channels], weight [channels, width] and optionally bias [channels] -> [batch,
new, channels]: each channel on its own, over the token and the width - 1 tokens before it. Attributes: layer, and silu
for that activation of the result.

`satchel::Recurrence`: query and key [batch, new, key_heads, key_dim], value [batch, new, heads, value_dim], and
optionally decay [batch, new, heads] or [batch, new, heads, key_dim], a logarithm, and beta [batch, new, heads] ->
[batch, new, heads, value_dim]. A head's state [key_dim, value_dim] is multiplied by exp(decay) at each token, and takes
the product of key and value in; with beta, beta times the product of key and what value has beyond the state's own
answer to that key. The result is scale times the state's answer to the query. Attributes: layer and scale.

`satchel::Mark`: x -> x. `satchel::Layer`: all tensors that a layer is given -> its result. `repeated_layers` has them
replaced before any pass. Attributes: kind, place; and kind, name.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import onnx
import onnxscript
import torch

DOMAIN = "satchel"
SINGLE, OPTIONAL, VARIADIC = (
    getattr(onnx.defs.OpSchema.FormalParameterOption, name) for name in ("Single", "Optional", "Variadic")
)


@torch.library.custom_op("satchel::attention", mutates_args=())
def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None,
    layer: int, scale: float, window: int, chunk: int, softcap: float,
) -> torch.Tensor:  # fmt: skip
    """Attention of new tokens over all tokens so far; for tracing only."""
    raise RuntimeError("satchel::attention has no implementation in torch: it is a placeholder for a graph operator")


@attention.register_fake
def _(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None,
    layer: int, scale: float, window: int, chunk: int, softcap: float,
) -> torch.Tensor:  # fmt: skip
    batch, heads, new, _ = query.shape
    return query.new_empty(batch, new, heads, value.shape[-1])


@torch.library.custom_op("satchel::experts", mutates_args=())
def experts(
    hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor,
    gate_up_bias: torch.Tensor | None, down_bias: torch.Tensor | None,
    alpha: float, beta: float, limit: float, interleaved: bool, transposed: bool,
) -> torch.Tensor:  # fmt: skip
    """Weighted sum over each token's chosen experts; for tracing only."""
    raise RuntimeError("satchel::experts has no implementation in torch: it is a placeholder for a graph operator")


@experts.register_fake
def _(hidden: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(hidden)


@torch.library.custom_op("satchel::rotary_rows", mutates_args=())
def rotary_rows(positions: torch.Tensor, border: int) -> torch.Tensor:
    """The rows of a rotary table for positions of a text of any length; for tracing only."""
    raise RuntimeError("satchel::rotary_rows has no implementation in torch: it is a placeholder for a graph operator")


@rotary_rows.register_fake
def _(positions: torch.Tensor, border: int) -> torch.Tensor:
    return torch.empty_like(positions)


@torch.library.custom_op("satchel::convolution", mutates_args=())
def convolution(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, layer: int, silu: bool
) -> torch.Tensor:
    """Causal convolution of each channel over all tokens so far; for tracing only."""
    raise RuntimeError("satchel::convolution has no implementation in torch: it is a placeholder for a graph operator")


@convolution.register_fake
def _(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("satchel::recurrence", mutates_args=())
def recurrence(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: torch.Tensor | None, beta: torch.Tensor | None,
    layer: int, scale: float,
) -> torch.Tensor:  # fmt: skip
    """Linear recurrence over all tokens so far; for tracing only."""
    raise RuntimeError("satchel::recurrence has no implementation in torch: it is a placeholder for a graph operator")


@recurrence.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> torch.Tensor:
    return value.new_empty(value.shape)


@torch.library.custom_op("satchel::mark", mutates_args=())
def mark(x: torch.Tensor, kind: int, place: int) -> torch.Tensor:
    """A tensor that a layer is given or gives; for tracing only."""
    raise RuntimeError("satchel::mark has no implementation in torch: it is a placeholder for a graph operator")


@mark.register_fake
def _(x: torch.Tensor, kind: int, place: int) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("satchel::layer", mutates_args=())
def layer(given: Sequence[torch.Tensor], kind: int, name: str) -> torch.Tensor:
    """A layer that is the same program as another; for tracing only."""
    raise RuntimeError("satchel::layer has no implementation in torch: it is a placeholder for a graph operator")


@layer.register_fake
def _(given: Sequence[torch.Tensor], kind: int, name: str) -> torch.Tensor:
    return torch.empty_like(given[0])


def _operator(
    name: str,
    inputs: dict[str, str],
    attributes: dict[str, onnx.defs.OpSchema.AttrType],
    optional: Collection[str] = (),
    elements: Sequence[str] = ("tensor(float)",),
    any_number: bool = False,
) -> onnxscript.values.Op:
    option = VARIADIC if any_number else SINGLE
    parameters = [
        onnx.defs.OpSchema.FormalParameter(
            n, t, param_option=OPTIONAL if n in optional else option, is_homogeneous=not any_number
        )
        for n, t in inputs.items()
    ]
    schema = onnx.defs.OpSchema(
        name, DOMAIN, 1, inputs=parameters, outputs=[onnx.defs.OpSchema.FormalParameter("output", "T")],
        type_constraints=[("T", list(elements), "")],
        attributes=[onnx.defs.OpSchema.Attribute(n, t, required=True) for n, t in attributes.items()],
    )  # fmt: skip
    return onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, 1), name, schema)


_STANDARD: Any = onnxscript.opset18
_FLOAT, _INT = onnx.defs.OpSchema.AttrType.FLOAT, onnx.defs.OpSchema.AttrType.INT
_TEXT = onnx.defs.OpSchema.AttrType.STRING
_ATTENTION = _operator(
    "Attention",
    {"query": "T", "key": "T", "value": "T", "sinks": "T"},
    {"layer": _INT, "scale": _FLOAT, "window": _INT, "chunk": _INT, "softcap": _FLOAT},
    optional=("sinks",),
)
_EXPERTS = _operator(
    "Experts",
    {
        "hidden": "T", "index": "tensor(int64)", "weights": "T", "gate_up": "T", "down": "T", "gate_up_bias": "T",
        "down_bias": "T",
    },
    {"alpha": _FLOAT, "beta": _FLOAT, "limit": _FLOAT, "interleaved": _INT, "transposed": _INT},
    optional=("gate_up_bias", "down_bias"),
)  # fmt: skip
_CONVOLUTION = _operator(
    "Convolution", {"x": "T", "weight": "T", "bias": "T"}, {"layer": _INT, "silu": _INT}, optional=("bias",)
)
_RECURRENCE = _operator(
    "Recurrence",
    {"query": "T", "key": "T", "value": "T", "decay": "T", "beta": "T"},
    {"layer": _INT, "scale": _FLOAT},
    optional=("decay", "beta"),
)

_ANY = [f"tensor({kind})" for kind in ("float", "float16", "bfloat16", "double", "int64", "int32", "bool")]
_MARK = _operator("Mark", {"x": "T"}, {"kind": _INT, "place": _INT}, elements=_ANY)
_LAYER = _operator("Layer", {"given": "T"}, {"kind": _INT, "name": _TEXT}, elements=_ANY, any_number=True)
_ROTARY_ROWS = _operator("RotaryRows", {"positions": "T"}, {"border": _INT}, elements=("tensor(int64)",))


def _translate_attention(
    query: Any, key: Any, value: Any, sinks: Any, layer: int, scale: float, window: int, chunk: int, softcap: float
) -> Any:
    inputs = [query, key, value] if sinks is None else [query, key, value, sinks]
    return _ATTENTION(*inputs, layer=layer, scale=scale, window=window, chunk=chunk, softcap=softcap)


def _translate_experts(
    hidden: Any, index: Any, weights: Any, gate_up: Any, down: Any, gate_up_bias: Any, down_bias: Any,
    alpha: float, beta: float, limit: float, interleaved: bool, transposed: bool,
) -> Any:  # fmt: skip
    biases = [] if gate_up_bias is None else [gate_up_bias, down_bias]
    return _EXPERTS(
        hidden, index, weights, gate_up, down, *biases,
        alpha=alpha, beta=beta, limit=limit, interleaved=int(interleaved), transposed=int(transposed),
    )  # fmt: skip


def _translate_convolution(x: Any, weight: Any, bias: Any, layer: int, silu: bool) -> Any:
    return _CONVOLUTION(x, weight, *([] if bias is None else [bias]), layer=layer, silu=int(silu))


def _translate_recurrence(query: Any, key: Any, value: Any, decay: Any, beta: Any, layer: int, scale: float) -> Any:
    further = [decay, beta] if beta is not None else [decay] if decay is not None else []
    return _RECURRENCE(query, key, value, *further, layer=layer, scale=scale)


def _translate_repeat_interleave(x: Any, repeats: int, dim: int | None = None, output_size: int | None = None) -> Any:
    """Repeat each channel `repeats` times with a Gather: the default with Expand leaves values of unknown shape."""
    size = None if dim is None or x.shape is None else x.shape[dim]
    if not isinstance(size, int):
        raise NotImplementedError("repeat_interleave along an axis of unknown size")
    index = [channel for channel in range(size) for _ in range(repeats)]
    return _STANDARD.Gather(x, _STANDARD.Constant(value_ints=index), axis=dim)


def _translate_slice_scatter(
    x: Any, source: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Any:
    """Put `source` between the slices of x around it: the default scatters by computed indices."""
    size = None if x.shape is None else x.shape[dim]
    if not isinstance(size, int) or step != 1:
        raise NotImplementedError("slice_scatter along an axis of unknown size, or in steps")
    first, last, _ = slice(start, end).indices(size)
    parts = [(0, first), None, (last, size)]
    values = [
        source if part is None else _slice(x, *part, dim) for part in parts if part is None or part[0] < part[1]
    ]  # fmt: skip
    return _STANDARD.Concat(*values, axis=dim) if len(values) > 1 else source


def _translate_softplus(x: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
    """One Softplus: the default divides by `beta`, and is linear beyond the threshold, where both are alike."""
    if beta != 1.0 or threshold < 20.0:
        raise NotImplementedError("softplus with a factor")
    return _STANDARD.Softplus(x)


def _slice(x: Any, start: int, end: int, axis: int) -> Any:
    bounds = [_STANDARD.Constant(value_ints=[number]) for number in (start, end, axis)]
    return _STANDARD.Slice(x, *bounds)


TRANSLATIONS: dict[Any, Any] = {
    torch.ops.aten.repeat_interleave.self_int: _translate_repeat_interleave,
    torch.ops.aten.slice_scatter.default: _translate_slice_scatter,
    torch.ops.aten.softplus.default: _translate_softplus,
    torch.ops.satchel.attention.default: _translate_attention,
    torch.ops.satchel.experts.default: _translate_experts,
    torch.ops.satchel.mark.default: lambda x, kind, place: _MARK(x, kind=kind, place=place),
    torch.ops.satchel.layer.default: lambda given, kind, name: _LAYER(*given, kind=kind, name=name),
    torch.ops.satchel.rotary_rows.default: lambda positions, border: _ROTARY_ROWS(positions, border=border),
    torch.ops.satchel.convolution.default: _translate_convolution,
    torch.ops.satchel.recurrence.default: _translate_recurrence,
}
"""Passed to `torch.onnx.export(custom_translation_table=...)`."""
