"""Speculation changes the number of runs, and nothing of the text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.ahead import allow_runs_ahead
from support.kernels import needs_kernels
from support.tiny_bundle import write_bundle
from support.tiny_native_bundle import write_native_bundle

from satchel.runtime.errors import BundleError
from satchel.runtime.execution.cpu import CpuState
from satchel.runtime.execution.state import Ids, Logits, State
from satchel.runtime.generation import drafts
from satchel.runtime.generation.drafts import NgramDrafter, NgramPool
from satchel.runtime.generation.generator import Generator
from satchel.runtime.generation.options import GenerationOptions
from satchel.runtime.generation.request import Request
from satchel.runtime.generation.run_costs import Costs, reached
from satchel.runtime.generation.speculation import WIDTHS
from satchel.runtime.optimize import specialize
from satchel.runtime.ort.open_bundle import open_bundle

PROMPT = np.random.default_rng(3).integers(3, 300, 20)
# Few tokens are left, so that the text repeats.
FEW = {token: -np.inf for token in range(400) if token % 57}
CASES: list[dict[str, object]] = [
    {"logit_bias": FEW},
    {"logit_bias": FEW, "temperature": 1.5, "seed": 4},
    {"logit_bias": FEW, "temperature": 0.8, "seed": 5, "frequency_penalty": 0.5, "logprobs": 1},
    {"logit_bias": FEW, "stop": ("zz", "qq"), "max_repeats": 40},
    {},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle") / "roomy", max_context=300)


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of each run ahead."""
    return allow_runs_ahead(monkeypatch)


def essence(generator: Generator, new: int, options: dict[str, object]) -> tuple[object, ...]:
    result = generator.generate(PROMPT, new, **options)
    probabilities = [entry.logprob for entry in result.logprobs or ()]
    return result.token_ids, result.text, result.finish_reason, result.decode_steps, probabilities


@pytest.mark.parametrize("options", CASES, ids=lambda options: " ".join(options))
def test_the_text_is_the_same(folder: Path, ahead: list[int], options: dict[str, object]) -> None:
    generator = Generator.open(folder, threads=1, prefix_cache_mib=0)
    found = [essence(generator, 100, options) for _ in range(2)]  # the second time it is all known
    assert generator.engine.runs_ahead
    assert not generator.engine.wrong_ahead
    assert max(ahead) == 16
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator, "speculation", None)
        count = len(ahead)
        assert found == [essence(generator, 100, options)] * 2
        assert len(ahead) == count


