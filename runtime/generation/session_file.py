"""A saved state: token ids with what layers keep of them, and the messages of a conversation, in a safetensors file.

The format is described in docs/state-file.md. The safetensors library is not used: it would need a second copy of the
whole cache, contiguous, to write it and another one to read it, and it maps the file, so that a file that shrinks
meanwhile kills the process. Keys and values go straight between the file and the buffers of the cache here.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.bundle.atomic_write import check_target, write_parts
from satchel.runtime.bundle.manifest import CacheSpec, Manifest
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.bundle.states import StateSpec
from satchel.runtime.errors import BundleError, PromptError
from satchel.runtime.execution.kv_cache import KVCache, position_bytes
from satchel.runtime.generation.prefix_cache import Prefix
from satchel.runtime.util.progress import progress_bar
from satchel.runtime.util.terminal import printable

FORMAT, VERSION = "satchel-state", "2"
HEADER_LIMIT = 4 << 20  # bytes; JSON of this size takes up to 200 MiB when parsed
MIB = 1 << 20
ID_TYPE = np.dtype("<i8")
DTYPES = {"float32": "F32", "float16": "F16", "int8": "I8", "int64": "I64"}
_LENGTH_BYTES = 8
_ALIGNMENT = 8
_SHOWN = 12  # hex digits of a fingerprint that messages show
_KEYS = {"format", "version", "fingerprint", "messages", "details", "sha256"}
_ADAPTER = "adapter"
"""A key that only the state of an adapter has."""

Tensors = dict[str, dict[str, Any]]
Entry = tuple[str, np.dtype[Any], tuple[int, ...]]  # name, dtype, shape


@dataclass(frozen=True)
class SavedState:
    """What is needed to continue a conversation.

    `prefix` has its token ids [length], with a cache that holds the keys and values of all of them, and the states
    after the last. `messages`, objects as a chat has them, and `details`, anything else, are JSON values; both may be
    empty.
    """

    prefix: Prefix
    messages: tuple[dict[str, Any], ...] = ()
    details: dict[str, Any] = field(default_factory=dict)


def write_state(
    path: str | Path, fingerprint: str, state: SavedState, option: str = "--save-state", *, progress: bool = False
) -> None:
    """Write a state, atomically; `fingerprint` is that of the bundle that the cache belongs to.

    `option` names the path in error messages; `progress` shows a bar if it takes more than two seconds. Raises
    SatchelError, and leaves what was there, if the file cannot be written or the messages are not JSON values.
    """
    path, prefix = Path(path), state.prefix
    check_target(path, option)
    if prefix.cache.rows != 1 or not 0 < len(prefix.ids) == prefix.cache.reach(len(prefix.ids)):
        raise PromptError(f"{option} {path}: there are no keys and values for these tokens: generate first")
    where = f"{option} {path}"
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": fingerprint,
        "messages": _dump(list(state.messages), where, all(isinstance(each, dict) for each in state.messages)),
        "details": _dump(state.details, where, isinstance(state.details, dict)),
    }
    if prefix.cache.adapter is not None:
        metadata[_ADAPTER] = prefix.cache.adapter
    size = sum(map(len, _payload(prefix)))
    with progress_bar(2 * size, "saving", "B", shown=progress) as bar:
        digest = _digest_of(metadata)
        for part in _payload(prefix, bar.update):
            digest.update(part)
        tensors = _tensors(len(prefix.ids), _entries_of(prefix))
        start = _start({"__metadata__": metadata | {"sha256": digest.hexdigest()}, **tensors}, where)
        write_parts(path, itertools.chain([start], _payload(prefix, bar.update)), option)


def read_state(
    path: str | Path, bundle: Bundle, accept: Callable[[int], object] = lambda count: None, *, progress: bool = False
) -> SavedState:
    """Read a state that was saved with this bundle.

    `accept` gets the number of tokens before memory is allocated for them, and may raise. `progress` shows a bar if it
    takes more than two seconds. Raises PromptError for a file that does not exist or cannot be read, BundleError for
    one that is not a state, is damaged, or was saved with another bundle.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise PromptError(f"{path}: no such file: name a file that a state was saved in")
        with path.open("rb") as file:
            metadata, tensors = _read_header(file, path)
            count = _check_header(metadata, tensors, bundle, path)
            spec = _spec_of(tensors, bundle)
            expected = count * (ID_TYPE.itemsize + position_bytes(spec)) + bundle.manifest.state_bytes
            rest = os.fstat(file.fileno()).st_size - file.tell()
            if rest != expected:
                _damaged(path, f"{rest} bytes of tensors, where {count} tokens take {expected}")
            accept(count)
            prefix = _read_payload(file, metadata, count, spec, bundle.manifest, path, progress)
            prefix = _stored_as(bundle.kv_cache, prefix, bundle.manifest)
    except OSError as error:
        raise PromptError(f"{path}: cannot be read ({error.strerror})") from None
    messages, details = _load(metadata["messages"], path), _load(metadata["details"], path)
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        _damaged(path, "its messages are not a list of objects")
    if not isinstance(details, dict):
        _damaged(path, "its details are not an object")
    return SavedState(prefix, tuple(messages), details)


