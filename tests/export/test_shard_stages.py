"""A model that is cut into stages of layers gives the logits and the tokens of the whole one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from support import rank_steps
from support.exported import exported
from support.families import FAMILIES, VOCABULARY, save
from support.ranks import needs_mpi, together
from support.shared import made_once
from support.stages import Chain, mailbox, needs_kernels

from satchel.export import ExportConfig, export_bundle
from satchel.runtime.bundle.ranks import rank_folder
from satchel.runtime.bundle.reader import read_bundle
from satchel.runtime.cli.main import main
from satchel.runtime.execution.engine import Engine
from satchel.runtime.ort.open_bundle import open_bundle

TOLERANCE = 1e-4
PROMPT, STEPS = 20, 64
QUICK = ("llama", "qwen3_5_text")
OTHERS = ("cohere", "gpt2", "lfm2", "gpt_oss", "stablelm", "deepseek_v2", "zamba2", "falcon_alibi", "falcon_mamba")


def deep(name: str, places: pytest.TempPathFactory) -> Path:
    """A family with a layer for each of three stages, and room for all steps."""
    options = {"num_hidden_layers": 3, **FAMILIES[name].options}
    if "layer_types" in options:
        options["layer_types"] = (2 * list(options["layer_types"]))[: options["num_hidden_layers"]]

    def make(place: Path) -> None:
        checkpoint = save(dataclasses.replace(FAMILIES[name], options=options), place / "checkpoint")
        export_bundle(checkpoint, ExportConfig(place / "bundle", "fp32", max_context=96, certificate=False))

    return made_once(places, f"{name}-deep", make) / "bundle"


def cut(whole: Path, place: Path, stages: int, *flags: str) -> Path:
    folder = place / f"cut{stages}"
    assert main(["shard", str(whole), "--pipeline-parallel", str(stages), "-o", str(folder), "--quiet", *flags]) == 0
    return folder


def check(whole: Path, place: Path, stages: int, steps: int) -> None:
    """Compare stages that run in turn with the whole model."""
    ids, engine = np.random.default_rng(2).integers(3, VOCABULARY, PROMPT), Engine.open(open_bundle(whole), threads=1)
    expected = rank_steps.steps(engine, ids, steps)
    chain = Chain(cut(whole, place, stages))
    with mailbox() as messages:
        logits, tokens = chain.decode(ids, steps, (9, 11))
        score = chain.score(ids)
        assert not messages
    for found, wanted in ((logits, expected["logits"][:steps]), (score, expected["score"])):
        assert np.abs(found - wanted).max() <= TOLERANCE * np.abs(wanted).max()
    assert tokens == expected["tokens"].tolist()


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "llama" else pytest.mark.slow)
        for name in ("llama", "qwen2", "gemma2", "mixtral", "qwen3_5_text")
    ],
)
def test_two_and_three_stages_write_the_tokens_of_the_whole_model(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = deep(name, tmp_path_factory)
    for stages in (2, 3):
        check(whole, tmp_path, stages, STEPS)
    received = [
        node.attributes.get_int("width", 0)
        for graph in ("prefill", "decode", "score")
        for node in ir.load(rank_folder(tmp_path / "cut3", 1) / f"{graph}.onnx").graph
        if node.op_type == "Receive"
    ]
    assert received == [64] * 3, "the residual stream and no more"


@needs_kernels
@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2", "gemma2", "mixtral", *OTHERS))]
)
def test_families_in_two_stages(name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    check(exported(name, tmp_path_factory).folder, tmp_path, 2, 40)


@needs_mpi
@pytest.mark.parametrize(
    ("name", "parts", "stages"),
    [("qwen3_5_text", 1, 3), pytest.param("mixtral", 2, 2, marks=pytest.mark.slow), ("llama", 2, 2)],
)
def test_ranks_in_stages_give_the_logits_of_the_whole_model(
    name: str, parts: int, stages: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = exported(name, tmp_path_factory)
    ids = np.random.default_rng(2).integers(3, VOCABULARY, PROMPT)
    np.save(tmp_path / "ids.npy", ids)
    folder = cut(whole.folder, tmp_path, stages, *(("--tensor-parallel", str(parts)) if parts > 1 else ()))
    done = together(parts * stages, rank_steps.__file__, folder, tmp_path / "ids.npy", tmp_path / "found.npz")
    assert done.returncode == 0, done.stderr
    found, expected = dict(np.load(tmp_path / "found.npz")), rank_steps.steps(whole.engine, ids, 43)
    for key in ("logits", "score", "together", "copied"):
        assert np.abs(found[key] - expected[key]).max() <= TOLERANCE * np.abs(expected[key]).max(), key
    assert found["tokens"].tolist() == expected["tokens"].tolist()


@pytest.mark.slow
@needs_kernels
def test_layers_that_read_others_keys_are_in_one_stage_with_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of six layers the last two read the keys and values of those in front of them."""
    family = FAMILIES["gemma4_text"]
    options = {**family.options, "num_hidden_layers": 6, "layer_types": 3 * list(family.options["layer_types"])[:2]}
    checkpoint = save(dataclasses.replace(family, options=options), tmp_path / "checkpoint")
    export_bundle(checkpoint, ExportConfig(tmp_path / "bundle", "fp32", max_context=96, certificate=False))
    check(tmp_path / "bundle", tmp_path, 2, 40)
    spans = [read_bundle(rank_folder(tmp_path / "cut2", rank)).manifest.rank for rank in range(2)]
    assert spans[1] is not None and spans[1].layers[0] <= 2
    flags = ["--pipeline-parallel", "4", "-o", str(tmp_path / "four"), "--quiet"]
    assert main(["shard", str(tmp_path / "bundle"), *flags]) == 2
    assert "3 stages at most" in capsys.readouterr().err
