"""`satchel run` on one prompt: its options, what makes no sense together, JSON, the bar."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.command import Satchel

from satchel.runtime.errors import BundleError
from satchel.runtime.execution.cpu import CpuState
from satchel.runtime.generation.generator import Generator
from satchel.runtime.generation.options import CHAT_DEFAULTS

PROMPT = "the cat sat"
RUN = ("run", "--threads", 1)


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
