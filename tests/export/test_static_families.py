"""Static graphs of many families compute what transformers computes, prompt by chunks, token by token, and scored."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from support.exported import difference, stored_weights
from support.families import FAMILIES, TOLERANCE, VOCABULARY, Family, by_family, logits_of, reference, save
from support.static_graphs import Stepper, graphs_of, in_float32, lowered, optimized, write_static

from satchel.export import ExportConfig, ExportError

HALF_TOLERANCE = 0.02
"""Of float16, in parts of the largest logit: its steps are 0.0005 of a number, and two layers add theirs up."""

NAMES = (
    "llama", "gpt2", "gemma2", "gemma3_text", "qwen3", "starcoder2", "olmo2", "cohere", "stablelm", "gpt_neox", "opt",
)  # fmt: skip
OPT = Family("opt", {"ffn_dim": 48, "word_embed_proj_dim": 64, "pad_token_id": 1})
PROMPT, TOKENS, LENGTHS = 18, 30, (8, 13)

FORBIDDEN = {
    "Attention", "CumSum", "DequantizeLinear", "Expand", "Gelu", "LayerNormalization", "NonZero", "QuantizeLinear",
    "RMSNormalization", "Range", "RotaryEmbedding", "ScatterND", "Shape", "TensorScatter", "Trilu",
}  # fmt: skip


PLAIN = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-"
"""What names may consist of."""


def family_of(name: str) -> Family:
    return OPT if name == "opt" else FAMILIES[name]


@dataclasses.dataclass(frozen=True)
class Case:
    """One family's static bundles in float32 and in float16, its token ids and the reference's logits for them."""

    exact: Stepper
    half: Stepper
    ids: NDArray[np.int64]
    expected: NDArray[np.float32]


@pytest.fixture(scope="module", params=by_family(NAMES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family, place = family_of(request.param), tmp_path_factory.mktemp(request.param)
    checkpoint = save(family, place / "checkpoint")
    config = ExportConfig(place / "exact", target="cann", max_context=family.context, prefill_lengths=LENGTHS)
    common = lowered(checkpoint, config)
    half = dataclasses.replace(config, output=place / "half", prefill_lengths=LENGTHS[-1:])
    steppers = [Stepper(half.output, write_static(common, half))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("satchel.export.writing.static_graphs.TARGETS", in_float32())
        steppers.append(Stepper(config.output, write_static(common, config)))
    ids = np.random.default_rng(1).integers(3, VOCABULARY, TOKENS)
    return Case(*reversed(steppers), ids, logits_of(reference(family, stored_weights(checkpoint)), ids))


def largest_difference(stepper: Stepper, case: Case) -> float:
    """Of all graphs from the reference, in parts of its largest logit."""
    found = []
    for graph in stepper.static.prefill:
        stepper.reset()
        found.append(difference(stepper.prefill(case.ids[:PROMPT], graph.tokens), case.expected[PROMPT - 1]))
    for index, token in enumerate(case.ids[PROMPT:], start=PROMPT):
        found.append(difference(stepper.step("decode", token[None])[0], case.expected[index]))
    stepper.reset()
    scored = [stepper.step("score", case.ids[i : i + LENGTHS[-1]]) for i in range(0, TOKENS, LENGTHS[-1])]
    return max(*found, difference(np.concatenate(scored), case.expected))


def test_the_form_of_the_graphs_is_that_of_transformers(case: Case) -> None:
    assert largest_difference(case.exact, case) <= TOLERANCE


def test_in_float16_they_are_as_close_as_float16_is(case: Case) -> None:
    assert case.half.manifest.kv_cache.dtype == "float16"
    assert largest_difference(case.half, case) <= HALF_TOLERANCE


def test_every_graph_passes_the_checker_and_has_plain_names(case: Case) -> None:
    for graph in graphs_of(case.half.manifest).values():
        for part in graph.parts:
            path = case.half.folder / part.file
            onnx.checker.check_model(str(path), full_check=True)
            model = onnx.load(path, load_external_data=False)
            assert [(o.domain, o.version) for o in model.opset_import] == [("", 17)]
            assert model.ir_version == 8
            assert model.graph.name == part.file.removesuffix(".onnx")
            names = [*(v.name for v in model.graph.input), *(t.name for t in model.graph.initializer)]
            names += [name for node in model.graph.node for name in (node.name, *node.output)]
            assert not [n for n in names if set(n) - set(PLAIN)]
            assert not [node.op_type for node in model.graph.node if node.op_type in FORBIDDEN]
            constants = {t.name for t in model.graph.initializer}
            for node in model.graph.node:
                if node.op_type in ("Slice", "Split", "Reshape"):
                    assert set(node.input[1:]) <= constants


def test_what_a_provider_sees_has_none_of_these_either(case: Case, tmp_path: Path) -> None:
    """After ONNX Runtime's own optimizer, which writes norms and products anew where it may."""
    for part in case.half.static.prefill[0].parts:
        model = optimized(case.half.folder, part, tmp_path)
        assert not [node.op_type for node in model.graph.node if node.op_type in FORBIDDEN or node.domain]


def test_a_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    checkpoint = save(FAMILIES["mixtral"], tmp_path / "checkpoint")
    with pytest.raises(ExportError, match=r"experts.*--target cann.*--target cpu"):
        write_static(checkpoint, ExportConfig(tmp_path / "bundle", target="cann", max_context=64))
    assert not (tmp_path / "bundle").exists()