@pytest.mark.parametrize("wrong", ["logits", "error"])
def test_kernels_that_give_something_else_are_found_out_and_not_used(
    folder: Path, ahead: list[int], monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    generator = Generator.open(folder, threads=1, prefix_cache_mib=0)
    run = CpuState.decode_ahead

    def differing(state: CpuState, tokens: Ids) -> Logits:
        if wrong == "error":
            run(state, tokens[:1])
            raise BundleError("several tokens of one sequence")
        found = run(state, tokens)
        return np.nextafter(found, np.inf)

    monkeypatch.setattr(CpuState, "decode_ahead", differing)
    found = [essence(generator, 100, CASES[0]) for _ in range(2)]
    assert not generator.engine.runs_ahead
    assert len(ahead) == len(generator.engine.wrong_ahead) > 0
    monkeypatch.setattr(generator, "speculation", None)
    assert found == [essence(generator, 100, CASES[0])] * 2


def test_the_prefix_cache_has_what_was_chosen(folder: Path, ahead: list[int]) -> None:
    generator = Generator.open(folder, threads=1)
    first = generator.generate(PROMPT, 60, logit_bias=FEW, seed=1, temperature=1.2)
    goes_on = [*PROMPT, *first.token_ids, 9, 8]
    assert ahead
    result = generator.generate(goes_on, 5)
    assert result.reused_tokens == len(goes_on) - 3
    other = Generator.open(folder, threads=1, prefix_cache_mib=0)
    assert result.token_ids == other.generate(goes_on, 5).token_ids


def test_a_request_that_runs_alone_speculates_and_several_do_not(folder: Path, ahead: list[int]) -> None:
    generator = Generator.open(folder, threads=1, prefix_cache_mib=0)
    options = GenerationOptions(max_new_tokens=100, logit_bias=FEW)
    scheduler = generator.scheduler(rows=2)
    for _ in range(2):
        scheduler.submit(Request(PROMPT, options))
    several = list(scheduler.run())
    assert ahead == []
    scheduler.submit(Request(PROMPT, options))
    alone = list(scheduler.run())
    assert max(ahead) == 16
    assert len(alone) < 80
    assert [token for event in alone for token in event.token_ids] == list(alone[-1].outcome.token_ids)
    assert {event.outcome.token_ids for event in (*several, *alone) if event.outcome} == {alone[-1].outcome.token_ids}


def raising_at(place: int) -> Callable[[str], object]:
    seen: list[str] = []

    def callback(piece: str) -> None:
        seen.append(piece)
        if len(seen) == place:
            raise KeyboardInterrupt

    return callback


@pytest.mark.parametrize("place", range(20, 30))
def test_an_interrupt_keeps_nothing_wrong(folder: Path, ahead: list[int], place: int) -> None:
    generator = Generator.open(folder, threads=1)
    options = {"logit_bias": FEW, "temperature": 1.5, "seed": 4}
    with pytest.raises(KeyboardInterrupt):
        generator.generate(PROMPT, 100, callback=raising_at(place), **options)
    assert ahead
    assert generator.prefix_cache.positions > len(PROMPT)
    found = generator.generate(PROMPT, 100, **options)
    other = Generator.open(folder, threads=1, prefix_cache_mib=0)
    assert found.token_ids == other.generate(PROMPT, 100, **options).token_ids


def texts_of(drafter: NgramDrafter, most: int = 4) -> list[int]:
    return drafter.predicted(most)[0]


def test_predictions_are_what_followed_the_last_tokens() -> None:
    pool = NgramPool()
    drafter = NgramDrafter(pool, np.array([1, 2, 3, 4, 5, 6, 7, 8, 1, 2]))
    assert texts_of(drafter) == [3, 4, 5, 6]  # only two are the same
    drafter.add([9])
    assert texts_of(drafter) == []
    drafter.add([1, 2])
    assert texts_of(drafter, 1) == [9]  # the latest
    drafter.add([3])
    assert texts_of(drafter) == [4, 5, 6, 7]
    drafter.add([4])
    assert texts_of(drafter, 2) == [5, 6]
    drafter.add([9])
    assert texts_of(drafter) == [6, 7, 8, 1]  # after another token than the source has
    drafter.add([10])
    assert texts_of(drafter) == []
    other = NgramDrafter(pool, np.array([50, 4, 5, 6]))  # from another text
    assert texts_of(other, 9) == [7, 8, 1, 2, 9, 1, 2, 3, 4]
    other.add([7, 8])
    assert texts_of(other, 1) == [1]


def test_a_text_that_ends_as_another_is_not_predicted_until_that_goes_on() -> None:
    pool = NgramPool()
    first = NgramDrafter(pool, np.array([1, 2, 3, 4]))
    second = NgramDrafter(pool, np.array([9, 2, 3, 4]))
    assert texts_of(second) == []
    second.add([7])
    first.add([5])
    assert texts_of(NgramDrafter(pool, np.array([8, 2, 3, 4]))) == [7]


def test_a_loop_is_predicted_further_than_it_was_seen() -> None:
    drafter = NgramDrafter(NgramPool(), np.array([5, 6, 7, 5, 6]))
    drafter.add([7, 5, 6, 7])
    assert texts_of(drafter, 7) == [5, 6, 7, 5, 6, 7, 5]


def test_how_often_predictions_are_right_is_measured_without_drafts() -> None:
    pool = NgramPool()
    before = [pool.chance(run) for run in (0, 1, 5)]
    assert before == sorted(before)
    rng = np.random.default_rng(1)
    drafter = NgramDrafter(pool, np.array([1, 2, 3]))
    drafter.add(rng.integers(0, 12, 6000).tolist())  # each n-gram is followed by anything
    assert pool.chance(0) < 0.15
    copied = rng.integers(100, 1 << 20, 200)
    drafter = NgramDrafter(pool, copied)
    drafter.add(copied.tolist())
    assert pool.chance(8) > 0.7
    assert pool.chance(1000) > 0.95


@pytest.mark.parametrize(("run", "follows"), [(drafts.PAIR, 9), (drafts.SKIPPED, 6)])
def test_of_the_weaker_sources_the_one_that_was_right_more_often_predicts(run: int, follows: int) -> None:
    pool = NgramPool()
    for _ in range(9):
        pool.note(run, True)
        pool.note(drafts.PAIR + drafts.SKIPPED - run, False)
    drafter = NgramDrafter(pool, np.array([4, 8, 9, 20, 1, 2, 3, 4, 5, 6, 30, 1, 2, 3]))
    drafter.add([4, 8])  # 5 was to follow: either 8 is in its place, or 9 follows as it did after 4, 8
    assert texts_of(drafter, 1) == [follows]


def test_the_pool_forgets_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts, "MAX_NGRAMS", 10)
    pool = NgramPool()
    for start in range(0, 60, 6):
        NgramDrafter(pool, np.arange(start, start + 6))
    assert texts_of(NgramDrafter(pool, np.array([0, 1, 2])), 1) == []
    assert texts_of(NgramDrafter(pool, np.array([54, 55, 56])), 2) == [57, 58]


