"""Families that satchel cannot express are refused with the reason; nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.families import COMMON, FAMILIES, save
from support.hybrid_families import SINCE, is_known
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from satchel.export import ExportConfig, ExportError, export_bundle
from satchel.export.checkpoint.families import PASSED, REFUSED

SMALL: dict[str, Any] = {**COMMON, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
FEW_EXPERTS: dict[str, Any] = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
BY_NAME: dict[str, tuple[dict[str, Any], str]] = {
    "xglm": ({}, "hard-coded"),
    "recurrent_gemma": ({"lru_width": 64}, "recurrence is hard-coded"),
    "rwkv": ({}, "recurrence is hard-coded"),
    "zamba": ({"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2}, "several recurrences"),
    "zaya": ({}, "convolution of its queries and keys"),
    "dbrx": (
        {
            "d_model": 64, "n_heads": 4, "n_layers": 2, "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 48},
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0},
        },
        "mixture of experts is hard-coded",
    ),
    "beam": ({"num_experts": 8, "moe_intermediate_size": 24}, "a gate of their own"),
    "inkling_text": (FEW_EXPERTS, "a bias that each token computes"),
    "hrm_text": ({}, "several times"),
    "deepseek_v32": ({"n_routed_experts": 4, "n_group": 1, "topk_group": 1}, "sparse attention"),
    "dory": ({"layer_types": ["full_attention"] * 2, "n_input_layers": 0, "n_output_layers": 1}, "several times"),
    "bert": ({}, "not a causal language model"),
    "t5": ({"d_model": 64, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 16}, "encoder-decoder"),
}  # fmt: skip
BY_STRUCTURE: dict[str, tuple[dict[str, Any], str]] = {
    "llama4_text": (
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size_mlp": 48},
        "2 experts per token",
    ),
    "diffllama": ({}, "attention layers were traced (indices [0, 0, 1, 1])"),
    "xglm": ({}, "'Mask' object has no attribute 'size'"),
    "doge": ({}, "'Mask' object has no attribute"),
    "inkling_text": (FEW_EXPERTS, "InklingAttention: its attention uses position_bias"),
    "beam": (
        {
            "head_dim": 16, "mlp_layer_types": ["dense", "sparse"], "num_experts": 8, "num_experts_per_tok": 2,
            "moe_intermediate_size": 24, "n_group": 2, "topk_group": 1,
        },
        "BeamExperts: its experts have a custom gate",
    ),
    "dory": (
        {"layer_types": ["full_attention"] * 2, "n_input_layers": 0, "n_output_layers": 1},
        "attention layers were traced (indices [0, 0, 1])",
    ),
    "xlm": ({"emb_dim": 64, "n_layers": 2, "n_heads": 4}, "torch cannot trace this model: AssertionError"),
}  # fmt: skip


def refusal(model_type: str, options: dict[str, Any], place: Path) -> str:
    """Save a small model of that type, export it, and return what the export says."""
    config = transformers.AutoConfig.for_model(model_type, **{**SMALL, **options})
    torch.manual_seed(0)
    kinds = (transformers.AutoModelForCausalLM, transformers.AutoModelForMaskedLM, transformers.AutoModelForSeq2SeqLM)
    kind = next(k for k in kinds if type(config) in k._model_mapping)
    kind.from_config(config).save_pretrained(place / "checkpoint")
    with pytest.raises(ExportError) as caught:
        export_bundle(
            place / "checkpoint", ExportConfig(place / "bundle", precision="fp32", max_context=32, certificate=False)
        )
    assert [path.name for path in place.iterdir()] == ["checkpoint"], "something was written"
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("model_type", list(filter(is_known, BY_NAME)))
def test_a_family_known_not_to_work_is_refused_by_name(model_type: str, tmp_path: Path) -> None:
    options, reason = BY_NAME[model_type]
    message = refusal(model_type, options, tmp_path)
    assert model_type in message
    assert reason in message


@pytest.mark.slow
@pytest.mark.parametrize("model_type", list(filter(is_known, BY_STRUCTURE)))
def test_what_cannot_be_expressed_is_found_without_the_table(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(REFUSED, model_type, raising=False)
    options, reason = BY_STRUCTURE[model_type]
    assert reason in refusal(model_type, options, tmp_path)


@pytest.mark.slow
def test_a_family_in_neither_table_is_exported_and_named_on_standard_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("satchel.export.compile.PASSED", PASSED - {"gpt2"})
    family = FAMILIES["gpt2"]
    config = ExportConfig(tmp_path / "bundle", precision="fp32", max_context=family.context, certificate=False)
    export_bundle(save(family, tmp_path / "checkpoint"), config, progress=True)
    assert (tmp_path / "bundle").is_dir()
    assert "model_type gpt2 is not among the families that satchel is tested on" in capsys.readouterr().err


def test_experts_without_a_gate_are_refused_by_name(tmp_path: Path) -> None:
    options = {
        "num_hidden_layers": 2, "layers_block_type": ["moe", "attention"], "head_dim": 16, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1, "topk_group": 1,
    }  # fmt: skip
    message = refusal("nemotron_h", options, tmp_path)
    assert all(fact in message for fact in ("NemotronHExperts", "no gate", "ReLUSquared")), message


@pytest.mark.slow
def test_sinks_are_refused_for_a_target_of_standard_operators(tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model("granite_swa", **SMALL)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(ExportError, match=r"no form on --target cann: attention sinks"):
        export_bundle(tmp_path / "checkpoint", ExportConfig(tmp_path / "bundle", target="cann", max_context=32))
    assert not (tmp_path / "bundle").exists()


def test_an_int8_cache_of_keys_with_positions_is_refused(tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model("bloom", **SMALL)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(ExportError, match="ALiBi"):
        export_bundle(tmp_path / "checkpoint", ExportConfig(tmp_path / "bundle", kv_cache="int8", max_context=32))
    assert not (tmp_path / "bundle").exists()


def test_the_tables_name_families_of_transformers_once() -> None:
    tables = PASSED | set(REFUSED)
    assert {name for name in tables - set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) if is_known(name)} == set()
    assert tables >= set(SINCE)
    assert not PASSED & set(REFUSED)
    assert {family.model_type for family in FAMILIES.values()} <= PASSED
