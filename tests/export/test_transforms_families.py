"""The transforms of weights keep what each family computes, or say why they do not apply."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import pytest
from support.exported import difference
from support.families import VOCABULARY, by_family
from support.graphs import run
from support.static_graphs import lowered_family

from satchel.graphs.ir import pipeline
from satchel.graphs.ir.pipeline import Done, Step
from satchel.graphs.ir.values import last_dim
from satchel.graphs.passes.logits.stream_tied_head import stream_tied_head
from satchel.graphs.passes.quantize.equalize import equalize
from satchel.graphs.passes.quantize.insert_hadamard import insert_hadamard
from satchel.graphs.passes.quantize.rotate_residual import rotate_residual
from satchel.graphs.passes.quantize.rotate_values import rotate_values
from satchel.graphs.targets.steps import PHASE_STEPS
from satchel.runtime.bundle.contract import PHASES

TOLERANCE = 1e-5
"""Largest allowed difference between logits, as a part of the largest logit."""
BATCH, NEW, CAPACITY = 2, 13, 16
POST_NORM = "(RMSNormalization) writes to the residual stream"
UNNORMED = "(MatMul) reads the residual stream without a norm"
INTERLEAVED = "something stands between its values and their linear layer"

# How often each pass fires over two layers, and what all reasons of refusals end in.
#                 residual values smoothed hadamard
EXPECTED: dict[str, tuple[tuple[int, int, int, int], str]] = {
    "llama":             ((1, 2, 2, 2), ""),
    "qwen2":             ((1, 2, 2, 2), ""),
    "qwen3":             ((1, 2, 2, 2), ""),
    "smollm3":           ((1, 2, 2, 2), ""),  # tied
    "granite":           ((1, 2, 2, 2), ""),
    "cohere":            ((1, 2, 2, 2), ""),  # tied, norms that subtract the mean
    "gpt2":              ((1, 2, 0, 0), ""),  # learned positions
    "starcoder2":        ((1, 2, 0, 0), ""),
    "mixtral":           ((1, 2, 0, 0), ""),
    "qwen3_moe":         ((1, 2, 0, 0), ""),
    "gpt_neox":          ((1, 0, 0, 0), INTERLEAVED),
    "gemma2":            ((0, 2, 2, 2), POST_NORM),
    "olmo2":             ((0, 2, 2, 2), UNNORMED),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Transformed:
    """A family's graph before and after all four passes."""

    name: str
    before: ir.Model
    after: ir.Model
    done: list[Done]


@pytest.fixture(scope="module", params=by_family(EXPECTED))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Transformed]:
    before = lowered_family(request.param, tmp_path_factory)
    after, done = pipeline.run(before, transforms(before))
    yield Transformed(request.param, before, after, done)


def transforms(model: ir.Model) -> tuple[Step, ...]:
    random = np.random.default_rng(2)
    statistics = {
        str(node.name): random.uniform(0.1, 30, last_dim(node.inputs[0]) or 0).astype(np.float32)
        for node in model.graph
        if str(node.name).endswith("mlp.down_proj")
    }
    return tuple(map(Step, (rotate_residual, rotate_values, equalize(statistics), insert_hadamard(16))))


def logits(model: ir.Model, phase: str) -> np.ndarray:
    feeds = {
        "input_ids": np.random.default_rng(1).integers(3, VOCABULARY, (BATCH, 1 if phase == "decode" else NEW)),
        "attention_mask": np.ones((BATCH, 1 if phase == "decode" else NEW), np.int64),
    }
    for value in model.graph.inputs:
        if value.shape is not None and len(value.shape) == 4:
            _, heads, _, width = value.shape
            feeds[str(value.name)] = np.zeros((BATCH, heads, CAPACITY, width), np.float32)
    return run(model, feeds)["logits"]


def test_the_transforms_do_to_a_family_what_the_table_says(family: Transformed) -> None:
    counts, ending = EXPECTED[family.name]
    assert tuple(step.count for step in family.done) == counts
    reasons = [refusal.reason for step in family.done for refusal in step.refusals]
    assert bool(reasons) == bool(ending)
    assert all(reason.endswith(ending) for reason in reasons)


@pytest.mark.parametrize("phase", PHASES)
def test_every_phase_lowers_as_before_and_gives_the_same_logits(family: Transformed, phase: str) -> None:
    steps = (*PHASE_STEPS[phase], Step(stream_tied_head))
    (before, plain), (after, done) = (pipeline.run(m, steps) for m in (family.before, family.after))
    assert [(step.name, step.count) for step in done] == [(step.name, step.count) for step in plain]
    assert after.graph.outputs[0].shape == before.graph.outputs[0].shape
    assert difference(logits(after, phase), logits(before, phase)) <= TOLERANCE


@pytest.mark.parametrize("name", ["llama"])
def test_the_comparison_would_notice_a_weight_that_is_not_rotated(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    before = lowered_family(name, tmp_path_factory)
    after, _ = pipeline.run(before, transforms(before))
    whole = logits(after, "score")
    for value in after.graph.initializers.values():
        original = str(value.name).removesuffix(".rotated")
        if original in before.graph.initializers and original != value.name:
            kept, value.const_value = value.const_value, before.graph.initializers[original].const_value
            assert difference(logits(after, "score"), whole) > 100 * TOLERANCE, value.name
            value.const_value = kept
