"""The chat template of a checkpoint: turns messages into the text that the model was trained to continue.

A template is a program that comes with the model and is not trusted. Jinja's sandbox bounds neither time nor memory, so
it is compiled and rendered in a child process under limits.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Self

from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.errors import BundleError, PromptError
from satchel.runtime.generation.templates.messages import check_messages, cut_at_ending, normalized, open_ending
from satchel.runtime.generation.templates.render_process import TemplateProcess, request_line
from satchel.runtime.generation.tokenizer import Tokenizer
from satchel.runtime.util.terminal import printable

DEFAULT, TOOL_USE = "default", "tool_use"
"""Names of the template that is taken if none is named: TOOL_USE, if there is one and tools are given, else DEFAULT."""

TEMPLATE_FILE = re.compile(r"chat_template(?:\.([A-Za-z0-9_][A-Za-z0-9_.-]{0,63}))?\.jinja")
"""The names of files in a bundle that hold chat templates; without a name in it, the default one."""

CONFIG_NAME = "tokenizer_config.json"


class ChatTemplate:
    """Jinja templates by name, and the special tokens that they may use.

    Threads may share one: they render one after another. The child process of a template starts with its first
    rendering, is kept for the next, and is replaced if a rendering breaks it; `limits.py` has its limits.
    """

    def __init__(self, source: str | Mapping[str, str], special: Mapping[str, str] | None = None) -> None:
        """`source` is one template, or several by name; `special` are strings by name, such as {"bos_token": "<s>"}."""
        self.sources = {DEFAULT: source} if isinstance(source, str) else dict(source)
        self.special = dict(special or {})
        self._lock = threading.Lock()
        self._processes: dict[str, TemplateProcess] = {}

    @classmethod
    def open(cls, bundle: Bundle, tokenizer: Tokenizer | None = None) -> ChatTemplate:
        """The templates of a bundle. `tokenizer` is the bundle's, if it is open already.

        Raises BundleError for a bundle without a template, or with one that is not UTF-8.
        """
        files = template_files(bundle)
        if not files:
            raise BundleError(
                f"{bundle.folder}: has no chat template: use satchel run, or name one with --chat-template FILE"
            )
        sources = {name: _read_text(bundle, file) for name, file in files.items()}
        return cls(sources, special_tokens(bundle, tokenizer))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | str = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        **arguments: Any,
    ) -> str:
        """The text of a conversation, by default up to where the model's answer begins.

        `continue_final_message` ends the text inside the last message instead, for the model to continue its content,
        or the key of that name. `tools` are JSON schemas of functions, `documents` are objects with "title" and "text".
        `template` names one of several templates; None chooses as transformers does. `arguments` are further variables
        of the template, and may replace a special token. Raises PromptError for invalid messages, and for every way in
        which a template can fail: in one line, and the next rendering works again.
        """
        check_messages(messages)
        prompt = not continue_final_message if add_generation_prompt is None else add_generation_prompt
        if add_generation_prompt and continue_final_message:
            raise PromptError("add_generation_prompt and continue_final_message exclude each other: leave one out")
        name = self.choose(template, tools)
        ending = None
        given = normalized(messages)
        if continue_final_message:
            key = continue_final_message if isinstance(continue_final_message, str) else "content"
            ending = open_ending(given, key, self.sources[name])
        variables = {
            **self.special,
            "messages": given,
            "tools": None if tools is None else list(tools),
            "documents": None if documents is None else list(documents),
            "add_generation_prompt": prompt,
            **arguments,
        }
        text = self._render(name, request_line({"variables": variables}))
        return text if ending is None else cut_at_ending(text, ending)

    def choose(self, template: str | None, tools: object = None) -> str:
        """The name of the template to render. Raises PromptError if there is none."""
        names = f"choose {' or '.join(map(printable, self.sources))}"
        if template is not None:
            if template not in self.sources:
                raise PromptError(f"--template {printable(template)}: there is no such chat template: {names}")
            return template
        if tools is not None and TOOL_USE in self.sources:
            return TOOL_USE
        if DEFAULT not in self.sources:
            raise PromptError(f"none of several chat templates is the default: {names} with --template")
        return DEFAULT

    def start(self, template: str | None = None, tools: object = None) -> None:
        """Start the child process and compile the template, unless that is done. Raises PromptError."""
        name = self.choose(template, tools)
        with self._lock:
            self._started(name)

    def close(self) -> None:
        """End the child processes. A later rendering starts another one."""
        with self._lock:
            for name in [*self._processes]:
                self._stop(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _render(self, name: str, request: bytes) -> str:
        with self._lock:
            process = self._started(name)
            try:
                return process.render(request)
            finally:
                if not process.usable:
                    self._stop(name)

    def _started(self, name: str) -> TemplateProcess:
        if name in self._processes and not self._processes[name].usable:
            self._stop(name)
        if name not in self._processes:
            self._processes[name] = TemplateProcess(self.sources[name])
        return self._processes[name]

    def _stop(self, name: str) -> None:
        self._processes.pop(name).close()


def template_files(bundle: Bundle) -> dict[str, str]:
    """The files of a bundle's chat templates, by the names of the templates."""
    found = ((TEMPLATE_FILE.fullmatch(file), file) for file in sorted(bundle.manifest.files))
    return {match[1] or DEFAULT: file for match, file in found if match is not None}


def template_file(name: str) -> str:
    """The file of a bundle that holds the template of this name."""
    return "chat_template.jinja" if name == DEFAULT else f"chat_template.{name}.jinja"


def special_tokens(bundle: Bundle, tokenizer: Tokenizer | None = None) -> dict[str, str]:
    """The special tokens by name, as strings, from the bundle's tokenizer_config.json: the standard ones and others.

    BOS, EOS and padding that it does not mention are those of the manifest, as the tokenizer writes them. `tokenizer`
    None opens the bundle's if it is needed. Raises BundleError.
    """
    config = _read_config(bundle)
    extra = config.get("extra_special_tokens")
    tokens = {name: value for name, value in config.items() if name.endswith("_token")}
    named = {name: _content(value) for name, value in (tokens | (extra if isinstance(extra, dict) else {})).items()}
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
