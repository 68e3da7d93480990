"""Options of a generation request. Standard library only."""

from __future__ import annotations

import argparse
import math
import numbers
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from satchel.runtime.errors import PromptError
from satchel.runtime.generation.grammar import Grammar
from satchel.runtime.generation.sampling import options as sampling
from satchel.runtime.generation.sampling.table import BY_FIELD
from satchel.runtime.util.defaults import CHAT_MAX_NEW_TOKENS, CHAT_MAX_REPEATS, MAX_NEW_TOKENS

MAX_LOGPROBS = 100
KEYS = ("max_new_tokens", "stop", "max_repeats", "time_limit", "logprobs", "adapter", "grammar", "max_thinking_tokens")

# They choose tokens, or rule out the end, whatever a grammar allows.
FORCING = ("forced_bos_token_id", "forced_eos_token_id", "min_new_tokens", "min_length")

CHAT_DEFAULTS: dict[str, Any] = {"max_new_tokens": CHAT_MAX_NEW_TOKENS, "max_repeats": CHAT_MAX_REPEATS}
"""Defaults for an answer in a chat template, in place of those of `GenerationOptions`."""


@dataclass(frozen=True)
class GenerationOptions(sampling.SamplingOptions):
    """How a prompt is continued and when generation ends; the fields of `SamplingOptions` say how tokens are chosen.

    Attributes:
        max_new_tokens: Maximum number of new tokens; 0 runs nothing.
        stop: Texts that end generation; neither they nor what follows is shown.
        max_repeats: End when the last tokens are one block so many times in a row, and at least 128 tokens; 0 is off.
        time_limit: Maximum seconds, from the start of prefill; None for no limit.
        logprobs: Record the log-probability of each token and of this many most likely ones; None records nothing.
        adapter: The name of one of the bundle's adapters; None, or an empty text, for the base model.
        grammar: What the text must match, as a `Grammar` or a mapping of its kind to its source; None for any text.
        max_thinking_tokens: End the reasoning of a model after so many tokens of it; None for no limit.
    """

    max_new_tokens: int = MAX_NEW_TOKENS
    stop: tuple[str, ...] = ()
    max_repeats: int = 0
    time_limit: float | None = None
    logprobs: int | None = None
    adapter: str | None = None
    grammar: Grammar | None = None
    max_thinking_tokens: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        stop: Collection[str] = (self.stop,) if isinstance(self.stop, str) else self.stop
        object.__setattr__(self, "stop", tuple(stop))
        object.__setattr__(self, "adapter", self.adapter or None)
        if self.grammar is not None:
            object.__setattr__(self, "grammar", Grammar.of(self.grammar))

    def check_all(self, vocabulary: int, where: str | None = None) -> None:
        """Raise PromptError for values out of range and for options that contradict each other.

        `vocabulary` is the number of token ids; `where` is a place in a file, which messages then name.
        """
        if not _whole(self.max_new_tokens) or self.max_new_tokens < 0:
            raise PromptError(f"{_name('max_new_tokens', where)} {self.max_new_tokens}: must be 0 or more")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise PromptError(f"{_name('stop', where)}: must be a text of at least one character")
        if not _whole(self.max_repeats) or self.max_repeats < 0 or self.max_repeats == 1:
            raise PromptError(f"{_name('max_repeats', where)} {self.max_repeats}: must be 2 or more, or 0 for off")
        if self.max_thinking_tokens is not None and not (
            _whole(self.max_thinking_tokens) and self.max_thinking_tokens > 0
        ):
            name = _name("max_thinking_tokens", where)
            raise PromptError(f"{name} {self.max_thinking_tokens}: must be 1 or more")
        if self.time_limit is not None and not (_number(self.time_limit) and 0 < self.time_limit < math.inf):
            raise PromptError(f"{_name('time_limit', where)} {self.time_limit}: must be seconds, above 0")
        if self.logprobs is not None and not (_whole(self.logprobs) and 0 <= self.logprobs <= MAX_LOGPROBS):
            raise PromptError(f"{_name('logprobs', where)} {self.logprobs}: must be from 0 to {MAX_LOGPROBS}")
        for option in (BY_FIELD[field] for field in FORCING if self.grammar is not None and self.differs(field)):
            raise PromptError(f"{option.name(where)}: cannot be combined with a grammar: remove one")
        self.check(self.max_new_tokens, vocabulary, where)


