"""Constrained output: texts match their grammar as a whole, or the request fails."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import tokenizers
from support.chat_bundle import END, chat_tokenizer, write_chat_bundle
from support.command import Satchel
from support.schemas import schema
from support.tiny_bundle import write_bundle

from satchel.runtime.errors import PromptError
from satchel.runtime.execution.cpu import CpuEngine, CpuState
from satchel.runtime.execution.state import State
from satchel.runtime.generation.constraint import Grammars
from satchel.runtime.generation.generator import Generator
from satchel.runtime.generation.grammar import Grammar
from satchel.runtime.generation.options import GenerationOptions
from satchel.runtime.generation.request import Request
from satchel.runtime.generation.run_costs import Costs
from satchel.runtime.generation.tokenizer import JsonTokenizer

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "Bob"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
WORDS = r"(cat|dog){1,5}-[0-9]{2}"
UNLIKELY = {END: -50.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_bundle(tmp_path_factory.mktemp("bundles") / "roomy", max_context=1500)


@pytest.fixture(scope="module")
def generator(folder: Path) -> Iterator[Generator]:
    generator = Generator.open(folder, threads=1)
    yield generator
    generator.template.close()


def check_schemas(generator: Generator, seeds: range) -> None:
    requests = [
        Request(
            "the", GenerationOptions(max_new_tokens=1400, grammar={"json_schema": schema(s)}, temperature=1.0, seed=s)
        )
        for s in seeds
    ]
    found = dict(generator.run_requests(requests, rows=4))
    for index, seed in enumerate(seeds):
        result = found[index]
        assert not isinstance(result, PromptError), (seed, result)
        assert result.finish_reason == "stop", seed
        jsonschema.validate(json.loads(result.text), schema(seed), jsonschema.Draft202012Validator)


def test_texts_are_valid_by_their_schemas(generator: Generator) -> None:
    check_schemas(generator, range(30))


@pytest.mark.slow
def test_texts_are_valid_by_three_hundred_schemas(generator: Generator) -> None:
    check_schemas(generator, range(30, 330))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 2.0, "seed": 2, "top_k": 3, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
        {"logit_bias": {END: 90.0}},  # the end is wanted before the grammar allows it
        {"logprobs": 2},
    ],
    ids=str,
)
def test_every_way_to_choose_stays_within_the_grammar(generator: Generator, options: dict[str, Any]) -> None:
    result = generator.generate("the", 100, grammar={"regex": WORDS}, **options)
    assert re.fullmatch(WORDS, result.text)
    assert result.finish_reason == "stop"
    assert options.get("logprobs") is None or len(result.logprobs or ()) == result.new_tokens


def test_the_grammar_comes_before_the_filters(generator: Generator) -> None:
    """With top-k 1 the most likely token of those allowed is taken, which need not be that of all."""
    greedy = generator.generate("the", 60, grammar={"regex": WORDS})
    assert generator.generate("the", 60, grammar={"regex": WORDS}, temperature=1.0, top_k=1, seed=3).text == greedy.text


def test_a_lark_grammar_and_any_object(generator: Generator) -> None:
    lark = 'start: "x = " NUMBER ";"\nNUMBER: /[0-9]{1,3}/'
    assert re.fullmatch("x = [0-9]{1,3};", generator.generate("the", 60, grammar={"lark": lark}).text)
    ended = [generator.generate("the", 300, grammar={"json_object": True}, temperature=1.0, seed=s) for s in range(6)]
    texts = [result.text for result in ended if result.finish_reason == "stop"]
    assert texts
    assert all(isinstance(json.loads(text), dict) for text in texts)


def test_a_text_cut_off_says_so(generator: Generator) -> None:
    result = generator.generate("the", 5, grammar={"json_schema": SCHEMA})
    assert result.finish_reason == "length"
    assert '{"name": "Ada", "age": '.startswith(result.text) or '{"name": "Bob", "age": '.startswith(result.text)


def test_the_end_is_allowed_where_the_text_may_end(generator: Generator) -> None:
    open_end = {"regex": "(cat)+"}
    eager = generator.generate("the", 60, grammar=open_end, logit_bias={END: 90.0})
    assert (eager.text, eager.finish_reason) == ("cat", "stop")
    assert generator.generate("the", 60, grammar=open_end, logit_bias=UNLIKELY).finish_reason == "length"


def test_texts_beside_each_other_and_samples(generator: Generator) -> None:
    options: dict[str, Any] = {"temperature": 30.0, "seed": 5, "grammar": {"json_schema": SCHEMA}}
    texts = [result.text for result in generator.samples("the", 4, max_new_tokens=80, **options)]
    assert len(set(texts)) > 1
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)
    assert texts[0] == generator.generate("the", 80, **options).text
    batch = generator.generate_batch(["the", "the cat"], max_new_tokens=80, **options)
    assert [result.text for result in batch] == [
        generator.generate(prompt, 80, **options).text for prompt in ("the", "the cat")
    ]


def test_forced_tokens_are_fed_in_one_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny bundle takes several tokens in a run, if only in single steps; a further one is said to cost little."""
    options: dict[str, Any] = {"grammar": {"json_schema": SCHEMA}, "temperature": 1.0, "seed": 4, "logprobs": 1}
    expected = Generator.open(folder, threads=1, speculate="off").generate("the", 80, **options)
    monkeypatch.setattr(Costs, "of", lambda costs, rows: 1 + rows / 100)
    monkeypatch.setattr(CpuEngine, "why_not_ahead", lambda engine, adapter: None)
    monkeypatch.setattr(CpuState, "decode_ahead", State.decode_ahead)
    generator = Generator.open(folder, threads=1, prefix_cache_mib=0)
    generator.generate("the", 80, **options)  # the first run of each width is compared with single steps
    found = generator.generate("the dog", 80, **options)
    assert found.accepted_tokens >= 7
    again = generator.generate("the", 80, **options)
    assert (again.token_ids, again.logprobs) == (expected.token_ids, expected.logprobs)


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        ({"regex": "a("}, "unclosed"),
        ({"lark": "start: nothing"}, "nothing"),
        ({"json_schema": {"type": "strong"}}, "strong"),
        ({"json_schema": {"type": "object", "unevaluatedProperties": False}}, "unevaluatedProperties"),
        ({"json_schema": "{"}, "not JSON"),
        ({"json_schema": [1]}, "object"),
        ({"json_object": False}, "true"),
        ({"regex": ""}, "regex"),
        ({"regex": "a", "lark": "b"}, "grammar"),
        ({"gbnf": "a"}, "gbnf"),
        ("a*", "grammar"),
    ],
    ids=str,
)
def test_what_cannot_be_compiled_is_refused_before_anything_runs(
    generator: Generator, grammar: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generator.engine, "new_state", None)
    with pytest.raises(PromptError, match=re.escape(said)) as raised:
        generator.generate("the", 5, grammar=grammar)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("field", ["min_new_tokens", "forced_eos_token_id"])
