"""`satchel run --input`: rows of answers and errors, each as its line gives alone."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from support.command import Satchel
from support.jsonl_work import COMMAND, Row, Work, by_id

from satchel.runtime.cli.prompt_lines import read_lines
from satchel.runtime.generation.generator import Generator

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
PATIENCE = 60  # seconds


@pytest.fixture
def work(satchel: Satchel, tiny: Path, tmp_path: Path) -> Work:
    return Work(satchel, tiny, tmp_path)


def test_each_answer_is_what_its_line_gives_alone(work: Work, generator: Generator) -> None:
    lines: list[Row] = [
        {"id": "short", "prompt": "the"},
        {"id": 7, "prompt": "the quick brown fox jumps over the lazy dog again and again", "max_new_tokens": 3},
        {"prompt": "the cat sat on the mat", "temperature": 1.3, "seed": 11, "top_p": 0.9},
        {"prompt": "the cat sat on the mat", "temperature": 1.3, "seed": 12, "stop": ["a", "e"]},
        {"id": "é\u2028", "prompt": "satchel carries a model", "logit_bias": {"24": -100}, "max_new_tokens": 17},
        {"prompt": "the dog", "max_new_tokens": 0},
    ]
    work.write(*lines)
    said = work.run("--batch", 3, "--max-new-tokens", 12)
    found = by_id(work.rows())
    assert list(found) != [line.get("id", number) for number, line in enumerate(lines, start=1)]  # as they end
    for number, line in enumerate(lines, start=1):
        options = {"max_new_tokens": 12} | {key: line[key] for key in line.keys() - {"id", "prompt"}}
        options["logit_bias"] = {int(token): bias for token, bias in options.get("logit_bias", {}).items()}
        alone = generator.generate(line["prompt"], **options)
        assert found[line.get("id", number)] == {
            "id": line.get("id", number),
            "text": alone.text,
            "finish_reason": alone.finish_reason,
            "prompt_tokens": alone.prompt_tokens,
            "new_tokens": alone.new_tokens,
            "request": found[line.get("id", number)]["request"],
        }
    assert said.startswith("6 prompts of ")


def test_options_of_a_line_go_before_those_of_the_command(work: Work, generator: Generator) -> None:
    work.write({"prompt": "the"}, {"prompt": "the", "seed": 4}, {"prompt": "the", "temperature": 0})
    flags = ("--temperature", 1.5, "--seed", 3, "--top-k", 50, "--max-new-tokens", 8)
    work.run(*flags)
    found, sampling = by_id(work.rows()), {"temperature": 1.5, "top_k": 50, "max_new_tokens": 8}
    assert found[1]["text"] == generator.generate("the", seed=3, **sampling).text
    assert found[2]["text"] == generator.generate("the", seed=4, **sampling).text
    assert found[3]["text"] == generator.generate("the", 8).text
    assert len({row["text"] for row in found.values()}) == 3


def test_log_probabilities_come_where_they_were_asked_for(work: Work, generator: Generator) -> None:
    work.write({"prompt": "the"}, {"prompt": "the", "logprobs": 2})
    work.run("--max-new-tokens", 3)
    rows = by_id(work.rows())
    plain, asked = rows[1], rows[2]
    assert "logprobs" not in plain
    for entry, there in zip(asked["logprobs"], generator.generate("the", 3, logprobs=2).logprobs, strict=True):
        assert entry["id"] == there.token
        assert entry["logprob"] == pytest.approx(there.logprob, abs=1e-4)
        assert [likely["id"] for likely in entry["top"]] == [token for token, _ in there.top]
    work.output.unlink()
    work.run("--max-new-tokens", 3, "--logprobs", 0)
    assert all("logprobs" in row for row in work.rows())


WRONG: list[tuple[object, str]] = [
    (b"{'prompt': 1}", "not JSON (Expecting property name enclosed in double quotes, column 2): write one object"),
    (b'{"prompt": "a"', "not JSON (Expecting ',' delimiter, column 15)"),
    (b'{"prompt": "a"} {"prompt": "b"}', "not JSON (Extra data, column 17)"),
    (b'["a"]', "not a JSON object: write one like"),
    (b'{"prompt": "\xff"}', "not UTF-8 text (byte 13): convert the file to UTF-8"),
    (b"[" * 100_000, "not readable: nested too deeply"),
    (b'{"id": ' + b"1" * 5000 + b"}", "not readable: a number has thousands of digits"),
    (b'{"prompt": "a", "prompt": "b"}', "key 'prompt' is duplicated"),
    ({"id": 1.5, "prompt": "a"}, "id 1.5: must be a text or a whole number"),
    ({"id": True, "prompt": "a"}, "id True: must be a text or a whole number"),
    ({"id": None, "prompt": "a"}, "id None: must be a text or a whole number"),
    ({"id": "\ud800", "prompt": "a"}, r"id '\ud800': not valid Unicode"),
    ({}, "has neither prompt nor messages"),
    ({"prompt": "a", **CHAT}, "has both prompt and messages"),
    ({"prompt": ["a"]}, "prompt ['a']: must be a text"),
    ({"prompt": "a\ud800"}, "the text is not valid UTF-8 at character 1"),
    ({"prompt": "a", "tools": []}, "has tools but no messages"),
    ({"prompt": "a", "raw": 1}, "raw 1: must be true or false"),
    ({**CHAT, "raw": True}, "raw cannot be combined with messages"),
    ({"messages": {}}, "messages {}: must be a list"),
    ({**CHAT, "tools": "t"}, "tools 't': must be a list"),
    ({**CHAT, "arguments": []}, "arguments []: must be an object"),
    ({**CHAT, "arguments": {"documents": 5}}, "documents 5: must be a list"),
    ({**CHAT, "arguments": {"messages": []}}, "arguments has messages"),
    ({"prompt": "a", "temprature": 1}, "unknown key 'temprature': the keys are id, prompt, raw, messages, tools"),
    ({"prompt": "a", "\x1b\ud800": 1}, r"unknown key '\x1b\ud800': the keys are"),
    ({"prompt": "a", "max_new_tokens": "9"}, "max_new_tokens '9': must be a whole number"),
    ({"prompt": "a", "max_new_tokens": -1}, "max_new_tokens -1: must be 0 or more"),
    ({"prompt": "a", "temperature": -1}, "temperature -1: must be finite, 0 or more"),
    ({"prompt": "a", "top_k": 5}, "top_k 5: "),
    ({"prompt": "a", "logit_bias": {"400": 1}}, "logit_bias 400=1.0: outside the vocabulary: use ids from 0 to 399"),
    ({"prompt": "a", "stop": [""]}, "stop: must be"),
    ({"prompt": "zq" * 100}, "the prompt has "),
]


def test_a_wrong_line_becomes_an_error_row_and_the_rest_is_done(work: Work) -> None:
    good = {"prompt": "the cat", "max_new_tokens": 2}
    work.write(good, b"  ", *(line for line, _ in WRONG), b"", {**good, "id": "last"})
    said = work.run(code=1).splitlines()
    rows = by_id(work.rows())
    assert len(rows) == len(WRONG) + 2
    for number, (line, message) in enumerate(WRONG, start=3):
        assert rows[number].keys() == {"id", "error", "request"}
        assert rows[number]["error"].startswith(f"line {number}: "), line
        # What the options say is theirs: a quote more or less is not counted.
        assert rows[number]["error"].replace("'", "").startswith(f"line {number}: {message}".replace("'", "")), line
    assert rows[1]["text"] == rows["last"]["text"] != ""
    assert said[-1].startswith(f"satchel: {len(WRONG)} of {len(WRONG) + 2} prompts failed: ")
    assert said[-1].endswith(str(work.output))


def test_the_same_id_is_refused_from_the_second_time_on(work: Work) -> None:
    a = {"prompt": "a", "max_new_tokens": 1}
    work.write({**a, "id": "x"}, {**a, "id": 3}, a, {**a, "id": "x"}, {**a, "id": "3"}, {"id": "x"})
    work.run("--quiet", code=1)
    rows = work.rows()
    assert sorted(str(row["id"]) for row in rows if "text" in row) == ["3", "3", "x"]
    errors = sorted(row["error"] for row in rows if "error" in row)
    facts = ("line 3: id 3: line 2", "line 4: id 'x': line 1", "line 6: has neither")
    assert all(error.startswith(fact) for error, fact in zip(errors, facts, strict=True))
    before = work.output.read_bytes()
    work.run("--quiet", code=1)
    assert work.output.read_bytes() == before


def test_lines_of_other_systems_and_of_great_length_are_read() -> None:
    text = "long " * 200_000
    content = b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n' + json.dumps({"prompt": text, "id": -5}).encode()
    first, second = read_lines(content)
    assert (first.number, first.id, first.prompt, first.error) == (1, 1, "a", None)
    assert (second.number, second.id, second.prompt) == (3, -5, text)
    assert read_lines(b"") == read_lines(b"\n \n") == []


def test_prompts_and_messages_go_through_the_chat_template(satchel: Satchel, chatty: Path, tmp_path: Path) -> None:
    """Flags and a line's own "raw" feed a prompt as it is; answers in the template have the defaults of a chat."""
    work, prompt = Work(satchel, chatty, tmp_path), {"prompt": "hi"}
    tools = [{"type": "function"}]
    merry = {**CHAT, "tools": tools, "arguments": {"mood": "merry "}}
    work.write(prompt, CHAT, {**prompt, "raw": True}, merry, {"messages": []}, {"prompt": "forbidden"})
    work.run("-n", 4, code=1)
    rows = by_id(work.rows())
    generator = Generator.open(chatty, threads=1)
    expected = generator.generate(generator.encode_chat("hi"), 4)
    assert rows[1]["text"] == rows[2]["text"] == expected.text != generator.generate("hi", 4).text == rows[3]["text"]
    assert rows[1]["prompt_tokens"] == rows[2]["prompt_tokens"] == expected.prompt_tokens
    ids = generator.encode_chat(CHAT["messages"], tools=tools, arguments=merry["arguments"])
    assert rows[4]["prompt_tokens"] == len(ids) > expected.prompt_tokens
    assert rows[5]["error"].startswith("line 5: messages: ")
    assert rows[6]["error"].startswith("line 6: the chat template refuses")
    work.output.unlink()
    work.write({**prompt, "max_new_tokens": 3}, {**prompt, "raw": False, "max_new_tokens": 3})
    work.run("--raw", "--quiet")
    rows = by_id(work.rows())
    assert rows[1]["text"] == generator.generate("hi", 3).text
    assert rows[2]["text"] == generator.generate(generator.encode_chat("hi"), 3).text
    generator.template.close()


