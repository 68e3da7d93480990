"""A draft bundle changes the number of runs, and nothing of the text; one that does not fit is refused."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from support.ahead import allow_runs_ahead
from support.command import Satchel
from support.tiny_bundle import write_bundle
from support.tiny_hybrid import write_hybrid
from support.tiny_tokenizers import byte_fallback_json, byte_level_json

from satchel.runtime.errors import PromptError, SatchelWarning
from satchel.runtime.execution.engine import Engine
from satchel.runtime.generation.draft_model import DraftModel, ModelDrafter
from satchel.runtime.generation.drafts import NgramDrafter
from satchel.runtime.generation.generator import Generator
from satchel.runtime.generation.options import GenerationOptions
from satchel.runtime.generation.request import Request
from satchel.runtime.generation.result import Generation
from satchel.runtime.generation.run_costs import DraftCosts
from satchel.runtime.generation.speculation import Speculation
from satchel.runtime.ort.open_bundle import open_bundle

PROMPT = np.random.default_rng(3).integers(3, 300, 20)
PREDICTED = NgramDrafter.predicted
CASES: list[dict[str, object]] = [
    {},
    {"temperature": 0.9, "seed": 5},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 6, "logprobs": 2},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "logprobs": 1},
    {"temperature": 0.5, "seed": 7, "presence_penalty": 0.5, "stop": ("e",), "min_new_tokens": 30},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundle, one of the same weights, one of others, and one whose context is short."""
    place = tmp_path_factory.mktemp("bundles")
    same = {"max_context": 300, "eos_token_ids": (7, 11)}
    return {
        "target": write_bundle(place / "target", **same),
        "same": write_bundle(place / "same", **same),
        "other": write_bundle(place / "other", seed=1, **same),
        "short": write_bundle(place / "short", max_context=50, eos_token_ids=(7,)),
    }


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of each run ahead of the tiny bundle; drafts come from the small model alone."""
    counts = allow_runs_ahead(monkeypatch)
    monkeypatch.setattr(DraftCosts, "of", lambda costs, rows: 0.01)
    monkeypatch.setattr(NgramDrafter, "predicted", lambda drafter, most: ([], []))
    return counts


def essence(result: Generation) -> tuple[object, ...]:
    probabilities = [(entry.logprob, entry.top) for entry in result.logprobs or ()]
    return result.token_ids, result.text, result.finish_reason, result.decode_steps, probabilities


@pytest.mark.parametrize("draft", ["same", "other", "short"])
@pytest.mark.parametrize("options", CASES, ids=lambda options: " ".join(options) or "greedy")
def test_the_text_is_the_same(
    folders: dict[str, Path], ahead: list[int], draft: str, options: dict[str, object]
) -> None:
    plain = Generator.open(folders["target"], threads=1, speculate="off")
    drafted = Generator.open(folders["target"], threads=1, draft=folders[draft])
    for start in (0, 5):
        expected = plain.generate(PROMPT[start:], 90, **options)
        assert not ahead
        found = drafted.generate(PROMPT[start:], 90, **options)
        assert essence(found) == essence(expected)
        assert found.drafted_tokens >= found.accepted_tokens >= 0
        assert (expected.drafted_tokens, expected.accepted_tokens) == (0, 0)
        if draft == "same":
            assert found.accepted_tokens > 30 or found.new_tokens < 60
            assert ahead
        ahead.clear()


@pytest.mark.parametrize("seed", range(3, 9))
def test_any_model_and_draft_give_the_text_of_single_steps(
    tmp_path: Path, ahead: list[int], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Texts from both kinds of drafts, whose predictions are partly right."""
    monkeypatch.setattr(NgramDrafter, "predicted", PREDICTED)
    rng = np.random.default_rng(seed)
    target = write_bundle(tmp_path / "target", seed=seed, max_context=200, eos_token_ids=(int(rng.integers(400)),))
    small = write_bundle(tmp_path / "small", seed=seed + seed % 2, max_context=160)
    options: dict[str, object] = {
        "logprobs": int(rng.integers(3)), "repetition_penalty": float(rng.choice([1.0, 1.2])),
        "no_repeat_ngram_size": int(rng.choice([0, 5])),
        "logit_bias": {token: -np.inf for token in range(400) if token % int(rng.integers(20, 60))},
    }  # fmt: skip
    if seed % 3:
        options |= {"temperature": float(rng.choice([0.3, 1.2])), "seed": seed}
    prompts = [rng.integers(0, 400, int(rng.integers(2, 60))) for _ in range(3)]
    drafted = Generator.open(target, threads=1, draft=small)
    plain = Generator.open(target, threads=1, speculate="off")
    for prompt in prompts:
        assert essence(drafted.generate(prompt, 120, **options)) == essence(plain.generate(prompt, 120, **options))
    assert ahead