def test_what_would_overrule_a_grammar_is_refused(generator: Generator, field: str) -> None:
    with pytest.raises(PromptError, match="grammar"):
        generator.generate("the", 5, grammar={"regex": "a"}, **{field: 3})


def all_texts(generator: Generator, prompt: list[int], ended: str, power: float) -> dict[tuple[int, ...], float]:
    """The score of every text of tokens that matches `ended` as a whole, each from one pass over the whole of it."""
    tokenizer = generator.need_tokenizer()
    able = [token for token in range(END) if set(tokenizer.decode([token])) <= {"a", "b"} and tokenizer.decode([token])]
    scores = {}
    for tokens in (each for count in (1, 2, 3) for each in itertools.product(able, repeat=count)):
        if re.fullmatch(ended, "".join(map(tokenizer.decode, ([token] for token in tokens)))):
            logits = generator.engine.score(np.array([*prompt, *tokens, END]))[len(prompt) - 1 : -1].astype(np.float64)
            found = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
            total = sum(row[token] for row, token in zip(found, (*tokens, END), strict=True))
            scores[tokens] = total / (len(tokens) + 1) ** power
    return scores


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_enough_beams_find_every_text_of_a_grammar(generator: Generator, power: float) -> None:
    prompt, ended = generator.encode("the cat").tolist(), "[ab]{1,3}"
    expected = all_texts(generator, prompt, ended, power)
    found = generator.beam_search(
        prompt, len(expected), grammar={"regex": ended}, length_penalty=power, max_new_tokens=9
    )
    assert [each.finish_reason for each in found] == ["stop"] * len(expected)
    assert [each.token_ids for each in found] == sorted(expected, key=lambda tokens: -expected[tokens])
    np.testing.assert_allclose([each.score for each in found], sorted(expected.values(), reverse=True), rtol=1e-5)


