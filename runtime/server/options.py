"""The options of a request: satchel's own by their names, and the names that protocols have for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from satchel.runtime.errors import PromptError
from satchel.runtime.generation.grammar import Grammar
from satchel.runtime.generation.options import GenerationOptions, from_mapping
from satchel.runtime.generation.sampling.options import DRAW_ONLY
from satchel.runtime.generation.sampling.table import OPTIONS, Option
from satchel.runtime.server.errors import RequestError
from satchel.runtime.server.fields import Field, text, texts, whole

MOST_TOKENS = 2**31 - 1
MOST_LOGPROBS = 20

RENAMED = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "max_output_tokens": "max_new_tokens",
    "stop_sequences": "stop",
}
"""Names in protocols of satchel's options."""


def _field(option: Option) -> Field:
    def wrong(value: Any) -> str | None:
        try:
            from_mapping({option.field: value}, "")
        except PromptError as error:
            return str(error).removeprefix(f": {option.field}")
        return None

    return wrong


def _grammar(value: Any) -> str | None:
    try:
        Grammar.of(value, "")
    except PromptError as error:
        return str(error)
    return None


OWN: dict[str, Field] = {
    **{option.field: _field(option) for option in OPTIONS},
    "stop": texts,
    "max_repeats": whole(0, MOST_TOKENS),
    "max_thinking_tokens": whole(1, MOST_TOKENS),
    "adapter": text,
    "grammar": _grammar,
}
"""Satchel's options, which requests of all protocols may have."""


KEYS = {*OWN, *RENAMED, "logprobs"}
"""The keys of a request that are options; protocols check the last one in their own ways."""


def options_of(given: Mapping[str, Any], base: GenerationOptions, vocabulary: int) -> GenerationOptions:
    """The options among the checked keys of a request, over those of the checkpoint.

    At temperature 0, options that say how to sample have no effect. Raises RequestError for values that contradict each
    other, or that this bundle does not allow.
    """
    values = {RENAMED.get(key, key): value for key, value in given.items() if key in KEYS}
    greedy = values.get("temperature", base.temperature) == 0
    dropped = DRAW_ONLY if greedy and "temperature" in values else ("seed",) if greedy else ()
    try:
        options = base.updated(from_mapping({key: v for key, v in values.items() if key not in dropped}, "the request"))
        options.check_all(vocabulary, "the request")
    except PromptError as error:
        raise RequestError(400, str(error), code="invalid_value") from None
    return options
