"""Resolves the BOS, EOS and padding ids when several files define them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SpecialIds:
    """The BOS id, all EOS ids and the padding id of a model."""

    bos: int | None
    eos: tuple[int, ...]
    pad: int | None


def special_ids(tables: Sequence[Mapping[str, Any]]) -> SpecialIds:
    """Return each id from the first table that has it, such as generation config, config, then tokenizer."""
    bos, eos, pad = (_first(tables, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id"))
    return SpecialIds(bos[0] if bos else None, tuple(dict.fromkeys(eos)), pad[0] if pad else None)


def _first(tables: Sequence[Mapping[str, Any]], name: str) -> list[int]:
    for table in tables:
        value = table.get(name)
        ids = value if isinstance(value, list) else [value]
        # Some configs use a negative id for none.
        known = [i for i in ids if isinstance(i, int) and i >= 0]
        if known:
            return known
    return []
