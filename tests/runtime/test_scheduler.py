"""Requests that come and go while others run: each gets what it gets alone, and its place is free when it has ended."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from support.tiny_bundle import MAX_CONTEXT, VOCABULARY, write_bundle

from satchel.runtime.errors import BundleError, PromptError, QueueFullError
from satchel.runtime.execution.batch import SMALL_PIECE, Batch
from satchel.runtime.execution.cpu import CpuState
from satchel.runtime.execution.engine import Engine
from satchel.runtime.generation import sequence
from satchel.runtime.generation.driver import Driver
from satchel.runtime.generation.events import Event
from satchel.runtime.generation.fair_queue import FairQueue, Job
from satchel.runtime.generation.generator import Generator
from satchel.runtime.generation.options import GenerationOptions
from satchel.runtime.generation.pace import PLANNED, RUN, Pace
from satchel.runtime.generation.request import Request
from satchel.runtime.generation.result import Generation
from satchel.runtime.generation.scheduler import Scheduler

LONG = 300  # positions


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    """A generator with room for long prompts, which keeps nothing."""
    folder = write_bundle(tmp_path_factory.mktemp("bundle") / "roomy", max_context=LONG)
    return Generator.open(folder, threads=1, prefix_cache_mib=0)


@pytest.fixture(scope="module")
def keeping(roomy: Generator) -> Generator:
    """The same with a prefix cache."""
    return Generator.open(roomy.engine.bundle.folder, threads=1)


def ask(length: int, new: int = 6, which: int = 0, **more: object) -> Request:
    prompt = np.random.default_rng([which, length]).integers(3, 300, length)
    fields = {name: more.pop(name) for name in ("priority", "client", "timeout", "sample") if name in more}
    return Request(prompt, GenerationOptions(max_new_tokens=new, **more), **fields)


def alone(generator: Generator, request: Request) -> Generation:
    options = request.options
    return generator.generate(request.prompt, **{name: getattr(options, name) for name in options.__dataclass_fields__})


def essence(result: Generation | Exception | None) -> tuple[object, ...]:
    assert isinstance(result, Generation), result
    return result.text, result.token_ids, result.finish_reason, result.prompt_tokens


def outcomes(events: list[Event]) -> dict[int, Generation | Exception]:
    """The outcome of each request that ended; events of a request that has ended are not expected."""
    ended: dict[int, Generation | Exception] = {}
    for event in events:
        assert event.id not in ended
        if event.outcome is not None:
            ended[event.id] = event.outcome
    return ended


def random_request(rng: np.random.Generator, prefix: np.ndarray) -> Request:
    """Of any length, often with a prefix that others have too, greedy or not, with any priority and client."""
    prompt = rng.integers(3, 300, rng.integers(1, 90))
    if rng.random() < 0.4:
        prompt = np.concatenate([prefix[: rng.integers(1, len(prefix))], prompt])
    sampling = {"temperature": 1.5, "seed": int(rng.integers(99))} if rng.random() < 0.3 else {}
    options = GenerationOptions(max_new_tokens=int(rng.integers(0, 25)), **sampling)
    return Request(prompt, options, priority=int(rng.integers(2)), client="abc"[rng.integers(3)])


@pytest.mark.parametrize("seed", range(6))
def test_whatever_runs_beside_a_request_its_answer_is_that_of_its_solo_run(
    roomy: Generator, keeping: Generator, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    prefix = rng.integers(3, 300, 100)
    scheduler = (roomy, keeping)[seed % 2].scheduler(rows=int(rng.integers(1, 6)), stretch=float(rng.uniform(1.01, 4)))
    requests: dict[int, Request] = {}
    cancelled: set[int] = set()
    events: list[Event] = []
    for _ in range(120):
        if len(requests) < 25 and rng.random() < 0.5:
            request = random_request(rng, prefix)
            requests[scheduler.submit(request)] = request
        running = sorted(requests.keys() - outcomes(events).keys() - cancelled)
        if running and rng.random() < 0.06:
            number = int(rng.choice(running))
            assert scheduler.cancel(number)
            cancelled.add(number)
        events += scheduler.step()
    events += scheduler.run()
    ended = outcomes(events)
    assert set(ended) == set(requests)
    assert scheduler.running == scheduler.waiting == 0
    assert 0 < len(cancelled) < len(requests)
    for number, request in requests.items():
        expected, found = alone(roomy, request), ended[number]
        own = [event for event in events if event.id == number]
        assert "".join(event.text for event in own) == found.text
        assert [token for event in own for token in event.token_ids] == list(found.token_ids)
        if found.finish_reason == "closed":
            assert number in cancelled
            assert found.token_ids == expected.token_ids[: found.new_tokens]
        else:
            assert essence(found) == essence(expected)


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of each run of the prefill graph, on kernels for which pieces change no result."""
    found: list[int] = []
    prefill = CpuState.prefill
    monkeypatch.setattr(Engine, "piece_invariant", True)
    monkeypatch.setattr(CpuState, "prefill", lambda state, ids: found.append(len(ids)) or prefill(state, ids))
    return found


