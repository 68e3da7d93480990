"""Checks that a traced graph is a decoder that works with a KV cache, and refuses any other by name."""

from __future__ import annotations

import itertools
import math

import onnx_ir as ir

from satchel.export.errors import ExportError
from satchel.graphs.ir.inputs import graph_input
from satchel.graphs.ir.values import INTERNAL, constant, nodes, rank, weight
from satchel.runtime.bundle.contract import ATTENTION_MASK

EACH_ELEMENT = frozenset(
    """
    Abs Add And Cast CastLike Ceil Clip Cos Div Elu Equal Erf Exp Expand Floor Gelu Greater GreaterOrEqual HardSigmoid
    HardSwish Identity IsNaN LeakyRelu Less LessOrEqual Log Max Min Mish Mod Mul Neg Not Or Pow Reciprocal Relu Round
    Sigmoid Sign Sin Softplus Softsign Sqrt Sub Swish Tan Tanh Where Xor
    """.split()  # noqa: SIM905
)
MOVES = frozenset(
    """
    ConstantOfShape Constant Shape Squeeze Tile Transpose Unsqueeze
    """.split()  # noqa: SIM905
)
ALONG_AN_AXIS = frozenset(("Concat", "Gather", "Slice", "Split"))
RESHAPES = frozenset(("Flatten", "Reshape"))
ON_CHANNELS = frozenset(
    """
    ArgMax GatherElements LayerNormalization LogSoftmax OneHot ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin
    ReduceSum ReduceSumSquare RMSNormalization ScatterElements Softmax TopK
    """.split()  # noqa: SIM905
)
LENGTH_ARITHMETIC = frozenset(
    ("Add", "Cast", "Concat", "Div", "Gather", "Mul", "Reshape", "Slice", "Squeeze", "Sub", "Unsqueeze")
)
MATMULS = frozenset(("MatMul", "Gemm"))


def check_sound(model: ir.Model, name: str, layers: int | None) -> None:
    """Check that tokens interact only in attention, once per layer, and that nothing else reads the padding mask.

    Args:
        model: The traced and normalized graph, with its internal Attention operators.
        name: The model's name for messages.
        layers: The number of attention layers in the config, if known.

    Raises:
        ExportError: One of these conditions does not hold.
    """
    found = sorted(int(n.attributes["layer"].value) for n in nodes(model, "Attention", INTERNAL))
    expected = list(range(len(found) if layers is None else layers))
    if found != expected or not found:
        raise ExportError(
            f"{name}: {len(found)} attention layers were traced (indices {found}) where {len(expected)} are expected: "
            "the model has custom attention code or unusual layers (recurrent, linear, shared), "
            "which satchel does not support"
        )
    if _reads_values(graph_input(model, ATTENTION_MASK)):
        raise ExportError(
            f"{name}: the model uses the padding mask outside its attention, which satchel does not support"
        )
    for node in model.graph:
        reason = _mixes_tokens(node)
        if reason:
            raise ExportError(
                f"{name}: {reason} (node {node.name}); a model in which tokens interact outside attention does not "
                "work with a KV cache, so it is not exported"
            )


def _mixes_tokens(node: ir.Node) -> str | None:
    """Why this node might mix tokens, or None."""
    kind = node.op_type
    if kind == "Cast" and node.domain == "" and _to_float(node) and _is_length(node.inputs[0]):
        return "a sequence length is used as a value"
    if node.domain == INTERNAL or kind in EACH_ELEMENT:
        return None
    if node.domain != "":
        return f"the operator {node.domain}::{kind} is unknown"
    if kind in RESHAPES:
        return None if _keeps_tokens_apart(node) else f"{kind} merges or splits tokens"
    if kind in ALONG_AN_AXIS:
        return _moves_tokens(node)
    if kind in MOVES:
        return None
    if kind in MATMULS:
        fixed = weight(node.inputs[1]) is not None or constant(node.inputs[1]) is not None
        fixed = fixed or all(_is_fixed(value, -1) and _is_fixed(value, -2) for value in node.inputs[:2])
        return None if fixed else f"{kind} multiplies two computed tensors"
    if kind in ON_CHANNELS:
        return None if _on_channels(node) else f"{kind} works along an axis other than the channels"
    return f"the operator {kind} may work across tokens"