def test_one_beam_gives_the_greedy_text_of_a_grammar(generator: Generator) -> None:
    options = {"grammar": {"json_schema": SCHEMA}, "max_new_tokens": 80}
    greedy = generator.generate("the", **options)
    assert [each.token_ids for each in generator.beam_search("the", 1, **options)] == [greedy.token_ids]


def test_beams_of_a_schema_are_valid_and_differ(generator: Generator) -> None:
    found = generator.beam_search("the", 4, grammar={"json_schema": SCHEMA}, max_new_tokens=80)
    for each in found:
        jsonschema.validate(json.loads(each.text), SCHEMA)
    assert len({each.token_ids for each in found}) == 4


@pytest.mark.parametrize("letter", ["a", "b"])
def test_biases_choose_among_what_a_grammar_leaves(generator: Generator, letter: str) -> None:
    (token,) = generator.need_tokenizer().encode_rendered(letter)
    bias = {"logit_bias": {token: 30.0, END: 90.0}}
    best, _ = generator.beam_search("the", 2, grammar={"regex": "[ab]{3}"}, max_new_tokens=9, **bias)
    assert best.text == letter * 3


def test_sentencepiece_is_refused(generator: Generator) -> None:
    grammars = Grammars(None, 400, [2])
    with pytest.raises(PromptError, match=r"tokenizer\.json"):
        grammars.constraint(GenerationOptions(grammar=Grammar("regex", "a")), np.array([3]), [2], "")