def measured(**seconds: float) -> Costs:
    """Seconds by the number of drafted tokens."""
    costs = Costs()
    for name, value in seconds.items():
        for _ in range(3):
            costs.note(1 + int(name.removeprefix("w")), value)
    return costs


def width(costs: Costs, chances: list[float], each: float = 0.0, widths: tuple[int, ...] = WIDTHS) -> int:
    return costs.best(reached(chances), widths, each=each)[0]


def test_the_width_is_that_which_gives_most_tokens_in_the_measured_time() -> None:
    cheap, dear = measured(w0=1.0, w1=1.1, w3=1.2, w7=1.5), measured(w0=1.0, w1=1.9, w3=3.9, w7=7.5, w15=15.0)
    sure, even, bad = [0.99] * 7, [0.5] * 7, [0.03] * 7
    assert [width(cheap, chances) for chances in (sure, even, bad, sure[:4], [])] == [7, 3, 0, 3, 0]
    assert [width(dear, chances) for chances in (sure, even, bad)] == [0, 0, 0]
    assert width(cheap, sure, widths=(1, 3, 15)) == 3
    assert width(cheap, sure, each=0.05) == 7
    assert width(cheap, even, each=0.5) == 0
    assert width(Costs(), sure) == 0, "before anything was measured"


def test_beside_others_a_row_pays_only_if_it_gives_more_than_one_of_theirs() -> None:
    """Each costs half of the first one: beside one row a draft that is often right pays, beside eight a sure one."""
    costs = Costs()
    for rows in (1, 2, 8, 16):
        for _ in range(2):
            costs.note(rows, 0.5 + rows / 2)
    assert [costs.price([count], rows) for count, rows in ((1, 1), (8, 8))] == [0.5, 8 * 4 / 4.5 / 8]
    assert Costs().price([1], 1) == np.inf
    assert [costs.best([chance], [1])[0] for chance in (0.5, 0.7, 1.0)] == [0, 1, 1]
    assert [costs.best([chance] * 8, [8], rows=8)[0] for chance in (0.7, 0.95, 1.0)] == [0, 0, 8]


def test_times_that_were_disturbed_count_less() -> None:
    costs = measured(w0=1.0, w1=1.2)
    costs.note(2, 9.0)
    assert costs.of(2) < 2.1
    costs.note(2, 1.1)
    assert costs.of(2) == 1.1


def test_a_request_that_waits_takes_no_memory_for_drafts_and_its_text_is_known_to_others(
    folder: Path, ahead: list[int]
) -> None:
    generator = Generator.open(folder, threads=1, prefix_cache_mib=0)
    assert generator.speculation is not None
    sequence = generator.new_sequence(Request(PROMPT))
    assert texts_of(NgramDrafter(generator.speculation.pool, PROMPT[:5])) == []
    sequence.end_drafts()
    assert texts_of(NgramDrafter(generator.speculation.pool, PROMPT[2:7])) == []
    first, _ = generator.generate_batch([PROMPT[8:], PROMPT[5:17]], rows=2, max_new_tokens=8)
    assert texts_of(NgramDrafter(generator.speculation.pool, PROMPT[10:]), 8) == list(first.token_ids)


def test_a_text_that_does_not_repeat_has_no_drafts(folder: Path, ahead: list[int]) -> None:
    generator = Generator.open(folder, threads=1, prefix_cache_mib=0)
    result = generator.generate(PROMPT, 100, temperature=3.0, seed=1)
    assert (ahead, result.drafted_tokens, result.accepted_tokens) == ([], 0, 0)


