"""One step of attention as a graph of one node, and the same in numpy's float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnx import TensorProto, helper
from support.graphs import attention, rotated
from support.kernels import found
from support.native_ops import Attention

Array = npt.NDArray[Any]

INPUTS = ("query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length", "cos", "sin", "rows")
SCALES = ("key_scale", "value_scale")
RAGGED_INPUTS = (*INPUTS, "row_offsets", "block_table", *SCALES)
OUTPUTS = ("y", "present_key", "present_value")
PASTS = ("past_key", "past_value")


@dataclasses.dataclass(frozen=True)
class Step:
    """What a step is made from; the arrays follow from the seed.

    Attributes:
        past: Tokens in the cache before the step: a number, or one for each row.
        rotary: Channels that are rotated; 0 for none.
        block: Where the second block of the rotary tables begins, which every other row has; 0 for one block.
        spare: Positions of the cache beyond the step's last.
        cache: How the cache is stored: float32, float16 or int8. Some of the new numbers are beyond what the scales of
            int8 reach.
        own: The query heads that are wanted; None for all.
    """

    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 64
    tokens: int = 1
    past: int | tuple[int, ...] = 0
    rotary: int = 0
    block: int = 0
    interleaved: bool = False
    window: int = -1
    softcap: float = 0.0
    scale: float = 0.0
    spare: int = 3
    rows: int = 1
    cache: str = "float32"
    own: range | None = None

    @property
    def pasts(self) -> list[int]:
        return list(self.past) if isinstance(self.past, tuple) else [self.past] * self.rows

    @property
    def int8(self) -> bool:
        return self.cache == "int8"

    def feeds(self, seed: int = 0) -> dict[str, Array]:
        """The node's inputs, by their names in INPUTS."""
        draw = np.random.default_rng(seed)
        rows, total = len(self.pasts), max(self.pasts) + self.tokens
        cache = (rows, self.kv_heads, total + self.spare, self.head_dim)
        widths = {"query": self.heads, "key": self.kv_heads, "value": self.kv_heads}
        feeds: dict[str, Array] = {
            name: draw.standard_normal((rows, self.tokens, heads * self.head_dim), np.float32)
            for name, heads in widths.items()
        }
        feeds |= {name: draw.standard_normal(cache, np.float32) for name in PASTS}
        if self.cache == "float16":
            feeds |= {name: feeds[name].astype(np.float16) for name in PASTS}
        if self.int8:
            feeds |= {name: draw.integers(-128, 128, cache, np.int8) for name in PASTS}
            widths = (1, self.kv_heads, 1, self.head_dim)
            feeds |= {name: draw.uniform(0.01, 0.03, widths).astype(np.float32) for name in SCALES}
        feeds["seqlens_k"] = np.asarray(self.pasts, np.int32) + np.int32(self.tokens - 1)
        feeds["total_sequence_length"] = np.asarray(total, np.int32)
        if self.rotary:
            angles = draw.uniform(0, 6, (self.block + cache[2], self.rotary // 2))
            feeds |= {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
        if self.block:
            first = np.asarray(self.pasts, np.int64) + self.block * ((np.arange(rows) + 1) % 2)
            feeds["rows"] = first[:, None] + np.arange(self.tokens)
        return feeds

    def attributes(self, domain: str = "satchel") -> dict[str, Any]:
        kinds = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        own = {} if self.own is None else {"first_head": self.own.start, "own_heads": len(self.own)}
        return (kinds if self.int8 and domain != "satchel" else own) | {
            "num_heads": self.heads, "kv_num_heads": self.kv_heads, "scale": self.scale, "softcap": self.softcap,
            "local_window_size": self.window, "do_rotary": int(self.rotary > 0),
            "rotary_interleaved": int(self.interleaved),
        }  # fmt: skip


def open_node(step: Step, names: tuple[str, ...], domain: str = "satchel", threads: int = 2) -> ort.InferenceSession:
    """A session of one node with the inputs `names`."""
    operator = "Attention" if domain == "satchel" else "GroupQueryAttention"
    reads = [name if name in names else "" for name in RAGGED_INPUTS]
    while not reads[-1]:
        reads.pop()
    nodes = [helper.make_node(operator, reads, OUTPUTS, domain=domain, **step.attributes(domain))]
    cache = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int8": TensorProto.INT8}[step.cache]
    kinds = dict.fromkeys(("seqlens_k", "total_sequence_length", "row_offsets", "block_table"), TensorProto.INT32) | {
        "rows": TensorProto.INT64, "past_key": cache, "past_value": cache, "present_key": cache, "present_value": cache,
    }  # fmt: skip
    inputs = [helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), None) for name in names]
    outputs = [helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), None) for name in OUTPUTS]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(domain, 1)]
    model = helper.make_model(helper.make_graph(nodes, "g", inputs, outputs), opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("satchel.helpers", str(threads - 1))
    options.log_severity_level = 4
    if domain == "satchel":
        options.register_custom_ops_library(str(found()))
    return ort.InferenceSession(model.SerializeToString(), options)


def attend(step: Step, feeds: dict[str, Array], domain: str = "satchel", threads: int = 2) -> list[Array]:
    """(y, present_key, present_value) of the node; nothing is written in place."""
    names = tuple(name for name in RAGGED_INPUTS if name in feeds)
    outputs: list[Array] = open_node(step, names, domain, threads).run(list(OUTPUTS), feeds)
    return outputs


def packed(feeds: dict[str, Array]) -> dict[str, Array]:
    """The same inputs with query, key and value in one tensor."""
    joined = np.concatenate([feeds[name] for name in ("query", "key", "value")], axis=2)
    return {"query": joined} | {name: array for name, array in feeds.items() if name not in ("query", "key", "value")}


def expected(step: Step, feeds: dict[str, Array]) -> tuple[Array, Array, Array]:
    """(y, present_key, present_value) by numpy in float64; the present is compared up to each row's last token."""
    options = step.attributes() | {"scale": step.scale or step.head_dim**-0.5}
    return Attention._run(None, *(feeds.get(name) for name in INPUTS), **options)  # type: ignore[arg-type]


def over(step: Step, feeds: dict[str, Array], keys: Array, values: Array) -> Array:
    """y by numpy in float64, of caches as they are after the step."""
    scales = [feeds[name].astype(np.float64) if step.int8 else np.ones(1) for name in SCALES]
    y = np.empty((*feeds["query"].shape[:2], step.heads, step.head_dim))
    for row, past in enumerate(step.pasts):
        query = feeds["query"][row].reshape(step.tokens, step.heads, -1).swapaxes(0, 1)
        if step.rotary:
            at = feeds["rows"][row] if "rows" in feeds else np.arange(past, past + step.tokens)
            query = rotated(query, feeds["cos"][at], feeds["sin"][at], step.interleaved)
        end = past + step.tokens
        every = (
            scale[0] * cache[row, :, :end].astype(np.float64)
            for scale, cache in zip(scales, (keys, values), strict=True)
        )
        scale = step.scale or step.head_dim**-0.5
        y[row] = attention(query, *every, scale, max(step.window, 0), step.softcap)
    return y.reshape(feeds["query"].shape)


def added(step: Step, feeds: dict[str, Array]) -> tuple[Array, Array]:
    """New keys and values, in an int8 cache as multiples of its scales, before they are rounded.

    Float64 [rows, kv_heads, tokens, head_dim].
    """
    shape = (len(step.pasts), step.tokens, step.kv_heads, step.head_dim)
    key, value = (feeds[name].reshape(shape).swapaxes(1, 2).astype(np.float64) for name in ("key", "value"))
    for row, past in enumerate(step.pasts if step.rotary else ()):
        at = feeds["rows"][row] if "rows" in feeds else np.arange(past, past + step.tokens)
        key[row] = rotated(key[row], feeds["cos"][at], feeds["sin"][at], step.interleaved)
    return (key / feeds["key_scale"], value / feeds["value_scale"]) if step.int8 else (key, value)
