"""Placeholder operators in a traced graph, which a pass lowers later.

`satchel::Attention`: query [batch, heads, new, key_dim], key [batch, kv_heads, new, key_dim] and value [batch,
kv_heads, new, value_dim] of the new tokens -> [batch, new, heads, value_dim]. Attributes: layer, scale, window and
softcap, where 0 means none.

`satchel::Experts`: hidden [tokens, hidden], index and weights [tokens, k] of the chosen experts, gate_up [experts,
2 x inner, hidden], down [experts, hidden, inner] -> [tokens, hidden]. The activation is SiLU.
"""

from __future__ import annotations

from typing import Any

import onnx
import onnxscript
import torch

DOMAIN = "satchel"


@torch.library.custom_op("satchel::attention", mutates_args=())
def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int, scale: float, window: int, softcap: float
) -> torch.Tensor:
    """Attention of new tokens over all tokens so far; for tracing only."""
    raise RuntimeError("satchel::attention has no implementation in torch: it is a placeholder for a graph operator")


@attention.register_fake
def _(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int, scale: float, window: int, softcap: float
) -> torch.Tensor:
    batch, heads, new, _ = query.shape
    return query.new_empty(batch, new, heads, value.shape[-1])


@torch.library.custom_op("satchel::experts", mutates_args=())
def experts(
    hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """Weighted sum over each token's chosen experts; for tracing only."""
    raise RuntimeError("satchel::experts has no implementation in torch: it is a placeholder for a graph operator")


@experts.register_fake
def _(
    hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    return torch.empty_like(hidden)


def _operator(
    name: str, inputs: dict[str, str], attributes: dict[str, onnx.defs.OpSchema.AttrType]
) -> onnxscript.values.Op:
    schema = onnx.defs.OpSchema(
        name, DOMAIN, 1,
        inputs=[onnx.defs.OpSchema.FormalParameter(n, t) for n, t in inputs.items()],
        outputs=[onnx.defs.OpSchema.FormalParameter("output", "T")],
        type_constraints=[("T", ["tensor(float)"], "")],
        attributes=[onnx.defs.OpSchema.Attribute(n, t, required=True) for n, t in attributes.items()],
    )  # fmt: skip
    return onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, 1), name, schema)


_STANDARD: Any = onnxscript.opset18
_FLOAT, _INT = onnx.defs.OpSchema.AttrType.FLOAT, onnx.defs.OpSchema.AttrType.INT
_ATTENTION = _operator(
    "Attention",
    {"query": "T", "key": "T", "value": "T"},
    {"layer": _INT, "scale": _FLOAT, "window": _INT, "softcap": _FLOAT},
)
_EXPERTS = _operator(
    "Experts", {"hidden": "T", "index": "tensor(int64)", "weights": "T", "gate_up": "T", "down": "T"}, {}
)


def _translate_attention(
    query: Any, key: Any, value: Any, layer: int, scale: float, window: int, softcap: float
) -> Any:
    return _ATTENTION(query, key, value, layer=layer, scale=scale, window=window, softcap=softcap)


def _translate_experts(hidden: Any, index: Any, weights: Any, gate_up: Any, down: Any) -> Any:
    return _EXPERTS(hidden, index, weights, gate_up, down)


def _translate_repeat_interleave(x: Any, repeats: int, dim: int | None = None, output_size: int | None = None) -> Any:
    """Repeat each channel `repeats` times with a Gather: the default with Expand leaves values of unknown shape."""
    size = None if dim is None or x.shape is None else x.shape[dim]
    if not isinstance(size, int):
        raise NotImplementedError("repeat_interleave along an axis of unknown size")
    index = [channel for channel in range(size) for _ in range(repeats)]
    return _STANDARD.Gather(x, _STANDARD.Constant(value_ints=index), axis=dim)


TRANSLATIONS: dict[Any, Any] = {
    torch.ops.aten.repeat_interleave.self_int: _translate_repeat_interleave,
    torch.ops.satchel.attention.default: _translate_attention,
    torch.ops.satchel.experts.default: _translate_experts,
}
"""Passed to `torch.onnx.export(custom_translation_table=...)`."""
