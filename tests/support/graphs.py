"""Writes small graphs from text, applies a pass to them under every rule of the pass contract, and compares numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from satchel.graphs.ir.contract import GraphPass, PassResult, Report
from satchel.graphs.ir.verify import signature, verify
from satchel.graphs.ir.weights import from_array
from satchel.graphs.targets.sessions import EXACT_PRODUCTS

Arrays = Mapping[str, np.ndarray]

ort.set_default_logger_severity(3)


def build(text: str, *changes: tuple[str, str], **weights: np.ndarray) -> ir.Model:
    """A model from the text of one graph in ONNX's own notation, with the shapes that ONNX infers.

    Args:
        text: "(inputs) => (outputs) <constants and shapes of values> { nodes }". Constants become plain tensors; a
            dimension written ? has neither size nor name.
        changes: Pieces of the text, each of which must be there, and what stands in their place.
        weights: Arrays that become lazy weights, as those of a checkpoint are; a double underscore in a name stands for
            a dot. They are not written among the inputs of the text.
    """
    named = {name.replace("__", "."): array for name, array in weights.items()}
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    text = text.strip()
    types = {np.dtype(np.float32): "float", np.dtype(np.int64): "int64", np.dtype(np.float16): "float16"}
    declared = [f'{types[a.dtype]}[{",".join(map(str, a.shape))}] "{n}"' for n, a in named.items()]
    opened, rest = text[0], text[1:].lstrip()
    comma = ", " if declared and not rest.startswith(")") else ""
    domains = ["", *(domain for domain in ("com.microsoft", "satchel") if f"{domain}." in text)]
    opsets = ", ".join(f'"{domain}": {1 if domain else 24}' for domain in domains)
    header = f"<ir_version: 10, opset_import: [{opsets}]>"
    proto = onnx.parser.parse_model(f"{header} graph {opened}{', '.join(declared)}{comma}{rest}")
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    for value in list(model.graph.inputs):
        if value.name in named:
            model.graph.inputs.remove(value)
            value.const_value = from_array(value.name, named[value.name])
            model.graph.register_initializer(value)
    for index, node in enumerate(model.graph):
        node.name = node.name or f"node_{index}"
    for value in [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]:
        if value.shape is not None:
            value.shape = ir.Shape([None if str(d).startswith("unk__") else d for d in value.shape])
    return model


def normal(seed: int, *shape: int) -> np.ndarray:
    """Seeded float32 numbers from the standard normal distribution."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def serialized(model: ir.Model) -> bytes:
    """Every byte of the model, weights and order included."""
    return ir.to_proto(model).SerializeToString(deterministic=True)


def operators(model: ir.Model) -> Counter[str]:
    """How often each operator stands in the graph; those outside the standard domain with their domain in front."""
    return Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph)


def the(model: ir.Model, op_type: str) -> ir.Node:
    """The only node of that operator."""
    (node,) = [n for n in model.graph if n.op_type == op_type]
    return node


def session(model: ir.Model, optimized: bool = False) -> ort.InferenceSession:
    """The model in ONNX Runtime on one thread, kept from optimizing unless it is to be as in satchel's sessions."""
    options = ort.SessionOptions()
    if optimized:  # without it, int8 products overflow on x86-64 without VNNI
        for key, value in EXACT_PRODUCTS.items():
            options.add_session_config_entry(key, value)
    else:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return ort.InferenceSession(serialized(model), options, providers=["CPUExecutionProvider"])


def run(model: ir.Model, feeds: Arrays, optimized: bool = False) -> dict[str, np.ndarray]:
    """The model's outputs by ONNX Runtime; feeds that are no inputs of it are left out."""
    opened = session(model, optimized)
    known = {value.name for value in opened.get_inputs()}
    outputs = [value.name for value in opened.get_outputs()]
    return dict(zip(outputs, opened.run(outputs, {n: a for n, a in feeds.items() if n in known}), strict=True))


def _edit(graph_pass: GraphPass, model: ir.Model) -> tuple[ir.Model, Report]:
    """Run the pass as the pipeline does, in place; returns what became of the clone."""
    clone, report = model.clone(), Report()
    graph_pass.edit(clone, report)
    return clone, report


def untouched(graph_pass: GraphPass, model: ir.Model) -> list[str]:
    """Check that the pass leaves the model alone, to the last byte; returns the reasons that it gave."""
    before = serialized(model)
    result = graph_pass(model)
    assert result.count == 0, f"{graph_pass.name} counted {result.count}: {operators(result.model)}"
    assert result.model is model
    assert serialized(model) == before
    edited, report = _edit(graph_pass, model)
    assert report.count == 0
    assert serialized(edited) == before, "a count of zero must mean that the edit in place changed nothing either"
    return [refusal.reason for refusal in result.refusals]


def fired(
    graph_pass: GraphPass,
    model: ir.Model,
    count: int,
    keeps_signature: bool = True,
    feeds: Arrays | None = None,
    exact: bool = False,
) -> PassResult:
    """Check that the pass changes the model `count` times, and what every pass owes: the given model unaltered, a valid
    graph, inputs and outputs kept, and nothing left to do for a second run; with `feeds`, the same numbers, too.
    """
    before = serialized(model)
    result = graph_pass(model)
    assert serialized(model) == before, f"{graph_pass.name} altered the model that it was given"
    assert result.count == count, f"{graph_pass.name} counted {result.count}: {result.refusals}"
    assert result.model is not model
    assert serialized(result.model) != before
    verify(result.model)
    if keeps_signature:
        assert signature(result.model) == signature(model)
    untouched(graph_pass, result.model)
    if feeds is not None:
        same_numbers(model, result.model, feeds, exact)
    return result


