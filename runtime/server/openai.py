"""What OpenAI's protocols have in common: usage, reasons, log-probabilities, and the keys of requests."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from satchel.runtime.errors import PromptError
from satchel.runtime.generation.generator import Generator
from satchel.runtime.generation.options import GenerationOptions
from satchel.runtime.generation.request import Prompt, Request
from satchel.runtime.generation.result import Generation
from satchel.runtime.generation.sampling.logprobs import TokenLogprob
from satchel.runtime.generation.tokenizer import Tokenizer
from satchel.runtime.server.errors import RequestError
from satchel.runtime.server.fields import Field, flag, ignored, mapping, read, text, whole
from satchel.runtime.server.options import MOST_TOKENS, OWN
from satchel.runtime.server.records import totals

FINISH = {"stop": "stop", "length": "length", "loop": "length", "time": "length", "callback": "stop"}
"""The protocol's reason for each of satchel's."""

COMMON: dict[str, Field] = {
    **OWN,
    "model": text,
    "stream": flag,
    "stream_options": mapping,
    "n": whole(1, 16),
    "max_tokens": whole(1, MOST_TOKENS),
    "user": ignored,
    "metadata": ignored,
    "store": ignored,
    "service_tier": ignored,
    "prompt_cache_key": ignored,
    "prompt_cache_retention": ignored,
    "safety_identifier": ignored,
}
"""Keys of the requests of more than one endpoint."""

STREAM_OPTIONS: dict[str, Field] = {"include_usage": flag, "include_obfuscation": ignored}


def wants_usage(given: Mapping[str, Any]) -> bool:
    """Whether a stream is to end with its usage. Raises RequestError for wrong `stream_options`."""
    if "stream_options" not in given:
        return False
    if not given.get("stream"):
        raise RequestError(400, "stream_options: needs stream to be true", "stream_options", "invalid_value")
    return bool(read(given["stream_options"], STREAM_OPTIONS, where="stream_options.").get("include_usage"))


def new_id(prefix: str) -> str:
    """A name for an answer."""
    return f"{prefix}-{secrets.token_hex(12)}"


def usage(results: Sequence[Generation], prompts: int = 1) -> dict[str, Any]:
    """The token counts of results, of which several in a row have one of `prompts` prompts, which counts once."""
    each = max(1, len(results) // prompts)
    told, cached, _ = totals(results[::each])
    new = sum(result.new_tokens for result in results)
    return {
        "prompt_tokens": told,
        "completion_tokens": new,
        "total_tokens": told + new,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def checked_ids(generator: Generator, prompt: Prompt, param: str) -> Any:
    """The ids of a prompt that fits. Raises RequestError for one that can never fit, or is wrong."""
    try:
        ids = generator.encode(prompt)
    except PromptError as error:
        raise RequestError(400, str(error), param, "invalid_value") from None
    if len(ids) > generator.max_context:
        raise RequestError(
            400,
            f"the prompt has {len(ids)} tokens but the context holds {generator.max_context}: shorten it",
            param,
            "context_length_exceeded",
        )
    return ids


def prompts_of(value: Any, param: str, most: int) -> list[Any]:
    """The prompts of a request: a text, ids, or a list of either. Raises RequestError."""
    if isinstance(value, str) or _is_ids(value):
        return [value]
    if isinstance(value, list) and 0 < len(value) <= most and all(isinstance(p, str) or _is_ids(p) for p in value):
        return value
    words = f"must be a text, a list of token ids, or a list of up to {most} of those"
    raise RequestError(400, f"{param}: {words}", param, "invalid_value")


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int and 0 <= token < 2**31 for token in value)


def samples(ids: Any, options: GenerationOptions, count: int) -> list[Request]:
    """The requests for `count` answers to one prompt."""
    return [Request(ids, options, sample=sample) for sample in range(count)]


def token_entry(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    """A token as chats have it. The bytes of one that is part of a character are not known."""
    written = tokenizer.text_of(token)
    known = "\ufffd" not in written
    return {"token": written, "logprob": logprob, "bytes": list(written.encode()) if known else None}


def chat_logprobs(tokenizer: Tokenizer, entries: Iterable[TokenLogprob]) -> dict[str, Any]:
    """Log-probabilities as chats have them."""
    return {
        "content": [
            token_entry(tokenizer, each.token, each.logprob)
            | {"top_logprobs": [token_entry(tokenizer, *likely) for likely in each.top]}
            for each in entries
        ],
        "refusal": None,
    }
