"""The forms in which models write calls of tools and reasoning: which one a model has, its chat template shows."""

# ruff: noqa: RUF001 - DeepSeek's marks have wide characters

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, partial

from satchel.runtime.generation.templates.thoughts import CHANNELS
from satchel.runtime.server.call_python import read_python
from satchel.runtime.server.call_readers import (
    OBJECT,
    OBJECT_END,
    Reader,
    named_in,
    objects_in,
    read_bare,
    read_json,
    read_tagged,
)


@dataclass(frozen=True)
class Notation:
    """How arguments are written that are not JSON.

    Attributes:
        pair: An argument, with KEY and VALUE. A text is written as it is, other values as JSON.
        keys: A regular expression of the keys that it can have.
        any_key: The same for any key, as a terminal of Lark.
        around: What stands before and after all arguments.
        between: What stands between two of them.
        quote: What stands around texts, where nested values are written in this way too; empty if those are JSON.
        literals: Whether values are literals of Python, nested ones too.
        inner: How values are written, if in another way than arguments.
    """

    pair: str
    keys: str
    any_key: str
    around: tuple[str, str] = ("", "")
    between: str = ""
    quote: str = ""
    literals: bool = False
    inner: Notation | None = None

    @property
    def values(self) -> Notation | None:
        """How values are written that have a notation of their own."""
        return self if self.quote or self.literals else self.inner


@dataclass(frozen=True)
class Form:
    """One way to write calls.

    Attributes:
        begin: The text that begins calls; empty for an answer that is a call as a whole.
        end: The text that ends them; empty for the end of the answer.
        read: Reads what is between.
        signs: Texts that a chat template has which shows this form; `begin` if there are none.
        inner: Special tokens in between.
        write: A call as it is written, with NAME, ARGUMENTS and NUMBER; empty if calls cannot be forced.
        notation: How arguments are written; None for JSON.
        listed: What stands before, between and after calls that stand between one beginning and one end.
        several: Whether an answer may have more than one call.
        names: A regular expression of the names of tools that it can have.
    """

    begin: str
    end: str
    read: Reader
    signs: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()
    write: str = ""
    notation: Notation | None = None
    listed: tuple[str, str, str] | None = None
    several: bool = True
    names: str = "(?s:.+)"


_OBJECT = '{"name": NAME, "arguments": ARGUMENTS}'
_LLAMA = '{"name": NAME, "parameters": ARGUMENTS}'
_COMMAND = '{"tool_name": NAME, "parameters": ARGUMENTS}'
_LIST = ("[", ", ", "]")
_read_objects = partial(read_json, before=OBJECT, after=OBJECT_END, whole=objects_in)


def _named(before: str, after: str = r"\s*") -> Reader:
    return partial(read_json, before=before, after=after, whole=partial(named_in, before=before, after=after))


