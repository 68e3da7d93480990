"""Adapters that are kept apart: with each, the graphs compute what peft does, in every precision and form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapted import ADAPTERS, IDS, adapted, trained
from support.checkpoints import change_json, save_tiny, tiny_model
from support.families import by_family

from satchel.export import ExportConfig, ExportError, export_bundle
from satchel.export.checkpoint.separate_adapters import split_name
from satchel.runtime.bundle.manifest import Manifest
from satchel.runtime.execution.engine import Engine
from satchel.runtime.optimize.specialize import specialize
from satchel.runtime.ort.open_bundle import open_bundle

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "patterns": ("llama", {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}}),
    "one layer": ("llama", {"target_modules": ["o_proj"], "layers_to_transform": [1]}),
    "own bias": ("qwen2", {"target_modules": ["q_proj", "up_proj"], "lora_bias": True}),
    "trained biases": ("qwen2", {"target_modules": ["v_proj"], "bias": "all"}),
    "transposed": ("gpt2", {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}),
    "dora": ("llama", {"target_modules": ["q_proj", "gate_proj", "up_proj"], "use_dora": True}),
    "dora, transposed": ("gpt2", {"target_modules": ["c_fc"], "fan_in_fan_out": True, "use_dora": True}),
    "norms of heads": ("qwen3", {"target_modules": "all-linear"}),
    "packed": ("phi3-longrope", {"target_modules": ["qkv_proj", "gate_up_proj", "down_proj"]}),
    "biased norms": ("gpt_neox", {"target_modules": ["query_key_value", "dense", "dense_h_to_4h"]}),
}

ROUNDED = {"int8": 0.05, "int4": 0.25}
"""How far logits may be from the float model's, as a part of what the adapter changes: the base is rounded."""


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max())


def of_each_graph(engine: Engine, adapter: str | None) -> list[np.ndarray]:
    """The logits after IDS by prefill, by prefill and decode, and by score."""
    whole = engine.prefill(engine.new_state(len(IDS), adapter), IDS).copy()
    state = engine.new_state(len(IDS), adapter)
    engine.prefill(state, IDS[:-1])
    return [whole, engine.decode(state, IDS[-1]).copy(), engine.score(IDS, adapter=adapter)[-1]]


@pytest.mark.parametrize("adapter", [None, *ADAPTERS])
def test_each_graph_computes_what_peft_does(adapter: str | None, tmp_path_factory: pytest.TempPathFactory) -> None:
    made = adapted("fp32", tmp_path_factory)
    for logits in of_each_graph(Engine.open(open_bundle(made.folder), threads=1), adapter):
        assert error(logits, made.logits(adapter)[-1]) < 2e-6


@pytest.mark.parametrize("precision", ROUNDED)
def test_the_base_is_rounded_and_its_adapters_are_not(precision: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    made = adapted(precision, tmp_path_factory)
    engine = Engine.open(open_bundle(made.folder), threads=1)
    for adapter in ADAPTERS:
        wanted = made.logits(adapter)[-1]
        change = error(wanted, made.logits(None)[-1])
        for logits in of_each_graph(engine, adapter):
            assert error(logits, wanted) < ROUNDED[precision] * change


@pytest.mark.slow
def test_satchels_own_kernels_take_adapters(tmp_path_factory: pytest.TempPathFactory) -> None:
    made = adapted("int8-own", tmp_path_factory)
    portable = Engine.open(open_bundle(made.folder), threads=1)
    wanted = {adapter: portable.score(IDS, adapter=adapter)[-1] for adapter in (None, *ADAPTERS)}
    assert specialize(open_bundle(made.folder), kernels="satchel").specialized is not None
    engine = Engine.open(open_bundle(made.folder), threads=1)
    assert engine.bundle.specialized is not None
    for adapter, logits in wanted.items():
        found = of_each_graph(engine, adapter)
        assert max(error(one, logits) for one in found[:2]) < 0.03 * np.abs(logits).max()
        assert error(found[0], wanted["style" if adapter != "style" else "facts"]) > 0.2 * np.abs(logits).max()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("case", "precision"),
    by_family(
        [(c, p) for c in FAMILIES for p in ("fp32", "int8")], {("patterns", "fp32"), ("dora", "int8")}.__contains__
    ),
)
def test_adapters_of_all_forms_are_kept_apart(case: str, precision: str, tmp_path: Path) -> None:
    family, settings = FAMILIES[case]
    model = trained(family, tmp_path / "adapter", **settings).eval()
    engine = exported(tmp_path, save_tiny(tmp_path / "base", family), precision)
    with torch.no_grad():
        wanted, base = (m(torch.tensor([IDS])).logits[0].numpy() for m in (model, tiny_model(family)))
    rounding = error(engine.score(IDS), base)
    assert rounding < (3e-6 if precision == "fp32" else 0.02 * np.abs(base).max())
    bound = 3e-6 if precision == "fp32" else 2 * rounding
    assert error(engine.score(IDS, adapter="one"), wanted) < bound < 0.5 * error(wanted, base)