def test_a_model_that_is_always_right_saves_most_runs_and_a_wrong_one_is_left_alone(
    folders: dict[str, Path], ahead: list[int]
) -> None:
    found = {}
    for draft in ("same", "other"):
        generator = Generator.open(folders["target"], threads=1, draft=folders[draft])
        generator.generate(PROMPT, 200, logit_bias={7: -np.inf, 11: -np.inf})
        found[draft] = generator.generate(PROMPT[3:], 200, logit_bias={7: -np.inf, 11: -np.inf})
    assert found["same"].accepted_tokens >= 150
    assert found["same"].accepted_tokens >= 0.9 * found["same"].drafted_tokens
    assert found["other"].drafted_tokens <= 20


def test_sampled_tokens_are_drafted_with_the_random_numbers_that_come(
    folders: dict[str, Path], ahead: list[int]
) -> None:
    generator = Generator.open(folders["target"], threads=1, draft=folders["same"])
    for _ in range(2):
        result = generator.generate(PROMPT, 150, temperature=1.5, seed=3, logit_bias={7: -np.inf, 11: -np.inf})
    assert result.accepted_tokens >= 0.9 * result.drafted_tokens > 90


def test_what_is_drafted_is_the_text_that_the_small_model_gives_alone(folders: dict[str, Path]) -> None:
    model = DraftModel.open(folders["other"], open_bundle(folders["target"]), threads=1, cache_bytes=1 << 20)
    alone = Generator.open(folders["other"], threads=1, prefix_cache_mib=0, speculate="off")
    drafter, text = ModelDrafter(model, 200), PROMPT.tolist()
    for more in ([], [5], [9, 8, 7], list(range(20, 60))):  # what the other model chose meanwhile
        text += more
        expected = alone.generate(text, 6).token_ids
        assert drafter.draft(text, 6, None)[: len(expected)] == list(expected)
    drafter.close()
    assert model.prefix_cache.positions >= len(text)
    assert ModelDrafter(model, 10).draft(text, 6, None) == [], "beyond its capacity"
    assert ModelDrafter(model, 200).draft([*text, 100_000], 6, None) == [], "a token that it does not have"


def test_requests_that_come_and_go_have_the_answers_of_single_steps(folders: dict[str, Path], ahead: list[int]) -> None:
    generator = Generator.open(folders["target"], threads=1, draft=folders["same"])
    plain = Generator.open(folders["target"], threads=1, speculate="off")
    scheduler = generator.scheduler(rows=3)
    options = [GenerationOptions(max_new_tokens=20 + 15 * row, temperature=0.7, seed=row) for row in range(4)]
    numbers = [scheduler.submit(Request(PROMPT[row:], each)) for row, each in enumerate(options)]
    cancelled = scheduler.submit(Request(PROMPT, GenerationOptions(max_new_tokens=200, logit_bias={7: -9.0, 11: -9.0})))
    found: dict[int, Generation] = {}
    while len(found) < 5:
        for event in scheduler.step():
            if isinstance(event.outcome, Generation):
                found[event.id] = event.outcome
        if len(found) == 4 and len(ahead) > 3:
            scheduler.cancel(cancelled)
    assert ahead, "the last one ran alone"
    assert found[cancelled].finish_reason == "closed"
    for row, number in enumerate(numbers):
        expected = plain.generate(PROMPT[row:], 20 + 15 * row, temperature=0.7, seed=row)
        assert (found[number].token_ids, found[number].text) == (expected.token_ids, expected.text)


