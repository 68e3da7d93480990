"""The forms in which models write calls of tools and reasoning: which one a model has, its chat template shows."""

# ruff: noqa: RUF001 - DeepSeek's marks have wide characters

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

from satchel.runtime.server.call_readers import (
    Calls,
    Schemas,
    read_bare_keys,
    read_elements,
    read_named,
    read_objects,
    read_pairs,
    read_python,
)

Reader = Callable[[str, Schemas], Calls]
"""Reads the text between a mark and its end; raises one of UNREADABLE if it holds no calls."""


@dataclass(frozen=True)
class Form:
    """One way to write calls.

    Attributes:
        begin: The text that begins calls; empty for an answer that is a call as a whole.
        end: The text that ends them; empty for the end of the answer.
        read: Reads what is between.
        signs: Texts that a chat template has which shows this form; `begin` if there are none.
        inner: Special tokens in between.
        write: A call as it is written, with NAME and ARGUMENTS, which is JSON; empty where arguments are not JSON.
        listed: Whether the calls stand in a list.
    """

    begin: str
    end: str
    read: Reader
    signs: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()
    write: str = ""
    listed: bool = False


_OBJECT = '{"name": NAME, "arguments": ARGUMENTS}'
_LLAMA = '{"name": NAME, "parameters": ARGUMENTS}'
_COMMAND = '{"tool_name": NAME, "parameters": ARGUMENTS}'
_DEEPSEEK = r"\s*<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?(?P<name>[^\s<]+)(?:<｜tool▁sep｜>|\s*```json)\s*"
_read_deepseek = partial(read_named, before=_DEEPSEEK, after=r"\s*(?:```)?\s*<｜tool▁call▁end｜>\s*")
_KIMI = r"\s*<\|tool_call_begin\|>\s*(?:functions\.)?(?P<name>[^\s:<]+)(?::\d+)?\s*<\|tool_call_argument_begin\|>\s*"
_MISTRAL = r"\s*(?:\[TOOL_CALLS\])?\s*(?P<name>[^\s\[{]+)(?:\[CALL_ID\][^\s\[]*)?(?:\[ARGS\])?\s*"
_MISTRAL_MARKS = ("[ARGS]", "[CALL_ID]")
_DEEPSEEK_MARKS = ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>")
_KIMI_MARKS = ("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>")

FORMS: tuple[Form, ...] = (
    Form("<tool_call>", "</tool_call>", read_elements, ("<tool_call>", "<function=")),  # Qwen 3 Coder, 3.5
    Form("<tool_call>", "</tool_call>", read_pairs, ("<tool_call>", "<arg_key>")),  # GLM 4.5
    Form("<tool_call>", "</tool_call>", read_objects, write=_OBJECT),  # Hermes, Qwen, SmolLM3, Granite 4, EXAONE
    Form("<tool_calls>", "</tool_calls>", read_objects, write=_OBJECT, listed=True),  # Jamba, Hunyuan
    Form("<TOOLCALL>", "</TOOLCALL>", read_objects, write=_OBJECT, listed=True),  # Nemotron
    Form("<|tool_call|>", "<|/tool_call|>", read_objects, ("<|/tool_call|>",), write=_OBJECT, listed=True),  # Phi 4
    Form("<|tool_call|>", "", read_objects, write=_OBJECT, listed=True),  # Granite 3
    Form("[TOOL_CALLS]", "", partial(read_named, before=_MISTRAL), ("[TOOL_CALLS]", "[ARGS]"), _MISTRAL_MARKS,
         "NAME[ARGS]ARGUMENTS"),
    Form("[TOOL_CALLS]", "", read_objects, write=_OBJECT, listed=True),  # Mistral 7B
    Form("<|python_start|>", "<|python_end|>", read_python),  # Llama 4
    Form("<|python_tag|>", "", read_objects, write=_LLAMA),  # Llama 3
    Form("", "", read_objects, ("ipython",), write=_LLAMA),  # Llama 3
    Form("<|tool_call_start|>", "<|tool_call_end|>", read_python, ("<|tool_list_start|>",)),  # LFM2
    Form("<|tool_call_start|>", "<|tool_call_end|>", read_python, ("List of tools: [",)),  # LFM2.5
    Form("<function_calls>", "</function_calls>", read_python),  # OLMo 3
    Form("<|tool_call>", "<tool_call|>", partial(read_bare_keys, quote='<|"|>'), inner=('<|"|>',)),  # Gemma 4
    Form("<start_function_call>", "<end_function_call>",
         partial(read_bare_keys, quote="<escape>"), inner=("<escape>",)),  # FunctionGemma
    Form("<|START_ACTION|>", "<|END_ACTION|>", read_objects, write=_COMMAND, listed=True),  # Command R 7B, Command A
    Form("Action: ```json", "```", read_objects, write=_COMMAND, listed=True),  # Command R
    Form("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", _read_deepseek, inner=_DEEPSEEK_MARKS),
    Form("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>",
         partial(read_named, before=_KIMI, after=r"\s*<\|tool_call_end\|>\s*"), inner=_KIMI_MARKS),
)  # fmt: skip
"""The forms that are known; of those with the same beginning, the first that a template shows counts."""


@cache
def forms_of(template: str) -> tuple[Form, ...]:
    """The forms that a chat template shows, one for each beginning."""
    found: dict[str, Form] = {}
    for form in FORMS:
        if all(sign in template for sign in form.signs or (form.begin,)):
            found.setdefault(form.begin, form)
    return tuple(found.values())
