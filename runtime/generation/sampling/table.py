"""The table of sampling options: names, descriptions and allowed values. Standard library only."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from satchel.runtime.generation.sampling.token_rules import (
    read_biases,
    read_decay,
    read_ends,
    read_id,
    read_ids,
    read_words,
)


@dataclass(frozen=True)
class Option:
    """One option: its field and JSON key, metavar and help of its flag, and its allowed values.

    `kind` is float, int, bool, dict (token ids to numbers) or tuple. A value, or each number of a dict, must satisfy
    `allows`, which `rule` states in words. One of kind tuple is normalized by `read`, which raises ValueError; its flag
    takes JSON. A `finite` option does not take infinity. An option that is `optional` may be None, for off.
    """

    field: str
    kind: type
    metavar: str
    help: str
    rule: str
    allows: Callable[[float], bool] = lambda value: True
    finite: bool = True
    read: Callable[[object], Any] | None = None
    optional: bool = False

    @property
    def flag(self) -> str:
        """The flag of the command line."""
        return "--" + self.field.replace("_", "-")

    def label(self, where: str | None) -> str:
        """Its name in messages: the flag, or the key if it comes from JSON, at `where`."""
        return self.flag if where is None else self.field

    def name(self, where: str | None) -> str:
        """The label, after its place in a file."""
        return self.flag if where is None else f"{where}: {self.field}"

    def complaint(self, value: object) -> str | None:
        """What a message says after the name if `value` is not allowed; None if it is."""
        if self.read is not None:
            try:
                self.read(value)
            except ValueError as error:
                return f" {shown(value)}: must be {error}"
            return None
        if self.kind is bool:
            return None if isinstance(value, bool) else f" {shown(value)}: must be true or false"
        wanted, what = (numbers.Integral, "a whole number") if self.kind is int else (numbers.Real, "a number")
        if isinstance(value, bool) or not isinstance(value, wanted):
            return f" {shown(value)}: must be {what}"
        number = _float(value)
        if (self.finite and not math.isfinite(number)) or not self.allows(number):
            return f" {shown(value)}: must be {self.rule}"
        return None


def _share(field: str, metavar: str, text: str) -> Option:
    return Option(field, float, metavar, text, "above 0 and at most 1", lambda value: 0 < value <= 1)


def _count(field: str, metavar: str, text: str) -> Option:
    return Option(field, int, metavar, text, "0 or more", lambda value: value >= 0, finite=False)


def _penalty(field: str, text: str) -> Option:
    return Option(field, float, "X", text, "at least -2 and at most 2", lambda value: -2 <= value <= 2)


def _structure(field: str, metavar: str, text: str, read: Callable[[object], Any], *, optional: bool = False) -> Option:
    return Option(field, tuple, metavar, text, "", read=read, optional=optional)


def _cutoff(field: str, text: str) -> Option:
    return Option(field, float, "P", text, "at least 0 and below 1", lambda value: 0 <= value < 1)


OPTIONS = (
    Option(
        "temperature", float, "T", "divide logits by T before sampling; 0 is greedy decoding",
        "finite, 0 or more", lambda value: value >= 0,
    ),
    _count("top_k", "K", "sample among the K most likely tokens; 0 is off"),
    _share("top_p", "P", "sample among the most likely tokens with total probability P; 1 is off"),
    Option(
        "min_p", float, "P", "sample among tokens at least P times as likely as the most likely one; 0 is off",
        "at least 0 and at most 1", lambda value: 0 <= value <= 1,
    ),
    _share("typical_p", "P", "sample among the most typical tokens with total probability P; 1 is off"),
    Option(
        "top_h", float, "H", "sample among the most likely tokens with a share H of the entropy; 0 is off",
        "at least 0 and at most 1", lambda value: 0 <= value <= 1,
    ),
    _cutoff("epsilon_cutoff", "sample among tokens with a probability of at least P; 0 is off"),
    _cutoff("eta_cutoff", "as --epsilon-cutoff, with a lower bound where the entropy is high; 0 is off"),
    Option(
        "repetition_penalty", float, "X",
        "penalize tokens of prompt and text: divide logits above 0 by X, multiply those below; 1 is off",
        "finite and above 0", lambda value: value > 0,
    ),
    _penalty("presence_penalty", "subtract X from the logit of each token in the new text; 0 is off"),
    _penalty("frequency_penalty", "subtract X from the logit of a token for each occurrence in the new text; 0 is off"),
    _count("no_repeat_ngram_size", "N", "never repeat an n-gram of N tokens of prompt or text; 0 is off"),
    Option(
        "logit_bias", dict, "ID=BIAS", "add BIAS to the logit of token ID, -inf for never; may be repeated",
        "a finite number, or -inf for never", lambda value: value < math.inf, finite=False,
    ),
    _count("min_new_tokens", "N", "minimum number of new tokens"),
    _count("min_length", "N", "minimum number of tokens of prompt and text"),
    _structure("suppress_tokens", "[ID,...]", "tokens that are never chosen", read_ids),
    _structure("begin_suppress_tokens", "[ID,...]", "tokens that are not chosen as the first new one", read_ids),
    _structure("bad_words_ids", "[[ID,...],...]", "sequences of tokens that never occur", read_words),
    _structure(
        "sequence_bias", "[[[ID,...],BIAS],...]", "add BIAS to the logit of a token that would complete a sequence",
        read_biases,
    ),
    _structure("forced_bos_token_id", "ID", "the token after a prompt of one token", read_id, optional=True),
    _structure("forced_eos_token_id", "ID", "the token at --max-new-tokens, an id or a list", read_ends, optional=True),
    _structure(
        "exponential_decay_length_penalty", "[N,X]",
        "from N new tokens on, raise the logits of end tokens by their size times (X to the power of further ones) - 1",
        read_decay, optional=True,
    ),
    Option("renormalize_logits", bool, "", "normalize log-probabilities again after the penalties (beams)", ""),
    Option("remove_invalid_values", bool, "", "NaN logits become 0, and infinite ones the largest number", ""),
    Option(
        "seed", int, "N", "random seed: the same seed gives the same text", "0 or more", lambda value: value >= 0,
        finite=False, optional=True,
    ),
)  # fmt: skip
BY_FIELD = {option.field: option for option in OPTIONS}


def shown(value: object) -> str:
    """A wrong value as messages show it: text in quotes, shortened."""
    try:
        text = repr(value) if isinstance(value, str) else str(value)
    except ValueError:  # an int of more digits than Python writes out
        text = "of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # an int beyond every float
        return math.inf if value > 0 else -math.inf
