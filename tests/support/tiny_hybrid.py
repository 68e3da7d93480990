"""A tiny bundle of layers that keep a state of fixed size beside one that attends, and the same model in numpy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from support.tiny_bundle import (
    CONTRIB,
    HIDDEN,
    ONNX_TYPES,
    VOCABULARY,
    Weights,
    read_manifest,
    record,
    write_bundle,
    write_manifest,
)

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
LINEAR_HEADS, KEY_DIM, VALUE_DIM, KERNEL = 2, 8, 16, 4
QUERY, VALUE = LINEAR_HEADS * KEY_DIM, LINEAR_HEADS * VALUE_DIM
MIXED = 2 * QUERY + VALUE
POSITIONS = 512
PATTERN = ("linear", "conv", "attention", "linear")
"""What each layer does. `linear`: a causal convolution, then a gated delta rule; `conv`: a gated short convolution;
`plain`: nothing between tokens."""

Array = NDArray[Any]


def states_of(pattern: Sequence[str] = PATTERN) -> list[dict[str, Any]]:
    """The manifest's `states`."""
    sizes: dict[str, list[tuple[str, list[int]]]] = {
        "linear": [("conv", [MIXED, KERNEL - 1]), ("recurrent", [LINEAR_HEADS, KEY_DIM, VALUE_DIM])],
        "conv": [("conv", [HIDDEN, KERNEL - 1])],
        "attention": [],
        "plain": [],
    }
    return [
        {"layer": layer, "kind": kind, "dtype": "float32", "shape": shape}
        | {"past": f"past.{layer}.{kind}", "present": f"present.{layer}.{kind}"}
        for layer, name in enumerate(pattern)
        for kind, shape in sizes[name]
    ]


def caches_of(pattern: Sequence[str] = PATTERN) -> list[dict[str, Any]]:
    """The manifest's `kv_cache.layers`."""
    return [
        {"kv_heads": KV_HEADS, "key_dim": HEAD_DIM, "value_dim": HEAD_DIM}
        | {"past_key": f"past_key_values.{layer}.key", "past_value": f"past_key_values.{layer}.value"}
        | {"present_key": f"present.{layer}.key", "present_value": f"present.{layer}.value"}
        for layer, name in enumerate(pattern)
        if name == "attention"
    ]


def make_arrays(pattern: Sequence[str] = PATTERN, seed: int = 0) -> dict[str, Array]:
    """The weights by name, float32, large enough that every token before counts."""
    rng = np.random.default_rng(seed)
    arrays = {"embed": rng.normal(0, 1, (VOCABULARY, HIDDEN)), "head": rng.normal(0, 1, (HIDDEN, VOCABULARY))}
    angles = np.arange(POSITIONS)[:, None] / 10000 ** (np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    arrays |= {"gain": np.ones(HIDDEN), "cos": np.cos(angles), "sin": np.sin(angles)}
    shapes = {
        "attention": {"q": HEADS * HEAD_DIM, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM},
        "linear": {"mixed": MIXED, "decay": LINEAR_HEADS, "beta": LINEAR_HEADS},
        "conv": {"mixed": HIDDEN, "gate": HIDDEN},
        "plain": {},
    }
    for layer, name in enumerate(pattern):
        for part, width in shapes[name].items():
            arrays[f"{part}.{layer}"] = rng.normal(0, HIDDEN**-0.5, (HIDDEN, width))
        inner = VALUE if name == "linear" else HIDDEN
        arrays[f"o.{layer}"] = rng.normal(0, inner**-0.5, (inner, HIDDEN))
        if name in ("linear", "conv"):
            channels = MIXED if name == "linear" else HIDDEN
            arrays[f"kernel.{layer}"] = rng.normal(0, 1, (channels, 1, KERNEL))
            arrays[f"bias.{layer}"] = rng.normal(0, 0.1, channels)
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def expected(ids: Sequence[int], pattern: Sequence[str] = PATTERN, seed: int = 0) -> Array:
    """The logits of every position of `ids`, [tokens, vocabulary], by numpy in float64, without any state."""
    w = {name: array.astype(np.float64) for name, array in make_arrays(pattern, seed).items()}
    hidden = w["embed"][list(ids)]
    for layer, name in enumerate(pattern):
        x = _norm(hidden)
        mix = {"attention": _attention, "linear": _linear, "conv": _conv, "plain": lambda w, layer, x: x}[name]
        hidden = hidden + mix(w, layer, x) @ w[f"o.{layer}"]
    return _norm(hidden) @ w["head"]


def _norm(x: Array) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)


