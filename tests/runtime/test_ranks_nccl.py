"""Runs of bundles whose ranks exchange numbers over NCCL: what is refused, and ranks that run the same in step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support import in_step_run
from support.ranks import needs_mpi, satchel, together
from support.tiny_bundle import write_bundle
from support.tiny_cuda_bundle import write_cuda_bundle

from satchel.runtime.bundle.errors import BundleError
from satchel.runtime.bundle.ranks import RANKS_NAME, read_ranks
from satchel.runtime.cli import in_step
from satchel.runtime.cli.main import main, parse
from satchel.runtime.errors import ProviderError
from satchel.runtime.ort import collectives, session
from satchel.runtime.ort.open_bundle import open_bundle
from satchel.runtime.ort.providers import CUDA_GRAPH, ProviderChoice


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cuda_bundle(tmp_path_factory.mktemp("nccl") / "whole")


@pytest.fixture(scope="module")
def cut(whole: Path) -> Path:
    folder = whole.parent / "cut"
    line = ["shard", str(whole), "--tensor-parallel", "2", "--collectives", "nccl", "-o", str(folder), "--quiet"]
    assert main(line) == 0
    return folder


def test_an_onnxruntime_without_the_operator_is_refused_in_one_line(
    cut: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert collectives.lacking(cut) is not None
    bundle = open_bundle(cut / "rank_0")
    for provider in ("cpu", "cuda"):
        monkeypatch.setattr(session, "check_installed", lambda *_: None)
        with pytest.raises(ProviderError, match="AllReduce"):
            session.open_session(bundle, "prefill", session.SessionSettings(ProviderChoice(provider)))
    assert main(["run", str(cut / "rank_0"), "ab", "--provider", "cuda"]) == 2
    assert capsys.readouterr().err.count("satchel: error") == 1


def test_only_devices_that_nccl_joins_run_them(cut: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "lacking", lambda path: None)
    with pytest.raises(ProviderError, match="--provider cuda"):
        session.open_session(open_bundle(cut / "rank_0"), "prefill", session.SessionSettings())


def test_exchanges_are_not_captured_unless_the_user_says_so(whole: Path, cut: Path) -> None:
    manifests = [open_bundle(folder).manifest for folder in (whole, cut / "rank_1")]
    assert [ProviderChoice("cuda").session_options(each)[CUDA_GRAPH] for each in manifests] == ["1", "0"]
    assert ProviderChoice("cuda", {CUDA_GRAPH: "1"}).session_options(manifests[1])[CUDA_GRAPH] == "1"


@needs_mpi
def test_all_ranks_say_once_what_is_missing(cut: Path) -> None:
    found = satchel(2, "run", cut, "ab", "--provider", "cuda")
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.count("satchel: error") == 1
    assert "AllReduce" in found.stderr


@needs_mpi
def test_ranks_run_the_same_each_on_its_device_and_the_first_one_prints(cut: Path, tmp_path: Path) -> None:
    done = together(2, in_step_run.__file__, tmp_path, "run", cut, "ab", "--provider", "cuda", "--temperature", "1")
    assert (done.returncode, done.stdout) == (0, "text of rank_0\n"), done.stderr
    first, second = (json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(2))
    assert first["seed"] == second["seed"] is not None
    assert [each["provider_option"] for each in (first, second)] == [["device_id=0"], ["device_id=1"]]
    assert [each["quiet"] for each in (first, second)] == [False, True]


@needs_mpi
def test_what_ranks_cannot_do_in_step_is_refused_once(cut: Path, tmp_path: Path) -> None:
    done = together(2, in_step_run.__file__, tmp_path, "run", cut, "ab")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("satchel: error") == 1
    assert "--provider cuda" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "fits"),
    [
        (["chat"], False),
        (["run"], False),
        (["run", "--input", "lines.jsonl"], False),
        (["run", "ab"], True),
        (["run", "-p", "ab"], True),
        (["verify"], True),
    ],
)
def test_only_what_is_the_same_on_all_ranks_runs_in_step(line: list[str], fits: bool) -> None:
    args = parse([line[0], "cut", *line[1:], "--provider", "cuda"])
    assert (in_step._unfit(args) is None) == fits


@pytest.mark.parametrize(
    ("flags", "for_cuda"),
    [
        (["--collectives", "mpi"], True),
        ([], True),
        (["--collectives", "nccl"], False),
        (["--collectives", "nccl", "--pipeline-parallel", "2"], True),
        (["--collectives", "nccl", "--wire", "int8"], True),
    ],
)
def test_a_way_to_exchange_numbers_that_a_bundle_does_not_have_is_refused(
    whole: Path, tmp_path: Path, flags: list[str], for_cuda: bool
) -> None:
    given = whole if for_cuda else write_bundle(tmp_path / "cpu")
    assert main(["shard", str(given), "--tensor-parallel", "2", *flags, "-o", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


def test_an_unknown_way_is_refused(cut: Path, tmp_path: Path) -> None:
    shutil.copy(cut / RANKS_NAME, tmp_path)
    document = json.loads((tmp_path / RANKS_NAME).read_text())
    (tmp_path / RANKS_NAME).write_text(json.dumps(document | {"collectives": "gossip"}))
    with pytest.raises(BundleError):
        read_ranks(tmp_path)
