"""Checks that a traced graph is a decoder that a KV cache can serve; what is not is refused by name, never exported
wrong.
"""

from __future__ import annotations

import onnx_ir as ir

from satchel.export.errors import ExportError
from satchel.graphs import signature
from satchel.graphs.values import INTERNAL, constant, nodes, rank, weight

EACH_ELEMENT = frozenset(
    """
    Abs Add And Cast CastLike Ceil Clip Cos Div Elu Equal Erf Exp Expand Floor Gelu Greater GreaterOrEqual HardSigmoid
    HardSwish Identity IsNaN LeakyRelu Less LessOrEqual Log Max Min Mish Mod Mul Neg Not Or Pow Reciprocal Relu Round
    Sigmoid Sign Sin Softplus Softsign Sqrt Sub Swish Tan Tanh Where Xor
    """.split()  # noqa: SIM905
)
MOVES = frozenset(
    """
    Concat ConstantOfShape Constant Flatten Gather Reshape Shape Slice Split Squeeze Tile Transpose Unsqueeze
    """.split()  # noqa: SIM905
)
LAST_AXIS = frozenset(
    """
    ArgMax GatherElements LayerNormalization LogSoftmax OneHot ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin
    ReduceSum ReduceSumSquare RMSNormalization ScatterElements Softmax TopK
    """.split()  # noqa: SIM905
)
PRODUCTS = frozenset(("MatMul", "Gemm"))


def check_sound(model: ir.Model, name: str, layers: int | None) -> None:
    """Check that attention is the only place where tokens meet, that each layer has it once, and that no padding mask
    is read elsewhere.

    Args:
        model: The traced and normalised graph, with its internal Attention operators.
        name: What to call the model in messages.
        layers: How many attention layers the configuration promises, if it does.

    Raises:
        ExportError: One of these does not hold.
    """
    found = sorted(int(n.attributes["layer"].value) for n in nodes(model, "Attention", INTERNAL))
    expected = list(range(len(found) if layers is None else layers))
    if found != expected or not found:
        raise ExportError(
            f"{name}: {len(found)} attention layers were traced (indices {found}) where {len(expected)} are expected: "
            "the model has attention code or layers of its own kind (recurrent, linear, shared), "
            "which satchel does not support"
        )
    if signature.graph_input(model, signature.ATTENTION_MASK).uses():
        raise ExportError(
            f"{name}: the model computes with the padding mask outside its attention, which satchel does not support"
        )
    for node in model.graph:
        reason = _mixes_tokens(node)
        if reason:
            raise ExportError(
                f"{name}: {reason} (node {node.name}); a model in which tokens meet outside its attention cannot be "
                "cached, so it is not exported"
            )


def _mixes_tokens(node: ir.Node) -> str | None:
    """Why this node may let one token see another, or None."""
    kind = node.op_type
    if node.domain == INTERNAL or kind in EACH_ELEMENT:
        return None
    if node.domain != "":
        return f"the operator {node.domain}::{kind} is not known"
    if kind in MOVES:
        return _moves_tokens(node)
    if kind in PRODUCTS:
        return (
            None
            if weight(node.inputs[1]) is not None or constant(node.inputs[1]) is not None
            else f"{kind} multiplies two computed tensors"
        )
    if kind in LAST_AXIS:
        return None if _on_last_axis(node) else f"{kind} works across another axis than the last"
    return f"the operator {kind} may work across tokens"


def _moves_tokens(node: ir.Node) -> str | None:
    """Slices, splits and joins along the axis of the tokens change which token a row is."""
    if node.op_type not in ("Slice", "Split", "Concat") or _is_integer(node):
        return None
    ndim = rank(node.inputs[0])
    if node.op_type == "Slice":
        axes = constant(node.inputs[3]) if len(node.inputs) > 3 else None
        cut = [] if axes is None or ndim is None else [int(a) % ndim for a in axes]
    else:
        axis = node.attributes["axis"].value if "axis" in node.attributes else 0
        cut = [] if ndim is None else [int(axis) % ndim]
    if not cut:
        return f"{node.op_type} is along an axis that is not known"
    if (
        ndim is not None
        and ndim > 1
        and any(a <= (1 if ndim > 2 else 0) and _has_tokens(node.inputs[0], a) for a in cut)
    ):
        return f"{node.op_type} is along the axis of the tokens"
    return None


def _has_tokens(value: ir.Value | None, axis: int) -> bool:
    return value is None or value.shape is None or not isinstance(value.shape[axis], int)


def _is_integer(node: ir.Node) -> bool:
    dtype = node.outputs[0].dtype
    return dtype is not None and dtype in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)


def _on_last_axis(node: ir.Node) -> bool:
    ndim = rank(node.inputs[0])
    last = (-1,) if ndim is None else (-1, ndim - 1)
    if node.op_type.startswith("Reduce"):
        axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        return axes is not None and axes.size == 1 and int(axes.reshape(())) in last
    if "axis" not in node.attributes:
        return node.op_type not in ("ArgMax", "GatherElements", "ScatterElements")
    return int(node.attributes["axis"].value) in last