def _silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def _convolve(x: Array, kernel: Array, bias: Array) -> Array:
    padded = np.concatenate([np.zeros((KERNEL - 1, x.shape[1])), x])
    return bias + sum(padded[tap : tap + len(x)] * kernel[:, 0, tap] for tap in range(KERNEL))


def _attention(w: dict[str, Array], layer: int, x: Array) -> Array:
    q, k, v = ((x @ w[f"{part}.{layer}"]).reshape(len(x), -1, HEAD_DIM) for part in "qkv")

    def turned(y: Array) -> Array:
        first, second = np.split(y, 2, axis=-1)
        cos, sin = (w[table][: len(x), None] for table in ("cos", "sin"))
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

    q, k = turned(q), turned(k)
    outputs = []
    for head in range(HEADS):
        scores = q[:, head] @ k[:, head // (HEADS // KV_HEADS)].T / np.sqrt(HEAD_DIM)
        scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        outputs.append(shares / shares.sum(-1, keepdims=True) @ v[:, head // (HEADS // KV_HEADS)])
    return np.concatenate(outputs, -1)


def _linear(w: dict[str, Array], layer: int, x: Array) -> Array:
    mixed = _silu(_convolve(x @ w[f"mixed.{layer}"], w[f"kernel.{layer}"], w[f"bias.{layer}"]))
    q, k = (part.reshape(len(x), LINEAR_HEADS, KEY_DIM) for part in (mixed[:, :QUERY], mixed[:, QUERY : 2 * QUERY]))
    v = mixed[:, 2 * QUERY :].reshape(len(x), LINEAR_HEADS, VALUE_DIM)
    k = k / np.sqrt((k**2).sum(-1, keepdims=True) + 1e-6)
    decay = -np.log1p(np.exp(x @ w[f"decay.{layer}"] - 2))
    beta = 1 / (1 + np.exp(-x @ w[f"beta.{layer}"]))
    state, outputs = np.zeros((LINEAR_HEADS, KEY_DIM, VALUE_DIM)), []
    for t in range(len(x)):
        state = state * np.exp(decay[t])[:, None, None]
        found = np.einsum("hkv,hk->hv", state, k[t])
        state = state + np.einsum("hk,hv->hkv", k[t], beta[t][:, None] * (v[t] - found))
        outputs.append(np.einsum("hkv,hk->hv", state, q[t]).reshape(-1))
    return np.stack(outputs) * KEY_DIM**-0.5


def _conv(w: dict[str, Array], layer: int, x: Array) -> Array:
    return _convolve(x @ w[f"mixed.{layer}"], w[f"kernel.{layer}"], w[f"bias.{layer}"]) * (x @ w[f"gate.{layer}"])


def make_hybrid(phase: str, weights: Weights, pattern: Sequence[str] = PATTERN) -> onnx.ModelProto:
    """One graph: `prefill`, `decode` or `score`."""
    node = helper.make_node
    nodes = [
        node("ReduceSum", ["attention_mask", "axis1"], ["real"], keepdims=0),
        node("Sub", ["real", "one"], ["last"]),
        node("Cast", ["last"], ["seqlens_k"], to=TensorProto.INT32),
        node("Shape", ["attention_mask"], ["total1"], start=1, end=2),
        node("Squeeze", ["total1"], ["total"]),
        node("Cast", ["total"], ["total_i32"], to=TensorProto.INT32),
        node("Gather", ["embed", "input_ids"], ["h0"]),
    ]
    for i, name in enumerate(pattern):
        first = len(nodes)
        nodes.append(node("SimplifiedLayerNormalization", [f"h{i}", "gain"], [f"n{i}"], axis=-1, epsilon=1e-5))
        nodes += NODES[name](i)
        nodes.append(node("MatMul", [f"a{i}", f"o.{i}"], [f"p{i}"]))
        nodes.append(node("Add", [f"h{i}", f"p{i}"], [f"h{i + 1}"]))
        for number, each in enumerate(nodes[first:]):
            each.name = f"layers.{i}.{each.op_type}_{number}"
    nodes.append(node("SimplifiedLayerNormalization", [f"h{len(pattern)}", "gain"], ["end"], axis=-1, epsilon=1e-5))
    if phase != "score":
        nodes.append(node("Gather", ["end", "minus"], ["picked"], axis=1))
    nodes.append(node("MatMul", ["end" if phase == "score" else "picked", "head"], ["logits"]))
    spec = graph_spec(phase, pattern)
    values = [
        [helper.make_tensor_value_info(t["name"], ONNX_TYPES[t["dtype"]], t["shape"]) for t in spec[side]]
        for side in ("inputs", "outputs")
    ]
    graph = helper.make_graph(nodes, phase, *values, weights.tensors)
    for name, value in {"axis1": [1], "one": [1], "minus": [-1], "parts": [QUERY, QUERY, VALUE]}.items():
        graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), name))
    for name, heads in (("heads", [0, 0, LINEAR_HEADS, KEY_DIM]), ("flat", [0, 0, QUERY])):
        graph.initializer.append(numpy_helper.from_array(np.array(heads, np.int64), name))
    graph.initializer.append(numpy_helper.from_array(np.float32(2), "two"))
    graph.initializer.append(numpy_helper.from_array(np.float32(1e-6), "tiny"))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _attention_nodes(i: int) -> list[onnx.NodeProto]:
    node, past, present = helper.make_node, f"past_key_values.{i}", f"present.{i}"
    return [
        *(node("MatMul", [f"n{i}", f"{part}.{i}"], [f"{part}_{i}"]) for part in "qkv"),
        node(
            "GroupQueryAttention",
            [f"q_{i}", f"k_{i}", f"v_{i}", f"{past}.key", f"{past}.value", "seqlens_k", "total_i32", "cos", "sin"],
            [f"a{i}", f"{present}.key", f"{present}.value"],
            domain=CONTRIB,
            num_heads=HEADS,
            kv_num_heads=KV_HEADS,
            do_rotary=1,
        ),
    ]