def test_a_long_prompt_is_fed_in_pieces_between_the_tokens_of_others(roomy: Generator, pieces: list[int]) -> None:
    scheduler = roomy.scheduler(rows=2, stretch=1.0)  # the smallest pieces
    first, second = ask(5, 100), ask(200, 4)
    number = scheduler.submit(first)
    assert [event.token_ids for event in scheduler.step()] != []
    pieces.clear()
    late = scheduler.submit(second)
    between: list[int] = []
    events: list[Event] = []
    while not any(event.id == late for event in events):
        before = len(pieces)
        new = scheduler.step()
        between.append(sum(pieces[before:]))
        assert any(event.id == number and event.token_ids for event in new)
        events += new
    assert sum(between) == 200
    assert set(between) == {SMALL_PIECE}
    events += scheduler.run()
    assert essence(outcomes(events)[late]) == essence(alone(roomy, second))


def test_without_anybody_who_waits_prompts_are_fed_in_the_usual_spans(roomy: Generator, pieces: list[int]) -> None:
    scheduler = roomy.scheduler(rows=2)
    scheduler.submit(ask(290, 1))
    list(scheduler.run())
    assert pieces == [256, 34]


def test_a_short_prompt_overtakes_a_long_one(roomy: Generator) -> None:
    scheduler = roomy.scheduler(rows=3, stretch=1.0)
    scheduler.submit(ask(4, 200))
    scheduler.step()
    long = scheduler.submit(ask(280, 1))
    scheduler.step()
    short = scheduler.submit(ask(20, 1))
    ended = [event.id for event in scheduler.run() if event.outcome]
    assert ended[:2] == [short, long]


def test_what_another_request_is_being_fed_is_waited_for_and_shared(roomy: Generator) -> None:
    scheduler = roomy.scheduler(rows=4, stretch=1.0)
    scheduler.submit(ask(4, 100))
    scheduler.step()
    prefix = ask(150).prompt
    requests = [Request(np.concatenate([prefix, [20 + i, 5, 6, 7]])) for i in range(3)]
    numbers = [scheduler.submit(replace(request, options=GenerationOptions(max_new_tokens=30))) for request in requests]
    ended = outcomes(list(scheduler.run()))
    assert [ended[number].reused_tokens for number in numbers] == [0, 150, 150]


def test_equal_prompts_are_fed_once(roomy: Generator) -> None:
    scheduler = roomy.scheduler(rows=3)
    numbers = [scheduler.submit(ask(40, 5, sample=i, temperature=1.5, seed=7)) for i in range(4)]
    ended = outcomes(list(scheduler.run()))
    # The last one came when the others had gone.
    assert [ended[number].reused_tokens for number in numbers] == [0, 40, 40, 0]
    assert len({ended[number].token_ids for number in numbers}) == 4
    expected = roomy.samples(ask(40).prompt, 4, max_new_tokens=5, temperature=1.5, seed=7)
    assert [essence(ended[number]) for number in numbers] == [*map(essence, expected)]


