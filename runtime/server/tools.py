"""The tools of a request, and which of them an answer is to call: from each protocol's form to OpenAI's of chats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from satchel.runtime.server.errors import RequestError
from satchel.runtime.server.fields import Field, flag, ignored, mapping, one_of, read, refused, text

LOOSE = "arguments are not constrained: leave it out"

FUNCTION: dict[str, Field] = {
    "name": text,
    "description": text,
    "parameters": mapping,
    "strict": refused(False, why=LOOSE),
}
TOOL: dict[str, Field] = {"type": one_of("function"), "function": mapping}
RESPONSES_TOOL: dict[str, Field] = {"type": one_of("function"), **FUNCTION}
ANTHROPIC_TOOL: dict[str, Field] = {
    "type": one_of("custom"),
    "name": text,
    "description": text,
    "input_schema": mapping,
    "strict": refused(False, why=LOOSE),
    "cache_control": ignored,
    "input_examples": ignored,
    "eager_input_streaming": ignored,
}
NAMED: dict[str, Field] = {"type": one_of("function"), "function": mapping}
RESPONSES_NAMED: dict[str, Field] = {"type": one_of("function"), "name": text}
ANTHROPIC_CHOICE: dict[str, Field] = {
    "type": one_of("auto", "any", "tool", "none"),
    "name": text,
    "disable_parallel_tool_use": flag,
}
WORDS = ("none", "auto", "required")


@dataclass(frozen=True)
class Tools:
    """The tools that a model is told of, and what is asked of its answer.

    Attributes:
        functions: The tools in OpenAI's form of chats.
        choice: "auto"; "required" for one call or more.
        name: The tool that must be called, if one must.
        several: Whether an answer may have more than one call.
    """

    functions: tuple[dict[str, Any], ...] = ()
    choice: str = "auto"
    name: str | None = None
    several: bool = True


NO_TOOLS = Tools()


def chat_tools(given: Mapping[str, Any]) -> Tools:
    """The tools of a chat completion. Raises RequestError."""
    functions = []
    for place, tool in enumerate(given.get("tools", [])):
        where = f"tools[{place}]."
        function = read(tool, TOOL, "type", "function", where=where)["function"]
        functions.append(_function(function, FUNCTION, f"{where}function.", "parameters"))
    choice = given.get("tool_choice", "auto")
    if isinstance(choice, dict):
        function = read(choice, NAMED, "type", "function", where="tool_choice.")["function"]
        choice = read(function, {"name": text}, "name", where="tool_choice.function.")
    return _tools(functions, choice, given.get("parallel_tool_calls", True))


def responses_tools(given: Mapping[str, Any]) -> Tools:
    """The tools of a response. Raises RequestError."""
    functions = [
        _function(tool, RESPONSES_TOOL, f"tools[{place}].", "parameters", "type")
        for place, tool in enumerate(given.get("tools", []))
    ]
    choice = given.get("tool_choice", "auto")
    if isinstance(choice, dict):
        choice = read(choice, RESPONSES_NAMED, "type", "name", where="tool_choice.")
    return _tools(functions, choice, given.get("parallel_tool_calls", True))


def anthropic_tools(given: Mapping[str, Any]) -> Tools:
    """The tools of a message. Raises RequestError."""
    functions = [
        _function(tool, ANTHROPIC_TOOL, f"tools[{place}].", "input_schema")
        for place, tool in enumerate(given.get("tools", []))
    ]
    choice = read(given.get("tool_choice", {"type": "auto"}), ANTHROPIC_CHOICE, "type", where="tool_choice.")
    if choice["type"] == "tool" and "name" not in choice:
        raise RequestError(400, "tool_choice.name: is missing: give it", "tool_choice.name")
    word: Any = choice if choice["type"] == "tool" else {"any": "required"}.get(choice["type"], choice["type"])
    return _tools(functions, word, not choice.get("disable_parallel_tool_use"))


def _function(tool: Any, table: Mapping[str, Field], where: str, schema: str, *needed: str) -> dict[str, Any]:
    given = read(tool, table, "name", *needed, where=where)
    if not given["name"]:
        raise RequestError(400, f"{where}name: must not be empty", f"{where}name", "invalid_value")
    function = {"name": given["name"]}
    function |= {"description": given["description"]} if "description" in given else {}
    return {"type": "function", "function": function | ({"parameters": given[schema]} if schema in given else {})}


def _tools(functions: Sequence[dict[str, Any]], choice: Any, several: bool) -> Tools:
    """`choice` is one of `WORDS`, or an object with the name of a tool."""
    name = choice["name"] if isinstance(choice, dict) else None
    if name is None and choice not in WORDS:
        raise RequestError(400, "tool_choice: must be none, auto, required or a tool", "tool_choice", "invalid_value")
    if choice in ("none", "auto"):
        return Tools(tuple(functions) if choice == "auto" else (), several=several)
    if not any(name in (None, tool["function"]["name"]) for tool in functions):
        what = "there are no tools" if name is None else f"there is no tool {name[:60]}"
        raise RequestError(400, f"tool_choice: {what}", "tool_choice", "invalid_value")
    return Tools(tuple(functions), "required", name, several)
