"""Which token ids start, end and pad a text, when several files have a say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SpecialIds:
    """BOS, every EOS and the padding id of a model."""

    bos: int | None
    eos: tuple[int, ...]
    pad: int | None


def special_ids(tables: Sequence[Mapping[str, Any]]) -> SpecialIds:
    """The ids from the first table that names each, such as generation config, config, tokenizer, in that order."""
    bos, eos, pad = (_first(tables, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id"))
    return SpecialIds(bos[0] if bos else None, tuple(dict.fromkeys(eos)), pad[0] if pad else None)


def _first(tables: Sequence[Mapping[str, Any]], name: str) -> list[int]:
    for table in tables:
        value = table.get(name)
        ids = value if isinstance(value, list) else [value]
        # A negative id is how some configs say that there is none.
        known = [i for i in ids if isinstance(i, int) and i >= 0]
        if known:
            return known
    return []