def test_a_higher_priority_is_first(roomy: Generator) -> None:
    scheduler = roomy.scheduler(rows=1)
    numbers = [scheduler.submit(ask(5, 2, which=i, priority=priority)) for i, priority in enumerate((0, 0, 1, 2, 1))]
    ended = [event.id for event in scheduler.run() if event.outcome]
    assert ended == [numbers[i] for i in (3, 2, 4, 0, 1)]


def test_clients_get_equal_shares(roomy: Generator) -> None:
    scheduler = roomy.scheduler(rows=1)
    many = [scheduler.submit(ask(10, 5, which=i, client="many")) for i in range(6)]
    events = scheduler.step()
    few = [scheduler.submit(ask(10, 5, which=10 + i, client="few")) for i in range(2)]
    ended = [event.id for event in [*events, *scheduler.run()] if event.outcome]
    assert ended.index(few[1]) <= 4
    assert [number for number in ended if number in many] == many


def test_a_client_that_comes_back_has_saved_nothing_up() -> None:
    shares = FairQueue()
    jobs = [Job(i, None, 0, client, False, None) for i, client in enumerate("aab")]
    shares.add(jobs[0])
    shares.charge(jobs[0], 100)
    shares.add(jobs[2])
    shares.charge(jobs[2], 1)
    shares.add(jobs[1])
    assert shares.first() is jobs[0]
    shares.charge(jobs[0], 2)
    assert shares.first() is jobs[2]


def test_a_cancelled_request_frees_its_row_at_the_next_step(roomy: Generator) -> None:
    scheduler = roomy.scheduler(rows=2, stretch=1.0)
    running = scheduler.submit(ask(5, 50))
    scheduler.step()
    feeding, waiting = (scheduler.submit(ask(length, 50)) for length in (200, 6))
    scheduler.step()
    assert (scheduler.running, scheduler.waiting) == (2, 1)
    assert all(scheduler.cancel(number) for number in (running, feeding))
    ended = outcomes(scheduler.step())
    assert {number: result.finish_reason for number, result in ended.items()} == {running: "closed", feeding: "closed"}
    assert (ended[running].new_tokens, ended[feeding].new_tokens) == (2, 0)
    assert (scheduler.running, scheduler.waiting) == (1, 0)
    assert scheduler.cancel(waiting)
    assert not scheduler.cancel(running)
    assert scheduler.step()[0].outcome.finish_reason == "closed"
    assert scheduler.step() == []


def test_a_request_that_can_never_fit_and_one_that_is_wrong_are_refused(roomy: Generator) -> None:
    scheduler = roomy.scheduler(rows=1, capacity=20)
    for request, message in (
        (ask(10, 12), "needs 21 positions but a row holds 20"),
        (ask(LONG + 1), f"has {LONG + 1} tokens but the context holds {LONG}"),
        (ask(5, -1), "--max-new-tokens -1"),
        (ask(5, timeout=0.0), "timeout of 0.0 seconds"),
        (Request([]), "the prompt has no tokens"),
    ):
        with pytest.raises(PromptError, match=message):
            scheduler.submit(request)
    assert scheduler.step() == []
    assert scheduler.submit(ask(10, 11)) == 0


def test_a_full_queue_takes_no_more_until_one_has_ended(roomy: Generator) -> None:
    scheduler = roomy.scheduler(rows=1, queue_limit=2)
    first, *_ = [scheduler.submit(ask(4, 3, which=i)) for i in range(3)]
    for _ in range(2):
        with pytest.raises(QueueFullError, match="2 requests wait"):
            scheduler.submit(ask(4))
        scheduler.step()
    scheduler.cancel(first)
    scheduler.step()
    scheduler.submit(ask(4))


