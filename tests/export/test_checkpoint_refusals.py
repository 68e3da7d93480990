"""Folders that are no exportable checkpoint: one line that names the file, what was found and what to do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from support.checkpoints import change_json, refused, save_tiny, tiny_model

from satchel.export.checkpoint import huggingface
from satchel.export.errors import ExportError

CONFIG_CHANGES: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "quantized": ({"quantization_config": {"quant_method": "aqlm"}}, ("config.json", "aqlm", "original float")),
    "remote code": (
        {"model_type": "mystery", "auto_map": {"AutoConfig": "x.Y"}},
        ("config.json", "mystery", "needs code"),
    ),
    "unknown": ({"model_type": "mystery"}, ("config.json", "mystery", "is unknown")),
    "no model type": ({"model_type": None}, ("config.json", "model_type", "original model")),
    "encoder": ({"model_type": "bert"}, ("bert is not a causal language model", "decoder-only")),
    "encoder-decoder": ({"model_type": "t5", "is_encoder_decoder": True}, ("t5", "encoder-decoder", "decoder-only")),
    "multimodal": ({"model_type": "paligemma"}, ("paligemma is a multimodal model", "both directions")),
    "impossible": ({"num_attention_heads": 5}, ("config.json", "not a multiple of the number of attention heads")),
    "wrong type": ({"vocab_size": "many"}, ("config.json", "transformers")),
    "wrong shape": (
        {"intermediate_size": 32},
        ("mlp.gate_proj.weight", "[96, 64]", "[32, 64]", "belongs to these weights"),
    ),
    "other depth": ({"num_hidden_layers": 3}, ("model.layers.2.", "is missing", "more)", "download")),
}


@pytest.mark.parametrize("case", CONFIG_CHANGES)
def test_a_config_that_cannot_be_exported_is_refused_by_name(case: str, tmp_path: Path) -> None:
    changes, parts = CONFIG_CHANGES[case]
    save_tiny(tmp_path)
    change_json(tmp_path / "config.json", **changes)
    refused(tmp_path, str(tmp_path), *parts)


def test_a_path_that_is_no_folder_says_what_to_give(tmp_path: Path) -> None:
    refused("org/some-model-7B", "satchel exports from local files", "hf download org/some-model-7B --local-dir DIR")
    refused(tmp_path / "nowhere", str(tmp_path / "nowhere"), "no such file or folder", "pass a checkpoint folder")
    refused(tmp_path, "config.json", "no such file", "save_pretrained")


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("config.json", "{", ("config.json", "not valid JSON", "download it again")),
        ("adapter_config.json", "{}", ("holds an adapter only", "--adapter")),
    ],
)
def test_a_folder_with_one_file_that_is_not_enough_is_refused(
    name: str, content: str, parts: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    refused(tmp_path, *parts)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    tiny_model("llama").config.save_pretrained(tmp_path)
    refused(tmp_path, "no weights found", "model.safetensors")
    (tmp_path / "model.Q4_0.gguf").write_bytes(b"")
    refused(tmp_path, "pass the file", "model.Q4_0.gguf")


NORM = "model.norm.weight"
INDICES: dict[str, tuple[Callable[[dict[str, str]], object], tuple[str, ...]]] = {
    "outside": (lambda old: {"weight_map": {NORM: "../model.safetensors"}}, ("../model.safetensors",)),
    "extra": (lambda old: {"weight_map": {**old, "extra": old[NORM]}}, ("extra", "download both again")),
    "absent": (lambda old: {"weight_map": {**old, NORM: "absent.safetensors"}}, ("absent.safetensors", "download")),
    "none": (lambda old: [], ("weight_map", "download it again")),
}


@pytest.mark.parametrize("case", INDICES)
def test_an_index_that_does_not_fit_its_shards_is_refused(case: str, tmp_path: Path) -> None:
    change, parts = INDICES[case]
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="200KB")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps(change(json.loads(index.read_text())["weight_map"])))
    refused(tmp_path, "index.json", *parts)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="200KB")
    lost = sorted(tmp_path.glob("model-*.safetensors"))[1]
    lost.unlink()
    refused(tmp_path, "model.safetensors.index.json", lost.name, "download the missing shard")


def header(entry: dict[str, object], data: bytes = b"\0" * 8) -> bytes:
    """A safetensors file of one tensor."""
    text = json.dumps({"model.norm.weight": entry}).encode()
    return len(text).to_bytes(8, "little") + text + data


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
SAFETENSORS: dict[str, tuple[Callable[[bytes], bytes], tuple[str, ...]]] = {
    "cut in the data": (lambda whole: whole[:-100], ("cut short", "tensor")),
    "cut in the header": (lambda whole: whole[:100], ("cut short", "inside its header")),
    "cut in the length": (lambda whole: whole[:5], ("cut short", "inside its header")),
    "no json": (lambda _: (4).to_bytes(8, "little") + b"abcd", ("not JSON",)),
    "no table": (lambda _: (2).to_bytes(8, "little") + b"[]", ("not a JSON object",)),
    "damaged entry": (lambda _: header({"dtype": "F32"}), ("model.norm.weight", "damaged")),
    "wrong length": (lambda _: header({**GOOD, "shape": [3]}), ("model.norm.weight", "8 bytes", "[3]")),
    "beyond the end": (lambda _: header({**GOOD, "data_offsets": [8, 16]}), ("model.norm.weight", "cut short")),
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_a_damaged_safetensors_file_is_refused(case: str, tmp_path: Path) -> None:
    damage, parts = SAFETENSORS[case]
    save_tiny(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    refused(tmp_path, "model.safetensors", *parts)


def test_an_eight_bit_float_is_refused_by_name(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(header({"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}))
    refused(tmp_path, "model.norm.weight", "F8_E4M3", "original float checkpoint")


class Code:
    """Runs a command when it is unpickled without care."""

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return print, ("code ran",)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model("llama").config.save_pretrained(tmp_path)
    torch.save({"model.norm.weight": Code()}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "pytorch_model.bin", "could run code", "safetensors")
    assert "code ran" not in capsys.readouterr().out


TORCH_FILES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "old format": (
        lambda path: torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False),
        ("not a zip archive", "save_pretrained"),
    ),
    "cut short": (
        lambda path: (torch.save({"a": torch.ones(2000)}, path), path.write_bytes(path.read_bytes()[:3000]))[0],
        ("cut short or damaged", "download it again"),
    ),
    "no table": (lambda path: torch.save([torch.ones(2)], path), ("tensors", "state_dict")),
}


@pytest.mark.parametrize("case", TORCH_FILES)
def test_a_torch_file_that_is_no_table_of_tensors_is_refused(case: str, tmp_path: Path) -> None:
    write, parts = TORCH_FILES[case]
    tiny_model("llama").config.save_pretrained(tmp_path)
    write(tmp_path / "pytorch_model.bin")
    refused(tmp_path, "pytorch_model.bin", *parts)


def test_experts_of_unequal_shape_are_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "mixtral")
    from safetensors.torch import load_file, save_file

    state = load_file(tmp_path / "model.safetensors")
    name = next(n for n in state if re.search(r"experts\.1\.w2", n))
    state[name] = state[name][:, :5].contiguous()
    save_file(state, tmp_path / "model.safetensors")
    refused(tmp_path, "mlp.experts.down_proj", "do not fit together")


def test_a_model_without_a_longest_context_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"config\.json: .*max_position_embeddings"):
        huggingface._max_context(transformers.PreTrainedConfig(), tmp_path)
