"""Reads the vocabulary in a GGUF file's metadata as llama.cpp does (src/llama-vocab.cpp, llama_vocab::impl::load)."""

# ruff: noqa: RUF001 - ambiguous characters are intended here

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from satchel.export.checkpoint.gguf_splits import SPLITS, Split
from satchel.export.errors import ExportError

REMEDY = "pass the tokenizer.json of the original model with --tokenizer"
_PREFIX = "tokenizer.ggml."


class Kind(IntEnum):
    """The type of a token, as the file stores it."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


ENDS = frozenset(
    {
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
        "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
        "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
    }
)  # fmt: skip
"""Texts of tokens that end generation, whatever the ids in the file say."""

_FILL_IN: Mapping[tuple[str, ...], frozenset[str]] = {
    ("fim_pre_token_id", "prefix_token_id"): frozenset(
        {"<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>",
         "<|prefix|>"}
    ),
    ("fim_suf_token_id", "suffix_token_id"): frozenset(
        {"<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>",
         "<|suffix|>"}
    ),
    ("fim_mid_token_id", "middle_token_id"): frozenset(
        {"<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>",
         "<|middle|>"}
    ),
    ("fim_pad_token_id",): frozenset({"<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"}),
    ("fim_rep_token_id",): frozenset({"<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"}),
    ("fim_sep_token_id",): frozenset({"<|file_sep|>"}),
}  # fmt: skip
"""Texts of tokens that mark the parts of a text to fill in, by the keys that have their ids; the text counts where the
file has no such key."""

_FILL_IN_ENDS = frozenset({"fim_pad_token_id", "fim_rep_token_id", "fim_sep_token_id"})
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_SHOWN = frozenset({"<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"})
"""Control tokens of gpt-oss that a user sees."""

_SENTENCEPIECE_IDS = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
"""Ids that count where the file has none. llama.cpp also has one for byte-level vocabularies, 11 as in Falcon; in all
others that is a letter."""


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary of a GGUF file.

    Attributes:
        model: "llama" (SentencePiece BPE) or "gpt2" (byte-level BPE).
        tokens: The text of each token.
        kinds: The type of each token, after those that llama.cpp corrects by their text.
        scores: The score of each token; 0 for byte-level BPE.
        merges: Pairs of tokens, best first; byte-level BPE only.
        split: How byte-level BPE splits a text into words; None otherwise.
        ids: The special ids by their keys, such as "bos_token_id".
        ends: The ids that end generation, that of `eos_token_id` first.
        suppressed: The ids that are never generated.
        add_bos: Whether a text starts with the BOS id.
        add_eos: Whether a text ends with the EOS id.
        add_space: Whether a text, and what follows a special token, starts with a space.
        strip_right: The tokens after which spaces are dropped.
        notes: What the user should know.
    """

    model: str
    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    scores: tuple[float, ...]
    merges: tuple[tuple[str, str], ...]
    split: Split | None
    ids: Mapping[str, int]
    ends: tuple[int, ...]
    suppressed: tuple[int, ...]
    add_bos: bool
    add_eos: bool
    add_space: bool
    strip_right: frozenset[str]
    notes: tuple[str, ...] = ()

    def token(self, key: str) -> str | None:
        """Return the text of a special token by the key of its id; None if there is none."""
        index = self.ids.get(key)
        return None if index is None else self.tokens[index]

    def special(self) -> tuple[int, ...]:
        """Return the ids of the tokens that are found in a text as a whole."""
        return tuple(i for i, k in enumerate(self.kinds) if k in (Kind.CONTROL, Kind.USER_DEFINED, Kind.UNKNOWN))


def read_vocabulary(metadata: Mapping[str, Any], path: Path) -> Vocabulary | None:
    """Return the vocabulary in the metadata, or None if the file has none.

    Raises:
        ExportError: If it is damaged, or of a type or pre-tokenizer that satchel does not support.
    """
    facts = {key.removeprefix(_PREFIX): value for key, value in metadata.items() if key.startswith(_PREFIX)}
    model = facts.get("model", "none")
    if model in ("none", "no_vocab"):
        return None
    if model not in ("llama", "gpt2"):
        raise ExportError(f"{path}: its tokenizer of type {model!r} is not supported, only llama and gpt2; {REMEDY}")
    tokens = _tokens(facts, path)
    split, notes = _split(facts, path) if model == "gpt2" else (None, ())
    ids = _ids(facts, model, len(tokens), path)
    kinds = _corrected(tokens, _kinds(facts, len(tokens), path), facts, ids)
    ends = _ends(tokens, kinds, ids)
    name = str(metadata.get("general.name", "")).lower()
    return Vocabulary(
        model=model,
        tokens=tokens,
        kinds=tuple(kinds),
        scores=tuple(map(float, _list(facts, "scores", len(tokens), (int, float), path) or [0.0] * len(tokens))),
        merges=_merges(facts, path) if model == "gpt2" else (),
        split=split,
        ids=ids,
        ends=ends,
        suppressed=_suppressed(facts.get("suppress_tokens"), len(tokens)),
        add_bos=_flag(facts, "add_bos_token", model == "llama" or bool(split and split.add_bos), path),
        add_eos=_flag(facts, "add_eos_token", False, path),
        add_space=_flag(facts, "add_space_prefix", model != "gpt2", path),
        strip_right=_strip_right(name, tokens, kinds),
        notes=notes,
    )