def _convolution(i: int, activation: str) -> list[onnx.NodeProto]:
    node = helper.make_node
    return [
        node("MatMul", [f"n{i}", f"mixed.{i}"], [f"m{i}"]),
        node("Transpose", [f"m{i}"], [f"mt{i}"], perm=[0, 2, 1]),
        node(
            "CausalConvWithState",
            [f"mt{i}", f"kernel.{i}", f"bias.{i}", f"past.{i}.conv"],
            [f"ct{i}", f"present.{i}.conv"],
            domain=CONTRIB,
            activation=activation,
        ),
        node("Transpose", [f"ct{i}"], [f"c{i}"], perm=[0, 2, 1]),
    ]


def _conv_nodes(i: int) -> list[onnx.NodeProto]:
    node = helper.make_node
    return [
        *_convolution(i, "none"),
        node("MatMul", [f"n{i}", f"gate.{i}"], [f"g{i}"]),
        node("Mul", [f"c{i}", f"g{i}"], [f"a{i}"]),
    ]


def _linear_nodes(i: int) -> list[onnx.NodeProto]:
    node = helper.make_node
    return [
        *_convolution(i, "silu"),
        node("Split", [f"c{i}", "parts"], [f"lq{i}", f"lk{i}", f"lv{i}"], axis=-1),
        node("Reshape", [f"lk{i}", "heads"], [f"k4{i}"]),
        node("Mul", [f"k4{i}", f"k4{i}"], [f"kk{i}"]),
        node("ReduceSum", [f"kk{i}", "minus"], [f"ks{i}"], keepdims=1),
        node("Add", [f"ks{i}", "tiny"], [f"ke{i}"]),
        node("Sqrt", [f"ke{i}"], [f"kr{i}"]),
        node("Div", [f"k4{i}", f"kr{i}"], [f"kn{i}"]),
        node("Reshape", [f"kn{i}", "flat"], [f"kf{i}"]),
        node("MatMul", [f"n{i}", f"decay.{i}"], [f"d0{i}"]),
        node("Sub", [f"d0{i}", "two"], [f"d1{i}"]),
        node("Softplus", [f"d1{i}"], [f"d2{i}"]),
        node("Neg", [f"d2{i}"], [f"d{i}"]),
        node("MatMul", [f"n{i}", f"beta.{i}"], [f"b0{i}"]),
        node("Sigmoid", [f"b0{i}"], [f"b{i}"]),
        node(
            "LinearAttention",
            [f"lq{i}", f"kf{i}", f"lv{i}", f"past.{i}.recurrent", f"d{i}", f"b{i}"],
            [f"a{i}", f"present.{i}.recurrent"],
            domain=CONTRIB,
            q_num_heads=LINEAR_HEADS,
            kv_num_heads=LINEAR_HEADS,
            update_rule="gated_delta",
        ),
    ]