@pytest.mark.parametrize("end", ["eos", "stop", "length", "context"])
def test_a_text_ends_within_a_draft(tmp_path: Path, folder: Path, ahead: list[int], end: str) -> None:
    options: dict[str, object] = {"logit_bias": FEW, "max_new_tokens": 100}
    plain, other = Generator.open(folder, threads=1, prefix_cache_mib=0), folder
    if end == "eos":
        options["min_new_tokens"] = 77
        other = write_bundle(tmp_path / "ends", max_context=300, eos_token_ids=tuple(range(0, 400, 57)))
        options["logit_bias"] = {token: bias for token, bias in FEW.items() if token % 19}
    elif end == "stop":
        text = plain.generate(PROMPT, **options).text
        options["stop"] = (text[5 : len(text) * 3 // 4],)
    elif end == "length":
        options["max_new_tokens"] = 77
    else:
        other = write_bundle(tmp_path / "short", max_context=len(PROMPT) + 77)
    generator = Generator.open(other, threads=1, prefix_cache_mib=0)
    for _ in range(2):  # the second time it is all known
        found = generator.generate(PROMPT, **options)
    assert max(ahead) > 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator, "speculation", None)
        expected = generator.generate(PROMPT, **options)
    assert (found.token_ids, found.text, found.finish_reason) == (
        expected.token_ids, expected.text, expected.finish_reason,
    )  # fmt: skip
    assert found.new_tokens < 100


@needs_kernels
def test_on_satchels_own_kernels_a_run_ahead_gives_the_same_bits(tmp_path: Path) -> None:
    folder = write_native_bundle(tmp_path / "native")
    made = specialize.specialize(open_bundle(folder), kernels="satchel", threads=1).specialized
    assert made is not None
    assert [run.drafted for run in made.runs_ahead] == [1, 3, 7, 15]
    assert all(run.steps > 0 for run in made.runs_ahead)
    engine = Generator.open(folder, threads=1, specialize=False).engine
    one, other = (engine.new_state(50) for _ in range(2))
    assert engine.why_not_ahead(None) is None
    assert engine.why_not_ahead("style") is not None
    for state in (one, other):
        engine.prefill(state, PROMPT)
    found, expected = one.decode_ahead(PROMPT[:8]), State.decode_ahead(other, PROMPT[:8])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert one.cache.length == other.cache.length == len(PROMPT) + 8
    assert np.array_equal(found, expected)
    for state in (one, other):
        state.cache.shorten(len(PROMPT) + 3)
        state.decode(7)
    np.testing.assert_allclose(one.logits, other.logits, rtol=0, atol=1e-4 * np.abs(other.logits).max())


@needs_kernels
def test_a_run_that_differs_by_a_bit_is_not_recorded_when_a_bundle_is_specialized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = CpuState.decode_ahead

    def differing(state: CpuState, tokens: Ids) -> Logits:
        if len(tokens) == 16:
            raise BundleError("too many")
        return np.nextafter(run(state, tokens), np.inf) if len(tokens) == 4 else run(state, tokens)

    monkeypatch.setattr(CpuState, "decode_ahead", differing)
    folder = write_native_bundle(tmp_path / "native")
    made = specialize.specialize(open_bundle(folder), kernels="satchel", threads=1).specialized
    assert made is not None
    assert [run.drafted for run in made.runs_ahead] == [1, 7]
    engine = Generator.open(folder, threads=1, specialize=False).engine
    assert engine.runs_ahead == {1, 7}


def test_costs_begin_with_those_that_were_recorded() -> None:
    costs = Costs({2: 1.05, 4: 1.4})
    assert costs.of(2) == np.inf
    for _ in range(2):
        costs.note(1, 2.0)
    np.testing.assert_allclose([costs.of(rows) for rows in (1, 2, 3, 4, 8)], [2.0, 2.1, 2.45, 2.8, 4.2])
    for _ in range(2):
        costs.note(4, 7.0)
    np.testing.assert_allclose([costs.of(rows) for rows in (2, 4, 8)], [2.1, 7.0, 10.5])
    others = Costs({2: 1.05, 4: 1.4})
    for _ in range(2):
        others.note(4, 7.0)
    np.testing.assert_allclose([others.of(rows) for rows in (1, 2)], [5.0, 5.25])
