"""The static counterpart of the tiny bundle: the same weights, graphs in which every shape is a number."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from support.tiny_bundle import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    MAX_CONTEXT,
    VOCABULARY,
    Weights,
    cache_layers,
    make_weights,
    read_manifest,
    record,
    write_bundle,
    write_manifest,
)

LENGTHS = (4, 16)
SCORED = 8
TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "bool": TensorProto.BOOL}
HALF = HEAD_DIM // 2

Spec = tuple[str, str, tuple[int, ...]]


def write_static_bundle(
    folder: Path,
    *,
    lengths: Sequence[int] = LENGTHS,
    parts: int = 1,
    seed: int = 0,
    max_context: int = MAX_CONTEXT,
    **options: object,
) -> Path:
    """Write what `write_bundle` does, for target cann: prefill for chunks of `lengths`, each graph in 1 or 2 parts.

    The second part begins behind the first layer. Further options are those of `write_bundle`.
    """
    write_bundle(folder, seed=seed, max_context=max_context, **options)  # type: ignore[arg-type]
    weights = make_weights(seed, max_context)
    document = read_manifest(folder)
    for phase in ("prefill", "decode", "score"):
        (folder / f"{phase}.onnx").unlink()
        del document["files"][f"{phase}.onnx"]
    chains = {"decode": _chain(folder, document, weights, "decode", 1, parts, max_context)}
    chains["score"] = _chain(folder, document, weights, "score", SCORED, parts, max_context)
    prefill = [_chain(folder, document, weights, "prefill", count, parts, max_context) for count in lengths]
    place = {tensor.name: {entry.key: entry.value for entry in tensor.external_data} for tensor in weights.tensors}
    document |= {
        "target": "cann",
        "graphs": None,
        "static": {
            "capacity": max_context,
            "masks": {"mask": 0},
            "tables": [
                {
                    "input": name,
                    "file": "weights.bin",
                    "offset": int(place[name]["offset"]),
                    "dtype": "float32",
                    "shape": [max_context, HALF],
                }
                for name in ("cos", "sin")
            ],
            "prefill": prefill,
            **chains,
        },
    }
    document["kv_cache"]["mode"] = "swapped"
    write_manifest(folder, document)
    return folder


def _chain(
    folder: Path, document: dict, weights: Weights, phase: str, tokens: int, parts: int, capacity: int
) -> dict[str, object]:
    cuts = [0, LAYERS] if parts == 1 else [0, 1, LAYERS]
    entries = []
    for part, (first, last) in enumerate(itertools.pairwise(cuts)):
        file = f"{phase}-{tokens}-{part}.onnx"
        inputs, outputs = _signature(phase, tokens, capacity, first, last)
        content = _graph(weights, phase, tokens, (first, last), inputs, outputs, capacity).SerializeToString()
        (folder / file).write_bytes(content)
        document["files"][file] = record(content)
        entries.append({
            "file": file,
            "session": {"session.disable_prepacking": "1"},
            "session_of": None,
            "inputs": [_described(spec) for spec in inputs],
            "outputs": [_described(spec) for spec in outputs],
        })  # fmt: skip
    return {"tokens": tokens, "parts": entries}


def _described(spec: Spec) -> dict[str, object]:
    return {"name": spec[0], "dtype": spec[1], "shape": list(spec[2])}


def _signature(phase: str, tokens: int, capacity: int, first: int, last: int) -> tuple[list[Spec], list[Spec]]:
    cache = (1, KV_HEADS, capacity, HEAD_DIM)
    inputs: list[Spec] = [("input_ids", "int64", (1, tokens))] if first == 0 else []
    if first:
        inputs.append((f"h{first}", "float32", (1, tokens, HIDDEN)))
    inputs += [
        ("mask", "float32", (1, 1, tokens, capacity)),
        ("cos", "float32", (1, tokens, HALF)),
        ("sin", "float32", (1, tokens, HALF)),
        ("cache_rows", "bool", (1, 1, capacity, 1)),
    ]
    if tokens > 1:
        inputs.append(("cache_index", "int64", (capacity,)))
    layers = cache_layers()[first:last]
    inputs += [(name, "float32", cache) for layer in layers for name in (layer.past_key, layer.past_value)]
    outputs: list[Spec] = []
    if last < LAYERS:
        outputs.append((f"h{last}", "float32", (1, tokens, HIDDEN)))
    else:
        outputs.append(("logits", "float32", (1, tokens if phase == "score" else 1, VOCABULARY)))
        if phase == "prefill" and tokens > 1:
            inputs.append(("last_token", "int64", (1,)))
    outputs += [(name, "float32", cache) for layer in layers for name in (layer.present_key, layer.present_value)]
    return inputs, outputs


def _graph(
    weights: Weights,
    phase: str,
    tokens: int,
    span: tuple[int, int],
    inputs: Sequence[Spec],
    outputs: Sequence[Spec],
    capacity: int,
) -> onnx.ModelProto:
    node = helper.make_node
    first, last = span
    nodes = [node("Unsqueeze", [name, "axis1"], [f"{name}_heads"]) for name in ("cos", "sin")]
    if first == 0:
        nodes.append(node("Gather", ["embed", "input_ids"], ["h0"]))
    for layer in range(first, last):
        nodes += _layer(layer, tokens)
    if last == LAYERS:
        nodes.append(node("SimplifiedLayerNormalization", [f"h{LAYERS}", "gain"], ["states"], axis=-1, epsilon=1e-5))
        picked = "states"
        if phase == "prefill" and tokens > 1:
            nodes.append(node("Gather", ["states", "last_token"], ["picked"], axis=1))
            picked = "picked"
        nodes.append(node("MatMul", [picked, "head"], ["logits"]))
    used = {name for each in nodes for name in each.input} - {"cos", "sin"}
    initializers = [tensor for tensor in weights.tensors if tensor.name in used]
    for name, value in {
        "axis1": [1],
        "axis2": [2],
        "query_shape": [1, tokens, HEADS, HEAD_DIM],
        "kv_shape": [1, tokens, KV_HEADS, HEAD_DIM],
        "grouped": [1, KV_HEADS, HEADS // KV_HEADS, capacity, HEAD_DIM],
        "repeated": [1, HEADS, capacity, HEAD_DIM],
        "flat": [1, tokens, HIDDEN],
    }.items():
        initializers.append(numpy_helper.from_array(np.array(value, np.int64), name))
    initializers.append(numpy_helper.from_array(np.float32(HEAD_DIM**-0.5), "scale"))
    graph = helper.make_graph(nodes, f"{phase}-{tokens}", _values(inputs), _values(outputs), initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def _layer(i: int, tokens: int) -> list[onnx.NodeProto]:
    """Norm, q, k, v with rotation; keys and values into the cache by Where; attention over all of it; o; add."""
    node = helper.make_node
    nodes = [node("SimplifiedLayerNormalization", [f"h{i}", "gain"], [f"n{i}"], axis=-1, epsilon=1e-5)]
    for name in "qkv":
        shape = "query_shape" if name == "q" else "kv_shape"
        nodes += [
            node("MatMul", [f"n{i}", f"{name}.{i}"], [f"{name}_flat{i}"]),
            node("Reshape", [f"{name}_flat{i}", shape], [f"{name}_split{i}"]),
            node("Transpose", [f"{name}_split{i}"], [f"{name}{i}"], perm=[0, 2, 1, 3]),
        ]
    for name in "qk":
        a, b, r = f"{name}_a{i}", f"{name}_b{i}", f"{name}_r{i}"
        nodes += [
            node("Split", [f"{name}{i}"], [a, b], axis=-1, num_outputs=2),
            node("Mul", [a, "cos_heads"], [f"{a}c"]),
            node("Mul", [b, "sin_heads"], [f"{b}s"]),
            node("Mul", [b, "cos_heads"], [f"{b}c"]),
            node("Mul", [a, "sin_heads"], [f"{a}s"]),
            node("Sub", [f"{a}c", f"{b}s"], [f"{a}r"]),
            node("Add", [f"{b}c", f"{a}s"], [f"{b}r"]),
            node("Concat", [f"{a}r", f"{b}r"], [r], axis=-1),
        ]
    for name, new, past in (("key", f"k_r{i}", f"past_key_values.{i}.key"), ("value", f"v{i}", "")):
        past = past or f"past_key_values.{i}.value"
        placed = new
        if tokens > 1:
            placed = f"{name}_placed{i}"
            nodes.append(node("Gather", [new, "cache_index"], [placed], axis=2))
        nodes += [
            node("Where", ["cache_rows", placed, past], [f"present.{i}.{name}"]),
            node("Unsqueeze", [f"present.{i}.{name}", "axis2"], [f"{name}_one{i}"]),
            node("Expand", [f"{name}_one{i}", "grouped"], [f"{name}_groups{i}"]),
            node("Reshape", [f"{name}_groups{i}", "repeated"], [f"{name}_all{i}"]),
        ]
    return [
        *nodes,
        node("Transpose", [f"key_all{i}"], [f"key_t{i}"], perm=[0, 1, 3, 2]),
        node("MatMul", [f"q_r{i}", f"key_t{i}"], [f"products{i}"]),
        node("Mul", [f"products{i}", "scale"], [f"scaled{i}"]),
        node("Add", [f"scaled{i}", "mask"], [f"masked{i}"]),
        node("Softmax", [f"masked{i}"], [f"shares{i}"], axis=-1),
        node("MatMul", [f"shares{i}", f"value_all{i}"], [f"heads{i}"]),
        node("Transpose", [f"heads{i}"], [f"tokens{i}"], perm=[0, 2, 1, 3]),
        node("Reshape", [f"tokens{i}", "flat"], [f"a{i}"]),
        node("MatMul", [f"a{i}", f"o.{i}"], [f"p{i}"]),
        node("Add", [f"h{i}", f"p{i}"], [f"h{i + 1}"]),
    ]


def _values(specs: Sequence[Spec]) -> list[onnx.ValueInfoProto]:
    return [helper.make_tensor_value_info(name, TYPES[dtype], shape) for name, dtype, shape in specs]
