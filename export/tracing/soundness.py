"""Checks that a traced graph is a decoder that works with a KV cache, and refuses any other by name."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

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

ATTENTION, CONVOLUTION, RECURRENCE = MEETINGS = ("Attention", "Convolution", "Recurrence")
"""The internal operators in which tokens meet: each keeps what it needs of earlier ones in a cache or a state."""

PROMISED: Mapping[str, frozenset[str]] = {
    **dict.fromkeys(("full_attention", "sliding_attention", "chunked_attention"), frozenset((ATTENTION,))),
    **dict.fromkeys(("hybrid", "hybrid_sliding"), frozenset((ATTENTION, RECURRENCE))),
    **dict.fromkeys(("linear_attention", "mamba"), frozenset((RECURRENCE,))),
    **dict.fromkeys(("mlp", "moe"), frozenset[str]()),
    "conv": frozenset((CONVOLUTION,)),
}
"""By a layer's kind in the config, the operators that it has; a recurrence may have a convolution in front."""


def check_sound(model: ir.Model, name: str, layers: int | None, kinds: Sequence[str] = ()) -> None:
    """Check that tokens meet only in attention, causal convolutions and linear recurrences, each once per layer and in
    the layers for which the config has it, and that nothing else reads the padding mask.

    Args:
        model: The traced and normalized graph, with its internal operators.
        name: The model's name for messages.
        layers: The number of layers in the config, if known.
        kinds: The kind of each layer in the config (`layer_types`), if it has them.

    Raises:
        ExportError: One of these conditions does not hold.
    """
    _check_layers(model, name, layers, kinds)
    if _reads_values(graph_input(model, ATTENTION_MASK)):
        raise ExportError(
            f"{name}: the model uses the padding mask outside its attention, which satchel does not support"
        )
    for node in model.graph:
        reason = _mixes_tokens(node)
        if reason:
            raise ExportError(
                f"{name}: {reason} (node {node.name}); a model in which tokens interact outside attention and linear "
                "recurrences does not work with a cache, so it is not exported"
            )


def _check_layers(model: ir.Model, name: str, layers: int | None, kinds: Sequence[str]) -> None:
    """Check that each layer has the operators in which tokens meet that are expected of it."""
    found = {kind: sorted(int(n.attributes["layer"].value) for n in nodes(model, kind, INTERNAL)) for kind in MEETINGS}
    count = len({layer for traced in found.values() for layer in traced}) if layers is None else layers
    for kind, expected in _expected(found, count, kinds).items():
        if found[kind] != expected or not any(found.values()):
            raise ExportError(
                f"{name}: {len(found[kind])} {kind.lower()} layers were traced (indices {found[kind]}) where "
                f"{len(expected)} are expected{f' (indices {expected})' if kinds else ''}: the model has custom code "
                "for them or unusual layers (shared, sparse), which satchel does not support"
            )


def _expected(found: Mapping[str, list[int]], count: int, kinds: Sequence[str]) -> dict[str, list[int]]:
    """The layers that should have each operator; without kinds in the config, attention where no state is kept."""
    promised = [PROMISED.get(kind, frozenset[str]()) for kind in kinds]
    if len(promised) == count and all(kind in PROMISED for kind in kinds):
        expected = {kind: [i for i, ours in enumerate(promised) if kind in ours] for kind in MEETINGS}
        before = {*found[CONVOLUTION]}.intersection(expected[RECURRENCE])
        return expected | {CONVOLUTION: sorted({*expected[CONVOLUTION], *before})}
    states = {kind: sorted({*found[kind]}) for kind in (CONVOLUTION, RECURRENCE)}
    kept = {layer for layers in states.values() for layer in layers}
    beside = kept.intersection(found[ATTENTION])
    return {ATTENTION: [layer for layer in range(count) if layer not in kept or layer in beside], **states}


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
