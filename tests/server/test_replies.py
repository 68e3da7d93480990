"""Reasoning and calls of tools are taken out of the text, however it is cut into pieces."""

# ruff: noqa: RUF001 - DeepSeek's marks have wide characters

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from satchel.runtime.generation.templates.chat_template import ChatTemplate
from satchel.runtime.server.call_source import Piece
from satchel.runtime.server.replies import Syntax

CALL = '{"name": "add", "arguments": {"a": 1, "b": "<x>"}}'
LLAMA = '{"name": "add", "parameters": {"a": 1, "b": "<x>"}}'
ARGUMENTS = '{"a": 1, "b": "<x>"}'
ADD = ("call", ARGUMENTS, "add")
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "description": ""},
                "b": {"type": "string", "description": ""},
            },
            "required": ["a"],
        },
    },
}
HERMES = "<tool_call>"

CASES: list[tuple[str, str, list[tuple[str, ...]]]] = [
    (HERMES, "Hello <b>you</b>", [("content", "Hello <b>you</b>")]),
    (HERMES, "  Hello \n", [("content", "  Hello \n")]),
    (HERMES, f"<tool_call>\n{CALL}\n</tool_call>", [ADD]),
    (HERMES, f"I add.\n<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>",
     [("content", "I add."), ADD, ADD]),
    (HERMES, f"<think>\nA </thin\n</think>\n\n<tool_call>{CALL}</tool_call>", [("reasoning", "\nA </thin\n"), ADD]),
    (HERMES, "<think>Hm</think>Yes", [("reasoning", "Hm"), ("content", "Yes")]),
    (HERMES, "<think>Hm", [("reasoning", "Hm")]),
    (HERMES, "a \n<tool_call>nonsense</tool_call> x", [("content", "a \n<tool_call>nonsense</tool_call> x")]),
    (HERMES, f"<tool_call>{CALL}", [ADD]),
    (HERMES, "<tool_call>{", [("content", "<tool_call>{")]),
    (HERMES, "a < b and <tool", [("content", "a < b and <tool")]),
    (HERMES, '<tool_call>{"name": 5}</tool_call>', [("content", '<tool_call>{"name": 5}</tool_call>')]),
    (HERMES, '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
     [("content", '<tool_call>{"name": "add", "arguments": [1]}</tool_call>')]),
    (HERMES, f"[TOOL_CALLS] [{CALL}]", [("content", f"[TOOL_CALLS] [{CALL}]")]),
    ("no form that is known", f"<tool_call>{CALL}</tool_call>", [("content", f"<tool_call>{CALL}</tool_call>")]),
    ("[TOOL_CALLS]", f"[TOOL_CALLS] [{CALL}, {CALL}]", [ADD, ADD]),
    ("[TOOL_CALLS][ARGS]", f"Well.[TOOL_CALLS]add[ARGS]{ARGUMENTS}[TOOL_CALLS]add[CALL_ID]9[ARGS]{ARGUMENTS}",
     [("content", "Well."), ADD, ADD]),
    ("[THINK]", "[THINK]Hm[/THINK]Yes", [("reasoning", "Hm"), ("content", "Yes")]),
    ("ipython", LLAMA, [ADD]),
    ("ipython", '{"answer": 5}', [("content", '{"answer": 5}')]),
    ("ipython", '{"name": "Bob"}', [("content", '{"name": "Bob"}')]),
    ("ipython <|python_tag|>", f"<|python_tag|>{LLAMA}; {LLAMA}", [ADD, ADD]),
    ("<|python_start|>", "<|python_start|>[add(a=1, b='<x>')]<|python_end|>", [ADD]),
    ("<|tool_list_start|>", "<|tool_call_start|>[add(a=1, b='<x>'), add(a=1, b=\"<x>\")]<|tool_call_end|>Done",
     [ADD, ADD, ("content", "Done")]),
    ("<|tool_list_start|>", "<|tool_call_start|>[open('a')]<|tool_call_end|>",
     [("content", "<|tool_call_start|>[open('a')]<|tool_call_end|>")]),
    ("<function_calls>", "<function_calls>\nadd(a=1, b='<x>')\nadd(a=1, b='<x>')\n</function_calls>", [ADD, ADD]),
    ("<function_calls>", "<function_calls>clock(deep=[true, {'k': null}])</function_calls>",
     [("call", '{"deep": [true, {"k": null}]}', "clock")]),
    ("<function_calls>", "<function_calls>" r"""clock(t="a\n\x41\u00e9\101 \'q\' \\d", n=-1.5e3, e='', d='[,)\'')"""
     "</function_calls>",
     [("call", r"""{"t": "a\nAéA 'q' \\d", "n": -1500.0, "e": "", "d": "[,)'"}""", "clock")]),
    ("<|python_start|>", "<|python_start|>[clock(a={'k': [1, (2, 3), \"x)\", True, None]}, b=False, "
     "c=\"\"\"p\"'q\"\"\"),clock()]<|python_end|>Done",
     [("call", r"""{"a": {"k": [1, [2, 3], "x)", true, null]}, "b": false, "c": "p\"'q"}""", "clock"),
      ("call", "{}", "clock"), ("content", "Done")]),
    ("<|python_start|>", r"<|python_start|>[clock(t='\ud83d\ude00')]<|python_end|>",
     [("call", r'{"t": "\ud83d\ude00"}', "clock")]),
    ("<|python_start|>", "<|python_start|>[add(a=__import__('os'), b=1)]<|python_end|>",
     [("call", '{"a": ', "add"), ("content", "__import__('os'), b=1)]<|python_end|>")]),
    ("<|python_start|>", "<|python_start|>[add(a=1, b='<x", [("call", '{"a": 1, "b": "<x', "add")]),
    ("<|python_start|>", "<|python_start|>[]<|python_end|>", [("content", "<|python_start|>[]<|python_end|>")]),
    ("<|tool_call>", '<|tool_call>call:add{a:1,b:<|"|><x><|"|>}<tool_call|>', [ADD]),
    ("<|tool_call>", '<|tool_call>call:clock{deep:[true,{k:null}],t:<|"|>{,}<|"|>}<tool_call|>',
     [("call", '{"deep": [true, {"k": null}], "t": "{,}"}', "clock")]),
    ("<|channel>thought", "<|channel>thought\nHm<channel|>Yes", [("reasoning", "\nHm"), ("content", "Yes")]),
    ("<start_function_call>", "<start_function_call>call:add{a:1,b:<escape><x><escape>}<end_function_call>", [ADD]),
    ("<tool_call><function=", "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n<x>\n"
     "</parameter>\n</function>\n</tool_call>", [ADD]),
    ("<tool_call><function=", "<tool_call><function=add><parameter=b>5</parameter></function></tool_call>",
     [("call", '{"b": "5"}', "add")]),
    ("<tool_call><arg_key>", "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n<arg_key>b</arg_key>\n"
     "<arg_value><x></arg_value>\n</tool_call>", [ADD]),
    ("<TOOLCALL>", f"<TOOLCALL>[{CALL}]</TOOLCALL>", [ADD]),
    ("<|/tool_call|>", f"<|tool_call|>[{CALL}]<|/tool_call|>", [ADD]),
    ("<|tool_call|>", f"<|tool_call|>[{CALL}]", [ADD]),
    ("Action: ```json", f'Action: ```json\n[{{"tool_name": "add", "parameters": {ARGUMENTS}}}]```', [ADD]),
    ("<｜tool▁calls▁begin｜>",
     f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{ARGUMENTS}<｜tool▁call▁end｜>"
     f"<｜tool▁call▁begin｜>add<｜tool▁sep｜>{ARGUMENTS}<｜tool▁call▁end｜><｜tool▁calls▁end｜>", [ADD, ADD]),
    ("<|tool_calls_section_begin|>", "<|tool_calls_section_begin|><|tool_call_begin|>functions.add:0"
     f"<|tool_call_argument_begin|>{ARGUMENTS}<|tool_call_end|><|tool_calls_section_end|>", [ADD]),
    ("<|channel|><|message|>", "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>commentary"
     "<|message|>I add.<|end|><|start|>assistant<|channel|>commentary to=functions.add <|constrain|>json<|message|>"
     f"{ARGUMENTS}<|call|>", [("reasoning", "Hm"), ("content", "I add."), ADD]),
    ("<|channel|><|message|>", "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>final<|message|>"
     "a <| b",
     [("reasoning", "Hm"), ("content", "a <| b")]),
    ("<|channel|><|message|>", " to=functions.add<|channel|>commentary json<|message|>{", [("call", "{", "add")]),
    ("<|channel|><|message|>", "<|channel|>anal", []),
]  # fmt: skip