@pytest.mark.slow
def test_a_text_beyond_the_rotary_border_is_fed_again_with_its_adapter(tmp_path: Path) -> None:
    trained("phi3-longrope", tmp_path / "adapter", target_modules=["qkv_proj", "o_proj"])
    border, base = 32, dict[str, Any](family="phi3-longrope", original_max_position_embeddings=32)
    model = peft.PeftModel.from_pretrained(tiny_model(**base), str(tmp_path / "adapter")).eval()
    engine = exported(tmp_path, save_tiny(tmp_path / "base", **base))
    assert engine.bundle.manifest.model.rotary_border == border
    ids = np.random.default_rng(3).integers(3, 440, border + 3).tolist()
    state = engine.new_state(len(ids), "one")
    engine.prefill(state, ids[: border - 2])
    for token in ids[border - 2 :]:
        logits = engine.decode(state, token)
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0, -1].numpy()
    assert error(logits, wanted) < 3e-6


def exported(place: Path, base: Path, precision: str = "fp32") -> Engine:
    export_bundle(base, config(place, precision=precision))
    return Engine.open(open_bundle(place / "bundle"), threads=1)


def config(place: Path, *adapters: str, **options: Any) -> ExportConfig:
    given = adapters or (f"one={place / 'adapter'}",)
    options = {"precision": "fp32", "certificate": False, "adapter_form": "separate", **options}
    return ExportConfig(place / "bundle", adapters=given, **options)


def test_an_adapter_costs_only_its_own_bytes(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    made = adapted("int8", tmp_path_factory)
    manifest = Manifest.read(made.folder / "manifest.json")
    export_bundle(made.folder.parent / "base", ExportConfig(tmp_path / "bundle", "int8", certificate=False))
    plain = Manifest.read(tmp_path / "bundle/manifest.json")
    assert manifest.files["weights.bin"] == plain.files["weights.bin"]
    for spec in manifest.adapters:
        stored = made.folder.parent / spec.name / "adapter_model.safetensors"
        values = sum(tensor.numel() for tensor in load_file(stored).values())
        assert sum(int(np.prod(tensor.shape)) for tensor in spec.inputs) == values
        assert 4 * values < manifest.files[spec.file].bytes < 4 * values + 512 * len(spec.inputs)
    assert [spec.name for spec in manifest.adapters] == list(ADAPTERS)


NOT_APART: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "embedding": ("llama", {"target_modules": ["embed_tokens"]}, ("embed_tokens", "merge it")),
    "tied head": ("llama-tied", {"target_modules": ["lm_head"]}, ("lm_head.weight", "merge it")),
    "module": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, ("lm_head.weight", "merge it")),
    "bias of a norm": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}, ("ln_1.bias", "merge it")),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", NOT_APART)
def test_what_cannot_be_kept_apart_is_refused(case: str, tmp_path: Path) -> None:
    family, settings, parts = NOT_APART[case]
    trained(family, tmp_path / "adapter", **settings)
    refused(config(tmp_path), save_tiny(tmp_path / "base", family), "--adapter one=", *parts)


