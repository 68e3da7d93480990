"""Reads a checkpoint's tokenizer as it is stored, and records what it encodes.

A stored tokenizer.json is read by the tokenizers library, a stored SentencePiece model by sentencepiece. The class that
transformers would build from them is compared, and never followed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import sentencepiece
import tokenizers
from transformers import AutoTokenizer

from satchel.export.checkpoint.hard_strings import HARD_STRINGS
from satchel.export.checkpoint.special_tokens import NOTHING, SPECIAL_TOKENS, Declared, declared
from satchel.export.checkpoint.structure import one_line
from satchel.export.errors import ExportError
from satchel.runtime.bundle.manifest import AddedToken, CorpusEntry, TokenizerSpec
from satchel.runtime.errors import BundleError
from satchel.runtime.generation.tokenizer import Tokenizer, load_tokenizer

Encode = Callable[[str], list[int]]

_JSON = "tokenizer.json"
_PIECES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_VOCABULARIES = ("vocab.json", "vocab.txt", "tekken.json")
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
_REMEDY = "pass the model's tokenizer.json or SentencePiece .model with --tokenizer"


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer file and its expected behavior.

    Attributes:
        kind: The library that reads the file.
        file: The path of the file, or its contents.
        add_bos: Whether the BOS id is prepended to a text. For "tokenizer.json" the file's post-processor does so; for
            "sentencepiece" the caller must.
        corpus: Texts with their ids from the stored tokenizer, including special tokens.
        bos_token_id: The tokenizer's own id, used if no config defines one.
        eos_token_id: See `bos_token_id`.
        pad_token_id: See `bos_token_id`.
        bos_id: The id to prepend, if it is not that of the SentencePiece model.
        eos_id: The id to append to a text; None for none. For "sentencepiece" only.
        added: Tokens beside a SentencePiece model; a tokenizer.json holds its own.
        vocabulary: The ids of all tokens.
        added_ids: Those of tokens that were added to the vocabulary.
        names: The text of each named special token; None where there is none. Empty if no file names any.
        notes: What a user should know, in lines.
    """

    kind: Literal["tokenizer.json", "sentencepiece"]
    file: Path | bytes
    add_bos: bool
    corpus: tuple[tuple[str, tuple[int, ...]], ...]
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    bos_id: int | None = None
    eos_id: int | None = None
    added: tuple[AddedToken, ...] = ()
    vocabulary: Mapping[str, int] = dataclasses.field(default_factory=dict)
    added_ids: frozenset[int] = frozenset()
    names: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def spec(self) -> TokenizerSpec:
        """The tokenizer's entry in a manifest, with its file's name in the bundle."""
        name = "tokenizer.json" if self.kind == "tokenizer.json" else "tokenizer.model"
        corpus = tuple(CorpusEntry(text, tuple(ids)) for text, ids in self.corpus)
        return TokenizerSpec(self.kind, name, self.add_bos, corpus, self.bos_id, self.eos_id, self.added)

    def load(self) -> Tokenizer:
        """The tokenizer as the runner loads it."""
        content = self.file if isinstance(self.file, bytes) else self.file.read_bytes()
        return load_tokenizer(self.spec, Path(self.spec.file), content)


