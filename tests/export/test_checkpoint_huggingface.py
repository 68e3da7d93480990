"""Opening Hugging Face folders: every weight as transformers loads it, read by rows, for each layout of files."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import CONTEXT, FAMILIES, VOCABULARY, change_json, reloaded, save_tiny, tiny_model

from satchel.export.checkpoint import Checkpoint, open_checkpoint


def same_weights(checkpoint: Checkpoint, expected: dict[str, np.ndarray]) -> None:
    """Every weight equal to the last bit, whole, by rows and by columns."""
    assert list(checkpoint.weights) == list(checkpoint.module.state_dict()) == list(expected)
    for name, array in expected.items():
        weight = checkpoint.weights[name]
        assert weight.numpy().dtype == np.float32
        np.testing.assert_array_equal(weight.numpy(), array, err_msg=name)
        np.testing.assert_array_equal(weight.rows(1, array.shape[0] - 1), array[1:-1], err_msg=name)
        if array.ndim > 1:
            np.testing.assert_array_equal(weight.columns(1, array.shape[1]), array[:, 1:], err_msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_equals_what_transformers_loads(family: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, family)
    same_weights(open_checkpoint(tmp_path), reloaded(tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_on_meta_and_computed_buffers_are_real_and_right(family: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, family)
    module = open_checkpoint(tmp_path).module
    assert {p.device.type for p in module.state_dict().values()} == {"meta"}
    assert not module.training
    built = dict(tiny_model(family).named_non_persistent_buffers())
    found = dict(module.named_non_persistent_buffers())
    assert list(found) == list(built)
    for name, buffer in built.items():
        assert torch.equal(found[name], buffer), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    save_tiny(tmp_path, dtype=dtype)
    same_weights(open_checkpoint(tmp_path), reloaded(tmp_path))


def test_shards_read_like_one_file(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    checkpoint = open_checkpoint(tmp_path)
    same_weights(checkpoint, reloaded(tmp_path))
    assert checkpoint.stored_bytes == sum(p.stat().st_size for p in tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("sharded", [False, True])
def test_torch_files_read_like_safetensors(sharded: bool, tmp_path: Path) -> None:
    state = tiny_model("llama", torch.bfloat16).state_dict()
    tiny_model("llama").config.save_pretrained(tmp_path)
    if sharded:
        names = list(state)
        parts = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
        for file, part in parts.items():
            torch.save({name: state[name] for name in part}, tmp_path / file)
        index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(state, tmp_path / "pytorch_model.bin")
    same_weights(open_checkpoint(tmp_path), {name: tensor.float().numpy() for name, tensor in state.items()})


def test_names_without_the_base_model_prefix_are_found(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    model.config.save_pretrained(tmp_path)
    state = {name.removeprefix("transformer."): t for name, t in model.state_dict().items() if name != "lm_head.weight"}
    torch.save({**state, "h.0.attn.masked_bias": torch.tensor(-1e4)}, tmp_path / "pytorch_model.bin")
    same_weights(open_checkpoint(tmp_path), {name: t.numpy() for name, t in model.state_dict().items()})


def test_experts_are_read_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path, "mixtral")
    weight = open_checkpoint(tmp_path).weights["model.layers.0.mlp.experts.gate_up_proj"]
    asked: list[str] = []
    original = type(weight).numpy
    monkeypatch.setattr(type(weight), "numpy", lambda self: asked.append(self.name) or original(self))
    weight.rows(1, 2)
    assert {name.split(".experts.")[1] for name in asked} == {"1.w1.weight", "1.w3.weight"}


def test_tied_names_share_one_weight(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama-tied")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.weights["lm_head.weight"] is checkpoint.weights["model.embed_tokens.weight"]


def test_a_head_that_differs_from_the_embedding_is_not_tied_to_it(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    change_json(tmp_path / "config.json", tie_word_embeddings=True)
    checkpoint = open_checkpoint(tmp_path)
    same_weights(checkpoint, reloaded(tmp_path))
    module = checkpoint.module
    assert module.get_parameter("lm_head.weight") is not module.get_parameter("model.embed_tokens.weight")


def test_every_end_id_of_the_generation_config_counts(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2, 7], "pad_token_id": 3}))
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.bos_token_id, checkpoint.eos_token_ids, checkpoint.pad_token_id) == (1, (7, 2), 3)


def test_ids_come_from_the_tokenizer_where_no_config_names_them(tmp_path: Path) -> None:
    save_tiny(tmp_path, tokenizer=True)
    (tmp_path / "generation_config.json").unlink()
    change_json(tmp_path / "config.json", bos_token_id=None, eos_token_id=None)
    change_json(tmp_path / "tokenizer_config.json", eos_token="<unk>", bos_token=None)
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.bos_token_id, checkpoint.eos_token_ids) == (None, (0,))


def test_facts_and_companions_are_carried(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny", tokenizer=True)
    (folder / "LICENSE.txt").write_text("Permission is granted")
    (folder / "README.md").write_text("# Tiny")
    change_json(folder / "tokenizer_config.json", chat_template="{{ messages }}")
    checkpoint = open_checkpoint(folder, attn_implementation="sdpa")
    assert (checkpoint.kind, checkpoint.name, checkpoint.model_type) == ("huggingface", "tiny", "llama")
    assert (checkpoint.vocab_size, checkpoint.max_context) == (VOCABULARY, CONTEXT)
    assert checkpoint.module.config._attn_implementation == "sdpa"
    assert checkpoint.companions["chat_template.jinja"] == b"{{ messages }}"
    names = {"LICENSE.txt", "README.md", "generation_config.json", "tokenizer_config.json", "chat_template.jinja"}
    assert set(checkpoint.companions) == names


def test_the_experts_implementation_reaches_the_config(tmp_path: Path) -> None:
    save_tiny(tmp_path, "mixtral")
    checkpoint = open_checkpoint(tmp_path, experts_implementation="batched_mm")
    assert checkpoint.module.config._experts_implementation == "batched_mm"


def test_nothing_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was tried")

    save_tiny(tmp_path, tokenizer=True)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    open_checkpoint(tmp_path)
