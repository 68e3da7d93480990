"""What was fed is reused by bundles with states too: turns, shared prefixes, saved states, beside limits and others."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.chat_bundle import CONTEXT, END, TEMPLATE, chat_tokenizer
from support.tiny_bundle import change_manifest
from support.tiny_hybrid import PATTERN, expected, write_hybrid

from satchel.runtime.errors import BundleError
from satchel.runtime.execution.kv_cache import position_bytes
from satchel.runtime.generation.conversation import Conversation
from satchel.runtime.generation.generator import Generator, Request
from satchel.runtime.generation.options import GenerationOptions
from satchel.runtime.generation.snapshots import LAST, NEAREST, Snapshots, message_boundaries

PATTERNS = {"hybrid": PATTERN, "recurrent": ("linear", "linear")}
SYSTEM = "Answer every question in one short sentence, and never twice in the same way."


def write_chat(folder: Path, pattern: Sequence[str], seed: int = 0) -> Path:
    companions = {"chat_template.jinja": TEMPLATE.encode()}
    options = {"tokenizer": chat_tokenizer(), "eos_token_ids": (END,), "companions": companions}
    return write_hybrid(folder, pattern, seed, max_context=CONTEXT, **options)


@pytest.fixture(scope="module", params=list(PATTERNS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat(tmp_path_factory.mktemp(request.param) / "bundle", PATTERNS[request.param])


@pytest.fixture(scope="module")
def plain(folder: Path) -> Iterator[Generator]:
    """A generator that reuses nothing."""
    generator = Generator.open(folder, threads=1, prefix_cache_mib=0)
    yield generator
    generator.template.close()


@pytest.fixture
def generator(folder: Path, plain: Generator) -> Generator:
    generator = Generator.open(folder, threads=1)
    generator.template = plain.template
    return generator


def fed(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the spans that are fed from now on."""
    from satchel.runtime.execution import cpu

    spans: list[int] = []
    run = cpu.run_span

    def noted(session: Any, binding: Any, cache: Any, tokens: Any, *more: Any) -> None:
        spans.append(len(tokens))
        run(session, binding, cache, tokens, *more)

    monkeypatch.setattr(cpu, "run_span", noted)
    return spans


def test_greedy_tokens_are_those_of_numpy(generator: Generator, folder: Path) -> None:
    pattern = PATTERNS["hybrid"] if len(generator.engine.bundle.manifest.kv_cache.layers) else PATTERNS["recurrent"]
    ids = [5, 9, 300, 41]
    for token in generator.generate(ids, 20).token_ids:
        assert token == int(expected(ids, pattern)[-1].argmax())
        ids.append(token)