def folder_tokenizer(folder: Path) -> TokenizerFiles | None:
    """Return the tokenizer of a checkpoint folder, or None if it has none.

    That is its tokenizer.json, else its SentencePiece model, else what transformers builds from vocabulary files.

    Raises:
        ExportError: If a file is damaged, or only transformers could read it and cannot.
    """
    stored = [folder / name for name in (_JSON, *_PIECES, *_VOCABULARIES) if (folder / name).is_file()]
    if not stored:
        return None
    found = declared(folder)
    if stored[0].name == _JSON:
        files = json_tokenizer(stored[0], str(stored[0]), found)
        return _compared(files, *_as_transformers(folder), stored[0].name)
    original, reason = _as_transformers(folder)
    if stored[0].name in _PIECES and _same_ids(original, stored[0]):
        found = _with_class(found, original)
        return _compared(sentencepiece_tokenizer(stored[0], str(stored[0]), found), original, reason, stored[0].name)
    if original is None:
        raise ExportError(f"{folder}: its tokenizer cannot be loaded: {reason}; {_REMEDY}")
    return transformers_tokenizer(original, str(folder))


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files of a folder that may belong to a tokenizer."""
    names = (_JSON, *_PIECES, *_VOCABULARIES, *_BESIDE)
    return [folder / name for name in names if (folder / name).is_file()]


def chosen_tokenizer(path: Path) -> TokenizerFiles:
    """Return the tokenizer at a path: a tokenizer.json, a SentencePiece `.model`, or a folder with either.

    Raises:
        ExportError: If `path` has none, or it cannot be read.
    """
    if path.is_dir():
        found = folder_tokenizer(path)
        if found is None:
            raise ExportError(f"{path}: no tokenizer in this folder; {_REMEDY}")
        return found
    if not path.is_file():
        raise ExportError(f"{path}: no such file; {_REMEDY}")
    if path.suffix == ".model":
        return sentencepiece_tokenizer(path, str(path), declared(path.parent))
    if path.suffix == ".json":
        return json_tokenizer(path, str(path))
    raise ExportError(f"{path}: not a supported tokenizer; {_REMEDY}")


def json_tokenizer(file: Path | bytes, source: str, found: Declared = NOTHING) -> TokenizerFiles:
    """Return a tokenizer.json with the tokens that are declared beside it, and without truncation and padding.

    A file that needs no change is kept as it is.

    Raises:
        ExportError: If the tokenizers library cannot read it.
    """
    loaded = _load(file if isinstance(file, bytes) else file.read_bytes(), source)
    settings = loaded.truncation is not None or loaded.padding is not None
    loaded.no_truncation()
    loaded.no_padding()
    notes, changed = _add_declared(loaded, found)
    vocabulary = loaded.get_vocab(with_added_tokens=True)
    files = TokenizerFiles(
        "tokenizer.json",
        loaded.to_str(pretty=False).encode() if settings or changed else file,
        False,
        (),
        **_named_ids(found.names, vocabulary),
        vocabulary=vocabulary,
        added_ids=frozenset(vocabulary.values()) - frozenset(loaded.get_vocab(with_added_tokens=False).values()),
        names=found.names,
        notes=tuple(notes),
    )
    files, tokenizer = _recorded(files)
    return dataclasses.replace(files, add_bos=_adds_bos(tokenizer, files.corpus))


def sentencepiece_tokenizer(file: Path | bytes, source: str, found: Declared = NOTHING) -> TokenizerFiles:
    """Return a SentencePiece model with the tokens that are declared beside it.

    BOS is prepended if there is one and nothing says otherwise; EOS is appended only if something says so.

    Raises:
        ExportError: If sentencepiece cannot read it.
    """
    model = file if isinstance(file, bytes) else file.read_bytes()
    processor = _processor(model)
    if processor is None:
        raise ExportError(f"{source}: not a SentencePiece model; {_REMEDY}")
    pieces = {str(processor.id_to_piece(i)): i for i in range(processor.get_piece_size())}
    added = _numbered(found, pieces)
    vocabulary = pieces | {token.content: token.id for token in added}
    own = {"bos_token": processor.bos_id(), "eos_token": processor.eos_id(), "pad_token": processor.pad_id()}
    pieces_named = {name: str(processor.id_to_piece(i)) for name, i in own.items() if i >= 0}
    names: dict[str, str | None] = {**pieces_named, **found.names}
    ids = _named_ids(names, vocabulary)
    add_bos = ids["bos_token_id"] is not None and found.add_bos is not False
    bos_id = None if ids["bos_token_id"] == own["bos_token"] else ids["bos_token_id"]
    eos_id = ids["eos_token_id"] if found.add_eos else None
    files = TokenizerFiles(
        "sentencepiece",
        file,
        add_bos,
        (),
        **ids,
        bos_id=bos_id,
        eos_id=eos_id,
        added=added,
        vocabulary=vocabulary,
        added_ids=frozenset(token.id for token in added) - frozenset(pieces.values()),
        names=names,
    )
    return _recorded(files)[0]


def transformers_tokenizer(original: Any, source: str) -> TokenizerFiles:
    """Convert a transformers tokenizer to tokenizer.json, and verify both on the hard strings.

    For tokenizers that are not stored in a form that a library reads.

    Raises:
        ExportError: If it cannot be converted, or the result encodes a string differently.
    """
    backend = getattr(original, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(
            f"{source}: its {type(original).__name__} is Python-only and has no tokenizer.json form; {_REMEDY}"
        )
    files = json_tokenizer(backend.to_str(pretty=False).encode(), source)
    for text, found in files.corpus:
        ids = tuple(original(text).input_ids)
        if found != ids:
            raise ExportError(
                f"{source}: as tokenizer.json, its tokenizer encodes {text[:40]!r} as {list(found[:8])} instead of "
                f"{list(ids[:8])}; {_REMEDY}"
            )
    named = getattr(original, "special_tokens_map", {})
    numbers = {name: getattr(original, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return dataclasses.replace(files, **numbers, names={**dict.fromkeys(SPECIAL_TOKENS), **named})


def check_vocabulary(tokenizer: TokenizerFiles, vocab_size: int, source: str) -> None:
    """Refuse a tokenizer whose vocabulary, apart from added tokens, has ids beyond the model's."""
    own = (index for index in tokenizer.vocabulary.values() if index not in tokenizer.added_ids)
    highest = max(own, default=0)
    if highest >= vocab_size:
        raise ExportError(
            f"{source}: the tokenizer has token id {highest}, but the model has only {vocab_size} ids; "
            "pass the tokenizer that belongs to this model with --tokenizer"
        )