def _moves_tokens(node: ir.Node) -> str | None:
    """Why a Slice, Split, Concat or Gather might move tokens, or None: it does so along the token axis."""
    data = node.inputs[0]
    alike = (*node.outputs, *node.inputs) if node.op_type == "Concat" else (data,)
    ndim = next((n for n in map(rank, alike) if n is not None), None)
    if ndim is not None and ndim <= 1:
        return None  # such vectors are shape arithmetic; tokens have a batch axis in front
    if node.op_type == "Slice":
        axes = constant(node.inputs[3]) if len(node.inputs) > 3 else None
        cut = [] if axes is None else [int(a) for a in axes]
    else:
        cut = [int(node.attributes["axis"].value) if "axis" in node.attributes else 0]
    if not cut or ndim is None:
        return f"{node.op_type} is along an unknown axis"
    # The size of concatenated channels is static; that of concatenated tokens is symbolic.
    if not all(_is_fixed(node.outputs[0] if node.op_type == "Concat" else data, axis) for axis in cut):
        return f"{node.op_type} is along the token axis"
    return None


def _keeps_tokens_apart(node: ir.Node) -> bool:
    """Whether the numbers of channels in front of the tokens and behind them are unchanged."""
    before, after = (_channels(v) for v in (node.inputs[0], node.outputs[0]))
    return rank(node.inputs[0]) == 0 or (before is not None and before == after)


def _channels(value: ir.Value | None) -> tuple[int, int] | None:
    """The products of the dimensions before the first symbolic one and after the last."""
    if value is None or value.shape is None:
        return None
    products = []
    for dims in (value.shape.dims, reversed(value.shape.dims)):
        products.append(
            math.prod(d for d in itertools.takewhile(lambda d: isinstance(d, int), dims) if isinstance(d, int))
        )
    return products[0], products[1]


def _is_fixed(value: ir.Value | None, axis: int) -> bool:
    dims = () if value is None or value.shape is None else value.shape.dims
    return -len(dims) <= axis < len(dims) and isinstance(dims[axis], int)


def _on_channels(node: ir.Node) -> bool:
    ndim = rank(node.inputs[0])
    last = (-1,) if ndim is None else (-1, ndim - 1)
    if node.op_type.startswith("Reduce"):
        axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        return axes is not None and all(_is_fixed(node.inputs[0], int(axis)) for axis in axes.reshape(-1))
    if not _is_fixed(node.inputs[0], -1):
        return False
    if "axis" not in node.attributes:
        return node.op_type not in ("ArgMax", "GatherElements", "ScatterElements")
    return int(node.attributes["axis"].value) in last


def _reads_values(mask: ir.Value) -> bool:
    """Whether anything but the batch size of the padding mask is used."""
    return any(
        use.node.op_type != "Shape"
        or {name: use.node.attributes[name].value for name in use.node.attributes}
        not in ({"start": 0, "end": 1}, {"end": 1})
        for use in mask.uses()
    )


def _to_float(cast: ir.Node) -> bool:
    return ir.DataType(int(cast.attributes["to"].value)).is_floating_point()


def _batch_only(shape: ir.Node) -> bool:
    start, end = (shape.attributes[n].value if n in shape.attributes else None for n in ("start", "end"))
    return (start or 0) == 0 and end == 1


def _is_length(value: ir.Value | None) -> bool:
    """Whether the value derives from a tensor's shape, beyond its batch size, by integer arithmetic only."""
    waiting, seen = [value], set[int]()
    while waiting:
        value = waiting.pop()
        maker = value.producer() if value is not None else None
        if maker is None or id(maker) in seen:
            continue
        seen.add(id(maker))
        if maker.op_type == "Shape" and not _batch_only(maker):
            return True
        if maker.op_type in LENGTH_ARITHMETIC:
            waiting.extend(maker.inputs)
    return False
