"""The chat template of a checkpoint: turns messages into the text that the model was trained to continue.

A template is a program that comes with the model and is not trusted. Jinja's sandbox bounds neither time nor memory, so
it is compiled and rendered in a child process under limits.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.errors import BundleError, PromptError
from satchel.runtime.generation.templates.render_process import TemplateProcess, request_line
from satchel.runtime.generation.tokenizer import Tokenizer

TEMPLATE_NAME = "chat_template.jinja"
CONFIG_NAME = "tokenizer_config.json"
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
    """A Jinja template and the special tokens that it may use. Threads may share one: they render one after another.

    The child process starts with the first rendering, is kept for the next, and is replaced if a rendering breaks it;
    `limits.py` has its limits.
    """

    def __init__(self, source: str, special: Mapping[str, str] | None = None) -> None:
        """`special` are strings by name, such as {"bos_token": "<s>"}."""
        self.source = source
        self.special = dict(special or {})
        self._lock = threading.Lock()
        self._process: TemplateProcess | None = None

    @classmethod
    def open(cls, bundle: Bundle, tokenizer: Tokenizer | None = None) -> ChatTemplate:
        """The template of a bundle. `tokenizer` is the bundle's, if it is open already.

        Raises BundleError for a bundle without a template, or with one that is not UTF-8.
        """
        if TEMPLATE_NAME not in bundle.manifest.files:
            raise BundleError(
                f"{bundle.folder}: has no chat template: use satchel run, or name one with --chat-template FILE"
            )
        return cls(_read_text(bundle, TEMPLATE_NAME), special_tokens(bundle, tokenizer))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **arguments: Any,
    ) -> str:
        """The text of a conversation, by default up to where the model's answer begins.

        `tools` are JSON schemas of functions, `documents` are objects with "title" and "text"; `arguments` are further
        variables of the template, and may replace a special token. Raises PromptError for invalid messages, and for
        every way in which a template can fail: in one line, and the next rendering works again.
        """
        check_messages(messages)
        variables = {
            **self.special,
            "messages": list(messages),
            "tools": None if tools is None else list(tools),
            "documents": None if documents is None else list(documents),
            "add_generation_prompt": add_generation_prompt,
            **arguments,
        }
        request = request_line({"variables": variables})
        with self._lock:
            process = self._started()
            try:
                return process.render(request)
            finally:
                if not process.usable:
                    self._stop()

    def start(self) -> None:
        """Start the child process and compile the template, unless that is done. Raises PromptError."""
        with self._lock:
            self._started()

    def close(self) -> None:
        """End the child process. A later rendering starts another one."""
        with self._lock:
            self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _started(self) -> TemplateProcess:
        if self._process is not None and not self._process.usable:
            self._stop()
        if self._process is None:
            self._process = TemplateProcess(self.source)
        return self._process

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.close()


def special_tokens(bundle: Bundle, tokenizer: Tokenizer | None = None) -> dict[str, str]:
    """The special tokens by name, as strings, from the bundle's tokenizer_config.json.

    BOS, EOS and padding that it does not mention are those of the manifest, as the tokenizer writes them. `tokenizer`
    None opens the bundle's if it is needed. Raises BundleError.
    """
    config = _read_config(bundle)
    named = {name: _content(config[name]) for name in SPECIAL_TOKENS if name in config}
    found = {name: text for name, text in named.items() if text is not None}
    model = bundle.manifest.model
    ids = {
        "bos_token": model.bos_token_id,
        "eos_token": next(iter(model.eos_token_ids), None),
        "pad_token": model.pad_token_id,
    }
    missing = {name: token for name, token in ids.items() if name not in config and token is not None}
    if missing and bundle.manifest.tokenizer is not None:
        tokenizer = tokenizer or Tokenizer.open(bundle)
        texts = {name: tokenizer.token_text(token) for name, token in missing.items()}
        found |= {name: text for name, text in texts.items() if text is not None}
    return found


def _content(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _read_config(bundle: Bundle) -> dict[str, Any]:
    if CONFIG_NAME not in bundle.manifest.files:
        return {}
    try:
        config = json.loads(_read_text(bundle, CONFIG_NAME))
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise BundleError(f"{bundle.folder / CONFIG_NAME}: not a JSON object: export the bundle again")
    return config


def _read_text(bundle: Bundle, name: str) -> str:
    try:
        return bundle.read(name).decode("utf-8")
    except UnicodeDecodeError as error:
        path = bundle.folder / name
        raise BundleError(f"{path}: not UTF-8 text (byte {error.start}): export the bundle again") from None


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise PromptError, naming the first wrong message by its index, unless all are messages of a chat.

    A message is an object with a `role`. Its `content` is a text, a list of parts (each an object with a `type`), or
    null or absent if there are `tool_calls`.
    """
    if not _is_list(messages) or not messages:
        raise PromptError("messages: must be a list with at least one message")
    for index, message in enumerate(messages):
        complaint = _complaint(message)
        if complaint:
            raise PromptError(f"messages[{index}]{complaint}")


def _complaint(message: Any) -> str | None:
    if not isinstance(message, Mapping):
        return f': must be an object like {{"role": "user", "content": "..."}}, found {type(message).__name__}'
    if not isinstance(message.get("role"), str):
        return '.role: must be a text such as "user"'
    content = message.get("content")
    if content is None:
        return None if message.get("tool_calls") else ".content: must be a text, unless there are tool_calls"
    if _is_list(content):
        wrong = (i for i, part in enumerate(content) if not _is_part(part))
        found = next(wrong, None)
        return None if found is None else f'.content[{found}]: must be an object with a "type"'
    return None if isinstance(content, str) else f".content: must be a text, found {type(content).__name__}"


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _is_part(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("type"), str)