def test_standard_input_and_output_are_dashes(work: Work) -> None:
    work.write({"prompt": "the", "max_new_tokens": 2}, b"{", {"prompt": "cat", "max_new_tokens": 1})
    command = [*COMMAND, "run", str(work.bundle), "--input", "-", "--quiet"]
    for output in ([], ["--output", "-"]):
        done = subprocess.run(
            [*command, *output], input=work.input.read_bytes(), capture_output=True, timeout=PATIENCE, check=False
        )
        assert done.returncode == 1
        rows = by_id([json.loads(line) for line in done.stdout.decode().splitlines()])
        assert [rows[id].get("new_tokens") for id in (1, 2, 3)] == [2, None, 1]
        assert done.stderr == b'satchel: 1 of 3 prompts failed: see "error" in the rows of standard output\n'


def test_wrong_options_of_the_command_are_no_row(work: Work) -> None:
    work.write({"prompt": "the"})
    assert "--top-p 0.5: " in work.run("--top-p", 0.5, code=2)
    assert not work.output.exists()


def test_files_that_cannot_be_used_are_refused(work: Work, tmp_path: Path) -> None:
    work.write({"prompt": "the"})
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(work.input)
    for flag, path, fact in (
        ("--input", tmp_path / "none", "No such file or directory"),
        ("--output", tmp_path, "Is a directory"),
        ("--output", tmp_path / "none" / "out", "No such file or directory"),
        ("--output", tmp_path / "pipe", "not a regular file"),
        ("--output", tmp_path / "link", "the file of --input"),
    ):
        err = work.run(flag, path, code=2)
        assert err.startswith(f"satchel: error: {flag} {path}: ")
        assert fact in err
    assert work.input.read_bytes() == b'{"prompt": "the"}\n'