def test_a_bundle_with_another_tokenizer_is_refused_by_name(
    folders: dict[str, Path], tmp_path: Path, satchel: Satchel
) -> None:
    target = folders["target"]
    other = write_bundle(tmp_path / "pieces", tokenizer=byte_fallback_json())
    without = write_bundle(tmp_path / "without", tokenizer_kind=None)
    spaced = write_bundle(tmp_path / "spaced", tokenizer=b" " + byte_level_json())  # another file, the same tokens
    for wrong in (other, without):
        with pytest.raises(PromptError, match=f"--draft {wrong}.*vocabulary"):
            Generator.open(target, threads=1, draft=wrong)
        assert f"--draft {wrong}" in satchel.refuses("run", target, "a", "--draft", wrong, "--quiet")
        assert f"--draft {wrong}" in satchel.refuses(
            "bench", target, "-p", "8", "-n", "4", "--speculate", "auto", "--draft", wrong, "--quiet"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SatchelWarning)
        assert Generator.open(target, threads=1, draft=spaced).speculation is not None


def test_a_model_with_states_is_refused_as_a_draft(folders: dict[str, Path], tmp_path: Path) -> None:
    hybrid = write_hybrid(tmp_path / "hybrid")
    with pytest.raises(PromptError, match="states"):
        Generator.open(folders["target"], threads=1, draft=hybrid)


def test_a_bundle_that_takes_no_drafts_says_why(folders: dict[str, Path], tmp_path: Path, satchel: Satchel) -> None:
    target, hybrid = folders["target"], write_hybrid(tmp_path / "hybrid")
    with pytest.warns(SatchelWarning, match="--draft .* no effect: .*attention"):
        Generator.open(target, threads=1, draft=folders["same"])
    with pytest.warns(SatchelWarning, match="--speculate ngram has no effect: .*attention"):
        Generator.open(hybrid, threads=1, speculate="ngram")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Generator.open(hybrid, threads=1)
    assert "has no effect" in satchel("run", target, "a", "-n", "2", "--speculate", "ngram").err


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        (["--speculate", "always"], "--speculate always"),
        (["--speculate", "off", "--draft", "DRAFT"], "--draft"),
        (["--speculate", "ngram", "--draft", "DRAFT"], "--draft"),
        (["--draft", "/nowhere/bundle"], "/nowhere/bundle"),
    ],
)
def test_wrong_flags_are_refused(folders: dict[str, Path], satchel: Satchel, words: list[str], fact: str) -> None:
    words = [str(folders["same"]) if word == "DRAFT" else word for word in words]
    assert fact in satchel.refuses("run", folders["target"], "a", *words, "--quiet")


def test_run_and_bench_say_how_many_drafted_tokens_were_right(
    folders: dict[str, Path], ahead: list[int], satchel: Satchel
) -> None:
    flags = ["--draft", folders["same"]]
    said = satchel("run", folders["target"], "the cat", "-n", "60", "--raw", *flags)
    assert "drafted tokens accepted" in said.err
    found = satchel.json("run", folders["target"], "the cat", "-n", "60", "--raw", "--quiet", *flags)
    assert 0 < found["accepted_tokens"] <= found["drafted_tokens"]
    assert found["text"] + "\n" == satchel("run", folders["target"], "the cat", "-n", "60", "--raw").out
    lengths = ["-p", "20", "-n", "100", "--quiet"]
    assert (
        "accepted" in satchel("bench", folders["target"], *lengths, "--no-bandwidth", *flags, "--speculate", "auto").out
    )
    measured = satchel.json("bench", folders["target"], *lengths, "--speculate", "auto", *flags)
    assert measured["accepted_tokens"] > 50
    assert "drafted_tokens" not in satchel.json("bench", folders["target"], *lengths)
    assert "--batch 2" in satchel.refuses("bench", folders["target"], *lengths, "--batch", "2", "--speculate", "auto")


def test_an_engine_of_another_provider_takes_no_drafts(folders: dict[str, Path]) -> None:
    assert Engine.why_not_ahead(Engine.open(open_bundle(folders["target"]), threads=1), None) is not None
    engine = Engine.open(open_bundle(folders["target"]), threads=1)
    assert Speculation(engine).costs.best([0.9], [1])[0] == 0