def test_a_turn_feeds_its_own_tokens_only(
    generator: Generator, plain: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = GenerationOptions(max_new_tokens=12)
    talk, alone = (Conversation(each, system=SYSTEM, options=options) for each in (generator, plain))
    known = 0
    for question in ("Who?", "And where is the town that she came from, on the map?", "Why?"):
        answer, wanted = talk.ask(question).result(), alone.ask(question).result()
        assert (answer.text, answer.token_ids) == (wanted.text, wanted.token_ids)
        assert answer.reused_tokens == known
        known = answer.prompt_tokens + len(answer.token_ids) - (answer.finish_reason != "stop")
    spans = fed(generator, monkeypatch)
    last = talk.ask("Yes?").result()
    assert sum(spans) == last.prompt_tokens - known < 30


def test_an_answer_that_is_rendered_otherwise_costs_no_more_than_itself(generator: Generator, plain: Generator) -> None:
    """As where a template leaves out what a model thought."""
    question = {"role": "user", "content": "What is there to be seen in the old town, by day and by night?"}
    first = generator.encode_chat([{"role": "system", "content": SYSTEM}, question])
    generator.generate(first, 20)
    told = {"role": "assistant", "content": "Nothing."}
    second = generator.encode_chat([{"role": "system", "content": SYSTEM}, question, told, question])
    found = generator.generate(second, 8)
    assert first.size - NEAREST <= found.reused_tokens < first.size
    assert found.token_ids == plain.generate(second, 8).token_ids


def test_a_system_prompt_is_shared(generator: Generator, plain: Generator) -> None:
    def asked(question: str) -> np.ndarray:
        return generator.encode_chat([{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}])

    system = generator.need_tokenizer().encode_rendered(f"<|im_start|>system\n{SYSTEM}")
    for count, question in enumerate(("Who?", "Where is it?", "And why not?")):
        found = generator.generate(asked(question), 6)
        assert found.reused_tokens == (len(system) if count else 0)
        assert found.token_ids == plain.generate(asked(question), 6).token_ids


def test_a_long_prompt_is_shared_up_to_a_chunk(generator: Generator, plain: Generator) -> None:
    ids = np.random.default_rng(0).integers(5, 250, 370)
    generator.generate(ids, 1)
    other = [*ids[:360], 7, 8, 9]
    found = generator.generate(other, 6)
    assert found.reused_tokens == 256
    assert found.token_ids == plain.generate(other, 6).token_ids


def test_requests_together_reuse_and_give_what_each_gives_alone(generator: Generator, plain: Generator) -> None:
    rng = np.random.default_rng(1)
    shared = rng.integers(5, 250, 40).tolist()
    prompts = [[*shared, *rng.integers(5, 250, 1 + 5 * row).tolist()] for row in range(6)]
    prompts += [prompts[0], shared[:7]]
    for generator_rows in (3, 8):
        found = generator.generate_batch(prompts, rows=generator_rows, max_new_tokens=9)
        assert [each.token_ids for each in found] == [plain.generate(prompt, 9).token_ids for prompt in prompts]


def test_samples_and_beams_are_as_without_reuse(generator: Generator, plain: Generator) -> None:
    ids = np.random.default_rng(2).integers(5, 250, 30)
    for _ in range(2):
        for found, wanted in zip(
            *(each.samples(ids, 3, max_new_tokens=8, temperature=1.0, seed=4) for each in (generator, plain)),
            strict=True,
        ):
            assert found.token_ids == wanted.token_ids
        found_beams, wanted_beams = (each.beam_search(ids, 3, max_new_tokens=8) for each in (generator, plain))
        assert [each.token_ids for each in found_beams] == [each.token_ids for each in wanted_beams]
        for beam in found_beams:
            text = [*ids.tolist(), *beam.token_ids]
            total, pattern = 0.0, PATTERNS["hybrid" if generator.prefix_cache._spec.layers else "recurrent"]
            logits = expected(text, pattern)[len(ids) - 1 : -1]
            for row, token in zip(logits, beam.token_ids, strict=True):
                total += row[token] - row.max() - np.log(np.exp(row - row.max()).sum())
            if beam.finish_reason == "length":
                assert beam.score == pytest.approx(total / len(beam.token_ids), abs=1e-3)


def test_a_beam_search_leaves_a_system_prompt_to_others(generator: Generator, plain: Generator) -> None:
    def asked(question: str) -> np.ndarray:
        return generator.encode_chat([{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}])

    generator.beam_search(asked("Who?"), 3, max_new_tokens=8)
    found = generator.generate(asked("Where?"), 6)
    assert found.reused_tokens == len(generator.need_tokenizer().encode_rendered(f"<|im_start|>system\n{SYSTEM}"))
    assert found.token_ids == plain.generate(asked("Where?"), 6).token_ids


def test_a_saved_conversation_goes_on_elsewhere(generator: Generator, folder: Path, tmp_path: Path) -> None:
    options = GenerationOptions(max_new_tokens=10)
    talk = Conversation(generator, options=options)
    first = talk.ask("Who came?").result()
    count = talk.save_state(tmp_path / "talk.state")
    assert count == first.prompt_tokens + 9
    later = Generator.open(folder, threads=1)
    later.template = generator.template
    again = Conversation(later, options=options)
    again.load_state(tmp_path / "talk.state")
    found, wanted = again.ask("And who left?").result(), talk.ask("And who left?").result()
    assert found.reused_tokens == wanted.reused_tokens == count
    assert found.token_ids == wanted.token_ids


def test_the_state_of_another_pattern_is_refused(tmp_path: Path) -> None:
    one, other = (
        Generator.open(write_chat(tmp_path / str(index), pattern), threads=1)
        for index, pattern in enumerate((("conv", "linear"), ("linear", "conv")))
    )
    tokens = one.generate([1, 2, 3], 4).token_ids
    path = tmp_path / "talk.state"
    one.save_state(path, [1, 2, 3, *tokens])
    with pytest.raises(BundleError, match=r"talk\.state: was saved with another bundle"):
        other.load_state(path)
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"]["fingerprint"] = other.engine.bundle.fingerprint
    line = json.dumps(header).encode()
    path.write_bytes(len(line).to_bytes(8, "little") + line + content[8 + size :])
    with pytest.raises(BundleError, match=r"talk\.state: damaged: its tensors are not those of"):
        other.load_state(path)


def test_a_context_that_slides_goes_on(generator: Generator, plain: Generator) -> None:
    options = GenerationOptions(max_new_tokens=30)
    talk, alone = (Conversation(each, system=SYSTEM, options=options) for each in (generator, plain))
    system = len(generator.need_tokenizer().encode_rendered(f"<|im_start|>system\n{SYSTEM}"))
    for turn in range(8):
        question = f"Question {turn}: what about the {turn} roads that lead there and back again?"
        found, wanted = talk.ask(question).result(), alone.ask(question).result()
        assert found.token_ids == wanted.token_ids
        assert found.reused_tokens >= (system if turn else 0)
    assert talk.dropped_messages == alone.dropped_messages > 0


def test_a_cut_answer_and_one_left_early_are_gone_on_from(generator: Generator, plain: Generator) -> None:
    prompt = generator.encode_chat("Tell me all that you know.")
    text = plain.generate(prompt, 20).text
    stop = text[len(text) // 2 :][:3]
    for each in (generator, plain):
        cut = each.generate(prompt, 20, stop=stop)
        assert cut.finish_reason == "stop"
        with each.stream(prompt, 20) as stream:
            next(stream)
    more = [*prompt, *plain.generate(prompt, 3).token_ids, 5, 6, 7]
    found = generator.generate(more, 8)
    assert found.token_ids == plain.generate(more, 8).token_ids


def test_an_interrupt_after_the_graph_wrote_leaves_no_wrong_state(
    generator: Generator, plain: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    from satchel.runtime.execution import cpu

    run, calls = cpu.run_bound, 0

    def interrupted(*arguments: Any) -> None:
        nonlocal calls
        run(*arguments)
        calls += 1
        if calls == 7:
            raise KeyboardInterrupt

    prompt = generator.encode_chat([{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Who?"}])
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "run_bound", interrupted)
        stream = generator.stream(prompt, 20)
        with pytest.raises(KeyboardInterrupt):
            stream.result()
    answer = stream.result().token_ids
    more = [*prompt, *answer, *plain.generate([*prompt, *answer], 1).token_ids, 5, 6]
    found = generator.generate(more, 8)
    assert 0 < found.reused_tokens < len(prompt)
    assert found.token_ids == plain.generate(more, 8).token_ids


@pytest.mark.parametrize("snapshots", [0, 1, 3, 40])
def test_what_is_kept_stays_under_the_limit(folder: Path, snapshots: int, plain: Generator) -> None:
    generator = Generator.open(folder, threads=1)
    manifest = generator.engine.bundle.manifest
    limit = 60 * max(1, position_bytes(manifest.kv_cache)) + (1 + snapshots) * manifest.state_bytes
    store = generator.prefix_cache
    store._limit = limit
    rng = np.random.default_rng(3)
    for length in (30, 50, 59, 100, 12):
        ids = rng.integers(5, 250, length)
        ids[::20] = END
        assert generator.generate(ids, 6).token_ids == plain.generate(ids, 6).token_ids
        used = sum(
            store._size(prefix.cache, len(prefix.ids), len(prefix.cache.snapshots)) for prefix in store._prefixes
        )
        held = sum(
            array.nbytes
            for prefix in store._prefixes
            for states in (prefix.cache.states, *prefix.cache.snapshots.values())
            for array in states.values()
        )
        assert held <= used <= limit
        assert store._prefixes


@pytest.mark.parametrize("length", [8, 9])
def test_with_an_even_token_multiple_an_odd_rest_is_fed_first(
    folder: Path, tmp_path: Path, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    copied = Path(shutil.copytree(folder, tmp_path / "bundle"))
    change_manifest(copied, "token_multiple", to=2)
    generator = Generator.open(copied, threads=1)
    ids = list(range(20, 20 + length))
    answer = generator.generate(ids, 1)
    spans = fed(generator, monkeypatch)
    found = generator.generate([*ids, *answer.token_ids, *range(50, 60)], 1)
    assert found.reused_tokens == length
    assert spans == ([11] if length % 2 == 0 else [1, 10])


def ids_of(text: str) -> np.ndarray:
    """S and E as special tokens."""
    return np.array([END if letter in "SE" else 1 for letter in text])


@pytest.mark.parametrize(
    ("text", "multiple", "found"),
    [
        ("S" + 30 * "a" + "ES" + 30 * "a" + "E", 1, (31, 63)),
        ("S" + 30 * "a" + "ES" + 30 * "a" + "E", 2, (30, 62)),
        ("S" + 30 * "a" + "EaSaE" + 30 * "a", 1, (31,)),
        ("S" + 3 * "a" + "E", 1, ()),
        (6 * (19 * "a" + "S"), 1, (19, 79, 99, 119)),
        ("a", 1, ()),
    ],
)
def test_messages_are_told_by_their_special_tokens(text: str, multiple: int, found: tuple[int, ...]) -> None:
    assert message_boundaries(ids_of(text), lambda token: token == END, multiple) == found
    assert len(found) <= 1 + LAST


def test_of_too_many_snapshots_the_oldest_after_chunks_go_first() -> None:
    class Held:
        length = 0

        def __init__(self) -> None:
            self.snapshots: dict[int, object] = {}

        def take_snapshot(self) -> None:
            self.snapshots[self.length] = None

    cache, plan = Held(), Snapshots((40, 300, 700), 4)
    for cache.length in (40, 296, 300, 556, 700, 956):
        plan.add_due(cache)  # type: ignore[arg-type]
    assert sorted(cache.snapshots) == [40, 300, 700, 956]
    cache.length = 1212
    plan.add_due(cache)  # type: ignore[arg-type]
    assert sorted(cache.snapshots) == [40, 300, 700, 1212]
    assert [plan.end(start, 800) for start in (0, 39, 40, 700)] == [40, 40, 300, 800]
    nothing, untouched = Snapshots((40,), 0), Held()
    untouched.length = 400
    nothing.add_due(untouched)  # type: ignore[arg-type]
    assert (nothing.end(0, 800), untouched.snapshots) == (800, {})


def test_requests_of_different_priorities_reuse_what_runs_beside_them(generator: Generator, plain: Generator) -> None:
    rng = np.random.default_rng(6)
    shared = rng.integers(5, 250, 300).tolist()
    requests = [
        Request([*shared, *rng.integers(5, 250, 10 + row).tolist()], GenerationOptions(max_new_tokens=12))
        for row in range(4)
    ]
    outcomes = dict(generator.run_requests(requests, rows=2))
    for index, request in enumerate(requests):
        wanted = plain.generate(request.prompt, 12)
        assert dataclasses.replace(outcomes[index], text="").token_ids == wanted.token_ids  # type: ignore[type-var]
    assert any(outcome.reused_tokens == 256 for outcome in outcomes.values())  # type: ignore[union-attr]