def _plain_nodes(i: int) -> list[onnx.NodeProto]:
    return [helper.make_node("Identity", [f"n{i}"], [f"a{i}"])]


NODES = {"attention": _attention_nodes, "linear": _linear_nodes, "conv": _conv_nodes, "plain": _plain_nodes}


def graph_spec(phase: str, pattern: Sequence[str] = PATTERN) -> dict[str, Any]:
    """The manifest's entry of one graph."""
    cache = ["batch", KV_HEADS, "capacity", HEAD_DIM]
    layers, states = caches_of(pattern), states_of(pattern)

    def kept(side: str) -> list[dict[str, Any]]:
        names = [layer[f"{side}_{part}"] for layer in layers for part in ("key", "value")]
        values = [{"name": name, "dtype": "float32", "shape": cache} for name in names]
        return values + [{"name": s[side], "dtype": s["dtype"], "shape": ["batch", *s["shape"]]} for s in states]

    ids = {"name": "input_ids", "dtype": "int64", "shape": ["batch", 1 if phase == "decode" else "sequence"]}
    mask = {"name": "attention_mask", "dtype": "int64", "shape": ["batch", "total"]}
    logits = ["batch", "sequence" if phase == "score" else 1, VOCABULARY]
    return {
        "file": f"{phase}.onnx",
        "session": {"session.disable_prepacking": "1"},
        "session_of": None,
        "inputs": [ids, mask, *kept("past")],
        "outputs": [{"name": "logits", "dtype": "float32", "shape": logits}, *kept("present")],
    }


def write_hybrid(folder: Path, pattern: Sequence[str] = PATTERN, seed: int = 0, **options: Any) -> Path:
    """Write a bundle of these layers into the new folder `folder` and return it; `options` as for `write_bundle`."""
    write_bundle(folder, **options)
    weights, document = Weights(), read_manifest(folder)
    for name, array in make_arrays(pattern, seed).items():
        weights.add(name, array)
    contents = {"weights.bin": bytes(weights.content)}
    for phase in ("prefill", "decode", "score"):
        contents[f"{phase}.onnx"] = make_hybrid(phase, weights, pattern).SerializeToString()
        document["graphs"][phase] = graph_spec(phase, pattern)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        document["files"][name] = record(content)
    document["kv_cache"]["layers"] = caches_of(pattern)
    document["states"] = states_of(pattern)
    if not document["states"]:
        del document["states"]
    document["model"]["parameters"] = len(weights.content) // 4
    write_manifest(folder, document)
    return folder
