"""Models whose rotary angles depend on the length of the text, on both sides of the border, as in transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from support.command import Said
from support.dynamic_graphs import DynamicGraphs
from support.exported import difference, stored_weights
from support.families import LONG, SHORT, TOLERANCE, VOCABULARY, Family, greedy, logits_of, reference, save
from support.kernels import needs_kernels
from support.lost_features import Model
from support.shared import made_once
from support.static_graphs import in_float32, write_static

from satchel.export import ExportConfig, export_bundle
from satchel.runtime import Generator
from satchel.runtime.bundle.manifest import Manifest
from satchel.runtime.execution import cpu
from satchel.runtime.execution.engine import Engine
from satchel.runtime.generation.options import GenerationOptions
from satchel.runtime.generation.request import Request
from satchel.runtime.generation.result import Generation
from satchel.runtime.optimize.specialize import specialize
from satchel.runtime.ort.open_bundle import open_bundle

BORDER, CONTEXT = 32, 96
ROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": BORDER,
    "short_factor": SHORT, "long_factor": LONG,
}  # fmt: skip
LONGROPE = Family(
    "phi3", {"pad_token_id": 0, "original_max_position_embeddings": BORDER, "rope_parameters": ROPE}, seed=2
)
IDS = np.random.default_rng(1).integers(3, VOCABULARY, CONTEXT)
NEW = 32
"""Greedy tokens."""

LENGTHS = (20, BORDER, 50, CONTEXT)
"""In ascending order: transformers' dynamic scaling keeps what it grew to."""

ROUNDED, HALF = 0.3, 0.02
"""What int8 and float16 may differ by, in parts of the largest logit."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A bundle, and transformers' model of the same weights."""

    folder: Path
    manifest: Manifest
    model: Model

    def logits(self, length: int) -> NDArray[np.float32]:
        return logits_of(self.model, IDS[:length])

    def open(self) -> Generator:
        return Generator.open(self.folder, threads=1, specialize=False)


def exported(family: Family, place: Path, precision: str = "fp32", **options: Any) -> Case:
    checkpoint = save(family, place / "checkpoint")
    config = ExportConfig(place / "bundle", precision, max_context=CONTEXT, certificate=False, **options)
    manifest = export_bundle(checkpoint, config)
    return Case(config.output, manifest, reference(family, stored_weights(checkpoint)))


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    place = made_once(tmp_path_factory, "longrope", lambda place: exported(LONGROPE, place))
    weights = stored_weights(place / "checkpoint")
    return Case(place / "bundle", Manifest.read(place / "bundle" / "manifest.json"), reference(LONGROPE, weights))


@pytest.fixture
def generator(case: Case, monkeypatch: pytest.MonkeyPatch) -> Generator:
    monkeypatch.setattr(cpu, "PREFILL_CHUNK", 7)
    return case.open()


@pytest.mark.slow
def test_the_manifest_names_the_border(case: Case) -> None:
    assert case.manifest.model.rotary_border == BORDER
    assert case.manifest.graphs is not None
    assert "text_length" in [tensor.name for tensor in case.manifest.graphs.prefill.inputs]


@pytest.mark.parametrize("length", [1, 20, BORDER, BORDER + 1, 80])
@pytest.mark.parametrize("chunk", [None, 9])
def test_the_length_of_a_text_chooses_its_angles(case: Case, length: int, chunk: int | None) -> None:
    engine, expected = case.open().engine, case.logits(length)
    assert difference(engine.score(IDS[:length], chunk), expected) <= TOLERANCE
    last = engine.prefill(engine.new_state(length), IDS[:length], chunk)
    assert difference(last, expected[-1]) <= TOLERANCE


def test_the_two_sides_differ(case: Case) -> None:
    """Otherwise nothing here could fail."""
    model, short = case.model, case.logits(BORDER)
    model.config.rope_parameters["original_max_position_embeddings"] = 2
    try:
        assert difference(case.logits(BORDER), short) > 0.8
    finally:
        model.config.rope_parameters["original_max_position_embeddings"] = BORDER


def test_a_text_that_grows_beyond_the_border_is_fed_again(case: Case) -> None:
    engine = case.open().engine
    state = engine.new_state(CONTEXT)
    engine.prefill(state, IDS[:28], 9)
    for position in range(28, 40):
        found = engine.decode(state, int(IDS[position]))
        assert difference(found, case.logits(position + 1)[-1]) <= TOLERANCE


def test_a_second_part_of_a_prompt_takes_the_first_across_the_border(case: Case) -> None:
    engine = case.open().engine
    state = engine.new_state(CONTEXT)
    engine.prefill(state, IDS[:28])
    assert difference(engine.prefill(state, IDS[28:50], 9), case.logits(50)[-1]) <= TOLERANCE


