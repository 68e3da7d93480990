"""What the files beside a tokenizer declare about its special tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from satchel.export.checkpoint.companions import read_json
from satchel.export.errors import ExportError

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"


@dataclass(frozen=True)
class Declared:
    """Special tokens as files declare them.

    Attributes:
        names: The text of each named token, such as "bos_token"; None where a file says that there is none.
        added: Tokens that are not split, each with its id; None where the tokenizer chooses the id.
        add_bos: Whether BOS is prepended to a text; None if no file says so.
        add_eos: Whether EOS is appended; None if no file says so.
    """

    names: Mapping[str, str | None] = field(default_factory=dict)
    added: tuple[tuple[int | None, AddedToken], ...] = ()
    add_bos: bool | None = None
    add_eos: bool | None = None


NOTHING = Declared()


def declared(folder: Path) -> Declared:
    """Read the files of a folder in transformers' order.

    tokenizer_config.json comes first. special_tokens_map.json, which wins over it, and added_tokens.json are read only
    if it has no `added_tokens_decoder`: files of older versions of transformers.

    Raises:
        ExportError: If a file is not of the expected form.
    """
    table = read_json(folder / CONFIG)
    by_id: dict[int, AddedToken] = {}
    if "added_tokens_decoder" in table:
        for index, token in _object(table["added_tokens_decoder"], folder / CONFIG, "added_tokens_decoder").items():
            special = isinstance(token, dict) and token.get("special") is True
            by_id[_id(index, folder / CONFIG)] = _token(token, folder / CONFIG, special)
    else:
        table = {**table, **read_json(folder / MAP)}
    names = {name: _token(value, folder / CONFIG) if value else None for name, value in _named(table)}
    extra = [_token(value, folder / CONFIG) for value in _extra(table)]
    if "added_tokens_decoder" not in table:
        named = {token.content for token in (*names.values(), *extra) if token is not None}
        for text, index in read_json(folder / ADDED).items():
            plain = text not in named
            by_id[_id(index, folder / ADDED)] = AddedToken(text, normalized=plain, special=not plain)
    known = {token.content for token in by_id.values()}
    rest = {token.content: token for token in (*names.values(), *extra) if token and token.content not in known}
    return Declared(
        names={name: None if token is None else token.content for name, token in names.items()},
        added=(*sorted(by_id.items()), *((None, token) for token in rest.values())),
        add_bos=_flag(table, "add_bos_token", folder / CONFIG),
        add_eos=_flag(table, "add_eos_token", folder / CONFIG),
    )


def _named(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The special tokens that have a name: the standard ones, those of a model, and those listed as extra."""
    for name, value in table.items():
        if name in SPECIAL_TOKENS or (name.endswith("_token") and isinstance(value, str | dict)):
            yield name, value
    extra = table.get("extra_special_tokens")
    if isinstance(extra, dict):
        yield from extra.items()


def _extra(table: Mapping[str, Any]) -> list[Any]:
    found = table.get("extra_special_tokens") or table.get("additional_special_tokens")
    return found if isinstance(found, list) else []


def _token(value: Any, path: Path, special: bool = True) -> AddedToken:
    """A token from its text or from an object with its text and how it is found in a text."""
    table = value if isinstance(value, dict) else {"content": value}
    text = table.get("content")
    if not isinstance(text, str) or not text:
        raise ExportError(f"{path}: has a special token that is {text!r} instead of a text; correct it")
    flags = {name: table.get(name) is True for name in ("lstrip", "rstrip", "single_word")}
    normalized = table.get("normalized", not special) is True
    return AddedToken(text, normalized=normalized, special=special, **flags)


def _object(value: Any, path: Path, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ExportError(f"{path}: {key} is {type(value).__name__} instead of an object; correct it")
    return value


def _id(value: Any, path: Path) -> int:
    text = str(value)
    if isinstance(value, bool) or not text.isdecimal():
        raise ExportError(f"{path}: has the token id {text[:40]!r}; correct it to a number of at least 0")
    return int(text)


def _flag(table: Mapping[str, Any], name: str, path: Path) -> bool | None:
    value = table.get(name)
    if value is not None and not isinstance(value, bool):
        raise ExportError(f"{path}: {name} is {value!r}; correct it to true or false")
    return value
