"""A conversation: messages, the chat template, and a KV cache that grows from turn to turn."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.errors import PromptError
from satchel.runtime.generation.generation_config import read_stored, stored_options
from satchel.runtime.generation.generator import Generator
from satchel.runtime.generation.options import CHAT_DEFAULTS, GenerationOptions, in_chat
from satchel.runtime.generation.prefill import Progress
from satchel.runtime.generation.request import Request
from satchel.runtime.generation.result import Generation
from satchel.runtime.generation.sequence import Callback
from satchel.runtime.generation.session_file import SavedState
from satchel.runtime.generation.stream import TokenStream
from satchel.runtime.generation.templates.messages import check_messages

LEADING_ROLES = ("system", "developer")  # of messages that are never dropped

Message = dict[str, Any]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class _Prompt:
    """What is fed for an answer: the messages, their rendered text and its ids; `dropped` messages were left out."""

    messages: list[Message]
    text: str
    ids: Ids
    dropped: int = 0


class Conversation:
    """Turns of a user and of the model, in the bundle's chat template.

    A new turn prefills its own tokens only: token ids of earlier turns stay as they were fed, and the prefix cache has
    their keys and values. Where a question and room for its answer, a quarter of the context at most, do not fit any
    more, the oldest turns are dropped until the rest takes half of the context; the system prompt stays. `messages` has
    what the model sees and may be read at any time. An answer that is still open ends when the conversation is asked,
    reset, saved or replaced. A conversation belongs to one thread at a time; several may share a generator.
    """

    def __init__(
        self,
        generator: Generator,
        *,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        arguments: Mapping[str, Any] | None = None,
        options: GenerationOptions | None = None,
        template: str | None = None,
    ) -> None:
        """Begin, with or without a system prompt.

        `tools` are JSON schemas of functions, `arguments` further variables of the template. `options` None means
        `checkpoint_options`. `template` names one of several templates, as in `Generator.encode_chat`. Raises
        BundleError for a bundle without a chat template, PromptError for one without a tokenizer or with an invalid
        template, and for a grammar that cannot be compiled.
        """
        generator.need_tokenizer()
        self.generator = generator
        self.tools = tools
        self.arguments = dict(arguments or {})
        self.template = template
        options = checkpoint_options(generator) if options is None else options
        if options.grammar is not None:
            generator.check_grammar(options.grammar)
        self.options = replace(options, **in_chat({"grammar": options.grammar}))
        self.messages: list[Message] = []
        self.dropped_messages = 0
        self._ids: Ids = np.empty(0, np.int64)
        self._text = ""
        self._open_answer: Answer | None = None
        generator.template.start(template, tools)
        self.reset(system)

    def reset(self, system: str | None = None) -> None:
        """Forget all turns and start again with this system prompt; None keeps the current one."""
        self._end_answer()
        first = self.messages[:1]
        kept = first if system is None and first and first[0]["role"] == "system" else []
        self.messages = [{"role": "system", "content": system}] if system is not None else kept
        self._ids, self._text, self.dropped_messages = np.empty(0, np.int64), "", 0

    def ask(
        self,
        message: str | Mapping[str, Any] | Sequence[Mapping[str, Any]],
        *,
        callback: Callback | None = None,
        progress: Progress = lambda count: None,
    ) -> Answer:
        """The model's answer, in pieces, to a user's text or to messages of any role (such as a tool's result).

        `callback` and `progress` are as for `Generator.stream`. Raises PromptError, and leaves the conversation as it
        was, if the template refuses the messages or the context cannot hold the last turn.
        """
        self._end_answer()
        if isinstance(message, str):
            message = {"role": "user", "content": message}
        new = [message] if isinstance(message, Mapping) else message
        check_messages(new)
        prompt = self._fitted([*self.messages, *map(dict, new)])
        sequence = self.generator.new_sequence(Request(prompt.ids, self.options), callback=callback)
        stream = TokenStream(self.generator.engine, sequence, self.generator.prefix_cache, progress)
        answer = Answer(stream, len(prompt.ids), prompt.dropped, partial(self._add_answer, prompt))
        self._open_answer = answer
        return answer

    def save_state(self, path: str | Path, *, option: str = "--save-state", progress: bool = False) -> int:
        """Save the messages, keys and values of the conversation to one file. Returns the number of tokens in it.

        `option` and `progress` are as for `Generator.save_state`. Raises PromptError before the first answer, and
        SatchelError if the file cannot be written.
        """
        self._end_answer()
        if not len(self._ids):
            raise PromptError("there is nothing to save yet: ask something first")
        details = {"text": self._text, "token_ids": self._ids.tolist()}
        return self.generator.save_state(
            path, self._ids, messages=self.messages, details=details, option=option, progress=progress,
            adapter=self.options.adapter,
        )  # fmt: skip

    def load_state(self, path: str | Path, *, progress: bool = False) -> None:
        """Replace this conversation by a saved one. Raises SatchelError, and then keeps this one.

        Tools, arguments and options stay as they are.
        """
        state = self.generator.load_state(
            path, check=partial(self._saved, path), progress=progress, adapter=self.options.adapter
        )
        self._end_answer()
        self._text, self._ids = self._saved(path, state)
        self.messages = [dict(message) for message in state.messages]
        self.dropped_messages = 0

    def close(self) -> None:
        """End an open answer and the process that renders the template."""
        self._end_answer()
        self.generator.template.close()

    def _end_answer(self) -> None:
        answer, self._open_answer = self._open_answer, None
        if answer is not None:
            answer.close()

    def _saved(self, path: str | Path, state: SavedState) -> tuple[str, Ids]:
        """The text and the ids that `save_state` put into a state. Raises PromptError."""
        text, ids = state.details.get("text"), state.details.get("token_ids")
        if not (state.messages and isinstance(text, str) and isinstance(ids, list)):
            raise PromptError(f"{path}: does not hold a conversation: load a file that satchel chat saved")
        try:
            check_messages(state.messages)
            if not all(type(token) is int for token in ids):
                raise PromptError("token ids must be whole numbers")
            return text, self.generator.engine.check_ids(ids)
        except PromptError as error:
            raise PromptError(f"{path}: its conversation is wrong ({error}): load another file") from None

    def _fitted(self, messages: list[Message]) -> _Prompt:
        """The prompt of messages, without the oldest turns where they do not fit. Raises PromptError.

        Dropping turns changes the beginning, so what is left has to be fed again: half of the context is freed at once,
        and the next turns are cheap.
        """
        context = self.generator.max_context
        prompt = self._prompt(messages)
        if len(prompt.ids) + min(self.options.max_new_tokens, context // 4) <= context + 1:
            return prompt
        first = next((i for i, message in enumerate(messages) if message["role"] not in LEADING_ROLES), len(messages))
        turns = [i for i in range(first + 1, len(messages)) if messages[i]["role"] == "user"]

        def without(start: int) -> _Prompt:
            return self._prompt([*messages[:first], *messages[start:]], dropped=start - first)

        if turns:
            place = bisect_left(turns, True, key=lambda start: len(without(start).ids) <= context // 2)
            prompt = without(turns[min(place, len(turns) - 1)])
        if len(prompt.ids) > context:
            raise PromptError(
                f"the question has {len(prompt.ids)} tokens but the context holds {context}: shorten it, or raise "
                "--max-context"
            )
        return prompt

    def _prompt(self, messages: list[Message], dropped: int = 0) -> _Prompt:
        """Messages rendered and encoded: with the known ids where the text begins with the known text.

        Encoding the whole anew could split an answer differently from the model, and what follows would have to be fed
        again. Only new text that begins with a special token is encoded alone: no token spans that boundary.
        """
        text = self.generator.template.render(messages, tools=self.tools, template=self.template, **self.arguments)
        tokenizer = self.generator.need_tokenizer()
        if self._text and text.startswith(self._text):
            new = tokenizer.encode_rendered(text[len(self._text) :])
            if new and tokenizer.is_hidden(new[0]):
                ids = np.concatenate([self._ids, np.asarray(new, np.int64)])
                return _Prompt(messages, text, ids, dropped)
        return _Prompt(messages, text, self.generator.engine.check_ids(tokenizer.encode_rendered(text)), dropped)

    def _add_answer(self, prompt: _Prompt, answer: Generation) -> None:
        """Add an answer to the messages. Where a stop string cut it, its tokens hold more than its text."""
        self.messages = [*prompt.messages, {"role": "assistant", "content": answer.text}]
        self.dropped_messages += prompt.dropped
        cut = bool(self.options.stop) and answer.finish_reason == "stop"
        self._ids = np.concatenate([prompt.ids, np.asarray(answer.token_ids, np.int64)])
        self._text = "" if cut else prompt.text + answer.text


class Answer:
    """One answer in pieces: an iterator of non-empty strings, and a context manager.

    When it ends or is left early, its text joins the conversation. An answer that failed, or that was left before any
    text came, does not: it is then as if the question had not been asked.

    Attributes:
        prompt_tokens: The number of tokens of the prompt.
        dropped_messages: How many of the oldest messages were dropped to make room for this answer.
    """

    def __init__(
        self, stream: TokenStream, prompt_tokens: int, dropped_messages: int, on_end: Callable[[Generation], None]
    ) -> None:
        """`on_end` gets the result, once, if the answer joins the conversation."""
        self.prompt_tokens = prompt_tokens
        self.dropped_messages = dropped_messages
        self._stream = stream
        self._on_end = on_end
        self._open = True

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        try:
            return next(self._stream)
        except StopIteration:
            self.close()
            raise
        except Exception:
            self._open = False
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the answer."""
        self._stream.close()
        if self._open:
            self._open = False
            result = self._stream.result()
            if result.text or result.finish_reason != "closed":
                self._on_end(result)

    def result(self) -> Generation:
        """Run the rest of the answer, if any, and return the result."""
        for _ in self:
            pass
        return self._stream.result()


def checkpoint_options(generator: Generator, given: Mapping[str, Any] | None = None) -> GenerationOptions:
    """The options of the checkpoint (its generation_config.json) and `CHAT_DEFAULTS`, overridden by `given`.

    A wrong value in the file that `given` does not replace is left out with a warning. Raises BundleError for a file
    that is not a JSON object.
    """
    given, bundle = given or {}, generator.engine.bundle
    stored = stored_options(read_stored(bundle), given, bundle.manifest.model.vocab_size)
    return GenerationOptions(**CHAT_DEFAULTS | stored).updated(given)
