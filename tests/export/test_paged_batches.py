"""Requests over blocks of a pool: each gets what it gets alone, and shared beginnings are in memory once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import save_tiny
from support.kernels import needs_kernels

from satchel.export import ExportConfig, export_bundle
from satchel.runtime.errors import PromptError
from satchel.runtime.execution.block_pool import BLOCK
from satchel.runtime.execution.paged import PagedBatch
from satchel.runtime.generation.events import Event
from satchel.runtime.generation.generator import Generator
from satchel.runtime.generation.options import GenerationOptions
from satchel.runtime.generation.request import Request
from satchel.runtime.generation.result import Generation
from satchel.runtime.generation.scheduler import Scheduler
from satchel.runtime.generation.speculation import Drafter
from satchel.runtime.optimize.specialize import specialize
from satchel.runtime.ort.open_bundle import open_bundle

pytestmark = needs_kernels

CONTEXT = 300
WIDE = {
    "max_position_embeddings": CONTEXT,
    "vocab_size": 384,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(
    scope="module",
    params=[("int8", "float"), ("int8", "int8"), pytest.param(("int4", "float"), marks=pytest.mark.slow)],
)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paged")
    checkpoint = save_tiny(folder / "checkpoint", "llama", **WIDE)
    precision, cache = request.param
    config = ExportConfig(folder / "bundle", precision, kv_cache=cache, max_context=CONTEXT, certificate=False)
    export_bundle(checkpoint, config)
    specialize(open_bundle(folder / "bundle"), kernels="satchel", threads=1)
    return folder / "bundle"


@pytest.fixture(scope="module")
def alone(bundle: Path) -> Generator:
    """A generator that keeps nothing."""
    return Generator.open(bundle, threads=1, prefix_cache_mib=0)


def ask(rng: np.random.Generator, vocabulary: int, prefix: np.ndarray) -> Request:
    prompt = rng.integers(3, vocabulary, rng.integers(1, 120))
    if rng.random() < 0.5:
        prompt = np.concatenate([prefix[: rng.integers(1, len(prefix))], prompt[:20]])
    sampling = {"temperature": 1.5, "seed": int(rng.integers(99))} if rng.random() < 0.3 else {}
    options = GenerationOptions(max_new_tokens=int(rng.integers(0, 25)), **sampling)
    return Request(prompt, options, priority=int(rng.integers(2)), client="abc"[rng.integers(3)])


def solo(generator: Generator, request: Request) -> Generation:
    options = request.options
    return generator.generate(request.prompt, **{name: getattr(options, name) for name in options.__dataclass_fields__})


def drive(scheduler: Scheduler, requests: list[Request], rng: np.random.Generator) -> dict[int, Generation]:
    """Submit at random steps, cancel a few, and return the outcome of each by its index."""
    waiting, numbers, cancelled, events = list(range(len(requests))), {}, set(), []
    while waiting or scheduler.running or scheduler.waiting:
        while waiting and rng.random() < 0.5:
            index = waiting.pop(0)
            numbers[scheduler.submit(requests[index])] = index
        ended = {event.id for event in events if event.outcome is not None}
        if (running := sorted(numbers.keys() - ended - cancelled)) and rng.random() < 0.05:
            cancelled.add(int(rng.choice(running)))
            scheduler.cancel(max(cancelled))
        events += scheduler.step()
    return {numbers[event.id]: event.outcome for event in events if isinstance(event, Event) and event.outcome}


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_whatever_runs_beside_a_request_its_answer_is_that_of_its_solo_run(
    bundle: Path, alone: Generator, seed: int, limited: bool
) -> None:
    """`limited` has memory for a few blocks only: requests then wait in files, and go on where they were."""
    rng = np.random.default_rng(seed)
    generator = Generator.open(bundle, threads=2, prefix_cache_mib=None if seed % 2 else 0)
    vocabulary = generator.engine.vocabulary
    prefix = rng.integers(3, vocabulary, 150)
    requests = [ask(rng, vocabulary, prefix) for _ in range(20)]
    scheduler = generator.scheduler(rows=int(rng.integers(3, 7)), capacity=200, stretch=float(rng.uniform(1.01, 4)))
    assert isinstance(scheduler._batch, PagedBatch)
    if limited:  # less than a MiB, which the option cannot say of so small a model
        pool = scheduler._batch.runner.pool
        del pool._free[5:]
        pool.blocks = 5
    outcomes = drive(scheduler, requests, rng)
    assert len(outcomes) == len(requests)
    assert not limited or scheduler.preemptions
    for index, request in enumerate(requests):
        found, expected = outcomes[index], solo(alone, request)
        assert isinstance(found, Generation), found
        if found.finish_reason == "closed":
            assert found.token_ids == expected.token_ids[: found.new_tokens]
        else:
            assert (found.token_ids, found.text, found.finish_reason) == (
                expected.token_ids, expected.text, expected.finish_reason,
            )  # fmt: skip
    while generator.prefix_cache.evict(lambda cache: True):
        pass
    assert scheduler._batch.nbytes == 0


def test_a_shared_beginning_is_fed_and_held_once(bundle: Path, alone: Generator) -> None:
    generator = Generator.open(bundle, threads=1, prefix_cache_mib=0)
    rng = np.random.default_rng(0)
    prefix = rng.integers(3, generator.engine.vocabulary, 3 * BLOCK + 10)
    requests = [
        Request(np.concatenate([prefix, rng.integers(3, 90, 6)]), GenerationOptions(max_new_tokens=8)) for _ in range(6)
    ]
    scheduler = generator.scheduler(rows=6)
    for request in requests:
        scheduler.submit(request)
    most, outcomes = 0, {}
    while scheduler.waiting or scheduler.running:
        for event in scheduler.step():
            if event.outcome is not None:
                outcomes[event.id] = event.outcome
        most = max(most, scheduler._batch.runner.pool.used)
    assert (
        most <= 4 + 6
    )  # three blocks that all share, and the rest of each; the first one's is shared until it is written
    assert sum(each.reused_tokens >= len(prefix) - 1 for each in outcomes.values()) == 5
    for number, request in enumerate(requests):
        assert outcomes[number].token_ids == solo(alone, request).token_ids


def test_what_has_ended_is_kept_without_a_copy_and_serves_the_next_scheduler(bundle: Path) -> None:
    generator = Generator.open(bundle, threads=1)
    prompt = np.arange(3, 3 + 2 * BLOCK)
    first = generator.generate_batch([prompt], max_new_tokens=4)[0]
    second = generator.generate_batch([prompt], max_new_tokens=4)[0]
    assert (first.reused_tokens, second.reused_tokens) == (0, len(prompt) - 2)
    assert first.token_ids == second.token_ids == generator.generate(prompt, max_new_tokens=4).token_ids


def test_a_limit_that_holds_nothing_is_refused(bundle: Path, alone: Generator) -> None:
    with pytest.raises(PromptError, match="--kv-cache-mib 0"):
        alone.scheduler(rows=2, kv_cache_mib=0)
    scheduler = alone.scheduler(rows=2, capacity=BLOCK)
    with pytest.raises(PromptError, match=str(BLOCK)):
        scheduler.submit(Request(np.arange(3, 3 + BLOCK), GenerationOptions(max_new_tokens=9)))


@pytest.mark.parametrize("own", [4, BLOCK // 2])
def test_prefixes_take_no_more_memory_than_their_limit(bundle: Path, own: int) -> None:
    """Short ones take whole blocks, and blocks that several share count once."""
    generator = Generator.open(bundle, threads=1, prefix_cache_mib=1)
    rng = np.random.default_rng(0)
    common = rng.integers(3, generator.engine.vocabulary, 2 * BLOCK) if own > 4 else np.zeros(0, np.int64)
    scheduler = generator.scheduler(rows=4)
    assert isinstance(scheduler._batch, PagedBatch)
    pool = scheduler._batch.runner.pool
    fitting = (1 << 20) // pool.block_bytes
    for count in range(1, 2 * fitting):
        prompt = np.concatenate([common, rng.integers(3, generator.engine.vocabulary, own)])
        scheduler.submit(Request(prompt, GenerationOptions(max_new_tokens=1)))
        list(scheduler.run())
        assert pool.used == min(count + len(common) // BLOCK, fitting)


def test_a_draft_takes_the_memory_of_prefixes(bundle: Path, alone: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Generator.open(bundle, threads=1)
    rng = np.random.default_rng(0)
    scheduler = generator.scheduler(rows=2)
    assert isinstance(scheduler._batch, PagedBatch)
    pool = scheduler._batch.runner.pool
    del pool._free[5:]
    pool.blocks = 5
    for _ in range(8):
        scheduler.submit(Request(rng.integers(3, 90, BLOCK - 4), GenerationOptions(max_new_tokens=2)))
        list(scheduler.run())
    assert pool.used == pool.blocks
    request = Request(rng.integers(3, 90, 40), GenerationOptions(max_new_tokens=200, min_new_tokens=200))
    expected = solo(alone, request)

    def draft(self: object, token_ids: list[int], limit: int, *more: object) -> list[int]:
        return list(expected.token_ids[len(token_ids) : len(token_ids) + 15]) if limit >= 15 else []

    monkeypatch.setattr(Drafter, "draft", draft)
    scheduler.submit(request)
    (found,) = (event.outcome for event in scheduler.run() if event.outcome is not None)
    assert isinstance(found, Generation), found
    assert found.token_ids == expected.token_ids
    assert found.accepted_tokens > 100


@pytest.mark.parametrize("count", [2, 4, 8])
def test_a_run_ahead_over_blocks_gives_the_bits_of_single_steps(alone: Generator, count: int) -> None:
    """Also where the tokens go on in a further block, and after some of them were wrong."""
    rng = np.random.default_rng(count)
    engine, batch = alone.engine, alone.engine.new_pool(2, 200, 0, None)
    assert isinstance(batch, PagedBatch)
    prompt, tokens = rng.integers(3, engine.vocabulary, BLOCK - 1), rng.integers(3, engine.vocabulary, 2 * count)
    ahead, single = batch.add(), batch.add()
    for state in (ahead, single):
        engine.prefill(state, prompt)
    ahead.decode_ahead(tokens[::-1][:count])
    ahead.cache.shorten(len(prompt))
    for part in np.split(tokens, 2):
        found = ahead.decode_ahead(part).copy()
        expected = [engine.decode(single, int(token)).copy() for token in part]
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(ahead.logits, single.logits)
    for name, past in single.cache.past.items():
        np.testing.assert_array_equal(ahead.cache.past[name], past)
