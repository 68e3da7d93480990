"""Sampling options: their values, checks, and how flags, JSON and a checkpoint give them. Standard library only."""

from __future__ import annotations

import argparse
import dataclasses
import json
import numbers
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

from satchel.runtime.errors import PromptError
from satchel.runtime.generation.sampling.table import BY_FIELD, OPTIONS, Option, shown
from satchel.runtime.generation.sampling.token_rules import Ids, ids_in

# They affect sampling alone, so they contradict a temperature of 0.
DRAW_ONLY = ("top_k", "top_p", "min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff", "seed")


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen from logits. The default is greedy; `OPTIONS` describes each field.

    Values are not checked here but by `check`. `logit_bias` is copied, and read-only.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    top_h: float = 0.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict, hash=False)
    min_new_tokens: int = 0
    min_length: int = 0
    suppress_tokens: Ids = ()
    begin_suppress_tokens: Ids = ()
    bad_words_ids: tuple[Ids, ...] = ()
    sequence_bias: tuple[tuple[Ids, float], ...] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_id: Ids | None = None
    exponential_decay_length_penalty: tuple[int, float] | None = None
    renormalize_logits: bool = False
    remove_invalid_values: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        for option in OPTIONS:
            value = getattr(self, option.field)
            if option.read is not None and value is not None and option.complaint(value) is None:
                object.__setattr__(self, option.field, option.read(value))
        object.__setattr__(self, "logit_bias", MappingProxyType(dict(self.logit_bias)))

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, without sampling."""
        return self.temperature == 0

    def differs(self, field: str) -> bool:
        """Whether this option has an effect: its value is not the default."""
        return bool(getattr(self, field) != getattr(DEFAULTS, field))

    def updated(self, given: Mapping[str, Any]) -> Self:
        """A copy with the fields of `given` replaced.

        A temperature of 0 in `given` also turns off options that affect sampling alone, such as a checkpoint's top-p,
        unless they are in `given` too, where `check` finds them.
        """
        dropped = {field: getattr(DEFAULTS, field) for field in DRAW_ONLY} if given.get("temperature") == 0 else {}
        return dataclasses.replace(self, **dropped | dict(given))

    def check(self, max_new_tokens: int | None = None, vocabulary: int | None = None, where: str | None = None) -> None:
        """Raise PromptError for a value out of range, and for options that contradict each other.

        `vocabulary` is the number of token ids, `where` a place in a file: with it, messages name that and the key
        instead of the flag.
        """
        for option in OPTIONS:
            value = getattr(self, option.field)
            if option.kind is dict:
                self._check_bias(option, vocabulary, where)
            elif not (value is None and option.optional) and (wrong := option.complaint(value)):
                raise PromptError(option.name(where) + wrong)
            elif option.read is not None and vocabulary is not None:
                for token in ids_in(option.field, value):
                    if token >= vocabulary:
                        raise PromptError(
                            f"{option.name(where)} {token}: outside the vocabulary: use ids from 0 to {vocabulary - 1}"
                        )
        for option in (BY_FIELD[field] for field in DRAW_ONLY if self.greedy and self.differs(field)):
            raise PromptError(
                f"{option.name(where)} {getattr(self, option.field)}: has no effect at temperature 0, which always "
                f"takes the most likely token: set a temperature above 0, or remove {option.label(where)}"
            )
        if max_new_tokens is not None and self.min_new_tokens > max_new_tokens:
            longest = "--max-new-tokens" if where is None else "max_new_tokens"
            raise PromptError(
                f"{BY_FIELD['min_new_tokens'].name(where)} {self.min_new_tokens}: is more than {longest} "
                f"{max_new_tokens}: lower it or raise the other"
            )

    def _check_bias(self, option: Option, vocabulary: int | None, where: str | None) -> None:
        for token, bias in self.logit_bias.items():
            name = f"{option.name(where)} {shown(token)}="
            if isinstance(token, bool) or not isinstance(token, numbers.Integral) or token < 0:
                raise PromptError(f"{name}{shown(bias)}: a token id must be a whole number, 0 or more")
            if vocabulary is not None and token >= vocabulary:
                raise PromptError(f"{name}{shown(bias)}: outside the vocabulary: use ids from 0 to {vocabulary - 1}")
            if wrong := option.complaint(bias):
                raise PromptError(name + wrong.lstrip())


DEFAULTS = SamplingOptions()


def add_flags(parser: argparse.ArgumentParser, description: str | None = None) -> None:
    """Add a flag for each option, without defaults: `given_in` tells which were given."""
    group = parser.add_argument_group("sampling", description)
    for option in OPTIONS:
        if option.kind is dict:
            group.add_argument(option.flag, metavar=option.metavar, type=_bias, action="append", help=option.help)
        elif option.kind is bool:
            group.add_argument(option.flag, action=argparse.BooleanOptionalAction, default=None, help=option.help)
        elif option.read is not None:
            group.add_argument(option.flag, metavar=option.metavar, type=_json, help=option.help)
        else:
            group.add_argument(option.flag, metavar=option.metavar, type=option.kind, help=option.help)


def given_in(args: argparse.Namespace) -> dict[str, Any]:
    """The options given on a parsed command line, by field. Raises PromptError for a token with different biases."""
    given = {field: value for field in BY_FIELD if (value := getattr(args, field)) is not None}
    if pairs := given.get("logit_bias"):
        twice = [token for token, count in Counter(token for token, _ in set(pairs)).items() if count > 1]
        if twice:
            raise PromptError(f"--logit-bias {twice[0]}: the token has different biases: remove one")
        given["logit_bias"] = dict(pairs)
    for field, value in given.items():
        option = BY_FIELD[field]
        if option.read is not None and option.complaint(value) is None:  # `check` says what is wrong with others
            given[field] = option.read(value)
    return given


def from_mapping(values: Mapping[str, object], where: str) -> dict[str, Any]:
    """The options of a parsed JSON object, by field; `where` names its place in messages ("line 7").

    A whole number is accepted as a float; true, false, null and text are not. The keys of `logit_bias` are token ids
    as text. Raises PromptError for an unknown key, a wrong type and a value out of range.
    """
    given: dict[str, Any] = {}
    for key, value in values.items():
        if key not in BY_FIELD:
            raise PromptError(f"{where}: unknown key '{key}': the sampling options are {', '.join(BY_FIELD)}")
        option = BY_FIELD[key]
        if option.kind is dict:
            given[key] = _bias_object(value, option, where)
        elif wrong := option.complaint(value):
            raise PromptError(option.name(where) + wrong)
        else:
            given[key] = option.kind(value) if option.read is None else option.read(value)
    return given


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be ID=BIAS, such as 50256=-inf") from None


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise argparse.ArgumentTypeError(f"{text!r} must be JSON, such as [1, 2]") from None


def _bias_object(value: object, option: Option, where: str) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise PromptError(f"{option.name(where)} {shown(value)}: must be an object of token ids and numbers")
    biases = {}
    for token, bias in value.items():
        # One spelling per id: otherwise two keys could mean the same token.
        if not (token.isascii() and token.isdigit() and len(token) < 19 and str(int(token)) == token):
            raise PromptError(f"{option.name(where)} {shown(token)}: must be a token id, such as '50256'")
        if wrong := option.complaint(bias):
            raise PromptError(f"{option.name(where)} {token}={wrong.lstrip()}")
        biases[int(token)] = float(bias)
    return biases
