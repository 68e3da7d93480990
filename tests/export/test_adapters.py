"""Adapters in PEFT's format, merged while weights are read: equal to what peft merges, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapted import trained
from support.checkpoints import (
    GGUF_ARCHITECTURES,
    add_tokenizer,
    change_json,
    gguf_metadata,
    refused,
    save_tiny,
    tiny_model,
    write_gguf,
)
from support.gguf_families import to_gguf

from satchel.export import ExportConfig, export_bundle
from satchel.export.checkpoint import open_checkpoint
from satchel.export.checkpoint.adapters import split_share
from satchel.export.compile import open_source
from satchel.export.errors import ExportError
from satchel.runtime import Engine, open_bundle

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "rank-stabilized": ("llama", {"target_modules": "all-linear", "use_rslora": True}),
    "dora": ("llama", {"target_modules": ["k_proj", "up_proj"], "use_dora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"v_proj": 2, "layers.1.self_attn.q_proj": 5},
            "alpha_pattern": {"layers.0.self_attn.v_proj": 3},
        },
    ),
    "one layer": ("llama", {"target_modules": ["o_proj"], "layers_to_transform": [1]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "dora on an embedding": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "tied embedding": ("llama-tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied head": ("llama-tied", {"target_modules": ["lm_head"]}),
    "whole head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "whole head, tied": ("llama-tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "biases": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"}),
    "own bias": ("qwen2", {"target_modules": ["q_proj"], "lora_bias": True}),
    "transposed": ("gpt2", {"target_modules": ["c_attn", "c_fc", "wte"], "use_dora": True}),
    "transposed, undeclared": ("gpt2", {"target_modules": ["c_proj"], "bias": "lora_only"}),
}


def same(weights: Any, merged: torch.nn.Module) -> None:
    expected = {name: tensor.float().numpy() for name, tensor in merged.state_dict().items()}
    assert list(weights) == list(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(weights[name].numpy(), array, rtol=0, atol=2e-6, err_msg=name)
        np.testing.assert_allclose(weights[name].rows(1, 3), array[1:3], rtol=0, atol=2e-6, err_msg=name)
        if array.ndim > 1:
            np.testing.assert_allclose(weights[name].columns(1, 4), array[:, 1:4], rtol=0, atol=2e-6, err_msg=name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", SETTINGS)
def test_an_adapter_is_merged_as_peft_merges_it(case: str, tmp_path: Path) -> None:
    family, settings = SETTINGS[case]
    made = trained(family, tmp_path / "adapter", **settings)
    opened = open_checkpoint(save_tiny(tmp_path / "base", family), adapters=[tmp_path / "adapter"])
    before = open_checkpoint(tmp_path / "base").weights
    changed = [n for n, w in opened.weights.items() if not np.array_equal(w.numpy(), before[n].numpy())]
    assert changed
    same(opened.weights, made.merge_and_unload())
    assert tmp_path / "adapter/adapter_model.safetensors" in opened.sources


def test_several_adapters_are_added_with_their_shares(tmp_path: Path) -> None:
    made = trained("llama", tmp_path, name="one", target_modules=["q_proj", "v_proj"])
    trained("llama", tmp_path, seed=4, name="two", target_modules=["q_proj"], r=3)
    made.load_adapter(str(tmp_path / "two"), "two")
    made.add_weighted_adapter(["one", "two"], [0.25, -2.0], "both", combination_type="cat")
    made.set_adapter("both")
    folders = [f"{tmp_path / 'one'}=0.25", f"{tmp_path / 'two'}=-2"]
    same(open_checkpoint(save_tiny(tmp_path / "base"), adapters=folders).weights, made.merge_and_unload())


def test_adapters_are_merged_one_after_the_other(tmp_path: Path) -> None:
    made = trained("llama", tmp_path, name="one", target_modules=["q_proj"], use_dora=True)
    trained("llama", tmp_path, seed=4, name="two", target_modules=["q_proj"], use_dora=True)
    made.load_adapter(str(tmp_path / "two"), "two")
    opened = open_checkpoint(save_tiny(tmp_path / "base"), adapters=[tmp_path / "one", tmp_path / "two"])
    same(opened.weights, made.merge_and_unload(adapter_names=["one", "two"]))


def test_a_gguf_base_takes_adapters(tmp_path: Path) -> None:
    made = trained("llama", tmp_path / "adapter", target_modules=["q_proj", "k_proj"])
    tensors = to_gguf("llama", tiny_model("llama"))
    base = write_gguf(tmp_path / "base.gguf", GGUF_ARCHITECTURES["llama"], gguf_metadata("llama"), tensors)
    same(open_checkpoint(base, adapters=[tmp_path / "adapter"]).weights, made.merge_and_unload())


def test_a_pickled_adapter_in_half_precision_is_read(tmp_path: Path) -> None:
    made = trained("llama", tmp_path, target_modules=["q_proj"])
    stored = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({name: tensor.half() for name, tensor in stored.items()}, tmp_path / "adapter_model.bin")
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.copy_(parameter.half().float())
    same(open_checkpoint(save_tiny(tmp_path / "base"), adapters=[tmp_path]).weights, made.merge_and_unload())


def test_an_adapter_beside_the_weights_is_merged_with_a_note(tmp_path: Path) -> None:
    made = trained("llama", save_tiny(tmp_path), target_modules=["q_proj"])
    opened = open_checkpoint(tmp_path)
    same(opened.weights, made.merge_and_unload())
    assert any("adapter_config.json" in note for note in opened.notes)


def adapter_refused(tmp_path: Path, *parts: str, adapter: str | Path | None = None) -> None:
    refused(tmp_path / "base", *parts, adapters=[tmp_path / "adapter" if adapter is None else adapter])


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    trained("llama", tmp_path / "adapter", target_modules=["q_proj"])
    save_tiny(tmp_path / "base")
    return tmp_path / "adapter"


BAD_SETTINGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "type": ({"peft_type": "LOHA"}, ("LOHA", "peft_type")),
    "no type": ({"peft_type": None}, ("peft_type", "None")),
    "rank": ({"r": 8}, ("ranks", "[4, 64]", "rank 8")),
    "experts": ({"target_parameters": ["experts.gate_up_proj"]}, ("target_parameters", "merge_and_unload")),
    "start": ({"init_lora_weights": "pissa"}, ("pissa", "merge_and_unload")),
    "alpha": ({"lora_alpha": "much"}, ("lora_alpha", "much")),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_a_setting_that_cannot_be_merged_is_refused(case: str, tmp_path: Path, adapter: Path) -> None:
    changes, parts = BAD_SETTINGS[case]
    change_json(adapter / "adapter_config.json", **changes)
    adapter_refused(tmp_path, str(adapter), *parts)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"hidden_size": 32}, ("another base", "[64, 32]", "[64, 64]")),
        ({"num_hidden_layers": 1}, ("another base", "layers.1.", "does not exist")),
    ],
)
def test_an_adapter_for_another_base_is_refused(
    changes: dict[str, Any], parts: tuple[str, ...], tmp_path: Path, adapter: Path
) -> None:
    save_tiny(tmp_path / "base", head_dim=16, **changes)
    adapter_refused(tmp_path, *parts)


def test_damaged_adapters_are_refused(tmp_path: Path, adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    stored = load_file(file)
    save_file({name: tensor for name, tensor in stored.items() if "lora_B" not in name}, file)
    adapter_refused(tmp_path, file.name, "has no lora_B")
    save_file({}, file)
    adapter_refused(tmp_path, file.name, "changes nothing")
    file.unlink()
    adapter_refused(tmp_path, "adapter_model.safetensors")
    adapter_refused(tmp_path, "adapter_config.json", "no such file", adapter=tmp_path / "nowhere")
    adapter_refused(tmp_path, "=much", adapter=f"{adapter}=much")


def test_a_share_of_what_is_replaced_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base")
    trained("llama", tmp_path / "adapter", target_modules=["q_proj"], use_dora=True)
    adapter_refused(tmp_path, "DoRA", adapter=f"{tmp_path / 'adapter'}=0.5")
    trained("llama", tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["lm_head"])
    adapter_refused(tmp_path, "lm_head.weight", adapter=f"{tmp_path / 'adapter'}=0.5")


def test_an_adapter_alone_names_its_base(tmp_path: Path, adapter: Path) -> None:
    change_json(adapter / "adapter_config.json", base_model_name_or_path="../base")
    with pytest.raises(ExportError, match=f"satchel export {adapter}/../base --adapter {adapter}"):
        open_checkpoint(adapter)
    change_json(adapter / "adapter_config.json", base_model_name_or_path="org/model")
    with pytest.raises(ExportError, match=r"BASE .*org/model.* --adapter"):
        open_checkpoint(adapter)
    (adapter / "config.json").write_text((tmp_path / "base/config.json").read_text())
    with pytest.raises(ExportError, match="merge it"):
        open_checkpoint(adapter)


def test_a_share_is_what_follows_the_last_equals_sign(tmp_path: Path) -> None:
    odd = tmp_path / "a=b"
    odd.mkdir()
    assert split_share(odd) == (odd, 1.0)
    assert split_share(f"{odd}=0.5") == (odd, 0.5)
    assert split_share("x=1e-1") == (Path("x"), 0.1)


@pytest.mark.parametrize("form", ["merged", "separate"])
def test_a_tokenizer_and_a_template_beside_an_adapter_are_named(form: str, tmp_path: Path, adapter: Path) -> None:
    add_tokenizer(tmp_path / "base")
    given = {"merged": str(adapter), "separate": f"one={adapter}"}[form]

    def notes(**options: Any) -> str:
        config = ExportConfig(tmp_path / "bundle", "fp32", adapters=(given,), adapter_form=form, **options)
        return "\n".join(note for note in open_source(tmp_path / "base", config).notes if str(adapter) in note)

    assert notes() == ""
    add_tokenizer(adapter)
    stored = json.loads((adapter / "tokenizer.json").read_text())
    (adapter / "tokenizer.json").write_text(json.dumps({**stored, "truncation": {"max_length": 8}}))
    assert notes() == ""
    stored["added_tokens"][0]["content"] = "<other>"
    (adapter / "tokenizer.json").write_text(json.dumps(stored))
    assert f"--tokenizer {adapter}" in notes()
    (adapter / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert "chat_template.jinja" in notes()
    (tmp_path / "base/chat_template.jinja").write_text("{{ messages[0].content }}")
    assert "chat_template.jinja" not in notes()


@pytest.mark.filterwarnings("ignore")
def test_a_change_of_a_tied_weight_is_named(tmp_path: Path) -> None:
    trained("llama-tied", tmp_path / "adapter", target_modules=["embed_tokens", "q_proj"])
    opened = open_checkpoint(save_tiny(tmp_path / "base", "llama-tied"), adapters=[tmp_path / "adapter"])
    (note,) = (note for note in opened.notes if "ties" in note)
    assert "embed_tokens.weight" in note
    assert "lm_head.weight" in note


@pytest.mark.slow
def test_a_quantized_bundle_has_the_adapter_merged(tmp_path: Path) -> None:
    model = trained("llama", tmp_path / "adapter", target_modules="all-linear").eval()
    config = ExportConfig(tmp_path / "bundle", "int8", certificate=False, adapters=(tmp_path / "adapter",))
    export_bundle(save_tiny(tmp_path / "base"), config)
    ids = [5, 9, 33, 71, 12, 8]
    logits = Engine.open(open_bundle(tmp_path / "bundle"), threads=1).score(ids)
    with torch.no_grad():
        wanted, base = (each(torch.tensor([ids])).logits[0].numpy() for each in (model, tiny_model("llama")))
    assert np.abs(logits - wanted).max() < 0.05 * np.abs(wanted - base).max()
