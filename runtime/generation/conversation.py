"""A conversation: messages, the checkpoint's template, and a KV cache that grows from turn to turn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.errors import BundleError, PromptError
from satchel.runtime.generation.generator import Generator, Request
from satchel.runtime.generation.options import GenerationOptions
from satchel.runtime.generation.prefill import Progress
from satchel.runtime.generation.result import Generation
from satchel.runtime.generation.sampling.options import SamplingOptions, from_generation_config
from satchel.runtime.generation.sequence import Callback
from satchel.runtime.generation.session_file import SavedState
from satchel.runtime.generation.stream import TokenStream
from satchel.runtime.generation.templates.messages import check_messages

GENERATION_CONFIG = "generation_config.json"

Message = dict[str, Any]
Ids = NDArray[np.int64]


class Conversation:
    """Turns of a user and of the model, in the form of the bundle's chat template.

    A new turn prefills its own tokens only: the ids of what came before are kept as they were fed, and the generator
    keeps their keys and values, as far as its memory for prefixes allows. `messages` may be read at any time. An answer
    that is still open ends when the conversation is asked, reset, saved or replaced. A conversation belongs to one
    thread at a time; several may share a generator.
    """

    def __init__(
        self,
        generator: Generator,
        *,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        arguments: Mapping[str, Any] | None = None,
        options: GenerationOptions | None = None,
    ) -> None:
        """Begin, with a system prompt or without.

        `tools` are JSON schemas of functions, `arguments` further variables of the template. Without `options` those of
        the checkpoint's generation_config.json count, and an answer may fill the context. Raises BundleError for a
        bundle without a chat template, PromptError for one without a tokenizer or with a template that is wrong.
        """
        generator.need_tokenizer()
        self.generator = generator
        self.tools = tools
        self.arguments = dict(arguments or {})
        self.options = checkpoint_options(generator) if options is None else options
        self.messages: list[Message] = []
        self._ids: Ids = np.empty(0, np.int64)
        self._text = ""
        self._open_answer: Answer | None = None
        generator.template.start()
        self.reset(system)

    def reset(self, system: str | None = None) -> None:
        """Forget all turns, and begin with this system prompt; without one, with that of before."""
        self._end_answer()
        first = self.messages[:1]
        kept = first if system is None and first and first[0]["role"] == "system" else []
        self.messages = [{"role": "system", "content": system}] if system is not None else kept
        self._ids, self._text = np.empty(0, np.int64), ""

    def ask(
        self,
        message: str | Mapping[str, Any] | Sequence[Mapping[str, Any]],
        *,
        callback: Callback | None = None,
        progress: Progress = lambda count: None,
    ) -> Answer:
        """The model's answer to a user's text, or to messages of any roles (such as a tool's result), in pieces.

        `callback` and `progress` are as for `Generator.stream`. Raises PromptError, and leaves the conversation as it
        was, where the template refuses the messages or the context cannot hold them.
        """
        self._end_answer()
        if isinstance(message, str):
            message = {"role": "user", "content": message}
        new = [message] if isinstance(message, Mapping) else message
        check_messages(new)
        messages = [*self.messages, *map(dict, new)]
        text, ids = self._prompt(messages)
        if len(ids) > self.generator.max_context:
            raise PromptError(
                f"the conversation has {len(ids)} tokens but the context holds {self.generator.max_context}: "
                "reset it, or raise --max-context"
            )
        continuation = self.generator.continuation(Request(ids, self.options), callback=callback)
        stream = TokenStream(self.generator.engine, continuation, self.generator.store, progress)
        self._open_answer = Answer(self, stream, messages, text, ids)
        return self._open_answer

    def save_state(self, path: str | Path, *, option: str = "--save-state", progress: bool = False) -> int:
        """Write the messages and the keys and values of the conversation to one file. Returns the tokens in it.

        `option` and `progress` are as for `Generator.save_state`. Raises PromptError where there was no answer yet, and
        SatchelError where the file cannot be written.
        """
        self._end_answer()
        if not len(self._ids):
            raise PromptError("there is nothing to save yet: ask something first")
        details = {"text": self._text, "token_ids": self._ids.tolist()}
        return self.generator.save_state(
            path, self._ids, messages=self.messages, details=details, option=option, progress=progress
        )

    def load_state(self, path: str | Path, *, progress: bool = False) -> None:
        """Go on where `save_state` was called, in place of this conversation. Raises SatchelError; this one stays.

        Tools, arguments and options stay those of this one.
        """
        state = self.generator.load_state(path, check=partial(self._saved, path), progress=progress)
        self._end_answer()
        self._text, self._ids = self._saved(path, state)
        self.messages = [dict(message) for message in state.messages]

    def close(self) -> None:
        """End an answer that is still open, and the process that renders the template."""
        self._end_answer()
        self.generator.template.close()

    def _end_answer(self) -> None:
        answer, self._open_answer = self._open_answer, None
        if answer is not None:
            answer.close()

    def _saved(self, path: str | Path, state: SavedState) -> tuple[str, Ids]:
        """The text and the ids that `save_state` left in a state. Raises PromptError."""
        text, ids = state.details.get("text"), state.details.get("token_ids")
        if not (state.messages and isinstance(text, str) and isinstance(ids, list)):
            raise PromptError(f"{path}: holds no conversation: load a file that satchel chat saved")
        try:
            check_messages(state.messages)
            if not all(type(token) is int for token in ids):
                raise PromptError("token ids must be whole numbers")
            return text, self.generator.engine.check_ids(ids)
        except PromptError as error:
            raise PromptError(f"{path}: its conversation is wrong ({error}): load another file") from None

    def _prompt(self, messages: Sequence[Message]) -> tuple[str, Ids]:
        """The rendered text of messages, and its ids: those of before as they were, where the text begins with theirs.

        Encoding the whole anew could split an answer otherwise than the model wrote it, and what follows would have to
        be fed again. What is new is encoded alone only where it begins with a special token: nothing joins with that.
        """
        text = self.generator.template.render(messages, tools=self.tools, **self.arguments)
        tokenizer = self.generator.need_tokenizer()
        if self._text and text.startswith(self._text):
            new = tokenizer.encode_rendered(text[len(self._text) :])
            if new and tokenizer.is_hidden(new[0]):
                return text, np.concatenate([self._ids, np.asarray(new, np.int64)])
        return text, self.generator.engine.check_ids(tokenizer.encode_rendered(text))

    def _answered(self, answer: Generation, messages: list[Message], text: str, ids: Ids) -> None:
        """Take in an answer. Where a stop string cut it, its tokens say more than its text: then the text counts."""
        self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        cut = bool(self.options.stop) and answer.finish_reason == "stop"
        self._ids = np.concatenate([ids, np.asarray(answer.token_ids, np.int64)])
        self._text = "" if cut else text + answer.text


class Answer:
    """One answer in pieces: an iterator of non-empty strings, and a context manager.

    When it ends, or is left early, what there is of it joins the conversation. An answer without any text that was left
    early does not, and neither does one that failed: then it is as if the question had not been asked.
    """

    def __init__(
        self, conversation: Conversation, stream: TokenStream, messages: list[Message], text: str, ids: Ids
    ) -> None:
        self.prompt_tokens = len(ids)
        self._conversation = conversation
        self._stream = stream
        self._asked = (messages, text, ids)
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the answer."""
        self._stream.close()
        if self._open:
            self._open = False
            result = self._stream.result()
            if result.text or result.finish_reason != "closed":
                self._conversation._answered(result, *self._asked)

    def result(self) -> Generation:
        """Run what is left of the answer, if anything, and sum it up."""
        for _ in self:
            pass
        return self._stream.result()


def checkpoint_options(generator: Generator, given: Mapping[str, Any] | None = None) -> GenerationOptions:
    """How the checkpoint wants to be sampled (its generation_config.json), with the fields of `given` in their place.

    Without a limit in `given` an answer may fill the context. Raises BundleError for a file that makes no sense.
    """
    sampling = _generation_config(generator.engine.bundle)
    fields = {name: getattr(sampling, name) for name in SamplingOptions.__dataclass_fields__}
    return GenerationOptions(max_new_tokens=generator.max_context, **fields).updated(given or {})


def chat_ids(
    generator: Generator,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Ids:
    """The token ids of messages, up to where the answer begins. Raises PromptError and BundleError."""
    text = generator.template.render(messages, tools=tools, **(arguments or {}))
    return generator.engine.check_ids(generator.need_tokenizer().encode_rendered(text))


def _generation_config(bundle: Bundle) -> SamplingOptions:
    if GENERATION_CONFIG not in bundle.manifest.files:
        return SamplingOptions()
    path = bundle.folder / GENERATION_CONFIG
    try:
        document = json.loads(bundle.read(GENERATION_CONFIG))
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise BundleError(f"{path}: not a JSON object: export the bundle again")
    return from_generation_config(document)