def same_numbers(before: ir.Model, after: ir.Model, feeds: Arrays, exact: bool = False) -> None:
    """Check that both models give the same outputs: bit for bit, or within rtol 1e-5 and atol 1e-6."""
    wanted, found = run(before, feeds), run(after, feeds)
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape, name
        assert np.ptp(array.astype(np.float64)) > 0, f"{name} is constant and would show no mistake"
        if exact:
            np.testing.assert_array_equal(found[name], array, err_msg=name)
        else:
            np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-6, err_msg=name)


def tag(model: ir.Model, op_type: str, attribute: str, value: object) -> ir.Model:
    """Give each node of that operator one more attribute; returns the model."""
    for node in model.graph:
        if node.op_type == op_type:
            node.attributes[attribute] = ir.convenience.convert_attribute(attribute, value)  # type: ignore[arg-type]
    return model


def expose(model: ir.Model, name: str) -> ir.Model:
    """Make a value inside the graph one of its outputs, which is one more reader; returns the model."""
    value = next(v for node in model.graph for v in node.outputs if v.name == name)
    model.graph.outputs.append(value)
    return model


def softmax(scores: np.ndarray) -> np.ndarray:
    """Over the last axis, in the scores' own dtype."""
    exponents = np.exp(scores - scores.max(-1, keepdims=True))
    return exponents / exponents.sum(-1, keepdims=True)


def attention(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, scale: float, window: int = 0, softcap: float = 0.0
) -> np.ndarray:
    """What satchel::Attention means, for one row: the queries are those of the last positions that there are keys for.

    Args:
        query: [heads, sequence, key_dim]; key [kv_heads, total, key_dim], value [kv_heads, total, value_dim].
        scale: Factor of the scores.
        window: How many positions each token sees, itself included; 0 for all.
        softcap: Scores s become softcap * tanh(s / softcap); 0 for none.

    Returns:
        [sequence, heads, value_dim], computed in float64.
    """
    query, key, value = (a.astype(np.float64) for a in (query, key, value))
    shared = query.shape[0] // key.shape[0]
    key, value = key.repeat(shared, 0), value.repeat(shared, 0)
    scores = scale * query @ key.swapaxes(1, 2)
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    rows, columns = np.indices(scores.shape[1:])
    rows += key.shape[1] - query.shape[1]
    seen = (columns <= rows) & (columns > rows - (window or key.shape[1]))
    return (softmax(np.where(seen, scores, -np.inf)) @ value).swapaxes(0, 1)


def experts(
    hidden: np.ndarray, index: np.ndarray, weights: np.ndarray, gate_up: np.ndarray, down: np.ndarray
) -> np.ndarray:
    """What satchel::Experts means: hidden [tokens, hidden] -> each token's weighted sum of its experts, in float64."""
    hidden, weights, gate_up, down = (a.astype(np.float64) for a in (hidden, weights, gate_up, down))
    out = np.zeros_like(hidden)
    for token, (chosen, shares) in enumerate(zip(index, weights, strict=True)):
        for expert, share in zip(chosen, shares, strict=True):
            gate, up = np.split(gate_up[expert] @ hidden[token], 2)
            out[token] += share * (down[expert] @ (gate / (1 + np.exp(-gate)) * up))
    return out


def convolution(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None, silu: bool = False) -> np.ndarray:
    """What satchel::Convolution means, for one row: x [tokens, channels] -> the same, in float64."""
    width = weight.shape[1]
    padded = np.concatenate([np.zeros((width - 1, x.shape[1])), x.astype(np.float64)])
    out = sum(padded[tap : tap + len(x)] * weight[:, tap] for tap in range(width)) + (0 if bias is None else bias)
    return out / (1 + np.exp(-out)) if silu else out


def recurrence(
    query: np.ndarray, key: np.ndarray, value: np.ndarray,
    decay: np.ndarray | None, beta: np.ndarray | None, scale: float,
) -> np.ndarray:  # fmt: skip
    """What satchel::Recurrence means, for one row, token by token in float64; shapes as there, without the batch."""
    shared = value.shape[1] // key.shape[1]
    query, key = (np.repeat(array.astype(np.float64), shared, axis=1) for array in (query, key))
    state, out = np.zeros((value.shape[1], key.shape[2], value.shape[2])), np.zeros(value.shape)
    for token in range(len(value)):
        if decay is not None:
            state *= np.exp(decay[token].reshape(len(state), -1, 1))
        new = value[token].astype(np.float64)
        if beta is not None:
            new = beta[token][:, None] * (new - np.einsum("hkv,hk->hv", state, key[token]))
        state += np.einsum("hk,hv->hkv", key[token], new)
        out[token] = scale * np.einsum("hkv,hk->hv", state, query[token])
    return out


def rotation_tables(seed: int, positions: int, width: int, pairs: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Tables of cosine and sine [positions, width] as checkpoints hold them: each angle stands there twice."""
    angles = np.arange(positions)[:, None] * np.random.default_rng(seed).uniform(0.01, 1, width // 2)[None]
    whole = angles.repeat(2, 1) if pairs else np.concatenate([angles, angles], 1)
    return np.cos(whole).astype(np.float32), np.sin(whole).astype(np.float32)


def rotated(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, pairs: bool = False) -> np.ndarray:
    """x [..., sequence, head_dim] in float64, its first channels turned by tables [positions, half the channels]."""
    half = cos.shape[1]
    x, cos, sin = x.astype(np.float64), cos[: x.shape[-2]], sin[: x.shape[-2]]
    turned = x.copy()
    a, b = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if pairs else (slice(half), slice(half, 2 * half))
    turned[..., a], turned[..., b] = x[..., a] * cos - x[..., b] * sin, x[..., b] * cos + x[..., a] * sin
    return turned