def check_size(path: str | Path, bundle: Bundle, max_context: int, max_positions: int, count: int) -> None:
    """Raise PromptError if `count` tokens exceed the context or the `max_positions` of a prefix cache."""
    if count > max_context:
        raise PromptError(
            f"{path}: has {count} tokens but the context holds {max_context}: raise --max-context to {count} or more "
            f"(this bundle allows up to {bundle.manifest.model.max_context})"
        )
    if count > max_positions:
        mib = -(-(count * position_bytes(bundle.kv_cache) + bundle.manifest.state_bytes) // MIB)
        raise PromptError(
            f"{path}: has {count} tokens but the prefix cache holds {max_positions}: raise --prefix-cache-mib to {mib} "
            "or more"
        )


def check_adapter(path: str | Path, state: SavedState, adapter: str | None) -> None:
    """Raise PromptError if a state was saved with another adapter."""
    saved = state.prefix.cache.adapter
    if saved != adapter:
        found, wanted = (
            "no adapter" if name is None else f"adapter {printable(name[:80])}" for name in (saved, adapter)
        )
        remedy = "leave --adapter out" if saved is None else f"give --adapter {printable(saved[:80])}"
        raise PromptError(f"{path}: was saved with {found}, and this runs {wanted}: {remedy}")


def _read_header(file: BufferedReader, path: Path) -> tuple[dict[str, str], Tensors]:
    """The metadata and the entries of tensors: of a state of this version, and otherwise unchecked."""
    size = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    content = file.read(size) if size <= HEADER_LIMIT else b""
    try:
        header = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError):
        header = None
    metadata = header.pop("__metadata__", None) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise BundleError(f"{path}: not a saved state of satchel: name a file that a state was saved in")
    if metadata.get("version") != VERSION:
        version = printable(str(metadata.get("version"))[:20])
        raise BundleError(
            f"{path}: a state of version {version}, but this satchel reads version {VERSION}: use the satchel that "
            "saved it"
        )
    if metadata.keys() - {_ADAPTER} != _KEYS or not all(isinstance(value, str) for value in metadata.values()):
        _damaged(path, "its metadata have other keys or types")
    return metadata, header


def _check_header(metadata: Mapping[str, str], tensors: Tensors, bundle: Bundle, path: Path) -> int:
    """The number of tokens. Raises BundleError unless the tensors are exactly those of this bundle's cache."""
    own, manifest, limit = bundle.fingerprint, bundle.manifest, bundle.manifest.model.max_context
    if metadata["fingerprint"] != own:
        other = printable(metadata["fingerprint"][:_SHOWN])
        raise BundleError(
            f"{path}: was saved with another bundle ({other}), this one is {own[:_SHOWN]}: "
            "open the bundle that it was saved with"
        )
    entry = tensors.get("token_ids")
    shape = entry.get("shape") if isinstance(entry, dict) else None
    count = shape[0] if isinstance(shape, list) and len(shape) == 1 else None
    if type(count) is not int or not 1 <= count <= limit:
        _damaged(path, f"the shape of its token ids is {str(shape)[:40]}, where this bundle allows 1 to {limit}")
    if tensors != _tensors(count, _entries_for(_spec_of(tensors, bundle), manifest.states, count)):
        _damaged(path, "its tensors are not those of this bundle's KV cache and states")
    return count


def _read_payload(
    file: BufferedReader,
    metadata: Mapping[str, str],
    count: int,
    spec: CacheSpec,
    manifest: Manifest,
    path: Path,
    progress: bool,
) -> Prefix:
    """Token ids, and keys and values read straight into the buffers of a new cache of their size."""
    cache = KVCache(spec, count, manifest.model.max_context, states=manifest.states)
    cache.adapter = metadata.get(_ADAPTER)
    prefix = Prefix(np.empty(count, ID_TYPE), cache)
    cache.advance(count)
    cache.long = manifest.model.is_long(count)
    digest = _digest_of({key: value for key, value in metadata.items() if key != "sha256"})
    with progress_bar(sum(map(len, _payload(prefix))), "loading", "B", shown=progress) as bar:
        for part in _payload(prefix, bar.update):
            if file.readinto(part) != len(part):
                _damaged(path, "it ends too early")
            digest.update(part)
    if digest.hexdigest() != metadata["sha256"]:
        _damaged(path, "its SHA-256 differs")
    if prefix.ids.min() < 0 or prefix.ids.max() >= manifest.model.vocab_size:
        _damaged(path, f"it has token ids outside the vocabulary of {manifest.model.vocab_size}")
    return prefix


