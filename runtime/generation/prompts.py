"""From prompts to token ids: texts as they are, and messages in a chat template."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.errors import PromptError
from satchel.runtime.execution.engine import Engine
from satchel.runtime.generation.request import Prompt
from satchel.runtime.generation.templates.chat_template import ChatTemplate, template_files
from satchel.runtime.generation.tokenizer import Tokenizer


class Prompts:
    """The tokenizer and the chat templates of an open bundle, for up to `max_context` tokens. Threads may share it."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None, max_context: int) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.max_context = max_context
        self._template: ChatTemplate | None = None
        self._template_lock = threading.Lock()

    def encode(self, prompt: Prompt) -> NDArray[np.int64]:
        """The token ids of a prompt, text or ids, checked; text is encoded as it is. Raises PromptError."""
        if not isinstance(prompt, str):
            return self.engine.check_ids(prompt)
        ids = self.need_tokenizer().encode(prompt)
        if not ids:
            raise PromptError("the prompt is empty: give some text to continue")
        return self.engine.check_ids(ids)

    def encode_chat(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        arguments: Mapping[str, Any] | None = None,
        template: str | None = None,
    ) -> NDArray[np.int64]:
        """The token ids of messages in the chat template, up to where the answer begins.

        A text is one message of a user. `tools` are JSON schemas of functions, `arguments` further variables of the
        template. `template` names one of several templates; None takes that for tools if there are tools, else the
        default one. Raises PromptError, and BundleError for a bundle without a template.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        text = self.template.render(messages, tools=tools, template=template, **(arguments or {}))
        return self.engine.check_ids(self.need_tokenizer().encode_rendered(text))

    @property
    def has_template(self) -> bool:
        """Whether there are chat templates: the bundle's, or others that were set."""
        return self._template is not None or bool(template_files(self.engine.bundle))

    @property
    def template(self) -> ChatTemplate:
        """The chat templates: the bundle's, unless others were set. Raises BundleError for a bundle without one."""
        with self._template_lock:
            if self._template is None:
                self._template = ChatTemplate.open(self.engine.bundle, self.need_tokenizer())
            return self._template

    @template.setter
    def template(self, template: ChatTemplate) -> None:
        self._template = template

    def need_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises PromptError for a bundle without one."""
        if self.tokenizer is None:
            raise PromptError("this bundle has no tokenizer: pass token ids from Python")
        return self.tokenizer

    def _check_length(self, ids: NDArray[np.int64]) -> None:
        if len(ids) > self.max_context:
            raise PromptError(
                f"the prompt has {len(ids)} tokens but the context holds {self.max_context}: shorten the prompt "
                f"or raise --max-context (this bundle allows up to {self.engine.max_context})"
            )
