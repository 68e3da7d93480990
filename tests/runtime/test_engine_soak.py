"""2,000 requests from 16 threads, some of which are left, cancelled, late, or wrong."""

from __future__ import annotations

import gc
import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import save_tiny
from support.kernels import needs_kernels
from support.memory import anonymous_mib
from support.tiny_bundle import write_bundle

from satchel.export import ExportConfig, export_bundle
from satchel.runtime.errors import PromptError
from satchel.runtime.generation.driver import Driver
from satchel.runtime.generation.generator import Generator
from satchel.runtime.generation.options import GenerationOptions
from satchel.runtime.generation.request import Request
from satchel.runtime.generation.result import Generation
from satchel.runtime.generation.sequence import ActiveSequence
from satchel.runtime.optimize.specialize import specialize
from satchel.runtime.ort.open_bundle import open_bundle

pytestmark = pytest.mark.slow

THREADS, REQUESTS, ROWS = 16, 2000, 4
CONTEXT = 300
KINDS = {"whole": 8, "left": 3, "cancelled": 3, "late": 1, "failing": 1, "wrong": 2}
ENDS = {"closed", "time", "length", "stop"}

Alone = list[tuple[Request, Generation]]


def rows_of_onnxruntime(folder: Path) -> Path:
    """A bundle for ONNX Runtime's operators."""
    return write_bundle(folder / "bundle", max_context=CONTEXT)


