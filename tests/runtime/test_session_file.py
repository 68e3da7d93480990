"""A conversation goes into a file and comes out equal; another bundle's file, a damaged or a hostile one is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.full_disk import largest_file
from support.states import (
    DETAILS,
    MESSAGES,
    OTHER_SPEC,
    TOKENS,
    bundle_with,
    join,
    make_state,
    resigned,
    same,
    split,
)
from support.tiny_bundle import VOCABULARY, write_bundle

from satchel.runtime.bundle.manifest import CacheSpec
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.errors import BundleError, PromptError, SatchelError
from satchel.runtime.execution.kv_cache import KVCache
from satchel.runtime.generation import session_file
from satchel.runtime.generation.generator import Generator
from satchel.runtime.generation.prefix_cache import Prefix
from satchel.runtime.generation.session_file import SavedState, read_state, write_state
from satchel.runtime.ort.open_bundle import open_bundle


@pytest.fixture(scope="module")
def bundle(tiny: Path) -> Bundle:
    return open_bundle(tiny)


@pytest.fixture(scope="module")
def state(bundle: Bundle) -> SavedState:
    return make_state(bundle.manifest.kv_cache)


@pytest.mark.parametrize("spec", [None, OTHER_SPEC], ids=["float32", "int8"])
@pytest.mark.parametrize("room", [1, 20], ids=["tight", "roomy"])
def test_a_state_comes_back_as_it_was(tmp_path: Path, bundle: Bundle, spec: CacheSpec | None, room: int) -> None:
    bundle = bundle_with(bundle, spec)
    state = make_state(bundle.manifest.kv_cache, room)
    path = tmp_path / "talk.state"
    for _ in range(2):
        write_state(path, bundle.fingerprint, state)
        found = read_state(str(path), bundle)
        assert same(found, state)
    assert found.prefix.cache.capacity == TOKENS
    assert found.prefix.ids.dtype == np.int64
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("spec", [None, OTHER_SPEC], ids=["float32", "int8"])
def test_the_file_is_what_the_safetensors_library_reads(tmp_path: Path, bundle: Bundle, spec: CacheSpec | None) -> None:
    from safetensors import safe_open

    bundle = bundle_with(bundle, spec)
    state = make_state(bundle.manifest.kv_cache)
    write_state(tmp_path / "talk.safetensors", bundle.fingerprint, state)
    header, payload = split((tmp_path / "talk.safetensors").read_bytes())
    assert (tmp_path / "talk.safetensors").stat().st_size % 8 == len(payload) % 8
    with safe_open(tmp_path / "talk.safetensors", "numpy") as file:
        metadata = file.metadata()
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
    assert metadata == header["__metadata__"]
    assert (metadata["format"], metadata["version"]) == ("satchel-state", "2")
    assert metadata["fingerprint"] == bundle.fingerprint
    assert (json.loads(metadata["messages"]), json.loads(metadata["details"])) == (list(MESSAGES), DETAILS)
    assert found.keys() == {"token_ids", *state.prefix.cache.past}
    np.testing.assert_array_equal(found["token_ids"], state.prefix.ids)
    for name, buffer in state.prefix.cache.past.items():
        assert found[name].dtype == buffer.dtype
        np.testing.assert_array_equal(found[name], buffer[0, :, :TOKENS])


def test_generation_goes_on_in_another_generator_as_if_it_had_not_stopped(tiny: Path, tmp_path: Path) -> None:
    prompt, turn = [5, 80, 199, 12], [7, 7, 300]
    first = Generator.open(tiny, threads=1)
    answer = list(first.generate(prompt, 12).token_ids)
    saved = first.save_state(tmp_path / "talk.state", prompt + answer, messages=MESSAGES, details=DETAILS)
    assert saved == len(prompt + answer) - 1  # the last token was never fed
    second = Generator.open(tiny, threads=1)
    state = second.load_state(tmp_path / "talk.state")
    assert state.prefix.ids.tolist() == (prompt + answer)[:saved]
    assert (state.messages, state.details) == (MESSAGES, DETAILS)
    whole = prompt + answer + turn
    found = second.generate(whole, 15)
    wanted = Generator.open(tiny, threads=1).generate(whole, 15)
    assert (found.reused_tokens, wanted.reused_tokens) == (saved, 0)
    assert found.token_ids == wanted.token_ids


def test_only_the_common_beginning_is_saved(tiny: Path, tmp_path: Path, bundle: Bundle) -> None:
    generator = Generator.open(tiny, threads=1)
    generator.generate([5, 80, 199, 12], 5)
    assert generator.save_state(tmp_path / "talk.state", [5, 80, 13, 12, 40]) == 2
    assert read_state(tmp_path / "talk.state", bundle).prefix.ids.tolist() == [5, 80]


def test_what_is_not_kept_cannot_be_saved(tiny: Path, tmp_path: Path) -> None:
    generator = Generator.open(tiny, threads=1)
    generator.generate([5, 80], 2)
    forgetful = Generator.open(tiny, threads=1, prefix_cache_mib=0)
    forgetful.generate([6], 2)
    for holder in (generator, forgetful):
        with pytest.raises(PromptError, match=r"raise --prefix-cache-mib"):
            holder.save_state(tmp_path / "talk.state", [6, 80])
    assert list(tmp_path.iterdir()) == []


def test_a_state_that_the_generator_has_no_room_for_is_refused_before_it_is_read(
    tiny: Path, tmp_path: Path, bundle: Bundle, state: SavedState, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "talk.state"
    write_state(path, bundle.fingerprint, state)
    exact = Generator.open(tiny, threads=1, max_context=TOKENS)
    exact.load_state(path)
    assert exact.prefix_cache.positions == TOKENS
    monkeypatch.setattr(session_file, "KVCache", None)
    small, forgetful = (
        Generator.open(tiny, threads=1, **o) for o in ({"max_context": TOKENS - 1}, {"prefix_cache_mib": 0})
    )
    with pytest.raises(PromptError, match=r"talk\.state: has 5 tokens .*--max-context"):
        small.load_state(path)
    with pytest.raises(PromptError, match=r"has 5 tokens .*--prefix-cache-mib"):
        forgetful.load_state(path)


@pytest.mark.parametrize("why", ["full disk", "interrupt"])
def test_a_write_that_fails_leaves_the_state_that_was_there(
    tmp_path: Path, bundle: Bundle, state: SavedState, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    path = tmp_path / "talk.state"
    write_state(path, bundle.fingerprint, state)
    before = path.read_bytes()
    later = make_state(bundle.manifest.kv_cache, seed=1)
    original: Callable[..., Iterator[memoryview]] = session_file._payload
    calls: list[bool] = []

    def interrupted(*arguments: Any) -> Iterator[memoryview]:
        calls.append(True)
        for number, part in enumerate(original(*arguments)):
            if len(calls) == 3 and number == 4:  # the third walk writes the payload
                raise KeyboardInterrupt
            yield part

    if why == "interrupt":
        monkeypatch.setattr(session_file, "_payload", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_state(path, bundle.fingerprint, later)
    else:
        with largest_file(2000), pytest.raises(SatchelError, match=r"^--save-state .*talk\.state: .*\("):
            write_state(path, bundle.fingerprint, later)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_to_is_named_with_its_option(
    tmp_path: Path, bundle: Bundle, state: SavedState
) -> None:
    with pytest.raises(SatchelError, match=r"^/save .*/none/talk\.state: there is no folder"):
        write_state(tmp_path / "none" / "talk.state", bundle.fingerprint, state, "/save")


def test_messages_that_are_no_json_are_refused(tmp_path: Path, bundle: Bundle, state: SavedState) -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    wrong = ({"a": b"bytes"}, {"a": float("inf")}, {"a": nested}, "text")
    for message in wrong:
        with pytest.raises(PromptError, match=r"talk\.state: messages and details cannot be written as JSON"):
            write_state(tmp_path / "talk.state", bundle.fingerprint, dataclasses.replace(state, messages=(message,)))
    with pytest.raises(PromptError, match=r"messages and details take \d+ bytes, more than 4194304"):
        write_state(
            tmp_path / "talk.state", bundle.fingerprint, dataclasses.replace(state, details={"a": "猫" * 700_000})
        )
    assert list(tmp_path.iterdir()) == []


def test_tokens_without_keys_and_values_are_refused(tmp_path: Path, bundle: Bundle) -> None:
    cache = KVCache(bundle.manifest.kv_cache, 4, 4)
    cache.advance(1)
    for count in (0, 2):
        with pytest.raises(PromptError, match="no keys and values for these tokens"):
            write_state(tmp_path / "talk.state", bundle.fingerprint, SavedState(Prefix(np.arange(count), cache)))


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