@pytest.mark.parametrize("length", [1, BORDER - NEW // 2, BORDER, BORDER + 1, 60], ids=str)
def test_greedy_tokens_are_those_of_transformers(case: Case, generator: Generator, length: int) -> None:
    prompt = IDS[:length]
    expected = greedy(case.model, prompt, NEW)
    assert list(generator.generate(prompt, max_new_tokens=NEW).token_ids) == expected
    assert len(set(expected)) >= 8


@pytest.mark.parametrize("force", [False, True])
def test_rows_of_a_batch_cross_the_border_each_at_its_own_step(case: Case, generator: Generator, force: bool) -> None:
    prompts = [IDS[:length] for length in (10, 25, BORDER, 50)]
    assert generator.engine.batch_invariant
    found = generator.generate_batch(prompts, rows=3, force_batch=force, max_new_tokens=NEW)
    for result, prompt in zip(found, prompts, strict=True):
        assert list(result.token_ids) == greedy(case.model, prompt, NEW), len(prompt)


def test_rows_that_change_places_take_their_side_and_their_tokens_along(case: Case, generator: Generator) -> None:
    """The first row ends after two tokens, and the last one takes its place before it crosses the border."""
    sizes = ((50, 2), (20, 4), (25, NEW))
    requests = [Request(IDS[:length], GenerationOptions(max_new_tokens=new)) for length, new in sizes]
    for index, found in generator.run_requests(requests, rows=3, force_batch=True):
        length, new = sizes[index]
        assert isinstance(found, Generation)
        assert list(found.token_ids) == greedy(case.model, IDS[:length], new)
    first, other = (generator.engine.new_batch(2, CONTEXT).states for _ in range(2))
    for states, rows in ((first, (0, 1)), (other, (1, 0))):
        for row, length in zip(rows, (50, 20), strict=True):
            generator.engine.prefill(states[row], IDS[:length])
    assert [state.cache.long for state in first] == [True, False]
    assert isinstance(first[0], cpu.CpuState) and isinstance(first[1], cpu.CpuState)
    first[0].exchange(first[1])
    assert [state.cache.long for state in first] == [state.cache.long for state in other]


def test_beams_cross_the_border(case: Case, generator: Generator) -> None:
    prompt = torch.from_numpy(IDS[:26])[None]
    beams: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 3, "do_sample": False}
    expected = case.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, eos_token_id=None, pad_token_id=0, **beams
    )[:, 26:]
    found = generator.beam_search(IDS[:26], 3, max_new_tokens=16)
    assert [list(each.token_ids) for each in found] == expected.tolist()


def test_a_prefix_serves_texts_on_its_own_side_of_the_border(case: Case, generator: Generator) -> None:
    first = generator.generate(IDS[:20], max_new_tokens=4)
    assert first.reused_tokens == 0
    again = generator.generate(IDS[:24], max_new_tokens=NEW)
    assert again.reused_tokens == 20
    assert list(again.token_ids) == greedy(case.model, IDS[:24], NEW)
    for length, reused in ((50, 24), (60, 50), (28, 20), (70, 60)):  # the answer crossed the border with 24 of these
        found = generator.generate(IDS[:length], max_new_tokens=1)
        assert (found.reused_tokens, list(found.token_ids)) == (reused, greedy(case.model, IDS[:length], 1)), length


def test_rows_take_prefixes_of_other_rows_on_their_side_only(case: Case, generator: Generator) -> None:
    prompts = [IDS[:24], IDS[:30], IDS[:50], IDS[:60]]
    found = generator.generate_batch(prompts, rows=4, max_new_tokens=4)
    assert [each.reused_tokens for each in found] == [0, 24, 0, 50]
    for result, prompt in zip(found, prompts, strict=True):
        assert list(result.token_ids) == greedy(case.model, prompt, 4)


@pytest.mark.parametrize(("length", "saved"), [(20, 23), (BORDER - 3, BORDER), (BORDER - 2, BORDER + 1), (50, 53)])
def test_a_saved_state_keeps_its_side(
    case: Case, generator: Generator, tmp_path: Path, length: int, saved: int
) -> None:
    prompt = IDS[:length]
    answer = generator.generate(prompt, max_new_tokens=4)
    whole = np.concatenate([prompt, np.asarray(answer.token_ids, np.int64)])
    assert generator.save_state(tmp_path / "state", whole) == saved
    for extra in (0, 20):
        other = case.open()
        other.load_state(tmp_path / "state")
        ids = np.concatenate([whole[:saved], IDS[: max(extra, 2)]])
        found = other.generate(ids, max_new_tokens=3)
        assert found.reused_tokens == (saved if (len(ids) > BORDER) == (saved > BORDER) else 0)
        assert list(found.token_ids) == greedy(case.model, ids, 3)


def test_a_long_prompt_that_was_left_early_serves_no_short_one(case: Case, generator: Generator) -> None:
    done: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        _interrupted(generator, done)
    assert list(generator.generate(IDS[:20], max_new_tokens=4).token_ids) == greedy(case.model, IDS[:20], 4)


def _interrupted(generator: Generator, done: list[int]) -> None:
    def progress(count: int) -> None:
        done.append(count)
        if sum(done) > 20:
            raise KeyboardInterrupt

    stream = generator.stream(IDS[:60], max_new_tokens=2)
    stream._progress = progress
    stream.result()


def test_a_runner_that_leaves_the_input_out_gets_the_side_of_its_mask(case: Case) -> None:
    """For a prompt in one run, and for further tokens, that is the right side."""
    assert _largest_difference_without_the_input(case) <= TOLERANCE


