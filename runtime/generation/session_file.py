"""A conversation in a file: its tokens, their keys and values, its messages. docs/state-file.md has the format."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from satchel.runtime.bundle import strict_json
from satchel.runtime.bundle.atomic_write import check_target, write_parts
from satchel.runtime.bundle.manifest import CacheSpec, Manifest
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.errors import BundleError, PromptError
from satchel.runtime.execution.kv_cache import Cache, KVCache, position_bytes
from satchel.runtime.generation.prefix_cache import Prefix
from satchel.runtime.util.progress import progress_bar
from satchel.runtime.util.terminal import printable

MAGIC = b"satchel-state "
VERSION = 1
HEADER_LIMIT = 4 << 20  # bytes; parsed, JSON of this size takes 200 MiB at worst
MIB = 1 << 20
ID_TYPE = np.dtype("<i8")
_DIGEST = hashlib.sha256().digest_size * 2  # hex digits
_SHOWN = 12  # hex digits of a fingerprint that messages show


@dataclass(frozen=True)
class SavedState:
    """What a conversation needs to go on.

    `prefix` has its token ids [length], with a cache that holds the keys and values of all of them. `messages`, objects
    as a chat has them, and `details`, whatever else there is, are JSON values; both may be empty.
    """

    prefix: Prefix
    messages: tuple[dict[str, Any], ...] = ()
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Header:
    """The header of a state file, as docs/state-file.md has it. `layers` are (kv_heads, key_dim, value_dim)."""

    version: int
    fingerprint: str
    tokens: int
    dtype: str
    layers: tuple[tuple[int, ...], ...]
    payload_bytes: int
    payload_sha256: str
    messages: tuple[dict[str, Any], ...]
    details: dict[str, Any]


def write_state(
    path: str | Path, fingerprint: str, state: SavedState, option: str = "--save-state", *, progress: bool = False
) -> None:
    """Write a state whole, in place of what was at `path`; `fingerprint` is that of the bundle whose cache it is.

    `option` is what named the file, for messages; `progress` shows a bar when it takes more than two seconds. Raises
    SatchelError, and leaves what was there, when the file cannot be written or the messages are no JSON.
    """
    path, prefix = Path(path), state.prefix
    check_target(path, option)
    if prefix.cache.rows != 1 or not 0 < len(prefix.ids) <= prefix.cache.length:
        raise PromptError(f"{option} {path}: there are no keys and values for these tokens: generate first")
    size = sum(map(len, _payload(prefix)))
    with progress_bar(2 * size, "saving", "B", shown=progress) as bar:
        digest = hashlib.sha256()
        for part in _payload(prefix, bar.update):
            digest.update(part)
        header = Header(
            version=VERSION,
            fingerprint=fingerprint,
            tokens=len(prefix.ids),
            dtype=next(iter(prefix.cache.past.values())).dtype.name,
            layers=_layers_of(prefix.cache),
            payload_bytes=size,
            payload_sha256=digest.hexdigest(),
            messages=state.messages,
            details=state.details,
        )
        start = _start(header, f"{option} {path}")
        write_parts(path, itertools.chain([start], _payload(prefix, bar.update)), option)


def read_state(
    path: str | Path, bundle: Bundle, accept: Callable[[int], object] = lambda count: None, *, progress: bool = False
) -> SavedState:
    """Read a state that was saved with this very bundle.

    `accept` hears the number of tokens before memory is taken for them, and may raise. `progress` shows a bar when it
    takes more than two seconds. Raises PromptError for a file that is not there or cannot be read, BundleError for one
    that is no state, is damaged, or was saved with another bundle.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise PromptError(f"{path}: no such file: name one that a state was saved in")
        with path.open("rb") as file:
            header = _read_header(file, path)
            _check_header(header, bundle, path)
            rest = os.fstat(file.fileno()).st_size - file.tell()
            if rest != header.payload_bytes:
                _damaged(path, f"{rest} bytes after its header, which says {header.payload_bytes}")
            accept(header.tokens)
            prefix = _read_payload(file, header, bundle.manifest, path, progress)
    except OSError as error:
        raise PromptError(f"{path}: cannot be read ({error.strerror}): name another file") from None
    return SavedState(prefix, header.messages, header.details)


