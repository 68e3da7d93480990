"""Bundles that cannot be changed have their specialized copy in the user's cache."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.command import Satchel
from support.specialized import files, logits
from support.tiny_bundle import change_manifest, write_bundle

from satchel.runtime.bundle import user_cache
from satchel.runtime.bundle.lock import BusyError, locked
from satchel.runtime.bundle.reader import read_bundle
from satchel.runtime.optimize.prepare import prepare, remove
from satchel.runtime.ort import machine
from satchel.runtime.ort.open_bundle import open_bundle
from satchel.runtime.tools.pack import pack
from satchel.runtime.util.child import python_path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "satchel" / "bundles"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


@pytest.fixture
def packed(tmp_path: Path, folder: Path) -> Path:
    pack(open_bundle(folder), tmp_path / "bundle.pyz")
    return tmp_path / "bundle.pyz"


@pytest.fixture
def read_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is said to be read-only: the tests may run as root, for whom none is."""
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: access(path, mode) and not (mode & os.W_OK and Path(path) == folder)
    )
    return folder


@pytest.mark.parametrize("kind", ["packed", "read_only"])
def test_what_cannot_be_changed_opens_from_the_cache(kind: str, cache: Path, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(kind)
    before = path.read_bytes() if path.is_file() else files(path)
    portable = open_bundle(path)
    assert portable.specialized is None
    expected = logits(portable)
    assert prepare(path, threads=1).made
    assert not prepare(path, threads=1).made
    bundle = open_bundle(path)
    assert bundle.specialized is not None
    assert bundle.folder.parent == cache
    assert (bundle.digest, bundle.fingerprint) == (portable.digest, portable.fingerprint)
    np.testing.assert_allclose(logits(bundle), expected, rtol=0, atol=1e-5)
    assert (path.read_bytes() if path.is_file() else files(path)) == before
    remove(path)
    assert open_bundle(path).specialized is None
    assert not list(cache.iterdir())


def test_only_the_same_bundle_on_the_same_machine_has_it(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(packed, threads=1)
    other = write_bundle(tmp_path / "other")
    change_manifest(other, "model", "eos_token_ids", to=[7])
    pack(read_bundle(other), tmp_path / "other.pyz")
    assert open_bundle(tmp_path / "other.pyz").specialized is None
    monkeypatch.setattr(machine, "processor_features", lambda: ("riscv64",))
    assert open_bundle(packed).specialized is None


def test_a_damaged_copy_is_removed(packed: Path, cache: Path) -> None:
    prepare(packed, threads=1)
    [copy] = cache.iterdir()
    weights = copy / "weights.bin"
    weights.write_bytes(bytes(weights.stat().st_size))
    assert open_bundle(packed).folder == packed
    assert not copy.exists()


def test_the_least_recently_used_are_evicted(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_cache, "LIMIT_BYTES", 250)
    for number, name in enumerate(("a", "b", "c")):
        with user_cache.adding(name) as folder:
            folder.mkdir()
            (folder / "data").write_bytes(bytes(100))
        os.utime(cache / name, (number, number)) if name != "c" else None
        if name == "b":
            user_cache.find("a")  # now b is the one used least recently
    assert sorted(path.name for path in cache.iterdir()) == ["a", "c"]


def test_a_failure_leaves_nothing_in_the_cache(cache: Path) -> None:
    with pytest.raises(KeyboardInterrupt), user_cache.adding("a") as folder:
        folder.mkdir()
        raise KeyboardInterrupt
    assert not list(cache.iterdir())


def test_one_process_at_a_time(folder: Path) -> None:
    hold = "import sys\nfrom pathlib import Path\nfrom satchel.runtime.bundle.lock import locked\n"
    hold += "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    environment = {**os.environ, "PYTHONPATH": python_path()}
    command = [sys.executable, "-P", "-c", hold, str(folder)]
    with subprocess.Popen(command, stdin=-1, stdout=-1, env=environment) as child:
        assert child.stdout is not None
        assert child.stdout.readline()
        with pytest.raises(BusyError), locked(folder):
            pass
        child.kill()  # the lock ends with its process
    with locked(folder):
        pass


def test_a_cache_that_cannot_be_written_is_one_line(
    satchel: Satchel, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert str(tmp_path / "file") in satchel.refuses("specialize", packed, "--threads", 1, "--quiet")
    assert stat.S_ISREG((tmp_path / "file").stat().st_mode)