def test_without_the_library_the_extra_is_named(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(PromptError, match=r"grammar.*pip install .*llguidance"):
        generator.generate("the", 5, grammar={"regex": "a"})


def test_a_token_against_the_grammar_ends_the_request_with_an_error(generator: Generator) -> None:
    with pytest.raises(PromptError, match="grammar"):
        generator.generate("the", 5, grammar={"regex": "[a-c]+"}, choose=lambda logits: 300)
    with pytest.raises(PromptError, match="suppress-tokens"):
        generator.generate("the", 5, grammar={"regex": "a"}, suppress_tokens=list(range(400)))


def test_a_bundle_with_no_end_token_is_refused(tmp_path: Path) -> None:
    generator = Generator.open(write_bundle(tmp_path / "endless", eos_token_ids=()), threads=1)
    with pytest.raises(PromptError, match="end token"):
        generator.generate("the", 5, grammar={"regex": "a"})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> JsonTokenizer:
    library = tokenizers.Tokenizer.from_str(chat_tokenizer().decode())
    library.add_tokens(["<think>", "</think>"])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(library.to_str())
    return JsonTokenizer(path)


class TestReasoning:
    """The part that has to match begins after the reasoning, where the template has some."""

    TEMPLATE = "{{ messages }}<think>x</think>"

    def follow(
        self, tokenizer: JsonTokenizer, prompt: str, answer: str, template: str = TEMPLATE, most: int | None = None
    ) -> list[bool]:
        """Whether each token of an answer, and its end, is allowed, up to the first that is not."""
        grammars = Grammars(tokenizer, 400, [END])
        ids = np.asarray(tokenizer.encode_rendered(prompt), np.int64)
        options = GenerationOptions(grammar=Grammar("regex", "(cat){2}", chat=True), max_thinking_tokens=most)
        constraint = grammars.constraint(options, ids, [END], template)
        allowed = []
        for token in [*tokenizer.encode_rendered(answer), END]:
            logits = constraint.masked(np.zeros(400, np.float32))
            allowed.append(bool(np.isfinite(logits[token])))
            if not allowed[-1] or token == END:
                break
            constraint.take(token)
        return allowed

    def test_an_answer_may_reason_first(self, tokenizer: JsonTokenizer) -> None:
        assert all(self.follow(tokenizer, "q", "<think>a dog</think>catcat"))
        assert all(self.follow(tokenizer, "q<think>\n", "a dog</think>catcat"))
        assert all(self.follow(tokenizer, "q", "catcat"))

    def test_reasoning_cannot_end_the_answer_or_follow_it(self, tokenizer: JsonTokenizer) -> None:
        assert not all(self.follow(tokenizer, "q", "<think>a dog"))
        assert not all(self.follow(tokenizer, "q<think>", "a dog</think>dog"))
        assert not all(self.follow(tokenizer, "q<think></think>\n", "<think>a</think>catcat"))
        assert not all(self.follow(tokenizer, "q", "cat<think>a</think>cat"))
        assert not all(self.follow(tokenizer, "q", "<think>a</think>catcat", template="no reasoning"))

    def test_marks_of_several_tokens(self, tokenizer: JsonTokenizer) -> None:
        template = "[THINK] [/THINK]"
        assert all(self.follow(tokenizer, "q[THINK]", "a[/THINK]catcat", template))
        assert not all(self.follow(tokenizer, "q[THINK]", "a[/THINK]dog", template))

    def test_it_ends_after_as_many_tokens_as_it_may_have(self, tokenizer: JsonTokenizer) -> None:
        size = len(tokenizer.encode_rendered(" a dog"))
        for prompt, answer in (("q", "<think> a dog</think>catcat"), ("q<think>", " a dog</think>catcat")):
            assert all(self.follow(tokenizer, prompt, answer, most=size))
            assert all(self.follow(tokenizer, prompt, answer, most=size + 1))
            assert not all(self.follow(tokenizer, prompt, answer, most=size - 1))


class TestCommand:
    def test_flags(self, satchel: Satchel, folder: Path, tmp_path: Path) -> None:
        path = tmp_path / "schema.json"
        path.write_text(json.dumps(SCHEMA))
        said = satchel("run", folder, "the", "--json-schema", path, "-n", 80, "--quiet")
        jsonschema.validate(json.loads(said.out), SCHEMA)
        assert re.fullmatch(WORDS, satchel("run", folder, "the", "--regex", WORDS, "-n", 80, "--quiet").out.strip())
        path.write_text('start: "cat"')
        assert satchel("run", folder, "the", "--lark", path, "-n", 80, "--quiet").out.strip() == "cat"

    def test_a_chat(self, satchel: Satchel, folder: Path, tmp_path: Path) -> None:
        path = tmp_path / "schema.json"
        path.write_text(json.dumps(SCHEMA))
        said = satchel("chat", folder, "-n", 80, "--json-schema", path, "--quiet", stdin="the\na dog\n")
        for line in said.out.splitlines():
            jsonschema.validate(json.loads(line), SCHEMA)
        assert re.fullmatch(WORDS, satchel("chat", folder, "the", "--regex", WORDS, "-n", 80, "--quiet").out.strip())
        assert "unclosed" in satchel.refuses("chat", folder, "--regex", "a(", stdin="the\n")
        assert "missing.lark" in satchel.refuses("chat", folder, "the", "--lark", tmp_path / "missing.lark")

    def test_lines(self, satchel: Satchel, folder: Path, tmp_path: Path) -> None:
        path = tmp_path / "lines.jsonl"
        rows = [{"prompt": "the", "grammar": {"json_schema": SCHEMA}}, {"prompt": "the", "grammar": {"regex": "a("}}]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        said = satchel("run", folder, "--input", path, "-n", 80, "--quiet", code=1)
        found = {row["id"]: row for row in map(json.loads, said.out.splitlines())}
        jsonschema.validate(json.loads(found[1]["text"]), SCHEMA)
        assert "unclosed" in found[2]["error"]

    def test_beams(self, satchel: Satchel, folder: Path) -> None:
        said = satchel("run", folder, "the", "--regex", "[ab]", "--beams", 2, "--raw", "--quiet")
        assert {"a", "b"} <= set(said.out.split())

    def test_refusals(self, satchel: Satchel, folder: Path, tmp_path: Path) -> None:
        path = tmp_path / "wrong.json"
        path.write_text("{")
        assert str(path) in satchel.refuses("run", folder, "the", "--json-schema", path)
        assert "missing.lark" in satchel.refuses("run", folder, "the", "--lark", tmp_path / "missing.lark")
        assert "unclosed" in satchel.refuses("run", folder, "the", "--regex", "a(")