_read_elements = partial(
    read_tagged, before=r"\s*<function=([^>\s]+)>", key=r"\s*<parameter=([^>\s]+)>\n?", close=r"\n?</parameter>",
    longest=len("\n</parameter>"), after=r"\s*</function>",
)  # fmt: skip
_read_pairs = partial(
    read_tagged, before=r"\s*([^<\s]+)", key=r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>", close="</arg_value>",
    longest=len("</arg_value>"), after=r"\s*(?=</tool_call>)|\s*\Z",
)  # fmt: skip
_ANY_KEY = "/[a-z][a-z0-9_]{0,31}/"
_ELEMENTS = Notation("<parameter=KEY>\nVALUE\n</parameter>\n", r"[^>\s]+", _ANY_KEY)
_PAIR_KEY = r"[^<\s](?:[^<\n]*[^<\s])?"
_PAIRS_LINES = Notation("<arg_key>KEY</arg_key>\n<arg_value>VALUE</arg_value>\n", _PAIR_KEY, _ANY_KEY)
_PAIRS = Notation("<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>", _PAIR_KEY, _ANY_KEY)
_BARE = Notation("KEY:VALUE", r"[\w-]+", _ANY_KEY, ("{", "}"), ",", '<|"|>')
_PYTHON_VALUES = Notation('"KEY": VALUE', r'[^"\\\x00-\x1f]+', _ANY_KEY, ("{", "}"), ", ", literals=True)
_PYTHON = Notation("KEY=VALUE", r"[^\W\d]\w*", _ANY_KEY, between=", ", inner=_PYTHON_VALUES)
_PYTHON_NAMES = r"[^\W\d][\w.-]*"
_DEEPSEEK = r"\s*<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?(?P<name>[^\s<]+)(?:<｜tool▁sep｜>|\s*```json)\s*"
_read_deepseek = _named(_DEEPSEEK, r"\s*(?:```)?\s*<｜tool▁call▁end｜>")
_KIMI = r"\s*<\|tool_call_begin\|>\s*(?:functions\.)?(?P<name>[^\s:<]+)(?::\d+)?\s*<\|tool_call_argument_begin\|>\s*"
_MISTRAL = r"\s*(?:\[TOOL_CALLS\])?\s*(?P<name>[^\s\[{]+)(?:\[CALL_ID\][^\s\[]*)?(?:\[ARGS\])?\s*"
_MISTRAL_MARKS = ("[ARGS]", "[CALL_ID]")
_DEEPSEEK_MARKS = ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>")
_KIMI_MARKS = ("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>")
_PAIR_MARKS = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
_DEEPSEEK_WRITE = "<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>ARGUMENTS<｜tool▁call▁end｜>"
_DEEPSEEK_LINES = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\nARGUMENTS\n```<｜tool▁call▁end｜>"
_KIMI_WRITE = "<|tool_call_begin|>functions.NAME:NUMBER<|tool_call_argument_begin|>ARGUMENTS<|tool_call_end|>"
_CHANNEL_MARKS = ("<|start|>", *CHANNELS, "<|constrain|>")

FORMS: tuple[Form, ...] = (
    Form("<tool_call>", "</tool_call>", _read_elements, ("<tool_call>", "<function="), (),
         "<function=NAME>\nARGUMENTS</function>", _ELEMENTS, names=r"[^>\s]+"),  # Qwen 3 Coder, 3.5
    Form("<tool_call>", "</tool_call>", _read_pairs, ("<tool_call>", "</arg_key><arg_value>"), _PAIR_MARKS,
         "NAMEARGUMENTS", _PAIRS, names=r"[^<\s]+"),  # GLM 4.7
    Form("<tool_call>", "</tool_call>", _read_pairs, ("<tool_call>", "<arg_key>"), _PAIR_MARKS,
         "NAME\nARGUMENTS", _PAIRS_LINES, names=r"[^<\s]+"),  # GLM 4.5
    Form("<tool_call>", "</tool_call>", _read_objects, write=_OBJECT),  # Hermes, Qwen, SmolLM3, Granite 4, EXAONE
    Form("<tool_calls>", "</tool_calls>", _read_objects, write=_OBJECT, listed=_LIST),  # Jamba, Hunyuan
    Form("<TOOLCALL>", "</TOOLCALL>", _read_objects, write=_OBJECT, listed=_LIST),  # Nemotron
    Form("<|tool_call|>", "<|/tool_call|>", _read_objects, ("<|/tool_call|>",), write=_OBJECT, listed=_LIST),  # Phi 4
    Form("<|tool_call|>", "", _read_objects, write=_OBJECT, listed=_LIST),  # Granite 3
    Form("[TOOL_CALLS]", "", _named(_MISTRAL), ("[TOOL_CALLS]", "[ARGS]"), _MISTRAL_MARKS,
         "NAME[ARGS]ARGUMENTS", names=r"[^\s\[{]+"),
    Form("[TOOL_CALLS]", "", _read_objects, write=_OBJECT, listed=_LIST),  # Mistral 7B
    Form("<|python_start|>", "<|python_end|>", read_python, write="NAME(ARGUMENTS)", notation=_PYTHON, listed=_LIST,
         names=_PYTHON_NAMES),  # Llama 4
    Form("<|python_tag|>", "", _read_objects, write=_LLAMA),  # Llama 3
    Form("", "", _read_objects, ("ipython",), write=_LLAMA),  # Llama 3
    Form("<|tool_call_start|>", "<|tool_call_end|>", read_python, ("<|tool_list_start|>",), (), "NAME(ARGUMENTS)",
         _PYTHON, _LIST, names=_PYTHON_NAMES),  # LFM2
    Form("<|tool_call_start|>", "<|tool_call_end|>", read_python, ("List of tools: [",), (), "NAME(ARGUMENTS)",
         _PYTHON, _LIST, names=_PYTHON_NAMES),  # LFM2.5
    Form("<function_calls>", "</function_calls>", read_python, write="NAME(ARGUMENTS)", notation=_PYTHON,
         listed=("", "\n", ""), names=_PYTHON_NAMES),  # OLMo 3
    Form("<|tool_call>", "<tool_call|>", partial(read_bare, quote='<|"|>'), inner=('<|"|>',),
         write="call:NAMEARGUMENTS", notation=_BARE, names=r"[\w.-]+"),  # Gemma 4
    Form("<start_function_call>", "<end_function_call>", partial(read_bare, quote="<escape>"), inner=("<escape>",),
         write="call:NAMEARGUMENTS", notation=replace(_BARE, quote="<escape>"), names=r"[\w.-]+"),  # FunctionGemma
    Form("<|START_ACTION|>", "<|END_ACTION|>", _read_objects, write=_COMMAND, listed=_LIST),  # Command R 7B, Command A
    Form("Action: ```json", "```", _read_objects, write=_COMMAND, listed=_LIST),  # Command R
    Form("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", _read_deepseek, ("<｜tool▁calls▁begin｜>", "```json"),
         _DEEPSEEK_MARKS, _DEEPSEEK_LINES, listed=("", "\n", ""), names=r"[^\s<]+"),  # DeepSeek V3, R1
    Form("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", _read_deepseek, inner=_DEEPSEEK_MARKS,
         write=_DEEPSEEK_WRITE, listed=("", "", ""), names=r"[^\s<]+"),  # DeepSeek V3.1
    Form("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", _named(_KIMI, r"\s*<\|tool_call_end\|>"),
         inner=_KIMI_MARKS, write=_KIMI_WRITE, listed=("", "", ""), names=r"[^\s:<]+"),
    Form("<|start|>assistant<|channel|>commentary to=functions.", "", _named(r"(?P<name>[^\s<]+)"), CHANNELS,
         _CHANNEL_MARKS, "NAME <|constrain|>json<|message|>ARGUMENTS", several=False, names=r"[^\s<]+"),  # gpt-oss
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
