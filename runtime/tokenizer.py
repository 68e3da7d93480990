"""Text to token ids and back, with the tokenizer that a bundle carries."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

from satchel.runtime.bundle import Bundle
from satchel.runtime.errors import BundleError, PromptError
from satchel.runtime.manifest import TokenizerSpec


class Tokenizer(ABC):
    """What both kinds of tokenizer have in common. Threads may share one."""

    @staticmethod
    def open(bundle: Bundle) -> Tokenizer:
        """The bundle's tokenizer, checked: the texts in the manifest must give the ids recorded at export.

        A library of another version that splits text otherwise would quietly spoil every answer. Raises BundleError for
        that, for a file that the library cannot read, and for a bundle without a tokenizer.
        """
        spec = bundle.manifest.tokenizer
        if spec is None:
            raise BundleError(f"{bundle.folder}: has no tokenizer: use token ids, or export it again with --tokenizer")
        path = bundle.path(spec.file)
        tokenizer = _load(spec, path)
        for entry in spec.corpus:
            if tokenizer.encode(entry.text) != list(entry.ids):
                raise BundleError(
                    f"{path}: encodes {entry.text[:40]!r} otherwise than the checkpoint's tokenizer did at export: "
                    "export the bundle again, or install the tokenizer library that its manifest names"
                )
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with the special tokens that the bundle's tokenizer adds: those of the original tokenizer.

        Raises PromptError for text that is not Unicode (lone surrogates, as from undecodable command line bytes).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PromptError(f"the text is not valid UTF-8 at character {error.start}: mend or remove it") from None
        return self._encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. Special tokens are left out, and bytes that are not UTF-8 become U+FFFD."""
        return self._decode([token for token in ids if not self.is_hidden(token)])

    @abstractmethod
    def is_hidden(self, token: int) -> bool:
        """Whether a token has no text: a special token, or an id that the tokenizer does not know."""

    @abstractmethod
    def _encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def _decode(self, ids: Sequence[int]) -> str: ...


class JsonTokenizer(Tokenizer):
    """A tokenizer.json, through the tokenizers library; its post-processor adds the special tokens."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:
            if type(error) is not Exception:  # the library raises the base class itself, and nothing narrower
                raise
            raise _unreadable(path, "tokenizers", tokenizers.__version__, error) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = frozenset(token for token, entry in added.items() if entry.special)

    def is_hidden(self, token: int) -> bool:
        return token in self._special or self._tokenizer.id_to_token(token) is None

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; BOS is added here, where the bundle says so."""

    def __init__(self, path: Path, add_bos: bool) -> None:
        import sentencepiece

        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise _unreadable(path, "sentencepiece", sentencepiece.__version__, error) from None
        self._size = self._processor.get_piece_size()
        self._add_bos = add_bos

    def is_hidden(self, token: int) -> bool:
        return not 0 <= token < self._size or self._processor.is_control(token)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text, out_type=int, add_bos=self._add_bos)
        return ids

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._processor.decode(list(ids)))


def _unreadable(path: Path, library: str, version: str, error: Exception) -> BundleError:
    return BundleError(
        f"{path}: {library} {version} cannot read it ({' '.join(str(error).split())}): "
        "export the bundle again, or install the version that its manifest names"
    )


def _load(spec: TokenizerSpec, path: Path) -> Tokenizer:
    if spec.kind == "sentencepiece":
        return SentencePieceTokenizer(path, spec.add_bos)
    return JsonTokenizer(path)
