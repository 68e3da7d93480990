"""A state file that is of another bundle, damaged or made up is refused in one clear line."""

from __future__ import annotations

import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from support.states import TOKENS, bundle_with, join, make_state, same, split
from support.tiny_bundle import MAX_CONTEXT, VOCABULARY, write_bundle

from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.errors import BundleError, PromptError, SatchelError
from satchel.runtime.execution.kv_cache import KVCache
from satchel.runtime.generation import session_file as state_file
from satchel.runtime.generation.session_file import SavedState, read_state, write_state
from satchel.runtime.ort.open_bundle import open_bundle

WRONG_HEADERS: list[tuple[dict[str, Any], str]] = [
    ({"version": 2}, r"a state of version 2, but this satchel reads version 1: install the satchel"),
    ({"version": 10**400}, r"a state of version 10{19}, but"),
    ({"version": True}, r"'version' must be a whole number"),
    ({"ke\ny": 1}, r"unknown key 'ke\\ny'"),
    ({"messages": [1]}, r"'messages\[0\]' must be an object"),
    ({"details": []}, r"'details' must be an object"),
    ({"details": {"x": float("nan")}}, r"NaN is no JSON"),
    ({"tokens": 5.0}, r"'tokens' must be a whole number"),
    ({"tokens": 0, "payload_bytes": 0}, r"0 tokens, where this bundle allows 1 to 64"),
    ({"tokens": -1}, r"-1 tokens"),
    ({"tokens": 65}, r"65 tokens"),
    ({"tokens": 10**400}, r"10{19} tokens"),
    ({"tokens": 6}, r"its header says 2600 bytes, where 6 tokens take 3120"),
    ({"payload_bytes": 10**400}, r"its header says 10{19} bytes"),
    ({"dtype": "float16"}, r"keys and values have not the form"),
    ({"layers": [[2, 16, 16]]}, r"keys and values have not the form"),
    ({"layers": [[2, 16, 16], [2, 16]]}, r"keys and values have not the form"),
    ({"fingerprint": "\x1b" * 999}, r"saved with another bundle \((\\x1b){12}\)"),
    ({"payload_sha256": "0" * 64}, r"its SHA-256 differs"),
]


@pytest.fixture(scope="module")
def bundle(tiny: Path) -> Bundle:
    return open_bundle(tiny)


@pytest.fixture(scope="module")
def state(bundle: Bundle) -> SavedState:
    return make_state(bundle.manifest.kv_cache)