def joined(pieces: list[Piece]) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for piece in pieces:
        if piece.name:
            found.append((piece.kind, piece.text, piece.name))
        elif piece.kind == "call":
            found[-1] = (piece.kind, found[-1][1] + piece.text, found[-1][2])
        elif found and found[-1][0] == piece.kind:
            found[-1] = (piece.kind, found[-1][1] + piece.text)
        else:
            found.append((piece.kind, piece.text))
    return found


def split(template: str, text: str, size: int = 1000, prompt: str = "", **more: Any) -> list[tuple[str, ...]]:
    """What an answer to a prompt is split into if it comes in pieces of a size."""
    reply, pieces = Syntax(template).reply(prompt, **{"tools": [TOOL], **more}), []
    for place in range(0, len(text), size):
        pieces += reply.add(text[place : place + size])
    return joined(pieces + reply.add("", final=True))


@pytest.mark.parametrize(("template", "text", "expected"), CASES)
def test_a_reply_is_split_however_it_comes(template: str, text: str, expected: list[tuple[str, ...]]) -> None:
    for size in (1, 2, 3, 7, 1000):
        assert split(template, text, size) == expected


def test_without_tools_a_call_is_text_and_an_open_thought_is_reasoning() -> None:
    text = f"<tool_call>{CALL}</tool_call>"
    assert split(HERMES, text, tools=[]) == [("content", text)]
    thought = [("reasoning", "Hm"), ("content", "Yes")]
    assert split("", "Hm</think>Yes", prompt="... <think>\n") == thought
    assert split("[THINK]", "Hm[/THINK]Yes", prompt="[THINK]") == thought
    harmony = "<|channel|><|message|>"
    assert split(harmony, "more<|return|>", prompt="<|channel|>final<|message|>some") == [("content", "more")]
    called = f"<|channel|>commentary to=functions.add<|message|>{ARGUMENTS}"
    assert split(harmony, called, tools=[]) == [("content", ARGUMENTS)]


