"""The messages of a chat, from OpenAI's form to that of chat templates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from satchel.runtime.errors import PromptError
from satchel.runtime.generation.generator import Generator
from satchel.runtime.server.errors import RequestError
from satchel.runtime.server.fields import Field, anything, ignored, objects, one_of, parse, read, refused, text
from satchel.runtime.server.openai import checked_ids

NO_OTHER = "satchel reads text only: leave it out"

MESSAGE: dict[str, Field] = {
    "role": one_of("system", "developer", "user", "assistant", "tool"),
    "content": anything,
    "name": text,
    "reasoning_content": text,
    "tool_calls": objects,
    "tool_call_id": text,
    "refusal": ignored,
    "annotations": ignored,
    "audio": refused(why=NO_OTHER),
    "function_call": refused(why="is not supported: use tool_calls"),
}
PART: dict[str, Field] = {
    "type": one_of("text", "input_text", "output_text"),
    "text": text,
    "annotations": ignored,
    "logprobs": ignored,
}
CALL: dict[str, Field] = {"id": text, "type": one_of("function"), "function": anything, "index": ignored}
FUNCTION: dict[str, Field] = {"name": text, "arguments": text}

RESERVED = ("messages", "tools", "documents", "template", "add_generation_prompt", "continue_final_message")


def for_template(messages: Any) -> list[dict[str, Any]]:
    """Messages as chat templates expect them: content as text, arguments of calls as objects, no "developer".

    Raises RequestError that names the part that is wrong.
    """
    if not isinstance(messages, list) or not messages:
        raise RequestError(400, "messages: must be a list with at least one message", "messages", "invalid_value")
    return [_message(message, f"messages[{index}].") for index, message in enumerate(messages)]


def chat_ids(
    generator: Generator,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    arguments: Mapping[str, Any] | None = None,
    unfinished: bool = False,
) -> tuple[str, Any]:
    """The text of messages in the chat template, and its ids; blocks for as long as rendering takes.

    `unfinished` leaves the last message open, to be continued. Raises RequestError if the template refuses them or they
    do not fit, and BundleError for a bundle without a template.
    """
    taken = next((name for name in arguments or {} if name in RESERVED), None)
    if taken:
        raise RequestError(400, f"chat_template_kwargs: {taken} is a reserved name", "chat_template_kwargs")
    if not generator.has_template:
        raise RequestError(400, "this model has no chat template: use /v1/completions", code="no_chat_template")
    try:
        rendered = generator.template.render(
            messages, tools=tools, continue_final_message=unfinished, **(arguments or {})
        )
        ids = generator.need_tokenizer().encode_rendered(rendered)
    except PromptError as error:
        raise RequestError(400, str(error), "messages", "invalid_messages") from None
    return rendered, checked_ids(generator, ids, "messages")


def content_text(content: Any, where: str) -> str:
    """The text of a content: a text, or a list of parts. Raises RequestError for other parts than text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(400, f"{where}: must be a text or a list of parts", where, "invalid_value")
    return "".join(
        read(part, PART, "type", "text", where=f"{where}[{place}].")["text"] for place, part in enumerate(content)
    )


def _message(message: Any, where: str) -> dict[str, Any]:
    given = read(message, MESSAGE, "role", where=where)
    given["role"] = "system" if given["role"] == "developer" else given["role"]
    if "content" in given:
        given["content"] = content_text(given["content"], f"{where}content")
    elif not given.get("tool_calls"):
        raise RequestError(400, f"{where}content: is missing: give a text", f"{where}content", "invalid_value")
    calls = given.get("tool_calls", [])
    if calls:
        given["tool_calls"] = [_call(call, f"{where}tool_calls[{place}].") for place, call in enumerate(calls)]
    return {key: value for key, value in given.items() if key not in ("refusal", "annotations")}


def _call(call: Any, where: str) -> dict[str, Any]:
    given = read(call, CALL, "function", where=where)
    function = read(given["function"], FUNCTION, "name", where=f"{where}function.")
    try:
        arguments = parse((function.get("arguments") or "{}").encode("utf-8", "surrogatepass"))
    except RequestError:
        raise RequestError(
            400, f"{where}function.arguments: must be a text of JSON", f"{where}function.arguments", "invalid_value"
        ) from None
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}} | (
        {"id": given["id"]} if "id" in given else {}
    )
