"""A tiny real bundle: two layers of GroupQueryAttention on seeded weights, three graphs over one weights.bin."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from support.tiny_tokenizers import byte_level_json

from satchel.runtime.bundle.digest import manifest_digest
from satchel.runtime.bundle.graph_specs import Graphs, GraphSpec, TensorSpec
from satchel.runtime.bundle.manifest import (
    CacheLayer,
    CacheSpec,
    Embeddings,
    FileRecord,
    Manifest,
    ModelFacts,
    Source,
    TokenizerSpec,
)

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 16  # GroupQueryAttention wants head_dim in multiples of 16
HIDDEN = HEADS * HEAD_DIM
VOCABULARY = 400
MAX_CONTEXT = 64
CONTRIB = "com.microsoft"

ONNX_TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}


@dataclass
class Weights:
    """Initializers as references into weights.bin, each tensor written once at an aligned offset."""

    content: bytearray = field(default_factory=bytearray)
    tensors: list[onnx.TensorProto] = field(default_factory=list)

    def add(self, name: str, array: np.ndarray) -> None:
        """Append float32 `array`, and an initializer of that name that points at it."""
        self.content.extend(b"\0" * (-len(self.content) % 64))
        tensor = numpy_helper.from_array(array.astype(np.float32), name)
        place = {"location": "weights.bin", "offset": len(self.content), "length": len(tensor.raw_data)}
        self.content.extend(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        self.tensors.append(tensor)


def make_weights(seed: int = 0, max_context: int = MAX_CONTEXT) -> Weights:
    """Random weights, large enough that the most likely token changes from step to step."""
    rng, weights = np.random.default_rng(seed), Weights()
    weights.add("embed", rng.normal(0, 1, (VOCABULARY, HIDDEN)))
    weights.add("head", rng.normal(0, 1, (HIDDEN, VOCABULARY)))
    weights.add("gain", np.ones(HIDDEN))
    angles = np.arange(max_context)[:, None] / 10000 ** (np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    weights.add("cos", np.cos(angles))
    weights.add("sin", np.sin(angles))
    for layer in range(LAYERS):
        for name, width in (("q", HIDDEN), ("k", KV_HEADS * HEAD_DIM), ("v", KV_HEADS * HEAD_DIM), ("o", HIDDEN)):
            weights.add(f"{name}.{layer}", rng.normal(0, HIDDEN**-0.5, (HIDDEN, width)))
    return weights


def cache_layers() -> tuple[CacheLayer, ...]:
    """The manifest's description of the cache."""
    return tuple(
        CacheLayer(
            kv_heads=KV_HEADS,
            key_dim=HEAD_DIM,
            value_dim=HEAD_DIM,
            past_key=f"past_key_values.{layer}.key",
            past_value=f"past_key_values.{layer}.value",
            present_key=f"present.{layer}.key",
            present_value=f"present.{layer}.value",
        )
        for layer in range(LAYERS)
    )


def graph_spec(phase: str) -> GraphSpec:
    """The manifest's description of one graph."""
    cache = ("batch", KV_HEADS, "capacity", HEAD_DIM)
    layers = cache_layers()
    past = [name for layer in layers for name in (layer.past_key, layer.past_value)]
    present = [name for layer in layers for name in (layer.present_key, layer.present_value)]
    return GraphSpec(
        file=f"{phase}.onnx",
        session={"session.disable_prepacking": "1"},
        session_of=None,
        inputs=(
            TensorSpec("input_ids", "int64", ("batch", 1 if phase == "decode" else "sequence")),
            TensorSpec("attention_mask", "int64", ("batch", "total")),
            *(TensorSpec(name, "float32", cache) for name in past),
        ),
        outputs=(
            TensorSpec("hidden_states", "float32", ("batch", "sequence", HIDDEN))
            if phase == "embed"
            else TensorSpec("logits", "float32", ("batch", "sequence" if phase == "score" else 1, VOCABULARY)),
            *(TensorSpec(name, "float32", cache) for name in present),
        ),
    )


def make_graph(phase: str, weights: Weights, rows_mix: float = 0.0) -> onnx.ModelProto:
    """embed -> (norm -> q, k, v -> GroupQueryAttention -> o -> add) per layer -> [last token] -> head."""
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
    for i in range(LAYERS):
        past, present = f"past_key_values.{i}", f"present.{i}"
        nodes.append(node("SimplifiedLayerNormalization", [f"h{i}", "gain"], [f"n{i}"], axis=-1, epsilon=1e-5))
        nodes += [node("MatMul", [f"n{i}", f"{name}.{i}"], [f"{name}_{i}"]) for name in "qkv"]
        attention_inputs = [f"q_{i}", f"k_{i}", f"v_{i}", f"{past}.key", f"{past}.value"]
        nodes.append(
            node(
                "GroupQueryAttention",
                [*attention_inputs, "seqlens_k", "total_i32", "cos", "sin"],
                [f"a{i}", f"{present}.key", f"{present}.value"],
                domain=CONTRIB,
                num_heads=HEADS,
                kv_num_heads=KV_HEADS,
                do_rotary=1,
            )
        )
        nodes.append(node("MatMul", [f"a{i}", f"o.{i}"], [f"p{i}"]))
        nodes.append(node("Add", [f"h{i}", f"p{i}"], [f"h{i + 1}"]))
    nodes.append(node("SimplifiedLayerNormalization", [f"h{LAYERS}", "gain"], ["states"], axis=-1, epsilon=1e-5))
    if rows_mix:
        nodes[-1].output[0] = "unmixed"
        nodes += [
            node("ReduceSum", ["unmixed", "axis0"], ["sum"], keepdims=1),
            node("Mul", ["sum", "mix"], ["share"]),
            node("Add", ["unmixed", "share"], ["states"]),
        ]
    if phase == "embed":
        nodes[-1].output[0] = "hidden_states"
    elif phase != "score":
        nodes += [  # row of the last real token: min(real, sequence) - 1
            node("Shape", ["input_ids"], ["sequence"], start=1, end=2),
            node("Min", ["real", "sequence"], ["end"]),
            node("Sub", ["end", "one"], ["row"]),
            node("Unsqueeze", ["row", "axes12"], ["rows"]),
            node("GatherND", ["states", "rows"], ["picked"], batch_dims=1),
        ]
    if phase != "embed":
        nodes.append(node("MatMul", ["states" if phase == "score" else "picked", "head"], ["logits"]))
    spec = graph_spec(phase)
    hidden = ("batch", 1 if phase == "decode" else "sequence", HIDDEN)
    graph = helper.make_graph(
        nodes, phase, _values(spec.inputs), _values(spec.outputs), weights.tensors,
        value_info=_values([TensorSpec(f"h{i}", "float32", hidden) for i in range(LAYERS + 1)]),
    )  # fmt: skip
    if rows_mix:
        graph.initializer.append(numpy_helper.from_array(np.float32(rows_mix), "mix"))
        graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), "axis0"))
    for name, value in (("axis1", [1]), ("one", [1]), ("axes12", [1, 2])):
        graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), name))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _values(tensors: Sequence[TensorSpec]) -> list[onnx.ValueInfoProto]:
    return [helper.make_tensor_value_info(spec.name, ONNX_TYPES[spec.dtype], spec.shape) for spec in tensors]


