"""A model with quantized weights that is cut for several ranks computes the same bits as the whole one."""

from __future__ import annotations

import collections
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from support import rank_pool, rank_steps
from support.checkpoints import save_tiny
from support.ranks import needs_mpi, together
from support.shared import made_once
from support.specialized import specialize_for_satchel

from satchel.export import ExportConfig, export_bundle
from satchel.graphs.analysis.linear import ADDED, WIDTHS
from satchel.graphs.shard.collectives import ALL_ROWS, NO_ROWS, OWN_ROWS
from satchel.runtime.bundle.ranks import rank_folder
from satchel.runtime.cli.main import main
from satchel.runtime.execution.engine import Engine
from satchel.runtime.ort.open_bundle import open_bundle

VOCABULARY = 96
SIZES = {
    "hidden_size": 288, "intermediate_size": 384, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 32,
    "vocab_size": VOCABULARY, "max_position_embeddings": 128,
}  # fmt: skip
"""Heads that no 2 or 4 ranks divide evenly, and channels that some do."""
PROMPT = 70
"""Tokens: so many that each of 4 ranks rounds some of them for all."""
QUICK = {("int8", 2, "satchel")}
CASES = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for precision in ("int8", "int4", "a16w8")
    for ranks in (2, 3, 4)
    for kernels in ("satchel", "portable")
    for case in ((precision, ranks, kernels),)
]


def exported(precision: str, places: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        checkpoint = save_tiny(folder / "checkpoint", "llama", **SIZES)
        export_bundle(checkpoint, ExportConfig(folder / "portable", precision, certificate=False))
        shutil.copytree(folder / "portable", folder / "satchel")
        specialize_for_satchel(folder / "satchel")

    return made_once(places, f"exact-{precision}", make)


@needs_mpi
@pytest.mark.parametrize(("precision", "ranks", "kernels"), CASES)
def test_ranks_compute_the_bits_of_one_process(
    precision: str, ranks: int, kernels: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    made, cut = exported(precision, tmp_path_factory), tmp_path / "cut"
    assert main(["shard", str(made / "portable"), "--tensor-parallel", str(ranks), "-o", str(cut), "--quiet"]) == 0
    for rank in range(ranks) if kernels == "satchel" else ():
        specialize_for_satchel(rank_folder(cut, rank))
    ids = np.random.default_rng(5).integers(3, VOCABULARY, PROMPT)
    np.save(tmp_path / "ids.npy", ids)
    done = together(ranks, rank_steps.__file__, cut, tmp_path / "ids.npy", tmp_path / "found.npz")
    assert done.returncode == 0, done.stderr
    found = dict(np.load(tmp_path / "found.npz"))
    whole = Engine.open(open_bundle(made / kernels), threads=1)
    expected = rank_steps.steps(whole, ids, 128 - PROMPT - 1)
    expected["score"] = Engine.open(open_bundle(made / "portable"), threads=1).score(ids)  # so ranks do
    assert len(set(expected["tokens"].tolist())) > 3
    for key, wanted in expected.items():
        np.testing.assert_array_equal(found[key], wanted, err_msg=key)


@needs_mpi
def test_rows_of_ranks_share_blocks_as_those_of_one_process(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    made, cut = exported("int8", tmp_path_factory), tmp_path / "cut"
    assert main(["shard", str(made / "portable"), "--tensor-parallel", "2", "-o", str(cut), "--quiet"]) == 0
    for rank in range(2):
        specialize_for_satchel(rank_folder(cut, rank))
    ids = np.random.default_rng(3).integers(3, VOCABULARY, 20)
    np.save(tmp_path / "ids.npy", ids)
    done = together(2, rank_pool.__file__, cut, tmp_path / "ids.npy", tmp_path / "found.npz")
    assert done.returncode == 0, done.stderr
    found, expected = (
        np.load(tmp_path / "found.npz"),
        rank_pool.steps(Engine.open(open_bundle(made / "satchel"), threads=1), ids),
    )
    assert np.ptp(expected["parted"], axis=0).max() > 0
    for key in expected.keys() - {"blocks"}:
        np.testing.assert_array_equal(found[key], expected[key], err_msg=key)
    assert (found["blocks"] < expected["blocks"]).all(), "a rank has the blocks of its heads"


def test_ranks_add_no_parts_of_sums(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    made, cut = exported("int8", tmp_path_factory), tmp_path / "cut"
    assert main(["shard", str(made / "portable"), "--tensor-parallel", "2", "-o", str(cut), "--quiet"]) == 0
    for graph in ("prefill", "decode", "score", "native"):
        model = ir.load(rank_folder(cut, 1) / f"{graph}.onnx")
        kinds = collections.Counter(node.op_type for node in model.graph)
        kinds = {kind: kinds[kind] for kind in ("AllReduce", "AllGather", "RoundedGather", "GatherLogits")}
        joined = {"AllGather": 0 if graph == "native" else 8, "RoundedGather": 0}
        assert kinds == {"AllReduce": 1, "GatherLogits": 1, **joined}, "the embedding, two layers, the head"
    joining = [node for node in model.graph if node.op_type == "Linear" and len(node.inputs) > WIDTHS]
    added = [len(node.inputs) > ADDED and node.inputs[ADDED] is not None for node in joining]
    assert added == [False, True] * 4, "residuals are added to what is joined"
    whole = [node.attributes.get_int("whole") for node in joining]
    assert whole == [NO_ROWS, OWN_ROWS, NO_ROWS, ALL_ROWS, NO_ROWS, OWN_ROWS, NO_ROWS, NO_ROWS], (
        "the last token is taken of what the fourth joins"
    )
    behind = [node.attributes.get_int("outputs", 0) for node in joining if "o_proj" in node.name]
    assert behind == [160] * 2, "4 of 9 heads, and 10 of the 18 panels of the layer behind them"
    unread = [(node.attributes.get_int("unread", 0), node.attributes.get_int("unread_end", 0)) for node in model.graph]
    assert [each for each in unread if each[1]] == [(0, 64)] * 2, "two of six query heads are of the other rank only"