def own_kernels(folder: Path) -> Path:
    """A bundle that is specialized for satchel's own operators."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": CONTEXT}
    checkpoint = save_tiny(folder / "checkpoint", "llama", num_attention_heads=4, num_key_value_heads=2, **sizes)
    export_bundle(checkpoint, ExportConfig(folder / "bundle", "int8", max_context=CONTEXT, certificate=False))
    specialize(open_bundle(folder / "bundle"), kernels="satchel", threads=1)
    return folder / "bundle"


def some_requests(count: int, vocabulary: int) -> list[Request]:
    """Requests of any length, half of them with a beginning that others have, greedy or sampled."""
    rng = np.random.default_rng(3)
    common = rng.integers(3, vocabulary, 150)
    found = []
    for number in range(count):
        prompt = rng.integers(3, vocabulary, rng.integers(1, 90))
        if number % 2:
            prompt = np.concatenate([common[: rng.integers(20, 150)], prompt])
        sampling = {"temperature": 1.2, "seed": number} if number % 3 == 0 else {}
        options = GenerationOptions(max_new_tokens=int(rng.integers(1, 40)), **sampling)
        found.append(Request(prompt, options, priority=number % 2, client="abc"[number % 3]))
    return found


class Client:
    """One thread: it makes requests of all kinds, and counts those that came to their end."""

    def __init__(self, driver: Driver, alone: Alone, seed: int) -> None:
        self._driver, self._alone, self._rng = driver, alone, random.Random(seed)

    def work(self, count: int) -> Counter[str]:
        """Make so many requests. Raises AssertionError where an outcome is not that of its request alone."""
        counts: Counter[str] = Counter()
        for _ in range(count):
            (kind,) = self._rng.choices(list(KINDS), list(KINDS.values()))
            request, expected = self._rng.choice(self._alone)
            getattr(self, kind)(request, expected)
            counts[kind] += 1
        return counts

    def whole(self, request: Request, expected: Generation) -> None:
        events = list(self._driver.events(request))
        found = events[-1].outcome
        assert isinstance(found, Generation), found
        assert found.token_ids == expected.token_ids == tuple(token for each in events for token in each.token_ids)
        assert "".join(event.text for event in events) == found.text == expected.text
        assert found.finish_reason == expected.finish_reason

    def left(self, request: Request, expected: Generation) -> None:
        most = self._rng.randint(1, 20)
        tokens: list[int] = []
        for number, event in enumerate(self._driver.events(request), start=1):
            tokens += event.token_ids
            if number == most:
                break
        assert tuple(tokens) == expected.token_ids[: len(tokens)]

    def cancelled(self, request: Request, expected: Generation) -> None:
        most, events = self._rng.randint(0, 8), self._driver.events(request)
        tokens: list[int] = []
        for number, event in enumerate(events):
            tokens += event.token_ids
            if number == most:
                self._driver.scheduler.cancel(event.id)
            if event.outcome is not None:
                assert isinstance(event.outcome, Generation)
                assert event.outcome.finish_reason in ENDS
        assert tuple(tokens) == expected.token_ids[: len(tokens)]

    def late(self, request: Request, expected: Generation) -> None:
        hurried = Request(request.prompt, request.options, timeout=self._rng.choice([1e-6, 0.01]))
        found = list(self._driver.events(hurried))[-1].outcome
        assert isinstance(found, Generation)
        assert found.finish_reason in ENDS
        assert found.token_ids == expected.token_ids[: len(found.token_ids)]

    def failing(self, request: Request, expected: Generation) -> None:
        """What takes the events fails, which ends this request alone."""

        def deliver(event: object) -> None:
            raise OSError("the reader is gone")

        self._driver.scheduler.submit(request, deliver)

    def wrong(self, request: Request, expected: Generation) -> None:
        options = request.options
        bad = [
            Request([3, 10**9], options),
            Request([], options),
            Request([-1], options),
            Request([3] * (CONTEXT + 1), options),
            Request([3], GenerationOptions(max_new_tokens=4, adapter="none of these")),
        ]
        with pytest.raises(PromptError):
            self._driver.scheduler.submit(self._rng.choice(bad))


def soak(driver: Driver, alone: Alone, requests: int, seed: int) -> Counter[str]:
    """Make requests from all threads at once; returns the number of each kind that came to its end."""
    clients = [Client(driver, alone, seed + number) for number in range(THREADS)]
    with ThreadPoolExecutor(THREADS) as pool:
        return sum(pool.map(lambda client: client.work(requests // THREADS), clients), Counter[str]())


def wait_until_idle(driver: Driver) -> None:
    """Wait for those that nobody waits for, behind one that comes last."""
    last = Request([3], GenerationOptions(max_new_tokens=1), priority=-1)
    list(driver.events(last))


@pytest.mark.parametrize("make", [rows_of_onnxruntime, pytest.param(own_kernels, marks=needs_kernels)])
@pytest.mark.parametrize("prefix_cache_mib", [0, 1])
def test_a_soak_loses_mixes_up_and_leaves_nothing(
    tmp_path: Path, make: Callable[[Path], Path], prefix_cache_mib: int
) -> None:
    generator = Generator.open(make(tmp_path), threads=1, prefix_cache_mib=prefix_cache_mib, specialize=False)
    requests = some_requests(48, min(300, generator.engine.vocabulary))
    solo = Generator.open(tmp_path / "bundle", threads=1, prefix_cache_mib=0, specialize=False, speculate="off")
    alone = [(request, next(iter(solo.run_requests([request])))[1]) for request in requests]
    assert len({tuple(result.token_ids) for _, result in alone}) > 40
    with Driver(generator.scheduler(rows=ROWS)) as driver:
        soak(driver, alone, 320, seed=1000)  # caches and pools are full then
        sizes, counts = [], Counter[str]()
        for part in range(3):
            counts += soak(driver, alone, REQUESTS // 2, seed=THREADS * part)
            wait_until_idle(driver)
            gc.collect()
            sizes.append(anonymous_mib())
        left = [each for each in gc.get_objects() if type(each) is ActiveSequence]
        assert counts.total() == REQUESTS // THREADS // 2 * THREADS * 3
        assert min(counts[kind] for kind in KINDS) > REQUESTS // 50
        assert driver.alive
        assert (driver.scheduler.running, driver.scheduler.waiting) == (0, 0)
        assert len(left) <= 2, left  # the last one, in the frames of the thread
        assert min(sizes[1] - sizes[0], sizes[2] - sizes[1]) < 4  # what leaks grows in each part
