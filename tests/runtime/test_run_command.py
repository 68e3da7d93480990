"""`satchel run` on one prompt: its options, what makes no sense together, JSON, several texts, saved states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.chat_bundle import write_chat_bundle
from support.command import Satchel

from satchel.runtime.errors import BundleError
from satchel.runtime.execution.cpu import CpuState
from satchel.runtime.generation.generator import Generator
from satchel.runtime.generation.options import CHAT_DEFAULTS

PROMPT = "the cat sat"
RUN = ("run", "--threads", 1)
LONG = "the cat sat on the mat and the dog sat on the log"
SAMPLING = {"temperature": 1.5, "seed": 5}
SAMPLING_FLAGS = ("--temperature", 1.5, "--seed", 5)


@pytest.fixture(scope="module")
def generator(tiny: Path) -> Generator:
    """One that keeps nothing of what it has seen, as `run` does: figures are equal to the last bit."""
    return Generator.open(tiny, threads=1, prefix_cache_mib=0)


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ([], {}),
        (["--temperature", "0.9", "--seed", "7"], {"temperature": 0.9, "seed": 7}),
        (
            ["--temperature", "2", "--seed", "1", "--top-k", "5", "--top-p", "0.9", "--min-p", "0.05"],
            {"temperature": 2.0, "seed": 1, "top_k": 5, "top_p": 0.9, "min_p": 0.05},
        ),
        (
            ["--repetition-penalty", "1.8", "--presence-penalty", "1", "--frequency-penalty", "0.5"],
            {"repetition_penalty": 1.8, "presence_penalty": 1.0, "frequency_penalty": 0.5},
        ),
        (["--no-repeat-ngram-size", "1", "--min-new-tokens", "3"], {"no_repeat_ngram_size": 1, "min_new_tokens": 3}),
        (["--logit-bias", "24=-inf", "--logit-bias", "7=2.5"], {"logit_bias": {24: float("-inf"), 7: 2.5}}),
        (["--stop", "q", "--stop", "e"], {"stop": ("q", "e")}),
        (["--time-limit", "0.000001"], {"time_limit": 0.000001}),
    ],
)
def test_every_option_has_a_flag_that_does_the_same(
    satchel: Satchel, tiny: Path, generator: Generator, flags: list[str], options: dict[str, Any]
) -> None:
    found = satchel.json(*RUN, tiny, PROMPT, "--max-new-tokens", 20, *flags)
    expected = generator.generate(PROMPT, 20, **options)
    assert found["token_ids"] == list(expected.token_ids)
    assert (found["text"], found["finish_reason"]) == (expected.text, expected.finish_reason)
    plain = generator.generate(PROMPT, 20)
    assert not options or (plain.token_ids, plain.finish_reason) != (expected.token_ids, expected.finish_reason)


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["PROMPT", "--input", "f"], ["PROMPT", "--input"]),
        (["-p", "p", "--input", "f"], ["PROMPT", "--input"]),
        (["--num-return-sequences", "2", "--input", "f"], ["--num-return-sequences", "--input"]),
        (["--prompt-logprobs", "--input", "f"], ["--prompt-logprobs", "--input"]),
        (["--save-state", "s", "--input", "f"], ["--save-state", "--input"]),
        (["--save-state", "s", "--num-return-sequences", "2"], ["--save-state", "--num-return-sequences"]),
        (["PROMPT", "-o", "f"], ["--output requires --input"]),
        (["PROMPT", "--batch", "2"], ["--batch requires --input"]),
        (["PROMPT", "--length-penalty", "0"], ["--length-penalty requires --beams"]),
        (["PROMPT", "--logprobs", "0"], ["--logprobs requires --json or --input"]),
        (["PROMPT", "--prompt-logprobs"], ["--prompt-logprobs requires --json"]),
        (["PROMPT", "--save-state", "s", "--prefix-cache-mib", "0"], ["--save-state", "--prefix-cache-mib 0"]),
        (["--input", "f", "--batch", "0"], ["--batch 0"]),
    ],
)
def test_flags_that_exclude_or_require_others_are_refused_before_a_bundle_is_opened(
    satchel: Satchel, arguments: list[str], facts: list[str]
) -> None:
    said = satchel.refuses("run", "nowhere", *arguments)
    assert all(fact in said for fact in facts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-k", "4"], "--top-k 4: has no effect at temperature 0"),
        (["--logit-bias", "3=1", "--logit-bias", "3=2"], "--logit-bias 3"),
        (["--max-repeats", "1"], "--max-repeats 1: "),
        (["--num-return-sequences", "3"], "--num-return-sequences 3: "),
        (["--beams", "2", "--temperature", "1"], "--temperature 1.0: cannot be combined with --beams"),
        (["--beams", "2", "--logprobs", "1", "--json"], "--logprobs 1: cannot be combined with --beams"),
        (["--load-state", "nowhere"], "nowhere: no such file"),
        (["--save-state", "nowhere/state"], "--save-state nowhere/state: there is no folder"),
    ],
)
def test_wrong_options_are_one_line_and_exit_code_2(
    satchel: Satchel, tiny: Path, arguments: list[str], message: str
) -> None:
    assert satchel.refuses(*RUN, tiny, PROMPT, *arguments).startswith(message)


def test_json_has_the_log_probabilities_that_were_asked_for(satchel: Satchel, tiny: Path, generator: Generator) -> None:
    found = satchel.json(*RUN, tiny, PROMPT, "--max-new-tokens", 4, "--logprobs", 2, "--prompt-logprobs")
    expected = generator.generate(PROMPT, 4, logprobs=2)
    text_of = generator.tokenizer.text_of
    assert found["logprobs"] == [
        {
            "id": entry.token,
            "text": text_of(entry.token),
            "logprob": entry.logprob,
            "top": [{"id": token, "text": text_of(token), "logprob": value} for token, value in entry.top],
        }
        for entry in expected.logprobs
    ]
    ids = generator.encode(PROMPT).tolist()
    assert [entry["id"] for entry in found["prompt_logprobs"]] == ids
    assert found["prompt_logprobs"][0] == {"id": ids[0], "text": "", "logprob": None, "top": []}
    for entry, there in zip(found["prompt_logprobs"][1:], generator.prompt_logprobs(PROMPT, 2)[1:], strict=True):
        assert (entry["logprob"], len(entry["top"])) == (there.logprob, 2)
    assert found["prompt_logprobs"][2]["text"] == " cat"


def test_a_stream_that_fails_ends_the_line(satchel: Satchel, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, calls = CpuState.decode, []

    def failing(self: CpuState, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 8:
            raise BundleError("no more")
        return decode(self, *arguments)

    monkeypatch.setattr(CpuState, "decode", failing)
    out, err = satchel(*RUN, tiny, PROMPT, "--max-new-tokens", 20, code=2)
    assert len(out) > 1
    assert out.endswith("\n")
    assert err == "satchel: error: no more\n"


def test_a_prompt_goes_into_the_chat_template_unless_it_is_raw(satchel: Satchel, chatty: Path) -> None:
    """The line of figures and the JSON say which; an answer in the template has the defaults of a chat."""
    generator = Generator.open(chatty, threads=1, prefix_cache_mib=0)
    command = ("run", chatty, PROMPT, "--threads", 1)
    asked, raw = generator.encode_chat(PROMPT), generator.encode(PROMPT)
    assert asked.tolist() != raw.tolist()
    for flags, ids in (([], asked), (["--raw"], raw)):
        out, err = satchel(*command, "-n", 8, *flags)
        assert out == generator.generate(ids, 8).text + "\n"
        assert err.startswith(f"{'raw' if flags else 'chat template'}: prompt {len(ids)} tokens")
        found = satchel.json(*command, "-n", 4, "--prompt-logprobs", *flags)
        assert (found["chat_template"], found["prompt_tokens"]) == (not flags, len(ids))
        assert [entry["id"] for entry in found["prompt_logprobs"]] == ids.tolist()
    assert satchel.json(*command, "--raw", "--max-context", 300)["new_tokens"] == 128
    whole = satchel.json(*command)
    assert whole["new_tokens"] > 128
    assert whole["token_ids"] == list(generator.generate(asked, **CHAT_DEFAULTS).token_ids)
    best = generator.beam_search(asked, 2, max_new_tokens=4)[0]
    assert satchel(*command, "--beams", 2, "-n", 4).out.split("\n\n")[0] == best.text
    generator.template.close()


def test_the_prompt_is_an_argument_a_flag_or_standard_input(satchel: Satchel, tiny: Path, generator: Generator) -> None:
    command = ("run", tiny, "-t", 1, "-n", 3, "--quiet")
    expected = generator.generate("the 猫\n", 3).text + "\n"
    for more in (["the 猫\n"], ["-p", "the 猫\n"], ["--prompt", "the 猫\n"], []):
        assert satchel(*command, *more, stdin="the 猫\n\n") == (expected, "")  # less one newline
    assert "the prompt is empty" in satchel.refuses(*command, stdin=b"\n")
    assert "standard input is not UTF-8 text (byte 2): " in satchel.refuses(*command, stdin=b"ab\xff")


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
    monkeypatch.setattr(Generator, "save_state", lambda *_, **more: 3)
    said = satchel(*RUN, tiny, PROMPT, "--max-new-tokens", 5, "--save-state", tmp_path / "state")
    assert "state: only the first 3 of 9 tokens are saved: raise --prefix-cache-mib" in said.err
