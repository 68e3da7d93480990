"""Bundles for CUDA devices that are cut for NCCL: one graph for each rank, with ONNX Runtime's AllReduce in it.

What no device has run is checked by the operators' definitions, and by all ranks' graphs joined into one, whose sums
are sums and whose numbers are in float32.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from support.collectives import Joined, collectives, depends, faults
from support.families import FAMILIES, VOCABULARY, save
from support.shared import made_once

from satchel.export import ExportConfig, export_bundle
from satchel.graphs.providers.facts import VERSIONS, cuda_kernels
from satchel.graphs.providers.findings import GraphView
from satchel.graphs.providers.kernels import Match
from satchel.runtime.bundle.manifest import Manifest
from satchel.runtime.bundle.ranks import NCCL, rank_folder, read_ranks
from satchel.runtime.cli.main import main

TOLERANCE = 1e-4
PROMPT, CAPACITY = 20, 32
QUICK = {("llama", "fp16", 2), ("llama", "int4", 3)}
CASES = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for case in (
        *itertools.product(["llama"], ["fp16", "a16w8", "int4"], [2, 3]),  # of 4 ranks, one would have no group
        *itertools.product(["qwen2", "gemma2", "mixtral", "gpt2", "cohere"], ["fp16"], [2, 3]),
    )
]


@dataclasses.dataclass(frozen=True)
class Parts:
    """A bundle for CUDA devices, and the bundles of its ranks."""

    whole: Path
    ranks: list[Path]


def parts_of(name: str, precision: str, ranks: int, place: Path, places: pytest.TempPathFactory) -> Parts:
    family = FAMILIES[name]

    def make(folder: Path) -> None:
        config = ExportConfig(
            folder / "bundle", target="cuda", precision=precision, max_context=family.context, certificate=False
        )
        export_bundle(save(family, folder / "checkpoint"), config)

    whole, cut = made_once(places, f"cuda-{name}-{precision}", make) / "bundle", place / "cut"
    line = ["shard", str(whole), "--tensor-parallel", str(ranks), "--collectives", "nccl", "-o", str(cut), "--quiet"]
    assert main([*line, *(("--shares", "3,1,1") if ranks == 3 and precision == "fp16" else ())]) == 0
    assert read_ranks(cut).collectives == NCCL
    return Parts(whole, [rank_folder(cut, rank) for rank in range(ranks)])


@pytest.mark.parametrize(("name", "precision", "ranks"), CASES)
def test_each_rank_has_one_graph_whose_sums_give_the_whole_models_logits(
    name: str, precision: str, ranks: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    parts = parts_of(name, precision, ranks, tmp_path, tmp_path_factory)
    layers = FAMILIES[name].options.get("num_hidden_layers", 2)
    for folder, phase in itertools.product(parts.ranks, ("prefill", "decode", "score")):
        check_graph(ir.load(folder / f"{phase}.onnx"), ranks, 2 * layers if name != "cohere" else layers)
    manifest = Manifest.read(parts.ranks[0] / "manifest.json")
    assert manifest.rank is not None
    assert (manifest.rank.collectives, manifest.target) == (NCCL, "cuda")
    check_numbers(parts)


def check_graph(model: ir.Model, ranks: int, sums: int) -> None:
    """Sums behind the embedding and each attention and MLP, all logits at the end, each as its operator wants it."""
    found = collectives(model)
    assert [node.op_type for node in found] == ["AllReduce"] * (1 + sums) + ["AllGather"]
    assert [fault for node in found for fault in faults(node, ranks)] == []
    assert not [node for node in model.graph if node.domain == "satchel"]
    # All ranks come to exchanges in the same order, whatever order a session chooses for its nodes.
    assert all(depends(later, earlier) for earlier, later in itertools.pairwise(found))
    (logits,) = (value for value in model.graph.outputs if value.name == "logits")
    assert list(logits.shape or ())[-1] == VOCABULARY
    for version in VERSIONS:
        view = GraphView(model, "decode", cuda_kernels(version))
        lacking = {node.op_type for node, fit in view.fits.items() if fit.match is not Match.FITS}
        assert lacking <= {"AllReduce", "AllGather"}, version


def check_numbers(parts: Parts) -> None:
    ids = np.random.default_rng(2).integers(3, VOCABULARY, PROMPT + 4)
    for phase in ("prefill", "score"):
        one, all_ranks = Joined([parts.whole], phase), Joined(parts.ranks, phase)
        (wanted,), alone = one.run(ids[:PROMPT], PROMPT, one.empty(CAPACITY))
        found, caches = all_ranks.run(ids[:PROMPT], PROMPT, all_ranks.empty(CAPACITY))
        check_outputs(found, wanted)
    one, all_ranks = Joined([parts.whole], "decode"), Joined(parts.ranks, "decode")
    for position in range(PROMPT, len(ids)):
        token = ids[position : position + 1]
        (wanted,), alone = one.run(token, position + 1, alone, CAPACITY)
        found, caches = all_ranks.run(token, position + 1, caches, CAPACITY)
        check_outputs(found, wanted)


def check_outputs(found: list[dict[str, np.ndarray]], wanted: dict[str, np.ndarray]) -> None:
    largest = np.abs(wanted["logits"]).max()
    for each in found:
        assert np.abs(each["logits"] - wanted["logits"]).max() <= TOLERANCE * largest
        np.testing.assert_array_equal(each["logits"], found[0]["logits"])  # so that all ranks draw the same token
        if "top_ids" in wanted:
            assert each["top_ids"][0, 0, 0] == wanted["top_ids"][0, 0, 0]


def test_blocks_of_quantized_weights_are_cut_by_output_and_by_input(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    parts = parts_of("llama", "int4", 3, tmp_path, tmp_path_factory)

    def sizes(folder: Path) -> dict[str, tuple[int, ...]]:
        return {
            str(node.name): tuple(node.attributes.get_int(name, 0) for name in ("K", "N"))
            for node in ir.load(folder / "decode.onnx").graph
            if node.op_type == "MatMulNBits"
        }

    whole, ranks = sizes(parts.whole), [sizes(folder) for folder in parts.ranks]
    for name, (inputs, outputs) in whole.items():
        axis = 0 if "o_proj" in name or "down_proj" in name else 1
        kept = [each[name] for each in ranks]
        assert {each[1 - axis] for each in kept} == {(inputs, outputs)[1 - axis]}
        if axis == 0 or "lm_head" in name:
            assert sum(each[axis] for each in kept) == (inputs, outputs)[axis], name
        assert max(each[axis] for each in kept) < (inputs, outputs)[axis], name


def test_an_export_for_nccl_is_cut_at_once_and_one_for_another_target_refused(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = parts_of("llama", "fp16", 2, tmp_path, tmp_path_factory)
    line = ["export", str(parts.whole.parent / "checkpoint"), "--tensor-parallel", "2", "--no-certificate", "--quiet"]
    context = ["--max-context", str(FAMILIES["llama"].context)]
    for target, collective in (("cpu", "nccl"), ("cuda", "mpi"), ("cann", "nccl")):
        flags = ["--target", target, "--collectives", collective, "-o", str(tmp_path / "refused")]
        capsys.readouterr()
        assert main([*line, *flags]) == 2
        assert capsys.readouterr().err.count("--collectives") >= 1
    assert not (tmp_path / "refused").exists()
    again = tmp_path / "again"
    assert main([*line, *context, "--target", "cuda", "-p", "fp16", "--collectives", "nccl", "-o", str(again)]) == 0
    for rank, folder in enumerate(parts.ranks):
        weights = [(each / "weights.bin").read_bytes() for each in (folder, rank_folder(again, rank))]
        assert weights[0] == weights[1]
    assert json.loads((again / "ranks.json").read_text())["collectives"] == "nccl"