@pytest.fixture(scope="module")
def content(bundle: Bundle, state: SavedState, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A good state file."""
    path = tmp_path_factory.mktemp("states") / "good.state"
    write_state(path, bundle.fingerprint, state)
    return path.read_bytes()


def check_refused(folder: Path, bundle: Bundle, content: bytes, message: str) -> None:
    """Read a file of this content: it is refused in one line, without control characters."""
    path = folder / "bad.state"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=message) as caught:
        read_state(path, bundle)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < len(str(path)) + 400


def test_a_state_of_another_bundle_is_refused(tmp_path: Path, bundle: Bundle, content: bytes) -> None:
    other = open_bundle(write_bundle(tmp_path / "other", seed=1))
    (tmp_path / "talk.state").write_bytes(content)
    pair = rf"another bundle \({bundle.fingerprint[:12]}\), this one is {other.fingerprint[:12]}: open the bundle that"
    with pytest.raises(BundleError, match=rf"talk\.state: was saved with {pair}"):
        read_state(tmp_path / "talk.state", other)


@pytest.mark.parametrize(("change", "message"), WRONG_HEADERS)
def test_a_wrong_header_is_refused(
    tmp_path: Path, bundle: Bundle, content: bytes, change: dict[str, Any], message: str
) -> None:
    header, payload = split(content)
    check_refused(tmp_path, bundle, join(header | change, payload), message)


def test_bytes_that_are_no_state_are_refused(tmp_path: Path, bundle: Bundle, content: bytes) -> None:
    header, payload = split(content)
    nested = b'{"version": 1, "details": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"
    missing = {key: value for key, value in header.items() if key != "tokens"}
    for changed, message in (
        (b"", "no saved state of satchel: name a file"),
        (b"\0" * 100, "no saved state of satchel"),
        (b"GGUF" + content, "no saved state of satchel"),
        (content[:90], "its header is not whole"),
        (content.replace(b"Gr", b"gr", 1), "its header is not whole"),
        (join(json.dumps(header).encode(), b""), "its header is not whole"),
        (join(b" " * (4 << 20) + b"\n", payload), r"its header is longer than 4194304 bytes"),
        (join(b"[1]\n", payload), "its header is wrong"),
        (join(b"{\xff}\n", payload), "its header is wrong"),
        (join(b"7" * 5000 + b"\n", payload), "its header is wrong"),
        (join(nested, payload), "its header is wrong"),
        (join(missing, payload), "missing key 'tokens'"),
        (content[:-1], "2599 bytes after its header, which says 2600"),
        (content + b"\0", "2601 bytes after its header, which says 2600"),
        (content[:-1] + bytes([content[-1] ^ 1]), "damaged: its SHA-256 differs: save the state again"),
    ):
        check_refused(tmp_path, bundle, changed, message)


@pytest.mark.parametrize("token", [-1, VOCABULARY, 2**63 - 1])
def test_token_ids_outside_the_vocabulary_are_refused(
    tmp_path: Path, bundle: Bundle, content: bytes, token: int
) -> None:
    header, payload = split(content)
    payload = payload[:8] + token.to_bytes(8, "little", signed=True) + payload[16:]
    header["payload_sha256"] = hashlib.sha256(payload).hexdigest()
    check_refused(tmp_path, bundle, join(header, payload), "token ids outside the vocabulary of 400")


def test_a_file_that_is_not_there_or_no_file_is_refused(tmp_path: Path, bundle: Bundle) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "missing", tmp_path / "zero\0"):
        with pytest.raises(PromptError, match="no such file: name one that a state was saved in"):
            read_state(path, bundle)
    with pytest.raises(PromptError, match=r"cannot be read \(File name too long\)"):
        read_state(tmp_path / ("x" * 999), bundle)


def test_memory_is_taken_only_for_what_the_file_holds(
    tmp_path: Path, bundle: Bundle, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    huge = bundle_with(bundle, max_context=1 << 50)
    header, payload = split(content)
    header["tokens"] = 1 << 45
    header["payload_bytes"] = (1 << 45) * (len(payload) // TOKENS)
    monkeypatch.setattr(state_file, "KVCache", None)
    check_refused(tmp_path, huge, join(header, payload), "2600 bytes after its header, which says")


def test_a_file_that_shrinks_while_it_is_read_is_refused(
    tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "long.state"
    write_state(path, bundle.fingerprint, make_state(bundle.manifest.kv_cache, tokens=MAX_CONTEXT))

    def shrinking(*arguments: Any) -> KVCache:
        os.truncate(path, path.stat().st_size - 1)
        return KVCache(*arguments)

    monkeypatch.setattr(state_file, "KVCache", shrinking)
    with pytest.raises(BundleError, match=r"long\.state: damaged: it ends too early"):
        read_state(path, bundle)


def test_random_damage_ends_in_a_clear_error_or_an_equal_state(
    tmp_path: Path, bundle: Bundle, state: SavedState, content: bytes
) -> None:
    rng = random.Random(0)
    refused = 0
    for _ in range(600):
        (tmp_path / "bad.state").write_bytes(rng.choice([flip, cut, insert, edit, scramble])(content, rng))
        try:
            found = read_state(tmp_path / "bad.state", bundle)
        except SatchelError as error:
            assert str(error).isprintable()
            refused += 1
        else:
            assert same(found, state)
    assert refused > 500


def flip(content: bytes, rng: random.Random) -> bytes:
    """Other bytes in up to three places."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def cut(content: bytes, rng: random.Random) -> bytes:
    """Some of the bytes left out, at the end or in the midst."""
    start = rng.randrange(len(content))
    return content[:start] + (content[rng.randrange(start, len(content)) :] if rng.random() < 0.5 else b"")


def insert(content: bytes, rng: random.Random) -> bytes:
    """Random bytes put in somewhere."""
    place = rng.randrange(len(content) + 1)
    return content[:place] + rng.randbytes(rng.choice([1, 8, 100])) + content[place:]


def edit(content: bytes, rng: random.Random) -> bytes:
    """One of the header's values but the messages exchanged, added or left out, and its hash right."""
    header, payload = split(content)
    key = rng.choice(["version", "fingerprint", "tokens", "dtype", "layers", "payload_bytes", "payload_sha256"])
    odd = [0, 1, -1, 2**31, 2**64, 10**30, 1e300, float("inf"), None, True, "", "int8", [], [[2, 16, 16]], {}, [{}]]
    if rng.random() < 0.2:
        del header[key]
    else:
        header[key if rng.random() < 0.8 else "more"] = rng.choice(odd)
    return join(header, payload)


def scramble(content: bytes, rng: random.Random) -> bytes:
    """The header's line damaged before its messages, and its hash right."""
    _, line, payload = content.split(b"\n", 2)
    end = line.index(b'"messages"')
    changed = rng.choice([flip, cut, insert])(line[:end], rng)
    return join(changed + line[end:] + b"\n", payload)