def refused(config: ExportConfig, base: Path, *parts: str) -> None:
    with pytest.raises(ExportError) as caught:
        export_bundle(base, config)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)
    assert not config.output.exists()


@pytest.mark.slow
def test_lengths_of_rotated_outputs_are_refused(tmp_path: Path) -> None:
    model = trained("llama", tmp_path / "adapter", target_modules=["q_proj", "o_proj"], use_dora=True).eval()
    base = save_tiny(tmp_path / "base")
    refused(config(tmp_path, precision="int8"), base, "--adapter one", "o_proj", "DoRA", "fp32")
    engine = exported(tmp_path, base)
    with torch.no_grad():
        wanted = model(torch.tensor([IDS])).logits[0].numpy()
    assert error(engine.score(IDS, adapter="one"), wanted) < 3e-6


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    trained("llama", tmp_path / "adapter", target_modules=["q_proj"])
    base = save_tiny(tmp_path / "base")
    other = save_tiny(tmp_path / "other", hidden_size=32, head_dim=16)
    refused(config(tmp_path), other, "another base", "[64, 32]", "[64, 64]")
    refused(config(tmp_path, f"one={tmp_path / 'nowhere'}"), base, "adapter_config.json", "no such file")
    refused(config(tmp_path, *[f"{name}={tmp_path / 'adapter'}" for name in ("one", "One")]), base, "two adapters")
    change_json(tmp_path / "adapter/adapter_config.json", r=8)
    refused(config(tmp_path), base, "ranks", "rank 8")
    change_json(tmp_path / "adapter/adapter_config.json", r=4)
    file = tmp_path / "adapter/adapter_model.safetensors"
    save_file({n.replace("layers.1.", "layers.7."): t for n, t in load_file(file).items()}, file)
    refused(config(tmp_path), base, "layers.7.", "does not exist")


@pytest.mark.slow
def test_a_table_that_is_no_linear_layer_is_refused(tmp_path: Path) -> None:
    trained("gpt2", tmp_path / "adapter", target_modules=["c_attn"], fan_in_fan_out=True)
    file, key = tmp_path / "adapter/adapter_model.safetensors", "base_model.model.transformer.wpe.lora_"
    save_file({f"{key}A.weight": torch.ones(4, 64), f"{key}B.weight": torch.ones(128, 4)}, file)
    refused(config(tmp_path), save_tiny(tmp_path / "base", "gpt2"), "--adapter one", "transformer.wpe", "merge it")


@pytest.mark.parametrize("text", ["adapter", "adapter=0.5", "-1=adapter", "a/b=adapter", "=adapter", "a b=adapter"])
def test_a_name_is_needed(text: str) -> None:
    with pytest.raises(ExportError, match="--adapter"):
        split_name(text)


def test_a_name_is_what_comes_before_the_first_equals_sign(tmp_path: Path) -> None:
    assert split_name("a.b-c_1=x=y") == ("a.b-c_1", Path("x=y"))


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"target": "cann", "precision": ""}, ("--adapters separate", "cann")),
        ({"target": "cuda", "precision": ""}, ("--adapters separate", "cuda")),
        ({"adapter_form": "apart"}, ("--adapters apart", "merged or separate")),
    ],
)
def test_other_targets_and_forms_are_refused(options: dict[str, Any], parts: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(ExportError) as caught:
        config(tmp_path, **options)
    assert all(part in str(caught.value) for part in parts)


def test_the_two_forms_are_not_mixed_up(tmp_path: Path) -> None:
    trained("llama", tmp_path / "adapter", target_modules=["q_proj"])
    base = save_tiny(tmp_path / "base")
    refused(config(tmp_path, adapter_form="merged"), base, "NAME=FOLDER", "--adapters separate")
    refused(config(tmp_path, f"{tmp_path / 'adapter'}=0.5"), base, "0.5", "NAME=FOLDER")
    with pytest.raises(ExportError, match="--adapter NAME=FOLDER"):
        ExportConfig(tmp_path / "bundle", adapter_form="separate")
