"""satchel's own operators in plain numpy, as their contract reads, and a way to run graphs that hold them.

Nothing here is shared with what packs the panels or with the kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import erf
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from support.graphs import attention, rotated, serialized

Array = np.ndarray[Any, Any]
Optional = Array | None

MIDDLE = {8: 128, 4: 8}


def place(output: int, outputs: int, gated: bool) -> tuple[int, int]:
    """(panel, lane) of an output."""
    if not gated:
        return output // 16, output % 16
    side, index = divmod(output, outputs // 2)
    return 2 * (index // 16) + side, index % 16


def unpacked(panels: Array, outputs: int, inputs: int, bits: int, gated: bool = False) -> Array:
    """Codes [outputs, inputs] uint8 of panels [panels, bytes]."""
    codes = np.empty((outputs, inputs), np.uint8)
    for output in range(outputs):
        panel, lane = place(output, outputs, gated)
        if bits == 8:
            codes[output] = panels[panel].reshape(-1, 16, 4)[:, lane].reshape(-1)[:inputs]
        else:
            four = panels[panel].reshape(-1, 64)[:, 4 * lane : 4 * lane + 4]
            codes[output] = np.concatenate([four & 15, four >> 4], axis=1).reshape(-1)
    return codes


def lanes(array: Array, outputs: int, gated: bool = False) -> Array:
    """What panels have by output, such as scales, [outputs, n] of [panels, n, 16]."""
    return np.stack([array[panel, :, lane] for panel, lane in (place(o, outputs, gated) for o in range(outputs))])


LEVELS, FINE_LEVELS = 127, 127 * 256
"""The largest whole number of a row of a prompt, and of a row with one scale that is the only new token."""


def rounded_rows(x: Array, block: int, levels: int = LEVELS) -> Array:
    """Rows [rows, inputs] as whole numbers times a step for each row, or each block of a row."""
    parts = x.reshape(len(x), -1, block or x.shape[1])
    step = np.maximum(np.abs(parts).max(-1, keepdims=True), 1e-10) / levels
    return (np.rint(parts / step).astype(np.float64) * step).reshape(x.shape)


def mixed(x: Array, size: int) -> Array:
    """Each run of `size` inputs times the Hadamard matrix of Sylvester's construction / sqrt(size)."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.kron(np.asarray([[1, 1], [1, -1]]), matrix)
    return (x.reshape(-1, size) @ (matrix / np.sqrt(size)).astype(x.dtype)).reshape(x.shape)


ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * (1 + np.vectorize(erf)(x / np.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: np.maximum(x, 0),
}


class Linear(OpRun):
    op_domain: ClassVar[str] = "satchel"

    def _run(
        self, x: Array, codes: Array, scales: Optional = None, zero_points: Optional = None, bias: Optional = None,
        residual: Optional = None, gain: Optional = None, offsets: Optional = None, **options: Any,
    ) -> tuple[Array]:  # fmt: skip
        inputs, outputs, bits, block = (options[name] for name in ("inputs", "outputs", "bits", "block"))
        gate, epsilon, hadamard = options.get("gate", ""), options.get("epsilon", 0.0), options.get("hadamard", 0)
        assert x.dtype == np.float32
        assert x.shape[-1] == inputs
        rows = x.reshape(-1, inputs)
        if epsilon:
            rows = rows / np.sqrt((rows * rows).mean(-1, keepdims=True) + np.float32(epsilon))
            rows = rows if gain is None else rows * gain
        else:
            assert gain is None
        rows = mixed(rows, hadamard) if hadamard else rows
        if bits == 16:
            assert scales is None
            by_panel = codes.view(np.float16).reshape(len(codes), inputs, 16).astype(np.float64)
            weight = lanes(by_panel, outputs, bool(gate))
        else:
            assert scales is not None
            rows = rounded_rows(rows, block)
            points = MIDDLE[bits] if zero_points is None else lanes(zero_points, outputs, bool(gate))[..., None]
            whole = unpacked(codes, outputs, inputs, bits, bool(gate)).reshape(outputs, scales.shape[1], -1)
            steps = lanes(scales, outputs, bool(gate))[..., None].astype(np.float64)
            weight = (whole.astype(np.float64) - points) * steps
        y = rows @ weight.reshape(outputs, inputs).T
        y = y if bias is None else y + bias
        if gate:
            first, second = np.split(y, 2, axis=-1)
            y = ACTIVATIONS[gate](first) * second
        y = y.reshape(*x.shape[:-1], -1)
        if residual is not None:
            assert residual.shape == y.shape
            y = y + residual
        return (y.astype(np.float32),)


class TableLinear(OpRun):
    op_domain: ClassVar[str] = "satchel"

    def _run(
        self, x: Array, codes: Array, scales: Optional = None, *, inputs: int, outputs: int, block: int
    ) -> tuple[Array]:
        if not block:
            assert (codes.dtype, codes.shape, scales) == (np.float16, (outputs, inputs), None)
            return ((x.astype(np.float64) @ codes.T.astype(np.float64)).astype(np.float32),)
        assert codes.shape == (outputs, inputs // block, block)
        assert scales is not None
        weight = ((codes.astype(np.float64) - 128) * scales[..., None]).reshape(outputs, inputs)
        y = rounded_rows(x.reshape(-1, inputs), block) @ weight.T
        return (y.reshape(*x.shape[:-1], outputs).astype(np.float32),)


class GatherBlockQuantized(OpRun):
    op_domain: ClassVar[str] = "com.microsoft"

    def _run(self, codes: Array, ids: Array, scales: Array, points: Optional = None, **options: Any) -> tuple[Array]:
        bits, groups = options["bits"], scales.shape[1]

        def unpacked(rows: Array, count: int) -> Array:
            return (
                rows
                if bits == 8
                else np.stack([rows & 15, rows >> 4], axis=-1).reshape(*rows.shape[:-1], -1)[..., :count]
            )

        rows = unpacked(codes, groups * options["block_size"])[ids].reshape(*ids.shape, groups, -1)
        middle = MIDDLE[bits] if points is None else unpacked(points, groups)[ids][..., None]
        found = (rows.astype(np.float64) - middle) * scales[ids][..., None]
        return (found.reshape(*ids.shape, -1).astype(np.float32),)


class Attention(OpRun):
    op_domain: ClassVar[str] = "satchel"

    def _run(
        self, query: Array, key: Optional, value: Optional, past_key: Array, past_value: Array, seqlens: Array,
        total: Array, cos: Optional = None, sin: Optional = None, rows: Optional = None, offsets: Optional = None,
        table: Optional = None, *scales: Optional, **options: Any,
    ) -> tuple[Array, Array, Array]:  # fmt: skip
        assert offsets is None or not offsets.size
        (batch, new, _), width = query.shape, past_key.shape[-1]
        heads, kv_heads = options["num_heads"], options["kv_num_heads"]
        if key is None or value is None:
            query, key, value = np.split(query, [heads * width, (heads + kv_heads) * width], axis=-1)
        split = [a.reshape(batch, new, -1, width).swapaxes(1, 2) for a in (query, key, value)]
        present = past_key.copy(), past_value.copy()
        steps = [np.ones(1, np.float32) if scale is None else scale[0] for scale in scales or (None, None)]
        y = np.empty((batch, new, heads, width), np.float32)
        for row in range(batch):
            end = int(seqlens[row]) + 1
            first = max(end - new, 0)
            q, k, v = (part[row].astype(np.float64) for part in split)
            if options["do_rotary"] and cos is not None and sin is not None:
                at = np.arange(first, first + new) if rows is None else rows[row]
                q, k = (rotated(a, cos[at], sin[at], bool(options["rotary_interleaved"])) for a in (q, k))
            for buffer, part, step in zip(present, (k, v), steps, strict=True):
                rounded = np.rint(part.astype(np.float32) * (1 / step)).clip(-128, 127)
                buffer[row, :, first : first + new] = rounded if buffer.dtype == np.int8 else part
            every = (buffer[row, :, : first + new] * step for buffer, step in zip(present, steps, strict=True))
            y[row] = attention(q, *every, options["scale"], max(options["local_window_size"], 0), options["softcap"])
        own = slice(first := options.get("first_head", 0), first + options.get("own_heads", heads))
        return y[:, :, own].reshape(batch, new, -1), *present


class LinearAttention(OpRun):
    op_domain: ClassVar[str] = "satchel"

    def _run(
        self, query: Array, key: Optional, value: Optional, past: Array, decay: Optional = None, beta: Optional = None,
        **options: Any,
    ) -> tuple[Array, Array]:  # fmt: skip
        batch, heads, key_dim, _ = past.shape
        state, y = past.astype(np.float64), []
        shared, keys = heads // options["q_num_heads"], options["q_num_heads"] * key_dim
        if key is None or value is None:
            query, key, value = np.split(query, [keys, 2 * keys], axis=-1)
        if options.get("epsilon"):
            query, key = (
                x / np.sqrt((x * x).sum(-1, keepdims=True) + options["epsilon"])
                for x in (part.reshape(batch, -1, options["q_num_heads"], key_dim) for part in (query, key))
            )
        for token in range(query.shape[1]):
            q, k = (np.repeat(x[:, token].reshape(batch, -1, key_dim), shared, 1) for x in (query, key))
            new = value[:, token].reshape(batch, heads, -1)
            if "gated" in options["update_rule"]:
                assert decay is not None
                state = state * np.exp(decay[:, token].reshape(batch, heads, -1, 1))
            if "delta" in options["update_rule"]:
                assert beta is not None
                new = beta[:, token][..., None] * (new - np.einsum("bhkv,bhk->bhv", state, k))
            state = state + k[..., None] * new[:, :, None]
            y.append(options["scale"] * np.einsum("bhkv,bhk->bhv", state, q))
        return np.stack(y, 1).reshape(value.shape).astype(np.float32), state.astype(np.float32)


class CausalConv(OpRun):
    op_domain: ClassVar[str] = "satchel"

    def _run(
        self, x: Array, weight: Array, bias: Optional, past: Array, activation: str = "",
    ) -> tuple[Array, Array]:  # fmt: skip
        every, tokens = np.concatenate([past, x], 1), x.shape[1]
        y = sum(every[:, w : w + tokens] * weight[:, 0, w] for w in range(weight.shape[2]))
        y = y if bias is None else y + bias
        return ACTIVATIONS[activation](y) if activation else y, every[:, tokens:]


class Positions(OpRun):
    op_domain: ClassVar[str] = "satchel"

    def _run(self, ids: Array, lengths: Array, offsets: Optional = None, first: Optional = None) -> tuple[Array]:
        starts = 0 if first is None else first.reshape(-1)
        if offsets is None or not offsets.size:
            past = np.maximum(lengths.reshape(-1) - ids.shape[1], 0) + starts
            return (past[:, None] + np.arange(ids.shape[1]),)
        counts = np.diff(offsets).astype(np.int64)
        past = lengths.reshape(-1) - counts + starts
        return (np.concatenate([p + np.arange(n) for p, n in zip(past, counts, strict=True)])[None],)


class LastToken(OpRun):
    op_domain: ClassVar[str] = "satchel"

    def _run(self, x: Array, lengths: Array, offsets: Optional = None) -> tuple[Array]:
        if offsets is None or not offsets.size:
            ends = np.minimum(lengths.reshape(-1), x.shape[1]) - 1
            return (x[np.arange(len(x)), ends][:, None],)
        return (x[0, offsets[1:] - 1][:, None],)


class SkipLayerNormalization(OpRun):
    op_domain: ClassVar[str] = "com.microsoft"

    def _run(self, x: Array, skip: Array, gain: Array, bias: Optional = None, **options: Any) -> tuple[Array, ...]:
        total = (x + skip).astype(np.float64)
        even = total - total.mean(-1, keepdims=True)
        y = even / np.sqrt((even * even).mean(-1, keepdims=True) + options["epsilon"]) * gain
        whole = y if bias is None else y + bias
        unused = np.empty(0, np.float32)
        return whole.astype(np.float32), unused, unused, total.astype(np.float32)


OPERATORS = [
    SkipLayerNormalization, Linear, TableLinear, Attention, LinearAttention, CausalConv, GatherBlockQuantized,
    Positions, LastToken,
]  # fmt: skip


LEFT_OUT = {"row_offsets": np.zeros(0, np.int32), "block_table": np.zeros((0, 0), np.int32)}


def run_reference(model: ir.Model | onnx.ModelProto, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """The outputs of a graph by ONNX's reference implementation, and the operators above."""
    proto = onnx.load_from_string(serialized(model)) if isinstance(model, ir.Model) else model
    for index, node in enumerate(proto.graph.node):  # an output without a name would become each input without one
        node.output[:] = [name or f"unused.{index}.{place}" for place, name in enumerate(node.output)]
    evaluator = ReferenceEvaluator(proto, new_ops=OPERATORS)
    defaults = {name: array for name, array in LEFT_OUT.items() if name in evaluator.input_names}
    return dict(zip(evaluator.output_names, evaluator.run(None, defaults | dict(feeds)), strict=True))


class ByReference:
    """A session of ONNX's reference implementation."""

    def __init__(self, model: ir.Model) -> None:
        self.evaluator = ReferenceEvaluator(onnx.load_from_string(serialized(model)), new_ops=OPERATORS)

    def run(self, outputs: Sequence[str], feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        found: list[np.ndarray] = self.evaluator.run(list(outputs), dict(feeds))
        return found
