"""What killed processes left behind is swept; what living ones work in stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from support.tiny_bundle import write_bundle

from satchel.runtime.bundle.atomic_write import atomic_write
from satchel.runtime.bundle.scratch import scratch_folder
from satchel.runtime.ort.open_bundle import open_bundle
from satchel.runtime.tools.pack import pack, unpack
from satchel.runtime.util.child import python_path

GONE = (1 << 22) + 1
"""No Linux process has this id."""

STALLED = """
import sys, time
from satchel.runtime.ort.open_bundle import open_bundle
from satchel.runtime.optimize import specialize

def stall(*_):
    print("working", flush=True)
    time.sleep(60)

specialize.save_optimized = stall
specialize.specialize(open_bundle(sys.argv[1]), threads=1)
"""


def test_the_next_open_sweeps_what_a_killed_specialize_left(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle")
    before = sorted(os.listdir(folder))
    command = [sys.executable, "-P", "-c", STALLED, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": python_path()}) as child:
        assert child.stdout is not None
        assert child.stdout.readline()
        open_bundle(folder)
        assert list(folder.glob(".specialize-*")), "a living process keeps its folder"
        child.send_signal(signal.SIGKILL)
    assert list(folder.glob(".specialize-*"))
    open_bundle(folder)
    assert sorted(os.listdir(folder)) == before


def test_unpack_and_written_files_sweep_too(tmp_path: Path) -> None:
    packed = tmp_path / "bundle.pyz"
    pack(open_bundle(write_bundle(tmp_path / "bundle")), packed)
    left = [tmp_path / f".satchel-unpack-{GONE}-abc", tmp_path / f".satchel-{GONE}-7.part"]
    living = [tmp_path / f".satchel-unpack-{os.getppid()}-abc", tmp_path / f".satchel-{os.getppid()}-7.part"]
    for path in (left[0], living[0]):
        path.mkdir()
        (path / "half").write_bytes(b"half")
    for path in (left[1], living[1]):
        path.write_bytes(b"half")
    unpack(open_bundle(packed), tmp_path / "again")
    assert [path.exists() for path in left] == [False, True]
    atomic_write(tmp_path / "text", "text", "--output")
    assert [path.exists() for path in left] == [False, False]
    assert all(path.exists() for path in living)


def test_of_this_process_id_only_what_is_in_use_stays(tmp_path: Path) -> None:
    old = tmp_path / f".x-{os.getpid()}-old"  # left by an earlier container, in which this process has the same id
    old.mkdir()
    os.utime(old, (0, 0))
    with scratch_folder(tmp_path, ".x-") as first, scratch_folder(tmp_path, ".x-") as second:
        assert first.is_dir()
        assert second.is_dir()
        assert not old.exists()