def _largest_difference_without_the_input(case: Case) -> float:
    prefill, decode = (DynamicGraphs(case.folder, case.manifest, phase, CONTEXT) for phase in ("prefill", "decode"))
    found = []
    for length in (20, 50):
        values, cache = prefill.prefill(IDS[:length], chunk=length)
        found.append(difference(values["logits"][0, 0], case.logits(length)[-1]))
        values, _ = decode.decode([int(IDS[length])], [length], cache)
        found.append(difference(values["logits"][0, 0], case.logits(length + 1)[-1]))
    return max(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernels", "options"),
    [
        pytest.param("satchel", {}, marks=needs_kernels),
        pytest.param("onnxruntime", {}, marks=pytest.mark.slow),
        ("onnxruntime", {"kv_cache": "int8"}),
        pytest.param("satchel", {"kv_cache": "int8"}, marks=needs_kernels),
    ],
    ids=["satchel's kernels", "ONNX Runtime's", "an int8 cache", "an int8 cache by satchel's"],
)
def test_rounded_bundles_choose_alike(tmp_path: Path, kernels: str, options: dict[str, str]) -> None:
    made = exported(LONGROPE, tmp_path, "int8", **options)
    specialize(open_bundle(made.folder), kernels=kernels, threads=1)
    bundle = open_bundle(made.folder)
    assert bundle.specialized is not None
    assert ("native" in bundle.specialized.variants) == (kernels == "satchel")
    engine = Engine.open(bundle, threads=1)
    state = engine.new_state(CONTEXT)
    assert difference(engine.prefill(state, IDS[:28], 9), made.logits(28)[-1]) <= ROUNDED
    for position in range(28, 40):
        found = engine.decode(state, int(IDS[position]))
        assert difference(found, made.logits(position + 1)[-1]) <= ROUNDED
    assert difference(engine.prefill(engine.new_state(60), IDS[:60], 9), made.logits(60)[-1]) <= ROUNDED


@pytest.mark.slow
def test_static_graphs_take_the_rows_of_their_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("satchel.export.writing.static_graphs.TARGETS", in_float32())
    config = ExportConfig(tmp_path / "bundle", target="cann", max_context=CONTEXT, prefill_lengths=(8, 13))
    write_static(save(LONGROPE, tmp_path / "checkpoint"), config)
    model = reference(LONGROPE, stored_weights(tmp_path / "checkpoint"))
    engine = Engine.open(open_bundle(tmp_path / "bundle"), threads=1)
    for length in (20, BORDER, BORDER + 1, 60):
        expected = logits_of(model, IDS[:length])
        assert difference(engine.score(IDS[:length]), expected) <= TOLERANCE
        assert difference(engine.prefill(engine.new_state(length), IDS[:length]), expected[-1]) <= TOLERANCE
    state = engine.new_state(CONTEXT)
    engine.prefill(state, IDS[:28])
    for position in range(28, 40):
        found = engine.decode(state, int(IDS[position]))
        assert difference(found, logits_of(model, IDS[: position + 1])[-1]) <= TOLERANCE


@pytest.mark.slow
def test_graphs_for_cuda_choose_by_the_same_input(tmp_path: Path) -> None:
    """Rotations stay outside of the fused attention there, whose own positions some versions ignore."""
    made = exported(LONGROPE, tmp_path, "fp16", target="cuda")
    graph = onnx.load(made.folder / "prefill.onnx", load_external_data=False).graph
    assert {len(node.input) for node in graph.node if node.op_type == "GroupQueryAttention"} == {7}
    assert _largest_difference_without_the_input(made) <= HALF


@pytest.mark.slow
def test_another_scale_of_long_texts_is_part_of_their_angles(tmp_path: Path) -> None:
    scales = {"short_mscale": 1.1, "long_mscale": 1.6}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "router_jitter_noise": 0.0}
    family = Family("phimoe", {**LONGROPE.options, **experts, "rope_parameters": ROPE | scales})
    made = exported(family, tmp_path)
    engine = made.open().engine
    for length in (20, 50):
        assert difference(engine.score(IDS[:length], 9), made.logits(length)) <= TOLERANCE


@pytest.mark.slow
def test_dynamic_scaling_leaves_short_texts_as_they_are(tmp_path: Path, export: Callable[..., Said]) -> None:
    """Longer ones change with each token: those of the bundle's whole context are theirs, which the export says."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0}
    family = Family("llama", {"max_position_embeddings": BORDER, "rope_parameters": rope})
    checkpoint = save(family, tmp_path / "checkpoint")
    place = tmp_path / "bundle"
    said = export(checkpoint, "-o", place, "--max-context", CONTEXT, "--no-certificate").err
    assert "dynamic" in said and f"--max-context {BORDER}" in said
    model = reference(family, stored_weights(checkpoint))
    engine = Engine.open(open_bundle(place), threads=1)
    found = {length: difference(engine.score(IDS[:length]), logits_of(model, IDS[:length])) for length in LENGTHS}
    assert [length for length, error in found.items() if error > TOLERANCE] == [50]
