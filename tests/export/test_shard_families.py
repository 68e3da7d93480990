"""A model that is cut for several ranks gives the logits and the tokens of the whole one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from support import rank_steps
from support.exported import exported
from support.families import VOCABULARY
from support.ranks import needs_mpi, together

from satchel.runtime.bundle.manifest import Manifest
from satchel.runtime.bundle.ranks import rank_folder
from satchel.runtime.cli.main import main

TOLERANCE = 1e-4
ROUNDED = 0.05
"""Of logits where ranks exchange activations as int8."""
QUICK = {("llama", "3"), ("mixtral", "2"), ("qwen3_5_text", "2")}
CASES = [
    pytest.param(name, ranks, marks=() if (name, ranks) in QUICK else pytest.mark.slow)
    for name in ("llama", "qwen2", "gemma2", "mixtral", "qwen3_5_text", "cohere", "gpt2", "gpt_oss", "lfm2")
    for ranks in ("2", "3", "4")
]


def found(whole: Path, place: Path, ids: np.ndarray, ranks: str, *flags: str) -> dict[str, np.ndarray]:
    """What ranks compute of the parts of a bundle."""
    cut = place / "cut"
    assert main(["shard", str(whole), "--tensor-parallel", ranks, "-o", str(cut), "--quiet", *flags]) == 0
    np.save(place / "ids.npy", ids)
    done = together(int(ranks), rank_steps.__file__, cut, place / "ids.npy", place / "found.npz")
    assert done.returncode == 0, done.stderr
    return dict(np.load(place / "found.npz"))


@needs_mpi
@pytest.mark.parametrize(("name", "ranks"), CASES)
def test_ranks_give_the_logits_of_the_whole_model(
    name: str, ranks: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = exported(name, tmp_path_factory)
    ids = np.random.default_rng(2).integers(3, VOCABULARY, 20)
    flags = ("--shares", ",".join(["2", *"1" * (int(ranks) - 1)])) if ranks == "3" else ()
    parts = found(whole.folder, tmp_path, ids, ranks, *flags)
    expected = rank_steps.steps(whole.engine, ids, 43)
    for key in ("logits", "score", "together", "copied"):
        largest = np.abs(expected[key]).max()
        assert np.abs(parts[key] - expected[key]).max() <= TOLERANCE * largest, key
    assert parts["tokens"].tolist() == expected["tokens"].tolist()


def test_states_are_cut_by_heads_and_channels(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """2 key heads of 16, 4 value heads of 8: a convolution of 96 channels, a state of 4 matrices."""
    whole = exported("qwen3_5_text", tmp_path_factory).folder
    for ranks, channels, heads in ((2, [48] * 2, [2] * 2), (3, [40, 40, 48], [1, 1, 2]), (4, [40] * 4, [1] * 4)):
        cut = tmp_path / str(ranks)
        assert main(["shard", str(whole), "--tensor-parallel", str(ranks), "-o", str(cut), "--quiet"]) == 0
        manifests = [Manifest.read(rank_folder(cut, rank) / "manifest.json") for rank in range(ranks)]
        shapes = [{state.past: state.shape for state in each.states} for each in manifests]
        assert [each["past.1.conv"] for each in shapes] == [(3, width) for width in channels]
        assert [each["past.1.recurrent"] for each in shapes] == [(count, 16, 8) for count in heads]
        for rank, folder in enumerate(rank_folder(cut, rank) for rank in range(ranks)):
            out = ir.load(folder / "decode.onnx").graph.initializers["model.layers.1.linear_attn.out_proj.weight.T"]
            assert list(out.shape or ()) == [8 * heads[rank], 64]


@needs_mpi
def test_activations_on_the_wire_as_int8(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    whole = exported("llama", tmp_path_factory)
    ids = np.random.default_rng(2).integers(3, VOCABULARY, 20)
    parts = found(whole.folder, tmp_path, ids, "2", "--wire", "int8")
    expected = whole.engine.score(ids)
    difference = np.abs(parts["score"] - expected).max() / np.abs(expected).max()
    assert TOLERANCE < difference < ROUNDED


def test_an_export_can_be_cut_at_once(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    whole = exported("llama", tmp_path_factory)
    line = ["export", str(whole.folder.parent / "checkpoint"), "-p", "fp32", "--max-context", "64", "--no-certificate"]
    cut = tmp_path / "cut"
    assert main([*line, "--tensor-parallel", "2", "-o", str(cut), "--quiet"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut"], "the whole bundle is gone"
    assert main(["shard", str(whole.folder), "--tensor-parallel", "2", "-o", str(tmp_path / "again"), "--quiet"]) == 0
    for rank in range(2):
        parts = [(folder / f"rank_{rank}" / "weights.bin").read_bytes() for folder in (cut, tmp_path / "again")]
        assert parts[0] == parts[1]
    assert main([*line, "--tensor-parallel", "2", "--quiet"]) == 2
