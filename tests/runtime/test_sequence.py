"""Every way in which a generation ends, and what has been shown, counted and kept by then."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_bundle import write_bundle

from satchel.runtime.errors import BundleError, PromptError
from satchel.runtime.execution.cpu import CpuState
from satchel.runtime.execution.state import State
from satchel.runtime.generation import sequence as sequence
from satchel.runtime.generation.generator import Generator
from satchel.runtime.generation.stream import TokenStream

PROMPT = [5, 80, 199, 12]
END = 2  # </s>


class Clock:
    """Stands in for the module `time`, and goes on only when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def go(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(sequence, "time", clock)
    return clock


@pytest.fixture
def fresh(tiny: Path) -> Generator:
    """A generator that has seen nothing yet."""
    return Generator.open(tiny, threads=1)


def spelled(generator: Generator, text: str) -> list[int]:
    """A token for each byte of a text."""
    vocabulary = generator.tokenizer._tokenizer.get_vocab()
    letters = generator.tokenizer._tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return [vocabulary[letter] for word, _ in letters for letter in word]


def choosing(tokens: Iterable[int], then: Callable[[], object] = lambda: None) -> Callable[[np.ndarray], int]:
    """Chooses these tokens, whatever the logits; `then` is called once they are used up, and id 3 chosen."""
    waiting = iter(tokens)

    def choose(logits: np.ndarray) -> int:
        token = next(waiting, None)
        if token is None:
            then()
            return 3
        return token

    return choose


def write(generator: Generator, text: str, *more: int | str, count: int = 40, **options: object) -> TokenStream:
    """A stream that writes a text, byte by byte, and then the tokens `more`: ids, or what is a token each."""
    encode = generator.tokenizer.encode_rendered
    tokens = [*spelled(generator, text), *(part if isinstance(part, int) else encode(part)[0] for part in more)]
    return generator.stream(PROMPT, min(count, len(tokens)), choose=choosing(tokens), **options)


def test_an_end_token_ends_it_and_is_neither_shown_nor_counted(tmp_path: Path) -> None:
    ending = Generator.open(write_bundle(tmp_path / "ending", eos_token_ids=(END,)), threads=1)
    result = write(ending, "one", END, 9, logprobs=0).result()
    assert (result.text, result.finish_reason, result.new_tokens) == ("one", "stop", 3)
    assert len(result.logprobs) == 3
    assert result.decode_steps == 3


@pytest.mark.parametrize(
    ("text", "more", "options", "shown", "reason", "new"),
    [
        ("one END two", (), {"stop": "END"}, "one ", "stop", 7),  # split over tokens: not shown but counted
        ("one", (" the", 9), {"stop": ("h", "x")}, "one t", "stop", 4),  # inside a token
        ("one", (END, "t", "w", "o"), {}, "onetwo", "length", 7),
        ("one", (END, "t", "w", "o"), {"stop": ("zzz", "</s>")}, "one", "stop", 3),  # a special token
        ("one EN", (END,), {"stop": ("END", "</s>")}, "one EN", "stop", 6),  # what was held back
        ("one END", (), {"count": 6, "stop": "END"}, "one EN", "length", 6),
        ("a猫", (), {"count": 3}, "a\ufffd", "length", 3),  # a character that never came whole
        ("a猫", (), {}, "a猫", "length", 4),
        ("a猫", (), {"count": 3, "stop": "\ufffd"}, "a", "length", 3),
    ],
)
def test_text_is_shown_up_to_its_end(
    generator: Generator,
    text: str, more: tuple[int | str, ...], options: dict[str, Any], shown: str, reason: str, new: int,
) -> None:  # fmt: skip
    stream = write(generator, text, *more, logprobs=0, **options)
    pieces, result = "".join(stream), stream.result()
    assert (pieces, result.text, result.finish_reason, result.new_tokens) == (shown, shown, reason, new)
    assert [entry.token for entry in result.logprobs] == list(result.token_ids)


def test_the_time_limit_ends_it_between_tokens(generator: Generator, clock: Clock) -> None:
    tokens = spelled(generator, "one ENDED")
    choose = choosing(tokens[:6], then=lambda: clock.go(5))
    result = generator.generate(PROMPT, 20, choose=choose, stop="ENDS", time_limit=4.5)
    assert (result.finish_reason, result.new_tokens) == ("time", 7)
    assert result.text == "one EN" + generator.tokenizer.decode([3])


def test_the_time_limit_ends_it_while_the_prompt_is_fed(tmp_path: Path, clock: Clock) -> None:
    generator = Generator.open(write_bundle(tmp_path / "roomy", max_context=1000), threads=1)
    fed: list[int] = []

    def progress(count: int) -> None:
        fed.append(count)
        clock.go(5)

    prompt = np.random.default_rng(0).integers(3, 300, 600)  # it ends inside a character
    with generator.stream(prompt, 5, time_limit=8, progress=progress) as stream:
        assert list(stream) == []
    result = stream.result()
    assert fed == [256, 256]
    assert (result.finish_reason, result.token_ids, result.text) == ("time", (), "")
    assert generator.generate(prompt, 2).reused_tokens == 512
    with generator.stream(prompt, 2, progress=fed.append) as stream:
        assert stream.result().reused_tokens == 598
    assert fed[2:] == [598, 2]


def test_the_callback_gets_each_piece_and_ends_it_by_a_true_value(generator: Generator) -> None:
    heard: list[str] = []

    def callback(piece: str) -> bool:
        heard.append(piece)
        return piece == "e"

    stream = write(generator, "one two", callback=callback)
    assert list(stream) == heard == ["o", "n", "e"]
    assert stream.result().finish_reason == "callback"
    assert stream.result().new_tokens == 3


def test_the_callback_hears_what_was_held_back_too(generator: Generator) -> None:
    heard: list[str] = []
    result = write(generator, "oEE", stop="EEx", callback=lambda piece: heard.append(piece) or piece == "oEE").result()
    assert "".join(heard) == result.text == "oEE"
    heard.clear()
    result = write(generator, "x", " cat", "y", stop="tz", callback=heard.append).result()
    assert heard == ["x", " ca", "ty"]
    heard.clear()
    stream = write(generator, "x", " cat", 9, stop="tz", callback=lambda piece: heard.append(piece) or piece == " ca")
    assert "".join(stream) == "".join(heard) == "x cat"
    assert stream.result().finish_reason == "callback"


def test_closing_it_shows_what_was_held_back_and_keeps_what_is_known(fresh: Generator) -> None:
    with write(fresh, "oENDLESS", stop="ENDS") as stream:
        assert next(stream) == "o"
        stream._step(stream._state)
        stream._step(stream._state)
    assert list(stream) == ["EN"]
    stream.close()
    result = stream.result()
    assert (result.text, result.finish_reason, result.new_tokens) == ("oEN", "closed", 3)
    assert fresh.prefix_cache.positions == len(PROMPT) + 2  # the last token was not fed
    assert fresh.generate([*PROMPT, *result.token_ids, 7], 1).reused_tokens == len(PROMPT) + 2


def test_a_stream_that_was_never_read_can_be_closed(fresh: Generator) -> None:
    stream = fresh.stream(PROMPT, 4)
    stream.close()
    assert list(stream) == []
    result = stream.result()
    assert (result.finish_reason, result.new_tokens, result.prefill_seconds) == ("closed", 0, 0)
    assert fresh.prefix_cache.positions == 0


def test_a_callback_that_fails_ends_it(fresh: Generator) -> None:
    def callback(piece: str) -> None:
        if piece == "e":
            raise ValueError("no more")

    for count in (40, 3):  # also where it fails at the end
        stream = write(fresh, "one two", count=count, callback=callback)
        with pytest.raises(ValueError, match="no more"):
            stream.result()
        assert stream.result().finish_reason == "error"
    assert fresh.prefix_cache.positions == 0


def test_after_an_error_there_is_no_more_and_nothing_is_kept(fresh: Generator) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    stream = fresh.stream(PROMPT, 9, choose=choosing(spelled(fresh, "oneEN"), then=fail), stop="END")
    with pytest.raises(ZeroDivisionError):
        list(stream)
    assert list(stream) == []
    result = stream.result()
    assert (result.text, result.finish_reason, result.new_tokens) == ("one", "error", 5)
    assert fresh.prefix_cache.positions == 0


@pytest.mark.parametrize("where", ["decode", "choose"])
def test_an_interrupt_closes_it_and_keeps_what_is_known(
    fresh: Generator, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    plain = CpuState.decode

    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    tokens = spelled(fresh, "one")
    stream = fresh.stream(PROMPT, 9, choose=choosing(tokens, then=interrupt if where == "choose" else list))
    for _ in tokens:
        next(stream)
    if where == "decode":
        monkeypatch.setattr(CpuState, "decode", lambda *all: plain(*all) or interrupt())
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    monkeypatch.undo()
    result = stream.result()
    assert (result.text, result.finish_reason, list(result.token_ids)) == ("one", "closed", tokens)
    follow = [*PROMPT, *tokens, 9]
    assert fresh.prefix_cache.longest(np.array(follow))[0] == len(PROMPT) + 3
    known = fresh.generate(follow, 4)
    assert known.token_ids == Generator.open(fresh.engine.bundle.folder, threads=1).generate(follow, 4).token_ids


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    return wide - np.logaddexp.reduce(wide, axis=-1, keepdims=True)


def test_log_probabilities_line_up_with_the_tokens(generator: Generator) -> None:
    result = generator.generate(PROMPT, 8, logprobs=3, temperature=1.5, seed=3)
    ids = [*PROMPT, *result.token_ids]
    expected = log_softmax(generator.engine.score(ids))[len(PROMPT) - 1 : -1]
    assert result.new_tokens == len(result.logprobs) == 8
    for row, token, entry in zip(expected, result.token_ids, result.logprobs, strict=True):
        best = np.argsort(-row, kind="stable")[:3]
        assert entry.token == token
        assert [top for top, _ in entry.top] == best.tolist()
        np.testing.assert_allclose([entry.logprob, *(p for _, p in entry.top)], row[[token, *best]], atol=1e-4)
    assert generator.generate(PROMPT, 2).logprobs is None


def test_no_end_token_comes_before_the_least_number_of_tokens(tmp_path: Path, generator: Generator) -> None:
    first, _, third = generator.generate(PROMPT, 3).token_ids
    ends = (first, third, 2)
    ending = Generator.open(write_bundle(tmp_path / "ending", eos_token_ids=ends), threads=1)
    assert ending.generate(PROMPT, 9).finish_reason == "stop"
    assert ending.generate(PROMPT, 9).new_tokens == 0
    result = ending.generate(PROMPT, 9, min_new_tokens=4)
    ids = list(PROMPT)
    for _ in range(4):
        logits = generator.engine.score(ids)[-1].copy()
        logits[list(ends)] = -np.inf
        ids.append(int(logits.argmax()))
    assert list(result.token_ids[:4]) == ids[len(PROMPT) :]


def test_a_special_token_that_stops_is_banned_like_an_end_token(generator: Generator) -> None:
    options = {"logit_bias": {END: 1e6}, "stop": "</s>"}
    assert generator.generate(PROMPT, 3, **options).new_tokens == 0
    result = generator.generate(PROMPT, 6, min_new_tokens=2, **options)
    assert (result.finish_reason, result.token_ids) == ("stop", generator.generate(PROMPT, 2).token_ids)


@pytest.mark.parametrize(("step", "options"), [(0, {}), (1, {"temperature": 1.0, "seed": 1}), (3, {"logprobs": 1})])
def test_logits_that_are_not_finite_end_a_generation_with_the_step_named(
    fresh: Generator, monkeypatch: pytest.MonkeyPatch, options: dict[str, float], step: int
) -> None:
    for name, after in (("prefill", 0), ("decode", len(PROMPT) + step - 1)):
        plain = getattr(CpuState, name)

        def spoiled(state: State, ids: object, plain: Callable[..., None] = plain, after: int = after) -> None:
            at = state.cache.length
            plain(state, ids)
            if at == after:
                state.logits[7] = np.nan

        if (name == "prefill") == (step == 0):
            monkeypatch.setattr(CpuState, name, spoiled)
    stream = fresh.stream(PROMPT, 9, **options)
    with pytest.raises(BundleError, match=rf"step {step} .*NaN at token 7"):
        stream.result()
    assert (stream.result().finish_reason, stream.result().new_tokens) == ("error", step)
    assert fresh.prefix_cache.positions == 0


def test_wrong_options_of_the_end_are_refused(generator: Generator) -> None:
    wrong: list[tuple[dict[str, object], str]] = [
        ({"stop": ""}, "--stop: must be"),
        ({"stop": ["a", 3]}, "--stop: must be"),
        ({"time_limit": 0}, "--time-limit 0: must be seconds, above 0"),
        ({"time_limit": float("nan")}, "--time-limit nan: must be seconds"),
        ({"logprobs": 101}, "--logprobs 101: must be from 0 to 100"),
        ({"logprobs": True}, "--logprobs True: must be"),
        ({"max_new_tokens": 2.0}, r"--max-new-tokens 2.0: must be 0 or more"),
        ({"max_new_tokens": 2, "min_new_tokens": 3}, "--min-new-tokens 3: is more than --max-new-tokens 2"),
    ]
    for options, message in wrong:
        with pytest.raises(PromptError, match=message):
            generator.stream(PROMPT, **options)
    with pytest.raises(TypeError, match="stopp"):
        generator.stream(PROMPT, stopp="a")


def test_stop_strings_need_a_tokenizer(tmp_path: Path) -> None:
    bare = Generator.open(write_bundle(tmp_path / "bare", tokenizer_kind=None), threads=1)
    with pytest.raises(PromptError, match="no tokenizer"):
        bare.generate(PROMPT, 5, stop="a")