def notes_on(tokenizer: TokenizerFiles, vocab_size: int) -> list[str]:
    """Return what a user should know of a tokenizer: its notes, and the added tokens that the model does not have."""
    beyond = sorted((index, text) for text, index in tokenizer.vocabulary.items() if index >= vocab_size)
    if not beyond:
        return [*tokenizer.notes]
    named = ", ".join(f"{text!r} ({index})" for index, text in beyond[:5])
    more = f" and {len(beyond) - 5} more" if len(beyond) > 5 else ""
    note = (
        f"the model has no ids for the added tokens {named}{more}, only {vocab_size} ids: texts with them are refused"
    )
    return [*tokenizer.notes, note]


def _as_transformers(folder: Path) -> tuple[Any, str]:
    """The tokenizer that transformers builds, or None with the reason why it does not."""
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False), ""
    except Exception as error:  # noqa: BLE001 - the libraries below raise Exception itself, nothing narrower
        return None, one_line(error)


def _compared(files: TokenizerFiles, original: Any, reason: str, name: str) -> TokenizerFiles:
    """Add what transformers' class says otherwise, and names of special tokens that only the class has."""
    if original is None:
        note = f"transformers cannot load this tokenizer ({reason}): its ids are those of {name}, without a comparison"
        return dataclasses.replace(files, notes=(*files.notes, note))
    defaults = {key: text for key, text in original.special_tokens_map.items() if text in files.vocabulary}
    names = {**dict.fromkeys(SPECIAL_TOKENS), **defaults, **files.names}
    files = dataclasses.replace(files, names=names, **_named_ids(names, files.vocabulary))
    for text, ids in files.corpus:
        theirs = _ids_of(original, text)
        if theirs not in (ids, None):
            note = (
                f"{name} encodes {text[:40]!r} as {list(ids[:8])}, transformers' {type(original).__name__} as "
                f"{list((theirs or ())[:8])}: the bundle follows {name}"
            )
            return dataclasses.replace(files, notes=(*files.notes, note))
    return files


