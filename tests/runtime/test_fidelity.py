"""The figures against a plain reimplementation, on a tiny bundle, and what is refused."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from support.tiny_bundle import VOCABULARY

from satchel.runtime.bundle.certificate import PhaseFidelity
from satchel.runtime.errors import BundleError, PromptError, SatchelError
from satchel.runtime.evaluation import fidelity
from satchel.runtime.evaluation.fidelity import cut_windows, evaluate, text_ids
from satchel.runtime.execution.engine import Engine
from satchel.runtime.generation.tokenizer import Tokenizer

LENGTH, SKIP = 24, 5
RNG = np.random.default_rng(3)
WINDOWS = [RNG.integers(3, VOCABULARY, LENGTH) for _ in range(3)]
TOLERANCE = 1e-6


def blurred(engine: Engine) -> Callable[[np.ndarray], np.ndarray]:
    """A reference whose logits are the bundle's with noise that depends on the ids alone."""

    def reference(ids: np.ndarray) -> np.ndarray:
        noise = np.random.default_rng(int(ids.sum())).normal(0, 1.5, (len(ids), VOCABULARY))
        return engine.score(ids) + noise.astype(np.float32)

    return reference


def plain(engine: Engine, reference: Callable[[np.ndarray], np.ndarray], first: int, windows: list) -> PhaseFidelity:
    """The figures of positions `first` and later, one number at a time."""
    divergences, agreements, losses, reference_losses = [], [], [], []
    for window in windows:
        theirs, ours = reference(window), engine.score(window)
        for position in range(first, len(window)):
            p, q = (probabilities(row[position]) for row in (theirs, ours))
            divergences.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))
            agreements.append(p.index(max(p)) == q.index(max(q)))
            if position + 1 < len(window):
                losses.append(-math.log(q[window[position + 1]]))
                reference_losses.append(-math.log(p[window[position + 1]]))
    mean = [math.exp(sum(values) / len(values)) for values in (losses, reference_losses)]
    return PhaseFidelity(
        sum(divergences) / len(divergences),
        float(np.median(divergences)),
        float(np.quantile(divergences, 0.9)),
        sum(agreements) / len(agreements),
        *mean,
        float(np.quantile(divergences, 0.999)),
        max(divergences),
        agreements.count(False),
    )


def probabilities(logits: np.ndarray) -> list[float]:
    exponentials = [math.exp(float(value) - float(logits.max())) for value in logits]
    return [value / sum(exponentials) for value in exponentials]


def assert_figures(found: PhaseFidelity, expected: PhaseFidelity) -> None:
    for name, value in vars(expected).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize("at_once", [1, 7 * VOCABULARY, 1 << 20])
