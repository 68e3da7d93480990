"""Folders whose names, tensors or config differ from what save_pretrained writes: read right, named or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import change_json, refused, reloaded, save_tiny

from satchel.export.checkpoint import open_checkpoint

Tensors = dict[str, torch.Tensor]


def rewritten(folder: Path, change: Callable[[Tensors], Tensors], family: str = "llama") -> dict[str, np.ndarray]:
    """Save a tiny model, then change its file; returns the weights as they were."""
    save_tiny(folder, family)
    expected = reloaded(folder)
    path = folder / "model.safetensors"
    save_file({name: tensor.clone() for name, tensor in change(load_file(path)).items()}, path)
    return expected


PREFIXES: dict[str, Callable[[str], str]] = {
    "_orig_mod.": lambda name: f"_orig_mod.{name}",
    "_orig_mod. inside": lambda name: name.replace("layers.1.", "layers.1._orig_mod."),
    "module.": lambda name: f"module.{name}",
    "module._orig_mod.": lambda name: f"module._orig_mod.{name}",
    "base_model.model.": lambda name: f"base_model.model.{name}",
    "model.language_model.": lambda name: name.replace("model.", "model.language_model.", 1),
    "language_model.": lambda name: f"language_model.{name}",
    "model.": lambda name: f"model.{name}",
    "base_layer.": lambda name: f"base_model.model.{name}".replace("q_proj.", "q_proj.base_layer."),
}


@pytest.mark.parametrize("family", ["llama", "llama-tied", "mixtral"])
@pytest.mark.parametrize("case", PREFIXES)
def test_prefixes_of_tools_are_taken_off(case: str, family: str, tmp_path: Path) -> None:
    expected = rewritten(tmp_path, lambda old: {PREFIXES[case](name): tensor for name, tensor in old.items()}, family)
    opened = open_checkpoint(tmp_path)
    for name, array in expected.items():
        np.testing.assert_array_equal(opened.weights[name].numpy(), array, err_msg=name)
    # transformers itself takes one `model.` too many off.
    assert case == "model." or any(case.split()[0].split("._")[0] in note for note in opened.notes)


@pytest.mark.parametrize(
    ("extra", "shape"),
    [
        ("model.layers.0.self_attn.q_proj.bias", (64,)),
        ("model.layers.2.mlp.up_proj.weight", (96, 64)),
        ("v_head.summary.weight", (1, 64)),
        ("model.visual.patch_embed.proj.weight", (8, 8)),
    ],
)
def test_tensors_without_a_place_are_named(extra: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    expected = rewritten(tmp_path, lambda old: {**old, extra: torch.ones(shape)})
    opened = open_checkpoint(tmp_path)
    (note,) = opened.notes
    assert extra in note
    np.testing.assert_array_equal(opened.weights["model.norm.weight"].numpy(), expected["model.norm.weight"])


def test_layers_beyond_the_config_are_named(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    change_json(tmp_path / "config.json", num_hidden_layers=1)
    (note,) = open_checkpoint(tmp_path).notes
    assert "9 stored tensors" in note
    assert "model.layers.1." in note


def test_a_whole_checkpoint_has_no_notes(tmp_path: Path) -> None:
    for family in ("llama", "llama-tied", "gpt2", "mixtral", "gpt_neox"):
        assert open_checkpoint(save_tiny(tmp_path / family, family)).notes == ()
    rewritten(tmp_path / "old", lambda old: {**old, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    assert open_checkpoint(tmp_path / "old").notes == ()


BAD_TENSORS: dict[str, tuple[Callable[[Tensors], Tensors], tuple[str, ...]]] = {
    "int8": (
        lambda old: {n: t.to(torch.int8) if "up_proj" in n else t for n, t in old.items()},
        ("mlp.up_proj.weight", "INT8", "original float"),
    ),
    "packed": (
        lambda old: {n: t.to(torch.uint8)[:, ::2] if "up_proj" in n else t for n, t in old.items()},
        ("mlp.up_proj.weight", "UINT8"),
    ),
    "experts": (lambda old: {n: t.to(torch.int32) for n, t in old.items()}, ("INT32",)),
    "gptq": (
        lambda old: {n.replace("up_proj.weight", "up_proj.qweight"): t for n, t in old.items()},
        ("up_proj.qweight", "quantization_config"),
    ),
    "unmerged adapter": (
        lambda old: {**old, "model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.ones(4, 64)},
        ("lora_A", "merge_and_unload"),
    ),
    "missing": (lambda old: {n: t for n, t in old.items() if "up_proj" not in n}, ("up_proj.weight", "is missing")),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_are_no_float_weights_are_refused(case: str, tmp_path: Path) -> None:
    change, parts = BAD_TENSORS[case]
    rewritten(tmp_path, change)
    refused(tmp_path, *parts)


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
def test_the_file_that_the_config_names_is_read(tmp_path: Path, shards: bool) -> None:
    """As transformers reads it. With weights of the usual name beside it, the user is asked which to export."""
    save_tiny(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    halves = {name: tensor / 2 for name, tensor in tensors.items()}
    named = "other.safetensors.index.json" if shards else "other.safetensors"
    if shards:
        parts = [dict(list(halves.items())[i::2]) for i in (0, 1)]
        for i, part in enumerate(parts):
            save_file(part, tmp_path / f"part{i}.safetensors", metadata={"format": "pt"})
        places = {name: f"part{i}.safetensors" for i, part in enumerate(parts) for name in part}
        (tmp_path / named).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    else:
        save_file(halves, tmp_path / named, metadata={"format": "pt"})
    change_json(tmp_path / "config.json", transformers_weights=named)
    refused(tmp_path, "config.json", "transformers_weights", named, "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    checkpoint, wanted = open_checkpoint(tmp_path), reloaded(tmp_path)
    assert checkpoint.notes == ()
    for name, weight in checkpoint.weights.items():
        np.testing.assert_array_equal(weight.numpy(), wanted[name])
    sources = {path.name for path in checkpoint.sources}
    assert named in sources
    assert ({"part0.safetensors", "part1.safetensors"} <= sources) is shards


@pytest.mark.parametrize("named", ["none.safetensors", "../m/model.safetensors", "sub/x.safetensors", "x.bin", "", 5])
def test_a_name_of_weights_that_cannot_be_read_is_refused(tmp_path: Path, named: object) -> None:
    save_tiny(tmp_path / "m")
    change_json(tmp_path / "m" / "config.json", transformers_weights=named)
    refused(tmp_path / "m", "config.json", "transformers_weights", str(named))


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "consolidated.safetensors", "consolidated.00.pth"])
def test_weights_of_another_name_are_named(name: str, tmp_path: Path) -> None:
    save_tiny(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    refused(tmp_path, "no weights found", name)


def test_contradictions_of_the_config_are_named(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    change_json(tmp_path / "config.json", tie_word_embeddings=True, auto_map={"AutoModelForCausalLM": "x.Y"})
    notes = " ".join(open_checkpoint(tmp_path).notes)
    assert "lm_head.weight" in notes
    assert "auto_map" in notes


def test_an_unknown_architecture_is_read_as_another_that_fits(tmp_path: Path) -> None:
    expected = rewritten(tmp_path, dict)
    change_json(tmp_path / "config.json", model_type="mystery", auto_map={"AutoConfig": "x.Y"})
    refused(tmp_path, "mystery", "--as llama")
    opened = open_checkpoint(tmp_path, layout="llama")
    assert opened.model_type == "llama"
    for name, array in expected.items():
        np.testing.assert_array_equal(opened.weights[name].numpy(), array, err_msg=name)
    refused(tmp_path, "q_norm.weight", "is missing", layout="qwen3")
    refused(tmp_path, "--as mystery", layout="mystery")
    rewritten(tmp_path, lambda old: {**old, "model.layers.0.extra.weight": torch.ones(2)})
    change_json(tmp_path / "config.json", model_type="mystery")
    refused(tmp_path, "model.layers.0.extra.weight", "--as llama", layout="llama")
    change_json(tmp_path / "config.json", model_type="qwen2")
    refused(tmp_path, "qwen2", "--as llama", layout="llama")