def test_the_time_in_the_queue_counts(roomy: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(sequence, "time", SimpleNamespace(monotonic=lambda: now[0]))
    scheduler = roomy.scheduler(rows=1)
    running = scheduler.submit(ask(4, 30, timeout=50.0))
    waiting = scheduler.submit(ask(4, 3, which=1, timeout=5.0))
    patient = scheduler.submit(ask(4, 3, which=2, time_limit=5.0))  # which counts from its prompt on
    scheduler.step()
    now[0] += 6
    ended = outcomes(scheduler.step())
    assert {number: result.finish_reason for number, result in ended.items()} == {waiting: "time"}
    now[0] += 60
    ended = outcomes([*scheduler.step(), *scheduler.run()])
    assert (ended[running].finish_reason, ended[running].new_tokens) == ("time", 2)
    assert (ended[patient].finish_reason, ended[patient].new_tokens) == ("length", 3)


def raising(error: Exception) -> Callable[[object], object]:
    def raise_it(_: object) -> object:
        raise error

    return raise_it


def test_an_error_of_one_request_ends_that_one_alone(roomy: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = roomy.scheduler(rows=4)
    good = ask(9, 8)
    right = scheduler.submit(good)
    failing = roomy.new_sequence(ask(8), choose=raising(ZeroDivisionError("own sampler")))
    wrong = scheduler.enqueue(failing, ask(8))
    deaf = scheduler.submit(ask(7, 8), raising(OSError("the client has gone")))
    spoiled = scheduler.submit(ask(6, 8, logit_bias=dict.fromkeys(range(VOCABULARY), -np.inf)))
    ended = outcomes(list(scheduler.run()))
    assert isinstance(ended[wrong], ZeroDivisionError)
    assert isinstance(ended[deaf], OSError)
    assert isinstance(ended[spoiled], PromptError)
    assert essence(ended[right]) == essence(alone(roomy, good))


def test_a_failed_step_ends_those_that_ran_and_the_next_ones_run(
    roomy: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = roomy.scheduler(rows=2)
    numbers = [scheduler.submit(ask(5, 4, which=i)) for i in range(3)]
    decode, calls = Batch.decode, iter([True])

    def fails_once(batch: Batch, tokens: list[int], first: int) -> None:
        if len(tokens) == 2 and next(calls, False):
            raise BundleError("the graph failed")
        decode(batch, tokens, first)

    monkeypatch.setattr(Batch, "decode", fails_once)
    ended = outcomes(list(scheduler.run()))
    assert [type(ended[number]) for number in numbers] == [BundleError, BundleError, Generation]


@pytest.mark.parametrize(("fixed", "each"), [(0.002, 0.0001), (0.008, 0.0005), (0.0, 0.00001)])
def test_planned_pieces_are_as_long_as_the_time_for_them(fixed: float, each: float) -> None:
    """A piece takes a fixed time and so much for each of its tokens, a decode step 0.010 seconds."""
    pace = Pace(3.0, in_pieces=True)
    steps: list[tuple[float, int]] = []
    for _ in range(50):
        pace.begin(1)
        total = 0
        while size := pace.piece():
            assert size % 2 == 0
            piece = min(size, 48)  # a prompt ends there
            pace.plan(piece)
            total += piece
        seconds = fixed + each * total if total else 0.0
        pace.waited(0.010 + seconds)
        steps.append((seconds, total))
    assert max(seconds for seconds, _ in steps) <= 0.020  # so that a step takes at most 3 times its 0.010 seconds
    possible = (PLANNED * 0.020 - fixed) / each
    assert 0.7 * min(possible, 256) <= steps[-1][1] <= possible
    assert [total for _, total in steps].count(0) == 2, "one before the first piece, and one to measure again"
    pace.begin(0)
    assert pace.piece() is None
    pace.plan(RUN)
    assert pace.piece() == 0


def test_all_events_are_delivered_in_order_and_the_last_ones_without_a_further_step(roomy: Generator) -> None:
    scheduler = roomy.scheduler(rows=2)
    delivered: list[Event] = []
    told: list[Event] = []
    for number in range(3):
        scheduler.submit(ask(5 + number, 4, which=number), delivered.append)
    while scheduler.running or scheduler.waiting:
        told += scheduler.step()
    assert len(told) >= 12
    assert delivered == told


def test_the_time_for_pieces_is_that_of_as_many_rows() -> None:
    """A request that waited alone, in a tenth of the time, does not keep others' prompts from being fed."""
    pace, sizes = Pace(3.0, in_pieces=True), dict[int, int]()
    for rows, alone in ((1, 0.001), (8, 0.010)):
        for _ in range(60):
            pace.begin(rows)
            if size := pace.piece():
                pace.plan(size)
                sizes[rows] = size
            pace.waited(alone + 0.0001 * (size or 0))
    for rows, alone in ((1, 0.001), (8, 0.010)):
        possible = round(PLANNED * 2 * alone / 0.0001)
        assert 0.7 * possible <= sizes[rows] <= possible


@pytest.mark.parametrize("stages", [2, 3])
def test_runs_of_several_stages_are_under_way_at_once_and_change_no_text(
    roomy: Generator, monkeypatch: pytest.MonkeyPatch, stages: int
) -> None:
    requests = [ask(5 + 9 * number, 6 + number, which=number) for number in range(7)]
    expected = [essence(alone(roomy, request)) for request in requests]
    monkeypatch.setattr(roomy.engine, "stages", stages)
    scheduler = roomy.scheduler(rows=6)
    decode, together, steps = Batch.decode, list[int](), list[int]()

    def counted(batch: Batch, tokens: list[int], first: int) -> None:
        steps.append(len(tokens))
        decode(batch, tokens, first)

    monkeypatch.setattr(Batch, "decode", counted)
    numbers = [scheduler.submit(request) for request in requests]
    cancelled = scheduler.submit(ask(20, 60, which=9))
    ended: dict[int, Generation | Exception | None] = {}
    while len(ended) < 8:
        for event in scheduler.step():
            if event.outcome is not None:
                ended[event.id] = event.outcome
        together.append(len(scheduler._flights))
        if len(together) == 20:
            assert scheduler.cancel(cancelled)
    assert [essence(ended[number]) for number in numbers] == expected
    assert max(together) == stages - 1, "one lands in each step"
    assert max(steps) == 6 // stages
    assert scheduler.running == scheduler.waiting == 0


def test_threads_may_submit_and_cancel_while_one_steps(roomy: Generator) -> None:
    requests = [ask(5 + i, 10, which=i) for i in range(12)]
    expected = [essence(alone(roomy, request)) for request in requests]
    found: dict[int, Generation | Exception | None] = {}

    def client(index: int, driver: Driver) -> None:
        events = list(driver.events(requests[index]))
        found[index] = events[-1].outcome
        for _ in driver.events(ask(20, 60, which=index)):
            break  # the client goes away

    with Driver(roomy.scheduler(rows=3)) as driver:
        threads = [threading.Thread(target=client, args=(index, driver)) for index in range(len(requests))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        driver.close()
        assert driver.scheduler.running == driver.scheduler.waiting == 0
        with pytest.raises(QueueFullError, match="closing"):
            driver.scheduler.submit(requests[0])
    assert [essence(found[index]) for index in range(len(requests))] == expected


def test_closing_without_draining_cancels(roomy: Generator) -> None:
    driver = Driver(roomy.scheduler(rows=1))
    events = [driver.events(ask(5, 250, which=i)) for i in range(3)]
    next(events[0])
    driver.close(drain=False)
    assert [list(each)[-1].outcome.finish_reason for each in events] == ["closed"] * 3


def test_nobody_waits_for_a_scheduler_that_broke(roomy: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheduler, "_pieces", raising(RuntimeError("a fault of satchel")))
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    driver = Driver(roomy.scheduler(rows=1))
    assert isinstance(list(driver.events(ask(5)))[-1].outcome, RuntimeError)
    driver.close()


def test_prompts_may_fill_a_row(roomy: Generator) -> None:
    scheduler = roomy.scheduler(rows=2, capacity=MAX_CONTEXT)
    requests = [ask(MAX_CONTEXT, 1), ask(MAX_CONTEXT - 9, 10), ask(1, MAX_CONTEXT)]
    numbers = [scheduler.submit(request) for request in requests]
    ended = outcomes(list(scheduler.run()))
    assert [essence(ended[number]) for number in numbers] == [essence(alone(roomy, request)) for request in requests]


def test_rows_of_fixed_memory_keep_no_limit(roomy: Generator) -> None:
    with pytest.raises(PromptError, match="--kv-cache-mib 5"):
        roomy.scheduler(rows=2, kv_cache_mib=5)
