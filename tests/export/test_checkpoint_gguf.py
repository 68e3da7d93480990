"""Opening GGUF files: the model that was converted comes back, whatever the architecture and the quantization."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from support.checkpoints import (
    CONTEXT,
    GGUF_ARCHITECTURES,
    HEAD_DIM,
    VOCABULARY,
    gguf_metadata,
    tiny_model,
    write_gguf,
)
from support.gguf_families import to_gguf

from satchel.export.checkpoint import open_checkpoint
from satchel.export.checkpoint.gguf_file import dequantized, read_gguf
from satchel.export.errors import ExportError

Q = gguf.GGMLQuantizationType


def tiny_gguf(path: Path, family: str = "llama", **changes: Any) -> Path:
    """A tiny model as a GGUF file; `facts` and `tensors` in `changes` replace those of the model."""
    facts = {**gguf_metadata(family), **changes.pop("facts", {})}
    tensors = {**to_gguf(family, tiny_model(family)), **changes.pop("tensors", {})}
    facts, tensors = ({k: v for k, v in table.items() if v is not None} for table in (facts, tensors))
    return write_gguf(path / "tiny.gguf", GGUF_ARCHITECTURES[family], facts, tensors, **changes)


@pytest.mark.parametrize("family", GGUF_ARCHITECTURES)
def test_every_weight_of_the_converted_model_comes_back(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    checkpoint = open_checkpoint(tiny_gguf(tmp_path, family))
    state = model.state_dict()
    assert list(checkpoint.weights) == list(checkpoint.module.state_dict()) == list(state)
    exact = "gemma" not in family
    for name, tensor in state.items():
        weight, array = checkpoint.weights[name], tensor.numpy()
        # A norm's weight loses its last bits when the file adds one to it.
        np.testing.assert_allclose(weight.numpy(), array, rtol=0, atol=0 if exact else 1.2e-7, err_msg=name)
        np.testing.assert_array_equal(weight.rows(1, 3), weight.numpy()[1:3], err_msg=name)
        if array.ndim > 1:
            np.testing.assert_array_equal(weight.columns(3, 17), weight.numpy()[:, 3:17], err_msg=name)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3-wide", "gemma2"])
def test_quantized_weights_equal_what_transformers_loads(family: str, tmp_path: Path) -> None:
    types = {"token_embd.weight": Q.Q8_0, "output.weight": Q.F16}
    kinds = {"attn_q": Q.Q4_0, "attn_k": Q.Q8_0, "attn_v": Q.Q5_1, "ffn_up": Q.BF16, "ffn_down": Q.Q4_1}
    types |= {f"blk.{i}.{name}.weight": kind for i in range(2) for name, kind in kinds.items()}
    path = tiny_gguf(tmp_path, family, types=types, tokenizer=True)
    expected = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32, local_files_only=True
    ).state_dict()
    weights = open_checkpoint(path).weights
    assert set(weights) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(weights[name].numpy(), tensor.numpy(), err_msg=name)


def dequantizable() -> list[gguf.GGMLQuantizationType]:
    """Every type whose blocks the gguf library can turn into numbers."""
    found = []
    for kind in Q:
        try:
            gguf.quants.dequantize(np.zeros(gguf.GGML_QUANT_SIZES[kind][1], np.uint8), kind)
        except (NotImplementedError, KeyError):
            continue
        found.append(kind)
    return found


@pytest.mark.parametrize("kind", dequantizable(), ids=lambda kind: kind.name)
def test_rows_and_columns_of_every_type_equal_the_whole_tensor(kind: gguf.GGMLQuantizationType) -> None:
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    shape = (5, 3 * block)
    # Bytes below 60 keep every scale, whichever byte of the block it is in, a finite number.
    data = np.random.default_rng(3).integers(0, 60, size=5 * 3 * block_bytes, dtype=np.uint8)
    if kind in (Q.F32, Q.F16):
        values = np.random.default_rng(3).standard_normal(shape).astype(np.float32 if kind == Q.F32 else np.float16)
        data, whole = values.view(np.uint8).reshape(-1), values.astype(np.float32)
    else:
        whole = gguf.quants.dequantize(data.reshape(5, -1), kind)
    weight = dequantized("w", shape, kind, data)
    assert np.isfinite(whole).all() and len(np.unique(whole)) > 3
    np.testing.assert_array_equal(weight.numpy(), whole)
    np.testing.assert_array_equal(weight.rows(2, 4), whole[2:4])
    np.testing.assert_array_equal(weight.columns(block // 2, 2 * block + 1), whole[:, block // 2 : 2 * block + 1])
    vector = dequantized("v", (3 * block,), kind, data[: 3 * block_bytes])
    np.testing.assert_array_equal(vector.rows(1, 3 * block - 1), whole[0, 1:-1])


def test_experts_of_a_quantized_stack_are_read_alone(tmp_path: Path) -> None:
    types = {f"blk.0.ffn_{part}_exps.weight": Q.Q8_0 for part in ("gate", "up")}
    weight = open_checkpoint(tiny_gguf(tmp_path, "qwen3_moe", types=types)).weights[
        "model.layers.0.mlp.experts.gate_up_proj"
    ]
    np.testing.assert_array_equal(weight.rows(1, 2), weight.numpy()[1:2])


def test_the_config_says_what_the_metadata_says(tmp_path: Path) -> None:
    facts = {"rope.freq_base": 500000.0, "attention.sliding_window": 24, "final_logit_softcapping": 30.0}
    config = open_checkpoint(tiny_gguf(tmp_path, "gemma2", facts=facts)).module.config
    assert (config.head_dim, config.query_pre_attn_scalar, config.sliding_window) == (HEAD_DIM, HEAD_DIM, 24)
    assert (config.final_logit_softcapping, config.rope_parameters["rope_theta"]) == (30.0, 500000.0)
    config = open_checkpoint(tiny_gguf(tmp_path, "qwen3_moe")).module.config
    assert (config.num_experts, config.num_experts_per_tok, config.norm_topk_prob) == (3, 2, True)
    assert (config.moe_intermediate_size, config.rms_norm_eps) == (32, 2.0**-17)


def test_llama_3_frequency_factors_go_into_the_rotary_buffers(tmp_path: Path) -> None:
    plain = open_checkpoint(tiny_gguf(tmp_path)).module.get_buffer("model.rotary_emb.inv_freq")
    factors = np.linspace(1, 8, HEAD_DIM // 2, dtype=np.float32)
    module = open_checkpoint(tiny_gguf(tmp_path, tensors={"rope_freqs.weight": factors})).module
    for name in ("inv_freq", "original_inv_freq"):
        assert torch.equal(module.get_buffer(f"model.rotary_emb.{name}"), plain / torch.from_numpy(factors))


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_rope_scaling_is_carried_over(kind: str, tmp_path: Path) -> None:
    facts = {"rope.scaling.type": kind, "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}
    found = open_checkpoint(tiny_gguf(tmp_path, "qwen2", facts=facts)).module
    rope = {"rope_type": kind, "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 32}
    built = tiny_model("qwen2", rope_parameters=rope if kind == "yarn" else {**rope, "rope_type": "linear"})
    assert torch.equal(found.get_buffer("model.rotary_emb.inv_freq"), built.get_buffer("model.rotary_emb.inv_freq"))
    assert found.model.rotary_emb.attention_scaling == built.model.rotary_emb.attention_scaling


def test_gemma_3_scales_its_full_attention_layers_only(tmp_path: Path) -> None:
    facts = {"rope.freq_base": 1e6, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    rope = open_checkpoint(tiny_gguf(tmp_path, "gemma3_text", facts=facts)).module.config.rope_parameters
    assert (rope["full_attention"]["factor"], rope["full_attention"]["rope_theta"]) == (8.0, 1e6)
    assert (rope["sliding_attention"]["rope_type"], rope["sliding_attention"]["rope_theta"]) == ("default", 10000.0)


def test_the_tokenizer_and_its_ids_come_from_the_metadata(tmp_path: Path) -> None:
    more = {
        "tokenizer.ggml.eot_token_id": 0,
        "tokenizer.chat_template": "{{ bos_token }}",
        "general.license": "apache-2.0",
        "general.name": "Tiny",
    }
    checkpoint = open_checkpoint(tiny_gguf(tmp_path, tokenizer=True, metadata=more))
    assert (checkpoint.kind, checkpoint.name, checkpoint.model_type) == ("gguf", "tiny.gguf", "llama")
    assert (checkpoint.vocab_size, checkpoint.max_context) == (VOCABULARY, CONTEXT)
    assert (checkpoint.bos_token_id, checkpoint.eos_token_ids, checkpoint.pad_token_id) == (1, (2, 0), None)
    assert checkpoint.companions["chat_template.jinja"] == b"{{ bos_token }}"
    assert json.loads(checkpoint.companions["generation_config.json"]) == {"bos_token_id": 1, "eos_token_id": [2, 0]}
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    assert json.loads(checkpoint.companions["tokenizer_config.json"]) == names
    assert checkpoint.companions["README.md"] == b"---\nlicense: apache-2.0\n---\n# Tiny\n"
    assert checkpoint.tokenizer is not None and checkpoint.tokenizer.add_bos


def test_sampling_settings_of_the_metadata_are_those_of_a_generation_config(tmp_path: Path) -> None:
    sampling = {"temp": 0.5, "top_k": 20, "top_p": 0.75, "penalty_repeat": 1.25}
    metadata = {f"general.sampling.{key}": value for key, value in sampling.items()}
    path = tiny_gguf(tmp_path, tokenizer=True, metadata={**metadata, "tokenizer.ggml.suppress_tokens": [5, 7]})
    assert json.loads(open_checkpoint(path).companions["generation_config.json"]) == {
        "temperature": 0.5, "top_k": 20, "top_p": 0.75, "repetition_penalty": 1.25, "do_sample": True,
        "suppress_tokens": [5, 7], "bos_token_id": 1, "eos_token_id": [2],
    }  # fmt: skip


def test_a_vocabulary_that_splits_single_digits_does_so(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path, tokenizer=True, metadata={"tokenizer.ggml.pre": "smollm"})
    tokenizer = open_checkpoint(path).tokenizer
    assert tokenizer is not None
    splits = json.loads(tokenizer.file)["pre_tokenizer"]["pretokenizers"]
    assert [split["type"] for split in splits] == ["Split", "Split", "ByteLevel"]
    assert splits[0]["pattern"] == {"Regex": r"\p{N}"}


def test_a_file_without_tokenizer_has_none(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_gguf(tmp_path))
    assert checkpoint.tokenizer is None
    assert (checkpoint.companions, checkpoint.eos_token_ids) == ({}, ())


EXTRA = np.ones((2, 32), np.float32)
REFUSALS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "longrope": ({"facts": {"rope.scaling.type": "longrope"}}, ("'longrope'", "rope_factors_long", "original float")),
    "unknown scaling": ({"facts": {"rope.scaling.type": "odd"}}, ("'odd'", "linear and yarn")),
    "too many blocks": ({"facts": {"block_count": 1 << 31}}, ("block_count is 2147483648", "2 blocks")),
    "too wide heads": ({"facts": {"attention.key_length": 1 << 30}}, ("blk.0.attn_q.weight has 64 rows", "4 heads")),
    "no heads": ({"facts": {"attention.head_count": 0}}, ("attention.head_count is 0",)),
    "negative layers": ({"facts": {"nextn_predict_layers": 9}}, ("block_count",)),
    "other width": ({"facts": {"embedding_length": 128}}, ("embedding_length is 128", "[448, 64]")),
    "unknown key": ({"facts": {"attention.scale": 0.5}}, ("llama.attention.scale", "drop")),
    "yarn detail": (
        {"facts": {"rope.scaling.type": "yarn", "rope.scaling.yarn_ext_factor": 0.5}},
        ("yarn_ext_factor", "drop"),
    ),
    "not causal": ({"facts": {"attention.causal": False}}, ("llama.attention.causal", "drop")),
    "experts in qwen2": ({"family": "qwen2", "facts": {"expert_count": 8}}, ("qwen2.expert_count", "drop")),
    "linear with a factor of attention": (
        {"facts": {"rope.scaling.factor": 4.0, "rope.scaling.attn_factor": 2.0}},
        ("rope.scaling.attn_factor", "drop"),
    ),
    "partial rotary": ({"facts": {"rope.dimension_count": 8}}, ("rope.dimension_count is 8", "16")),
    "missing key": ({"facts": {"block_count": None}}, ("llama.block_count is missing",)),
    "uneven layers": ({"facts": {"attention.head_count_kv": [2, 1]}}, ("head_count_kv differs between layers",)),
    "unplaced tensor": ({"tensors": {"blk.0.attn_sinks.weight": EXTRA[0]}}, ("tensor blk.0.attn_sinks.weight",)),
    "bias of one layer": (
        {"tensors": {"blk.0.attn_q.bias": np.ones(64, np.float32)}},
        ("layers.1.self_attn.q_proj.bias", "missing"),
    ),
    "unplaced factors": ({"tensors": {"rope_factors_long.weight": EXTRA[0]}}, ("rope_factors_long.weight",)),
    "wrong factors": ({"tensors": {"rope_freqs.weight": EXTRA[0]}}, ("32 factors for 8 frequencies",)),
    "missing tensor": ({"tensors": {"blk.1.ffn_up.weight": None}}, ("layers.1.mlp.up_proj.weight", "is missing")),
    "wrong shape": ({"tensors": {"blk.1.ffn_up.weight": EXTRA}}, ("mlp.up_proj.weight", "[2, 32]", "[96, 64]")),
    "split file": ({"metadata": {"split.count": 3}}, ("part 1 of 3", "no part 2 of 3")),
    "impossible part": ({"metadata": {"split.count": 3, "split.no": 7}}, ("part 7 of 3",)),
    "unknown split": ({"tokenizer": True, "metadata": {"tokenizer.ggml.pre": "strange"}}, ("'strange'", "--tokenizer")),
    "id beyond vocabulary": (
        {"tokenizer": True, "metadata": {"tokenizer.ggml.padding_token_id": 9999}},
        ("padding_token_id is 9999", "--tokenizer"),
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_would_be_dropped_is_refused_by_name(case: str, tmp_path: Path) -> None:
    changes, parts = REFUSALS[case]
    path = tiny_gguf(tmp_path, **changes)
    with pytest.raises(ExportError) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)
    for part in (str(path), *parts):
        assert part in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]


def test_an_unknown_architecture_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", "mamba", {}, {"token_embd.weight": EXTRA})
    with pytest.raises(ExportError, match=r"'mamba'.* llama, .*checkpoint folder"):
        open_checkpoint(path)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path, tokenizer=True)
    whole = path.read_bytes()
    for length in (0, 3, 6, 20, 100, 3000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ExportError, match=r"tiny\.gguf: (cut short.*download it again|not a GGUF file.*pass)"):
            read_gguf(path)
    path.write_bytes(whole)
    assert len(read_gguf(path).tensors) == 21


def test_damaged_headers_are_refused(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + (9).to_bytes(4, "little") + whole[8:])
    with pytest.raises(ExportError, match=r"GGUF version 9.*convert it again"):
        read_gguf(path)
    name = b"blk.0.attn_norm.weight"
    kind = whole.index(name) + len(name) + 4 + 8
    path.write_bytes(whole[:kind] + (99).to_bytes(4, "little") + whole[kind + 4 :])
    with pytest.raises(ExportError, match=r"blk\.0\.attn_norm\.weight .*type 99"):
        read_gguf(path)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def tensor(name: str = "w", shape: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def number(key: str, value: int) -> bytes:
    return text(key) + struct.pack("<II", 4, value)


HUGE = 1 << 63
DAMAGED: dict[str, tuple[list[bytes], list[bytes], str]] = {
    "sizes that overflow": ([], [tensor(shape=(HUGE, HUGE))], "tensor w ends beyond"),
    "a size that overflows with its type": ([], [tensor(shape=(HUGE - 32, 4), kind=2)], "tensor w ends beyond"),
    "an offset that overflows": ([], [tensor(offset=(1 << 64) - 32)], "tensor w ends beyond"),
    "an offset beside the alignment": ([], [tensor(offset=8)], "offset 8, not a multiple of 32"),
    "a dimension of 0": ([], [tensor(shape=(0, HUGE))], "dimension of 0"),
    "many dimensions": ([], [tensor(shape=(1,) * 9)], "9 dimensions"),
    "no dimensions": ([], [tensor(shape=())], "0 dimensions"),
    "rows of half a block": ([], [tensor(shape=(16, 2), kind=2)], "rows of 16"),
    "a tensor twice": ([], [tensor(), tensor()], "tensor w twice"),
    "a key twice": ([number("a", 1), number("a", 2)], [], "key a twice"),
    "a name of control characters": ([], [tensor(name="a\nb")], r"name 'a\\nb'"),
    "a text that overflows": ([struct.pack("<Q", HUGE) + b"a"], [], "ends inside its metadata"),
    "an array that overflows": ([text("a") + struct.pack("<IIQ", 9, 10, HUGE)], [], f"array of {HUGE} elements"),
    "an array of arrays": ([text("a") + struct.pack("<IIQ", 9, 9, 1)], [], "array of arrays"),
    "an unknown type": ([text("a") + struct.pack("<I", 77)], [], "unknown type 77"),
    "an alignment of 3": ([number("general.alignment", 3)], [], "general.alignment 3"),
    "an alignment of 0": ([number("general.alignment", 0)], [], "general.alignment 0"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_overflows_or_leaves_the_file_is_refused(case: str, tmp_path: Path) -> None:
    keys, tensors, part = DAMAGED[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join(keys + tensors) + bytes(128))
    with pytest.raises(ExportError, match=rf"m\.gguf: .*{part}.*") as caught:
        read_gguf(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("counts", [(HUGE, 0), (0, HUGE), ((1 << 64) - 1, (1 << 64) - 1)])
def test_counts_beyond_the_file_are_refused(counts: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts))
    with pytest.raises(ExportError, match=r"m\.gguf: cut short"):
        read_gguf(path)