def write_bundle(
    folder: Path,
    *,
    tokenizer: bytes | None = None,
    tokenizer_kind: str | None = "tokenizer.json",
    add_bos: bool = False,
    eos_token_ids: tuple[int, ...] = (),
    seed: int = 0,
    max_context: int = MAX_CONTEXT,
    companions: Mapping[str, bytes] | None = None,
    rows_mix: float = 0.0,
    embeddings: str | None = None,
) -> Path:
    """Write a bundle into the new folder `folder` and return it.

    `tokenizer` is the content of the tokenizer's file, by default a byte-level tokenizer.json; `tokenizer_kind` None
    leaves the tokenizer out. `companions` are further files, such as a chat template. In decode, each row gets
    `rows_mix` times the sum of all rows, before the head. `embeddings` is the pooling of a graph of hidden states.
    """
    folder.mkdir(parents=True)
    weights = make_weights(seed, max_context)
    contents = {**(companions or {}), "weights.bin": bytes(weights.content)}
    for phase in ("prefill", "decode", "score"):
        contents[f"{phase}.onnx"] = make_graph(
            phase, weights, rows_mix if phase == "decode" else 0.0
        ).SerializeToString()
    if embeddings:
        contents["embed.onnx"] = make_graph("embed", weights).SerializeToString()
    spec = None
    if tokenizer_kind:
        name = "tokenizer.model" if tokenizer_kind == "sentencepiece" else "tokenizer.json"
        contents[name] = byte_level_json() if tokenizer is None else tokenizer
        spec = TokenizerSpec(kind=tokenizer_kind, file=name, add_bos=add_bos, corpus=())
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    manifest = Manifest(
        producer={"satchel": "0.1.0"},
        source=Source(kind="test", name="tiny", model_type="tiny"),
        provenance=None,
        target="cpu",
        precision="fp32",
        recipe=None,
        model=ModelFacts(
            parameters=len(weights.content) // 4,
            vocab_size=VOCABULARY,
            max_context=max_context,
            bos_token_id=None if tokenizer_kind is None else 1,
            eos_token_ids=eos_token_ids,
            pad_token_id=None,
        ),
        kv_cache=CacheSpec(mode="shared", dtype="float32", layers=cache_layers()),
        graphs=Graphs(prefill=graph_spec("prefill"), decode=graph_spec("decode"), score=graph_spec("score")),
        variants=(),
        static=None,
        plain=None,
        custom_ops=(),
        float_weights="float32",
        layers={},
        token_multiple=1,
        tokenizer=spec,
        passes=(),
        files={
            name: FileRecord(**record(content))
            for name, content in contents.items()  # type: ignore[arg-type]
        },
        certificate=None,
        specialized=None,
        embeddings=Embeddings(embeddings, HIDDEN, graph_spec("embed")) if embeddings else None,
    )
    write_manifest(folder, manifest.to_json())
    return folder


def read_manifest(folder: Path) -> dict:
    """The manifest as parsed JSON, for a test to change."""
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def write_manifest(folder: Path, document: object) -> None:
    """Write parsed JSON as the bundle's manifest, with the digest that it then has."""
    if isinstance(document, dict) and "digest" in document:
        document = {**document, "digest": manifest_digest(document)}
    (folder / "manifest.json").write_text(json.dumps(document), encoding="utf-8")


def set_at(document: dict, path: Sequence[str | int], value: object) -> None:
    """Change the entry at a path of keys in parsed JSON."""
    for key in path[:-1]:
        document = document[key]
    document[path[-1]] = value


def change_manifest(folder: Path, *path: str | int, to: object) -> None:
    """Change the entry at a path of keys in the bundle's manifest."""
    document = read_manifest(folder)
    set_at(document, path, to)
    write_manifest(folder, document)


def replace_file(folder: Path, name: str, content: bytes) -> None:
    """Put a file into the bundle, in the place of one of its name, with the manifest's record to match."""
    (folder / name).write_bytes(content)
    change_manifest(folder, "files", name, to=record(content))


def record(content: bytes) -> dict[str, object]:
    """What a manifest says of a file with this content."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
