"""A conversation goes into a file and comes out equal, and a generator goes on with it as if nothing had been."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.full_disk import largest_file
from support.states import DETAILS, MESSAGES, OTHER_SPEC, TOKENS, bundle_with, make_state, same, split

from satchel.runtime.bundle.manifest import CacheSpec
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.errors import PromptError, SatchelError
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