def _add_declared(loaded: tokenizers.Tokenizer, found: Declared) -> tuple[list[str], bool]:
    """Add tokens that the file lacks; return what contradicts the file, and whether any were added."""
    known = {token.content for token in loaded.get_added_tokens_decoder().values()}
    notes, changed = [], False
    for index, token in found.added:
        if token.content in known:
            continue
        highest = max(loaded.get_added_tokens_decoder(), default=-1)
        following = max(loaded.get_vocab_size(with_added_tokens=False), highest + 1)
        given = loaded.token_to_id(token.content)
        given = following if given is None else given
        if index not in (None, given):
            notes.append(f"token {token.content!r} has id {index} beside it, and would get {given}: it is left out")
            continue
        loaded.add_tokens([token])
        changed = True
    return notes, changed


def _numbered(found: Declared, pieces: Mapping[str, int]) -> tuple[AddedToken, ...]:
    """The declared tokens with their ids: their own, that of the piece, or the next free one."""
    added: list[AddedToken] = []
    following = max([len(pieces) - 1, *(index for index, _ in found.added if index is not None)]) + 1
    for index, token in found.added:
        if index is None:
            index = pieces.get(token.content, following)
            following += index == following
        added.append(AddedToken(index, token.content, token.special, token.lstrip, token.rstrip))
    return tuple(added)


def _named_ids(names: Mapping[str, str | None], vocabulary: Mapping[str, int]) -> dict[str, Any]:
    texts = {name: names.get(name) for name in ("bos_token", "eos_token", "pad_token")}
    return {f"{name}_id": None if text is None else vocabulary.get(text) for name, text in texts.items()}


def _with_class(found: Declared, original: Any) -> Declared:
    """Take from transformers' class whether it prepends BOS, if no file says so."""
    if original is None or found.add_bos is not None:
        return found
    ids, plain = original("a").input_ids, original("a", add_special_tokens=False).input_ids
    return dataclasses.replace(found, add_bos=ids[:1] != plain[:1])


def _same_ids(original: Any, path: Path) -> bool:
    """Whether a class uses the ids of a SentencePiece model: some (fairseq's) number its pieces otherwise."""
    processor = _processor(path.read_bytes())
    if original is None or processor is None:
        return processor is not None
    pieces = [str(processor.id_to_piece(i)) for i in range(processor.get_piece_size())]
    theirs = original.convert_ids_to_tokens(list(range(len(pieces))))
    return 2 * sum(map(str.__eq__, pieces, map(str, theirs))) > len(pieces)


def _processor(model: bytes) -> sentencepiece.SentencePieceProcessor | None:
    """The SentencePiece model in `model`; None if it holds something else, such as ranks of tiktoken."""
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except (RuntimeError, UnicodeDecodeError):
        return None
    return processor if processor.get_piece_size() else None


def _recorded(files: TokenizerFiles) -> tuple[TokenizerFiles, Tokenizer]:
    """Record what the runner's tokenizer encodes; texts that its library cannot encode are left out."""
    tokenizer, corpus, failed = files.load(), [], []
    for text in HARD_STRINGS:
        try:
            corpus.append((text, tuple(tokenizer.encode(text))))
        except BundleError as error:
            failed.append((text, error))
    notes = [f"it cannot encode {text[:40]!r}, and others: {error}" for text, error in failed[:1]]
    return dataclasses.replace(files, corpus=tuple(corpus), notes=(*files.notes, *notes)), tokenizer


def _ids_of(original: Any, text: str) -> tuple[int, ...] | None:
    """What transformers' class encodes; None if it fails."""
    try:
        return tuple(original(text).input_ids)
    except Exception:  # noqa: BLE001 - the tokenizers library raises Exception itself, nothing narrower
        return None


def _load(content: bytes, source: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # noqa: BLE001 - the library raises Exception itself, nothing narrower
        raise ExportError(
            f"{source}: not a tokenizer.json that the tokenizers library reads: {one_line(error)}"
        ) from None


def _adds_bos(tokenizer: Tokenizer, corpus: Iterable[tuple[str, tuple[int, ...]]]) -> bool:
    """Whether a token is put in front of a text."""
    plain = ((ids, tokenizer.encode_rendered(text)) for text, ids in corpus)
    return next((ids[0] != alone[0] for ids, alone in plain if alone), False)
