"""`satchel run` for several texts of one prompt, and with saved states."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.run_command import PROMPT, Capture, run, run_json

from satchel.runtime.generation.generator import Generator

LONG = "the cat sat on the mat and the dog sat on the log"


@pytest.fixture(scope="module")
def generator(tiny: Path) -> Generator:
    """One that keeps nothing of what it has seen, as `run` does: figures are equal to the last bit."""
    return Generator.open(tiny, threads=1, prefix_cache_mib=0)


SAMPLING = {"temperature": 1.5, "seed": 5}
SAMPLING_FLAGS = ("--temperature", 1.5, "--seed", 5)


def test_samples_are_printed_with_a_blank_line_between_them(tiny: Path, generator: Generator, capsys: Capture) -> None:
    assert run(tiny, "--max-new-tokens", 6, "--num-return-sequences", 3, *SAMPLING_FLAGS) == 0
    texts = [result.text for result in generator.samples(PROMPT, 3, max_new_tokens=6, **SAMPLING)]
    assert len(set(texts)) == 3
    assert capsys.readouterr().out == "\n\n".join(texts) + "\n"


def test_samples_in_json_have_a_list_and_common_figures(tiny: Path, generator: Generator, capsys: Capture) -> None:
    found = run_json(tiny, capsys, "--max-new-tokens", 6, "--num-return-sequences", 2, "--logprobs", 0, *SAMPLING_FLAGS)
    expected = generator.samples(PROMPT, 2, max_new_tokens=6, logprobs=0, **SAMPLING)
    assert [sample["token_ids"] for sample in found["samples"]] == [list(result.token_ids) for result in expected]
    assert (found["prompt_tokens"], found["new_tokens"]) == (4, 12)
    assert found["kv_bytes"] == sum(result.kv_bytes for result in expected)


def test_beams_have_scores_and_come_best_first(tiny: Path, generator: Generator, capsys: Capture) -> None:
    flags = ("--max-new-tokens", 6, "--beams", 3, "--length-penalty", -2, "--early-stopping")
    found = run_json(tiny, capsys, *flags)["samples"]
    expected = generator.beam_search(PROMPT, 3, length_penalty=-2.0, early_stopping=True, max_new_tokens=6)
    assert [(beam["text"], beam["score"]) for beam in found] == [(result.text, result.score) for result in expected]
    assert found[0]["score"] > found[2]["score"]
    plain = generator.beam_search(PROMPT, 3, max_new_tokens=6)
    assert plain[0].score != expected[0].score


def test_a_saved_state_spares_the_tokens_that_it_has(tiny: Path, capsys: Capture, tmp_path: Path) -> None:
    state = tmp_path / "state"
    assert run(tiny, "--max-new-tokens", 4, "--save-state", state) == 0
    capsys.readouterr()
    without = run_json(tiny, capsys, "--max-new-tokens", 9, prompt=LONG)
    found = run_json(tiny, capsys, "--max-new-tokens", 9, "--load-state", state, prompt=LONG)
    assert found["token_ids"] == without["token_ids"]
    assert (without["reused_tokens"], found["reused_tokens"]) == (0, 4)


def test_a_state_holds_prompt_and_text(tiny: Path, generator: Generator, capsys: Capture, tmp_path: Path) -> None:
    assert run(tiny, "--max-new-tokens", 5, "--save-state", tmp_path / "state") == 0
    state = Generator.open(tiny, threads=1).load_state(tmp_path / "state")
    # The last token was not fed.
    expected = [*generator.encode(PROMPT), *generator.generate(PROMPT, 5).token_ids][:-1]
    assert state.prefix.ids.tolist() == expected


def test_a_state_that_memory_is_too_small_for_says_so(
    tiny: Path, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Generator, "save_state", lambda self, path, ids, progress: 3)
    assert run(tiny, "--max-new-tokens", 5, "--save-state", tmp_path / "state") == 0
    assert "state: only the first 3 of 9 tokens are saved: raise --prefix-cache-mib" in capsys.readouterr().err
