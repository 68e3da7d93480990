"""`satchel plan` knows the sizes of the families: against transformers' own models, and against bundles of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from support.exported import exported
from support.families import FAMILIES, HEAD_DIM, QUICK, Family, by_family, config_of

from satchel.export.planning.config_shape import shape_of
from satchel.export.planning.families import FAMILIES as KNOWN
from satchel.export.planning.model import Planned
from satchel.export.planning.shape import FLOAT_BYTES
from satchel.export.planning.stored import Precision
from satchel.runtime.bundle.contract import WEIGHTS_NAME
from satchel.runtime.bundle.ranks import rank_folder
from satchel.runtime.bundle.reader import read_bundle
from satchel.runtime.cli.main import main
from satchel.runtime.tools.inspection.inspection import inspect_bundle

BOUND_IN = "dots1"
"""A family that transformers cannot build without memory."""
MODELS = {name: family for name, family in FAMILIES.items() if family.model_type in KNOWN}
TESTED = {family.model_type for family in MODELS.values()}
PART = 0.15
"""How near a plan is to the largest part: 0.11 (lfm2) and 0.06 (gpt2) on 3 devices, below 0.05 elsewhere."""
CUT = ("llama", "gemma2", "qwen3_5_text", "lfm2", "mixtral", "qwen3_moe", "gpt2", "cohere")
MODELS |= {kind: Family(kind, {"head_dim": HEAD_DIM}) for kind in KNOWN if kind not in TESTED and kind != BOUND_IN}


def planned(name: str, context: int) -> Planned:
    """The family's model as a plan of a float32 bundle, from the config.json that `save_pretrained` writes."""
    shape = shape_of(json.loads(config_of(MODELS[name]).to_json_string()), name)
    return Planned(name, shape, Precision("fp32", None, FLOAT_BYTES), context)


@pytest.mark.parametrize("name", by_family(MODELS))
def test_a_model_has_as_many_parameters_as_in_transformers(name: str) -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config_of(MODELS[name]))
    assert planned(name, 64).shape.parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", by_family([name for name in FAMILIES if name in MODELS]))
def test_a_bundle_has_the_planned_weights_caches_and_states(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bundle = exported(name, tmp_path_factory)
    model = planned(name, bundle.family.context)
    found = inspect_bundle(bundle.engine.bundle)
    assert model.weights() == pytest.approx(found.files[WEIGHTS_NAME], rel=0.01)
    assert model.cache() == found.cache_bytes_per_token
    assert model.states() == found.state_bytes


@pytest.mark.parametrize("name", by_family(CUT, lambda name: name in ("gemma2", "qwen3_5_text")))
def test_parts_of_a_bundle_have_the_planned_weights_and_states(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bundle = exported(name, tmp_path_factory)
    model = planned(name, bundle.family.context)
    for way, devices in (("tensor", 2), ("tensor", 3), ("tensor", 4), ("pipeline", 2)):
        out = tmp_path / f"{way}{devices}"
        assert main(["shard", str(bundle.folder), f"--{way}-parallel", str(devices), "-o", str(out), "--quiet"]) == 0
        folders = [rank_folder(out, rank) for rank in range(devices)]
        found = max((folder / WEIGHTS_NAME).stat().st_size for folder in folders)
        parts, stages = (devices, 1) if way == "tensor" else (1, devices)
        assert model.weights(parts, stages) == pytest.approx(found, rel=PART), (way, devices)
        states = max(read_bundle(folder).manifest.state_bytes for folder in folders)
        assert model.states(parts, stages) == states, (way, devices)


def test_the_quick_families_have_each_kind_of_cache() -> None:
    kinds = {MODELS[name].model_type for name in QUICK if name in MODELS}
    assert {"gemma2", "qwen3_moe", "qwen3_5_text", "lfm2"} <= kinds
