"""A state file of another bundle, a damaged one or a hostile one is refused in one clear line."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.states import bundle_with, join, make_state, resigned, same, split
from support.tiny_bundle import VOCABULARY, write_bundle

from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.errors import BundleError, PromptError, SatchelError
from satchel.runtime.generation import session_file
from satchel.runtime.generation.session_file import SavedState, read_state, write_state
from satchel.runtime.ort.open_bundle import open_bundle

KEY = "past_key_values.0.key"
Change = Callable[[dict[str, Any]], object]


def metadata(**values: Any) -> Change:
    return lambda header: header["__metadata__"].update(values)


def tensor(name: str, **values: Any) -> Change:
    return lambda header: header[name].update(values)


WRONG_HEADERS: list[tuple[Change, str]] = [
    (metadata(version="1"), "a state of version 1, but this satchel reads version 2"),
    (metadata(version="\x1b" * 400), r"a state of version (\\x1b){20}, but"),
    (metadata(format="pt"), "not a saved state of satchel"),
    (metadata(more="x"), "metadata"),
    (lambda header: header.pop("__metadata__"), "not a saved state of satchel"),
    (metadata(fingerprint="\x1b" * 999), r"saved with another bundle \((\\x1b){12}\)"),
    (metadata(details="[]"), "details"),
    (metadata(details='{"x": NaN}'), "messages or details"),
    (metadata(details="[" * 100_000), "messages or details"),
    (metadata(details="7" * 5000), "messages or details"),
    (lambda header: header.pop("token_ids"), "token ids"),
    (tensor("token_ids", shape=[]), "token ids"),
    (tensor("token_ids", shape=[0]), r"token ids is \[0\], where this bundle allows 1 to 64"),
    (tensor("token_ids", shape=[65]), r"\[65\]"),
    (tensor("token_ids", shape=[10**400]), r"\[10{38},"),
    (tensor("token_ids", shape=[6]), "KV cache"),
    (tensor("token_ids", data_offsets=[0, 41]), "KV cache"),
    (tensor(KEY, dtype="F16"), "KV cache"),
    (tensor(KEY, data_offsets=[-1, 2**63]), "KV cache"),
    (lambda header: header.pop(KEY), "KV cache"),
    (lambda header: header.update(more=header[KEY]), "KV cache"),
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
    pair = rf"another bundle \({bundle.fingerprint[:12]}\), this one is {other.fingerprint[:12]}"
    with pytest.raises(BundleError, match=rf"talk\.state: .*{pair}"):
        read_state(tmp_path / "talk.state", other)


@pytest.mark.parametrize(("change", "message"), WRONG_HEADERS)
def test_a_wrong_header_is_refused(
    tmp_path: Path, bundle: Bundle, content: bytes, change: Change, message: str
) -> None:
    header, payload = split(content)
    change(header)
    make = resigned if "__metadata__" in header else join
    check_refused(tmp_path, bundle, make(header, payload), message)


def test_bytes_that_are_no_state_are_refused(tmp_path: Path, bundle: Bundle, content: bytes) -> None:
    header, payload = split(content)
    nested = b'{"__metadata__": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    cut_at = len(content) - len(payload)
    for changed, message in (
        (b"", "not a saved state"),
        (b"GGUF" + content, "not a saved state"),
        (content[:90], "not a saved state"),
        (b"\xff" * 8 + content[8:], "not a saved state"),
        (join(b" " * (4 << 20) + b"{}", payload), "not a saved state"),
        (join(b"7" * 5000, payload), "not a saved state"),
        (join(nested, payload), "not a saved state"),
        (content[:cut_at], "0 bytes of tensors, where 5 tokens take 2600"),
        (content + b"\0", "2601 bytes of tensors"),
        (content[:-1] + bytes([content[-1] ^ 1]), "SHA-256"),
        (content.replace(b"Gr", b"gr", 1), "SHA-256"),
    ):
        assert changed != content
        check_refused(tmp_path, bundle, changed, message)
    check_refused(tmp_path, bundle, join(json.dumps(header).encode(), payload[::-1]), "SHA-256")


@pytest.mark.parametrize("token", [-1, VOCABULARY, 2**63 - 1])
def test_token_ids_outside_the_vocabulary_are_refused(
    tmp_path: Path, bundle: Bundle, content: bytes, token: int
) -> None:
    header, payload = split(content)
    payload = payload[:8] + token.to_bytes(8, "little", signed=True) + payload[16:]
    check_refused(tmp_path, bundle, resigned(header, payload), "token ids outside the vocabulary of 400")


def test_a_file_that_is_not_there_or_no_file_is_refused(tmp_path: Path, bundle: Bundle) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "missing", tmp_path / "zero\0"):
        with pytest.raises(PromptError, match="no such file"):
            read_state(path, bundle)
    with pytest.raises(PromptError, match=r"cannot be read \(File name too long\)"):
        read_state(tmp_path / ("x" * 999), bundle)


def test_memory_is_taken_only_for_what_the_file_holds(
    tmp_path: Path, bundle: Bundle, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A header that promises tebibytes, without any contradiction in it, allocates nothing."""
    huge, count = bundle_with(bundle, max_context=1 << 50), 1 << 45
    header, payload = split(content)
    end = 0
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = end, end + (entry["data_offsets"][1] - entry["data_offsets"][0]) // 5 * count
            entry["shape"] = [count if size == 5 else size for size in entry["shape"]]
            entry["data_offsets"] = [begin, end]
    monkeypatch.setattr(session_file, "KVCache", None)
    check_refused(tmp_path, huge, resigned(header, payload), "2600 bytes of tensors, where")


def test_random_damage_ends_in_a_clear_error_or_an_equal_state(
    tmp_path: Path, bundle: Bundle, state: SavedState, content: bytes
) -> None:
    rng = random.Random(0)
    refused = 0
    for _ in range(200):
        (tmp_path / "bad.state").write_bytes(rng.choice([flip, cut])(content, rng))
        try:
            found = read_state(tmp_path / "bad.state", bundle)
        except SatchelError as error:
            assert str(error).isprintable()
            refused += 1
        else:
            assert same(found, state)
    assert refused > 180


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
