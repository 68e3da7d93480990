"""Every GGUF architecture gives the logits of the transformers model that was converted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import write_gguf
from support.exported import difference
from support.families import TOLERANCE, logits_of
from support.gguf_families import GGUF_FAMILIES, facts_of, fused, gguf_model, loaded, some_ids, tensors_of, write_family

from satchel.export import ExportConfig, ExportError, export_bundle
from satchel.export.checkpoint import Checkpoint, open_checkpoint
from satchel.export.checkpoint.gguf_architectures import ARCHITECTURES
from satchel.runtime.execution.engine import Engine
from satchel.runtime.ort.open_bundle import open_bundle


def same_logits(checkpoint: Checkpoint, model: torch.nn.Module) -> None:
    assert difference(logits_of(loaded(checkpoint), some_ids()), logits_of(model, some_ids())) <= TOLERANCE


def test_every_architecture_and_variant_has_a_model() -> None:
    known = {(name, each.model_type) for name, top in ARCHITECTURES.items()
             for each in (top, *(variant for _, variant in top.variants))}  # fmt: skip
    assert known == {(family.architecture, family.model_type) for family in GGUF_FAMILIES.values()}


@pytest.mark.parametrize("name", GGUF_FAMILIES)
def test_the_logits_are_those_of_the_converted_model(name: str, tmp_path: Path) -> None:
    family = GGUF_FAMILIES[name]
    model = gguf_model(family)
    checkpoint = open_checkpoint(write_family(tmp_path / "tiny.gguf", family, model))
    assert checkpoint.model_type == family.model_type
    same_logits(checkpoint, model)


SLOW = ("phi3", "mixtral", "apertus", "gpt-oss", "minicpm3", "ministral3")


@pytest.mark.parametrize("name", ["gpt2", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_the_bundle_gives_the_logits_of_the_converted_model(name: str, tmp_path: Path) -> None:
    family = GGUF_FAMILIES[name]
    model = gguf_model(family)
    path = write_family(tmp_path / "tiny.gguf", family, model)
    export_bundle(path, ExportConfig(tmp_path / "bundle", "fp32", max_context=64, certificate=False))
    found = Engine.open(open_bundle(tmp_path / "bundle"), threads=1).score(some_ids(), chunk=60)
    assert difference(found, logits_of(model, some_ids())) <= TOLERANCE


@pytest.mark.parametrize("stored", [[0.4], ["a", "b"], None])
def test_a_layer_without_its_number_is_refused(stored: Any, tmp_path: Path) -> None:
    family = GGUF_FAMILIES["apertus"]
    path = write_family(tmp_path / "tiny.gguf", family, gguf_model(family), facts={"xielu.alpha_p": stored})
    with pytest.raises(ExportError, match=r"xielu\.alpha_p has no number"):
        open_checkpoint(path)


OMITTED = {
    "llama": ("attention.key_length", "attention.value_length", "rope.dimension_count", "feed_forward_length"),
    "gemma2": ("attn_logit_softcapping", "final_logit_softcapping"),
    "qwen3moe": ("expert_feed_forward_length", "feed_forward_length"),
    "qwen2moe": ("expert_shared_feed_forward_length",),
    "olmo3": ("rope.freq_base_swa",),
}


@pytest.mark.parametrize("name", OMITTED)
def test_keys_that_a_file_may_omit_have_the_defaults_of_llama_cpp(name: str, tmp_path: Path) -> None:
    family = GGUF_FAMILIES[name]
    model = gguf_model(family)
    omitted = dict.fromkeys(OMITTED[name])
    same_logits(open_checkpoint(write_family(tmp_path / "tiny.gguf", family, model, facts=omitted)), model)


def test_without_a_count_of_key_heads_there_are_as_many_as_query_heads(tmp_path: Path) -> None:
    family = GGUF_FAMILIES["llama"]
    model = gguf_model(GGUF_FAMILIES["llama"].__class__("llama", "llama", {"num_key_value_heads": 4}, permuted=True))
    path = write_family(tmp_path / "tiny.gguf", family, model, facts={"attention.head_count_kv": None})
    same_logits(open_checkpoint(path), model)


def test_granite_has_neutral_scales_where_the_file_has_none(tmp_path: Path) -> None:
    family = GGUF_FAMILIES["granite"]
    omitted = dict.fromkeys(("attention.scale", "embedding_scale", "residual_scale"))
    config: Any = open_checkpoint(
        write_family(tmp_path / "tiny.gguf", family, gguf_model(family), facts=omitted)
    ).module.config
    assert (config.attention_multiplier, config.embedding_multiplier, config.residual_multiplier) == (0.25, 1, 1)


@pytest.mark.parametrize("keys", [("rope.scaling.factor",), ("rope.scale_linear",)])
def test_a_rope_factor_without_a_type_is_linear(keys: tuple[str, ...], tmp_path: Path) -> None:
    family = GGUF_FAMILIES["llama"]
    path = write_family(tmp_path / "t.gguf", family, gguf_model(family), facts=dict.fromkeys(keys, 4.0))
    rope = open_checkpoint(path).module.config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("linear", 4.0, 10000.0)


def test_yarn_has_the_attention_factor_of_the_file(tmp_path: Path) -> None:
    family = GGUF_FAMILIES["qwen2"]
    scaling = {"type": "yarn", "factor": 4.0, "original_context_length": 32, "attn_factor": 2.0, "yarn_beta_fast": 16.0}
    facts = {f"rope.scaling.{key}": value for key, value in scaling.items()}
    path = write_family(tmp_path / "t.gguf", family, gguf_model(family), facts=facts)
    rope = open_checkpoint(path).module.config.rope_parameters
    # llama.cpp multiplies its own factor, 0.1 ln(factor) + 1, by that of the file.
    assert rope["attention_factor"] == pytest.approx(2.0 * (0.1 * np.log(4) + 1))
    assert rope["beta_fast"] == 16.0


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi2", "mixtral", "glm4"])
def test_fused_tensors_are_taken_apart(name: str, tmp_path: Path) -> None:
    family = GGUF_FAMILIES[name]
    model = gguf_model(family)
    tensors = fused(tensors_of(family, model))
    path = write_gguf(tmp_path / "t.gguf", family.architecture, facts_of(family, model), tensors)
    same_logits(open_checkpoint(path), model)


def test_separate_tensors_are_joined(tmp_path: Path) -> None:
    family = GGUF_FAMILIES["phi3"]
    model = gguf_model(family)
    tensors = tensors_of(family, model)
    for layer in range(2):
        q, k, v = np.split(tensors.pop(f"blk.{layer}.attn_qkv.weight"), [64, 96])
        gate, up = np.split(tensors.pop(f"blk.{layer}.ffn_up.weight"), 2)
        for part, array in {"attn_q": q, "attn_k": k, "attn_v": v, "ffn_gate": gate, "ffn_up": up}.items():
            tensors[f"blk.{layer}.{part}.weight"] = array
    path = write_gguf(tmp_path / "t.gguf", "phi3", facts_of(family, model), tensors)
    same_logits(open_checkpoint(path), model)


def test_a_bias_that_no_layer_has_is_zero(tmp_path: Path) -> None:
    family = GGUF_FAMILIES["qwen2"]
    model = gguf_model(family)
    biases = {name: None for name in tensors_of(family, model) if name.endswith(".bias")}
    checkpoint = open_checkpoint(write_family(tmp_path / "t.gguf", family, model, tensors=biases))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
    same_logits(checkpoint, model)


def test_the_documentation_lists_every_architecture() -> None:
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text("utf-8")
    table = text.partition("| architecture | read as |")[2].partition("\n\n")[0]
    rows = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`([\w.-]+)`", row[0])} == ARCHITECTURES.keys()
    families = {name for row in rows for name in re.findall(r"`([\w.-]+)`", row[1])}
    assert families == {family.model_type for family in GGUF_FAMILIES.values()}
