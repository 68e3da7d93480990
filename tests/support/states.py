"""Saved states: random ones, and their files taken apart and put together again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import numpy as np
from support.tiny_bundle import MAX_CONTEXT, VOCABULARY

from satchel.runtime.bundle.manifest import CacheLayer, CacheSpec
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.execution.kv_cache import KVCache
from satchel.runtime.generation.prefix_cache import Prefix
from satchel.runtime.generation.session_file import SavedState

TOKENS = 5
MESSAGES = ({"role": "user", "content": "Grüße 猫 \ud800\n"}, {"role": "assistant", "content": None, "n": [1, 2.5]})
DETAILS = {"seed": 3, "options": {"stop": ["\n"]}}
OTHER_SPEC = CacheSpec(
    "shared", "int8", (CacheLayer(3, 8, 4, "pk0", "pv0", "k0", "v0"), CacheLayer(1, 16, 2, "pk1", "pv1", "k1", "v1"))
)


def bundle_with(bundle: Bundle, spec: CacheSpec | None = None, **model: int) -> Bundle:
    """The bundle with another description of its cache, or other facts of its model."""
    manifest = bundle.manifest
    facts = dataclasses.replace(manifest.model, **model)
    return Bundle(
        bundle.folder,
        dataclasses.replace(manifest, kv_cache=spec or manifest.kv_cache, model=facts),
        bundle.specialized,
    )


def make_state(spec: CacheSpec, room: int = 3, seed: int = 0, tokens: int = TOKENS) -> SavedState:
    """A state of random tokens and numbers in a cache that holds one more, and has room for `room` more."""
    rng = np.random.default_rng(seed)
    cache = KVCache(spec, tokens + room, MAX_CONTEXT)
    for buffer in cache.past.values():
        buffer[:] = (rng.normal(0, 40, buffer.shape)).astype(buffer.dtype)
    cache.advance(tokens + 1)
    return SavedState(Prefix(rng.integers(0, VOCABULARY, tokens), cache), MESSAGES, DETAILS)


def same(found: SavedState, wanted: SavedState) -> bool:
    """Whether two states are equal, number for number."""
    count = len(wanted.prefix.ids)
    found_buffers, buffers = found.prefix.cache.past, wanted.prefix.cache.past
    return (
        found.prefix.ids.tolist() == wanted.prefix.ids.tolist()
        and found.prefix.cache.length == count
        and list(found_buffers) == list(buffers)
        and all(
            found_buffers[name].dtype == buffer.dtype
            and found_buffers[name][:, :, :count].tobytes() == buffer[:, :, :count].tobytes()
            for name, buffer in buffers.items()
        )
        and (found.messages, found.details) == (wanted.messages, wanted.details)
    )


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The parsed header of a state file, and its tensors."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def join(header: dict[str, Any] | bytes, payload: bytes) -> bytes:
    """A state file of a header (parsed, or as it is) and tensors."""
    line = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(line).to_bytes(8, "little") + line + payload


def resigned(header: dict[str, Any], payload: bytes) -> bytes:
    """A state file whose hash is right for this header and these tensors."""
    metadata = {key: value for key, value in header["__metadata__"].items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True, separators=(",", ":")).encode() + payload)
    return join({**header, "__metadata__": metadata | {"sha256": digest.hexdigest()}}, payload)