def check_size(path: str | Path, manifest: Manifest, max_context: int, most: int, count: int) -> None:
    """Raise PromptError where a context of `max_context`, or a store of at most `most`, cannot take `count` tokens."""
    if count > max_context:
        raise PromptError(
            f"{path}: has {count} tokens but the context holds {max_context}: raise --max-context to {count} or more "
            f"(this bundle allows up to {manifest.model.max_context})"
        )
    if count > most:
        mib = -(-count * position_bytes(manifest.kv_cache) // MIB)
        raise PromptError(
            f"{path}: has {count} tokens but the prefix memory holds {most}: raise --prefix-cache-mib to {mib} or more"
        )


def _read_header(file: BufferedReader, path: Path) -> Header:
    """The header, whose hash is right and whose keys and types are known; nothing else is checked."""
    magic = file.readline(len(MAGIC) + _DIGEST + 1)
    if not magic.startswith(MAGIC):
        raise BundleError(f"{path}: no saved state of satchel: name a file that a state was saved in")
    line = file.readline(HEADER_LIMIT + 1)
    if len(line) > HEADER_LIMIT:
        _damaged(path, f"its header is longer than {HEADER_LIMIT} bytes")
    if magic != _magic_line(line) or not line.endswith(b"\n"):
        _damaged(path, "its header is not whole (the SHA-256 differs)")
    try:
        document = json.loads(line.decode("utf-8"), parse_constant=_no_constant)
        version = document.get("version") if isinstance(document, dict) else None
        if type(version) is int and version != VERSION:
            raise BundleError(
                f"{path}: a state of version {str(version)[:20]}, but this satchel reads version {VERSION}: "
                "install the satchel that saved it"
            )
        header: Header = strict_json.from_json(Header, document)
    except (ValueError, RecursionError) as error:
        _damaged(path, f"its header is wrong ({printable(str(error)[:160])})")
    return header


def _check_header(header: Header, bundle: Bundle, path: Path) -> None:
    """Refuse what is not for this bundle, and sizes that do not follow from each other."""
    own, spec, model = bundle.fingerprint, bundle.manifest.kv_cache, bundle.manifest.model
    if header.fingerprint != own:
        other = printable(header.fingerprint[:_SHOWN])
        raise BundleError(
            f"{path}: was saved with another bundle ({other}), this one is {own[:_SHOWN]}: "
            "open the bundle that it was saved with"
        )
    if header.dtype != spec.dtype or header.layers != _layers_of_spec(spec):
        _damaged(path, "its keys and values have not the form of this bundle's")
    if not 1 <= header.tokens <= model.max_context:
        _damaged(path, f"{str(header.tokens)[:20]} tokens, where this bundle allows 1 to {model.max_context}")
    expected = header.tokens * (ID_TYPE.itemsize + position_bytes(spec))
    if header.payload_bytes != expected:
        found = str(header.payload_bytes)[:20]
        _damaged(path, f"its header says {found} bytes, where {header.tokens} tokens take {expected}")


def _read_payload(file: BufferedReader, header: Header, manifest: Manifest, path: Path, progress: bool) -> Prefix:
    """Token ids, and keys and values straight into the buffers of a new cache of their size."""
    cache = KVCache(manifest.kv_cache, header.tokens, manifest.model.max_context)
    prefix = Prefix(np.empty(header.tokens, ID_TYPE), cache)
    cache.advance(header.tokens)
    digest = hashlib.sha256()
    with progress_bar(header.payload_bytes, "loading", "B", shown=progress) as bar:
        for part in _payload(prefix, bar.update):
            if file.readinto(part) != len(part):
                _damaged(path, "it ends too early")
            digest.update(part)
    if digest.hexdigest() != header.payload_sha256:
        _damaged(path, "its SHA-256 differs")
    if prefix.ids.min() < 0 or prefix.ids.max() >= manifest.model.vocab_size:
        _damaged(path, f"it has token ids outside the vocabulary of {manifest.model.vocab_size}")
    return prefix


def _payload(prefix: Prefix, done: Callable[[int], object] = lambda count: None) -> Iterator[memoryview]:
    """The bytes of the token ids, then those of each layer's keys and values, head by head, in their own memory.

    `done` hears the size of each part when the next one is taken.
    """
    ids = np.ascontiguousarray(prefix.ids, ID_TYPE)
    heads = (head for buffer in prefix.cache.past.values() for head in buffer[0, :, : len(ids)])
    for array in itertools.chain([ids], heads):
        yield array.reshape(-1).view(np.uint8).data
        done(array.nbytes)


def _start(header: Header, where: str) -> bytes:
    """The lines before the payload. Raises PromptError where there is no JSON for the messages, or too much."""
    try:
        if not all(isinstance(message, dict) for message in header.messages):
            raise TypeError("a message is no object")
        line = json.dumps(strict_json.to_json(header), allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        reason = printable(str(error)[:160])
        raise PromptError(f"{where}: messages and details cannot be written as JSON ({reason}): change them") from None
    if len(line) > HEADER_LIMIT:
        raise PromptError(
            f"{where}: messages and details take {len(line)} bytes, more than {HEADER_LIMIT}: save fewer of them"
        )
    return _magic_line(line) + line


def _magic_line(line: bytes) -> bytes:
    return MAGIC + hashlib.sha256(line).hexdigest().encode("ascii") + b"\n"


def _layers_of(cache: Cache) -> tuple[tuple[int, ...], ...]:
    shapes = [buffer.shape for buffer in cache.past.values()]  # keys and values in turn
    return tuple((key[1], key[3], value[3]) for key, value in zip(shapes[::2], shapes[1::2], strict=True))


def _layers_of_spec(spec: CacheSpec) -> tuple[tuple[int, ...], ...]:
    return tuple((layer.kv_heads, layer.key_dim, layer.value_dim) for layer in spec.layers)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _damaged(path: Path, what: str) -> NoReturn:
    raise BundleError(f"{path}: damaged: {what}: save the state again")