def _tokens(facts: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    tokens = facts.get("tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise ExportError(f"{path}: tokenizer.ggml.tokens is not a list of texts; {REMEDY}")
    found = tuple(token or f"[EMPTY_{index}]" for index, token in enumerate(tokens))
    if len(set(found)) != len(found):
        seen: set[str] = set()
        twice = next(token for token in found if token in seen or seen.add(token))  # type: ignore[func-returns-value]
        raise ExportError(f"{path}: its vocabulary has the token {twice[:40]!r} twice; {REMEDY}")
    return found


def _list(facts: Mapping[str, Any], key: str, count: int, types: tuple[type, ...], path: Path) -> list[Any] | None:
    """Return a list with a value for each token, or None if the file has none."""
    values = facts.get(key)
    if values is None:
        return None
    if not isinstance(values, list) or len(values) < count or not all(type(v) in types for v in values):
        raise ExportError(f"{path}: tokenizer.ggml.{key} does not have a number for each of {count} tokens; {REMEDY}")
    return values[:count]


def _suppressed(stored: Any, count: int) -> tuple[int, ...]:
    """Return the ids that are never generated; those beyond the vocabulary are dropped, as in llama.cpp."""
    ids = stored if isinstance(stored, list) else []
    return tuple(index for index in ids if type(index) is int and 0 <= index < count)


def _kinds(facts: Mapping[str, Any], count: int, path: Path) -> list[int]:
    stored = _list(facts, "token_type", count, (int,), path) or [Kind.NORMAL] * count
    return [kind if 0 <= kind <= max(Kind) else Kind.UNDEFINED for kind in stored]


def _flag(facts: Mapping[str, Any], key: str, default: bool, path: Path) -> bool:
    value = facts.get(key, default)
    if not isinstance(value, bool):
        raise ExportError(f"{path}: tokenizer.ggml.{key} is {value!r} instead of true or false; convert the file again")
    return value


def _split(facts: Mapping[str, Any], path: Path) -> tuple[Split, tuple[str, ...]]:
    name = facts.get("pre")
    if name is None or name == "":
        note = "names no pre-tokenizer (tokenizer.ggml.pre), so text is split as llama.cpp does by default; " + REMEDY
        return SPLITS["default"], (note,)
    if not isinstance(name, str) or name not in SPLITS:
        raise ExportError(f"{path}: its pre-tokenizer {name!r} is not supported; {REMEDY}")
    return SPLITS[name], ()


def _merges(facts: Mapping[str, Any], path: Path) -> tuple[tuple[str, str], ...]:
    merges = facts.get("merges")
    if not isinstance(merges, list) or not all(isinstance(merge, str) for merge in merges):
        raise ExportError(f"{path}: tokenizer.ggml.merges is not a list of texts; {REMEDY}")
    pairs = (merge.partition(" ") if not merge.startswith(" ") else (" ", " ", merge[2:]) for merge in merges)
    return tuple((first, second) for first, _, second in pairs)


def _ids(facts: Mapping[str, Any], model: str, count: int, path: Path) -> dict[str, int]:
    """Return the special ids, with llama.cpp's own where the file has none."""
    defaults = _SENTENCEPIECE_IDS if model == "llama" else {}
    ids = {key: index for key, index in defaults.items() if index < count}
    for key, value in facts.items():
        if not key.endswith("_token_id"):
            continue
        if type(value) is not int or not 0 <= value < count:
            raise ExportError(f"{path}: tokenizer.ggml.{key} is {value}, but there are {count} tokens; {REMEDY}")
        ids[key] = value
    return ids


def _corrected(tokens: tuple[str, ...], kinds: list[int], facts: Mapping[str, Any], ids: dict[str, int]) -> list[int]:
    """Mark tokens as special that are by their text, and complete `ids` by those to fill in, in place."""
    for keys, texts in _FILL_IN.items():
        if not any(key in facts for key in keys):
            found = [index for index, token in enumerate(tokens) if token in texts]
            for index in found[:1]:
                ids[keys[0]] = index
                kinds[index] = Kind.CONTROL
    for index, token in enumerate(tokens):
        if token in ENDS:
            kinds[index] = Kind.CONTROL
        elif token in _SHOWN:
            kinds[index] = Kind.USER_DEFINED
    return kinds


def _ends(tokens: tuple[str, ...], kinds: list[int], ids: Mapping[str, int]) -> tuple[int, ...]:
    """Return the ids that end generation, by key and by text; tokens that are none in their family are corrected."""
    by_id = [ids[key] for key in (*_END_KEYS, *sorted(_FILL_IN_ENDS)) if key in ids]
    ends = dict.fromkeys([*by_id, *(index for index, token in enumerate(tokens) if token in ENDS)])
    texts = {tokens[index]: index for index in ends}
    call = texts.keys() & {"<|call|>", "<|calls|>"}
    if "<|end|>" in texts and call and texts.keys() & {"<|return|>", "<|flush|>"}:
        del ends[texts["<|end|>"]]  # of gpt-oss and Solar: it ends a message, not the turn
        kinds[texts["<|end|>"]] = Kind.USER_DEFINED
    if "</s>" in texts and texts.keys() & {"<|tool_response>", "<|plamo:eos|>"}:
        del ends[texts["</s>"]]  # of Gemma 4 and PLaMo: an HTML tag
        kinds[texts["</s>"]] = Kind.NORMAL
    return tuple(ends)


def _strip_right(name: str, tokens: tuple[str, ...], kinds: list[int]) -> frozenset[str]:
    """Return the tokens after which spaces are dropped; the file does not say it, llama.cpp goes by its name."""
    if "phi-3" not in name and "phi3" not in name:
        return frozenset()
    special = {t for t, k in zip(tokens, kinds, strict=True) if k in (Kind.CONTROL, Kind.USER_DEFINED, Kind.UNKNOWN)}
    return frozenset(special | {"</s>"}) - {"<unk>", "<s>", "<|endoftext|>"}
