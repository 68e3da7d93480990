"""Chat templates render as in transformers, from what a bundle carries; wrong messages and templates say so."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import pytest
from support.chat_templates import SPECIAL, TURNS
from support.tiny_bundle import replace_file, write_bundle
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.errors import BundleError, PromptError
from satchel.runtime.generation.templates.chat_template import ChatTemplate, special_tokens
from satchel.runtime.generation.tokenizer import Tokenizer
from satchel.runtime.ort.open_bundle import open_bundle

SMOLLM2 = "SATCHEL_SMOLLM2_GGUF"
GGUF = Path(os.environ.get(SMOLLM2, Path(__file__).parents[2] / ".cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"))
LLAMA2 = (Path(__file__).parents[1] / "data" / "chat_templates" / "llama2.jinja").read_text(encoding="utf-8")


def reference(source: str, messages: list[dict[str, str]]) -> str:
    rendered, _ = render_jinja_template([messages], chat_template=source, add_generation_prompt=True, **SPECIAL)
    return rendered[0]


def bundle_with(folder: Path, files: dict[str, bytes], **options: Any) -> Bundle:
    """A tiny bundle that lists further files in its manifest."""
    write_bundle(folder, **options)
    for name, content in files.items():
        replace_file(folder, name, content)
    return open_bundle(folder)


@pytest.mark.skipif(not GGUF.is_file(), reason=f"{GGUF} is not there: make test-all fetches it; or set {SMOLLM2}")
def test_the_template_of_smollm2_renders_as_in_transformers() -> None:
    source = gguf.GGUFReader(GGUF).fields["tokenizer.chat_template"].contents()
    with ChatTemplate(source, SPECIAL) as template:
        for messages in (TURNS[:1], [{"role": "system", "content": "Be brief."}, *TURNS]):
            expected = reference(source, messages)
            assert template.render(messages) == expected
            assert "<|im_start|>assistant\n" in expected


def test_a_rendered_conversation_encodes_as_transformers_apply_chat_template(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path / "bundle", {"chat_template.jinja": LLAMA2.encode()})
    tokenizer = Tokenizer.open(bundle)
    original = PreTrainedTokenizerFast(
        tokenizer_file=str(bundle.path("tokenizer.json")), bos_token="<s>", eos_token="</s>", chat_template=LLAMA2
    )
    with ChatTemplate(LLAMA2, SPECIAL) as template:
        ids = tokenizer.encode_rendered(template.render(TURNS))
    assert ids == original.apply_chat_template(TURNS, tokenize=True, return_dict=False)
    assert ids[0] == 1
    assert ids.count(1) == 2  # the template writes one for each of the user's turns, and the tokenizer adds none


def test_mappings_and_tuples_are_taken_for_objects_and_lists() -> None:
    messages = tuple(MappingProxyType(message) for message in TURNS)
    with ChatTemplate(LLAMA2, SPECIAL) as template:
        assert template.render(messages) == reference(LLAMA2, TURNS)


def test_a_bundle_gives_its_template_and_the_tokens_of_its_tokenizer_config(tmp_path: Path) -> None:
    config = {"bos_token": {"content": "<begin>", "special": True}, "eos_token": "<end>", "pad_token": None, "x": 1}
    files = {
        "chat_template.jinja": "é {{ bos_token ~ eos_token ~ pad_token }}",
        "tokenizer_config.json": json.dumps(config),
    }
    bundle = bundle_with(tmp_path / "bundle", {name: text.encode() for name, text in files.items()})
    with ChatTemplate.open(bundle) as template:
        assert template.render(TURNS) == "é <begin><end>"


def test_without_a_tokenizer_config_the_manifests_ids_name_the_special_tokens(tmp_path: Path) -> None:
    files = {"chat_template.jinja": b"{{ bos_token ~ eos_token ~ pad_token }}"}
    bundle = bundle_with(tmp_path / "bundle", files, eos_token_ids=(2, 0))
    for found in (special_tokens(bundle), special_tokens(bundle, Tokenizer.open(bundle))):
        assert found == {"bos_token": "<s>", "eos_token": "</s>"}
    with ChatTemplate.open(bundle) as template:
        assert template.render(TURNS) == "<s></s>"


def test_a_bundle_without_a_template_says_what_to_do(tmp_path: Path) -> None:
    bundle = open_bundle(write_bundle(tmp_path / "bundle"))
    (tmp_path / "bundle" / "chat_template.jinja").write_text("a file that the manifest does not list")
    with pytest.raises(BundleError, match=r"bundle: has no chat template: .*--chat-template"):
        ChatTemplate.open(bundle)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("chat_template.jinja", b"ab\xff", r"chat_template\.jinja: not UTF-8 text \(byte 2\): export the bundle again"),
        ("tokenizer_config.json", b"[1]", r"tokenizer_config\.json: not a JSON object: export the bundle again"),
        ("tokenizer_config.json", b"{", r"tokenizer_config\.json: not a JSON object: export the bundle again"),
    ],
)
def test_a_damaged_file_of_the_bundle_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    bundle = bundle_with(tmp_path / "bundle", {"chat_template.jinja": b"", name: content})
    with pytest.raises(BundleError, match=message):
        ChatTemplate.open(bundle)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages: must be a list with at least one message"),
        ({"role": "user", "content": "a"}, "messages: must be a list with at least one message"),
        ("hello", "messages: must be a list with at least one message"),
        ([*TURNS, "hello"], r"messages\[3\]: must be an object like .*, found str"),
        ([{"content": "a"}], r'messages\[0\]\.role: must be a text such as "user"'),
        ([TURNS[0], {"role": 1, "content": "a"}], r'messages\[1\]\.role: must be a text such as "user"'),
        ([{"role": "user"}], r"messages\[0\]\.content: must be a text"),
        ([{"role": "assistant", "content": None, "tool_calls": []}], r"messages\[0\]\.content: must be a text"),
        ([{"role": "user", "content": 5}], r"messages\[0\]\.content: must be a text, found int"),
        ([{"role": "user", "content": [{"type": "text"}, "a"]}], r'messages\[0\]\.content\[1\]: .* with a "type"'),
        ([{"role": "user", "content": "a", "time": b"x"}], r"cannot be written as JSON \(bytes is not a JSON value\)"),
    ],
)
def test_messages_that_are_none_are_named_before_anything_starts(messages: Any, message: str) -> None:
    template = ChatTemplate("{{ messages }}")
    with pytest.raises(PromptError, match=message):
        template.render(messages)
    assert not template._processes


def test_arguments_that_are_no_json_are_refused() -> None:
    circle: list[Any] = []
    circle.append(circle)
    for value in (circle, {1, 2}, object()):
        with pytest.raises(
            PromptError, match=r"cannot be written as JSON \(.*\): use text, numbers, lists and objects"
        ):
            ChatTemplate("").render(TURNS, extra=value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\n{% if x %}\nb", r"cannot be read at line \d: Unexpected end of template.*: .*--chat-template"),
        ("a\n\n{% nonsense %}", "cannot be read at line 3: Encountered unknown tag 'nonsense'"),
        ("a\n{{ 1 | nonsense }}", "cannot be read at line 2: No filter named 'nonsense': .*--chat-template"),
        (
            "a\n{{ messages[0].name.first }}",
            "fails at line 2: 'dict object' has no attribute 'name': change the messages",
        ),
        ("\n\n{{ 'a' + 1 }}", "fails at line 3: TypeError: "),
        ("{% macro m() %}\n\n{{ 1 / 0 }}{% endmacro %}\n{{ m() }}", "fails at line 3: ZeroDivisionError: "),
        ("{% include 'other' %}", "fails at line 1: TypeError: no loader for this environment"),
        (
            "{{ raise_exception('turns\n  must \x1b[1m alternate') }}",
            r"refuses these messages: turns must \\x1b\[1m alternate$",
        ),
        ("{{ raise_exception('a' * 5000) }}", "refuses these messages: a{300} ...$"),
    ],
)
def test_a_template_that_fails_says_where_and_why_in_one_line(source: str, message: str) -> None:
    with ChatTemplate(source) as template, pytest.raises(PromptError, match=f"the chat template {message}") as caught:
        template.render(TURNS)
    assert str(caught.value).isprintable()


def test_a_refusal_ends_no_process_and_the_next_messages_render() -> None:
    with ChatTemplate(LLAMA2, SPECIAL) as template:
        template.start()
        first = template._processes["default"]
        with pytest.raises(
            PromptError, match=r"refuses these messages: turn 1 should be of the user, found assistant$"
        ):
            template.render(TURNS[1:])
        assert template.render(TURNS) == reference(LLAMA2, TURNS)
        assert template._processes["default"] is first
