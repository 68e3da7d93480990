"""Text to token ids and back, with the bundle's tokenizer."""

from __future__ import annotations

import contextlib
import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from satchel.runtime.bundle.manifest import AddedToken, TokenizerSpec
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.errors import BundleError, PromptError

if TYPE_CHECKING:
    import sentencepiece

# Appended to a SentencePiece model, these bytes are `normalizer_spec { add_dummy_prefix: false }`: in the protobuf
# encoding a repeated message is merged, and the last value counts.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class Tokenizer(ABC):
    """Base class of both kinds of tokenizer. Threads may share one."""

    @staticmethod
    def open(bundle: Bundle) -> Tokenizer:
        """The bundle's tokenizer, checked: the texts in the manifest must give the ids recorded at export.

        Another version of the library could split text differently and silently spoil every answer. Raises BundleError
        for that, for a file that the library cannot read, and for a bundle without a tokenizer.
        """
        spec = bundle.manifest.tokenizer
        if spec is None:
            raise BundleError(f"{bundle.folder}: has no tokenizer: use token ids, or export it again with --tokenizer")
        path = bundle.folder / spec.file
        tokenizer = load_tokenizer(spec, path, bundle.read(spec.file))
        for entry in spec.corpus:
            if tokenizer.encode(entry.text) != list(entry.ids):
                raise BundleError(
                    f"{path}: encodes {entry.text[:40]!r} differently from the checkpoint's tokenizer at export: "
                    "export the bundle again, or install the tokenizer library that its manifest names"
                )
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with the special tokens that the original tokenizer adds.

        Raises PromptError for text that is not valid Unicode (lone surrogates, as from undecodable bytes on a command
        line), and BundleError if the library fails because of the tokenizer's file.
        """
        _check_unicode(text)
        with _library_errors():
            return self._encode(text)

    def encode_rendered(self, text: str) -> list[int]:
        """The ids of a text rendered by a chat template, without added special tokens.

        Special tokens in the text, such as "<s>", become their ids. Raises as `encode`.
        """
        _check_unicode(text)
        with _library_errors():
            return self._encode_rendered(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. Special tokens are skipped, and bytes that are not UTF-8 become U+FFFD.

        Raises BundleError as `encode`.
        """
        with _library_errors():
            return self._decode([token for token in ids if not self.is_hidden(token)])

    def text_of(self, token: int) -> str:
        """The text that one token adds inside a longer text, with its leading space; empty for a special token.

        Incomplete characters become U+FFFD, so the texts of several tokens do not always join to that of `decode`.
        """
        if self.is_hidden(token):
            return ""
        # Decoded alone, a token would lose its leading space.
        with _library_errors():
            before = self._decode(self._some_text)
            text = self._decode([*self._some_text, token])
            return text[len(before) :] if text.startswith(before) else self._decode([token])

    def special_token(self, text: str) -> int | None:
        """The id of the special token that is written as `text`; None if there is none."""
        ids = self.encode_rendered(text)
        found = len(ids) == 1 and self.is_hidden(ids[0]) and self.token_text(ids[0]) == text
        return ids[0] if found else None

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of all tokens with their ids, 64 hex digits: equal for tokenizers of one vocabulary."""
        hashed = hashlib.sha256()
        for token, text in sorted(self._vocabulary().items()):
            hashed.update(f"{token} {text!r}\n".encode())
        return hashed.hexdigest()

    @cached_property
    def _some_text(self) -> list[int]:
        return [token for token in self._encode_rendered("a") if not self.is_hidden(token)]

    @abstractmethod
    def token_text(self, token: int) -> str | None:
        """How the vocabulary writes a token, such as "</s>" or "▁the"; None for an id that it does not have."""

    @abstractmethod
    def is_hidden(self, token: int) -> bool:
        """Whether a token has no text: a special token, or an id that the tokenizer does not know."""

    @abstractmethod
    def _vocabulary(self) -> dict[int, str]: ...

    @abstractmethod
    def _encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def _encode_rendered(self, text: str) -> list[int]: ...

    @abstractmethod
    def _decode(self, ids: Sequence[int]) -> str: ...


class JsonTokenizer(Tokenizer):
    """A tokenizer.json, through the tokenizers library; its post-processor adds the special tokens."""

    def __init__(self, path: Path, content: bytes | None = None) -> None:
        """`content` is that of the file; None reads it."""
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(path.read_bytes() if content is None else content)
        except BaseException as error:
            if not _from_tokenizers(error):
                raise
            raise _unreadable(path, "tokenizers", tokenizers.__version__, error) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = frozenset(token for token, entry in added.items() if entry.special)

    @property
    def definition(self) -> str:
        """The tokenizer.json."""
        return str(self._tokenizer.to_str())

    @property
    def size(self) -> int:
        """The number of ids."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def is_hidden(self, token: int) -> bool:
        return token in self._special or self.token_text(token) is None

    def token_text(self, token: int) -> str | None:
        found: str | None = self._tokenizer.id_to_token(token) if token >= 0 else None
        return found

    def _vocabulary(self) -> dict[int, str]:
        return {token: text for text, token in self._tokenizer.get_vocab(with_added_tokens=True).items()}

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def _encode_rendered(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model with BOS, EOS and added tokens beside it, as the bundle says."""

    def __init__(
        self,
        path: Path,
        add_bos: bool,
        content: bytes | None = None,
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        added: Sequence[AddedToken] = (),
    ) -> None:
        """`content` is that of the file, None reads it; the others are those of `TokenizerSpec`."""
        import sentencepiece

        try:
            model = path.read_bytes() if content is None else content
            self._processor = sentencepiece.SentencePieceProcessor()
            self._processor.LoadFromSerializedProto(model)  # the constructor ignores empty bytes
        except (
            OSError,
            RuntimeError,
            UnicodeDecodeError,
        ) as error:  # the last if a piece in an error message is not UTF-8
            raise _unreadable(path, "sentencepiece", sentencepiece.__version__, error) from None
        self._size = self._processor.get_piece_size()
        self._start = [self._processor.bos_id() if bos_id is None else bos_id] if add_bos else []
        self._end = [] if eos_id is None else [eos_id]
        self._added = {token.content: token for token in added}
        self._texts = {token.id: token.content for token in added}
        self._special = frozenset(token.id for token in added if token.special)

    def is_hidden(self, token: int) -> bool:
        if token in self._texts:
            return token in self._special
        return not 0 <= token < self._size or self._processor.is_control(token)

    def token_text(self, token: int) -> str | None:
        if token in self._texts:
            return self._texts[token]
        return str(self._processor.id_to_piece(token)) if 0 <= token < self._size else None

    def _vocabulary(self) -> dict[int, str]:
        return {token: str(self._processor.id_to_piece(token)) for token in range(self._size)} | self._texts

    def _encode(self, text: str) -> list[int]:
        return [*self._start, *self._encode_parts(text, self._added_texts), *self._end]

    def _encode_rendered(self, text: str) -> list[int]:
        return self._encode_parts(text, self._special_texts)

    def _encode_parts(self, text: str, tokens: re.Pattern[str]) -> list[int]:
        """The ids of a text in which `tokens` matches those that the model does not encode itself."""
        # SentencePiece puts a space in front of each text; it belongs in front of the first part only.
        ids: list[int] = []
        start = 0
        for found in tokens.finditer(text):
            ids += self._encode_part(text[start : found.start()], at_start=start == 0)
            ids.append(self._id_of(found.group()))
            start = found.end()
        return ids + self._encode_part(text[start:], at_start=start == 0)

    def _encode_part(self, text: str, at_start: bool) -> list[int]:
        processor = self._processor if at_start else self._without_prefix
        ids: list[int] = processor.encode(text, out_type=int)
        return ids

    def _id_of(self, matched: str) -> int:
        token = self._added.get(matched) or self._added.get(matched.strip())
        return int(self._processor.piece_to_id(matched)) if token is None else token.id

    @cached_property
    def _added_texts(self) -> re.Pattern[str]:
        return _any_of(self._added.values())

    @cached_property
    def _special_texts(self) -> re.Pattern[str]:
        """Matches added tokens, and the pieces that text never encodes to: control pieces and the unknown piece."""
        processor = self._processor
        ids = (i for i in range(self._size) if processor.is_control(i) or processor.is_unknown(i))
        pieces = [AddedToken(i, str(processor.id_to_piece(i))) for i in ids if i not in self._texts]
        return _any_of([*self._added.values(), *pieces])

    @cached_property
    def _without_prefix(self) -> sentencepiece.SentencePieceProcessor:
        import sentencepiece

        model = self._processor.serialized_model_proto() + _NO_DUMMY_PREFIX
        return sentencepiece.SentencePieceProcessor(model_proto=model)

    def _decode(self, ids: Sequence[int]) -> str:
        text, start = "", 0
        for end in (*(i for i, token in enumerate(ids) if token in self._texts), len(ids)):
            processor = self._processor if start == 0 else self._without_prefix
            text += str(processor.decode(list(ids[start:end])))
            text += "".join(self._texts[token] for token in ids[end : end + 1])
            start = end + 1
        return text


def load_tokenizer(spec: TokenizerSpec, path: Path, content: bytes | None = None) -> Tokenizer:
    """The tokenizer that `spec` describes, from a file or its content, without a check of its corpus.

    Raises BundleError for a file that the library cannot read.
    """
    if spec.kind == "sentencepiece":
        return SentencePieceTokenizer(
            path, spec.add_bos, content, bos_id=spec.bos_id, eos_id=spec.eos_id, added=spec.added
        )
    return JsonTokenizer(path, content)


def _any_of(tokens: Iterable[AddedToken]) -> re.Pattern[str]:
    """Matches each of the tokens with the whitespace that belongs to it, the longest one first; nothing for none."""
    space = r"\s*"
    parts = [
        space * token.lstrip + re.escape(token.content) + space * token.rstrip
        for token in sorted(tokens, key=lambda token: len(token.content), reverse=True)
    ]
    return re.compile("|".join(parts) or "(?!)")


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the text is not valid UTF-8 at character {error.start}: fix or remove the invalid character"
        ) from None


@contextlib.contextmanager
def _library_errors() -> Iterator[None]:
    """Turn an error of a tokenizer library over text or ids, which its file causes, into a BundleError."""
    try:
        yield
    except BaseException as error:
        if not _from_tokenizers(error) and type(error) not in (RuntimeError, UnicodeDecodeError):  # sentencepiece
            raise
        reason = " ".join(str(error).split())
        raise BundleError(f"the bundle's tokenizer fails ({reason}): export the bundle again") from None


def _from_tokenizers(error: BaseException) -> bool:
    """Whether the tokenizers library raised this: it has no error classes of its own.

    It raises ValueError or Exception itself, or a Rust panic, which is not an Exception.
    """
    return type(error) in (Exception, ValueError) or type(error).__name__ == "PanicException"


def _unreadable(path: Path, library: str, version: str, error: BaseException) -> BundleError:
    return BundleError(
        f"{path}: {library} {version} cannot read it ({' '.join(str(error).split())}): "
        "export the bundle again, or install the version that its manifest names"
    )
