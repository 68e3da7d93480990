"""Requests that run together speculate: each gets what it gets alone without drafts, and blocks are returned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import save_tiny
from support.kernels import needs_kernels

from satchel.export import ExportConfig, export_bundle
from satchel.runtime.execution.block_pool import BLOCK
from satchel.runtime.execution.paged import PagedBatch
from satchel.runtime.generation.draft_rows import DraftRows
from satchel.runtime.generation.drafts import NgramDrafter
from satchel.runtime.generation.generator import Generator
from satchel.runtime.generation.options import GenerationOptions
from satchel.runtime.generation.request import Request
from satchel.runtime.generation.result import Generation
from satchel.runtime.generation.run_costs import Costs, DraftCosts
from satchel.runtime.optimize.specialize import specialize
from satchel.runtime.ort.open_bundle import open_bundle

pytestmark = needs_kernels

CONTEXT, VOCABULARY = 300, 384
FEW = {token: -np.inf for token in range(VOCABULARY) if token % 57}  # few tokens are left, so that texts repeat
NAMES = {"type": "object", "properties": {"a_long_name_of_a_property": {"enum": [1, 2]}}, "additionalProperties": False}
NAMES["required"] = [*NAMES["properties"]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"max_position_embeddings": CONTEXT, "vocab_size": VOCABULARY}
    return save_tiny(tmp_path_factory.mktemp("joint") / "checkpoint", "llama", tokenizer=True, **sizes)


def export(checkpoint: Path, precision: str) -> Path:
    folder = checkpoint.parent / precision
    export_bundle(checkpoint, ExportConfig(folder, precision, max_context=CONTEXT, certificate=False))
    specialize(open_bundle(folder), kernels="satchel", threads=1)
    return folder


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    return export(checkpoint, "int8")


@pytest.fixture(scope="module")
def small(checkpoint: Path) -> Path:
    """A model that drafts, and is wrong now and then."""
    return export(checkpoint, "int4")


@pytest.fixture(scope="module")
def alone(bundle: Path) -> Generator:
    """A generator that keeps and drafts nothing."""
    return Generator.open(bundle, threads=1, prefix_cache_mib=0, specialize=False, speculate="off")


def solo(generator: Generator, request: Request) -> Generation:
    options = request.options
    return generator.generate(request.prompt, **{name: getattr(options, name) for name in options.__dataclass_fields__})


def ask(rng: np.random.Generator, bias: Mapping[int, float]) -> Request:
    prompt = rng.integers(3, 300, rng.integers(1, 100))
    sampling = {"temperature": 1.5, "seed": int(rng.integers(99))} if rng.random() < 0.4 else {}
    if rng.random() < 0.3:
        sampling["logprobs"] = 2
    return Request(prompt, GenerationOptions(max_new_tokens=int(rng.integers(0, 90)), logit_bias=bias, **sampling))


def essence(found: Generation) -> tuple[object, ...]:
    probabilities = [(entry.logprob, entry.top) for entry in found.logprobs or ()]
    return found.token_ids, found.text, found.finish_reason, found.decode_steps, probabilities


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [None, 7])
@pytest.mark.parametrize("seed", range(3))
def test_whatever_runs_beside_a_request_its_answer_is_that_of_single_steps(
    bundle: Path, alone: Generator, monkeypatch: pytest.MonkeyPatch, seed: int, blocks: int | None
) -> None:
    """Some are cancelled in the middle. With few blocks, requests wait in files and take prefixes' memory."""
    check_a_crowd(bundle, alone, monkeypatch, seed, blocks, None)


@pytest.mark.parametrize("blocks", [None, 7])
@pytest.mark.parametrize("draft", ["bundle", "small"])
def test_drafts_of_a_small_model_for_several_change_no_answer(
    bundle: Path, small: Path, alone: Generator, monkeypatch: pytest.MonkeyPatch, draft: str, blocks: int | None
) -> None:
    """Each run of the small model is for several requests, and so are those that check its drafts."""
    rows: list[int] = []
    run = DraftRows.run
    monkeypatch.setattr(DraftRows, "run", lambda self, feeds: [rows.append(len(feeds)), run(self, feeds)])
    monkeypatch.setattr(DraftCosts, "of", lambda costs, rows: 0.001)
    monkeypatch.setattr(NgramDrafter, "chance", property(lambda drafter: 0.0))
    monkeypatch.setattr(NgramDrafter, "predicted", lambda drafter, most: ([], []))
    drafting = {"bundle": bundle, "small": small}[draft]
    generator = check_a_crowd(bundle, alone, monkeypatch, len(draft), blocks, drafting)
    assert max(rows) > 2
    assert sum(count > 1 for count in rows) > 20
    model = generator.speculation.model if generator.speculation else None
    assert model is not None and len(model.prefix_cache._prefixes) > 0


