"""Bundles with an int8 KV cache that are cut by heads: each rank has the scales of its own heads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from support import rank_steps
from support.collectives import Joined
from support.families import FAMILIES, VOCABULARY, save
from support.ranks import needs_mpi, together
from support.shared import made_once

from satchel.export import ExportConfig, export_bundle
from satchel.graphs.ir.values import producer
from satchel.graphs.shard.slices import NotCutError
from satchel.graphs.shard.tensor_parallel import Place, cut_tensors
from satchel.runtime.bundle.ranks import rank_folder
from satchel.runtime.cli.main import main
from satchel.runtime.execution.engine import Engine
from satchel.runtime.ort.open_bundle import open_bundle

FLIPPED = 5e-3
"""Of the largest logit, where sums in another order round a key to the other side; 7e-7 on AVX2, where none did."""
IDS = np.random.default_rng(2).integers(3, VOCABULARY, 20)


def exported(precision: str, target: str, places: pytest.TempPathFactory) -> Path:
    family = FAMILIES["llama"]

    def make(folder: Path) -> None:
        config = ExportConfig(
            folder / "bundle", precision, target=target, kv_cache="int8", max_context=family.context, certificate=False
        )
        export_bundle(save(family, folder / "checkpoint"), config)

    return made_once(places, f"int8-cache-{precision}-{target}", make) / "bundle"


def cut(whole: Path, place: Path, *flags: str) -> list[Path]:
    assert main(["shard", str(whole), "--tensor-parallel", "2", "-o", str(place), "--quiet", *flags]) == 0
    return [rank_folder(place, rank) for rank in range(2)]


@needs_mpi
def test_ranks_give_the_logits_of_the_whole_model(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    whole = exported("fp32", "cpu", tmp_path_factory)
    cut(whole, tmp_path / "cut")
    np.save(tmp_path / "ids.npy", IDS)
    done = together(2, rank_steps.__file__, tmp_path / "cut", tmp_path / "ids.npy", tmp_path / "found.npz")
    assert done.returncode == 0, done.stderr
    found = dict(np.load(tmp_path / "found.npz"))
    expected = rank_steps.steps(Engine.open(open_bundle(whole), threads=1), IDS, 43)
    assert found["tokens"].tolist() == expected["tokens"].tolist()
    for key in ("logits", "score", "together", "copied"):
        difference = np.abs(found[key] - expected[key]).max() / np.abs(expected[key]).max()
        assert difference <= FLIPPED, key


def test_each_rank_has_the_scales_of_its_heads(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    whole = exported("int8", "cpu", tmp_path_factory)
    folders = (whole, *cut(whole, tmp_path / "cut"))
    for phase in ("prefill", "decode", "native"):
        graphs = [ir.load(folder / f"{phase}.onnx") for folder in folders]
        for name in ("const/kv_cache.1.key_scale", "const/kv_cache.0.value_scale"):
            scales, *parts = (graph.graph.initializers[name].const_value.numpy() for graph in graphs)  # type: ignore[union-attr]
            np.testing.assert_array_equal(np.concatenate(parts, axis=1), scales)
            assert [part.shape[1] for part in parts] == [1, 1]


@pytest.mark.slow
def test_on_devices_too(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    whole = exported("a16w8", "cuda", tmp_path_factory)
    ranks = cut(whole, tmp_path / "cut", "--collectives", "nccl")
    one, both = Joined([whole], "prefill"), Joined(ranks, "prefill")
    (wanted,), _ = one.run(IDS, len(IDS), one.empty(32))
    found, _ = both.run(IDS, len(IDS), both.empty(32))
    largest = np.abs(wanted["logits"]).max()
    assert max(np.abs(each["logits"] - wanted["logits"]).max() for each in found) <= FLIPPED * largest
    np.testing.assert_array_equal(found[0]["logits"], found[1]["logits"])


def test_a_cache_that_is_written_in_another_form_stays_whole(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = ir.load(exported("fp32", "cpu", tmp_path_factory) / "prefill.onnx")
    scatter = next(node for node in model.graph if node.op_type == "TensorScatter")
    rounded = producer(scatter.inputs[1], "QuantizeLinear")
    assert rounded is not None
    rounded.op_type = "Cast"
    with pytest.raises(Exception, match="form that is known") as caught:
        cut_tensors(model, Place(0, (1.0, 1.0)))
    assert isinstance(caught.value.__cause__ or caught.value.__context__, NotCutError)
