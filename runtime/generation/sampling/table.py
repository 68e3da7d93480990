"""The table of sampling options: names, descriptions and allowed values. Standard library only."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Option:
    """One option: its field and JSON key, metavar and help of its flag, and its allowed values.

    `kind` is float, int or dict (token ids to numbers). A value, or each number of a dict, must satisfy `allows`, which
    `rule` states in words. A `finite` option does not take infinity.
    """

    field: str
    kind: type
    metavar: str
    help: str
    rule: str
    allows: Callable[[float], bool]
    finite: bool = True

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
        """What a message says after the name if the number `value` is not allowed; None if it is."""
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
    _count("seed", "N", "random seed: the same seed gives the same text"),
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