def check_a_crowd(
    bundle: Path, alone: Generator, patch: pytest.MonkeyPatch, seed: int, blocks: int | None, draft: Path | None
) -> Generator:
    """Requests that come and go have the answers that they have alone, and the blocks are given back."""
    patch.setattr(Costs, "of", lambda costs, rows: 1 + rows / 50)
    rng = np.random.default_rng(seed)
    generator = Generator.open(
        bundle, threads=1, prefix_cache_mib=None if seed % 2 or draft else 0, specialize=False, draft=draft
    )
    scheduler = generator.scheduler(rows=int(rng.integers(3, 7)), capacity=200)
    assert isinstance(scheduler._batch, PagedBatch)
    pool, drafts = scheduler._batch.runner.pool, scheduler._draft_rows
    if blocks:
        for each in [pool] if drafts is None else [pool, drafts._batch.runner.pool]:
            del each._free[blocks:]
            each.blocks = blocks
    requests, numbers, cancelled, ended = [ask(rng, {} if draft else FEW) for _ in range(20)], {}, set(), {}
    most = 0  # tokens that one step gave one of several requests
    while len(ended) < len(requests):
        while len(numbers) < len(requests) and rng.random() < 0.5:
            numbers[scheduler.submit(requests[len(numbers)])] = len(numbers)
        if (running := sorted(numbers.keys() - ended.keys() - cancelled)) and rng.random() < 0.05:
            cancelled.add(int(rng.choice(running)))
            scheduler.cancel(max(cancelled))
        several = len(scheduler._rows.decoding) > 1
        for event in scheduler.step():
            most = max(most, len(event.token_ids) if several else 0)
            if event.outcome is not None:
                ended[event.id] = event.outcome
    assert most > 4
    assert sum(each.accepted_tokens for each in ended.values()) > 50
    assert draft == bundle or sum(each.drafted_tokens - each.accepted_tokens for each in ended.values()) > 20
    assert not blocks or scheduler.preemptions
    for number, index in numbers.items():
        found, expected = ended[number], solo(alone, requests[index])
        if found.finish_reason == "closed":
            assert found.token_ids == expected.token_ids[: found.new_tokens]
        else:
            assert essence(found) == essence(expected)
    while generator.prefix_cache.evict(lambda cache: True):
        pass
    assert pool.used == 0
    if drafts is not None:
        assert sorted(drafts._free) == list(range(len(drafts._batch.states)))
        assert not any(state.cache.length for state in drafts._batch.states)
    return generator


def test_a_run_with_drafts_of_several_gives_the_bits_of_single_steps(alone: Generator) -> None:
    """Also across the border of a block, and after wrong tokens."""
    rng = np.random.default_rng(1)
    batch = alone.engine.new_pool(6, 200, 0, None)
    assert batch.widest_ahead == 15
    lengths, counts = (BLOCK - 1, 9, 2 * BLOCK - 3), (1, 4, 11)
    prompts = [rng.integers(3, 300, length) for length in lengths]
    for row, prompt in enumerate([*prompts, *prompts]):
        batch.states[row].cache.clear()
        batch.states[row].prefill(prompt)
    batch.decode_ahead([(row, rng.integers(3, 300, count)) for row, count in enumerate(counts[::-1])])
    for state, length in zip(batch.states, lengths, strict=False):
        state.cache.shorten(length)
    tokens = [rng.integers(3, 300, count) for count in counts]
    found = [logits.copy() for logits in batch.decode_ahead(list(enumerate(tokens)))]
    for row, (ids, logits) in enumerate(zip(tokens, found, strict=True)):
        single = batch.states[3 + row]
        for token, given in zip(ids.tolist(), logits, strict=True):
            single.decode(token)
            np.testing.assert_array_equal(given, single.logits)
        for name, past in single.cache.past.items():
            np.testing.assert_array_equal(batch.states[row].cache.past[name], past)


@pytest.mark.parametrize("row", [1.0, 0.02])
def test_drafts_are_for_rows_that_cost_less_than_those_of_others(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, row: float
) -> None:
    monkeypatch.setattr(Costs, "of", lambda costs, rows: 1 - row + row * rows)
    generator = Generator.open(bundle, threads=1, prefix_cache_mib=0, specialize=False)
    prompts = [np.arange(3, 20 + each) for each in range(4)]
    found = generator.generate_batch(prompts, max_new_tokens=100, logit_bias=FEW)
    assert sum(each.drafted_tokens for each in found) == 0 if row == 1 else found[0].accepted_tokens > 40


def test_forced_tokens_of_several_requests_take_no_run_of_their_own(
    bundle: Path, alone: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llguidance")
    monkeypatch.setattr(Costs, "of", lambda costs, rows: 1 + rows / 50)
    generator = Generator.open(bundle, threads=1, prefix_cache_mib=0, specialize=False)
    options = GenerationOptions(max_new_tokens=80, grammar={"json_schema": NAMES}, temperature=1.0, seed=4, logprobs=1)
    requests = [Request(prompt, options) for prompt in ("the", "a dog", "one")]
    found = dict(generator.run_requests(requests, rows=3))
    for index, request in enumerate(requests):
        assert essence(found[index]) == essence(solo(alone, request))
        assert found[index].accepted_tokens > 15


def test_a_small_model_that_takes_too_long_is_hardly_asked(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Costs, "of", lambda costs, rows: 1 + rows / 50)
    monkeypatch.setattr(NgramDrafter, "chance", property(lambda drafter: 0.0))
    monkeypatch.setattr(NgramDrafter, "predicted", lambda drafter, most: ([], []))
    found = {}
    for seconds in (0.01, 1.5):
        monkeypatch.setattr(DraftCosts, "of", lambda costs, rows, seconds=seconds: seconds)
        generator = Generator.open(bundle, threads=1, prefix_cache_mib=0, specialize=False, draft=bundle)
        prompts = [np.arange(3, 20 + each) for each in range(4)]
        results = generator.generate_batch(prompts, max_new_tokens=100)
        found[seconds] = sum(each.accepted_tokens for each in results)
    assert found[0.01] > 4 * 60
    assert found[1.5] < 0.1 * found[0.01]
