"""The measure of memory bandwidth: what it prints and what it refuses; not what it finds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from satchel.runtime.errors import SatchelError
from satchel.runtime.tools.bench import bandwidth
from satchel.runtime.tools.bench.bandwidth import Bandwidth, measure, measure_in_child

MODULE = [sys.executable, "-P", "-m", "satchel.runtime.tools.bench.bandwidth"]


def test_it_prints_one_json_object_and_loads_no_onnx_runtime() -> None:
    done = subprocess.run([*MODULE, "--mib", "4", "--threads", "2"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
    found = json.loads(done.stdout)
    assert (found["threads"], found["buffer_mb"]) == (2, 4)
    assert found["gb_per_second"] > 0
    code = "import sys, satchel.runtime.tools.bench.bandwidth; print('onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_the_fastest_round_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.5, 0.25, 1.0])
    monkeypatch.setattr(bandwidth, "ROUNDS", 3)
    monkeypatch.setattr(bandwidth, "_seconds", lambda pool, slices: next(seconds))
    assert measure(2, 8 << 20) == Bandwidth((8 << 20) / 0.25 / 1e9, 2, 8)


def test_every_slice_is_written_and_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def largest(part: object) -> object:
        read.append((part.size, part.min(), part.max()))  # type: ignore[attr-defined]
        return part

    monkeypatch.setattr(bandwidth, "ROUNDS", 1)
    monkeypatch.setattr(bandwidth.np, "max", largest)
    measure(2, 2 << 20)
    assert sorted(read) == [(131072, 0, 0), (131072, 1, 1)]


@pytest.mark.parametrize("arguments", [("--threads", "0"), ("--mib", "0"), ("--threads", "8", "--mib", "4")])
def test_what_cannot_be_measured_is_one_line(arguments: tuple[str, ...]) -> None:
    done = subprocess.run([*MODULE, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("satchel: error: ")


def test_the_child_is_a_new_process_and_its_failure_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        out, err = (
            ('{"gb_per_second": 9.5, "threads": 3, "buffer_mb": 7}\n', "") if len(commands) == 1 else ("", "x\nno\n")
        )
        return subprocess.CompletedProcess(command, 0 if out else 1, out, err)

    monkeypatch.setattr(bandwidth.subprocess, "run", run)
    assert measure_in_child() == Bandwidth(9.5, 3, 7)
    assert commands == [MODULE]
    with pytest.raises(SatchelError, match=r"^the memory bandwidth could not be measured: no$"):
        measure_in_child()


def test_the_buffer_is_much_larger_than_the_caches_where_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_cache_bytes", lambda: 100 << 20)
    monkeypatch.setattr(bandwidth, "_available_bytes", lambda: 8 << 30)
    assert bandwidth.buffer_size() == 400 << 20
    monkeypatch.setattr(bandwidth, "_cache_bytes", lambda: 0)
    assert bandwidth.buffer_size() == 256 << 20
    monkeypatch.setattr(bandwidth, "_cache_bytes", lambda: 1 << 40)
    assert bandwidth.buffer_size() == 2 << 30
    monkeypatch.setattr(bandwidth, "_available_bytes", lambda: 1 << 30)
    assert bandwidth.buffer_size() == 256 << 20
