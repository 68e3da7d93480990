"""Runs of several ranks over MPI: the same text as one process, and an end within seconds when a rank is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from support import rank_exchanges
from support.ranks import ENVIRONMENT, command, needs_mpi, processes, satchel, together
from support.tiny_bundle import write_bundle
from support.tiny_hybrid import write_hybrid

from satchel.runtime.bundle.errors import BundleError
from satchel.runtime.bundle.ranks import RANKS_NAME, read_ranks
from satchel.runtime.cli.main import main
from satchel.runtime.execution.cpu import CpuEngine
from satchel.runtime.execution.ranks import world
from satchel.runtime.execution.ranks.lead import LeadEngine, Told
from satchel.runtime.execution.ranks.watch import _places
from satchel.runtime.execution.ranks.world import Member, _problem
from satchel.runtime.ort.open_bundle import open_bundle
from satchel.runtime.ort.session import SessionSettings

LIMIT = 5.0
"""Seconds in which a run ends after one of its ranks is lost."""

Lose = Callable[[psutil.Process, Path], object]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks") / "whole"
    write_bundle(folder)
    return folder


@pytest.fixture(scope="module")
def cut(whole: Path) -> Path:
    folder = whole.parent / "cut"
    assert main(["shard", str(whole), "--tensor-parallel", "2", "-o", str(folder), "--quiet"]) == 0
    return folder


@pytest.fixture(scope="module")
def staged(whole: Path) -> Path:
    folder = whole.parent / "staged"
    assert main(["shard", str(whole), "--pipeline-parallel", "2", "-o", str(folder), "--quiet"]) == 0
    return folder


@needs_mpi
@pytest.mark.parametrize("apart", [False, True], ids=["one machine", "several"])
def test_operators_exchange_numbers(apart: bool) -> None:
    for ranks in (2, 3):
        done = together(ranks, rank_exchanges.__file__, apart=apart)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("is right") == ranks


@pytest.mark.parametrize(
    ("cores", "machine", "count", "own"),
    [
        ([{0, 4}, {1, 5}, {2, 6}, {3, 7}], 8, 2, [{0, 1, 4, 5}, {2, 3, 6, 7}]),
        ([{0}, {1}, {2}], 3, 2, [{0}, {1, 2}]),
        ([{0}, {1}], 2, 3, None),
        ([{0}, {1}], 4, 2, None),
        ([{0}, {1}], 2, 1, None),
        ([], 2, 2, None),
    ],
    ids=["cores with two threads", "uneven", "too few", "bound by the launcher", "one rank", "unknown"],
)
def test_ranks_of_a_machine_divide_its_cores(
    cores: list[set[int]], machine: int, count: int, own: list[set[int]] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[set[int]] = []
    monkeypatch.setattr(world, "usable_cores", lambda: cores)
    monkeypatch.setattr(world, "usable_cpus", lambda: sum(map(len, cores)))
    monkeypatch.setattr(world.os, "cpu_count", lambda: machine)
    monkeypatch.setattr(world.os, "sched_setaffinity", lambda process, cpus: given.append(cpus), raising=False)
    for rank in range(count):
        world._keep_to_own_cores(rank, count)
    assert given == (own or [])


def alone(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "satchel", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, errors="replace", timeout=60, check=False)


def test_models_with_states_take_no_drafts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other ranks are not told that states go back. One rank alone does take drafts."""
    monkeypatch.setattr(CpuEngine, "why_not_ahead", lambda engine, adapter: None)
    settings, world = SessionSettings(threads=1), SimpleNamespace(results=None, stages=1)
    hybrid = open_bundle(write_hybrid(tmp_path / "hybrid", ("linear", "attention")))
    assert LeadEngine(hybrid, settings, world).why_not_ahead(None) is not None
    assert LeadEngine(open_bundle(write_bundle(tmp_path / "plain")), settings, world).why_not_ahead(None) is None


@needs_mpi
@pytest.mark.parametrize("way", ["cut", "staged"])
def test_two_ranks_write_the_text_of_one_process(whole: Path, way: str, request: pytest.FixtureRequest) -> None:
    options = ("ab", "--max-new-tokens", "40", "--no-specialize")
    expected, found = alone("run", whole, *options), satchel(2, "run", request.getfixturevalue(way), *options)
    assert (found.returncode, found.stdout) == (0, expected.stdout), found.stderr
    assert len(expected.stdout) > 20