def test_the_figures_are_those_of_a_plain_computation(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(fidelity, "VALUES_AT_ONCE", at_once)
    reference = blurred(engine)
    found = evaluate(engine, WINDOWS, reference, skip=SKIP)
    assert_figures(found.prefill, plain(engine, reference, SKIP, WINDOWS))
    assert_figures(found.decode, plain(engine, reference, LENGTH // 2, WINDOWS))
    assert 0.2 < found.prefill.top1 < 1
    assert found.prefill.kl_mean > 0.1
    assert found.prefill.kl_p90 < found.prefill.kl_p999 < found.prefill.kl_max


@pytest.mark.parametrize(("decode_rows", "decode_windows"), [(1, None), (1, 2), (3, None)])
def test_windows_that_decode_together_have_the_same_figures(
    engine: Engine, decode_rows: int, decode_windows: int | None
) -> None:
    windows, reference = [*WINDOWS, WINDOWS[0][:17]], blurred(engine)  # the last in the batch ends first
    found, alone = (
        evaluate(
            engine, windows, reference, skip=SKIP, decode_rows=decode_rows, decode_windows=decode_windows,
            together=together,
        )
        for together in (3, 1)
    )  # fmt: skip
    for phase, expected in ((found.prefill, alone.prefill), (found.decode, alone.decode)):
        assert_figures(phase, expected)
    measured = windows[:decode_windows]
    half = [plain(engine, reference, len(window) // 2, [window]) for window in measured]
    counts = [len(window) - len(window) // 2 for window in measured]
    mean = sum(phase.kl_mean * count for phase, count in zip(half, counts, strict=True)) / sum(counts)
    assert found.decode.kl_mean == pytest.approx(mean, rel=1e-4)


def test_one_position_that_is_far_off_shows_in_the_tail_alone(engine: Engine) -> None:
    def reference(ids: np.ndarray) -> np.ndarray:
        rows = engine.score(ids)
        rows[9] = -rows[9]
        return rows

    far = evaluate(engine, [WINDOWS[0], WINDOWS[1]], reference, skip=SKIP, decode_windows=1).prefill
    p = [
        np.array(probabilities(rows[9])) for window in WINDOWS[:2] for rows in (reference(window), engine.score(window))
    ]
    worst = max(float((p[0] * np.log(p[0] / p[1])).sum()), float((p[2] * np.log(p[2] / p[3])).sum()))
    assert far.kl_p90 < TOLERANCE
    assert far.kl_max == pytest.approx(worst, rel=1e-4)
    assert far.flips == 2


def test_decode_can_use_fewer_windows_and_skips_too(engine: Engine) -> None:
    reference = blurred(engine)
    found = evaluate(engine, WINDOWS, reference, skip=SKIP, decode_windows=1)
    assert_figures(found.decode, plain(engine, reference, LENGTH // 2, WINDOWS[:1]))
    assert_figures(found.prefill, plain(engine, reference, SKIP, WINDOWS))
    late = evaluate(engine, WINDOWS, reference, skip=LENGTH - 4)
    assert_figures(late.decode, plain(engine, reference, LENGTH - 4, WINDOWS))


def test_a_bundle_against_itself_has_no_divergence(engine: Engine) -> None:
    found = evaluate(engine, WINDOWS, engine.score, skip=SKIP)
    for phase in (found.prefill, found.decode):
        assert 0 <= phase.kl_mean < TOLERANCE
        assert 0 <= phase.kl_p90 < TOLERANCE
        assert 0 <= phase.kl_max < TOLERANCE
        assert (phase.top1, phase.flips) == (1, 0)
        assert phase.perplexity == pytest.approx(phase.reference_perplexity, rel=1e-5)


def test_without_a_reference_there_is_perplexity_alone(engine: Engine) -> None:
    found = evaluate(engine, WINDOWS, None, skip=SKIP)
    expected = evaluate(engine, WINDOWS, engine.score, skip=SKIP)
    for phase, whole in ((found.prefill, expected.prefill), (found.decode, expected.decode)):
        assert phase == PhaseFidelity(None, None, None, None, whole.perplexity, None)


def test_the_last_position_of_prefill_is_that_of_the_prefill_graph(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = np.zeros(VOCABULARY, np.float32)
    monkeypatch.setattr(engine, "prefill", lambda *_: other)
    # One window of skip + 2 tokens: of its two positions, one is prefill's.
    window = WINDOWS[0][: SKIP + 2]
    expected = engine.score(window)
    found = evaluate(engine, [window], lambda ids: expected, skip=SKIP)
    p = np.array(probabilities(expected[-1]))
    assert found.prefill.kl_mean == pytest.approx(float((p * np.log(p * VOCABULARY)).sum()) / 2, rel=1e-4)


def test_progress_counts_the_tokens_of_each_window(engine: Engine) -> None:
    done: list[int] = []
    evaluate(engine, WINDOWS, None, skip=SKIP, progress=done.append)
    assert done == [LENGTH] * 3


def test_the_memory_does_not_grow_with_the_number_of_windows(engine: Engine) -> None:
    reference = blurred(engine)

    def peak(windows: list) -> int:
        tracemalloc.start()
        evaluate(engine, windows, reference, skip=SKIP)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(WINDOWS)
    one_window = LENGTH * VOCABULARY * 4
    # 21 windows more. Peaks vary by one window from run to run, by when garbage is collected.
    assert peak(WINDOWS * 8) < peak(WINDOWS) + 5 * one_window


def test_windows_are_consecutive_and_the_incomplete_last_one_is_dropped() -> None:
    ids = list(range(10))
    assert [list(window) for window in cut_windows(ids, 4, 9)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [list(window) for window in cut_windows(ids, 5, 1)] == [[0, 1, 2, 3, 4]]
    assert [list(window) for window in cut_windows(ids, 99, 3)] == [ids]
    assert cut_windows(ids, 4)[0].dtype == np.int64


class Wrapping:
    """Stands for a tokenizer that puts `before` and `after` around the ids of a text, its characters' numbers."""

    def __init__(self, before: list[int], after: list[int]) -> None:
        self.before, self.after = before, after

    def encode(self, text: str) -> list[int]:
        return [*self.before, *map(ord, text), *self.after]


@pytest.mark.parametrize(("before", "after"), [([], []), ([1], []), ([], [2]), ([1], [2]), ([1, 3], [2, 2])])
def test_special_tokens_around_a_text_are_left_out(before: list[int], after: list[int]) -> None:
    tokenizer = Wrapping(before, after)
    assert text_ids(tokenizer, "cat") == [99, 97, 116]
    assert text_ids(tokenizer, "") == []


def test_the_tiny_tokenizers_special_token_is_left_out(engine: Engine) -> None:
    tokenizer = Tokenizer.open(engine.bundle)
    assert tokenizer.encode("the cat")[0] == 1
    assert text_ids(tokenizer, "the cat") == tokenizer.encode("the cat")[1:]


def constant(value: float, width: int = VOCABULARY) -> Callable[[np.ndarray], np.ndarray]:
    return lambda ids, **_: np.full((len(ids), width), value, np.float32)


def test_what_cannot_be_measured_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    short = [WINDOWS[0], WINDOWS[1][: SKIP + 1]]
    with pytest.raises(PromptError, match="a window of 6 tokens is too short when 5 are skipped: give at least 7"):
        evaluate(engine, short, None, skip=SKIP)
    with pytest.raises(PromptError, match="a window of 0 tokens is too short"):
        evaluate(engine, [], None, skip=SKIP)
    with pytest.raises(PromptError, match="decode cannot be measured on 0 windows"):
        evaluate(engine, WINDOWS, None, skip=SKIP, decode_windows=0)
    with pytest.raises(
        SatchelError, match=r"the reference's logits are \[24, 401\] where the bundle's are \[24, 400\]"
    ):
        evaluate(engine, WINDOWS, constant(0, VOCABULARY + 1), skip=SKIP)
    with pytest.raises(SatchelError, match="the reference's logits are not finite"):
        evaluate(engine, WINDOWS, constant(np.nan), skip=SKIP)
    monkeypatch.setattr(engine, "score", constant(np.inf))
    with pytest.raises(BundleError, match="the logits of the score and prefill graphs are not finite"):
        evaluate(engine, WINDOWS, None, skip=SKIP)


def test_a_hopeless_prediction_still_has_a_finite_perplexity(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    sure = np.zeros((LENGTH, VOCABULARY), np.float32)
    sure[:, 0] = 1e6  # of id 0, which never comes
    monkeypatch.setattr(engine, "score", lambda ids, **_: sure.copy())
    assert math.isfinite(evaluate(engine, WINDOWS, None, skip=SKIP).prefill.perplexity)


@pytest.mark.parametrize("rows", [3, 2 * LENGTH])
def test_rows_and_workers_measure_the_same_positions(engine: Engine, rows: int) -> None:
    one = evaluate(engine, WINDOWS, blurred(engine), skip=SKIP)
    several = evaluate(engine, WINDOWS, blurred(engine), skip=SKIP, decode_rows=rows, workers=2)
    for phase in ("prefill", "decode"):
        for name, value in vars(getattr(one, phase)).items():
            assert getattr(getattr(several, phase), name) == pytest.approx(value, rel=1e-5), (
                name
            )  # sums in another order


def test_what_was_prefilled_before_a_row_is_what_it_decodes_after(engine: Engine) -> None:
    window = WINDOWS[0]
    late = evaluate(engine, [window], blurred(engine), skip=LENGTH - 2, decode_rows=4).decode
    assert late.kl_max == pytest.approx(plain(engine, blurred(engine), LENGTH - 2, [window]).kl_max, rel=1e-4)
