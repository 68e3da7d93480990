"""A bundle with adapters that are kept apart is cut for several ranks: each has its part of them, and together they
compute what one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import rank_adapters
from support.adapted import ADAPTERS, IDS, adapted, trained
from support.checkpoints import save_tiny
from support.ranks import needs_mpi, together
from support.specialized import specialize_for_satchel

from satchel.export import ExportConfig, export_bundle
from satchel.runtime.bundle.ranks import rank_folder
from satchel.runtime.bundle.reader import read_bundle
from satchel.runtime.cli.main import main
from satchel.runtime.execution.engine import Engine
from satchel.runtime.ort.open_bundle import open_bundle

TOLERANCE = 1e-4
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "own bias": ("qwen2", {"target_modules": ["q_proj", "up_proj", "o_proj", "down_proj"], "lora_bias": True}),
    "trained biases": ("qwen2", {"target_modules": ["v_proj"], "bias": "all"}),
    "transposed": ("gpt2", {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}),
    "dora": ("llama", {"target_modules": ["q_proj", "gate_proj", "up_proj", "o_proj", "down_proj"], "use_dora": True}),
    "packed": ("phi3-longrope", {"target_modules": ["qkv_proj", "gate_up_proj", "down_proj"]}),
}


def cut(whole: Path, place: Path, *flags: str) -> Path:
    assert main(["shard", str(whole), *flags, "-o", str(place / "cut"), "--quiet"]) == 0
    return place / "cut"


def compare(
    whole: Path, parts: Path, ranks: int, place: Path, tolerance: float, scores: bool = True
) -> dict[str, np.ndarray]:
    """Check that ranks give the logits and tokens of the whole model; returns these."""
    np.save(place / "ids.npy", IDS)
    done = together(ranks, rank_adapters.__file__, parts, place / "ids.npy", place / "found.npz")
    assert done.returncode == 0, done.stderr
    expected, found = rank_adapters.steps(Engine.open(open_bundle(whole), threads=1), IDS), np.load(place / "found.npz")
    assert found.keys() == expected.keys()
    for key, wanted in expected.items():
        if key.endswith("score") and not scores:
            continue
        largest = 0 if key.endswith("tokens") else np.abs(wanted).max()
        assert np.abs(found[key] - wanted).max() <= tolerance * largest, key
    return expected


@needs_mpi
@pytest.mark.parametrize(
    ("precision", "flags", "ranks"),
    [
        ("fp32", ("--tensor-parallel", "2"), 2),
        pytest.param("int8", ("--tensor-parallel", "2"), 2, marks=pytest.mark.slow),
        pytest.param("int4", ("--tensor-parallel", "2"), 2, marks=pytest.mark.slow),
        pytest.param("fp32", ("--pipeline-parallel", "2"), 2, marks=pytest.mark.slow),
        pytest.param("fp32", ("--tensor-parallel", "2", "--pipeline-parallel", "2"), 4, marks=pytest.mark.slow),
    ],
)
def test_ranks_switch_adapters_as_one_process_does(
    precision: str, flags: tuple[str, ...], ranks: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    made = adapted(precision, tmp_path_factory)
    exact = precision != "fp32"
    expected = compare(made.folder, cut(made.folder, tmp_path, *flags), ranks, tmp_path, 0 if exact else TOLERANCE)
    for one in ADAPTERS:
        assert np.abs(expected[f"{one}.score"] - expected[".score"]).max() > 0.1 * np.abs(expected[".score"]).max()


def test_each_rank_has_its_part_of_each_matrix(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    made = adapted("fp32", tmp_path_factory)
    parts = cut(made.folder, tmp_path, "--tensor-parallel", "2")
    whole = {s.name: {t.name: t.shape for t in s.inputs} for s in read_bundle(made.folder).manifest.adapters}
    for rank in range(2):
        for spec in read_bundle(rank_folder(parts, rank)).manifest.adapters:
            found = {tensor.name: tensor.shape for tensor in spec.inputs}
            assert found.keys() == whole[spec.name].keys()
            for name, shape in found.items():
                inputs = any(layer in name for layer in ("o_proj", "down_proj"))  # these are cut by input
                halved = 0 if inputs else 1
                is_cut = ("lora_A" in name) == inputs
                wanted = [
                    size // 2 if is_cut and axis == halved else size
                    for axis, size in enumerate(shape_of(whole, spec.name, name))
                ]
                assert list(shape) == wanted, name


def shape_of(whole: dict[str, dict[str, tuple[int | str, ...]]], adapter: str, name: str) -> list[int]:
    return [size for size in whole[adapter][name] if isinstance(size, int)]


@needs_mpi
@pytest.mark.slow
def test_satchels_own_kernels_on_ranks_take_adapters(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    made = adapted("int8-ranks", tmp_path_factory)
    parts = cut(made.folder, tmp_path, "--tensor-parallel", "2")
    for folder in (made.folder, *(rank_folder(parts, rank) for rank in range(2))):
        specialize_for_satchel(folder)
    compare(made.folder, parts, 2, tmp_path, 0, scores=False)  # ranks score by the portable graph


@needs_mpi
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", FAMILIES)
def test_adapters_of_all_forms_are_cut(case: str, tmp_path: Path) -> None:
    family, settings = FAMILIES[case]
    trained(family, tmp_path / "adapter", **settings)
    config = ExportConfig(
        tmp_path / "bundle",
        "fp32",
        certificate=False,
        adapter_form="separate",
        adapters=(f"one={tmp_path / 'adapter'}",),
    )
    export_bundle(save_tiny(tmp_path / "base", family), config)
    parts = cut(tmp_path / "bundle", tmp_path, "--tensor-parallel", "2")
    shapes = [read_bundle(f).manifest.adapters[0].inputs for f in (tmp_path / "bundle", rank_folder(parts, 1))]
    assert len(shapes[0]) == len(shapes[1])
    uncut = {tensor.name for tensor in shapes[0] if "lora_A" not in tensor.name} & {
        one.name for one, other in zip(*(sorted(s, key=str) for s in shapes), strict=True) if one.shape == other.shape
    }
    assert all(any(layer in name for layer in ("o_proj", "down_proj", "c_proj")) for name in uncut)
    compare(tmp_path / "bundle", parts, 2, tmp_path, TOLERANCE)