@needs_mpi
@pytest.mark.parametrize("way", ["cut", "staged"])
def test_a_batch_with_kept_prefixes_is_that_of_one_process(
    whole: Path, way: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    cut = request.getfixturevalue(way)
    lines = [json.dumps({"prompt": f"ab ab ab ab {number}", "max_new_tokens": 8 + number}) for number in range(6)]
    (tmp_path / "prompts").write_text("\n".join(lines))
    options = ("--input", tmp_path / "prompts", "--batch", "3", "--quiet")
    assert alone("run", whole, *options, "--output", tmp_path / "one", "--no-specialize").returncode == 0
    done = satchel(2, "run", cut, *options, "--output", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    one, two = ([json.loads(line)["text"] for line in (tmp_path / name).open()] for name in ("one", "two"))
    assert one == two
    assert len(set(one)) > 3


def kill(process: psutil.Process, folder: Path) -> None:
    process.send_signal(signal.SIGKILL)


def stop(process: psutil.Process, folder: Path) -> None:
    process.send_signal(signal.SIGSTOP)


def lose_disk(process: psutil.Process, folder: Path) -> None:
    shutil.move(folder, folder.with_name("gone"))


@needs_mpi
@pytest.mark.parametrize(
    ("way", "rank", "lose", "reason"),
    [
        ("cut", 1, kill, "rank 1"),
        ("cut", 1, stop, "rank 1"),
        ("cut", 1, lose_disk, "rank_1"),
        ("cut", 0, stop, "rank 0"),
        ("staged", 1, kill, "rank 1"),
        ("staged", 0, stop, "rank 0"),
    ],
    ids=[
        "killed", "stopped", "without its disk", "the first one stopped", "a stage killed", "the first stage stopped",
    ],
)  # fmt: skip
def test_the_run_ends_when_a_rank_is_lost(
    way: str, tmp_path: Path, rank: int, lose: Lose, reason: str, request: pytest.FixtureRequest
) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(request.getfixturevalue(way), folder)
    line = command(2, "-m", "satchel", "serve", folder, "--port", "0")
    with subprocess.Popen(
        line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | ENVIRONMENT,
    ) as launcher:  # fmt: skip
        try:
            assert launcher.stdout is not None
            assert "serving" in launcher.stdout.readline()
            ranks = processes(launcher)
            assert sorted(ranks) == [0, 1]
            everything = psutil.Process(launcher.pid).children(recursive=True)
            start = time.monotonic()
            lose(ranks[rank], folder / f"rank_{rank}")
            output, _ = launcher.communicate(timeout=30)
            assert time.monotonic() - start < LIMIT
            assert launcher.returncode != 0
            assert reason in output
            assert "the run of all ranks has ended" in output
            left = [each for each in everything if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
            assert not left
        finally:
            launcher.kill()


@needs_mpi
def test_another_number_of_processes_is_refused(cut: Path) -> None:
    found = satchel(3, "run", cut, "ab")
    assert found.returncode == 2
    assert found.stderr.count("satchel: error") == 1
    assert "mpiexec -n 2" in found.stderr


@needs_mpi
def test_ranks_with_different_bundles_are_refused(cut: Path, tmp_path: Path) -> None:
    write_bundle(tmp_path / "other", seed=1)
    mixed = tmp_path / "mixed"
    shutil.copytree(cut, mixed)
    shutil.rmtree(mixed / "rank_1")
    assert (
        main(["shard", str(tmp_path / "other"), "--tensor-parallel", "2", "-o", str(tmp_path / "two"), "--quiet"]) == 0
    )
    shutil.copytree(tmp_path / "two" / "rank_1", mixed / "rank_1")
    found = satchel(2, "run", mixed, "ab")
    assert found.returncode == 2
    assert "rank 1" in found.stderr


def members(**second: str | None) -> list[Member]:
    first = {"host": "a", "process": 1, "satchel": "1", "digest": "x", "problem": None}
    return [Member(rank=0, **first), Member(rank=1, **{**first, "digest": "y", **second})]  # type: ignore[arg-type]


def problem(path: Path, found: list[Member]) -> str | None:
    mpi = SimpleNamespace(get_vendor=lambda: ("MPICH", (5, 0, 2)))
    return _problem(path, found, len(found), mpi)


def test_another_version_of_satchel_is_refused(tmp_path: Path) -> None:
    (tmp_path / RANKS_NAME).write_text(
        '{"format": "satchel-ranks", "version": 1, "tensor": 2, "stages": 1, "digests": ["x", "y"]}'
    )
    assert problem(tmp_path, members()) is None
    for other in ({"satchel": "2"}, {"digest": "z"}, {"problem": "no disk"}):
        message = problem(tmp_path, members(**other))
        assert message is not None
        assert "rank 1 on a" in message
    assert problem(tmp_path, members()[:1]) is not None


def test_a_cache_that_goes_while_a_step_is_told_is_told_of_later() -> None:
    sent: list[tuple[object, ...]] = []

    def tell_numbers(*numbers: object) -> None:
        sent.append(numbers)
        told._dropped_later(7)  # as the collector of garbage may at any time

    told = Told(SimpleNamespace(tell_numbers=tell_numbers, tell=lambda message: sent.append(tuple(message.values()))))  # type: ignore[arg-type]
    assert told.tell_numbers("one", 1, 2, 3, 4), "it has been sent: it must not be sent again"
    assert not told.tell_numbers("one", 1, 2, 3, 5)
    told.tell("decode")
    assert sent == [("one", 1, 2, 3, 4), ("decode", [7])]


def test_a_host_names_addresses_that_others_can_reach() -> None:
    name, process, *addresses = _places()
    assert (name, process) == (socket.gethostname(), str(os.getpid()))
    assert not [address for address in addresses if address.startswith("127.")]
    with socket.create_server(("", 0)) as listener:
        for address in addresses:
            socket.create_connection((address, listener.getsockname()[1]), timeout=5).close()


def test_without_mpi_the_message_says_what_to_install(
    cut: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert main(["run", str(cut), "ab"]) == 2
    assert "pip install" in capsys.readouterr().err


def test_one_part_does_not_run_alone(cut: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(cut / "rank_0"), "ab"]) == 2
    assert "mpiexec -n 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"format": "satchel-ranks", "version": 2}', '{"format": "satchel-ranks", "version": 1, "tensor": 2}'],
)
def test_a_damaged_list_of_ranks_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / RANKS_NAME).write_text(text)
    with pytest.raises(BundleError):
        read_ranks(tmp_path)