def _tensors(count: int, entries: Iterable[Entry]) -> Tensors:
    """The header's entries for `count` token ids and what a cache holds of them."""
    tensors, end = {}, 0
    for name, dtype, shape in (("token_ids", ID_TYPE, (count,)), *entries):
        begin, end = end, end + int(np.prod(shape, dtype=object)) * dtype.itemsize
        tensors[name] = {"dtype": DTYPES[dtype.name], "shape": list(shape), "data_offsets": [begin, end]}
    return tensors


def _spec_of(tensors: Tensors, bundle: Bundle) -> CacheSpec:
    """The KV cache that a state was saved from: that of the portable graphs, or of a variant, in the type it has.

    That of the graphs that run, where the file has neither.
    """
    manifest = bundle.manifest
    variants = [] if manifest.static else [manifest.cache_of(variant.name) for variant in manifest.variants]
    first = next((past for layer in manifest.kv_cache.layers for past, _, _ in layer.buffers), "")
    entry = tensors.get(first)
    saved = entry.get("dtype") if isinstance(entry, dict) else None
    known = {DTYPES[spec.dtype]: spec for spec in (*variants, manifest.kv_cache)}
    return known.get(str(saved), bundle.kv_cache)


def _stored_as(spec: CacheSpec, prefix: Prefix, manifest: Manifest) -> Prefix:
    """The same in a cache of this type. What float16 does not reach becomes its largest number, as in the kernels."""
    cache, count = prefix.cache, len(prefix.ids)
    if all(buffer.dtype == spec.dtype for buffer in cache.past.values()):
        return prefix
    most = np.finfo(spec.dtype).max
    for buffer in cache.past.values():
        np.clip(buffer, -most, most, out=buffer)
    stored = KVCache(spec, count, manifest.model.max_context, states=manifest.states)
    stored.copy_from(cache, count)
    return Prefix(prefix.ids, stored)


def _entries_for(spec: CacheSpec, states: Sequence[StateSpec], count: int) -> Iterator[Entry]:
    """What a cache of this type holds of `count` tokens, in the order of the file."""
    for state in states:
        yield state.past, np.dtype(state.dtype), state.shape
    dtype = np.dtype(spec.dtype)
    for layer in spec.layers:
        for past, _, width in layer.buffers:
            yield past, dtype, (layer.kv_heads, count, width)


def _entries_of(prefix: Prefix) -> Iterator[Entry]:
    """The same of a cache itself."""
    for name, array in _arrays(prefix):
        yield name, array.dtype, array.shape


def _arrays(prefix: Prefix) -> Iterator[tuple[str, NDArray[Any]]]:
    """The states after the token ids, then each layer's keys and values of them."""
    count = len(prefix.ids)
    for name, state in prefix.cache.states_at(count).items():
        yield name, state[0]
    for name, buffer in prefix.cache.past.items():
        yield name, buffer[0, :, :count]


def _payload(prefix: Prefix, done: Callable[[int], object] = lambda count: None) -> Iterator[memoryview]:
    """The bytes of the token ids, then those of what the cache holds of them, head by head, in their own memory.

    `done` gets the size of each part when the next one is taken.
    """
    ids = np.ascontiguousarray(prefix.ids, ID_TYPE)
    parts = (part for _, array in _arrays(prefix) for part in array)
    for array in itertools.chain([ids], parts):
        yield array.reshape(-1).view(np.uint8).data
        done(array.nbytes)


def _start(header: Mapping[str, Any], where: str) -> bytes:
    """The length and the header, padded so that the tensors are aligned. Raises PromptError for too long a header."""
    content = json.dumps(header, separators=(",", ":")).encode("ascii")
    content += b" " * (-len(content) % _ALIGNMENT)
    if len(content) > HEADER_LIMIT:
        raise PromptError(f"{where}: messages and details take {len(content)} bytes, more than {HEADER_LIMIT}")
    return len(content).to_bytes(_LENGTH_BYTES, "little") + content


def _digest_of(metadata: Mapping[str, str]) -> Any:
    """A SHA-256 over the metadata, to which the tensors are added."""
    return hashlib.sha256(json.dumps(metadata, sort_keys=True, separators=(",", ":")).encode("ascii"))


def _dump(value: object, where: str, right: bool) -> str:
    try:
        if not right:
            raise TypeError("must be objects")
        return json.dumps(value, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        reason = printable(str(error)[:160])
        raise PromptError(f"{where}: messages and details cannot be written as JSON ({reason})") from None


def _load(text: str, path: Path) -> Any:
    try:
        return json.loads(text, parse_constant=_not_json)
    except (ValueError, RecursionError):
        _damaged(path, "its messages or details are not JSON")


def _not_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _damaged(path: Path, what: str) -> NoReturn:
    raise BundleError(f"{path}: damaged: {what}: save the state again")