def add_flags(parser: argparse.ArgumentParser, *, chat: bool = False) -> None:
    """Add a flag for each option, without defaults: `given_in` tells which were given. `chat`: for `satchel chat`."""
    parser.add_argument(
        "--adapter", metavar="NAME", help="one of the bundle's adapters (default: none, the base model)"
    )
    group = parser.add_argument_group("when generation ends")
    raw = "" if chat else f"; {MAX_NEW_TOKENS} for a raw prompt"
    group.add_argument(
        "-n", "--max-new-tokens", metavar="N", type=int,
        help=f"maximum number of new tokens (default: {CHAT_MAX_NEW_TOKENS}{raw})",
    )  # fmt: skip
    group.add_argument("--stop", metavar="TEXT", action="append", help="end before this text; may be repeated")
    off = "" if chat else "; off for a raw prompt"
    group.add_argument(
        "--max-repeats", metavar="N", type=int,
        help=f"end when a block of tokens is repeated N times in a row; 0 is off (default: {CHAT_MAX_REPEATS}{off})",
    )  # fmt: skip
    group.add_argument(
        "--max-thinking-tokens", metavar="N", type=int, help="end the reasoning of a model after N tokens of it"
    )
    group.add_argument("--time-limit", metavar="SECONDS", type=float, help="end after this time")
    parser.add_argument(
        "--logprobs", metavar="N", type=int,
        help="with --json or --input: the log-probability of each new token and of the N most likely ones"
        if not chat else "with --json: the log-probability of each new token and of the N most likely ones",
    )  # fmt: skip
    sampling.add_flags(parser)


def given_in(args: argparse.Namespace) -> dict[str, Any]:
    """The options given on a parsed command line, by field."""
    own = {key: value for key in KEYS if (value := getattr(args, key, None)) is not None}
    return own | sampling.given_in(args)


def in_chat(options: dict[str, Any]) -> dict[str, Any]:
    """Options for an answer in a chat template: before what a grammar demands, a model may reason."""
    grammar = options.get("grammar")
    return options if grammar is None else options | {"grammar": replace(Grammar.of(grammar), chat=True)}


def from_mapping(values: Mapping[str, object], where: str) -> dict[str, Any]:
    """The options of a parsed JSON object, by field; `where` names its place in messages ("line 7").

    Raises PromptError for an unknown key or a wrong type; `GenerationOptions.check_all` checks the values.
    """
    own = {key: value for key, value in values.items() if key in KEYS and value is not None}
    for key, right, what in (
        ("max_new_tokens", _whole, "a whole number"),
        ("max_repeats", _whole, "a whole number"),
        ("max_thinking_tokens", _whole, "a whole number"),
        ("time_limit", _number, "a number of seconds"),
        ("logprobs", _whole, "a whole number"),
        ("stop", _texts, "a text or a list of texts"),
        ("adapter", lambda value: isinstance(value, str), "the name of an adapter"),
    ):
        if key in own and not right(own[key]):
            raise PromptError(f"{where}: {key} {str(own[key])[:60]!r}: must be {what}")
    if "grammar" in own:
        own["grammar"] = Grammar.of(own["grammar"], f"{where}: grammar")
    return own | sampling.from_mapping({key: value for key, value in values.items() if key not in KEYS}, where)


def _whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _texts(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(text, str) for text in value))


def _name(field: str, where: str | None) -> str:
    return f"--{field.replace('_', '-')}" if where is None else f"{where}: {field}"
