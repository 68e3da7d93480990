"""Values of options that are lists of token ids: what they must look like, and which ids they name.

Standard library only. The forms are those of transformers' generation_config.json.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator
from typing import Any

Ids = tuple[int, ...]


def read_id(value: object) -> int:
    """A token id. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 0:
        raise ValueError("a token id, a whole number of 0 or more")
    return int(value)


def read_ids(value: object) -> Ids:
    """A list of token ids. Raises ValueError."""
    return tuple(map(read_id, _list(value, "a list of token ids, whole numbers of 0 or more")))


def read_ends(value: object) -> Ids:
    """A token id, or a list of them that is not empty. Raises ValueError."""
    ids = (read_id(value),) if isinstance(value, numbers.Integral) else read_ids(value)
    if not ids:
        raise ValueError("a token id, or a list of at least one")
    return ids


def read_words(value: object) -> tuple[Ids, ...]:
    """A list of sequences of token ids, none of them empty. Raises ValueError."""
    return tuple(_sequence(word) for word in _list(value, "a list of lists of token ids"))


def read_biases(value: object) -> tuple[tuple[Ids, float], ...]:
    """A list of pairs of a sequence of token ids and a bias. A mapping of sequences to biases is one too.

    Raises ValueError.
    """
    form = "a list of pairs of token ids and a bias, such as [[[10, 45], -2.0]]"
    biases: dict[Ids, float] = {}
    for pair in _list(list(value.items()) if isinstance(value, dict) else value, form):
        ids, bias = pair if len(_list(pair, form)) == 2 else ((), None)
        if isinstance(bias, bool) or not isinstance(bias, numbers.Real) or not float(bias) < math.inf:
            raise ValueError(form)
        biases[_sequence(ids)] = float(bias)
    return tuple(biases.items())


def read_decay(value: object) -> tuple[int, float]:
    """A number of new tokens and a factor. Raises ValueError."""
    form = "a pair of a number of tokens and a factor above 0, such as [100, 1.05]"
    pair = _list(value, form)
    if len(pair) != 2 or any(isinstance(part, bool) for part in pair):
        raise ValueError(form)
    start, factor = pair
    if (
        not isinstance(start, numbers.Integral)
        or not isinstance(factor, numbers.Real)
        or not 0 < float(factor) < math.inf
    ):
        raise ValueError(form)
    return int(start), float(factor)


def ids_in(field: str, value: Any) -> Iterator[int]:
    """All token ids in the normalized value of an option."""
    if field == "exponential_decay_length_penalty" or value is None:
        return
    if field == "sequence_bias":
        value = [ids for ids, _ in value]
    for part in value if isinstance(value, list | tuple) else [value]:
        yield from part if isinstance(part, tuple) else (part,)


def _sequence(value: object) -> Ids:
    ids = read_ids(value)
    if not ids:
        raise ValueError("made of sequences of at least one token id")
    return ids


def _list(value: object, form: str) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(form)
    return value
