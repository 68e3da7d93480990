"""`satchel run` for several texts of one prompt, and with saved states."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.chat_bundle import write_chat_bundle
from support.command import Satchel

from satchel.runtime.generation.generator import Generator

PROMPT = "the cat sat"
RUN = ("run", "--threads", 1)
LONG = "the cat sat on the mat and the dog sat on the log"


@pytest.fixture(scope="module")
def generator(tiny: Path) -> Generator:
    """One that keeps nothing of what it has seen, as `run` does: figures are equal to the last bit."""
    return Generator.open(tiny, threads=1, prefix_cache_mib=0)


SAMPLING = {"temperature": 1.5, "seed": 5}
SAMPLING_FLAGS = ("--temperature", 1.5, "--seed", 5)


def test_samples_are_printed_with_a_blank_line_between_them(satchel: Satchel, tiny: Path, generator: Generator) -> None:
    said = satchel(*RUN, tiny, PROMPT, "--max-new-tokens", 6, "--num-return-sequences", 3, *SAMPLING_FLAGS)
    texts = [result.text for result in generator.samples(PROMPT, 3, max_new_tokens=6, **SAMPLING)]
    assert len(set(texts)) == 3
    assert said.out == "\n\n".join(texts) + "\n"


def test_samples_in_json_have_a_list_and_common_figures(satchel: Satchel, tiny: Path, generator: Generator) -> None:
    flags = ("--max-new-tokens", 6, "--num-return-sequences", 2, "--logprobs", 0, *SAMPLING_FLAGS)
    found = satchel.json(*RUN, tiny, PROMPT, *flags)
    expected = generator.samples(PROMPT, 2, max_new_tokens=6, logprobs=0, **SAMPLING)
    assert [sample["token_ids"] for sample in found["samples"]] == [list(result.token_ids) for result in expected]
    assert (found["prompt_tokens"], found["new_tokens"]) == (4, 12)
    assert found["kv_bytes"] == sum(result.kv_bytes for result in expected)


def test_beams_have_scores_and_come_best_first(satchel: Satchel, tiny: Path, generator: Generator) -> None:
    flags = ("--max-new-tokens", 6, "--beams", 3, "--length-penalty", -2, "--early-stopping")
    found = satchel.json(*RUN, tiny, PROMPT, *flags)["samples"]
    expected = generator.beam_search(PROMPT, 3, length_penalty=-2.0, early_stopping=True, max_new_tokens=6)
    assert [(beam["text"], beam["score"]) for beam in found] == [(result.text, result.score) for result in expected]
    assert found[0]["score"] > found[2]["score"]
    plain = generator.beam_search(PROMPT, 3, max_new_tokens=6)
    assert plain[0].score != expected[0].score


def test_stop_strings_and_beams_contradict_and_stored_ones_are_left_out_by_name(
    satchel: Satchel, tmp_path: Path
) -> None:
    folder = write_chat_bundle(tmp_path / "own", generation_config={"stop_strings": ["<end>", "\n\n"]})
    beams = (*RUN, folder, PROMPT, "--raw", "--max-new-tokens", 3, "--beams", 2)
    said = satchel(*beams)
    assert [part in said.err for part in ("stop_strings '<end>', '\\n\\n'", "--beams")] == [True, True]
    assert satchel(*beams, "--quiet") == (said.out, "")
    assert "stop_strings" not in satchel(*RUN, folder, PROMPT, "--raw", "--max-new-tokens", 3).err
    for given in ("--stop", "--stop=<end>"):
        words = [given, "x"] if given == "--stop" else [given]
        assert "--stop" in satchel.refuses(*beams, *words)


def test_a_saved_state_spares_the_tokens_that_it_has(satchel: Satchel, tiny: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    satchel(*RUN, tiny, PROMPT, "--max-new-tokens", 4, "--save-state", state)
    without = satchel.json(*RUN, tiny, LONG, "--max-new-tokens", 9)
    found = satchel.json(*RUN, tiny, LONG, "--max-new-tokens", 9, "--load-state", state)
    assert found["token_ids"] == without["token_ids"]
    assert (without["reused_tokens"], found["reused_tokens"]) == (0, 4)


def test_a_state_holds_prompt_and_text(satchel: Satchel, tiny: Path, generator: Generator, tmp_path: Path) -> None:
    satchel(*RUN, tiny, PROMPT, "--max-new-tokens", 5, "--save-state", tmp_path / "state")
    state = Generator.open(tiny, threads=1).load_state(tmp_path / "state")
    # The last token was not fed.
    expected = [*generator.encode(PROMPT), *generator.generate(PROMPT, 5).token_ids][:-1]
    assert state.prefix.ids.tolist() == expected


def test_a_state_that_memory_is_too_small_for_says_so(
    satchel: Satchel, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Generator, "save_state", lambda self, path, ids, progress: 3)
    said = satchel(*RUN, tiny, PROMPT, "--max-new-tokens", 5, "--save-state", tmp_path / "state")
    assert "state: only the first 3 of 9 tokens are saved: raise --prefix-cache-mib" in said.err
