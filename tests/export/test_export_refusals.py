"""What the export command says of input that it cannot use: exit code 2, one line, and nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.checkpoints import change_json, gguf_metadata, save_tiny, tiny_model, to_gguf, write_gguf
from support.export_command import refused


def sharded(folder: Path) -> Path:
    tiny_model("llama").save_pretrained(folder, max_shard_size="200KB")
    return folder


def with_config(**changes: object) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        save_tiny(folder)
        change_json(folder / "config.json", **changes)
        return folder

    return make


def without_a_shard(folder: Path) -> Path:
    sorted(sharded(folder).glob("model-*.safetensors"))[1].unlink()
    return folder


def with_a_short_shard(folder: Path) -> Path:
    path = sorted(sharded(folder).glob("model-*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])
    return folder


def with_an_index_of_absent_files(folder: Path) -> Path:
    index = sharded(folder) / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    change_json(index, weight_map={**weight_map, "model.norm.weight": "model-00009.safetensors"})
    return folder


def short_gguf(folder: Path) -> Path:
    folder.mkdir()
    path = write_gguf(folder / "model.gguf", "llama", gguf_metadata("llama"), to_gguf("llama", tiny_model("llama")))
    path.write_bytes(path.read_bytes()[:-1000])
    return path


BAD_CHECKPOINTS: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "a missing shard": (without_a_shard, ("model-00002-of-", "missing", "download")),
    "a shard cut short": (with_a_short_shard, ("model-00002-of-", "cut short", "download it again")),
    "an index of absent files": (with_an_index_of_absent_files, ("model-00009.safetensors", "download")),
    "a tensor of another shape": (with_config(intermediate_size=32), ("mlp.gate_proj.weight", "[96, 64]", "[32, 64]")),
    "a missing tensor": (with_config(num_hidden_layers=3), ("model.layers.2.", "is missing", "download")),
    "no model_type": (with_config(model_type=None), ("config.json", "model_type")),
    "an encoder": (with_config(model_type="bert"), ("bert is not a causal language model", "decoder-only")),
    "quantized weights": (with_config(quantization_config={"quant_method": "aqlm"}), ("aqlm", "original float")),
    "a GGUF file cut short": (short_gguf, ("model.gguf", "cut short", "download it again")),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_a_bad_checkpoint_is_refused(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, says = BAD_CHECKPOINTS[case]
    refused(capsys, tmp_path, make(tmp_path / "source"), "-o", tmp_path / "bundle", says=says)


def test_a_name_on_a_hub_is_told_how_to_be_downloaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    says = ("satchel exports from local files", "hf download org/model-7B --local-dir DIR")
    refused(capsys, tmp_path, "org/model-7B", "-o", tmp_path / "bundle", says=says)


OPTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "precision": (("--precision", "int3"), ("--precision int3", "int8 or int4")),
    "target": (("--target", "abacus"), ("--target abacus", "choose cpu")),
    "context beyond the model's": (
        ("--max-context", "129"),
        ("--max-context 129", "128 positions", "give at most 128"),
    ),
    "no context": (("--max-context", "0"), ("--max-context 0", "at least 1 position")),
    "absent tokenizer": (("--tokenizer", "nowhere.json"), ("nowhere.json", "no such file", "--tokenizer")),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_wrong_option_is_refused(
    case: str, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, says = OPTIONS[case]
    refused(capsys, tmp_path, tiny_checkpoint, "-o", tmp_path / "bundle", *options, says=says)


def test_too_small_a_disk_is_refused_before_the_work(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 1 << 20}))
    says = (str(tmp_path), "MiB are needed and 1 MiB are free", "free some space")
    refused(capsys, tmp_path, tiny_checkpoint, "-o", tmp_path / "new" / "bundle", says=says)


def test_wrong_arguments_are_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    from satchel.runtime.cli import main as cli

    for arguments in (["export"], ["export", "source", "-o", "b", "--max-context", "many"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