def test_calls_in_python_come_as_they_are_written() -> None:
    reply = Syntax("<|tool_list_start|> <|tool_call_start|>").reply("", [TOOL])
    told = []
    for text in ("<|tool_call_start|>[add(a=", "1", "2, b='so", "me t", "ext'), ", "add(", "a=3)]"):
        told.append("".join(piece.text for piece in reply.add(text)))
    assert told == ["{", '"a": ', '12, "b": "so', "me t", 'ext"}', "", '{"a": 3}']


def test_one_call_is_enough_if_there_may_not_be_several() -> None:
    twice = f"<tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call>."
    assert split(HERMES, twice, several=False) == [ADD, ("content", ".")]
    assert split("<TOOLCALL>", f"<TOOLCALL>[{CALL}, {CALL}]</TOOLCALL>", several=False) == [ADD]


@pytest.mark.parametrize("depth", [10, 10_000])
def test_deep_nonsense_is_text(depth: int) -> None:
    for template, begin, end in (
        ("<tool_call>", "<tool_call>", "</tool_call>"),
        ("<function_calls>", "<function_calls>", "</function_calls>"),
        ("<|tool_call>", "<|tool_call>call:a{k:", "<tool_call|>"),
    ):
        text = begin + "[" * depth + end
        assert split(template, text) == [("content", text)]


CORPUS = Path(__file__).parents[1] / "data" / "chat_templates"
CALLS = [{"id": f"abcdefgh{k}", "type": "function", "function": {"name": "add", "arguments": json.loads(ARGUMENTS)}}
         for k in range(2)]  # fmt: skip
ONE_CALL = ("llama3.1-tools-date", "gpt-oss-harmony", "llama4-parts")  # what these templates allow in a turn


@pytest.mark.parametrize(
    "name",
    ["command-r-tool-use", "deepseek-v3", "exaone4", "glm4.5-visible", "gpt-oss-harmony", "hermes-tool-use", "jamba",
     "llama3.1-tools-date", "llama4-parts", "mistral-v3-tools", "nemotron-nano", "qwen2.5-tools", "qwen3-thinking"],
)  # fmt: skip
def test_calls_that_a_template_writes_are_read(name: str) -> None:
    """The calls in an answer, as a template of each family writes them into the history, are those that were given."""
    source = (CORPUS / f"{name}.jinja").read_text(encoding="utf-8")
    calls = CALLS[:1] if name in ONE_CALL else CALLS
    asked = [{"role": "user", "content": "1 + 1?"}]
    with ChatTemplate(source, {"bos_token": "<BOS>", "eos_token": "<EOS>"}) as template:
        prompt = template.render(asked, tools=[TOOL])
        answered = [*asked, {"role": "assistant", "content": "", "tool_calls": calls}]
        whole = template.render(answered, tools=[TOOL], add_generation_prompt=False)
        before = template.render(asked, tools=[TOOL], add_generation_prompt=False)
    answer = whole.removeprefix(prompt if whole.startswith(prompt) else before)
    answer = answer.removesuffix("<EOS>").removesuffix("<|eot_id|>")
    found = [
        (name, json.loads(text)) for kind, text, *named in split(source, answer) if kind == "call" for name in named
    ]
    assert found == [("add", json.loads(ARGUMENTS))] * len(calls)
